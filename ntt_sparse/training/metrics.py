"""Metrics of a run: JSON lines that survive a kill, and TensorBoard event files.

A record is one line: `{"stage": ..., "step": ..., name: [one value per member], ...}`.
Values that are not finite are written as `null`, so that every line is strict JSON. Where members
have diverged there is `"diverged"` too: for each member null, or its step and term.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ntt_sparse.training.divergence import Divergence
from ntt_sparse.training.files import write_text

_logger = logging.getLogger(__name__)

Record: TypeAlias = dict[str, Any]


class MetricsLog:
    """The records of one stage, in memory and as lines of a file.

    The file holds only whole records of this stage, in order; opening it again after
    a kill drops a last line that was cut short.
    """

    def __init__(self, path: str | Path, stage: str):
        """Opens or creates the file.

        Args:
            path: A `.jsonl` file; its directory must exist.
            stage: Name written into every record.
        """
        self.path = Path(path)
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
        self.records = self.records[:count]
        write_text(self.path, "".join(_line(record) for record in self.records))

    def write(
        self, step: int, values: Mapping[str, Any], *, diverged: Mapping[int, Divergence] = {}
    ) -> Record:
        """Appends a record and flushes it.

        Args:
            step: Steps done.
            values: Arrays with a leading member axis, by name.
            diverged: Of members that take no further part, by index.

        Returns:
            The record as it reads back from the file.
        """
        record: Record = {"stage": self.stage, "step": int(step)}
        record |= {name: _plain(np.asarray(value)) for name, value in sorted(values.items())}
        if diverged:
            count = len(next(iter(values.values())))
            record["diverged"] = [
                diverged[member]._asdict() if member in diverged else None
                for member in range(count)
            ]
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(_line(record))
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


def _read_lines(path: Path) -> Iterable[Record]:
    if not path.exists():
        return
    for line in path.read_text().splitlines(keepends=True):
        try:
            # A line without its end was cut short by a kill, even if it parses.
            record = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            record = None
        if not isinstance(record, dict):
            _logger.warning("%s: dropping a line that was cut short and all after it", path)
            return
        yield record


class TensorBoard:
    """TensorBoard event files, one run per member, without TensorFlow.

    Files are opened with the first scalars; events from that step on which an
    interrupted run left are hidden. Without the package tensorboardX nothing is
    written, which is said once.
    """

    def __init__(self, directory: str | Path, member_names: Sequence[str]):
        """Prepares the sink; nothing is written yet.

        Args:
            directory: Each member writes into a directory of its name below it.
            member_names: Names of the members, used as directories.
        """
        self._paths = [str(Path(directory) / name) for name in member_names]
        self._writers: list[Any] | None = None

    def write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes the finite scalars of every member; arrays with more axes are left out."""
        if self._writers is None:
            self._writers = self._open(step)
        for name, value in values.items():
            array = np.asarray(value)
            if array.ndim == 1 and self._writers:
                for writer, scalar in zip(self._writers, array, strict=True):
                    if np.isfinite(scalar):
                        writer.add_scalar(f"{stage}/{name}", float(scalar), step)

    def flush(self) -> None:
        """Makes sure that what was written survives the death of this process."""
        for writer in self._writers or ():
            writer.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        for writer in self._writers or ():
            writer.close()

    def _open(self, step: int) -> list[Any]:
        try:
            # Imported here: an optional sink of an optional package.
            from tensorboardX import SummaryWriter
        except ImportError:
            _logger.info("tensorboardX is not installed: no TensorBoard files are written")
            return []
        return [SummaryWriter(path, purge_step=step, flush_secs=30) for path in self._paths]
