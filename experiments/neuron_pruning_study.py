"""Neuron pruning: train, prune, make smaller, train on; then report."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments import diverged, neuron_pruning_report, neuron_pruning_thresholds, study
from experiments.cli import claim_workdir, user_errors
from experiments.neuron_pruning_checks import check_config, check_sizes
from experiments.neuron_pruning_members import (
    Run,
    Smaller,
    dense_of,
    dense_runs,
    has_dropout,
    make_members,
    make_module,
    make_optimizer,
    member_names,
    networks_of,
    runs_of,
    stage_of,
    start,
    without,
)
from experiments.neuron_pruning_orders import Decision, activation_fn, decide
from experiments.stage import fit_stage
from experiments.study import hold_out, make_plan, save_networks, unit_pixels
from ntt_sparse.data import images
from ntt_sparse.data.images import ImageData, Split
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import terms
from ntt_sparse.training.files import write_text
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import make_step
from ntt_sparse.training.stopping import EarlyStopping

# Independent of the streams that training folds from a member's key.
_SAMPLES_STREAM = 1000


class Setup(NamedTuple):
    """Everything that is known before training starts."""

    data: ImageData
    plan: Plan


def run(config: Any, workdir: str | Path, *, data_dir: str | None = None) -> dict[str, Any]:
    """Runs the study, or goes on with it.

    Args:
        config: From `experiments.configs.neuron_pruning.get_config`.
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
        for network in config.networks.split(","):
            whole = train_whole(config, setup, network, claimed)
            for rate in config.rates:
                iterate(config, setup, network, float(rate), whole, claimed)
        return neuron_pruning_report.write(config, claimed)


def prepare(config: Any, data_dir: str | None) -> Setup:
    """Loads the images and plans the training, before anything is trained or written."""
    whole = images.load(
        config.data.name, data_dir=data_dir, validation_fraction=0.0, seed=config.data.split_seed
    )
    data = hold_out(whole, config.data.validation_fraction, config.data.split_seed)
    if config.data.pixels == "unit":
        data = unit_pixels(data)
    check_sizes(config, data)
    plan = make_plan(config.training, len(data.train.y), config.checkpoint_seconds)
    return Setup(data, plan)


def train_whole(config: Any, setup: Setup, network: str, workdir: Path) -> dict[Run, Smaller]:
    """Trains the whole networks, which all criteria and rates begin with."""
    networks = start(config, network, setup.data.num_classes, setup.data.input_shape)
    stage, runs = stage_of(network, None, 0), dense_runs(config)
    trained = train(config, setup, network, networks, runs, 0, stage, workdir)
    found = {
        "networks": measure(setup, trained),
        "thresholds": at_thresholds(config, setup, trained),
    }
    write_text(workdir / f"{stage}.json", json.dumps(found) + "\n")
    return trained


def iterate(
    config: Any, setup: Setup, network: str, rate: float, whole: dict[Run, Smaller], workdir: Path
) -> None:
    """Prunes and trains in turn, from the whole networks on, those that have not diverged."""
    trained = {run: whole[dense_of(run)] for run in runs_of(config) if dense_of(run) in whole}
    for iteration in range(1, config.iterations):
        runs = list(trained)
        decisions = decide_all(config, setup, trained, rate, iteration)
        networks = [
            without(config, each, made.removed, setup.data.num_classes, setup.data.input_shape)
            for each, made in zip(trained.values(), decisions, strict=True)
        ]
        stage = stage_of(network, rate, iteration)
        before = accuracies(setup, networks, setup.data.test)
        removed = [
            {name: each.units[name][places].tolist() for name, places in made.removed.items()}
            for each, made in zip(trained.values(), decisions, strict=True)
        ]
        pruned = {
            run: {"similarity": made.similarity, "removed": units, "before_training": accuracy}
            for run, made, units, accuracy in zip(runs, decisions, removed, before, strict=True)
        }
        trained = train(config, setup, network, networks, runs, iteration, stage, workdir)
        measured = [
            row | pruned[run] for run, row in zip(trained, measure(setup, trained), strict=True)
        ]
        write_text(workdir / f"{stage}.json", json.dumps({"networks": measured}) + "\n")


