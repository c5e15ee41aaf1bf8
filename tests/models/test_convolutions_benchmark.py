"""`benchmarks/convolutions.py` on two examples: every way runs, and ours is the base."""

import json

import jax
import numpy as np
import pytest


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("convolutions")


def test_every_way_is_timed(benchmark, capsys, tmp_path):
    path = tmp_path / "rows.json"
    flags = ["--network", "lenet5", "--batch", "2", "--rounds", "1", "--json", str(path)]
    benchmark.main(flags)
    (row,) = json.loads(path.read_text())
    assert {"ours", "XLA", "4-D products", "im2col"} <= set(row)
    assert row["ours"]["ratio"] == 1
    assert "a training step of lenet5, batch 2" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["ours", "XLA", "4-D products", "im2col"])
@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [(1, 2, (0, 0)), (3, 2, (1, 1)), (5, 1, "VALID"), (3, 2, "SAME")],
)
def test_all_ways_are_the_same_convolution(benchmark, way, size, stride, padding):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, 9, 8, 2))
    kernel = jax.random.normal(keys[1], (size, size, 2, 3))
    args = (x, kernel, stride, padding)
    np.testing.assert_allclose(benchmark._WAYS[way](*args), benchmark._xla(*args), atol=2e-5)


@pytest.mark.parametrize("flags", [["--batch", "0"], ["--rounds", "0"]])
def test_faults(benchmark, capsys, flags):
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert "expected at least" in capsys.readouterr().err
