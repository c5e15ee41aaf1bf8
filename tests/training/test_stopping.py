"""Early stopping of single members."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from ntt_sparse.training import loop, step, terms
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import program as programs
from ntt_sparse.training.checkpoint import Checkpoints
from ntt_sparse.training.metrics import MetricsLog
from ntt_sparse.training.stopping import ACTIVE, EarlyStopping, is_active


def records(*values):
    return [{"step": step, "loss": list(value)} for step, value in enumerate(values)]


def test_a_member_stops_after_its_patience_without_a_new_lowest_value():
    stopping = EarlyStopping("loss", 2)
    # The first record is from before training, and does not count.
    assert stopping.active(records((0, 0, 0), (3, 3, 3), (2, 3, 4))) is None
    assert stopping.active(
        records((0, 0, 0), (3, 3, 3), (2, 3, 4), (2, 2.9, 3))
    ).tolist() == [True, True, False]  # fmt: skip
    later = records((0, 0, 0), (3, 3, 3), (2, 3, 4), (2, 2.9, 3), (2, 3, 3))
    assert stopping.active(later).tolist() == [False, True, False]
    assert not stopping.all_stopped(later)
    assert stopping.all_stopped([*later, {"step": 5, "loss": [2, 3, 3]}])


def test_what_cannot_be_decided_is_refused():
    with pytest.raises(ValueError, match="patience is 0, expected 1 record or more"):
        EarlyStopping("loss", 0).active(records((0,), (1,)))
    with pytest.raises(
        ValueError, match=r"a record holds \['loss', 'step'\], but no 'los' to stop by"
    ):
        EarlyStopping("los", 1).active(records((0,), (1,)))


@functools.cache
def step_fn():
    return step.make_step({"task": terms.supervised(problems.apply_fn)}, problems.optimizer)


@pytest.mark.parametrize("mode", ["vmap", "loop", "dispatch"])
def test_members_that_are_not_active_stay_as_they_are(mode):
    mesh = meshes.make_mesh()
    active = jnp.array([True, False, True, False])
    members = problems.members()._replace(context={ACTIVE: active})
    program = programs.make_program(
        step_fn(), batch_size=16, mesh=mesh, mode=mode, active=is_active
    )
    data = jax.device_put(problems.data(), meshes.replicated(mesh))
    state = program.init(members, data)
    order = program.permutations(state, jnp.int32(0), data)
    after = program.chunk(state, data, order, jnp.int32(3))
    for before, now in zip(
        jax.tree.leaves(members.params), jax.tree.leaves(after.members.params), strict=True
    ):
        same = np.all(np.asarray(before == now).reshape(4, -1), axis=1)
        assert same.tolist() == [False, True, False, True]
    assert (np.asarray(after.sums["loss"]) > 0).tolist() == active.tolist()
    assert after.since.tolist() == [3, 0, 3, 0]


def test_a_run_ends_when_all_have_stopped_and_goes_on_the_same(tmp_path):
    """Losses by hand: one member stops after three records, the others after four."""
    mesh = meshes.auto_mesh(4, 16)
    members = problems.members()._replace(context={ACTIVE: jnp.ones(4, bool)})
    program = programs.make_program(step_fn(), batch_size=16, mesh=mesh, active=is_active)
    data = jax.device_put(problems.data(), meshes.replicated(mesh))
    plan = loop.Plan(40, 4, 4, checkpoint_seconds=0.0)
    stopping = EarlyStopping("loss", 2)
    losses = iter([[9] * 4, [3] * 4, [4, 2, 2, 2], [4, 3, 3, 3], [4, 3, 3, 3]])
    seen = []

    def evaluate(current):
        seen.append(jax.device_get(current.params["in"]))
        return {"loss": jnp.asarray(next(losses), float)}

    def run():
        with Checkpoints(tmp_path / "checkpoints", identity="") as checkpoints:
            return loop.fit(
                program, members, data, plan, log=MetricsLog(tmp_path / "log.jsonl", "stage"),
                checkpoints=checkpoints, member_names=list("abcd"), evaluate=evaluate,
                should_stop=stopping.all_stopped, revise=stopping.revise,
            )  # fmt: skip

    state = run()
    assert int(state.step) == 16
    assert state.members.context[ACTIVE].tolist() == [False] * 4
    # The first stopped one record before the others.
    np.testing.assert_array_equal(seen[3][0], seen[4][0])
    assert np.all(np.any(seen[3][1:] != seen[4][1:], axis=(1, 2)))
    # Of a member that has stopped no loss is told.
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    told = [line["train/loss"] for line in lines[1:]]
    assert [[value is None for value in line] for line in told] == [
        [False] * 4, [False] * 4, [False] * 4, [True, False, False, False]
    ]  # fmt: skip
    again = run()
    for one, two in zip(
        jax.tree.leaves(state.members.params), jax.tree.leaves(again.members.params), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_a_run_that_is_broken_while_some_have_stopped_goes_on_the_same(tmp_path):
    mesh = meshes.make_mesh()
    members = problems.members()._replace(context={ACTIVE: jnp.ones(4, bool)})
    program = programs.make_program(step_fn(), batch_size=16, mesh=mesh, active=is_active)
    data = jax.device_put(problems.data(), meshes.replicated(mesh))
    plan = loop.Plan(24, 4, 4, checkpoint_seconds=0.0)
    stopping = EarlyStopping("loss", 1)
    # By step, so that a run that goes on is told the same.
    losses = {0: [9] * 4, 4: [3] * 4, 8: [4, 2, 2, 2], 12: [4, 3, 1, 1], 16: [4, 3, 0, 0]}

    def run(workdir, breaks_at=None):
        def evaluate(current):
            step = int(np.max(np.asarray(current.opt_state[0].count)))
            if step == breaks_at:
                raise KeyboardInterrupt
            return {"loss": jnp.asarray(losses.get(step, losses[16]), float)}

        workdir.mkdir(exist_ok=True)
        with Checkpoints(workdir / "checkpoints", identity="") as checkpoints:
            return loop.fit(
                program, members, data, plan, log=MetricsLog(workdir / "log.jsonl", "stage"),
                checkpoints=checkpoints, member_names=list("abcd"), evaluate=evaluate,
                should_stop=stopping.all_stopped, revise=stopping.revise,
            )  # fmt: skip

    unbroken = run(tmp_path / "unbroken")
    assert int(unbroken.step) == 20
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", breaks_at=16)
    broken = run(tmp_path / "broken")
    for one, two in zip(
        jax.tree.leaves(unbroken.members.params), jax.tree.leaves(broken.members.params),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(one, two)
    for name in ("unbroken", "broken"):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 4, 8, 12, 16, 20]
