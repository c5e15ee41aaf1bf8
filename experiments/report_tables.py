"""Tables of published numbers with ours beside them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.published import Item
from experiments.report_document import Link, Table
from experiments.report_gather import Run, mean
from experiments.report_readings import READINGS, Column, Reading, Row
from experiments.statistics import interval


class Beside(NamedTuple):
    """One of ours beside a published row.

    Attributes:
        run: Of ours.
        row: Of that run.
        difference: Of the first quantity, ours less published.
        size: Of the network, ours through published; without it a difference may be that of
            networks of other sizes.
    """

    run: Run
    row: Row
    difference: float | None = None
    size: float | None = None


def beside(item: Item, entry: Mapping[str, Any], run: Run) -> list[Beside]:
    """The rows of a run that a published row is of; keys that are not said agree with any."""
    first = next(iter(item.values))
    found = []
    for row in run.rows:
        if all(entry[key] is None or entry[key] == row.keys[key] for key in item.keys):
            printed, ours = entry[first], row.values.get(first)
            difference = None
            if printed is not None and ours is not None:
                scale = run.reading.columns()[first].scale
                difference = scale * mean(ours) - _number(printed)
            found.append(Beside(run, row, difference, _size_ratio(item, entry, run, row)))
    return found


def size_of(item: Item, reading: Reading) -> str | None:
    """The published quantity that says how large a network is, unless it is what is compared."""
    first, *rest = item.values
    return None if first in reading.sizes else next((n for n in reading.sizes if n in rest), None)


def _size_ratio(item: Item, entry: Mapping[str, Any], run: Run, row: Row) -> float | None:
    name = size_of(item, run.reading)
    if name is None or entry.get(name) is None or name not in row.values:
        return None
    column = run.reading.columns()[name]
    ours, published = column.scale * mean(row.values[name]), _number(entry[name])
    if column.unit == "%":
        ours, published = 100.0 - ours, 100.0 - published
    return ours / published if published > 0 else None


def _number(printed: Any) -> float:
    """The mean of a published value, which is a number or mean and deviation."""
    return printed[0] if isinstance(printed, list) else printed


def table(item: Item, columns: Mapping[str, Column], headings: Mapping[str, str],
          runs: Sequence[tuple[str, Run]]) -> Table:  # fmt: skip
    """Every published row, then what each run has of it, then what runs have besides.

    Args:
        item: Published.
        columns: How its quantities are shown.
        headings: Of its keys.
        runs: Ours with their labels.
    """
    names = list(item.values)
    lines: list[tuple[list[Any], list[Any]]] = []
    shown: set[int] = set()
    for entry in item.entries():
        cells = [_printed(entry[name], columns[name]) for name in names]
        lines.append(([entry[key] for key in item.keys], ["published", *cells, "", ""]))
        for label, run in runs:
            for each in beside(item, entry, run):
                shown.add(id(each.row))
                lines.append(_ours(item, columns, label, each))
    for label, run in runs:
        for row in run.rows:
            if id(row) not in shown:
                lines.append(_ours(item, columns, label, Beside(run, row)))
    return _compact(item, columns, headings, lines)


def _ours(
    item: Item, columns: Mapping[str, Column], label: str, each: Beside
) -> tuple[list[Any], list[Any]]:
    cells = [measured(each.row.values.get(name), columns[name]) for name in item.values]
    first = columns[next(iter(item.values))]
    less = "" if each.difference is None else f"{each.difference:+.{first.digits}f}"
    size = "" if each.size is None else ratio(each.size)
    keys = [each.row.keys[key] for key in item.keys]
    return keys, [f"{label} ({len(each.row.seeds)})", *cells, less, size]


def ratio(value: float) -> str:
    """A ratio of sizes, as a cell."""
    # Else networks that are all but empty have none.
    return f"{value:.2f}" if value >= 0.1 else f"{value:.1g}"


def _compact(
    item: Item,
    columns: Mapping[str, Column],
    headings: Mapping[str, str],
    lines: Sequence[tuple[Sequence[Any], Sequence[Any]]],
) -> Table:
    """Without keys that are the same in all lines, unless that leaves none, and empty columns."""
    varied = [
        index
        for index in range(len(item.keys))
        if len({repr(_plain(keys[index])) for keys, _ in lines}) > 1
    ] or [0]
    head = [headings[item.keys[index]] for index in varied]
    units = [f"{columns[name].heading}{_unit(columns[name])}" for name in item.values]
    reading = READINGS[item.study]
    size = reading.sizes.get(size_of(item, reading) or "", "size")
    cells = ["of (seeds)", *units, "less published", f"{size}, ours / published"]
    filled = [index for index in range(len(cells)) if any(row[index] for _, row in lines)]
    rows = [
        [*(key_text(keys[index]) for index in varied), *(row[index] for index in filled)]
        for keys, row in lines
    ]
    return Table([*head, *(cells[index] for index in filled)], rows)


def run_table(run: Run) -> Table:
    """All that a run found."""
    columns = run.reading.columns()
    names = [name for name in columns if any(name in row.values for row in run.rows)]
    varied = [key for key in run.reading.keys if len({repr(row.keys[key]) for row in run.rows}) > 1]
    head = [*(run.reading.keys[key] for key in varied), "seeds"]
    head += [f"{columns[name].heading}{_unit(columns[name])}" for name in names]
    rows = [
        [
            *(key_text(row.keys[key]) for key in varied),
            str(len(row.seeds)),
            *(measured(row.values.get(name), columns[name]) for name in names),
        ]
        for row in run.rows
    ]
    return Table(head, rows)


def same_for_all(item: Item, headings: Mapping[str, str], runs: Sequence[Run]) -> str:
    """What a table leaves out as it is the same in all its lines, such as `"density 0.03"`."""
    found = []
    for index, key in enumerate(item.keys):
        values = [row[index] for row in item.rows]
        values += [row.keys[key] for run in runs for row in run.rows]
        texts = {repr(_plain(value)): key_text(value) for value in values}
        if len(texts) == 1 and len(item.keys) > 1:
            found.append(f"{headings[key]} {next(iter(texts.values()))}")
    return ", ".join(found)


def _plain(value: Any) -> Any:
    """An integer that is a number like others."""
    return float(value) if type(value) is int else value


def key_text(value: Any) -> str:
    """What names an entry, as a cell."""
    if value is None:
        return "not said"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def measured(values: Sequence[float] | None, column: Column) -> str:
    """A mean with its 95 % interval, such as `"97.31 [97.20, 97.42]"`."""
    if not values:
        return ""
    text = formatted(mean(values), column)
    ends = interval(values)
    if ends is None:
        return text
    return f"{text} [{formatted(ends[0], column)}, {formatted(ends[1], column)}]"


def formatted(value: float, column: Column) -> str:
    """A number without its unit."""
    sign = "+" if column.unit == "points" else ""
    return f"{column.scale * value:{sign},.{column.digits}f}"


def _printed(value: Any, column: Column) -> str:
    """A published value, which has its unit already; a pair is mean and standard deviation."""
    if value is None:
        return ""
    if isinstance(value, list):
        return f"{value[0]:,.{column.digits}f} ± {value[1]:,.{column.digits}f}"
    if not column.unit and value == int(value):
        return f"{value:,.0f}"
    # All that is printed, and at least as much as of ours.
    printed = len(str(value).partition(".")[2])
    return f"{value:,.{max(printed, column.digits)}f}"


def _unit(column: Column) -> str:
    return f" ({column.unit})" if column.unit else ""


def links(runs: Sequence[tuple[str, Run]]) -> list[Link]:
    """To the folders of runs."""
    return [Link(label, source.folder.as_posix()) for label, run in runs for source in run.sources]
