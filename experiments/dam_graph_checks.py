"""Checks of the DAM graph study's config that types do not make, before any work."""

import math
from typing import Any

from experiments.checks import LARGEST_INT, check_fields, check_seeds, check_values
from ntt_sparse.gates.dam import Dam

_RANGES = {
    "model.hidden": (1, LARGEST_INT),
    "model.bottleneck": (2, LARGEST_INT),
    "training.epochs": (1, LARGEST_INT),
    "training.learning_rate": (0, 1e30),
    "training.record_every": (1, LARGEST_INT),
    "training.max_steps": (0, LARGEST_INT),
    "checkpoint_seconds": (0, math.inf),
}


def check_config(config: Any) -> None:
    """Checks values and how they go together.

    Raises:
        ValueError: A value is unknown or out of range; the message names the field.
    """
    check_fields(config, {}, _RANGES)
    check_seeds(config)
    check_values(config, "coefficients", 0, 1e30)
    if config.sizes:
        check_values(config, "sizes", 1, config.model.bottleneck)
    if any(type(size) is not int for size in config.sizes):
        raise ValueError(f"config.sizes is {config.sizes}, expected integers")
    # Gates that start closed are an error here.
    try:
        Dam(initial=config.initial).init(config.model.bottleneck)
    except ValueError as error:
        raise ValueError(f"config.initial is {config.initial}: {error}") from error
