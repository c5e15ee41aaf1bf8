"""Checks of the DAM representation study's config that types do not make, before any work."""

import math
from typing import Any

from experiments.checks import LARGEST_INT, check_fields, check_names, check_seeds, check_values
from experiments.dam_representation_members import KINDS

_CHOICES = {
    "task": ("linear", "quadratic", "neural"),
    "generator": ("initial", "normal"),
}
_RANGES = {
    "examples": (2, LARGEST_INT),
    "dimension": (2, LARGEST_INT),
    "bottleneck": (2, LARGEST_INT),
    "checkpoint_seconds": (0, math.inf),
    "training.epochs": (1, LARGEST_INT),
    "training.weight_decay": (0, 1e30),
    "training.record_every": (1, LARGEST_INT),
    "training.max_steps": (0, LARGEST_INT),
}


def check_config(config: Any) -> None:
    """Checks values and how they go together.

    Raises:
        ValueError: A value is unknown or out of range; the message names the field.
    """
    check_names(config, "gates", tuple(KINDS))
    check_fields(config, _CHOICES, _RANGES)
    check_seeds(config)
    check_values(config, "coefficients", 0, 1e30)
    check_values(config, "learning_rates", 0, 1e30)
    check_values(config, "initials", -1e30, 1e30)
    most = min(config.dimension, config.bottleneck)
    check_values(config, "ranks", 1, most)
    if any(type(rank) is not int for rank in config.ranks):
        raise ValueError(f"config.ranks is {config.ranks}, expected integers")
    for gate in config.gates.split(","):
        for initial in config.initials:
            # A gate that starts closed is an error here.
            try:
                KINDS[gate](initial=initial).init(config.bottleneck)
            except ValueError as error:
                raise ValueError(f"config.initials holds {initial} for {gate}: {error}") from error
