r"""Settings of DAM against an L1 norm on images (Bu et al. 2021, arXiv:2110.01684, Fig. 5).

A name picks the settings. `,smoke` shrinks them to seconds, to see that all parts work:

    python -m experiments.dam_autoencoder
    python -m experiments.dam_autoencoder \
        --config=experiments/configs/dam_autoencoder.py:mnist_paper,smoke

=============  ==================================================================
digits         the default, ours: 8x8 digits inside scikit-learn, no download
mnist          Fig. 5 with the layers of the published code, 784-128-64-32-50
mnist_paper    the same with those of the paper's text, 784-64-32-50
=============  ==================================================================

Decoders are mirrored. ReLU between layers, tanh on the outputs, pixels from -1 to 1. The loss is
the mean squared error, plus lambda times the offset (DAM; order numbers as in the paper, from
k / n, where the code starts from 0) or the mean gate (L1). Adam, without decay or cold start.

The F1 score is the paper's: the macro average on test images, of scikit-learn's `MLPClassifier`
with two hidden layers of 50 and seed 1, on the gated codes. The published one learns from all
60,000 training images, a minute or more for each network; here it has 10,000, spread evenly over
the training split (`--config.downstream.examples=0` for all). Test images choose nothing.
"""

from typing import Any

import ml_collections

from experiments.configs.common import build

# The grid of the published code. The appendix says up to 10 for DAM and up to 25 for L1.
_DAM = (0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, *(5.0 + 0.5 * i for i in range(10)))
_L1 = (*_DAM, 10.0, 15.0, 20.0, 25.0)

_BASE: dict[str, Any] = {
    "name": "",
    # The gates compared: dam, l1. Each is run with every coefficient of its own, and every seed.
    "gates": "dam,l1",
    "dam_coefficients": _DAM,
    "l1_coefficients": _L1,
    "seeds": (1, 2, 3, 4, 5),
    # Offset (dam) or gates (l1) to start from.
    "initial": 1.0,
    "data": {"name": "mnist"},
    # Widths of the encoder: hidden layers and bottleneck.
    "model": {"hidden": (128, 64, 32), "bottleneck": 50},
    "training": {
        "epochs": 100,
        "batch_size": 512,
        "learning_rate": 1e-3,
        # Steps between records, which look at all test images; 0: once an epoch.
        "record_every": 1000,
        # 0: epochs decide.
        "max_steps": 0,
    },
    "downstream": {
        # Training images of the classifier (0: all), and its epochs at most.
        "examples": 10_000,
        "epochs": 100,
    },
    "checkpoint_seconds": 60.0,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "digits": {
        "dam_coefficients": (0.01, 0.05, 0.1, 0.2, 0.5, 1.0),
        "l1_coefficients": (0.01, 0.1, 0.5, 1.0, 2.0, 5.0),
        "data.name": "digits",
        "model.hidden": (48, 32),
        "model.bottleneck": 20,
        "training.epochs": 200,
        "training.batch_size": 128,
        "training.learning_rate": 5e-3,
        "training.record_every": 200,
        "downstream.examples": 0,
    },
    "mnist": {},
    "mnist_paper": {"model.hidden": (64, 32)},
}
_SMOKE = {
    "seeds": (1, 2),
    "training.max_steps": 20,
    "training.record_every": 10,
    "downstream.examples": 200,
    "downstream.epochs": 5,
}


def get_config(name: str = "digits") -> ml_collections.ConfigDict:
    """The settings of a name, such as `"mnist"` or `"mnist_paper,smoke"`.

    Raises:
        ValueError: The name or an option is unknown.
    """
    return build(name, _BASE, _CONFIGS, {"smoke": _SMOKE})
