"""Two processes, joined by JAX's own detection over the loopback, run one study as one does."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli import ROOT, environment

SECONDS = 240


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("processes")


def test_two_processes_end_where_one_does(tmp_path, finished_smoke, processes):
    """With one set of files; `benchmarks/processes.py` kills one and goes on."""
    workdir = tmp_path / "w"
    started = processes.start(workdir, finished_smoke.arguments)
    assert processes.finish(started) == [0, 0], logs(workdir)
    one, two = map(processes.records, (finished_smoke.workdir, workdir))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert (a["stage"], a["step"]) == (b["stage"], b["step"])
        for name in {"validation/loss", "test/loss", "train/loss"} & a.keys():
            np.testing.assert_allclose(b[name], a[name], rtol=1e-3, err_msg=name)
    folders = [{path.name for path in w.iterdir()} for w in (finished_smoke.workdir, workdir)]
    assert folders[0] == folders[1]
    assert json.loads((workdir / "summary.json").read_text())["supervised"]
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
