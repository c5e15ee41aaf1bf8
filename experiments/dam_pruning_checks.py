"""Checks of the structured pruning study's config that types do not make, before any work."""

import math
from typing import Any

import jax.numpy as jnp

from experiments.checks import LARGEST_INT, check_fields, check_seeds, check_values
from experiments.dam_pruning_members import make_kind
from ntt_sparse.data.images import ImageData
from ntt_sparse.gates import channels
from ntt_sparse.gates.channels import Network
from ntt_sparse.training.loop import Plan

_CHOICES = {
    "gate": ("dam", "l1"),
    "convention": ("paper", "code"),
    "budget": ("", "channels", "parameters", "multiply_adds", "layers"),
    "model.name": (
        *("lenet5", "preresnet20", "preresnet56", "preresnet110", "preresnet164", "vgg19"),
    ),
    "model.activation": ("", "relu", "tanh", "sine"),
    "training.optimizer": ("sgd", "adam", "adabelief"),
}
_RANGES = {
    "gradient_noise": (0, 1e30),
    "probe": (4, LARGEST_INT),
    "evaluated": (0, LARGEST_INT),
    "checkpoint_seconds": (0, math.inf),
    "data.split_seed": (0, 2**32 - 1),
    "model.gated": (0, LARGEST_INT),
    "training.epochs": (1, LARGEST_INT),
    "training.cold_start": (0, LARGEST_INT),
    "training.batch_size": (2, LARGEST_INT),
    "training.learning_rate": (0, 1e30),
    "training.momentum": (0, 1),
    "training.weight_decay": (0, 1e30),
    "training.validation_fraction": (0, 0.9),
    "training.record_every": (0, LARGEST_INT),
    "training.max_steps": (0, LARGEST_INT),
}


def check_config(config: Any) -> None:
    """Checks values and how they go together.

    Raises:
        ValueError: A value is unknown or out of range; the message names the field.
    """
    check_fields(config, _CHOICES, _RANGES)
    check_seeds(config)
    check_values(config, "coefficients", 0, 1e30)
    check_values(config, "orders", 0, LARGEST_INT)
    if any(type(number) is not int for number in config.orders):
        raise ValueError(f"config.orders is {config.orders}, expected integers")
    check_values(config, "targets", 0, 1)
    if config.budget and not all(0 < target < 1 for target in config.targets):
        raise ValueError(
            f"config.targets is {config.targets}, expected fractions between 0 and 1: a budget of "
            "nothing cannot be met, one of everything prunes nothing"
        )
    if not config.budget and tuple(config.targets) != (1.0,):
        raise ValueError(
            f"config.targets is {config.targets} without a budget, expected (1.0,), or "
            f"config.budget to be one of {', '.join(_CHOICES['budget'][1:])}"
        )
    if config.gate != "dam" and (config.budget or any(config.orders)):
        raise ValueError(
            f"config.gate is {config.gate!r}, but budgets and orders are of offsets: expected 'dam'"
        )
    if config.model.name != "lenet5" and (config.model.activation or config.model.gated):
        raise ValueError(
            f"config.model.name is {config.model.name!r}: activation and gated are of 'lenet5'"
        )
    milestones = config.training.milestones
    if len(set(milestones)) < len(milestones) or not all(0 < each < 1 for each in milestones):
        raise ValueError(
            f"config.training.milestones is {milestones}, expected different fractions of the "
            "run between 0 and 1"
        )


def check_sizes(config: Any, network: Network, data: ImageData, plan: Plan) -> None:
    """Checks that data, model and plan fit what is asked of them.

    Raises:
        ValueError: They do not; the message names the field.
    """
    sizes = channels.sizes(network)
    for n in sorted(set(sizes.values())):
        # A gate that starts closed is an error here.
        try:
            make_kind(config).init(n)
        except ValueError as error:
            raise ValueError(f"config.initial is {config.initial}: {error}") from error
    if config.budget:
        _check_targets(config, network)
    if config.similarity and f"{config.similarity}/gate" not in sizes:
        names = ", ".join(path.removesuffix("/gate") for path in sizes)
        raise ValueError(
            f"config.similarity is {config.similarity!r}, expected a gated layer: {names}"
        )
    if config.similarity and config.probe > len(data.validation.y):
        raise ValueError(
            f"config.probe is {config.probe}, there are {len(data.validation.y)} images"
        )
    # Those of `pad_crop_flip`, which reflects four pixels.
    if config.data.augment and min(data.input_shape[:2]) < 5:
        height, width, _ = data.input_shape
        raise ValueError(
            f"config.data.augment is True, images are {height} x {width}: it needs 5 x 5 or more"
        )
    cold = round(config.training.cold_start * plan.steps_per_epoch)
    if cold >= plan.total_steps:
        raise ValueError(
            f"config.training.cold_start is {config.training.cold_start} epochs, {cold} steps of "
            f"{plan.total_steps}: the gates would never move, expected fewer"
        )


def _check_targets(config: Any, network: Network) -> None:
    """A budget keeps a channel of each layer, whatever the target."""
    sizes = channels.sizes(network)
    if config.budget == "layers":
        return
    last = {path: jnp.arange(n) == n - 1 for path, n in sizes.items()}
    least = channels.count(network, last)._asdict()[config.budget]
    whole = channels.whole(network)._asdict()[config.budget]
    for target in config.targets:
        if target * whole < least:
            raise ValueError(
                f"config.targets holds {target}, which is {target * whole:,.0f} {config.budget}: "
                f"one channel in each gated layer makes {int(least):,} of {whole:,}"
            )
