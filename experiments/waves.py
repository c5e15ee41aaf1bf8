"""Members that do not fit the memory together: waves, and their records as those of one stage."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.cli import UserError
from ntt_sparse.training import processes
from ntt_sparse.training.files import write_text
from ntt_sparse.training.memory import device_bytes
from ntt_sparse.training.metrics import MetricsLog, Record

MEMORY = "NTT_SPARSE_MEMORY"
"""In the environment: MiB that a stage may take of each device, by default most of what is free."""

_FOLDER = "waves"
_logger = logging.getLogger(__name__)


class Wave(NamedTuple):
    """Members that train together.

    Attributes:
        first: The index of the first one.
        stop: That after the last one.
        label: Name of its checkpoints.
        records: Where its records are.
    """

    first: int
    stop: int
    label: str
    records: Path


def memory_limit() -> int | None:
    """Bytes of each device that a stage may take; `None` where nothing tells.

    Raises:
        UserError: The environment holds no number above 0.
    """
    try:
        limit = device_bytes(os.environ.get(MEMORY))
    except ValueError as error:
        raise UserError(f"{MEMORY} in the environment: {error}") from error
    # Processes may be on machines of different sizes.
    known = processes.on_all(limit is not None)
    # In KiB, as what they exchange are numbers of 32 bits.
    return processes.least((limit or 0) >> 10) << 10 if known else None


def sizes(
    count: int,
    limit: int | None,
    bytes_of: Callable[[int], int],
    devices_of: Callable[[int], int | None] = lambda size: 1,
) -> list[int]:
    """The members of the fewest equal waves that fit; one by one if none do.

    Equal, so that one program runs them all.

    Args:
        count: Members.
        limit: Bytes of a device; `None` where nothing tells, for all at once.
        bytes_of: What a wave of so many takes of a device. It may have to compile.
        devices_of: Over how many devices the members of a wave are spread; `None` where such a
            wave cannot run.
    """
    if limit is None or count == 1:
        return [count]
    # Of waves with as many members on each device, the largest.
    on_each: dict[int, int] = {}
    for size in range(1, count + 1):
        if count % size == 0 and (devices := devices_of(size)):
            on_each[size // devices] = size
    candidates = sorted(on_each.items(), reverse=True) or [(count, count)]
    larger = None
    while True:
        each, size = candidates[0]
        taken = bytes_of(size)
        if taken <= limit:
            break
        if len(candidates) == 1:
            _logger.warning(
                "%d at once take about %.2f MiB of a device, of which a stage may take %.2f",
                size, taken / 2**20, limit / 2**20,
            )  # fmt: skip
            break
        # It grows with the members, beside what they share; the first guess is that they share
        # nothing, and so too many.
        slope = (larger[1] - taken) / (larger[0] - each) if larger else taken / each
        larger = (each, taken)
        most = each - (taken - limit) / slope if slope > 0 else each
        # Rounding must not skip one that fits.
        candidates = [one for one in candidates[1:] if one[0] <= most + 1e-6] or candidates[-1:]
    return [size] * (count // size)


def cut(
    workdir: Path,
    stage: str,
    count: int,
    bytes_of: Callable[[int], int],
    devices_of: Callable[[int], int | None] = lambda size: 1,
) -> list[Wave]:
    """The waves of a stage: those of an earlier run, else as they fit now.

    What is free differs from run to run; a stage goes on as it was begun.

    Args:
        workdir: That of the study.
        stage: Name of the stage.
        count: Members.
        bytes_of: See `sizes`.
        devices_of: See `sizes`.

    Raises:
        UserError: The waves of an earlier run are of other members.
    """
    path = workdir / _FOLDER / f"{stage}.json"
    begun: list[int] = []
    if processes.is_first():
        if path.is_file():
            begun = _read(path, count)
        elif (workdir / "checkpoints" / stage).is_dir():
            begun = [count]
    found = processes.of_first(begun, count)
    if not found:
        # Their compilers may differ in what a program takes.
        found = processes.of_first(sizes(count, memory_limit(), bytes_of, devices_of), count)
        if len(found) > 1 and processes.is_first():
            path.parent.mkdir(exist_ok=True)
            write_text(path, json.dumps({"members": found}) + "\n")
    if len(found) == 1:
        return [Wave(0, count, stage, workdir / f"{stage}.jsonl")]
    waves, first = [], 0
    for number, size in enumerate(found, 1):
        label = f"{stage}-{number}-of-{len(found)}"
        waves.append(Wave(first, first + size, label, path.with_name(f"{label}.jsonl")))
        first += size
    return waves


def join(waves: Sequence[Wave], logs: Sequence[MetricsLog]) -> list[Record]:
    """The records of all waves as those of one stage.

    A wave that ended before others, as its members had stopped, stays as in its last record, where
    it has no more loss.
    """
    by_step = [{record["step"]: record for record in log.records} for log in logs]
    joined = []
    for step in sorted(set().union(*by_step)):
        found = [each[step] if step in each else _stopped(each[max(each)]) for each in by_step]
        record: Record = {"stage": found[0]["stage"], "step": step}
        names = set().union(*found) - record.keys()
        # As one log writes them.
        for name in sorted(names, key=lambda name: (name == "diverged", name)):
            record[name] = [
                value
                for wave, one in zip(waves, found, strict=True)
                for value in one.get(name, [None] * (wave.stop - wave.first))
            ]
        joined.append(record)
    return joined


def _read(path: Path, count: int) -> list[int]:
    try:
        members = json.loads(path.read_text())["members"]
        if sum(members) == count and all(type(size) is int and size > 0 for size in members):
            return members
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{path} does not cut {count} members into waves: delete it and the checkpoints of its "
        "stage to start that again"
    )


def _stopped(record: Record) -> Record:
    return {name: value for name, value in record.items() if not name.startswith("train/")}
