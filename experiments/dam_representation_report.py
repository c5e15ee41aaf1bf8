"""The report of the DAM representation study: summary.json, report.md and the figures."""

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import diverged, figures, summaries
from experiments.dam_representation_members import LABELS, Run, member_names, runs_of
from experiments.statistics import spread
from ntt_sparse.training.metrics import MetricsLog

_GRID = ("coefficient", "learning_rate", "initial")


def write(config: Any, workdir: Path) -> dict[str, Any]:
    """Writes everything from the metrics files alone, so that it can be repeated.

    Returns:
        The summary.
    """
    rows, curves, out = [], {}, []
    for gate in config.gates.split(","):
        log = MetricsLog(workdir / f"{gate}.jsonl", gate)
        runs = [run for run in runs_of(config) if run.gate == gate]
        out.append(diverged.gone(workdir, gate, member_names(runs)))
        rows += _rows(log, runs, out[-1])
        chosen = _first_setting(config, runs, out[-1])
        curves[gate] = (*log.column("bottleneck"), chosen)
    summary = {"config": summaries.settings(config), "networks": rows}
    gone = diverged.rows(*out)
    if gone:
        summary["diverged"] = gone
    summaries.write(workdir, summary, _markdown(config, rows, gone))
    for gate, (steps, bottleneck, chosen) in curves.items():
        _draw(workdir / "figures", config, gate, steps, bottleneck, chosen, rows)
    return summary


def _rows(log: MetricsLog, runs: list[Run], gone: Collection[int]) -> list[dict[str, Any]]:
    """One entry per setting, over its seeds."""
    last = {
        name: log.column(name)[1][-1] for name in ("bottleneck", "reconstruction", "relative_error")
    }
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(run[:-1], []).append(index)
    rows = []
    for setting, members in diverged.left(groups, gone).items():
        run = runs[members[0]]
        found = last["bottleneck"][members]
        rows.append({
            **dict(zip(Run._fields[:-1], setting, strict=True)),
            "seeds": [runs[index].seed for index in members],
            "exact": int(np.sum(found == run.rank)),
            **{name: spread(values[members]) for name, values in last.items()},
        })  # fmt: skip
    return rows


def _first_setting(config: Any, runs: list[Run], gone: Collection[int]) -> dict[int, list[int]]:
    """The networks of the first setting, by rank."""
    setting = [getattr(config, f"{name}s")[0] for name in _GRID]
    groups: dict[int, list[int]] = {rank: [] for rank in config.ranks}
    for index, run in enumerate(runs):
        if [getattr(run, name) for name in _GRID] == setting:
            groups[run.rank].append(index)
    return diverged.left(groups, gone)


def _markdown(config: Any, rows: list[dict[str, Any]], gone: Sequence[dict[str, Any]] = ()) -> str:
    total = sum(len(row["seeds"]) for row in rows)
    exact = sum(row["exact"] for row in rows)
    lines = [
        f"# Representation learning with gates: {config.name}",
        "",
        f"Open channels of a bottleneck of {config.bottleneck} at the end, for data of r "
        f"dimensions ({config.task}), seeds {list(config.seeds)}. The error is the mean squared "
        "error relative to the mean square of the data. "
        f"{exact} of {total} networks end at exactly r.",
        "",
        "| gate | r | lambda | learning rate | start | bottleneck of each seed | exact | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        found = [int(value) for value in row["bottleneck"]["values"]]
        cells = (
            LABELS[row["gate"]], str(row["rank"]), f"{row['coefficient']:g}",
            f"{row['learning_rate']:g}", f"{row['initial']:g}",
            ", ".join(map(str, found)) + diverged.of_seeds(row["bottleneck"], config.seeds),
            f"{row['exact']}/{len(found)}", f"{row['relative_error']['mean']:.2g}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += diverged.lines(gone)
    return "\n".join(lines) + "\n"


def _draw(
    directory: Path,
    config: Any,
    gate: str,
    steps: np.ndarray,
    bottleneck: np.ndarray,
    chosen: dict[int, list[int]],
    rows: list[dict[str, Any]],
) -> None:
    """Fig. 3 at the first setting, and maps of all settings (Appendix C)."""
    if chosen:
        lines = {f"r = {rank}": bottleneck[:, members] for rank, members in chosen.items()}
        dimensions = {f"r = {rank}": rank for rank in chosen}
        figures.channels_over_training(directory / f"bottleneck_{gate}", steps, lines, dimensions)
    for x, y in itertools.combinations(_GRID, 2):
        if min(len(getattr(config, f"{name}s")) for name in (x, y)) < 2:
            continue
        (third,) = set(_GRID) - {x, y}
        middle = getattr(config, f"{third}s")[len(getattr(config, f"{third}s")) // 2]
        for rank, quantity in itertools.product(config.ranks, ("bottleneck", "relative_error")):
            values = {
                (row[x], row[y]): row[quantity]["mean"]
                for row in rows
                if row["gate"] == gate and row["rank"] == rank and row[third] == middle
            }
            if not values:
                continue
            figures.grid_map(
                directory / f"{quantity}_{gate}_r{rank}_{x}_{y}", values,
                (x.replace("_", " "), y.replace("_", " ")),
                f"{quantity.replace('_', ' ')}, r = {rank}, {third.replace('_', ' ')} {middle:g}",
            )  # fmt: skip
