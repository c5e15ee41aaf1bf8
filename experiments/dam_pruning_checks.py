"""Checks of the structured pruning study's config that types do not make, before any work."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.checks import (
    LARGEST_INT,
    check_augment,
    check_fields,
    check_milestones,
    check_seeds,
    check_stage_maps,
    check_stages,
    check_values,
)
from experiments.dam_pruning_members import CUT, make_kind, target_of
from experiments.sparse_training_stages import all_patterns, stage_patterns
from ntt_sparse.data.images import ImageData
from ntt_sparse.gates import channels
from ntt_sparse.gates.channels import Counts
from ntt_sparse.gates.network import Network
from ntt_sparse.similarity.features import capture, select
from ntt_sparse.training.loop import Plan

_BUDGETS = {
    "channels": ("dam", *CUT),
    "parameters": ("dam", *CUT),
    "multiply_adds": ("dam", *CUT),
    "volume": ("chipnet",),
    "layers": ("dam",),
}
"""What a budget counts, and of which gates."""
_CHOICES = {
    "gate": ("dam", "hard_concrete", *CUT),
    "convention": ("paper", "code"),
    "shape": ("relu_tanh", "linear", "piecewise_linear"),
    "budget": ("", *_BUDGETS),
    "model.name": (
        *("lenet5", "preresnet20", "preresnet56", "preresnet110", "preresnet164", "vgg19"),
        *("resnet18", "resnet50"),
    ),
    "model.activation": ("", "relu", "tanh", "sine"),
    **{
        f"{stage}.optimizer": ("sgd", "adam", "adamw", "adabelief")
        for stage in ("pretrain", "training", "finetune")
    },
}
_RANGES = {
    "alpha": (1e-3, 1e3),
    "k": (1e-3, 1e3),
    "drop": (0.01, 0.916),
    "gradient_noise": (0, 1e30),
    "probe": (4, LARGEST_INT),
    "evaluated": (0, LARGEST_INT),
    "checkpoint_seconds": (0, math.inf),
    "data.split_seed": (0, 2**32 - 1),
    "model.gated": (0, LARGEST_INT),
    "training.cold_start": (0, LARGEST_INT),
    "training.validation_fraction": (0, 0.9),
    "slimming.keep": (0, LARGEST_INT),
    "chipnet.budget": (0, 1e30),
    "chipnet.crispness": (0, 1e30),
    "chipnet.continuation_epochs": (0, 10_000),
    "cka_sr.samples": (0, LARGEST_INT),
    "cka_sr.every": (1, LARGEST_INT),
    **{
        f"{stage}.{field}": limits
        for stage, least in (("pretrain", 0), ("training", 1), ("finetune", 0))
        for field, limits in {
            "epochs": (least, LARGEST_INT),
            "batch_size": (2, LARGEST_INT),
            "learning_rate": (0, 1e30),
            "momentum": (0, 0.9999),
            "weight_decay": (0, 1e30),
            "milestone_factor": (1e-6, 1),
            "record_every": (0, LARGEST_INT),
            "max_steps": (0, LARGEST_INT),
        }.items()
    },
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
            f"config.budget to be one of {', '.join(_BUDGETS)}"
        )
    if config.budget and not all(coefficient > 0 for coefficient in config.coefficients):
        raise ValueError(
            f"config.coefficients is {config.coefficients} with a budget, expected numbers above "
            "0: what closes channels until the target is the penalty"
        )
    _check_similarity(config)
    if config.gate != "dam" and any(config.orders):
        raise ValueError(
            f"config.gate is {config.gate!r}, but orders are of offsets: expected 'dam'"
        )
    _check_stages(config)
    if config.model.name != "lenet5" and (config.model.activation or config.model.gated):
        raise ValueError(
            f"config.model.name is {config.model.name!r}: activation and gated are of 'lenet5'"
        )
    for stage in ("pretrain", "training", "finetune"):
        check_milestones(config[stage].milestones, f"config.{stage}.milestones")
    # Gates that make no sense are an error here.
    try:
        make_kind(config)
    except ValueError as error:
        raise ValueError(f"config.initial is {config.initial}: {error}") from error


def _check_similarity(config: Any) -> None:
    """Checks what is compared in training."""
    settings = config.cka_sr
    check_values(config, "cka_sr.coefficients", 0, 1e30)
    if not any(settings.coefficients):
        return
    check_stages(settings.stages, "config.cka_sr.stages")
    batch = config["pretrain" if config.pretrain.epochs else "training"].batch_size
    if not 3 <= (settings.samples or batch) <= batch:
        raise ValueError(
            f"config.cka_sr.samples is {settings.samples}, expected 0 (all of a batch of 3 or "
            f"more) or 3 to the batch size, which is {batch}"
        )


def _check_stages(config: Any) -> None:
    """Checks which gates have which budgets and stages."""
    if config.budget and config.gate not in _BUDGETS[config.budget]:
        known = ", ".join(name for name, kinds in _BUDGETS.items() if config.gate in kinds)
        raise ValueError(
            f"config.budget is {config.budget!r} with gate {config.gate!r}, expected "
            f"{known or 'none'}"
        )
    cut = config.gate in CUT and (config.gate != "l1" or config.budget or config.finetune.epochs)
    if cut and not (config.budget and config.finetune.epochs):
        raise ValueError(
            f"config.gate is {config.gate!r}, which cuts networks to a budget and trains them on: "
            "expected a config.budget, targets and config.finetune.epochs above 0"
        )
    if config.chipnet.continuation_epochs and config.gate != "chipnet":
        raise ValueError(
            f"config.chipnet.continuation_epochs is {config.chipnet.continuation_epochs}, expected "
            f"0: gate {config.gate!r} has no such schedule"
        )
    for stage, kinds in (("pretrain", ("chipnet",)), ("finetune", CUT)):
        if config[stage].epochs and config.gate not in kinds:
            raise ValueError(
                f"config.{stage}.epochs is {config[stage].epochs}, expected 0: gate "
                f"{config.gate!r} has no such stage"
            )


def check_sizes(
    config: Any, module: Any, network: Network, data: ImageData, plans: Mapping[str, Plan]
) -> None:
    """Checks that data, model and plans fit what is asked of them.

    Raises:
        ValueError: They do not; the message names the field.
    """
    sizes = channels.sizes(network)
    plan = plans["training"]
    for n in sorted(set(sizes.values())):
        # A gate that starts closed is an error here.
        try:
            make_kind(config).init(n)
        except ValueError as error:
            raise ValueError(f"config.initial is {config.initial}: {error}") from error
    if config.budget in Counts._fields:
        _check_smallest(config, network)
    if config.budget and config.gate != "chipnet":
        _check_targets(config, network)
    if config.similarity and not {config.similarity, f"{config.similarity}/gate"} & sizes.keys():
        names = ", ".join(path.removesuffix("/gate") for path in sizes)
        raise ValueError(
            f"config.similarity is {config.similarity!r}, expected a gated layer: {names}"
        )
    if config.similarity and config.probe > len(data.validation.y):
        raise ValueError(
            f"config.probe is {config.probe}, there are {len(data.validation.y)} images"
        )
    check_augment(config, data.input_shape)
    if any(config.cka_sr.coefficients):
        _check_maps(config.cka_sr, module, data.input_shape)
    for stage, each in plans.items():
        milestones = config[stage].milestones
        steps = [round(fraction * each.total_steps) for fraction in milestones]
        if len(set(steps)) < len(steps):
            raise ValueError(
                f"config.{stage}.milestones is {milestones}, which are steps {steps} of "
                f"{each.total_steps}: expected different ones"
            )
    cold = round(config.training.cold_start * plan.steps_per_epoch)
    if cold >= plan.total_steps:
        raise ValueError(
            f"config.training.cold_start is {config.training.cold_start} epochs, {cold} steps of "
            f"{plan.total_steps}: the gates would never move, expected fewer"
        )


def _check_smallest(config: Any, network: Network) -> None:
    """The targets are something."""
    whole = getattr(channels.whole(network), config.budget)
    for target in config.targets:
        if target_of(config, network, target) < 1:
            raise ValueError(
                f"config.targets holds {target}, which is none of {whole:,} {config.budget}: "
                "expected more"
            )


def _check_maps(settings: Any, module: Any, input_shape: tuple[int, ...]) -> None:
    """There are layers to compare, by shapes alone."""

    def maps(key):
        x = jnp.zeros((2, *input_shape))
        _, features = capture(module, all_patterns(settings))(module.init(key, x), x)
        return select(features, stage_patterns(settings))

    found = jax.eval_shape(maps, jax.random.key(0))
    check_stage_maps(settings.stages, found, "config.cka_sr.stages")


def _check_targets(config: Any, network: Network) -> None:
    """The targets lie between what the networks start with and what each layer keeps."""
    kind, sizes = make_kind(config), channels.sizes(network)
    started = {path: kind.values(kind.init(n), n) > 0 for path, n in sizes.items()}
    keep = 1 if config.gate == "dam" else config.slimming.keep
    last = {path: jnp.arange(n) >= n - keep for path, n in sizes.items()}
    for target in config.targets:
        limits = target_of(config, network, target)
        if isinstance(limits, dict):
            ends = [(1, int(jnp.sum(started[path])), limits[path]) for path in sizes]
        else:
            least, most = (
                int(getattr(channels.count(network, open_), config.budget))
                for open_ in (last, started)
            )
            ends = [(least, most, limits)]
        for least, most, limit in ends:
            if not least <= limit < most:
                raise ValueError(
                    f"config.targets holds {target}, which is {limit:,} of {config.budget}: "
                    f"expected {least:,} or more, {keep} of each gated layer, and less than the "
                    f"{most:,} that config.initial opens"
                )
