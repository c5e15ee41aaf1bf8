"""Checks of the config of sparse training that types do not make, before any work."""

import math
from typing import Any

import jax
import numpy as np

from experiments import sparse_training_l0, sparse_training_lottery, sparse_training_transform
from experiments.checks import (
    LARGEST_INT,
    check_augment,
    check_evaluated,
    check_fields,
    check_members,
    check_milestones,
    check_names,
    check_stage_maps,
    check_stages,
)
from experiments.sparse_training_masks import GROWN, METHODS, SCORED, layer_counts, mask_schedule
from experiments.sparse_training_stages import (
    REGULARISERS,
    all_patterns,
    block_patterns,
    stage_patterns,
)
from ntt_sparse.data.images import ImageData, blank
from ntt_sparse.data.text import TextData
from ntt_sparse.models.deep_resnet import DeepResNet
from ntt_sparse.models.text import TextTransformer
from ntt_sparse.models.torchvision import load_resnet
from ntt_sparse.models.vit import VisionTransformer
from ntt_sparse.pruning.masks import named_leaves
from ntt_sparse.similarity.features import capture, select
from ntt_sparse.training.loop import Plan

_CHOICES = {
    "method": METHODS,
    "lth.restore": ("weights", "learning_rate", "random"),
    "layer_densities": ("erk", "uniform", "global", "snip", "grasp"),
    "model.padding": ("", "VALID", "SAME"),
    "model.norm": ("", "batch", "group", "none"),
    "model.shortcut": ("", "A", "B"),
    "model.stem": ("", "cifar", "imagenet"),
    "supervised.optimizer": ("adam", "sgd", "adamw"),
}
_RANGES = {
    "score_batch_size": (1, LARGEST_INT),
    "score_per_class": (0, LARGEST_INT),
    "rounds": (1, LARGEST_INT),
    "growth.every": (1, LARGEST_INT),
    "growth.end": (0, 1),
    "growth.fraction": (1e-6, 1),
    "lth.rewind": (0, 0.999),
    "lth.prune": (0, 0.99),
    "transform.cycles": (1, LARGEST_INT),
    "transform.every": (1, LARGEST_INT),
    "transform.increment": (1e-30, 1e30),
    "transform.ceiling": (1e-30, 1e30),
    "transform.power": (1, 16),
    "transform.hold": (0, LARGEST_INT),
    "transform.batch_size": (2, LARGEST_INT),
    "transform.learning_rate": (0, 1e30),
    "transform.momentum": (0, 0.9999),
    "transform.weight_decay": (0, 1e30),
    "l0.coefficient": (0, 1e30),
    "l0.drop": (0.01, 0.91),
    "l0.learning_rate": (0, 1e30),
    "l0.epochs": (1, LARGEST_INT),
    "l0.batch_size": (2, LARGEST_INT),
    "l0.record_every": (0, LARGEST_INT),
    "l0.max_steps": (0, LARGEST_INT),
    "gradual.every": (1, LARGEST_INT),
    "gradual.start": (0, 1),
    "gradual.end": (0, 1),
    "samples": (0, LARGEST_INT),
    "every": (1, LARGEST_INT),
    "probe": (4, LARGEST_INT),
    "evaluated": (0, LARGEST_INT),
    "checkpoint_seconds": (0, math.inf),
    "data.split_seed": (0, 2**32 - 1),
    "data.size": (1, 4096),
    "data.length": (1, LARGEST_INT),
    "supervised.epochs": (1, LARGEST_INT),
    "supervised.batch_size": (2, LARGEST_INT),
    "supervised.max_steps": (0, LARGEST_INT),
    "supervised.learning_rate": (0, 1e30),
    "supervised.weight_decay": (0, 1e30),
    "supervised.l1": (0, 1e30),
    "supervised.label_smoothing": (0, 1),
    "supervised.warmup": (0, 1),
    "supervised.record_every": (0, LARGEST_INT),
}


def check_config(config: Any) -> None:
    """Checks values and how they go together.

    Raises:
        ValueError: A value is unknown or out of range; the message names the field.
    """
    check_names(config, "regularisers", tuple(REGULARISERS))
    check_members(config)
    check_fields(config, _CHOICES, _RANGES)
    coefficients = config.coefficients
    if not coefficients or len(set(coefficients)) < len(coefficients):
        raise ValueError(f"config.coefficients is {coefficients}, expected different values")
    for coefficient in coefficients:
        # The negated form also refuses NaN.
        if type(coefficient) not in (int, float) or not 1e-30 <= coefficient <= 1e30:
            raise ValueError(
                f"config.coefficients holds {coefficient!r}, expected numbers above 0, from 1e-30 "
                "to 1e30: the network without a regulariser is always there"
            )
    check_milestones(config.supervised.milestones, "config.supervised.milestones")
    if config.supervised.optimizer == "adamw" and config.supervised.milestones:
        raise ValueError(
            f"config.supervised.milestones is {config.supervised.milestones} with optimizer "
            "'adamw', expected none: its rate falls by a cosine"
        )
    _check_method(config)
    chosen = [REGULARISERS[name] for name in config.regularisers.split(",")]
    needed = 4 if any(regulariser.debiased for regulariser in chosen) else 3
    for stage in stages_of(config):
        batch_size = config[stage].batch_size
        if batch_size < needed:
            raise ValueError(
                f"config.{stage}.batch_size is {batch_size}, expected {needed} or more: so many "
                "examples are needed to compare layers"
            )
        if config.samples and not needed <= config.samples <= batch_size:
            raise ValueError(
                f"config.samples is {config.samples}, expected 0 (all of a batch) or {needed} to "
                f"config.{stage}.batch_size, which is {batch_size}"
            )
    check_stages(config.stages, "config.stages")
    if not block_patterns(config):
        raise ValueError(
            f"config.stages is {config.stages}, inputs alone: expected patterns of outputs too"
        )


