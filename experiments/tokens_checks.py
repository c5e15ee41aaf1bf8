"""Checks of the config of dynamic tokens that types do not make, before any work."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.checks import (
    LARGEST_INT,
    check_augment,
    check_evaluated,
    check_fields,
    check_names,
    check_seeds,
    check_values,
)
from experiments.tokens_members import CKA, dynamic, transformer, variants
from ntt_sparse.data.images import ImageData
from ntt_sparse.models.deit import load_deit
from ntt_sparse.models.redundancy import CHOICES
from ntt_sparse.models.tokens import kept_counts

_CHOICES = {
    "cka_sr.regulariser": ("cka_sr", "aug_cka_sr"),
    **{f"redundancy.{field}": choices for field, choices in CHOICES.items()},
}
_TRAINING = {
    "epochs": (1, LARGEST_INT),
    "batch_size": (1, LARGEST_INT),
    "learning_rate": (0, 1e30),
    "weight_decay": (0, 1e30),
    "warmup": (0, 1),
    "label_smoothing": (0, 1),
    "record_every": (0, LARGEST_INT),
    "max_steps": (0, LARGEST_INT),
}
_RANGES = {
    **{f"{stage}.{name}": each for stage in ("pretrain", "dynamic")
       for name, each in _TRAINING.items()},
    "pretrain.validation_fraction": (0, 0.99),
    "dynamic.backbone": (0, 1e30),
    "dynamic.fixed": (0, 1),
    "cka_sr.coefficient": (0, 1e30),
    "cka_sr.samples": (0, LARGEST_INT),
    "cka_sr.every": (1, LARGEST_INT),
    "losses.ratio": (0, 1e30),
    "losses.distillation": (0, 1e30),
    "losses.tokens": (0, 1e30),
    "redundancy.weight": (0, 1e30),
    "evaluated": (0, LARGEST_INT),
    "data.split_seed": (0, 2**32 - 1),
    "data.size": (1, 4096),
    "checkpoint_seconds": (0, math.inf),
}  # fmt: skip


def check_config(config: Any) -> None:
    """Checks values and how they go together.

    Raises:
        ValueError: A value is unknown or out of range; the message names the field.
    """
    check_fields(config, _CHOICES, _RANGES)
    check_seeds(config)
    check_values(config, "keep", 1e-6, 1)
    check_names(config, "cka", CKA)
    samples, batch_size = config.cka_sr.samples, config.pretrain.batch_size
    if min(samples or batch_size, batch_size) < 3 or samples > batch_size:
        raise ValueError(
            f"config.cka_sr.samples is {samples} of batches of {batch_size}, expected 0 (all) or 3 "
            "to the batch: so many examples are needed to compare layers"
        )
    module = transformer(config, 2)
    if module.depth < 2:
        raise ValueError(f"config.model.name has {module.depth} block, expected two to compare")
    if any(type(place) is not int for place in config.model.places):
        raise ValueError(f"config.model.places is {config.model.places}, expected integers")
    for variant in variants(config):
        # Places and heads are checked there.
        with _of_model():
            dynamic(config, module, variant)


@contextlib.contextmanager
def _of_model() -> Iterator[None]:
    """Names the fields in messages of networks that are made of them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"config.model with config.keep: {error}") from error


def check_sizes(config: Any, data: ImageData) -> None:
    """Checks that images and their number are such as the config needs, by shapes alone.

    Raises:
        ValueError: They are not; the message names the field.
    """
    for stage in ("pretrain", "dynamic"):
        if config[stage].batch_size > len(data.train.y):
            raise ValueError(
                f"config.{stage}.batch_size is {config[stage].batch_size}, there are "
                f"{len(data.train.y)} images"
            )
    check_augment(config, data.input_shape)
    module = transformer(config, data.num_classes)
    check_evaluated(config, data.train)
    x = jnp.zeros((1, *data.input_shape))
    with _of_model():
        tokens = jax.eval_shape(
            lambda key: module.init_with_output(key, x, method="encode")[0], jax.random.key(0)
        )
        for variant in variants(config):
            kept_counts(dynamic(config, module, variant), tokens.shape[1] - 1)
    if config.model.weights:
        load_deit(config.model.weights, module, data.input_shape)
