"""Checks of the recommender study's config that types do not make, before any work."""

import math
from typing import Any

from experiments.checks import LARGEST_INT, check_fields, check_names, check_seeds, check_values
from ntt_sparse.data import ratings
from ntt_sparse.gates.dam import Dam

GATES = ("none", "dam")

_RANGES = {
    "data.validation_fraction": (0, 0.999),
    "data.most": (1, LARGEST_INT),
    "model.bases": (1, LARGEST_INT),
    "model.code": (2, LARGEST_INT),
    "model.dropout": (0, 0.999),
    "model.edge_dropout": (0, 0.999),
    "training.epochs": (1, LARGEST_INT),
    "training.batch_size": (1, LARGEST_INT),
    "training.learning_rate": (0, 1e30),
    "training.decay_epochs": (1, LARGEST_INT),
    "training.decay": (0, 1),
    "training.adjacent": (0, 1e30),
    "training.record_every": (0, LARGEST_INT),
    "training.max_steps": (0, LARGEST_INT),
    "checkpoint_seconds": (0, math.inf),
}


def check_config(config: Any) -> None:
    """Checks values and how they go together.

    Raises:
        ValueError: A value is unknown or out of range; the message names the field.
    """
    check_names(config, "gates", GATES)
    check_fields(config, {"data.name": ratings.NAMES}, _RANGES)
    check_seeds(config)
    check_values(config, "dam_coefficients", 0, 1e30)
    widths = config.model.widths
    if not widths or any(type(width) is not int or width < 1 for width in widths):
        raise ValueError(f"config.model.widths is {widths}, expected widths of 1 or more")
    before = config.ensemble
    if len(set(before)) < len(before) or any(
        type(epochs) is not int or not 1 <= epochs < config.training.epochs for epochs in before
    ):
        raise ValueError(
            f"config.ensemble is {before}, expected different numbers of epochs before the end, "
            f"from 1 to {config.training.epochs - 1}"
        )
    # A gate that starts closed is an error here.
    try:
        Dam(initial=config.initial).init(config.model.code)
    except ValueError as error:
        raise ValueError(f"config.initial is {config.initial}: {error}") from error


def check_sizes(config: Any, count: int) -> None:
    """Checks that there are as many training ratings as the config asks for.

    Raises:
        ValueError: There are not; the message names the field.
    """
    held = round(config.data.validation_fraction * count)
    if config.data.validation_fraction > 0 and held == 0:
        raise ValueError(
            f"config.data.validation_fraction is {config.data.validation_fraction}, which holds "
            f"out none of {count} ratings: ask for more, or for 0"
        )
    if config.training.batch_size > count - held:
        raise ValueError(
            f"config.training.batch_size is {config.training.batch_size}, there are "
            f"{count - held} training ratings"
        )
