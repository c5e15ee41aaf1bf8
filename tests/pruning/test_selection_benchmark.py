"""`benchmarks/selection.py` on few scores: every candidate runs, the base is the base."""

import re

import pytest


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("selection")


def test_every_candidate_is_timed(benchmark, capsys):
    benchmark.main(["--millions", "0.02", "--rounds", "1"])
    rows = dict(
        re.findall(r"^(\S.*?)\s{2,}[\d.]+\s+[\d.]+\s+([\d.]+)", capsys.readouterr().out, re.M)
    )
    assert list(rows) == [
        "numpy partition",
        "numpy argpartition",
        "numpy mask",
        "global masks",
        "masks by layer",
        "jnp.sort",
    ]
    assert rows["numpy partition"] == "1.00"


@pytest.mark.variants(1)
@pytest.mark.parametrize("name", ["masks", "snip", "cka_sr"])
def test_memory_is_measured(benchmark, capsys, name):
    benchmark.main(["--memory", "0.02", "--one", name])
    pattern = rf"{name} +0.0 million weights of 0 MiB: [\d.]+ times that above them, [\d.]+ s"
    assert re.search(pattern, capsys.readouterr().out)


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--density", "0"], ["--millions", "0"]])
def test_faults(benchmark, capsys, flags):
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert "expected 0.01 million scores" in capsys.readouterr().err
