"""The DAM representation study: prepare, train, report."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments import dam_representation_report, diverged
from experiments.cli import claim_workdir, user_errors
from experiments.dam_representation_checks import check_config
from experiments.dam_representation_members import (
    KINDS,
    autoencoder,
    make_optimizer,
    make_sets,
    member_names,
    runs_of,
    start_members,
)
from experiments.stage import fit_stage
from experiments.study import save_networks
from ntt_sparse.gates.layer import Kind
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import Term, TermInputs, make_step


def run(config: Any, workdir: str | Path, *, data_dir: str | None = None) -> dict[str, Any]:
    """Runs the study, or goes on with it.

    Args:
        config: From `experiments.configs.dam_representation.get_config`.
        workdir: Where everything is written; an earlier run of the same config there is
            continued, and a finished one only draws its report again.
        data_dir: Not used: all data are made.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        UserError: The config or the work directory does not permit the study; nothing was
            changed.
    """
    del data_dir
    with user_errors():
        check_config(config)
    with claim_workdir(workdir, config.to_dict()) as claimed:
        for gate in config.gates.split(","):
            names = member_names([run for run in runs_of(config) if run.gate == gate])
            members = train(config, gate, claimed)
            gone = diverged.gone(claimed, gate, names)
            save_networks(claimed / "networks", names, members, gone)
        return dam_representation_report.write(config, claimed)


def train(config: Any, gate: str, workdir: Path) -> Member:
    """Trains all networks with one kind of gate as one program. Returns its members."""
    kind = KINDS[gate]()
    runs = [run for run in runs_of(config) if run.gate == gate]
    steps = config.training.max_steps or config.training.epochs
    plan = Plan(steps, steps, config.training.record_every, config.checkpoint_seconds)
    step_fn = make_step(training_terms(config, kind), make_optimizer(config))
    sets = make_sets(config)
    return fit_stage(
        config, workdir, gate, member_names(runs), start_members(config, gate, runs), step_fn,
        plan, sets, functools.partial(evaluate, config, kind), (sets,), "vmap", batch_size=1,
        pick=own_set, made=True, freeze=True,
    )  # fmt: skip


def own_set(member: Member, sets: Float[Array, "sets n d"], indices: Any) -> Float[Array, "n d"]:
    """The batch of every step: all examples of the member's own set."""
    del indices
    return sets[member.context["set"]]


def training_terms(config: Any, kind: Kind) -> dict[str, Term]:
    """The mean squared error of the reconstruction, and the member's penalty (Eq. 5)."""
    module = autoencoder(config, kind)

    def reconstruction(inputs: TermInputs):
        x = inputs.batch
        return jnp.mean((module.apply({"params": inputs.params}, x) - x) ** 2), {}

    def gate(inputs: TermInputs):
        value = kind.penalty([inputs.params["gate"]])
        return inputs.context["coefficient"] * value, {"penalty": value}

    return {"reconstruction": reconstruction, "gate": gate}


def evaluate(
    config: Any, kind: Kind, member: Member, sets: Float[Array, "sets n d"]
) -> dict[str, jax.Array]:
    """Width of the bottleneck, reconstruction error and what it is relative to."""
    x = own_set(member, sets, None)
    module = autoencoder(config, kind)
    gates = kind.values(member.params["gate"], config.bottleneck)
    reconstruction: Any = module.apply({"params": member.params}, x)
    error = jnp.mean((reconstruction - x) ** 2)
    return {
        "bottleneck": jnp.sum(gates > 0, dtype=jnp.int32),
        "reconstruction": error,
        "relative_error": error / jnp.mean(x**2),
        "penalty": kind.penalty([member.params["gate"]]),
    }
