"""What the CKA-SR study minimises: four steps against steps written by hand, in float64."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cka_sr_problems import get_config, hand_cka, member_of, tiny_mlp, tiny_split

from experiments import sparse_training_members, sparse_training_study
from ntt_sparse.data import images
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import program as programs
from ntt_sparse.training.loop import Plan

HAND = {
    "stages": ("Dense_0,Dense_1", "Dense_1,Dense_2"), "samples": 8, "every": 3,
    "regularisers": "cka_sr,aug_cka_sr,cka_sr_debiased", "coefficients": (0.5,),
    "density": (0.5,), "seeds": (1,), "supervised.optimizer": "sgd",
    "supervised.batch_size": 16, "supervised.learning_rate": 0.1,
    "supervised.weight_decay": 0.01, "supervised.milestones": (0.5,), "supervised.max_steps": 4,
}  # fmt: skip


def hand_value(regulariser, maps):
    """Of three layers, in the stages of `HAND`: sums over ordered pairs, or the mean of pairs."""
    if regulariser == "none":
        return 0.0
    if regulariser == "aug_cka_sr":
        return sum(hand_cka(maps[i], maps[j]) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    debiased = regulariser == "cka_sr_debiased"
    return 2 * sum(hand_cka(maps[i], maps[i + 1], debiased) for i in (0, 1))


@functools.partial(jax.jit, static_argnames="regulariser")
def gradients_by_hand(params, keep, x, y, coefficient, regulariser):
    """Of the loss of one batch, and the similarity in it."""

    def loss_fn(params):
        hidden, maps = x.reshape(16, -1), []
        for layer in range(4):
            dense = params[f"Dense_{layer}"]
            mask = keep[f"Dense_{layer}"]["kernel"]
            maps.append(hidden @ (dense["kernel"] * mask) + dense["bias"])
            hidden = jnp.maximum(maps[-1], 0)
        similarity = coefficient * hand_value(regulariser, [m[:8] for m in maps[:3]])
        logp = jax.nn.log_softmax(maps[-1])
        return similarity - jnp.mean(logp[jnp.arange(16), y]), similarity

    return jax.grad(loss_fn, has_aux=True)(params)


def train_by_hand(member, regulariser, coefficient, data):
    """SGD with Nesterov momentum and decay; its rate falls at half of four steps."""
    x, y = data
    params = jax.tree.map(np.asarray, member.params)
    velocity = jax.tree.map(np.zeros_like, params)
    totals = [0.0]
    for step in range(4):
        key = jax.random.fold_in(jax.random.fold_in(member.key, 0), step // 2)
        batch = np.asarray(jax.random.permutation(key, 40)[16 * (step % 2) :][:16])
        added = regulariser if step in (0, 3) else "none"
        grads, similarity = gradients_by_hand(
            params, member.masks, x[batch], y[batch], coefficient, added
        )
        grads, similarity = jax.device_get((grads, similarity))
        totals.append(totals[-1] + similarity)
        grads = jax.tree.map(lambda g, p: g + 0.01 * p, grads, params)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        steps = jax.tree.map(lambda g, v: g + 0.9 * v, grads, velocity)
        params = jax.tree.map(
            lambda p, s, rate=0.1 if step < 2 else 0.01: p - rate * s, params, steps
        )
    return params, totals


class Trained(NamedTuple):
    """What the study's own program gives: members before and after, sums by step, its code."""

    start: object
    members: object
    sums: dict
    jaxpr: object
    code: str


