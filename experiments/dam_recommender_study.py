"""The recommender study: prepare, train, predict, report."""

import functools
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments import dam_recommender_report, diverged
from experiments.cli import claim_workdir, user_errors
from experiments.dam_recommender_checks import check_config, check_sizes
from experiments.dam_recommender_members import (
    Examples,
    Sets,
    batch_sizes,
    kind_of,
    make_optimizer,
    make_sets,
    member_names,
    network,
    pick,
    runs_of,
    start_members,
)
from experiments.dam_recommender_use import chunks, predictions, save_levels
from experiments.stage import fit_stage
from experiments.study import save_networks
from ntt_sparse.data import ratings, subgraphs
from ntt_sparse.data.batches import steps_per_epoch
from ntt_sparse.data.subgraphs import Sizes
from ntt_sparse.models.igmc import adjacent_rating_penalty, open_gates
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training.files import write_text
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import Term, TermInputs, make_step


class Setup(NamedTuple):
    """Everything that is known before training starts.

    Attributes:
        sets: Pairs with their subgraphs.
        mean_error: On test ratings, of always predicting the mean of all training ratings, with
            those held out.
        per_epoch: Steps in a pass over the training ratings.
        stops: Steps at which networks predict the test ratings; the last is the end.
        optimizer: Of all networks.
    """

    sets: Sets
    mean_error: float
    per_epoch: int
    stops: tuple[int, ...]
    optimizer: optax.GradientTransformation


