"""The loop: records, early stop, divergence, interruption, and death at any moment."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from ntt_sparse.training import loop, mesh, step
from ntt_sparse.training.checkpoint import CheckpointError, Checkpoints
from ntt_sparse.training.metrics import MetricsLog

PLAN = loop.Plan(total_steps=12, steps_per_epoch=6, record_every=5)


@pytest.fixture(scope="module")
def program():
    return problems.program()


def run(workdir, program, plan=PLAN, **kwargs):
    data = jax.device_put(problems.data(), mesh.replicated(mesh.make_mesh()))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return loop.fit(
            program,
            kwargs.pop("members", None) or problems.members(),
            data,
            plan,
            log=MetricsLog(workdir / "metrics.jsonl", "made"),
            checkpoints=checkpoints,
            member_names=["a", "b", "c", "d"],
            **kwargs,
        )


def params_of(state):
    return {name: np.asarray(leaf) for name, leaf in state.members.params.items()}


def assert_same(a, b):
    for name, leaf in params_of(a).items():
        np.testing.assert_array_equal(leaf, params_of(b)[name])


def test_records_stand_before_between_and_after(tmp_path, program):
    run(tmp_path, program, evaluate=lambda member: {"one": jnp.ones(4)})
    records = MetricsLog(tmp_path / "metrics.jsonl", "made").records
    assert [record["step"] for record in records] == [0, 5, 10, 12]
    assert "train/loss" not in records[0]
    assert all(record["one"] == [1.0] * 4 for record in records)
    assert all(len(record["train/task"]) == 4 for record in records[1:])


def test_a_finished_run_is_not_run_again(tmp_path, program):
    first = run(tmp_path, program)
    text = (tmp_path / "metrics.jsonl").read_text()
    again = run(tmp_path, program._replace(chunk=None, permutations=None))
    assert_same(first, again)
    assert (tmp_path / "metrics.jsonl").read_text() == text


@pytest.mark.parametrize("rewound", [3, 6, 8])
def test_a_stage_that_begins_where_another_ended(tmp_path, program, rewound):
    """Rewinding: from any step on, in an epoch too, the same steps as those of one long stage."""
    parts = [tmp_path / name for name in ("whole", "first", "again", "once_more")]
    for part in parts:
        part.mkdir()
    whole = run(parts[0], program)
    first = run(parts[1], program, dataclasses.replace(PLAN, total_steps=rewound))
    for part in parts[2:]:
        later = dataclasses.replace(PLAN, start=rewound)
        assert_same(run(part, program, later, members=first.members), whole)
    records = MetricsLog(parts[2] / "metrics.jsonl", "made").records
    assert [record["step"] for record in records] == [
        rewound, *(step for step in (5, 10, 12) if step > rewound)
    ]  # fmt: skip


def test_interruption_leaves_a_checkpoint_and_the_run_goes_on(tmp_path, program):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    unbroken = run(whole, program)

    def chunk(state, data, permutations, stop):
        if int(stop) > 5:
            os.kill(os.getpid(), signal.SIGINT)
        return program.chunk(state, data, permutations, stop)

    with pytest.raises(loop.Interrupted, match="the same command goes on from here"):
        run(broken, program._replace(chunk=chunk))
    assert_same(run(broken, program), unbroken)
    assert (broken / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_interruption_in_the_last_chunk_is_heard(tmp_path, program):
    def chunk(state, data, permutations, stop):
        if int(stop) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return program.chunk(state, data, permutations, stop)

    with pytest.raises(loop.Interrupted, match="stopped after step 12 of stage"):
        run(tmp_path, program._replace(chunk=chunk))
    assert int(run(tmp_path, program._replace(chunk=None)).step) == 12


def test_params_that_explode_in_the_last_update_end_the_run(tmp_path):
    def term(inputs):
        return inputs.context * jnp.sum(inputs.params["in"]), {}

    optimizer = optax.sgd(1e38)
    fn = step.make_step({"made": term}, optimizer)
    members = problems.members()
    members = members._replace(
        opt_state=jax.vmap(optimizer.init)(members.params), context=jnp.array([0.0, 0.0, 0.0, 9.9])
    )
    with pytest.raises(loop.DivergenceError, match="'params' of member 'd' is not finite"):
        run(tmp_path, problems.program(fn=fn), loop.Plan(1, 6, 5), members=members)
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path, program):
    never = program._replace(chunk=None)
    with pytest.raises(ValueError, match="4 member_names for 2 members, expected one for each"):
        run(tmp_path, never, members=problems.members((0, 1)))
    for values, message in (
        ({"one": jnp.float32(1)}, r"'one' of shape \(\), expected 4 members along"),
        ({"one": jnp.ones(3)}, r"'one' of shape \(3,\), expected 4 members along"),
        ({"step": jnp.ones(4)}, "evaluate returned 'step', a name that records have"),
        ({"train/loss": jnp.ones(4)}, "evaluate returned 'train/loss', a name that"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, never, evaluate=lambda member, values=values: values)
    x, y = problems.data()
    for data in ((x, y[:40]), (x, jnp.float32(1)), ()):
        with pytest.raises(ValueError, match="expected the same number of examples in each"):
            program.init(problems.members(), data)


def test_a_checkpoint_from_after_the_end_is_not_the_end(tmp_path, program):
    run(tmp_path, program)
    with pytest.raises(CheckpointError, match="is of step 12, after the end of this plan, 6"):
        run(tmp_path, program, dataclasses.replace(PLAN, total_steps=6))


def test_records_of_another_run_are_an_error(tmp_path, program):
    run(tmp_path, program)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[1], *lines[2:]]))
    with pytest.raises(CheckpointError, match="records are of other steps"):
        run(tmp_path, program)


def test_early_stop_ends_the_stage_for_good(tmp_path, program):
    def should_stop(records):
        return records[-1]["step"] >= 5

    state = run(tmp_path, program, should_stop=should_stop)
    assert int(state.step) == 5
    again = run(tmp_path, program._replace(chunk=None), should_stop=should_stop)
    assert_same(state, again)


def test_divergence_names_step_term_and_member(tmp_path):
    def term(inputs):
        loss = jnp.sum(inputs.params["in"] ** 2)
        return jnp.where(inputs.context, loss * jnp.nan, loss), {}

    fn = step.make_step({"made": term}, problems.optimizer)
    members = problems.members()._replace(context=jnp.array([False, False, True, False]))
    with pytest.raises(loop.DivergenceError, match="'made' of member 'c' is not finite at step 0"):
        run(tmp_path, problems.program(fn=fn), members=members)


def test_a_damaged_newest_checkpoint_falls_back(tmp_path, program, caplog):
    unbroken = run(tmp_path, program, loop.Plan(12, 6, 5, checkpoint_seconds=0.0))
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert len(steps) == 2
    largest = max(
        (tmp_path / "checkpoints" / "12").rglob("*"),
        key=lambda p: p.stat().st_size if p.is_file() else 0,
    )
    largest.write_bytes(largest.read_bytes()[:100])
    again = run(tmp_path, program)
    assert_same(unbroken, again)
    assert "checkpoint of step 12 is cut short or changed" in caplog.text
    assert (tmp_path / "checkpoints-damaged" / "12").exists()


def test_records_that_vanished_are_an_error(tmp_path, program):
    run(tmp_path, program)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="holds 0 records where its checkpoint had 4"):
        run(tmp_path, program)


@pytest.mark.parametrize("field", ["total_steps", "steps_per_epoch", "record_every"])
def test_plan_refuses_nothing_to_do(field):
    settings = {"total_steps": 1, "steps_per_epoch": 1, "record_every": 1, field: 0}
    with pytest.raises(ValueError, match=f"{field} is 0, expected at least 1"):
        loop.Plan(**settings)


def test_plan_refuses_more_steps_than_are_counted():
    with pytest.raises(ValueError, match="steps are counted in 32 bits"):
        dataclasses.replace(PLAN, total_steps=2**31)


@pytest.mark.parametrize("start", [-1, 12, 13])
def test_plan_refuses_to_begin_after_its_end(start):
    with pytest.raises(ValueError, match=f"start is {start}, expected 0 or more and less than"):
        dataclasses.replace(PLAN, start=start)


def start(workdir):
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    script = Path(__file__).with_name("killed_run.py")
    return subprocess.Popen(
        [sys.executable, str(script), str(workdir)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process):
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr.decode()[-2000:]


# Whole studies are killed in tests/experiments/test_cli.py.
@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_sigkill_at_random_moments_changes_no_bit(tmp_path, count):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    unbroken.mkdir()
    killed.mkdir()
    finish(start(unbroken))
    rng = random.Random(0)
    kills = 0
    for _ in range(count):
        process = start(killed)
        # Somewhere after the first new checkpoint: in a chunk, a record or a save.
        before = set((killed / "checkpoints").glob("*"))
        while set((killed / "checkpoints").glob("*")) <= before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.stderr.close()
    finish(start(killed))
    assert kills >= 1, "the run ended before it could be killed"
    for name in ("fingerprint", "metrics.jsonl"):
        assert (killed / name).read_bytes() == (unbroken / name).read_bytes()
