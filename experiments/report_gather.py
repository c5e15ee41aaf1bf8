"""Finds what runs left in a folder: summaries, read and checked, and reports that stand alone."""

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import provenance, summaries
from experiments.report_commands import (
    COMPARED,
    command,
    data_of,
    on_any_machine,
    origin_of,
    shortest,
)
from experiments.report_readings import READINGS, Reading, Row, add_gains

# A stage cut to fewer steps shows that a command works, and says nothing of accuracy.
_TRIAL = 100
# What differs between runs that are parts of one.
_PARTS = ("seeds", "checkpoint_seconds")
# What reading a summary raises that is not whole; it is a line, and the rest is reported.
_DAMAGES = (
    *(KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError, OSError),
)


class Source(NamedTuple):
    """One summary: its folder, and what made it.

    Attributes:
        folder: Where it is, relative to what was searched.
        commands: Of its runs; made of its settings where they were not recorded, if it has all.
        commits: Likewise; empty where they were not.
        committed: The commit it came into the repository with, where that is known.
        figures: Beside it, relative to what was searched.
        report: Whether `report.md` is beside it.
    """

    folder: Path
    commands: Sequence[str]
    commits: Sequence[str]
    committed: str
    figures: Sequence[Path]
    report: bool


class Run(NamedTuple):
    """A study with all its seeds, of one summary or of several that differ in seeds alone.

    Attributes:
        study: The name of its command.
        name: Of its config.
        settings: All fields, nested.
        changed: What differs from the config of that name.
        rows: What it found.
        sources: Its summaries.
    """

    study: str
    name: str
    settings: Mapping[str, Any]
    changed: Mapping[str, Any]
    rows: Sequence[Row]
    sources: Sequence[Source]

    @property
    def reading(self) -> Reading:
        """How its rows are to be shown."""
        return READINGS[self.study]

    @property
    def seeds(self) -> int:
        """Seeds of the entry that has most."""
        return max(len(row.seeds) for row in self.rows)

    @property
    def trial(self) -> int:
        """To how few steps it was cut only to see that it works; 0 for a run that counts."""
        steps = shortest(self.settings)
        return steps if steps < _TRIAL else 0


class Alone(NamedTuple):
    """A report whose summary is not there: its file, relative, its title and its config's name."""

    path: Path
    title: str
    name: str


class Gathered(NamedTuple):
    """All that a folder holds; `problems` are lines that name a file and what is wrong with it."""

    runs: Sequence[Run]
    alone: Sequence[Alone]
    problems: Sequence[str]


def gather(folder: Path) -> Gathered:
    """Reads every `summary.json` under a folder, and what is beside it.

    Args:
        folder: That is searched with all below it.

    Returns:
        What could be read, in the order of paths, and what could not.
    """
    paths, pages, problems = _walk(folder)
    runs = []
    for path in paths:
        try:
            run, noted = _run(path, folder)
        except _DAMAGES as error:
            problems.append(f"{path}: {_reason(error)}")
            continue
        runs.append(run)
        problems += noted
    there = {path.parent for path in paths}
    alone, unread = _alone(folder, pages, there)
    return Gathered(_joined(runs), alone, [*problems, *unread])


def _walk(folder: Path) -> tuple[list[Path], list[Path], list[str]]:
    """Summaries and pages below a folder, and a line for each folder that cannot be searched."""
    # Not rglob, which passes over such folders: their results would be missed without a word.
    summaries, pages, problems = [], [], []

    def note(error: OSError) -> None:
        problems.append(f"{error.filename}: it cannot be searched ({error.strerror})")

    for root, folders, files in os.walk(folder, onerror=note):
        if "summary.json" in (*folders, *files):
            summaries.append(Path(root, "summary.json"))
        pages += [Path(root, name) for name in files if name.endswith(".md")]
    return sorted(summaries), sorted(pages), sorted(problems)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no field {error.args[0]!r}"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON ({error})"
    if isinstance(error, OSError):
        return f"it cannot be read ({error.strerror})"
    if isinstance(error, TypeError | AttributeError | IndexError):
        return f"a field is not what it should be ({' '.join(str(error).split())})"
    return " ".join(str(error).split())


