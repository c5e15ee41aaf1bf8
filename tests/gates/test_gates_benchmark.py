"""`benchmarks/gates.py` on two examples: every candidate runs, and the base is the base."""

import re

import pytest


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("gates")


def test_every_candidate_is_timed(benchmark, capsys):
    benchmark.main(["--network", "lenet5", "--batch", "2", "--rounds", "1"])
    rows = dict(re.findall(r"^(\S.*?)\s+[\d.]+\s+([\d.]+)", capsys.readouterr().out, re.M))
    assert {"no gates", "gates on weights (ours)", "gates on features"} <= set(rows)
    assert rows["no gates"] == "1.000"


@pytest.mark.parametrize("flags", [["--batch", "0"], ["--rounds", "0"]])
def test_faults(benchmark, capsys, flags):
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert "expected at least" in capsys.readouterr().err
