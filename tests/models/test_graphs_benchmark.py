"""`benchmarks/graphs.py` on the made graph: every candidate runs, and ours is the base."""

import re

import pytest


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("graphs")


def test_every_candidate_is_timed(benchmark, capsys):
    benchmark.main(["--rounds", "1"])
    rows = dict(re.findall(r"^(\S.*?)\s+[\d.]+\s+([\d.]+)", capsys.readouterr().out, re.M))
    assert {benchmark.OURS, "GAE-DAM (ours)", "GAE (ours), dense features"} <= set(rows)
    assert rows[benchmark.OURS] == "1.00"


@pytest.mark.parametrize(
    "flags", [["--rounds", "0"], ["--threads", "0"], ["--graph", "cora", "--data_dir", "nowhere"]]
)
def test_faults(benchmark, capsys, flags):
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert re.search("expected (at least|a graph)", capsys.readouterr().err)
