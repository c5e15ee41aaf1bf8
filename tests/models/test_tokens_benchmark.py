"""`benchmarks/tokens.py` on two small images: every candidate runs, and the base is the base."""

import re

import pytest

from ntt_sparse import models
from ntt_sparse.models.vit import VisionTransformer


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("tokens")


@pytest.mark.slow
def test_every_candidate_is_timed(benchmark, capsys, monkeypatch):
    tiny = VisionTransformer(3, patch=4, width=12, depth=4, heads=3)
    monkeypatch.setattr(models, "create", lambda name, num_outputs: tiny)
    benchmark.main(["--size", "8", "--batch", "2", "--rounds", "1"])
    rows = dict(
        re.findall(r"^(\S.*?)\s{2,}[\d.]+\s+[\d.]+\s+([\d.]+)", capsys.readouterr().out, re.M)
    )
    assert list(rows) == ["all tokens", "keep 0.9", "keep 0.7", "keep 0.7, with CKA"]
    assert rows["all tokens"] == "1.00"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "0"], "expected at least"),
        (["--network", "lenet5"], "expected a vision transformer"),
        (["--network", "vit"], "unknown model 'vit'"),
    ],
)
def test_faults(benchmark, capsys, flags, message):
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert message in capsys.readouterr().err
