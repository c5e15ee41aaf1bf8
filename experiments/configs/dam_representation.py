r"""Settings of DAM in representation learning (Bu et al. 2021, arXiv:2110.01684, Table 3).

A name picks the settings. `,smoke` shrinks them to seconds, to see that all parts work:

    python -m experiments.dam_representation
    python -m experiments.dam_representation \
        --config=experiments/configs/dam_representation.py:neural,smoke

======================  ==============================================================
linear                  the default: Fig. 3a, from 100 dimensions to r of 5, 10, 15, 20
quadratic               Fig. 3b
neural                  Fig. 3c
linear_normal           the same from standard normal weights: variances 3 r times as large
linear_sensitivity      Fig. 9: learning rates against coefficients and first offsets
quadratic_sensitivity   Fig. 10
neural_sensitivity      Fig. 11
======================  ==============================================================

Data are made: r independent normal factors through a random decoder. Every network has data,
weights and a seed of its own.
"""

from typing import Any

import ml_collections

from experiments.configs.common import build

_BASE: dict[str, Any] = {
    "name": "",
    # Of the decoder, and of what makes the data: linear, quadratic or neural.
    "task": "linear",
    # Weights of what makes the data: "initial", those a decoder starts with (U(-1, 1) / sqrt(r)),
    # as the published notebooks; "normal", standard normal, as the paper says of the linear case.
    "generator": "initial",
    # The gates compared: dam, l1.
    "gates": "dam",
    "ranks": (5, 10, 15, 20),
    "seeds": (1, 2, 3, 4, 5),
    "coefficients": (0.01,),
    "learning_rates": (0.01,),
    # Offsets (dam) or gates (l1) to start from.
    "initials": (1.0,),
    "examples": 5000,
    "dimension": 100,
    "bottleneck": 50,
    "training": {
        # Each epoch is one step on all examples.
        "epochs": 2000,
        # Decay of all parameters, gates among them, added to gradients.
        "weight_decay": 1e-6,
        "record_every": 50,
        # 0: epochs decide.
        "max_steps": 0,
    },
    "checkpoint_seconds": 60.0,
}
_QUADRATIC = {"task": "quadratic", "initials": (5.0,), "training.epochs": 5000}
_NEURAL = {
    "task": "neural",
    "coefficients": (0.1,),
    "learning_rates": (1e-3,),
    "training.epochs": 10_000,
    "training.weight_decay": 0.0,
    "training.record_every": 100,
}
# The figures do not say their r; one in the middle, and three seeds.
_SENSITIVITY = {
    "ranks": (10,),
    "seeds": (1, 2, 3),
    "learning_rates": (1e-4, 1e-3, 1e-2, 1e-1),
    "coefficients": (1e-3, 1e-2, 1e-1, 1.0),
    "initials": (0.5, 1.0, 2.0, 5.0),
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear_normal": {"generator": "normal"},
    "quadratic": _QUADRATIC,
    "neural": _NEURAL,
    "linear_sensitivity": _SENSITIVITY,
    "quadratic_sensitivity": {**_QUADRATIC, **_SENSITIVITY},
    "neural_sensitivity": {**_NEURAL, **_SENSITIVITY},
}
_SMOKE = {
    "seeds": (1, 2),
    "ranks": (2, 4),
    "examples": 200,
    "dimension": 20,
    "bottleneck": 10,
    "training.max_steps": 20,
    "training.record_every": 10,
}


def get_config(name: str = "linear") -> ml_collections.ConfigDict:
    """The settings of a name, such as `"linear"` or `"neural,smoke"`.

    Raises:
        ValueError: The name or an option is unknown.
    """
    return build(name, _BASE, _CONFIGS, {"smoke": _SMOKE})