def run(config: Any, workdir: str | Path, *, data_dir: str | None = None) -> dict[str, Any]:
    """Runs the study, or goes on with it.

    Args:
        config: From `experiments.configs.dam_recommender.get_config`.
        workdir: Where everything is written; an earlier run of the same config there is
            continued, and a finished one only draws its report again.
        data_dir: Where the files of ratings are, see `ntt_sparse.data.ratings.load`.

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
        for gate in config.gates.split(","):
            train(config, setup, gate, claimed)
        return dam_recommender_report.write(config, claimed, setup.stops, setup.mean_error)


def prepare(config: Any, data_dir: str | None) -> Setup:
    """Loads the ratings and extracts all subgraphs, before anything is trained or written."""
    data = ratings.load(config.data.name, data_dir)
    check_sizes(config, len(data.train.values))
    sets = make_sets(config, data)
    per_epoch = steps_per_epoch(len(sets.train.values), config.training.batch_size)
    end = config.training.max_steps or config.training.epochs * per_epoch
    before = sorted((epochs * per_epoch for epochs in config.ensemble), reverse=True)
    stops = (*(end - steps for steps in before if steps < end), end)
    deviations = data.test.values - data.train.values.mean()
    return Setup(
        sets, float(np.sqrt(np.mean(deviations**2))), per_epoch, stops,
        make_optimizer(config, per_epoch),
    )  # fmt: skip


def train(config: Any, setup: Setup, gate: str, workdir: Path) -> None:
    """Trains all networks with one kind of gate as one program, and writes them and their errors.

    Training is cut where networks predict the test ratings; what one part leaves the next goes
    on with.
    """
    sets, batch_size = setup.sets, config.training.batch_size
    num_levels = len(sets.levels)
    names = member_names(runs_of(config, gate))
    members = start_members(config, gate, num_levels, setup.optimizer)
    step_fn = make_step(training_terms(config, gate, num_levels), setup.optimizer)
    # Members have graphs of their own, so that a batched axis saves nothing where cores are few.
    mode: meshes.MemberMode = "loop" if jax.default_backend() == "cpu" else "vmap"
    picked = functools.partial(pick, batch_sizes(config, members, sets.train, setup.stops[-1]))
    held = sets.validation
    measure = functools.partial(
        evaluate, config, gate, num_levels, None if held is None else _sizes(held, batch_size)
    )
    predict = test_predictor(config, gate, num_levels, sets.test)
    predicted, start, gone = [], 0, {}
    for stop in setup.stops:
        plan = Plan(
            stop, setup.per_epoch, config.training.record_every or setup.per_epoch,
            config.checkpoint_seconds, start,
        )  # fmt: skip
        stage = dam_recommender_report.stage(gate, stop)
        members = fit_stage(
            config, workdir, stage, names, members, step_fn, plan, sets.train, measure,
            () if held is None else (held,), mode, batch_size=batch_size, pick=picked, freeze=True,
        )  # fmt: skip
        gone = diverged.gone(workdir, stage, names, gone)
        predicted.append(np.asarray(predict(members)))
        start = stop
    # Not before the data are known to be those of the checkpoints.
    save_levels(workdir, sets.levels)
    save_networks(workdir / "networks", names, members, gone)
    write_errors(workdir / f"test_{gate}.json", np.stack(predicted), members, sets.test, gone)


def training_terms(config: Any, gate: str, num_levels: int) -> dict[str, Term]:
    """The mean squared error, what weights of neighbouring ratings differ, and the penalty."""
    kind, module = kind_of(config, gate), network(config, gate, num_levels)

    def error(inputs: TermInputs):
        graphs, values = inputs.batch
        rngs = {"dropout": inputs.key}
        found = module.apply({"params": inputs.params}, *graphs, train=True, rngs=rngs)
        return jnp.mean((jnp.asarray(found) - values) ** 2), {}

    def adjacent(inputs: TermInputs):
        value = adjacent_rating_penalty(inputs.params)
        return config.training.adjacent * value, {"difference": value}

    def penalty(inputs: TermInputs):
        value = kind.penalty([inputs.params["gate"]]) if kind else jnp.zeros(())
        return inputs.context.coefficient * value, {"penalty": value}

    terms: dict[str, Term] = {"error": error, "adjacent": adjacent}
    return terms if kind is None else {**terms, "gate": penalty}


def evaluate(
    config: Any, gate: str, num_levels: int, sizes: Sizes | None, member: Member, *held: Examples
) -> dict[str, Float[Array, ""]]:
    """Open channels of the code, and the error on held-out ratings if there are any."""
    module = network(config, gate, num_levels)
    opened = open_gates(module, member.params)
    values = {"dimension": jnp.sum(opened, dtype=jnp.result_type(float))}
    if sizes is not None:
        (examples,) = held
        found = _predicted(config, module, sizes, member, examples)
        truth = examples.values[:, member.context.part]
        values["validation_rmse"] = jnp.sqrt(jnp.mean((found - truth) ** 2))
    return values


def test_predictor(
    config: Any, gate: str, num_levels: int, test: Examples
) -> Callable[[Member], Float[Array, "members n"]]:
    """What gives the predictions of each network for the test ratings."""
    module = network(config, gate, num_levels)
    sizes = _sizes(test, config.training.batch_size)
    placed = jax.tree.map(jnp.asarray, test)

    @jax.jit
    def predict(members, test):
        return jax.lax.map(lambda one: _predicted(config, module, sizes, one, test), members)

    return lambda members: predict(members, placed)


def write_errors(
    path: Path,
    predicted: Float[np.ndarray, "stops members n"],
    members: Member,
    test: Examples,
    gone: Collection[int] = (),
) -> None:
    """Writes the test errors of the last networks, and of the mean prediction of all stops.

    Those that are gone have none.
    """
    parts = np.asarray(members.context.part)
    truth = test.values.astype(np.float64).T[parts]

    def error(found):
        errors = np.sqrt(np.mean((found - truth) ** 2, axis=1)).tolist()
        return [None if index in gone else each for index, each in enumerate(errors)]

    found = predicted.astype(np.float64)
    # Whatever it was, squares of it may overflow.
    found[:, list(gone)] = 0.0
    written = {"rmse": error(found[-1]), "ensemble_rmse": error(found.mean(0))}
    write_text(path, json.dumps(written) + "\n")


def _sizes(examples: Examples, batch_size: int) -> Sizes:
    """What chunks of pairs are padded to, in all parts."""
    count, parts = examples.values.shape
    first = np.arange(parts)[:, None, None] * count
    return subgraphs.sizes_of(examples.subgraphs, first + chunks(count, batch_size))


def _predicted(
    config: Any, module: Any, sizes: Sizes, member: Member, examples: Examples
) -> Float[Array, " n"]:
    """What a network predicts for the pairs of its part."""
    count = examples.values.shape[0]
    rows = chunks(count, config.training.batch_size) + member.context.part * count
    return predictions(module, member.params, examples.subgraphs, rows, sizes)[:count]
