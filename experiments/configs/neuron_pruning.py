r"""Settings of neuron pruning by representation (Higgins 2023).

A name picks the settings. `,smoke` shrinks them to seconds, to see that all parts work:

    python -m experiments.neuron_pruning
    python -m experiments.neuron_pruning \
        --config=experiments/configs/neuron_pruning.py:width,smoke

============  =====================================================================
iterative     the default: Section 4.1, 784-512-512-10 on MNIST, nine seeds
dropout       Section 4.2: dropout of 0, 0.1, 0.3, 0.5 and 0.7
width         Section 4.3: two layers of 128, 256, 512 or 1024 neurons
depth         Section 4.4: one, two or three layers, also with a later layer pruned
              after the earlier ones (`cka_sequential`)
rate          Section 4.5: 10, 20, 30 and 40 % of what is left in each iteration
criteria      all criteria on the network of Section 4.1
convolutions  LeNet-5-Caffe, channels and neurons
============  =====================================================================

Networks are widths joined by dashes, or `lenet5_caffe`. Every option that has several values is
crossed with every other. The published numbers are of the published code, which is `cka_oneshot`;
`cka` is the text of the paper.

A neuron that goes is a constant, by its bias. In the published code that constant is dropped out
and its bias trained on; here it goes into the biases of the next layer, so that the network gets
smaller.
"""

from typing import Any

import ml_collections

from experiments.configs.common import build

_BASE: dict[str, Any] = {
    "name": "",
    "data": {
        "name": "mnist",
        "validation_fraction": 1 / 12,
        "split_seed": 42,
        # Pixels: "unit", from 0 to 1 as in the published code, or "standardised", as in the paper.
        "pixels": "unit",
    },
    "networks": "512-512",
    # From cka, cka_oneshot (the published code), cka_sequential, l1, random.
    "criteria": "cka,cka_oneshot,l1",
    "dropouts": (0.5,),
    # Fractions of the neurons of each layer that are left.
    "rates": (0.2,),
    "seeds": (1, 2, 3, 4, 5, 6, 7, 8, 9),
    # The first is that of the whole network.
    "iterations": 15,
    # What says how many neurons of a layer go: "rate", those of each layer; "total", the rate of
    # all layers together, at one similarity; "threshold", as long as the similarity stays.
    "amount": "rate",
    "threshold": 0.99,
    # Validation images, drawn anew in each iteration, and which activations of them are compared:
    # "before" the nonlinearity, as in the published code, or "after".
    "samples": 512,
    "activations": "before",
    # Whether networks get smaller between iterations, or zeros stand where neurons were, with the
    # same result.
    "compact": True,
    "training": {
        "learning_rate": 1e-3,
        "batch_size": 512,
        "epochs": 50,
        # Records (epochs) without a lower loss on validation images after which a network stops.
        "patience": 3,
        # Steps between records; 0: once an epoch.
        "record_every": 0,
        # 0: epochs decide.
        "max_steps": 0,
    },
    "checkpoint_seconds": 60.0,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "iterative": {},
    "dropout": {"dropouts": (0.0, 0.1, 0.3, 0.5, 0.7), "seeds": tuple(range(10))},
    "width": {"networks": "128-128,256-256,512-512,1024-1024", "seeds": tuple(range(10))},
    "depth": {
        "networks": "512,512-512,512-512-512",
        "criteria": "cka,cka_oneshot,cka_sequential,l1",
        "seeds": tuple(range(10)),
    },
    "rate": {"rates": (0.1, 0.2, 0.3, 0.4), "seeds": tuple(range(10))},
    "criteria": {"criteria": "cka,cka_oneshot,cka_sequential,l1,random"},
    "convolutions": {
        "networks": "lenet5_caffe",
        "seeds": (1, 2, 3, 4, 5),
        "iterations": 10,
    },
}
_SMOKE = {
    "networks": "16-12",
    "dropouts": (0.5,),
    "rates": (0.4,),
    "seeds": (1, 2),
    "iterations": 3,
    "samples": 64,
    "training.max_steps": 4,
    "training.record_every": 2,
    "training.batch_size": 32,
}


def get_config(name: str = "iterative") -> ml_collections.ConfigDict:
    """The settings of a name, such as `"iterative"` or `"depth,smoke"`.

    Raises:
        ValueError: The name or an option is unknown.
    """
    return build(name, _BASE, _CONFIGS, {"smoke": _SMOKE})
