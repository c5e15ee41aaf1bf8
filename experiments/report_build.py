"""The report: for each table and figure what is published, ours, what made it, or why not."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from experiments.published import FIGURE, NOT_RUN, NUMBERS, Item, Paper, agrees, papers
from experiments.report_commands import command_of, same_study
from experiments.report_document import (
    Block,
    Code,
    Command,
    Figures,
    Heading,
    Items,
    Line,
    Link,
    Paragraph,
    Table,
)
from experiments.report_gather import Alone, Gathered, Run, Source
from experiments.report_readings import READINGS
from experiments.report_tables import beside, run_table, same_for_all, table

TITLE = "Published results, and ours"


class Answer(NamedTuple):
    """What there is of an item.

    Attributes:
        paper: Of the item.
        item: A table or figure.
        runs: Ours that stand beside it.
        trials: Those cut to a few steps, which only show that the command works.
        related: Of other data or networks about the same question.
        alone: Reports whose summary is not there.
    """

    paper: Paper
    item: Item
    runs: Sequence[Run]
    trials: Sequence[Run]
    related: Sequence[Run]
    alone: Sequence[Alone]


class Answers(NamedTuple):
    """What there is of all items that have results, and what is of none.

    Attributes:
        items: In the order of the papers.
        others: Runs that stand beside no table: other data, networks or settings, and trials.
    """

    items: Sequence[Answer]
    others: Sequence[Run]


def answers(gathered: Gathered) -> Answers:
    """What there is of every table and figure that has results, and the other runs."""
    items = [
        _answer(paper, item, gathered)
        for paper, items in papers().values()
        for item in items
        if item.kind in (NUMBERS, FIGURE)
    ]
    used = {id(run) for answer in items for run in answer.runs}
    return Answers(items, [run for run in gathered.runs if id(run) not in used])


def _answer(paper: Paper, item: Item, gathered: Gathered) -> Answer:
    of_study = [run for run in gathered.runs if same_study(item.study, run.study)]
    own = [run for run in of_study if agrees(item.where, run.settings)]
    own = [run for run in own if run.trial or _stands_beside(item, run)]
    related = [run for run in of_study if run.name.split(",")[0] in item.related and run not in own]
    alone = [each for each in gathered.alone if each.name in item.configs]
    return Answer(
        paper,
        item,
        [run for run in own if not run.trial],
        [run for run in own if run.trial],
        related,
        [] if own else alone,
    )


def _stands_beside(item: Item, run: Run) -> bool:
    """Whether a run has an entry that is published, if any is."""
    return not item.rows or any(beside(item, entry, run) for entry in item.entries())


def build(gathered: Gathered, short: Sequence[Block]) -> list[Block]:
    """The whole page.

    Args:
        gathered: What runs left.
        short: The short form, which comes first.
    """
    found = answers(gathered)
    labels = _labels(gathered.runs)
    blocks: list[Block] = [
        Heading(1, TITLE),
        Paragraph([
            "Made by ", Code("python -m experiments.report"),
            f" from {_count(sum(len(run.sources) for run in gathered.runs), 'summary')}; nothing "
            "is typed by hand. Ours are means over seeds with the 95 % interval of the mean "
            "(Student's t, not cut to what is possible; none where there is one seed or all are "
            "equal), after the last step if nothing else is said; the number of seeds is in "
            "parentheses. ",
            Code("DATA"), " in a command is the folder of the prepared data. Commands that were "
            "not recorded are made of the settings in the summary, and repeat the run with today's "
            "code.",
        ]),
        *short,
        *(
            block
            for paper, items in papers().values()
            for block in _paper(paper, items, found.items, labels)
        ),
        *_other_runs(found.others, labels),
        *_reports(gathered.alone),
    ]  # fmt: skip
    if gathered.problems:
        blocks += [Heading(2, "Not read"), Items(list(gathered.problems))]
    return blocks


def _count(number: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _labels(runs: Sequence[Run]) -> dict[int, str]:
    """How each run is called: by its folder, or the first of several."""
    return {
        id(run): run.sources[0].folder.as_posix()
        + (f" and {len(run.sources) - 1} more" if len(run.sources) > 1 else "")
        for run in runs
    }


def _paper(
    paper: Paper, items: Sequence[Item], found: Sequence[Answer], labels: dict[int, str]
) -> Iterator[Block]:
    yield Heading(2, f"{paper.authors} {paper.year}: {paper.title}")
    yield Paragraph([Link(f"arXiv:{paper.arxiv}" if paper.arxiv else paper.url, paper.url)])
    by_id = {answer.item.id: answer for answer in found if answer.paper.key == paper.key}
    for item in items:
        if item.id in by_id:
            yield from _item(by_id[item.id], labels)
    rest = [item for item in items if item.id not in by_id]
    if rest:
        yield Heading(3, "Without results")
        yield Items([_without(item) for item in rest])


def _without(item: Item) -> Line:
    line: list[str | Code | Link] = [f"{item.label} ({item.source}): {item.what}."]
    if item.configs:
        line.append(" Configs: ")
        for config in item.configs:
            line += [Code(config), ", "]
        line[-1] = f" of {item.study}."
    return line


def _item(answer: Answer, labels: dict[int, str]) -> Iterator[Block]:
    item, runs = answer.item, answer.runs
    yield Heading(3, f"{item.label}: {item.what}")
    headings, columns = READINGS[item.study].keys, READINGS[item.study].columns()
    constant = same_for_all(item, headings, runs)
    about = f"Source: {item.source}." + (f" All lines: {constant}." if constant else "")
    if item.kind == FIGURE:
        about += " The paper prints no numbers of it."
    yield Paragraph(about)
    if runs or item.rows:
        yield table(item, columns, headings, [(labels[id(run)], run) for run in runs])
    for run in runs:
        yield from _made(run)
    if not runs:
        yield Paragraph(_not_run(answer))
        yield Command([command_of(item.study, config) for config in item.configs])
    for word, others in (("Seen to run", answer.trials), ("See also", answer.related)):
        if others:
            yield Paragraph([f"{word}: ", *_links(others, labels)])


def _not_run(answer: Answer) -> Line:
    if answer.alone:
        line: list[str | Code | Link] = ["The summary is not here, its report is: "]
        for each in answer.alone:
            line += [Link(each.path.as_posix(), each.path.as_posix()), ", "]
        line[-1] = ". The command:"
        return line
    return f"Not run: {NOT_RUN[answer.item.not_run]}. The command:"


def _links(runs: Sequence[Run], labels: dict[int, str]) -> list[str | Link]:
    line: list[str | Link] = []
    for run in runs:
        label = labels[id(run)]
        line.append(Link(label, anchor(run.sources[0])))
        line.append(f" ({run.trial} steps), " if run.trial else ", ")
    line[-1] = str(line[-1]).removesuffix(", ") + "."
    return line


def anchor(source: Source) -> str:
    """Where a summary is to be read: the report of its study, or its folder."""
    return (source.folder / "report.md" if source.report else source.folder).as_posix()


def _made(run: Run) -> Iterator[Block]:
    """What made the numbers of a run, and its figures."""
    for source in run.sources:
        line: list[str | Code | Link] = [
            Link(source.folder.as_posix(), anchor(source)),
            f", {_count(run.seeds, 'seed')}" if len(run.sources) == 1 else "",
            ", commit ",
        ]
        if source.commits:
            for commit in source.commits:
                line += [Code(_short(commit)), ", "]
            line[-1] = "."
        elif source.committed:
            commit = Code(_short(source.committed))
            line += ["not recorded; the summary was committed with ", commit, "."]
        else:
            line.append("not recorded.")
        yield Paragraph(line)
        if source.commands:
            yield Command(list(source.commands))
        else:
            yield Paragraph("The command was not recorded.")
        if source.figures:
            yield Figures([path.as_posix() for path in source.figures])


def _short(commit: str) -> str:
    """The first digits of a commit, and what else is said of it."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", commit)


def _other_runs(others: Sequence[Run], labels: dict[int, str]) -> Iterator[Block]:
    if others:
        yield Heading(2, "Other runs")
        yield Paragraph("Of data, networks or settings that the papers have no table of.")
    for run in others:
        trial = f", {run.trial} steps to see that it works" if run.trial else ""
        yield Heading(3, f"{labels[id(run)]} ({run.study}{trial})")
        yield run_table(run)
        yield from _made(run)


def _reports(alone: Sequence[Alone]) -> Iterator[Block]:
    if alone:
        yield Heading(2, "Reports without a summary")
        yield Paragraph("Of these runs the report alone is here, whose numbers are not read.")
        yield Table(
            ["report", "study", "config"],
            [
                [[Link(each.path.as_posix(), each.path.as_posix())], each.title, [Code(each.name)]]
                for each in alone
            ],
        )
