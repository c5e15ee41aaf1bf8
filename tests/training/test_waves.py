"""Members in waves: as many as fit the memory, and the numbers of a stage in one piece."""

import json
import math
import os
import re
import signal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import problems
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import stage, waves
from experiments.cli import UserError
from ntt_sparse.data.stream import Stream
from ntt_sparse.training import loop, mesh, step, terms
from ntt_sparse.training.divergence import DivergenceError
from ntt_sparse.training.metrics import MetricsLog
from ntt_sparse.training.stopping import ACTIVE, EarlyStopping

NAMES = ["a", "b", "c", "d", "e"]
NEVER = 1000
SUPERVISED = terms.supervised(problems.apply_fn)


def _ends(inputs):
    return jnp.where(inputs.step >= inputs.context["ends"], jnp.nan, 0.0), {}


STEP = step.make_step({"task": SUPERVISED, "ends": _ends}, problems.optimizer)


def evaluate(member, x, y):
    """Of a member whose value gets better until a step of its own."""
    rises = jnp.minimum(member.opt_state[0].count, member.context["best"])
    accuracy = jnp.mean(jnp.argmax(problems.apply_fn(member.params, x), -1) == y)
    return {"rises": rises.astype(jnp.float32), "accuracy": accuracy}


def fit(
    workdir, mode="loop", ends=(NEVER,) * 5, best=(NEVER,) * 5, steps=12, train=None, **options
):
    workdir.mkdir(exist_ok=True)
    x, y = problems.data()
    # Of a type that is weak, as what studies make of Python's numbers.
    weak = jax.vmap(lambda end: jnp.asarray(NEVER))(jnp.array(ends))
    context = {"ends": jnp.array(ends), "best": jnp.array(best), ACTIVE: jnp.ones(5, bool)}
    context |= {"weak": weak}
    members = problems.members(range(5))._replace(context=context)
    plan = loop.Plan(steps, steps_per_epoch=6, record_every=3, checkpoint_seconds=0.0)
    return stage.fit_stage(
        ml_collections.ConfigDict(), workdir, "made", NAMES, members, STEP, plan, train or (x, y),
        evaluate, (x[:8], y[:8]), mode, batch_size=16, freeze=True, **options,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """As on most machines; on several, waves have meshes of their own."""
    auto = mesh.auto_mesh
    monkeypatch.setattr(mesh, "auto_mesh", lambda *args: auto(*args, devices=jax.devices()[:1]))
    return auto


def cut_into(monkeypatch, *members):
    monkeypatch.setattr(waves, "sizes", lambda *args: list(members))


def records(workdir):
    return [json.loads(line) for line in (workdir / "made.jsonl").read_text().splitlines()]


def assert_same(ours, theirs, **tolerances):
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if jnp.issubdtype(our.dtype, jax.dtypes.prng_key):
            our, their = jax.random.key_data(our), jax.random.key_data(their)
        np.testing.assert_allclose(our, their, **(tolerances or {"rtol": 0, "atol": 0}))


@given(st.integers(1, 60), st.integers(0, 50), st.integers(1, 20), st.integers(0, 900))
def test_the_fewest_waves_that_fit(count, shared, each, limit):
    asked = []

    def bytes_of(size):
        asked.append(size)
        return shared + each * size

    found = waves.sizes(count, limit, bytes_of)
    assert len(set(found)) == 1 and sum(found) == count
    fitting = [
        size for size in range(1, count + 1) if count % size == 0 and shared + each * size <= limit
    ]
    assert found[0] == max(fitting, default=1)
    # It was not tried for long: asking compiles.
    assert len(asked) <= 4 and len(set(asked)) == len(asked)


@pytest.mark.parametrize(("limit", "expected"), [(15, 40), (14, 8), (11, 8), (10, 8)])
def test_waves_fill_the_devices(limit, expected):
    """Forty members over eight: five on each, or eight at once; fewer would be no smaller."""

    def devices_of(size):
        return math.gcd(size, 8)

    found = waves.sizes(40, limit, lambda size: 10 + size // devices_of(size), devices_of)
    assert found == [expected] * (40 // expected)


def test_waves_that_cannot_run_are_not_asked():
    """Such as those that leave one of several processes without a device."""
    found = waves.sizes(12, 9, lambda size: 3 * size, lambda size: 1 if size % 2 == 0 else None)
    assert found == [2] * 6


def test_processes_cut_as_the_first_does(tmp_path, monkeypatch):
    """Also where their compilers say that programs take more, or less."""
    cut_into(monkeypatch, 3, 2)
    monkeypatch.setattr(waves.processes, "of_first", lambda own, count: own and [4, 1])
    found = waves.cut(tmp_path, "made", 5, lambda size: 0)
    assert [wave.stop - wave.first for wave in found] == [4, 1]
    assert json.loads((tmp_path / "waves" / "made.json").read_text()) == {"members": [4, 1]}


def test_where_nothing_tells_all_train_together():
    assert waves.sizes(7, None, lambda size: 1 / 0) == [7]


@pytest.mark.variants(1)
@pytest.mark.parametrize("mode", ["loop", "vmap", "dispatch", "eight devices"])
def test_waves_end_as_the_stage_in_one_piece(tmp_path, monkeypatch, mode, one_device):
    """With a member that diverges: in its wave and in others."""
    if mode in ("loop", "dispatch"):
        rounding = {"rtol": 0, "atol": 0}
    else:
        rounding = {"rtol": 1e-5, "atol": 1e-6}
    if mode == "eight devices":
        monkeypatch.setattr(mesh, "auto_mesh", one_device)
        mode = "vmap"
    ends = (NEVER, 7, NEVER, NEVER, NEVER)
    whole = fit(tmp_path / "whole", mode, ends)
    cut_into(monkeypatch, 2, 2, 1)
    in_waves = fit(tmp_path / "waves", mode, ends)
    assert_same(in_waves, whole, **rounding)
    ours, theirs = records(tmp_path / "waves"), records(tmp_path / "whole")
    assert [record["step"] for record in ours] == [0, 3, 6, 9, 12]
    assert ours[3]["diverged"] == [None, {"step": 7, "term": "ends"}, None, None, None]
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys()
        assert our.get("diverged") == their.get("diverged")
        for name in our.keys() - {"stage", "step", "diverged"}:
            np.testing.assert_allclose(
                np.array(our[name], float), np.array(their[name], float), **rounding
            )
    checkpoints = sorted(path.name for path in (tmp_path / "waves" / "checkpoints").iterdir())
    assert checkpoints == ["made-1-of-3", "made-2-of-3", "made-3-of-3"]


def test_a_wave_may_diverge_whole_but_not_all(tmp_path, monkeypatch, caplog):
    cut_into(monkeypatch, 2, 3)
    members = fit(tmp_path / "one", ends=(7, 4, NEVER, NEVER, NEVER))
    assert "'ends' of member 'b' is not finite at step 4" in caplog.text
    last = records(tmp_path / "one")[-1]
    assert last["diverged"][:2] == [{"step": 7, "term": "ends"}, {"step": 4, "term": "ends"}]
    assert last["train/loss"][:2] == [None, None] and None not in last["train/loss"][2:]
    assert last["diverged"][2:] == [None] * 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(members.params))
    for _ in range(2):
        with pytest.raises(DivergenceError, match=r"of member 'b' .* at step 4, and none of the 5"):
            fit(tmp_path / "all", ends=(7, 4, 5, 6, 7))


@pytest.mark.variants(1)
@pytest.mark.parametrize("killed", [7, 2])
def test_a_run_that_was_stopped_in_any_wave_goes_on_the_same(tmp_path, monkeypatch, killed):
    """Also where less memory is free then: as it was begun."""
    cut_into(monkeypatch, 3, 2)
    unbroken = fit(tmp_path / "whole")
    calls, write = [], MetricsLog.write

    def stopping(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == killed:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", stopping)
        with pytest.raises(loop.Interrupted):
            fit(tmp_path / "stopped")
    cut_into(monkeypatch, 1, 1, 1, 1, 1)
    assert_same(fit(tmp_path / "stopped"), unbroken)
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    # Once more when all is done.
    assert_same(fit(tmp_path / "stopped"), unbroken)


@pytest.mark.variants(1)
@pytest.mark.parametrize("alone", [True, False])
def test_early_stops_are_those_of_the_stage_in_one_piece(tmp_path, monkeypatch, alone):
    """Each member by itself, or when none has a new best value: the last is at step 9."""
    best = (3, 9, 3, 3, 6)
    stopping = EarlyStopping("rises", patience=2, higher=True, alone=alone)
    whole = fit(tmp_path / "whole", best=best, steps=60, stopping=stopping)
    cut_into(monkeypatch, 2, 2, 1)
    in_waves = fit(tmp_path / "waves", best=best, steps=60, stopping=stopping)
    assert_same(in_waves, whole)
    assert records(tmp_path / "waves") == records(tmp_path / "whole")
    assert records(tmp_path / "waves")[-1]["step"] == 15
    trained = in_waves.opt_state[0].count.tolist()
    assert trained == ([9, 15, 9, 9, 12] if alone else [15] * 5)
    again = fit(tmp_path / "waves", best=best, steps=60, stopping=stopping)
    assert_same(again, whole)


def test_waves_are_not_asked_before_they_can_stop(tmp_path, monkeypatch):
    """Each round opens checkpoints of every wave."""
    calls, whole = [], stage.fit
    monkeypatch.setattr(stage, "fit", lambda *args, **kw: calls.append(1) or whole(*args, **kw))
    cut_into(monkeypatch, 3, 2)
    stopping = EarlyStopping("rises", patience=4, higher=True, alone=False)
    fit(tmp_path, best=(0,) * 5, steps=60, stopping=stopping)
    # Four records after the first, and with the one before training.
    assert len(records(tmp_path)) == 6 and len(calls) == 2 * 2


def test_a_stage_that_was_begun_in_one_piece_stays_so(tmp_path, monkeypatch):
    whole = fit(tmp_path)
    cut_into(monkeypatch, 2, 2, 1)
    assert_same(fit(tmp_path), whole)
    assert not (tmp_path / "waves").exists()


@pytest.mark.parametrize("text", ['{"members": [2, 2]}', '{"members": [5, 0]}', "[]", '{"mem'])
def test_waves_of_other_members_are_refused(tmp_path, text):
    (tmp_path / "waves").mkdir()
    (tmp_path / "waves" / "made.json").write_text(text)
    with pytest.raises(UserError, match=r"made.json does not cut 5 members into waves: delete it"):
        fit(tmp_path)


@pytest.mark.variants(2)
@pytest.mark.parametrize("mode", ["vmap", "loop", "dispatch"])
def test_what_a_wave_takes_is_asked_without_compiling_more(
    tmp_path, monkeypatch, compilations, mode
):
    """The programs that are compiled for their memory are those which run."""
    taken, bytes_taken = [], stage._bytes_taken
    monkeypatch.setattr(
        stage, "_bytes_taken", lambda *args: taken.append(bytes_taken(*args)) or taken[-1]
    )
    monkeypatch.setenv(waves.MEMORY, "64")
    # Without what tests before compiled.
    stage._compiled.cache_clear()
    with compilations() as compiled:
        fit(tmp_path / "asked", mode)
    assert len(taken) == 1
    main = "jit(advance)" if mode == "dispatch" else "jit(chunk)"
    assert [compiled.count(name) for name in (main, "jit(start)")] == [1, 1], compiled
    # The state of five members, twice, their data and its order, and what a step needs.
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(problems.members(range(5))))
    least = 2 * state + sum(leaf.nbytes for leaf in problems.data()) + 5 * 96 * 4
    assert least < taken[0] < least + 2 * state + 5 * 16_000


@pytest.mark.slow
def test_the_window_of_a_wave_is_what_it_is_compiled_for(tmp_path, monkeypatch, compilations):
    """Of the orders of its own members, not of all."""

    def asked(count, limit, bytes_of, devices_of):
        bytes_of(2)
        return [2, 2, 1]

    x, y = problems.data()
    data = Stream(lambda index, rng: (x[index], y[index]), len(y), identity="made", threads=2)
    monkeypatch.setattr(waves, "sizes", asked)
    # Without what tests before compiled.
    stage._compiled.cache_clear()
    with compilations() as compiled:
        fit(tmp_path, train=data)
    # For two members and for one.
    assert compiled.count("jit(chunk)") == 2, compiled


def test_the_environment_says_what_a_stage_may_take(tmp_path, monkeypatch, caplog):
    with caplog.at_level("INFO"):
        monkeypatch.setenv(waves.MEMORY, "0.01")
        fit(tmp_path)
    assert re.search(
        r"1 at once take about 0\.\d\d MiB of a device, .* may take 0\.01", caplog.text
    )
    assert "made: 5 members in 5 waves, 12 steps" in caplog.text
    monkeypatch.setenv(waves.MEMORY, "plenty")
    with pytest.raises(UserError, match="NTT_SPARSE_MEMORY in the environment: 'plenty' is no"):
        waves.memory_limit()


def test_a_step_of_all_is_one_of_each_wave(tmp_path, monkeypatch):
    """What waves took adds up, also after a line that was cut short."""
    (tmp_path / "seconds.jsonl").write_text('{"stage": "made", "steps": 12, "sec')
    cut_into(monkeypatch, 2, 2, 1)
    fit(tmp_path)
    _, *rows = (tmp_path / "seconds.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in rows]
    assert [row["steps"] for row in rows] == [4, 4, 4]
    expected = sum(row["seconds"] for row in rows) / 12
    assert stage.seconds_per_step(tmp_path, "made") == pytest.approx(expected)
