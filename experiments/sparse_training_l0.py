"""L0 regularisation: which weights go is learned, by a hard-concrete gate for each of them.

First whole networks are trained with their gates and a penalty on the expected number of weights
that are left. What gates alone keep follows from the coefficient of that penalty; so that methods
can be compared at the densities that are asked for, those weights are kept whose expected
magnitude is largest, and what is left is trained as any sparse network, from the weights that
evaluation sees. Networks of all densities share the first stage.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from experiments import diverged
from experiments.sparse_training_masks import PRUNABLE, layer_counts
from experiments.sparse_training_members import member_names, whole_runs
from experiments.study import asked_densities, concatenate, make_plan, shapes_of_one
from ntt_sparse.pruning import l0
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.metrics import MetricsLog
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import Forward, Term, TermInputs

METHOD = "l0"
STAGE = "gates"
"""The stage in which gates are trained."""
# Of the parameters of members in that stage.
_WEIGHTS, _GATES = "weights", "log_alpha"
# Independent of the streams that training folds from a member's key.
_START_STREAM, _STAGE_STREAM = 1005, 3000
# Of a pass: dropout is drawn from the key itself.
_DRAW_STREAM = 1

Evaluate = Callable[..., dict[str, Any]]
"""`(member, *data) -> {name: value}`."""
Fit = Callable[..., Member]
"""Called with `stage`, `members` and `plan`: trains members with gates through a stage."""


def plan(config: Any, n: int) -> Plan:
    """The plan of the stage, for `n` training examples."""
    return make_plan(config.l0, n, config.checkpoint_seconds)


def make_optimizer(
    config: Any, weights: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Adam for gates beside the optimiser of the weights.

    The penalty alone moves a gate by about the learning rate in each step.
    """
    gates = optax.adam(config.l0.learning_rate)
    labels = {_WEIGHTS: _WEIGHTS, _GATES: _GATES}
    return optax.partition({_WEIGHTS: weights, _GATES: gates}, labels)


def gated_forward(forward: Forward) -> Forward:
    """A forward pass of masked networks, of weights times gates that are drawn in each step."""

    def drawn(inputs: TermInputs) -> Any:
        key = jax.random.fold_in(inputs.key, _DRAW_STREAM)
        effective = l0.sample(key, inputs.params[_WEIGHTS], inputs.params[_GATES])
        return forward(inputs._replace(params=effective, masks=inputs.masks[_WEIGHTS]))

    return drawn


def gated_terms(config: Any, terms: Mapping[str, Term], n: int) -> dict[str, Term]:
    """The terms of sparse training, of the weights, and the penalty for `n` training examples."""

    def of_weights(term: Term) -> Term:
        def read(inputs: TermInputs) -> Any:
            weights, masks = inputs.params[_WEIGHTS], inputs.masks[_WEIGHTS]
            return term(inputs._replace(params=weights, masks=masks))

        return read

    def penalty(inputs: TermInputs) -> Any:
        count = l0.expected_count(inputs.params[_GATES])
        return config.l0.coefficient / n * count, {"expected_weights": count}

    return {**{name: of_weights(term) for name, term in terms.items()}, "l0": penalty}


def hold(member: Member, step: Any, gradients: Any) -> Member:
    """What follows a step: gates stay where they learn."""
    del step, gradients
    params = {**member.params, _GATES: l0.clip(member.params[_GATES])}
    return member._replace(params=params)


def of_evaluation(member: Member) -> Member:
    """A member whose weights and masks are those that gates let through in evaluation."""
    weights, gates = member.params[_WEIGHTS], member.params[_GATES]
    return member._replace(params=l0.deterministic(weights, gates), masks=l0.open_masks(gates))


def gated_evaluation(evaluate: Evaluate) -> Evaluate:
    """What is measured of sparse networks, of those that gates alone make."""
    return lambda member, *data: evaluate(of_evaluation(member), *data)


def train(
    config: Any,
    fit: Fit,
    members: Member,
    gated_plan: Plan,
    gated_optimizer: optax.GradientTransformation,
    optimizer: optax.GradientTransformation,
) -> Member:
    """Trains gates and cuts by them. Returns members at the start of sparse training.

    Args:
        config: The settings.
        fit: Trains members with gates.
        members: Of `whole_runs` at their start, not masked.
        gated_plan: Of the stage.
        gated_optimizer: Of weights and gates.
        optimizer: Of sparse training.

    Returns:
        Members in the order of `runs_of`.
    """
    gated = start(config, members, gated_optimizer)
    return cut(config, members, fit(stage=STAGE, members=gated, plan=gated_plan), optimizer)


def start(config: Any, members: Member, optimizer: optax.GradientTransformation) -> Member:
    """Whole networks with gates, at the start of the stage."""

    def one(member: Member) -> Member:
        key = jax.random.fold_in(member.key, _START_STREAM)
        gates = l0.init(key, member.params, drop=config.l0.drop, prunable=PRUNABLE)
        params = {_WEIGHTS: member.params, _GATES: gates}
        masks = {_WEIGHTS: member.masks, _GATES: jax.tree.map(lambda leaf: None, gates)}
        return member._replace(
            params=params,
            masks=masks,
            opt_state=optimizer.init(params),
            # The order of the data is another one than that of sparse training.
            key=jax.random.fold_in(member.key, _STAGE_STREAM),
        )

    return jax.jit(jax.vmap(one))(members)


def cut(
    config: Any, whole: Member, trained: Member, optimizer: optax.GradientTransformation
) -> Member:
    """Members at the start of sparse training, in the order of `runs_of`.

    Args:
        config: The settings.
        whole: Networks before the stage, of `whole_runs`.
        trained: Networks with gates after it.
        optimizer: Of sparse training.
    """
    counts = layer_counts(config, shapes_of_one(whole.params))

    def one(before: Member, after: Member, count: Any) -> Member:
        weights, gates = after.params[_WEIGHTS], after.params[_GATES]
        masks = pruning_masks.from_counts(l0.scores(weights, gates), count)
        params = pruning_masks.apply(l0.deterministic(weights, gates), masks)
        return before._replace(
            params=params,
            masks=masks,
            opt_state=optimizer.init(params),
            model_state=after.model_state,
        )

    each = jax.jit(jax.vmap(one, (0, 0, None)))
    kept = [each(whole, trained, counts[density]) for density in asked_densities(config)]
    return concatenate(kept)


def summarise(config: Any, workdir: Path) -> list[dict[str, Any]]:
    """What gates alone made of each network: part of the weights, test accuracy.

    An entry for each regulariser and coefficient, none for other methods.
    """
    if config.method != METHOD:
        return []
    log = MetricsLog(workdir / f"{STAGE}.jsonl", STAGE)
    gone = diverged.gone(workdir, STAGE, member_names(whole_runs(config)))
    kept, test = log.column("kept")[1][-1].sum(1), log.column("test/accuracy")[1][-1]
    groups: dict[tuple[str, float], list[int]] = {}
    for index, run in enumerate(whole_runs(config)):
        groups.setdefault((run.regulariser, run.coefficient), []).append(index)
    return [
        {
            "regulariser": regulariser,
            "coefficient": coefficient,
            "kept": np.asarray(kept)[members].astype(int).tolist(),
            "test_accuracy": np.asarray(test)[members].tolist(),
        }
        for (regulariser, coefficient), members in diverged.left(groups, gone).items()
    ]
