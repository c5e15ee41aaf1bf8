"""Two processes of one study on this machine: unbroken, killed and started again, and one alone.

    python benchmarks/processes.py --out=/tmp/processes

The processes believe to be tasks of a Slurm step, so that JAX's own detection joins them over the
loopback; collectives are those of its CPU backend. One of them gets a SIGKILL once a checkpoint is
there. Printed are how long the other lived on, whether the run that went on ended bit for bit as
the unbroken one, and how far one process alone is from both. `--kill=0` kills the coordinator.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "--config=experiments/configs/ntt.py:digits_lenet300,smoke",
    "--config.methods=ntt,random",
    "--config.density=0.05",
    "--config.supervised.max_steps=200",
    "--config.checkpoint_seconds=0",
)
_SECONDS = 600


def start(workdir: Path, settings: Sequence[str], count: int = 2) -> list[subprocess.Popen]:
    """Starts the processes of a study, whose messages go into `WORKDIR.0.log` and so on.

    Args:
        workdir: Of the study.
        settings: Flags of `experiments.ntt`.
        count: How many processes; one is started without a cluster.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [*settings, f"--workdir={workdir}", *(["--distributed"] if count > 1 else [])]
    started = []
    for index in range(count):
        step = {
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(count),
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": str(index),
            "JAX_COORDINATOR_PORT": str(port),
        }
        own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
        with Path(f"{workdir}.{index}.log").open("a") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "experiments.ntt", *flags],
                    cwd=ROOT,
                    env=os.environ | own | (step if count > 1 else {}),
                    stdout=log,
                    stderr=log,
                )
            )
    return started


def finish(processes: list[subprocess.Popen]) -> list[int]:
    """Waits for all. Returns their exit codes."""
    try:
        return [process.wait(timeout=_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()


def records(workdir: Path) -> list[dict]:
    """All records of the run."""
    files = [*sorted(workdir.glob("[!s]*.jsonl")), workdir / "supervised.jsonl"]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def same_bits(one: Path, other: Path) -> bool:
    """Whether two runs left the same records and networks."""
    networks = {path.name for path in (one / "networks").iterdir()}
    if networks != {path.name for path in (other / "networks").iterdir()}:
        return False
    for name in networks:
        if (one / "networks" / name).read_bytes() != (other / "networks" / name).read_bytes():
            return False
    return records(one) == records(other)


def largest_difference(one: Path, other: Path, pattern: str) -> float:
    """Between records of two runs, of the names that match, relative to the largest value."""
    differences = [0.0]
    for a, b in zip(records(one), records(other), strict=True):
        for name in a:
            if re.fullmatch(pattern, name):
                x, y = np.asarray(a[name], float), np.asarray(b[name], float)
                differences.append(float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30)))
    return max(differences)


def _kill_after_checkpoint(workdir: Path, victim: int) -> float:
    """Seconds from the SIGKILL of one process to the end of the other."""
    processes = start(workdir, SETTINGS)
    folder = workdir / "checkpoints" / "supervised"
    while not any(path.name.isdigit() and int(path.name) > 20 for path in folder.glob("*")):
        if any(process.poll() is not None for process in processes):
            raise SystemExit(f"a process ended before a checkpoint: see {workdir}.*.log")
        time.sleep(0.05)
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes = finish(processes)
    print(f"killed process {victim}: exit codes {codes}")
    return time.monotonic() - began


def main() -> None:
    """Runs all and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the runs")
    parser.add_argument("--kill", type=int, default=1, help="which process is killed")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    unbroken, broken, alone = (arguments.out / name for name in ("unbroken", "broken", "alone"))
    print("two processes, unbroken: exit codes", finish(start(unbroken, SETTINGS)))
    seconds = _kill_after_checkpoint(broken, arguments.kill)
    print(f"the other process ended after {seconds:.1f} s")
    steps = sorted(
        int(path.name) for path in (broken / "checkpoints" / "supervised").glob("[0-9]*")
    )
    print(f"checkpoints of steps {steps}")
    shutil.copytree(broken, arguments.out / "broken-as-killed")
    print("started again: exit codes", finish(start(broken, SETTINGS)))
    print("ends bit for bit as the unbroken one:", same_bits(unbroken, broken))
    print("one process: exit codes", finish(start(alone, SETTINGS, count=1)))
    for pattern in ("train/.*", "validation/loss", ".*/accuracy"):
        print(f"{pattern}: {largest_difference(unbroken, alone, pattern):.2e} from one process")


if __name__ == "__main__":
    main()
