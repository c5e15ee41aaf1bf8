"""Studies killed at random moments and started again: what ends is what an unbroken run ends with.

    python benchmarks/soak.py --kills 100
    python benchmarks/soak.py --kills 20 --study sparse_training --seed 1

A small study that checkpoints after every chunk runs as a process group, which gets a SIGKILL; the
same command is started until it ends, then in a new work directory. Moments are drawn: any time,
the first second, while a checkpoint is written, between stages, while networks and report are
written. Every file of a run that ended is compared with the unbroken run byte by byte, and the
newest checkpoint of every stage bit by bit. Not compared is what is of a moment: clock and command
lines (`seconds.jsonl`, `provenance.json`), event files, and how Orbax names its own. The exit code
is 1 if a run was lost or damaged, or differs.
"""

import argparse
import collections
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from orbax.checkpoint import v1 as ocp

from ntt_sparse.training.checkpoint import digest

_ROOT = Path(__file__).resolve().parents[1]
_OF_A_MOMENT = ("seconds.jsonl", "provenance.json", ".lock")
_AIMS = ("any time", "first second", "checkpoint", "between stages", "report")
_MOST_KILLS_OF_A_RUN = 12
LONGEST_SECONDS = 900
_POLL_SECONDS = 0.005
# What a run says that should never follow from a kill.
_DAMAGE = ("is cut short or changed", "cannot be read", "is damaged", "does not belong to")


@dataclasses.dataclass(frozen=True)
class Study:
    """A command without its work directory, and the steps of its stages in order."""

    arguments: tuple[str, ...]
    stages: dict[str, int]


STUDIES = {
    "ntt": Study(
        (
            *("-m", "experiments.ntt"),
            "--config=experiments/configs/ntt.py:digits_lenet300,smoke",
            *("--config.methods=ntt,random", "--config.density=(0.05,)", "--config.seeds=(1,)"),
            *("--config.transfer.max_steps=30", "--config.transfer.batch_size=16"),
            *("--config.transfer.refresh_every=10", "--config.transfer.record_every=5"),
            *("--config.supervised.max_steps=60", "--config.supervised.record_every=10"),
            "--config.checkpoint_seconds=0",
        ),
        {"transfer": 30, "supervised": 60},
    ),
    "sparse_training": Study(
        (
            *("-m", "experiments.sparse_training"),
            "--config=experiments/configs/sparse_training.py:digits_synflow,smoke",
            *("--config.method=set", "--config.layer_densities=erk", "--config.rounds=1"),
            *("--config.density=(0.1,)", "--config.seeds=(1,)"),
            *("--config.supervised.max_steps=60", "--config.supervised.record_every=10"),
            "--config.checkpoint_seconds=0",
        ),
        {"supervised": 60},
    ),
}


@dataclasses.dataclass
class Found:
    """What a soak has seen so far."""

    kills: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    runs: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)
    damaged: list[str] = dataclasses.field(default_factory=list)
    different: list[str] = dataclasses.field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the soak. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Kills studies and compares how they end.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--study", choices=sorted(STUDIES), default="ntt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a new folder, by default a temporary one")
    options = parser.parse_args(arguments)
    if options.kills < 1:
        parser.error("expected at least 1 kill")
    if options.out is not None and options.out.exists():
        parser.error(f"{options.out} exists, expected a new folder")
    out = (options.out or Path(tempfile.mkdtemp(prefix="soak-"))).absolute()
    out.mkdir(parents=True, exist_ok=True)
    study, rng, found = STUDIES[options.study], random.Random(options.seed), Found()
    seconds = [unbroken(study, out / name) for name in ("first", "unbroken")]
    found.different += differences(out / "first", out / "unbroken", study.stages)
    print(f"{out}: unbroken runs took {seconds[0]:.0f} and {seconds[1]:.0f} s", flush=True)
    while sum(found.kills.values()) < options.kills:
        workdir = out / f"run{found.runs}"
        _soak(study, workdir, options.kills, seconds[1], rng, found)
        found.runs += 1
        found.different += differences(out / "unbroken", workdir, study.stages)
        found.damaged += [f"{path} is left" for path in leftovers(workdir)]
        print(f"{workdir.name}: {dict(found.kills)}", flush=True)
    return _report(found)


def _report(found: Found) -> int:
    print(f"\n{sum(found.kills.values())} kills in {found.runs} runs")
    for phase, count in sorted(found.kills.items()):
        print(f"{count:6d}  {phase}")
    for title in ("lost", "damaged", "different"):
        rows = getattr(found, title)
        print(f"{title}: {len(rows)}")
        for row in rows:
            print(f"    {row}")
    return int(bool(found.lost or found.damaged or found.different))


