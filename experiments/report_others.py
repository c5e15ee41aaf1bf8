"""The short form of runs that stand beside no table, what did not work among them."""

import math
from collections.abc import Sequence

from experiments.report_build import anchor
from experiments.report_document import Block, Line, Link, Paragraph, Table
from experiments.report_gather import Run, mean
from experiments.report_readings import GAIN, Row
from experiments.report_settings import differing
from experiments.report_tables import formatted, key_text, measured
from experiments.statistics import correct, paired

_ALPHA = 0.05


def others(runs: Sequence[Run], prefix: str = "") -> list[Block]:
    """A line for each run; trials say nothing of accuracy and have none.

    Args:
        runs: That stand beside no table.
        prefix: Of paths, from the page to the folder of the results.
    """
    rows = [_row(run, prefix) for run in runs if not run.trial]
    if not rows:
        return []
    head = [
        *("other runs", "study: config", "settings that differ", "seeds"),
        "ours, lowest to highest row",
        "differences that survive the correction",
    ]
    about = (
        "Other runs, of data, networks or settings that the papers have no table of. Differences "
        "are paired by seeds; all of a run are one family, of which those survive whose p-value, "
        f"corrected by Holm's method, is at most {_ALPHA}."
    )
    return [Paragraph(about), Table(head, rows)]


def _row(run: Run, prefix: str) -> list[Line]:
    links: list[str | Link] = []
    for source in run.sources:
        links += [Link(source.folder.as_posix(), f"{prefix}{anchor(source)}"), ", "]
    name = run.study if run.name == run.study else f"{run.study}: {run.name}"
    return [links[:-1], name, differing(run), str(run.seeds), _ours(run), survivors(run)]


def _ours(run: Run) -> str:
    """The first quantity, and how large the networks are."""
    first = next(iter(run.reading.values))
    size = next((name for name in run.reading.sizes if name in run.rows[0].values), None)
    return "; ".join(_extent(run, name) for name in (first, size) if name is not None)


def _extent(run: Run, name: str) -> str:
    column = run.reading.columns()[name]
    found = [row.values[name] for row in run.rows if name in row.values]
    if len(found) == 1:
        text = measured(found[0], column)
    else:
        means = sorted(map(mean, found))
        ends = dict.fromkeys(formatted(value, column) for value in (means[0], means[-1]))
        text = " to ".join(ends)
    return " ".join(filter(None, (column.heading, text, column.unit)))


def survivors(run: Run) -> str:
    """How many differences from the baseline survive, higher and lower, for each that is compared.

    Returns:
        Such as `"cka_sr less none: 0 higher, 1 lower of 24"`; empty if nothing is compared.
    """
    baseline = run.reading.baseline
    if baseline is None:
        return ""
    compared = [row for row in run.rows if GAIN in row.values]
    counts: dict[str, list[int]] = {}
    for row, sign in zip(compared, _signs(run, compared), strict=True):
        name = key_text(row.keys[baseline.key])
        if not isinstance(row.keys[baseline.key], str):
            name = f"{run.reading.keys[baseline.key]} {name}"
        count = counts.setdefault(name, [0, 0, 0])
        for index, holds in enumerate((sign > 0, sign < 0, True)):
            count[index] += holds
    return "; ".join(
        f"{name} {baseline.heading}: {higher} higher, {lower} lower of {of}"
        for name, (higher, lower, of) in counts.items()
    )


def _signs(run: Run, rows: Sequence[Row]) -> list[int]:
    """Of each difference 1 or -1 if it survives, and 0 if not or if there is no test."""
    first = next(iter(run.reading.values))
    tests = []
    for row in rows:
        values, gains = row.values[first], row.values[GAIN]
        test = {"mean": 0.0, "p_value": None}
        if all(map(math.isfinite, gains)):
            plain = [value - gain for value, gain in zip(values, gains, strict=True)]
            test = paired(values, plain)
        tests.append(test)
    correct(tests)
    return [
        int(math.copysign(1, test["mean"]))
        if test["p_value_holm"] is not None and test["p_value_holm"] <= _ALPHA
        else 0
        for test in tests
    ]
