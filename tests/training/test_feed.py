"""Streams of examples: the same training as with data on the device, read in windows."""

import jax
import numpy as np
import problems
import pytest

from ntt_sparse.data.stream import Stream, StreamError
from ntt_sparse.training import loop
from ntt_sparse.training.checkpoint import Checkpoints
from ntt_sparse.training.metrics import MetricsLog

X, Y = problems.data()
EXAMPLE = X[0].nbytes + 4
# Passes of 6 steps, the last of which is cut short.
PLAN = loop.Plan(total_steps=16, steps_per_epoch=6, record_every=5, checkpoint_seconds=0.0)
PLAN_OF_DEFAULT_SAVES = loop.Plan(total_steps=16, steps_per_epoch=6, record_every=5)
SEEDS = (0, 1, 1, 2)


@pytest.fixture(scope="module")
def program():
    return problems.program()


def stream(steps=4, orders=3, read=None):
    """The problem's data as a stream, in windows of so many steps."""
    memory = steps * orders * problems.BATCH_SIZE * EXAMPLE
    read = read or (lambda index, rng: (X[index], Y[index]))
    return Stream(read, len(Y), identity="made", memory=memory, threads=2)


def run(workdir, program, data, plan=PLAN):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state = loop.fit(
            program, problems.members(SEEDS), data, plan,
            log=MetricsLog(workdir / "metrics.jsonl", "made"), checkpoints=checkpoints,
            member_names=["a", "b", "c", "d"],
        )  # fmt: skip
    return jax.tree.map(np.asarray, (state.members.params, state.sums))


@pytest.mark.variants(1)
@pytest.mark.parametrize("steps", [4, 1, 32])
def test_as_with_data_on_the_device(tmp_path, program, steps):
    """Bit for bit, for windows within a pass and longer than it; members of a seed share them."""
    expected = run(tmp_path / "arrays", program, jax.tree.map(jax.numpy.asarray, (X, Y)))
    found = run(tmp_path / "stream", program, stream(steps))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_it_goes_on_where_it_stopped(tmp_path, program):
    """In the middle of a window, with what is drawn for each example and pass."""

    def read(index, rng):
        return X[index] + np.float32(rng.normal()), Y[index]

    expected = run(tmp_path / "whole", program, stream(read=read))
    plain = run(tmp_path / "device", program, jax.tree.map(jax.numpy.asarray, (X, Y)))
    assert np.all(np.any(plain[0]["in"] != expected[0]["in"], axis=(1, 2)))

    def stop(records):
        return records[-1]["step"] == 9

    part = loop.Plan(16, 6, 9, checkpoint_seconds=0.0)
    with Checkpoints(tmp_path / "part" / "checkpoints") as checkpoints:
        state = loop.fit(
            program, problems.members(SEEDS), stream(read=read), part,
            log=MetricsLog(tmp_path / "part" / "metrics.jsonl", "made"), checkpoints=checkpoints,
            member_names=["a", "b", "c", "d"], should_stop=stop,
        )  # fmt: skip
    assert int(state.step) == 9
    found = run(tmp_path / "part", program, stream(read=read), part)
    jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])


def test_windows():
    """Each example of a pass once for each order, in its place; draws differ between passes."""
    rng = np.random.default_rng(0)
    orders = np.stack([rng.permutation(96) for _ in range(2)])[[0, 1, 0]].astype(np.int32)
    seen = []

    def read(index, rng):
        seen.append(index)
        return np.int32(index), rng.random_sample()

    made = Stream(read, 96, identity="", memory=2 * 4 * 16 * 12, threads=2)
    windows = list(made.windows(orders, 16, 12, 13, 18))
    assert [window.stop for window in windows] == [16, 18]
    # One blank for shapes each time it is asked for, and two orders of 5 steps.
    assert len(seen) - 2 <= 2 * 5 * 16 <= len(seen)
    start, draws = 13, {}
    for window in windows:
        assert window.orders.shape == (3, 64) and len(window.data[0]) == 128
        for step in range(start, window.stop):
            places = window.orders[:, (step % 4) * 16 :][:, :16]
            for member, rows in enumerate(places):
                wanted = orders[member, (step - 12) * 16 :][:16]
                np.testing.assert_array_equal(window.data[0][rows], wanted)
                draws[member, step] = window.data[1][rows]
        start = window.stop
    np.testing.assert_array_equal(draws[0, 14], draws[2, 14])
    assert len(np.unique(np.concatenate([draws[0, s] for s in range(13, 18)]))) == 80
    assert not np.intersect1d(draws[0, 14], draws[1, 14]).size


def test_what_cannot_be_read_says_so(tmp_path, program):
    """In one line, after a checkpoint of the step before."""

    def read(index, rng):
        if broken and index == 40:
            raise ValueError("file 40 is broken\nand more")
        return X[index], Y[index]

    broken = True
    with pytest.raises(StreamError, match=r"^file 40 is broken$"):
        run(tmp_path / "part", program, stream(1, read=read), PLAN_OF_DEFAULT_SAVES)
    broken = False
    assert any((tmp_path / "part" / "checkpoints").iterdir())
    found = run(tmp_path / "part", program, stream(1, read=read), PLAN_OF_DEFAULT_SAVES)
    expected = run(tmp_path / "whole", program, stream(1), PLAN_OF_DEFAULT_SAVES)
    jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])


def test_without_grain(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="streams are read by Grain: pip install grain"):
        stream()
