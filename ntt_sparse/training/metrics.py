"""Metrics of a run: JSON lines that survive a kill, and TensorBoard event files.

A record is one line: `{"stage": ..., "step": ..., name: [one value per member], ...}`.
Values that are not finite are written as `null`, so that every line is strict JSON. Where members
have diverged there is `"diverged"` too: for each member null, or its step and term.
"""

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from ntt_sparse.training.divergence import Divergence
from ntt_sparse.training.files import append_text, naming, write_text

_logger = logging.getLogger(__name__)

Record: TypeAlias = dict[str, Any]


class MetricsLog:
    """The records of one stage, in memory and as lines of a file.

    The file holds only whole records of this stage, in order; opening it again after
    a kill drops a last line that was cut short.
    """

    def __init__(self, path: str | Path, stage: str, *, writes: bool = True):
        """Opens or creates the file.

        Args:
            path: A `.jsonl` file; its directory must exist.
            stage: Name written into every record.
            writes: Whether the file is changed; else records are only kept in memory, where
                another process writes it.
        """
        self.path, self._writes = Path(path), writes
        self.stage = stage
        self.records: list[Record] = list(_read_lines(self.path))

    def truncate(self, count: int) -> None:
        """Keeps the first `count` records, on disk too.

        Raises:
            ValueError: There are fewer records.
        """
        if count > len(self.records):
            raise ValueError(
                f"{self.path} holds {len(self.records)} records where its checkpoint had {count}: "
                "put the file back, or delete the stage's checkpoints to start it again"
            )
        self.replace(self.records[:count])

    def replace(self, records: Sequence[Record]) -> None:
        """Holds these records, on disk too."""
        self.records = list(records)
        if self._writes:
            write_text(self.path, "".join(_line(record) for record in self.records))

    def write(
        self, step: int, values: Mapping[str, Any], *, diverged: Sequence[Divergence | None] = ()
    ) -> Record:
        """Appends a record and flushes it.

        Args:
            step: Steps done.
            values: Arrays with a leading member axis, by name.
            diverged: One for each member, of those that take no further part; none where all do.
                Their values are null, those of others as they would be without them.

        Returns:
            The record as it reads back from the file.
        """
        record: Record = {"stage": self.stage, "step": int(step)}
        for name, value in sorted(values.items()):
            plain = _plain(np.asarray(value))
            record[name] = (
                [
                    each if found is None else _null(each)
                    for each, found in zip(plain, diverged, strict=True)
                ]
                if diverged
                else plain
            )
        if diverged:
            record["diverged"] = [found and found._asdict() for found in diverged]
        self.records.append(record)
        if self._writes:
            append_text(self.path, _line(record))
        return record

    def diverged(self) -> dict[int, Divergence]:
        """Where members have diverged by the last record, by index."""
        last = self.records[-1].get("diverged", []) if self.records else []
        return {member: Divergence(**found) for member, found in enumerate(last) if found}

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps `(r,)` and values `(r, members, ...)` of a metric, over the records that have it.

        Raises:
            KeyError: No record has it.
        """
        having = [record for record in self.records if name in record]
        if not having:
            names = sorted({key for record in self.records for key in record})
            raise KeyError(f"no record of stage {self.stage!r} holds {name!r}; there are {names}")
        return (
            np.array([record["step"] for record in having]),
            np.array([record[name] for record in having], float),
        )


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Nested lists of Python numbers, `None` for what is not finite."""
    if np.ndim(value):
        return [_plain(part) for part in value]
    number = value.item()
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _null(plain: Any) -> Any:
    """Nothing, in lists of the same lengths."""
    return [_null(part) for part in plain] if isinstance(plain, list) else None


def _read_lines(path: Path) -> Iterable[Record]:
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        # A line without its end was cut short by a kill, even if it parses.
        record = _record_of(line) if line.endswith(b"\n") else None
        if record is None:
            _logger.warning("%s: dropping a line that was cut short and all after it", path)
            return
        yield record


def _record_of(line: bytes) -> Record | None:
    def refuse(name: str) -> float:
        raise ValueError(name)

    try:
        record = json.loads(line, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    is_whole = isinstance(record, dict) and type(record.get("step")) is int
    return record if is_whole else None


class TensorBoard:
    """TensorBoard event files, one run per member, without TensorFlow.

    Files are opened with the first scalars; events from that step on which an
    interrupted run left are hidden. Without the package tensorboardX nothing is
    written, which is said once. (TensorBoard takes the files of a run in the order of
    their names, which hold the time: nothing else of a run goes by the clock.)
    """

    def __init__(self, directory: str | Path, member_names: Sequence[str]):
        """Prepares the sink; nothing is written yet.

        Args:
            directory: Each member writes into a directory of its name below it.
            member_names: Names of the members, used as directories.
        """
        self._paths = [Path(directory) / name for name in member_names]
        self._files: list[_EventFile] | None = None

    def write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes the finite scalars of every member; arrays with more axes are left out.

        Raises:
            OSError: They cannot be written.
        """
        if self._files is None:
            self._files = self._open(step)
        for name, value in values.items():
            array = np.asarray(value)
            if array.ndim == 1 and self._files:
                for file, scalar in zip(self._files, array, strict=True):
                    if np.isfinite(scalar):
                        file.add(f"{stage}/{name}", float(scalar), step)

    def flush(self) -> None:
        """Makes sure that what was written survives the death of this process."""
        for file in self._files or ():
            file.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        for file in self._files or ():
            file.close()

    def _open(self, step: int) -> list["_EventFile"]:
        try:
            # An optional sink of an optional package.
            import tensorboardX  # noqa: F401
        except ImportError:
            _logger.info("tensorboardX is not installed: no TensorBoard files are written")
            return []
        return [_EventFile(path, step) for path in self._paths]


class _EventFile:
    """The event file of one run, written at once.

    The writer of tensorboardX has a thread, which dies on a full disk, after which the
    training would wait for it for ever.
    """

    def __init__(self, directory: Path, purge_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._protocol = directory, cast(Any, event_pb2)
        self._writer = EventsWriter(str(directory / "events"))
        start = self._protocol.SessionLog(status=self._protocol.SessionLog.START)
        self._write(purge_step, session_log=start)

    def add(self, name: str, value: float, step: int) -> None:
        from tensorboardX.summary import scalar

        self._write(step, summary=scalar(name, value))

    def flush(self) -> None:
        with naming(self._directory):
            self._writer.flush()

    def close(self) -> None:
        with naming(self._directory):
            self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        with naming(self._directory):
            event = self._protocol.Event(wall_time=time.time(), step=step, **content)
            self._writer.write_event(event)
