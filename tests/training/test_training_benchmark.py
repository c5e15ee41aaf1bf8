"""`benchmarks/training.py` on two examples: both loops train the same network the same way."""

import json

import jax
import numpy as np
import pytest


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("training")


@pytest.mark.slow
def test_both_loops_are_timed(benchmark, capsys, tmp_path):
    path = tmp_path / "rows.json"
    flags = ["--network", "lenet_300_100", "--batch", "2", "--steps", "2", "--rounds", "1"]
    benchmark.main([*flags, "--json", str(path)])
    (row,) = json.loads(path.read_text())
    assert row["by hand"]["ratio"] == 1 and row["ours"]["images_per_second"] > 0
    assert "lenet_300_100" in capsys.readouterr().out


def test_both_loops_train_alike(benchmark):
    """A batch is the whole set, so that its order does not matter."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 28, 28, 1)).astype(np.float32)
    y = np.array([0, 1, 2, 3], np.int32)
    ours = benchmark.ours("lenet_300_100", x, y, 4, 1)
    by_hand = benchmark._by_hand("lenet_300_100", x, y, 4, 1)
    start = benchmark.start("lenet_300_100", (28, 28, 1))[1]
    for _ in range(3):
        state, (carried, _) = ours(), by_hand()
    found = jax.tree.map(lambda leaf: leaf[0], state.members.params)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), found, start)
    assert all(value > 1e-4 for value in jax.tree.leaves(moved))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, carried[0])


@pytest.mark.parametrize("flags", [["--batch", "0"], ["--steps", "0"], ["--rounds", "0"]])
def test_faults(benchmark, capsys, flags):
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert "expected at least" in capsys.readouterr().err
