"""Checks of the study's config that types do not make, before any work."""

import math
from typing import Any

from experiments.checks import LARGEST_INT, check_fields, check_members, check_names
from experiments.ntt_members import METHODS
from ntt_sparse.data.images import ImageData

_CHOICES = {
    "scope": ("layer", "global"),
    "model.padding": ("", "VALID", "SAME"),
    "model.norm": ("", "group", "none"),
    "transfer.initial_mask": ("magnitude", "logit_snip"),
    "transfer.wrt": ("masked", "all"),
    "transfer.distance": ("full", "trace", "sketch"),
    "supervised.optimizer": ("adam", "sgd"),
    "supervised.loss": ("cross_entropy", "squared_error"),
}
# Smallest and largest value of each number; the ends are allowed.
_RANGES = {
    "snip_batch_size": (1, LARGEST_INT),
    "probe": (0, LARGEST_INT),
    "checkpoint_seconds": (0, math.inf),
    "data.per_class": (0, LARGEST_INT),
    "data.split_seed": (0, 2**32 - 1),
    "transfer.epochs": (1, LARGEST_INT),
    "transfer.batch_size": (1, LARGEST_INT),
    "transfer.max_steps": (0, LARGEST_INT),
    "transfer.learning_rate": (0, 1e30),
    "transfer.kernel_weight": (0, 1e30),
    "transfer.l2_weight": (0, 1e30),
    "transfer.probes": (1, LARGEST_INT),
    "transfer.refresh_every": (0, LARGEST_INT),
    "transfer.record_every": (0, LARGEST_INT),
    "supervised.epochs": (1, LARGEST_INT),
    "supervised.batch_size": (1, LARGEST_INT),
    "supervised.max_steps": (0, LARGEST_INT),
    "supervised.learning_rate": (0, 1e30),
    "supervised.weight_decay": (0, 1e30),
    "supervised.record_every": (0, LARGEST_INT),
    "supervised.patience": (0, LARGEST_INT),
}


def check_config(config: Any) -> None:
    """Checks values and how they go together.

    Raises:
        ValueError: A value is unknown or out of range; the message names the field.
    """
    methods = config.methods.split(",")
    check_names(config, "methods", tuple(METHODS))
    check_members(config)
    check_fields(config, _CHOICES, _RANGES)
    if config.transfer.batch_size < 2 and "ntt" in methods:
        raise ValueError("config.transfer.batch_size is 1: kernel pairs need at least two examples")
    if config.probe and not {"dense", "ntt"} <= set(methods):
        raise ValueError(
            "config.probe compares the outputs of student and teacher: "
            "config.methods must have ntt and dense"
        )
    if bool(config.data.per_class) != bool(config.data.classes):
        raise ValueError("config.data.classes and config.data.per_class must be set together")
    name = config.model.name
    if config.model.padding and name == "lenet_300_100":
        raise ValueError("config.model.padding is set, but lenet_300_100 has no convolutions")
    if bool(config.model.norm) != name.startswith("resnet"):
        raise ValueError(
            f"config.model.norm is {config.model.norm!r} for {name}: "
            "ResNets need 'group' or 'none', other models have no normalisation"
        )


def check_sizes(config: Any, transfer: ImageData, supervised: ImageData) -> None:
    """Checks that the parts of the data are large enough for what they are used for.

    Raises:
        ValueError: They are not; the message names the field.
    """
    methods = config.methods.split(",")
    if "ntt" in methods and len(transfer.validation.y) < 2:
        raise ValueError(
            "config.transfer.validation_fraction holds out a single image: kernel pairs need two"
        )
    snip = any("snip" in method for method in methods)
    size = len(supervised.train.y)
    if snip and config.snip_batch_size > size:
        raise ValueError(
            f"config.snip_batch_size is {config.snip_batch_size}, there are {size} training images"
        )
