"""The short form of the report: one line for each table and figure, for the README."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.published import NOT_RUN
from experiments.report_build import Answer
from experiments.report_document import Block, Items, Line, Link, Paragraph, Table, markdown
from experiments.report_gather import Run
from experiments.report_readings import READINGS
from experiments.report_tables import beside

# Fields of the settings that say how much is done.
_LENGTHS = ("epochs", "max_steps", "examples", "iterations")
START, END = "<!-- report: python -m experiments.report -->", "<!-- end of the report -->"


def short(found: Sequence[Answer], prefix: str = "") -> list[Block]:
    """The short form as blocks.

    Args:
        found: Of all tables and figures.
        prefix: Of paths, from the page to the folder of the results.
    """
    rows = [_row(answer, run, prefix) for answer in found for run in answer.runs]
    blocks: list[Block] = []
    if rows:
        head = [
            *("published", "what", "ours", "cut to", "seeds", "rows beside"),
            "ours less published: median (lowest to highest row)",
        ]
        blocks.append(Table(head, rows))
    blocks += _not_run(found, prefix)
    return blocks


def _name(answer: Answer) -> str:
    return f"{answer.paper.authors} {answer.paper.year}, {answer.item.label}"


def _row(answer: Answer, run: Run, prefix: str) -> list[Line]:
    item = answer.item
    pairs = [beside(item, entry, run) for entry in item.entries()]
    differences = [
        each.difference for found in pairs for each in found if each.difference is not None
    ]
    column = READINGS[item.study].columns()[next(iter(item.values))]
    count = f"{sum(map(bool, pairs))} of {len(pairs)}" if pairs else ""
    links: list[str | Link] = []
    for source in run.sources:
        folder = source.folder.as_posix()
        links += [Link(folder, f"{prefix}{folder}"), ", "]
    return [
        _name(answer), item.what, links[:-1], _cut(run), str(run.seeds), count,
        _spread(differences, column.digits, "points" if column.unit == "%" else column.heading),
    ]  # fmt: skip


def _cut(run: Run) -> str:
    """What makes a run shorter or longer than its config."""
    return ", ".join(
        f"{field}={value}"
        for field, value in run.changed.items()
        if field.rpartition(".")[2] in _LENGTHS
    )


def _spread(differences: Sequence[float], digits: int, unit: str) -> str:
    if not differences:
        return ""
    middle, low, high = statistics.median(differences), min(differences), max(differences)
    text = f"{middle:+.{digits}f}"
    if len(differences) > 1:
        text += f" ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"{text} {unit}"


def _not_run(found: Sequence[Answer], prefix: str) -> list[Block]:
    """Why the others have no run, a line for each reason."""
    lines: list[Line] = []
    for reason, text in NOT_RUN.items():
        names = [
            answer
            for answer in found
            if answer.item.not_run == reason and not answer.runs and not answer.alone
        ]
        if names:
            lines.append(f"{text}: {_listed(names)}")
    tried = {
        f"{prefix}{source.folder.as_posix()}": run.trial
        for answer in found
        for run in answer.trials
        for source in run.sources
    }
    if tried:
        tries: list[str | Link] = ["seen to run, for a few steps: "]
        for path, steps in tried.items():
            tries += [Link(path.removeprefix(prefix), path), f" ({steps}), "]
        tries[-1] = str(tries[-1]).removesuffix(", ")
        lines.append(tries)
    if alone := [answer for answer in found if answer.alone and not answer.runs]:
        line: list[str | Link] = ["run, of which only the report is here: "]
        for answer in alone:
            path = answer.alone[0].path.as_posix()
            line += [Link(_name(answer), f"{prefix}{path}"), "; "]
        lines.append(line[:-1])
    return [Paragraph("Not run:"), Items(lines)] if lines else []


def _listed(found: Sequence[Answer]) -> str:
    """Labels, each paper named once."""
    by_paper: dict[str, list[str]] = {}
    for answer in found:
        paper = f"{answer.paper.authors} {answer.paper.year}"
        by_paper.setdefault(paper, []).append(answer.item.label)
    return "; ".join(f"{paper} ({'; '.join(labels)})" for paper, labels in by_paper.items())


def put_into(readme: str, blocks: Sequence[Block]) -> str:
    """A README with the short form between its two markers.

    Raises:
        ValueError: It has not both markers, once each and in order.
    """
    if readme.count(START) != 1 or readme.count(END) != 1:
        raise ValueError(f"expected one line {START!r} and one {END!r}")
    before, rest = readme.split(START)
    if END not in rest:
        raise ValueError(f"{END!r} comes before {START!r}")
    return f"{before}{START}\n\n{markdown(blocks)}\n{END}{rest.split(END)[1]}"


def prefix_from(page: Path, folder: Path) -> str:
    """The way from a page to a folder, as links have it; empty if it lies in the folder."""
    way = Path(os.path.relpath(folder.resolve(), page.resolve().parent)).as_posix()
    return "" if way == "." else f"{way}/"
