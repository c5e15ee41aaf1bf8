"""Two processes, joined by JAX's own detection over the loopback, run one study as one does."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_cli import ROOT, environment

SECONDS = 240


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import processes

    return processes


def test_a_killed_process_ends_the_other_and_both_go_on(tmp_path, finished_smoke, processes):
    """To where one process ends, with one set of files."""
    workdir = tmp_path / "w"
    pair = processes.start(workdir, finished_smoke.arguments)
    checkpoints = workdir / "checkpoints" / "supervised"
    deadline = time.monotonic() + SECONDS
    while not any(path.name.isdigit() for path in checkpoints.glob("*")):
        assert all(process.poll() is None for process in pair), logs(workdir)
        assert time.monotonic() < deadline, logs(workdir)
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGKILL)
    first, second = processes.finish(pair)
    assert first > 0 or first == -signal.SIGABRT
    assert second == -signal.SIGKILL
    assert not (workdir / "summary.json").exists()

    assert processes.finish(processes.start(workdir, finished_smoke.arguments)) == [0, 0], logs(
        workdir
    )
    assert re.search(r"stage supervised goes on from step [1-9]", logs(workdir))
    one, two = map(processes.records, (finished_smoke.workdir, workdir))
    assert [(row["stage"], row["step"]) for row in one] == [
        (row["stage"], row["step"]) for row in two
    ]
    for name in ("validation/loss", "test/loss", "train/loss"):
        for a, b in zip(one, two, strict=True):
            assert (name in a) == (name in b)
            if name in a:
                np.testing.assert_allclose(b[name], a[name], rtol=1e-3, err_msg=name)
    assert {path.name for path in workdir.iterdir()} == {
        path.name for path in finished_smoke.workdir.iterdir()
    }
    assert json.loads((workdir / "summary.json").read_text())["supervised"]


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
