"""`benchmarks/members.py` on a few examples: each way trains the same members, compiled once."""

import json

import jax
import numpy as np
import pytest


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("members")


@pytest.mark.slow
def test_every_way_is_timed(benchmark, capsys, tmp_path):
    path = tmp_path / "rows.json"
    flags = "--network lenet_300_100 --members 3 --batch 2 --steps 2 --rounds 1".split()
    benchmark.main([*flags, "--json", str(path)])
    rows = json.loads(path.read_text())
    assert [(row["mode"], row["members"]) for row in rows] == [
        (mode, count) for mode in ("vmap", "loop", "dispatch") for count in (1, 3)
    ]
    assert {row["programs"] for row in rows} == {1} and rows[0]["ratio"] == 1
    assert "fastest with 3 members" in capsys.readouterr().out


def test_every_way_trains_alike(benchmark):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 28, 28, 1)).astype(np.float32)
    y = np.array([0, 1, 2, 3, 4, 5], np.int32)
    ways = [
        benchmark.training.ours("lenet_300_100", x, y, 2, 3, members=2, mode=mode)
        for mode in ("vmap", "loop", "dispatch")
    ]
    for _ in range(2):
        first, *others = [epoch().members.params for epoch in ways]
    kernel = first["Dense_0"]["kernel"]
    assert abs(kernel[0] - kernel[1]).max() > 1e-4
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other, first)


@pytest.mark.parametrize("flags", [["--batch", "0"], ["--members", "0", "5"]])
def test_faults(benchmark, capsys, flags):
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert "expected at least" in capsys.readouterr().err
