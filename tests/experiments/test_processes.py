"""Two processes, joined by JAX's own detection over the loopback, run one study as one does."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import ROOT, environment

from ntt_sparse.training.export import save_network
from ntt_sparse.training.metrics import MetricsLog

SECONDS = 240


@pytest.fixture
def processes(load_benchmark):
    return load_benchmark("processes")


def test_two_processes_end_where_one_does(tmp_path, finished_smoke, processes):
    """By one set of files; `benchmarks/processes.py` kills one of them, and goes on."""
    workdir = tmp_path / "w"
    settings = [
        argument.replace("=ntt,random", "=random")
        for argument in finished_smoke.arguments
        if "checkpoint_seconds" not in argument
    ]
    assert processes.finish(processes.start(workdir, settings)) == [0, 0], logs(workdir)
    one, two = (
        MetricsLog(path / "supervised.jsonl", "supervised").records
        for path in (finished_smoke.workdir, workdir)
    )
    assert [record["step"] for record in two] == [record["step"] for record in one]
    for a, b in zip(one, two, strict=True):
        for name in {"validation/loss", "test/loss", "train/loss"} & a.keys():
            # Of the four networks there, these two are the last.
            np.testing.assert_allclose(b[name], a[name][-2:], rtol=1e-3, err_msg=name)
    summary = json.loads((workdir / "summary.json").read_text())
    assert [row["method"] for row in summary["supervised"]] == ["random"]
    assert len(list((workdir / "networks").iterdir())) == 2
    assert len(json.loads((workdir / "provenance.json").read_text())["runs"]) == 1


def logs(workdir: Path) -> str:
    return "".join(path.read_text()[-3000:] for path in workdir.parent.glob("w.*.log"))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("dam_graph", "error: dam_graph runs in one process: leave out --distributed"),
        ("ntt", "error: --distributed found no job to join"),
    ],
)
def test_processes_that_cannot_be_joined_are_one_line(tmp_path, module, message):
    result = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", "--distributed", f"--workdir={tmp_path}/w"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith(message)
    assert not list(tmp_path.iterdir())


def test_what_the_benchmark_calls_the_same_bits(tmp_path, processes):
    for run, weight in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / run / "networks").mkdir(parents=True)
        (tmp_path / run / "supervised.jsonl").write_text('{"step": 0}\n')
        params = {"kernel": jnp.full((1, 2), weight)}
        masks = {"kernel": jnp.ones((1, 2), bool)}
        save_network(tmp_path / run / "networks" / "n.safetensors", params, masks)
    assert processes.same_bits(tmp_path / "a", tmp_path / "b")
    assert not processes.same_bits(tmp_path / "a", tmp_path / "c")
    (tmp_path / "b" / "supervised.jsonl").write_text('{"step": 1}\n')
    assert not processes.same_bits(tmp_path / "a", tmp_path / "b")