def _run(path: Path, folder: Path) -> tuple[Run, list[str]]:
    """The run of a summary, and what is wrong with what made it."""
    summary = summaries.read(path)
    if "methods" in summary:
        shared = dict(summary["shared"])
        study, name, settings, changed, line = COMPARED, COMPARED, shared, {}, ""
    else:
        study, settings, changed = origin_of(summary["config"])
        name = settings["name"]
        line = command(study, name, changed, data_of(settings))
    rows = READINGS[study].rows(summary, settings)
    if not rows:
        raise ValueError("it has no entries")
    problems = []
    try:
        made = provenance.read(path.with_name(provenance.FILE))
    except ValueError as error:
        made, problems = [], [str(error)]
    beside = path.parent.relative_to(folder)
    data = data_of(settings)
    recorded = dict.fromkeys(on_any_machine(origin.command, data) for origin in made)
    source = Source(
        beside,
        [each for each in recorded or (line,) if each],
        list(dict.fromkeys(each.commit or f"version {each.version}" for each in made)),
        "" if made else provenance.committed_with(path.resolve()),
        [each.relative_to(folder) for each in _figures(path.parent)],
        path.with_name("report.md").is_file(),
    )
    return Run(study, name, settings, changed, rows, [source]), problems


def _figures(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png")) + sorted(folder.glob("figures/*.png"))


def _joined(runs: Iterable[Run]) -> list[Run]:
    """Runs whose settings differ in seeds alone, and that share none, are one; gains are added."""
    groups: list[list[Run]] = []
    for run in runs:
        fitting = (group for group in groups if all(_are_parts(run, each) for each in group))
        if (group := next(fitting, None)) is not None:
            group.append(run)
        else:
            groups.append([run])
    joined = [_join(group) for group in groups]
    for run in joined:
        add_gains(run.reading, run.rows)
    return joined


def _are_parts(one: Run, other: Run) -> bool:
    rest = [
        {name: value for name, value in run.settings.items() if name not in _PARTS}
        for run in (one, other)
    ]
    seeds = [{seed for row in run.rows for seed in row.seeds} for run in (one, other)]
    return (
        (one.study, one.name) == (other.study, other.name)
        and one.study != COMPARED
        and rest[0] == rest[1]
        and not seeds[0] & seeds[1]
    )


def _join(runs: Sequence[Run]) -> Run:
    if len(runs) == 1:
        return runs[0]
    rows: dict[tuple[Any, ...], Row] = {}
    for run in runs:
        for row in run.rows:
            key = tuple(row.keys.values())
            rows[key] = _add(rows[key], row) if key in rows else row
    first = runs[0]
    changed = {name: value for name, value in first.changed.items() if name not in _PARTS}
    sources = [source for run in runs for source in run.sources]
    return first._replace(rows=list(rows.values()), changed=changed, sources=sources)


def _add(one: Row, other: Row) -> Row:
    """One entry of the seeds of two; what has one value for all seeds keeps it."""
    values = {}
    for name in one.values.keys() & other.values.keys():
        found = one.values[name], other.values[name]
        of_seeds = len(found[0]) == len(one.seeds) and len(found[1]) == len(other.seeds)
        values[name] = found[0] + found[1] if of_seeds else found[0]
    ordered = {name: values[name] for name in one.values if name in values}
    return Row(one.keys, ordered, one.seeds + other.seeds)


def _alone(
    folder: Path, pages: Sequence[Path], there: Collection[Path]
) -> tuple[list[Alone], list[str]]:
    """Reports of studies that stand alone, by their first line, `# TITLE: NAME`.

    Second are lines for pages that cannot be read, as they may be such.
    """
    found, problems = [], []
    for path in pages:
        if path.parent in there and path.name == "report.md":
            continue
        try:
            with path.open(encoding="utf-8") as file:
                first = file.readline(300)
        except OSError as error:
            problems.append(f"{path}: {_reason(error)}")
            continue
        except ValueError:
            continue
        if match := re.fullmatch(r"# ([^:]+): ([\w,.-]+)\n", first):
            found.append(Alone(path.relative_to(folder), match[1], match[2]))
    return found, problems


def mean(values: Sequence[float]) -> float:
    """The mean of some numbers."""
    return math.fsum(values) / len(values)
