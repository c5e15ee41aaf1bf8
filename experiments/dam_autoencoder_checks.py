"""Checks of the DAM autoencoder study's config that types do not make, before any work."""

import math
from typing import Any

from experiments.checks import LARGEST_INT, check_fields, check_names, check_seeds, check_values
from experiments.dam_representation_members import KINDS
from ntt_sparse.data.images import ImageData

_RANGES = {
    "model.bottleneck": (2, LARGEST_INT),
    "training.epochs": (1, LARGEST_INT),
    "training.batch_size": (1, LARGEST_INT),
    "training.learning_rate": (0, 1e30),
    "training.record_every": (0, LARGEST_INT),
    "training.max_steps": (0, LARGEST_INT),
    "downstream.examples": (0, LARGEST_INT),
    "downstream.epochs": (1, LARGEST_INT),
    "checkpoint_seconds": (0, math.inf),
}


def check_config(config: Any) -> None:
    """Checks values and how they go together.

    Raises:
        ValueError: A value is unknown or out of range; the message names the field.
    """
    check_names(config, "gates", tuple(KINDS))
    check_fields(config, {}, _RANGES)
    check_seeds(config)
    hidden = config.model.hidden
    if not hidden or any(type(width) is not int or width < 1 for width in hidden):
        raise ValueError(f"config.model.hidden is {hidden}, expected widths of 1 or more")
    for gate in config.gates.split(","):
        check_values(config, f"{gate}_coefficients", 0, 1e30)
        # A gate that starts closed is an error here.
        try:
            KINDS[gate](initial=config.initial).init(config.model.bottleneck)
        except ValueError as error:
            raise ValueError(f"config.initial is {config.initial} for {gate}: {error}") from error


def check_sizes(config: Any, data: ImageData) -> None:
    """Checks that there are as many images as the config asks for.

    Raises:
        ValueError: There are not; the message names the field.
    """
    for field in ("training.batch_size", "downstream.examples"):
        stage, name = field.split(".")
        if config[stage][name] > len(data.train.y):
            raise ValueError(
                f"config.{field} is {config[stage][name]}, there are {len(data.train.y)} "
                "training images"
            )
