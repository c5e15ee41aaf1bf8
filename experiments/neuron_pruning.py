r"""Neuron pruning by representation: train, prune neurons, train on, again and again.

One command trains networks of every seed, dropout rate, width and pruning rate, prunes them by the
similarity of their representations (CKA) and by rivals, and writes summary.json, report.md,
metrics and figures into the work directory. The same command after an interruption goes on where
it stopped.

    python -m experiments.neuron_pruning
    python -m experiments.neuron_pruning \
        --config=experiments/configs/neuron_pruning.py:depth --config.seeds=1,2,3
"""

from experiments import cli
from experiments.configs import neuron_pruning as configs

if __name__ == "__main__":
    cli.start("neuron_pruning", configs, doc=__doc__)
