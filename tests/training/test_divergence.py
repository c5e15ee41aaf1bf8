"""Members that diverge stay as they were, are reported, and leave the others alone."""

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from ntt_sparse.training import loop, mesh, step, terms
from ntt_sparse.training.checkpoint import Checkpoints
from ntt_sparse.training.divergence import Divergence
from ntt_sparse.training.metrics import MetricsLog

NEVER = 1000
PLAN = loop.Plan(total_steps=12, steps_per_epoch=6, record_every=5)
NAMES = ["a", "b", "c", "d"]


def _ends(inputs):
    """NaN from the member's own step on."""
    return jnp.where(inputs.step >= inputs.context, jnp.nan, 0.0), {}


@functools.cache
def program(mode: mesh.MemberMode = "vmap"):
    loss = {"task": terms.supervised(problems.apply_fn), "ends": _ends}
    return problems.program(fn=step.make_step(loss, problems.optimizer), mode=mode, freeze=True)


def run(workdir, program, ends=(NEVER,) * 4, **options):
    workdir.mkdir(exist_ok=True)
    members = problems.members()._replace(context=jnp.array(ends))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return loop.fit(
            program, options.pop("members", members),
            jax.device_put(problems.data(), mesh.replicated(mesh.make_mesh())), PLAN,
            log=MetricsLog(workdir / "metrics.jsonl", "made"), checkpoints=checkpoints,
            member_names=NAMES, **options,
        )  # fmt: skip


def records(workdir):
    return MetricsLog(workdir / "metrics.jsonl", "made").records


def of_member(state, index):
    members = state.members._replace(key=jax.random.key_data(state.members.key))
    return [np.asarray(leaf[index]) for leaf in jax.tree.leaves(members._replace(context=()))]


def assert_same(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(our, their)


@pytest.mark.variants(2)
@pytest.mark.parametrize("mode", ["vmap", "loop", "dispatch"])
def test_a_frozen_member_stays_as_before_its_bad_step_and_the_others_are_untouched(
    tmp_path, mode, caplog
):
    evaluate = jax.jit(lambda members: {"sum": jax.vmap(jnp.sum)(members.params["out"])})
    whole = run(tmp_path / "whole", program(mode), evaluate=evaluate)
    state = run(tmp_path / "one", program(mode), (NEVER, NEVER, 7, NEVER), evaluate=evaluate)
    assert_same(of_member(state, 0), of_member(whole, 0))
    assert_same(of_member(state, 1), of_member(whole, 1))
    assert_same(of_member(state, 3), of_member(whole, 3))
    for record, expected in zip(
        records(tmp_path / "one"), records(tmp_path / "whole"), strict=True
    ):
        frozen = record["step"] > 7
        assert record.get("diverged") == (
            [None, None, {"step": 7, "term": "ends"}, None] if frozen else None
        )
        for name in ("train/loss", "sum"):
            if name in record:
                values = list(expected[name])
                values[2] = None if frozen else values[2]
                assert record[name] == values
    data = jax.device_put(problems.data(), mesh.replicated(mesh.make_mesh()))
    start = program(mode).init(problems.members()._replace(context=jnp.full(4, NEVER)), data)
    for epoch, stop in ((0, 6), (1, 7)):
        order = program(mode).permutations(start, jnp.int32(epoch), data)
        start = program(mode).chunk(start, data, order, jnp.int32(stop))
    assert_same(of_member(state, 2), of_member(start, 2))
    line = "stage 'made': 'ends' of member 'c' is not finite at step 7: it stays as it was before"
    assert caplog.text.count(line) == 1


def test_parameters_that_explode_are_those_of_before():
    """The gradient of the root is infinite at zero, where the loss is finite."""

    def root(inputs):
        return jnp.sqrt(jnp.sum(inputs.params["bias"] * inputs.context)), {}

    made = problems.program(fn=step.make_step({"root": root}, problems.optimizer), freeze=True)
    members = problems.members()._replace(context=jnp.array([0.0, 1.0, 0.0, 1.0]))
    members = members._replace(params={**members.params, "bias": members.params["bias"] + 1})
    members.params["bias"] = members.params["bias"].at[1].set(0)
    data = problems.data()
    state = made.init(members, data)
    state = made.chunk(state, data, made.permutations(state, jnp.int32(0), data), jnp.int32(3))
    found = {name: steps.tolist() for name, steps in state.bad_step.items()}
    assert found["params"][1::2] == [0, -1] and found["root"][1::2] == [-1, -1]
    assert_same(of_member(state, 1), of_member(state._replace(members=members), 1))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.members.params))


@pytest.mark.parametrize("killed", [4, 6, 9])
def test_a_run_with_a_frozen_member_goes_on_after_a_kill_the_same(tmp_path, killed):
    ends = (NEVER, 3, NEVER, 8)
    unbroken = run(tmp_path / "whole", program(), ends)

    def chunk(state, data, permutations, stop):
        if int(stop) >= killed:
            os.kill(os.getpid(), signal.SIGTERM)
        return program().chunk(state, data, permutations, stop)

    with pytest.raises(loop.Interrupted):
        run(tmp_path / "broken", program()._replace(chunk=chunk), ends)
    again = run(tmp_path / "broken", program(), ends)
    for index in range(4):
        assert_same(of_member(again, index), of_member(unbroken, index))
    assert records(tmp_path / "broken") == records(tmp_path / "whole")
    assert jax.device_get(again.bad_step)["ends"].tolist() == [-1, 3, -1, 8]


def test_a_member_whose_evaluation_is_not_finite_takes_no_further_part(tmp_path):
    def evaluate(members):
        return {"made": jnp.where(jnp.arange(4) == 1, jnp.nan, jnp.arange(4.0))}

    state = run(tmp_path, program(), evaluate=evaluate)
    assert_same(of_member(state, 1), of_member(state._replace(members=problems.members()), 1))
    assert all(record["made"] == [0.0, None, 2.0, 3.0] for record in records(tmp_path))
    log = MetricsLog(tmp_path / "metrics.jsonl", "made")
    assert log.diverged() == {1: Divergence(0, "made")}


def test_when_none_is_left_the_run_ends_and_names_the_first(tmp_path):
    with pytest.raises(
        loop.DivergenceError,
        match="'ends' of member 'b' is not finite at step 2, and none of the 4",
    ):
        run(tmp_path, program(), (4, 2, 3, 6))