def train_by_program(**fields):
    """What `train` hands to the engine, run by hand for four steps."""
    config = get_config(**(HAND | fields))
    train = tiny_split(np.float64)
    data = images.ImageData(train, train, train, 10, "made", np.zeros(1), np.ones(1))
    setup = sparse_training_study.Setup(tiny_mlp(jnp.float64), data, Plan(4, 2, 4))
    handed = {}

    def fit_stage(*arguments, **options):
        members, step_fn, _, train_data = arguments[4:8]
        handed.update(members=members, step_fn=step_fn, data=train_data)
        return members

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_training_study, "fit_stage", fit_stage)
        sparse_training_study.train(config, setup, Path("unused"))
    mesh = meshes.make_mesh()
    program = programs.make_program(handed["step_fn"], batch_size=16, mesh=mesh)
    data = jax.device_put(jax.tree.map(jnp.asarray, handed["data"]), meshes.replicated(mesh))
    state = program.init(handed["members"], data)
    permutations = program.permutations(state, jnp.int32(0), data)
    arguments = (state, data, permutations, jnp.int32(1))
    jaxpr = jax.make_jaxpr(program.chunk)(*arguments)
    compiled = program.chunk.lower(*arguments).compile()
    sums = {}
    for stop in (1, 2, 3, 4):
        permutations = program.permutations(state, jnp.int32((stop - 1) // 2), data)
        state = compiled(state, data, permutations, jnp.int32(stop))
        sums[stop] = jax.tree.map(np.asarray, state.sums)
    members = jax.tree.map(np.asarray, state.members.params)
    return Trained(handed["members"], members, sums, jaxpr, compiled.as_text())


@pytest.fixture(scope="module")
def trained():
    with jax.enable_x64(True):
        return train_by_program()


@pytest.mark.usefixtures("x64")
def test_the_program_takes_the_steps_written_by_hand(trained):
    runs = sparse_training_members.runs_of(get_config(**HAND))
    assert [run.regulariser for run in runs] == ["none", *HAND["regularisers"].split(",")]
    data = tiny_split(np.float64)
    ends = []
    for index, run in enumerate(runs):
        member = member_of(trained.start, index)
        params, totals = train_by_hand(member, run.regulariser, run.coefficient, data)
        for name in ("Dense_0", "Dense_1", "Dense_2", "Dense_3"):
            np.testing.assert_allclose(
                trained.members[name]["bias"][index], params[name]["bias"], rtol=1e-9, atol=1e-13
            )
            np.testing.assert_allclose(
                trained.members[name]["kernel"][index],
                np.where(member.masks[name]["kernel"], params[name]["kernel"], 0),
                rtol=1e-9, atol=1e-13,
            )  # fmt: skip
        measured = [trained.sums[stop]["similarity"][index] for stop in (1, 2, 3, 4)]
        np.testing.assert_allclose(measured, totals[1:], rtol=1e-9)
        assert measured[0] == measured[1] == measured[2]
        assert (measured[3] > measured[2] > 0) == (run.regulariser != "none")
        ends.append(params["Dense_0"]["kernel"])
    # The regularisers do something, each of its own.
    for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        assert np.max(np.abs(ends[i] - ends[j])) > 1e-5


@pytest.mark.usefixtures("x64")
def test_others_leave_the_network_without_a_regulariser_alone(trained):
    other = train_by_program(every=1, coefficients=(50.0,))
    for name in ("Dense_0", "Dense_1", "Dense_2"):
        a, b = trained.members[name]["kernel"], other.members[name]["kernel"]
        np.testing.assert_allclose(a[0], b[0], rtol=1e-12, atol=1e-15)
        assert np.max(np.abs(a[1] - b[1])) > 1e-3
    np.testing.assert_array_equal(other.sums[4]["similarity"][0], 0.0)
    # With nothing to skip, nothing is conditional; see the test below.
    assert skipping(other.jaxpr.jaxpr) == 0


def equations(jaxpr):
    """All equations, also of what is inside of others."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def skipping(jaxpr):
    """How many conditionals have a branch of several matrix products and one of none.

    (One product is in the branch of a Gram matrix whose features are centred first.)
    """
    count = 0
    for equation in equations(jaxpr):
        if equation.primitive.name == "cond":
            works = [
                sum(e.primitive.name == "dot_general" for e in equations(branch.jaxpr))
                for branch in equation.params["branches"]
            ]
            count += min(works) == 0 and max(works) > 1
    return count


def test_skipped_batches_do_no_work(trained):
    """Forward and backward are each in a conditional, also after compilation."""
    assert skipping(trained.jaxpr.jaxpr) == 2
    assert trained.code.count(" conditional(") >= 2
