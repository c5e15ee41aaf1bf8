"""Checks of the neuron pruning study's config that types do not make, before any work."""

import math
import re
from typing import Any

from experiments.checks import LARGEST_INT, check_fields, check_names, check_seeds, check_values
from experiments.neuron_pruning_members import CONVOLUTIONS
from experiments.neuron_pruning_orders import CRITERIA
from ntt_sparse.data.images import ImageData

_CHOICES = {
    "data.pixels": ("unit", "standardised"),
    "amount": ("rate", "total", "threshold"),
    "activations": ("before", "after"),
    "compact": (True, False),
}
_RANGES = {
    "data.split_seed": (0, 2**32 - 1),
    "iterations": (1, 99),
    "samples": (2, LARGEST_INT),
    "training.learning_rate": (0, 1e30),
    "training.batch_size": (1, LARGEST_INT),
    "training.epochs": (1, LARGEST_INT),
    "training.patience": (1, LARGEST_INT),
    "training.record_every": (0, LARGEST_INT),
    "training.max_steps": (0, LARGEST_INT),
    "checkpoint_seconds": (0, math.inf),
}
_WIDTHS = re.compile(r"[1-9]\d*(-[1-9]\d*)*")


def check_config(config: Any) -> None:
    """Checks values and how they go together.

    Raises:
        ValueError: A value is unknown or out of range; the message names the field.
    """
    check_names(config, "criteria", tuple(CRITERIA))
    check_fields(config, _CHOICES, _RANGES)
    check_seeds(config)
    check_values(config, "dropouts", 0, 0.99)
    check_values(config, "rates", 0.001, 0.99)
    networks = config.networks.split(",")
    known = all(name == CONVOLUTIONS or _WIDTHS.fullmatch(name) for name in networks)
    if not known or len(set(networks)) < len(networks):
        raise ValueError(
            f"config.networks is {config.networks!r}: expected different widths, such as "
            f"'512-512,1024-1024', or {CONVOLUTIONS!r}"
        )
    if not 0 < config.threshold <= 1:
        raise ValueError(f"config.threshold is {config.threshold}, expected a similarity in (0, 1]")
    # The negated form also refuses NaN.
    if not 0 < config.data.validation_fraction < 1:
        raise ValueError(
            f"config.data.validation_fraction is {config.data.validation_fraction}, expected a "
            "fraction in (0, 1): networks stop, and neurons go, by held-out images"
        )
    if config.amount != "rate" and "cka_sequential" in config.criteria.split(","):
        raise ValueError(
            f"config.amount is {config.amount!r}, which has no meaning for 'cka_sequential': "
            "expected 'rate', as later layers are looked at when the earlier ones are done"
        )
    if config.amount == "threshold" and len(config.rates) > 1:
        raise ValueError(
            f"config.rates is {config.rates}, expected one: with config.amount 'threshold' it "
            "is not read"
        )


def check_sizes(config: Any, data: ImageData) -> None:
    """Checks that there are as many images as the config asks for, and large enough.

    Raises:
        ValueError: There are not; the message names the field.
    """
    for field, asked, split in (
        ("samples", config.samples, data.validation),
        ("training.batch_size", config.training.batch_size, data.train),
    ):
        if asked > len(split.y):
            kind = "validation" if split is data.validation else "training"
            raise ValueError(f"config.{field} is {asked}, there are {len(split.y)} {kind} images")
    if CONVOLUTIONS in config.networks.split(",") and min(data.input_shape[:2]) < 16:
        raise ValueError(
            f"config.networks holds {CONVOLUTIONS!r}, images are {data.input_shape[:2]}: it needs "
            "16 x 16 or more"
        )
