"""Lottery tickets: train, prune by magnitude, go back, train again, level by level.

Each level is a stage of its own that begins at the step to which training goes back: the order of
the data, random draws and the schedule are those of the first time from there on.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.sparse_training_masks import layer_counts
from experiments.sparse_training_members import Run, whole_runs
from experiments.study import asked_densities, concatenate, shapes_of_one
from ntt_sparse.pruning import dynamic
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.state import Member

METHOD = "lth"
REWIND = "rewind"
"""The stage up to the step to which training goes back."""
# Independent of the streams that training folds from a member's key.
_FRESH_STREAM = 1004

Init = Callable[[Any], tuple[Any, Any]]
"""`key -> (params, model state)`."""
Fit = Callable[[str, list[Run], Member, Plan], Member]
"""`(stage, runs, members, plan) -> members`: trains members through a stage."""


def levels(config: Any) -> list[float]:
    """Densities that are trained one after the other, the dense network first.

    Between those that are asked for there are others, so that each level prunes about a part
    `config.lth.prune` of what is left, where that is not 0.
    """
    found = [1.0]
    for density in asked_densities(config):
        whole = found[-1]
        if density == whole:
            continue
        steps = 1
        if config.lth.prune:
            steps = max(1, round(math.log(density / whole) / math.log(1 - config.lth.prune)))
        # Rounded, as they name files.
        between = (whole * (density / whole) ** (step / steps) for step in range(1, steps))
        found += [*(float(f"{each:.4g}") for each in between), density]
    return found


def stage_of(density: float) -> str:
    """The name of the stage that trains a level."""
    return f"level_{float(density)!r}"


def rewind_step(config: Any, plan: Plan) -> int:
    """The step to which training goes back after pruning.

    Raises:
        ValueError: It is the end, or the beginning although a later one is asked for.
    """
    step = round(config.lth.rewind * plan.total_steps)
    if step >= plan.total_steps or (config.lth.rewind > 0 and not step):
        raise ValueError(
            f"config.lth.rewind is {config.lth.rewind}, which is step {step} of "
            f"{plan.total_steps}: expected 0, or a step between the first and the last"
        )
    return step


def train(
    config: Any,
    init: Init,
    fit: Fit,
    members: Member,
    plan: Plan,
    optimizer: optax.GradientTransformation,
) -> Member:
    """Trains all levels. Returns the members of those that are asked for, ordered as `runs_of`.

    Args:
        config: The settings.
        init: Draws parameters.
        fit: Trains members.
        members: Of `whole_runs` at their start.
        plan: Of the whole run.
        optimizer: Of the members.
    """
    runs, start = whole_runs(config), rewind_step(config, plan)
    if start:
        members = fit(REWIND, runs, members, dataclasses.replace(plan, total_steps=start))
    later, snapshot = dataclasses.replace(plan, start=start), members
    pruned = {density: density for density in levels(config) if density < 1}
    counts = layer_counts(config, shapes_of_one(members.params), pruned)
    trained = {}
    for density in levels(config):
        if density < 1:
            members = go_back(config, init, optimizer, snapshot, members, counts[density])
        now = [run._replace(density=density) for run in runs]
        members = fit(stage_of(density), now, members, later)
        trained[density] = members
    kept = [trained[density] for density in asked_densities(config)]
    return concatenate(kept)


def go_back(
    config: Any,
    init: Init,
    optimizer: optax.GradientTransformation,
    snapshot: Member,
    trained: Member,
    counts: Any,
) -> Member:
    """Members at the start of a level: pruned by the magnitude of what was trained.

    Args:
        config: The settings. `config.lth.restore` says what goes back: `"weights"`, batch
            statistics and the optimiser, or the `"learning_rate"` alone; as a control weights are
            drawn anew (`"random"`), with statistics as they start. With the latter two moments
            of the optimiser are those of a start, and its schedule goes back.
        init: Draws parameters.
        optimizer: Of the members.
        snapshot: Members at the step to go back to.
        trained: Members at the end of the level before.
        counts: Of weights to keep.
    """

    def one(before: Member, after: Member) -> Member:
        masks = dynamic.gradual(after.params, after.masks, counts)
        source = after if config.lth.restore == "learning_rate" else before
        params, state = source.params, source.model_state
        if config.lth.restore == "random":
            params, state = init(jax.random.fold_in(before.key, _FRESH_STREAM))
        params = pruning_masks.apply(params, masks)
        opt_state = before.opt_state
        if config.lth.restore != "weights":
            # Schedules go by counts.
            opt_state = jax.tree.map(
                lambda new, old: old if jnp.issubdtype(old.dtype, jnp.integer) else new,
                optimizer.init(params),
                before.opt_state,
            )
        return before._replace(params=params, masks=masks, opt_state=opt_state, model_state=state)

    return jax.jit(jax.vmap(one))(snapshot, trained)


def logs_of(config: Any, workdir: Path) -> list[Path]:
    """The records of each density that is asked for, in order."""
    if config.method != METHOD:
        return [workdir / "supervised.jsonl"]
    return [workdir / f"{stage_of(density)}.jsonl" for density in asked_densities(config)]