def stages_of(config: Any) -> list[str]:
    """The fields of the stages in which networks are trained."""
    earlier = {
        sparse_training_transform.METHOD: ["transform"],
        sparse_training_l0.METHOD: ["l0"],
    }
    return [*earlier.get(config.method, []), "supervised"]


def _check_method(config: Any) -> None:
    """Checks which methods have which densities of layers, and rounds."""
    random = ("random", *GROWN)
    if config.method in random:
        known = ("erk", "uniform", "snip", "grasp")
    else:
        known = ("erk", "uniform") if config.method == "dlth" else ("global", "uniform", "erk")
    if config.layer_densities not in known:
        raise ValueError(
            f"config.layer_densities is {config.layer_densities!r} with method "
            f"{config.method!r}, expected {' or '.join(known)}"
        )
    density = tuple(config.density)
    if config.method == "lth" and density != tuple(sorted(density, reverse=True)):
        raise ValueError(
            f"config.density is {density} with method 'lth', expected falling densities: each is "
            "pruned from the one before"
        )
    if (config.method, config.model.norm) == ("synflow", "group"):
        raise ValueError(
            "config.model.norm is 'group' with method 'synflow': group normalisation takes out "
            "what flows, expected 'batch' or 'none'"
        )
    if config.rounds > 1 and config.method not in SCORED:
        raise ValueError(
            f"config.rounds is {config.rounds} with method {config.method!r}, expected 1: rounds "
            f"are of {', '.join(SCORED)}"
        )


def check_batch_size(config: Any, data: ImageData | TextData) -> None:
    """Checks that there is a batch.

    Raises:
        ValueError: There are less examples.
    """
    for stage in stages_of(config):
        if config[stage].batch_size > len(data.train.y):
            raise ValueError(
                f"config.{stage}.batch_size is {config[stage].batch_size}, there are "
                f"{len(data.train.y)} examples"
            )


def check_sizes(config: Any, module: Any, data: ImageData | TextData, plan: Plan) -> None:
    """Checks that data and model are large enough for what is compared, by shapes alone.

    Raises:
        ValueError: They are not; the message names the field.
    """
    _check_kind(config, module, data)
    sizes = {"probe": len(data.validation.y)}
    scored = ("snip", "grasp", "logit_snip")
    if config.layer_densities in scored or config.method in scored:
        sizes["score_batch_size"] = len(data.train.y)
    if "score_batch_size" in sizes and config.score_per_class:
        # In place of the other.
        del sizes["score_batch_size"]
        sizes["score_per_class"] = int(np.min(np.unique(data.train.y, return_counts=True)[1]))
    for field, size in sizes.items():
        if config[field] > size:
            each = " of some class" if field == "score_per_class" else ""
            raise ValueError(f"config.{field} is {config[field]}, there are {size} examples{each}")

    check_evaluated(config, data.train)

    if config.model.weights:
        if not isinstance(module, DeepResNet):
            raise ValueError(
                f"config.model.weights is given for {config.model.name!r}: expected 'resnet18' or "
                "'resnet50', whose names such files have"
            )
        load_resnet(config.model.weights, module)

    def shapes(key):
        x = jax.numpy.asarray(blank(data.train, 2))
        variables = module.init(key, x)
        _, features = capture(module, all_patterns(config))(variables, x)
        (blocks,) = select(features, [block_patterns(config)])
        return variables["params"], select(features, stage_patterns(config)), blocks

    params, stages, blocks = jax.eval_shape(shapes, jax.random.key(0))
    _check_counts(config, params)
    # Schedules that never change a mask, or that do not fit the data, are errors here.
    mask_schedule(config, plan)
    if config.method == sparse_training_lottery.METHOD:
        sparse_training_lottery.rewind_step(config, plan)
    if config.method == sparse_training_transform.METHOD:
        sparse_training_transform.plan(config, len(data.train.y))
    over_stages = any(REGULARISERS[name].over_stages for name in config.regularisers.split(","))
    if over_stages:
        check_stage_maps(config.stages, stages, "config.stages")
    if len(blocks) < 2:
        raise ValueError(f"config.stages match {len(blocks)} layer, expected two or more")


def _check_kind(config: Any, module: Any, data: ImageData | TextData) -> None:
    """Checks that network, data and method go together."""
    if isinstance(data, TextData) != isinstance(module, TextTransformer):
        raise ValueError(
            f"config.model.name is {config.model.name!r} and config.data.name "
            f"{config.data.name!r}, expected a transformer of texts and a text, or neither"
        )
    if isinstance(data, ImageData):
        check_augment(config, data.input_shape)
    elif config.data.augment:
        raise ValueError("config.data.augment is True, expected False: texts are as they are")
    elif config.score_per_class:
        raise ValueError(
            f"config.score_per_class is {config.score_per_class}, expected 0: windows of a text "
            "have no class"
        )
    normalised = isinstance(module, TextTransformer | VisionTransformer)
    if normalised and config.method == "synflow":
        raise ValueError(
            "config.method is 'synflow' with a transformer, whose normalisation takes out what "
            "flows: expected another method"
        )


def _check_counts(config: Any, params: Any) -> None:
    """Checks that every layer that has a density of its own keeps a weight."""
    # A density that keeps no weight at all is an error there.
    for density, counts in layer_counts(config, params).items():
        if isinstance(counts, int):
            continue
        empty = [name for name, count in named_leaves(counts).items() if count == 0]
        if empty:
            raise ValueError(
                f"config.density holds {density!r}, which is less than one weight of "
                f"{', '.join(empty)}: expected more, or another config.layer_densities than "
                f"{config.layer_densities!r}"
            )
