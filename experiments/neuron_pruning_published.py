"""Numbers that the author of neuron pruning by representation published with the code.

Higgins, "Representation aware pruning with centered kernel alignment", 2023: result files of
https://github.com/SupurCalvinHiggins/cka-prune. MNIST, 784-512-512-10, dropout 0.5, 20 % in
each iteration, nine trials: mean test accuracies, and the part of the neurons of an iteration that
both criteria prune. That code judges each neuron by its removal alone (one-shot).
"""

NETWORK, DROPOUT, RATE = "512-512", 0.5, 0.2
# The rest of the settings that they are of.
SETTINGS = {
    "data.name": "mnist", "data.pixels": "unit", "amount": "rate", "activations": "before",
    "samples": 512, "training.learning_rate": 1e-3, "training.batch_size": 512,
    "training.epochs": 50, "training.patience": 3, "training.max_steps": 0,
    "training.record_every": 0,
}  # fmt: skip

# By iteration: CKA, L1, agreement.
SECTION_4_1 = (
    (0.98321, 0.98328, None),
    (0.98256, 0.98317, 0.441),
    (0.98172, 0.98266, 0.195),
    (0.98088, 0.98084, 0.136),
    (0.97918, 0.97970, 0.105),
    (0.97720, 0.97767, 0.091),
    (0.97536, 0.97494, 0.077),
    (0.97236, 0.97096, 0.041),
    (0.96867, 0.96667, 0.052),
    (0.96318, 0.96046, 0.047),
    (0.95669, 0.95375, 0.045),
    (0.94890, 0.94514, 0.049),
    (0.93877, 0.93403, 0.061),
    (0.92703, 0.91399, 0.025),
    (0.89576, 0.88228, 0.008),
)
