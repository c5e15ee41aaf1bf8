"""`benchmarks/cka.py` on a few small maps: all candidates have the value of the definition."""

import re

import pytest


@pytest.fixture
def benchmark(monkeypatch, load_benchmark):
    module = load_benchmark("cka")
    monkeypatch.setattr(module, "_SHAPES", ((2, 3, 3), (4, 2, 2), (5, 1, 1)))
    return module


@pytest.mark.variants(1)
@pytest.mark.parametrize("members", [2, 1])
def test_every_candidate_has_the_value(benchmark, capsys, members):
    benchmark.main(["--layers", "3", "--examples", "6", "--rounds", "1", "--members", str(members)])
    rows = re.findall(r"^(\S.*?)\s+[\d.]+\s+([\d.]+)\s+(\de[-+]\d+)", capsys.readouterr().out, re.M)
    names = [name for name, *_ in rows]
    assert names.count("ours") == names.count("jax, loop") == 2
    assert {ratio for name, ratio, _ in rows if name == "ours"} == {"1.00"}
    assert all(float(error) < 1e-4 for *_, error in rows)


def test_the_step_is_asked_for(benchmark, monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark, "training_step", asked.append)
    benchmark.main(["--step", "--rounds", "3"])
    assert asked == [3]


@pytest.mark.parametrize("flags", [["--layers", "1"], ["--examples", "3"], ["--rounds", "0"]])
def test_faults(benchmark, capsys, flags):
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert "expected at least" in capsys.readouterr().err
