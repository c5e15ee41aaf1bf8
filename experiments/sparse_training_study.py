"""Sparse training: prepare, train all networks as one program, measure, report."""

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import (
    sparse_training_gone,
    sparse_training_l0,
    sparse_training_lottery,
    sparse_training_report,
    sparse_training_transform,
)
from experiments.cli import claim_workdir, user_errors
from experiments.sparse_training_checks import check_batch_size, check_config, check_sizes
from experiments.sparse_training_masks import mask_schedule
from experiments.sparse_training_members import (
    Run,
    member_names,
    runs_of,
    stacked_masks,
    start_members,
    whole_runs,
)
from experiments.sparse_training_stages import (
    all_patterns,
    evaluation,
    layer_similarities,
    make_optimizer,
    training_terms,
    whole_optimizer,
)
from experiments.stage import fit_stage
from experiments.study import (
    hold_out,
    make_plan,
    member_mode,
    save_networks,
    training_input,
)
from ntt_sparse import models
from ntt_sparse.data import images, text
from ntt_sparse.data.images import ImageData
from ntt_sparse.data.text import TextData
from ntt_sparse.pruning.masks import named_leaves
from ntt_sparse.similarity.features import capture
from ntt_sparse.training.files import write_npz
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import Augment, Forward, make_step
from ntt_sparse.training.terms import masked_forward

_BINS = 201


class Setup(NamedTuple):
    """Everything that is known before training starts."""

    module: Any
    data: ImageData | TextData
    plan: Plan


def run(config: Any, workdir: str | Path, *, data_dir: str | None = None) -> dict[str, Any]:
    """Runs the study, or goes on with it.

    Args:
        config: From `experiments.configs.sparse_training.get_config`, or that of `cka_sr`.
        workdir: Where everything is written; an earlier run of the same config there is
            continued, and a finished one only draws its report again.
        data_dir: Where prepared TensorFlow Datasets are; by default as TFDS decides.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        UserError: The config, the data or the work directory does not permit the study;
            nothing was changed.
    """
    with user_errors():
        check_config(config)
        setup = prepare(config, data_dir)
    with claim_workdir(workdir, config.to_dict()) as claimed:
        members = train(config, setup, claimed)
        gone, _ = sparse_training_gone.gone(config, claimed)
        save_networks(claimed / "networks", member_names(runs_of(config)), members, gone)
        save_measurements(claimed / "measurements.npz", config, setup, members, gone)
        layers = {name: leaf[0].size for name, leaf in named_leaves(members.masks).items()}
        return sparse_training_report.write(config, claimed, layers)


def make_model(config: Any, num_outputs: int) -> Any:
    """The network of a study."""
    fields = ("padding", "norm", "shortcut", "stem", "dropout")
    options = {name: config.model[name] for name in fields if config.model[name]}
    return models.create(config.model.name, num_outputs=num_outputs, **options)


def load(config: Any, data_dir: str | None) -> ImageData | TextData:
    """The data of a study, where nothing is held out."""
    if text.is_text(config.data.name):
        return text.load(config.data.name, config.data.length)
    return images.load(
        config.data.name, data_dir=data_dir, validation_fraction=0.0,
        seed=config.data.split_seed, size=config.data.size,
    )  # fmt: skip


def prepare(config: Any, data_dir: str | None) -> Setup:
    """Loads data and model and plans the training, before anything is trained or written."""
    whole = load(config, data_dir)
    data = hold_out(whole, config.supervised.validation_fraction, config.data.split_seed)
    module = make_model(config, data.num_classes)
    check_batch_size(config, data)
    plan = make_plan(config.supervised, len(data.train.y), config.checkpoint_seconds)
    check_sizes(config, module, data, plan)
    return Setup(module, data, plan)