def start(study: Study, workdir: Path, log: Path) -> subprocess.Popen[bytes]:
    """Starts a study as a group of processes; what it says is added to a log."""
    environment = dict(os.environ, PYTHONPATH=str(_ROOT))
    with log.open("ab") as file:
        file.write(b"\n--- started\n")
        file.flush()
        return subprocess.Popen(
            [sys.executable, *study.arguments, f"--workdir={workdir}"],
            cwd=_ROOT, env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def unbroken(study: Study, workdir: Path) -> float:
    """Runs a study to its end. Returns seconds."""
    began, log = time.monotonic(), workdir.with_name(f"{workdir.name}.log")
    code = start(study, workdir, log).wait(timeout=LONGEST_SECONDS)
    if code:
        raise SystemExit(f"error: the unbroken run ended with {code}:\n{said(log)[-2000:]}")
    return time.monotonic() - began


def _soak(
    study: Study, workdir: Path, kills: int, seconds: float, rng: random.Random, found: Found
) -> None:
    """Starts one run until it ends; every start but the last is killed."""
    killed, log = 0, workdir.with_name(f"{workdir.name}.log")
    while True:
        process = start(study, workdir, log)
        if killed < _MOST_KILLS_OF_A_RUN and sum(found.kills.values()) < kills:
            _wait(process, rng.choice(_AIMS), study, workdir, seconds, rng)
        else:
            process.wait(timeout=LONGEST_SECONDS)
        ended = process.poll() is not None
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
        code, text = process.wait(), said(log)
        if any(sign in text for sign in _DAMAGE):
            found.damaged.append(f"{workdir.name}: {text.strip().splitlines()[-1]}")
        if code == -signal.SIGKILL:
            killed += 1
            found.kills[phase(study, workdir, text)] += 1
            continue
        if code:
            found.lost.append(f"{workdir.name} ended with {code}: {text.strip()[-500:]}")
        return


def _wait(
    process: subprocess.Popen[bytes], aim: str, study: Study, workdir: Path, seconds: float,
    rng: random.Random,
) -> None:  # fmt: skip
    """Waits for a moment of some kind, or until the process ends."""
    began = time.time()
    stages = list(study.stages.items())
    if aim == "first second":
        return _sleep(process, rng.uniform(0, 1))
    if aim == "checkpoint":
        seen, count = set(_unfinished(workdir)), rng.randint(1, 8)

        def at_moment() -> bool:
            seen.update(_unfinished(workdir))
            return len(seen) >= count

        later = 0.1
    elif aim == "between stages":
        name, steps = stages[rng.randrange(len(stages))]

        def at_moment() -> bool:
            return (workdir / "checkpoints" / name / str(steps)).exists()

        later = 3.0
    elif aim == "report":

        def at_moment() -> bool:
            return any(path.stat().st_mtime > began for path in _written_last(workdir))

        later = 2.0
    else:
        return _sleep(process, rng.uniform(0, 1.1 * seconds))
    _until(process, at_moment)
    return _sleep(process, rng.uniform(0, later))


def _until(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    while process.poll() is None:
        try:
            if condition():
                return
        except FileNotFoundError:
            # Renamed while it was looked at.
            continue
        time.sleep(_POLL_SECONDS)


def _sleep(process: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    _until(process, lambda: time.monotonic() >= end)


def _unfinished(workdir: Path) -> list[Path]:
    """Checkpoints of which Orbax has not yet moved the directory to its name."""
    return list(workdir.glob("checkpoints/*/*orbax-checkpoint-tmp*"))


def _written_last(workdir: Path) -> Iterator[Path]:
    for name in ("networks", "figures", "summary.json", "report.md", "measurements.npz"):
        if (workdir / name).exists():
            yield workdir / name


def phase(study: Study, workdir: Path, text: str) -> str:
    """Where a process was when it was killed, by what it left and said."""
    if _unfinished(workdir):
        return "while a checkpoint was written"
    if list(workdir.rglob("*.tmp")):
        return "while a file was replaced"
    begun = [name for name in study.stages if f" {name}: " in text]
    if not begun:
        return "before the first stage"
    ended = (workdir / "checkpoints" / begun[-1] / str(study.stages[begun[-1]])).exists()
    if not ended:
        return "in a stage"
    return "after the last stage" if begun[-1] == list(study.stages)[-1] else "between stages"


def said(log: Path) -> str:
    """What the last process said."""
    return log.read_text(errors="replace").rpartition("--- started\n")[2]


def differences(one: Path, other: Path, stages: Sequence[str] | dict[str, int]) -> list[str]:
    """Files that two runs do not share bit by bit, and stages of which the end state differs."""
    listed = [
        {path: (root / path).read_bytes() for path in _compared(root)} for root in (one, other)
    ]
    paths = listed[0].keys() | listed[1].keys()
    rows = [f"{other.name}: {path}" for path in paths if listed[0].get(path) != listed[1].get(path)]
    ends = [{stage: _end_state(root, stage) for stage in stages} for root in (one, other)]
    rows += [f"{other.name}: state of {s}" for s in stages if ends[0][s] != ends[1][s]]
    return sorted(rows)


def _compared(root: Path) -> set[Path]:
    files = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    return {
        path
        for path in files
        if path.parts[0] not in ("checkpoints", "tensorboard") and path.name not in _OF_A_MOMENT
    }


def _end_state(root: Path, stage: str) -> bytes | None:
    """A fingerprint of the newest checkpoint of a stage."""
    steps = [path for path in (root / "checkpoints" / stage).glob("*") if path.name.isdigit()]
    if not steps:
        return None
    newest = max(steps, key=lambda path: int(path.name))
    with warnings.catch_warnings():
        # Of arrays without a sharding; here all are on one device.
        warnings.simplefilter("ignore")
        return newest.name.encode() + digest(ocp.load(str(newest))).tobytes()


def leftovers(root: Path) -> list[str]:
    """What a run that ended should have cleared away, or should never have set aside."""
    paths = [str(path.relative_to(root.parent)) for path in root.rglob("*")]
    return [
        path for path in paths if path.endswith((".tmp", "-damaged")) or "checkpoint-tmp" in path
    ]


if __name__ == "__main__":
    sys.exit(main())