def train(
    config: Any,
    setup: Setup,
    network: str,
    networks: Sequence[Smaller],
    runs: Sequence[Run],
    iteration: int,
    stage: str,
    workdir: Path,
) -> dict[Run, Smaller]:
    """Trains all networks of an iteration as one program, each until its loss stops to fall.

    Returns:
        Those that have not diverged.
    """
    members, widths = make_members(config, network, networks, runs, iteration)
    data = setup.data
    module = make_module(widths, data.num_classes, dropout=has_dropout(config))
    names = member_names(runs)
    step_fn = make_step(
        {"task": terms.task()},
        make_optimizer(config),
        forward=terms.masked_forward(terms.without_features(module)),
    )
    members = fit_stage(
        config, workdir, stage, names, members, step_fn, setup.plan,
        tuple(data.train), functools.partial(evaluate, module), (tuple(data.validation),),
        stopping_mode(members), batch_size=config.training.batch_size,
        stopping=EarlyStopping("validation/loss", config.training.patience), freeze=True,
    )  # fmt: skip
    gone = diverged.gone(workdir, stage, names)
    if iteration in (0, config.iterations - 1):
        directory = workdir / "networks"
        directory.mkdir(exist_ok=True)
        save_networks(directory / stage, names, members, gone)
    found = zip(runs, networks_of(members), strict=True)
    return {run: each for index, (run, each) in enumerate(found) if index not in gone}


def stopping_mode(members: Member) -> meshes.MemberMode:
    """One after another on CPU, where members that have stopped then cost nothing."""
    mode = study.member_mode(members)
    return "loop" if mode == "vmap" and jax.default_backend() == "cpu" else mode


def evaluate(module: LeNet, member: Any, validation: Any) -> dict[str, Array]:
    """Loss and accuracy on validation images, which tell when a network stops."""
    values = terms.evaluate_supervised(
        lambda params, x: module.apply({"params": params}, x),
        member.params, member.masks, validation,
    )  # fmt: skip
    return {f"validation/{name}": value for name, value in values.items()}


def decide_all(
    config: Any,
    setup: Setup,
    trained: Mapping[Run, Smaller],
    rate: float,
    iteration: int,
) -> list[Decision]:
    """What goes from each network, by validation images that its seed draws."""
    return [
        decide(
            config, own_module(network, setup.data.num_classes), network, run, rate,
            sample(config, setup, run.seed, iteration), iteration,
        )
        for run, network in trained.items()
    ]  # fmt: skip


def own_module(network: Smaller, num_outputs: int) -> Any:
    """The network of its own widths."""
    widths = {name: len(ids) for name, ids in network.units.items()}
    return make_module(widths, num_outputs, dropout=False)


def sample(config: Any, setup: Setup, seed: int, iteration: int) -> Float[Array, "n h w c"]:
    """Validation images, other ones in each iteration, the same for all criteria."""
    key = jax.random.fold_in(jax.random.key(seed), _SAMPLES_STREAM + iteration)
    held_out = setup.data.validation
    chosen = jax.random.permutation(key, len(held_out.y))[: config.samples]
    return jnp.asarray(np.asarray(held_out.x)[np.asarray(chosen)])


def measure(setup: Setup, trained: Mapping[Run, Smaller]) -> list[dict[str, Any]]:
    """What is reported of each network. Nothing is chosen by test images."""
    networks = list(trained.values())
    found = accuracies(setup, networks, setup.data.test)
    held_out = accuracies(setup, networks, setup.data.validation)
    return [
        {
            **run._asdict(),
            "widths": {name: len(ids) for name, ids in network.units.items()},
            "test": test,
            "validation": validation,
        }
        for run, network, test, validation in zip(trained, networks, found, held_out, strict=True)
    ]


def accuracies(setup: Setup, networks: Sequence[Smaller], split: Split) -> list[float]:
    """The accuracy of each network on a part of the data."""
    data = tuple(map(jnp.asarray, split))
    return [
        float(_accuracy(own_module(network, setup.data.num_classes))(network.params, data))
        for network in networks
    ]


@functools.lru_cache(maxsize=64)
def _accuracy(module: LeNet) -> Callable[..., Array]:
    """`(params, data) -> accuracy`, compiled once for networks of one shape."""

    def accuracy(params, data):
        masks = jax.tree.map(lambda leaf: None, params)
        apply = lambda params, x: module.apply({"params": params}, x)  # noqa: E731
        return terms.evaluate_supervised(apply, params, masks, data)["accuracy"]

    return jax.jit(accuracy)


def at_thresholds(
    config: Any, setup: Setup, networks: Mapping[Run, Smaller]
) -> list[dict[str, Any]]:
    """What similarity thresholds would make of the whole networks."""
    parts = {
        name: tuple(map(jnp.asarray, getattr(setup.data, name))) for name in ("validation", "test")
    }
    rows = []
    for run, network in networks.items():
        module = own_module(network, setup.data.num_classes)

        def measured(params, module=module):
            return {name: float(_accuracy(module)(params, data)) for name, data in parts.items()}

        batch = sample(config, setup, run.seed, 1)
        activations = activation_fn(config, module)(network.params, batch, {})
        found = neuron_pruning_thresholds.rows(network, activations, measured)
        rows += [{**run._asdict(), **row} for row in found]
    return rows
