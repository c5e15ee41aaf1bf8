"""`benchmarks/compaction.py` on two examples: what it prints is of the networks it names."""

import json

import pytest


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("compaction")


@pytest.mark.slow
def test_each_kind_is_pruned_and_measured(benchmark, capsys, tmp_path):
    path = tmp_path / "rows.json"
    benchmark.main(
        ["--network", "lenet5", "--keep", "0.3", "--batch", "2", "--rounds", "1", "--json",
         str(path)]
    )  # fmt: skip
    rows = json.loads(path.read_text())
    assert [row["gate"] for row in rows] == ["dam", "slimming", "chipnet"]
    for row in rows:
        assert row["before"] == {"channels": 226, "parameters": 61_706, "multiply_adds": 416_520}
        assert abs(row["after"]["channels"] - 0.3 * 226) <= 3
        assert row["difference"] < 1e-5
        times = row["latency"]["2"]
        assert times["ratio"] == pytest.approx(times["before"] / times["after"])
        assert times["described_ratio"] == pytest.approx(times["described"] / times["after"])
    assert "lenet5, chipnet, 0.3 of channels" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--keep", "1"], ["--rounds", "0"], ["--batch", "0"]])
def test_faults(benchmark, capsys, flags):
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert "expected fractions between 0 and 1" in capsys.readouterr().err
