"""The short form of the report: one line for each table and figure, for the README."""

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.published import NOT_RUN
from experiments.report_build import Answer, Answers
from experiments.report_document import Block, Items, Line, Link, Paragraph, Table, markdown
from experiments.report_gather import Run
from experiments.report_others import others
from experiments.report_readings import READINGS
from experiments.report_settings import differing
from experiments.report_tables import beside, ratio, size_of

START, END = "<!-- report: python -m experiments.report -->", "<!-- end of the report -->"


def short(found: Answers, prefix: str = "") -> list[Block]:
    """The short form as blocks.

    Args:
        found: Of all tables and figures, and the other runs.
        prefix: Of paths, from the page to the folder of the results.
    """
    rows = [_row(answer, run, prefix) for answer in found.items for run in answer.runs]
    blocks: list[Block] = []
    if rows:
        head = [
            *("published", "what", "ours", "settings that differ", "seeds", "rows beside"),
            "ours less published: median (lowest to highest row)",
            "size, ours / published: likewise",
        ]
        blocks.append(Table(head, rows))
        blocks.append(
            Paragraph(
                "Settings differ from the config of the table or figure, and from what is "
                "published where that is recorded; those that change no result are left out. "
                "Differences are of the first quantity, row by row; where the ratio is not 1, of "
                "networks of other sizes."
            )
        )
    blocks += others(found.others, prefix)
    blocks += _not_run(found.items, prefix)
    return blocks


def _name(answer: Answer) -> str:
    return f"{answer.paper.authors} {answer.paper.year}, {answer.item.label}"


def _row(answer: Answer, run: Run, prefix: str) -> list[Line]:
    item = answer.item
    pairs = [beside(item, entry, run) for entry in item.entries()]
    differences = [
        each.difference for found in pairs for each in found if each.difference is not None
    ]
    sizes = [each.size for found in pairs for each in found if each.size is not None]
    column = READINGS[item.study].columns()[next(iter(item.values))]
    count = f"{sum(map(bool, pairs))} of {len(pairs)}" if pairs else ""
    links: list[str | Link] = []
    for source in run.sources:
        folder = source.folder.as_posix()
        links += [Link(folder, f"{prefix}{folder}"), ", "]
    return [
        _name(answer), item.what, links[:-1], differing(run, item), str(run.seeds), count,
        _spread(differences, lambda value: f"{value:+.{column.digits}f}",
                "points" if column.unit == "%" else column.heading),
        _spread(sizes, ratio, run.reading.sizes.get(size_of(item, run.reading) or "", "")),
    ]  # fmt: skip


def _spread(values: Sequence[float], text_of: Callable[[float], str], unit: str) -> str:
    if not values:
        return ""
    text = text_of(statistics.median(values))
    if len(values) > 1:
        text += f" ({text_of(min(values))} to {text_of(max(values))})"
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