def train(config: Any, setup: Setup, workdir: Path) -> Member:
    """Trains every network in one program, or one for each level. Returns its members."""
    shared = config.method in (sparse_training_lottery.METHOD, sparse_training_l0.METHOD)
    runs = whole_runs(config) if shared else runs_of(config)
    data = setup.data
    optimizer = make_optimizer(config, total_steps=setup.plan.total_steps)
    members = start_members(config, setup.module, data.train, optimizer, runs)
    forward = masked_forward(
        capture(setup.module, all_patterns(config), examples=config.samples or None),
        straight_through=config.method == "rigl",
    )
    train_data, augment = training_input(config, data.train)
    step_fn = make_step(
        training_terms(config), optimizer, forward=forward, augment=augment,
        after_update=mask_schedule(config, setup.plan),
    )  # fmt: skip
    mode = member_mode(members)
    count = config.evaluated or None
    held_out, test = (
        tuple(leaf[:count] for leaf in split) for split in (data.validation, data.test)
    )
    evaluation_data = (held_out, test, probe_of(config, setup))
    evaluate = evaluation(config, setup.module)

    def fit(
        stage: str, runs: list[Run], members: Member, plan: Plan, *, step_fn: Any = step_fn,
        batch_size: int = config.supervised.batch_size, evaluate: Any = evaluate,
    ) -> Member:  # fmt: skip
        members = fit_stage(
            config, workdir, stage, member_names(runs), members, step_fn, plan,
            train_data, evaluate, evaluation_data, mode, batch_size=batch_size, freeze=True,
        )  # fmt: skip
        # An error where this stage and those before have left none.
        sparse_training_gone.gone(config, workdir)
        return members

    def init(key: Any) -> Any:
        variables = dict(setup.module.init(key, images.blank(data.train)))
        return variables.pop("params"), variables

    if config.method == sparse_training_lottery.METHOD:
        return sparse_training_lottery.train(config, init, fit, members, setup.plan, optimizer)
    if config.method == sparse_training_transform.METHOD:
        whole = sparse_training_transform.whole_network
        whole_step = make_step(
            {name: whole(term) for name, term in training_terms(config).items()},
            sparse_training_transform.make_optimizer(config),
            forward=whole(forward),
            augment=augment,
        )
        members = sparse_training_transform.train(
            config,
            functools.partial(
                fit, runs=runs, step_fn=whole_step, batch_size=config.transform.batch_size
            ),
            members,
            functools.partial(stacked_masks, config, members, runs),
            sparse_training_transform.plan(config, len(data.train.y)),
            optimizer,
        )
    if config.method == sparse_training_l0.METHOD:
        members = train_gates(
            config, len(data.train.y), functools.partial(fit, runs=runs), members, forward,
            evaluate, augment, optimizer,
        )  # fmt: skip
    return fit("supervised", runs_of(config), members, setup.plan)


def train_gates(
    config: Any,
    n: int,
    fit: Callable[..., Member],
    members: Member,
    forward: Forward,
    evaluate: Callable[..., Any],
    augment: Augment | None,
    optimizer: optax.GradientTransformation,
) -> Member:
    """Trains whole networks with gates (L0). Returns members at the start of sparse training.

    Args:
        config: The settings.
        n: Training examples.
        fit: Trains members through a stage.
        members: Whole networks at their start.
        forward: The pass of sparse training.
        evaluate: What is measured of sparse networks.
        augment: How batches are changed.
        optimizer: Of sparse training.
    """
    plan = sparse_training_l0.plan(config, n)
    gated_optimizer = sparse_training_l0.make_optimizer(
        config, whole_optimizer(config, total_steps=plan.total_steps)
    )
    step_fn = make_step(
        sparse_training_l0.gated_terms(config, training_terms(config), n),
        gated_optimizer,
        forward=sparse_training_l0.gated_forward(forward),
        augment=augment,
        after_update=sparse_training_l0.hold,
    )
    gated_fit = functools.partial(
        fit, step_fn=step_fn, batch_size=config.l0.batch_size,
        evaluate=sparse_training_l0.gated_evaluation(evaluate),
    )  # fmt: skip
    return sparse_training_l0.train(config, gated_fit, members, plan, gated_optimizer, optimizer)


def probe_of(config: Any, setup: Setup) -> Any:
    """The held-out examples on which similarity is measured."""
    return jnp.asarray(setup.data.validation.x[: config.probe])


def save_measurements(
    path: Path, config: Any, setup: Setup, members: Member, gone: Collection[int] = ()
) -> None:
    """Writes heat maps and histograms of all members after the last step.

    `cka` and `cka_debiased` are `(M, L, L)`; `counts` `(M, bins)` are the surviving weights
    of each member between the `edges`, the same for all members. Of members that are gone there
    is NaN, and no weight.
    """
    measure = jax.jit(
        functools.partial(
            jax.lax.map,
            lambda member: layer_similarities(config, setup.module)(
                member, probe_of(config, setup)
            ),
        )
    )
    arrays = {name: np.array(value) for name, value in measure(members).items()}
    left = [index not in gone for index in range(len(runs_of(config)))]
    for value in arrays.values():
        value[np.logical_not(left)] = np.nan
    masks = named_leaves(members.masks)
    params = {name: np.asarray(named_leaves(members.params)[name]) for name in masks}
    largest = max(float(np.max(np.abs(leaf[left]))) for leaf in params.values())
    edges = np.linspace(-largest, largest, _BINS + 1)
    counts = np.zeros((len(runs_of(config)), _BINS), int)
    for name, mask in masks.items():
        for index, kept in enumerate(np.asarray(mask)):
            if left[index]:
                counts[index] += np.histogram(params[name][index][kept], edges)[0]
    write_npz(path, {"edges": edges, "counts": counts, **arrays})
