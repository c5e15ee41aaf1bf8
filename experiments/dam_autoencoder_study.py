"""The DAM autoencoder study: prepare, train, classify codes, report."""

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments import dam_autoencoder_report, diverged
from experiments.cli import claim_workdir, user_errors
from experiments.dam_autoencoder_checks import check_config, check_sizes
from experiments.dam_autoencoder_downstream import Examples, evenly, score_codes
from experiments.dam_autoencoder_members import (
    autoencoder,
    kind_of,
    make_optimizer,
    member_names,
    pixels,
    runs_of,
    start_members,
)
from experiments.stage import fit_stage
from experiments.study import make_plan, member_mode, save_networks
from ntt_sparse.data import images
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import Term, TermInputs, make_step

# Images at a time where all of a set are looked at, which bounds the memory.
_CHUNK = 500


class Setup(NamedTuple):
    """Everything that is known before training starts."""

    train: Examples
    test: Examples
    plan: Plan


def run(config: Any, workdir: str | Path, *, data_dir: str | None = None) -> dict[str, Any]:
    """Runs the study, or goes on with it.

    Args:
        config: From `experiments.configs.dam_autoencoder.get_config`.
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
        for gate in config.gates.split(","):
            members = train(config, setup, gate, claimed)
            names = member_names(runs_of(config, gate))
            gone = diverged.gone(claimed, gate, names)
            save_networks(claimed / "networks", names, members, gone)
            classify(config, setup, gate, members, claimed / "downstream", gone)
        return dam_autoencoder_report.write(config, claimed)


def prepare(config: Any, data_dir: str | None) -> Setup:
    """Loads the images and plans the training, before anything is trained or written."""
    data = images.load(config.data.name, data_dir=data_dir, validation_fraction=0.0)
    check_sizes(config, data)
    plan = make_plan(config.training, len(data.train.y), config.checkpoint_seconds)
    x_train, x_test = pixels(data)
    return Setup(Examples(x_train, data.train.y), Examples(x_test, data.test.y), plan)


def train(config: Any, setup: Setup, gate: str, workdir: Path) -> Member:
    """Trains all networks with one kind of gate as one program. Returns its members."""
    dimension = setup.train.x.shape[1]
    members = start_members(config, gate, dimension)
    step_fn = make_step(training_terms(config, gate, dimension), make_optimizer(config))
    mode = member_mode(members)
    return fit_stage(
        config, workdir, gate, member_names(runs_of(config, gate)), members, step_fn, setup.plan,
        setup.train.x, functools.partial(evaluate, config, gate), (setup.test.x,), mode,
        batch_size=config.training.batch_size, freeze=True,
    )  # fmt: skip


def training_terms(config: Any, gate: str, dimension: int) -> dict[str, Term]:
    """The mean squared error of the reconstruction, and the member's penalty."""
    kind = kind_of(config, gate)
    module = autoencoder(config, kind, dimension)

    def reconstruction(inputs: TermInputs):
        x = inputs.batch
        return jnp.mean((module.apply({"params": inputs.params}, x) - x) ** 2), {}

    def penalty(inputs: TermInputs):
        value = kind.penalty([inputs.params["gate"]])
        return inputs.context * value, {"penalty": value}

    return {"reconstruction": reconstruction, "gate": penalty}


def evaluate(
    config: Any, gate: str, member: Member, x: Float[Array, "n d"]
) -> dict[str, Float[Array, ""]]:
    """Open channels, mean squared error of the reconstruction of `x`, and penalty."""
    kind = kind_of(config, gate)
    module = autoencoder(config, kind, x.shape[1])

    def error(row):
        return jnp.mean((module.apply({"params": member.params}, row[None])[0] - row) ** 2)

    gates = kind.values(member.params["gate"], config.model.bottleneck)
    return {
        "bottleneck": jnp.sum(gates > 0, dtype=x.dtype),
        "reconstruction": jnp.mean(jax.lax.map(error, x, batch_size=_CHUNK)),
        "penalty": kind.penalty([member.params["gate"]]),
    }


def classify(
    config: Any,
    setup: Setup,
    gate: str,
    members: Member,
    directory: Path,
    gone: Collection[int] = (),
) -> None:
    """Scores a classifier on the codes of each network, in a file of the network's name.

    Those that are gone have none.

    What is there already is kept, so that an interrupted study goes on.
    """
    from tqdm import tqdm

    directory.mkdir(exist_ok=True)
    kind = kind_of(config, gate)
    module = autoencoder(config, kind, setup.train.x.shape[1])
    chosen = evenly(len(setup.train.y), config.downstream.examples)
    splits = (Examples(setup.train.x[chosen], setup.train.y[chosen]), setup.test)

    @jax.jit
    def encode(params, x):
        return module.apply({"params": params}, x, method="encode")

    names, trained = member_names(runs_of(config, gate)), jax.device_get(members.params)
    for index, name in enumerate(tqdm(names, f"{gate} classifiers", mininterval=30.0)):
        if index in gone:
            continue
        params = jax.tree.map(lambda leaf, i=index: jnp.asarray(leaf[i]), trained)
        channels = np.asarray(kind.values(params["gate"], config.model.bottleneck)) > 0
        learned, tested = (
            Examples(np.asarray(encode(params, x))[:, channels], y) for x, y in splits
        )  # fmt: skip
        score_codes(directory / f"{name}.json", learned, tested, config.downstream.epochs)
