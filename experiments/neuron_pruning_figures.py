"""The figures of the neuron pruning study."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from experiments import diverged, figures
from experiments.neuron_pruning_orders import BASELINE, CRITERIA

_Line: TypeAlias = tuple[list[float], list[list[float]]]


def _line(
    group: dict[str, Any],
    name: str,
    values: Callable[[dict[str, Any]], list[float]],
    *,
    of: str = "test",
    x: Callable[[dict[str, Any]], float] | None = None,
) -> _Line:
    """Of a criterion: iterations, or another number, and values of its networks at each.

    Args:
        group: With its iterations.
        name: Of the criterion.
        values: Of its cell.
        of: What a cell must have; the first iteration and those of networks that diverged may not.
        x: Of its cell.
    """
    found = [
        (row["iteration"] if x is None else x(row["criteria"][name]), row["criteria"][name])
        for row in group["iterations"]
        if row["criteria"].get(name, {}).get(of) is not None
    ]
    return [at for at, _ in found], [values(cell) for _, cell in found]


def _drawn(lines: dict[str, _Line]) -> dict[str, _Line]:
    """Those that have points."""
    return {label: line for label, line in lines.items() if line[0]}


def _accuracies(cell: dict[str, Any]) -> list[float]:
    return [100 * value for value in cell["test"]["values"]]


def draw(directory: Path, config: Any, groups: Sequence[dict[str, Any]]) -> None:
    """Writes all figures; of what has diverged there is none."""
    names = config.criteria.split(",")
    rivals = [name for name in names if name != BASELINE and BASELINE in names]
    for group in groups:
        label = f"{group['network']}_p{group['dropout']:g}_r{group['rate']:g}"
        lines = _drawn({CRITERIA[name]: _line(group, name, _accuracies) for name in names})
        if lines:
            path = directory / f"accuracy_{label}"
            figures.ranges(path, {"test accuracy (%)": lines}, x="iteration")
        # Of those that have networks of the same seeds.
        compared = [
            row["criteria"][name]
            for row in group["iterations"]
            for name in rivals
            if row["criteria"].get(name, {}).get("difference") is not None
        ]
        if compared and all({"agreement", "cumulative_agreement"} <= set(c) for c in compared):
            figures.ranges(
                directory / f"agreement_{label}",
                {
                    title: _drawn({
                        CRITERIA[name]: _line(
                            group, name, lambda cell, field=field: cell[field]["values"], of=field
                        )
                        for name in rivals
                    })
                    for title, field in (
                        ("agreement with L1, of the iteration", "agreement"),
                        ("agreement with L1, up to the iteration", "cumulative_agreement"),
                    )
                },
                x="iteration",
            )  # fmt: skip
    if len(groups) > 1 and config.iterations > 1:
        _draw_sweep(directory, config, groups, rivals)


def _draw_sweep(
    directory: Path, config: Any, groups: Sequence[dict[str, Any]], rivals: Sequence[str]
) -> None:
    """What criteria gain over L1, and their accuracy against neurons, one line per group."""
    varied = [
        field for field in ("network", "dropout", "rate")
        if len({group[field] for group in groups}) > 1
    ]  # fmt: skip
    labels = [", ".join(f"{field} {group[field]}" for field in varied) for group in groups]
    labelled = dict(zip(labels, groups, strict=True))
    if rivals:
        figures.ranges(
            directory / "gain_over_l1",
            {
                f"{CRITERIA[name]} less L1 (points)": _drawn({
                    label: _gain(group, name) for label, group in labelled.items()
                })
                for name in rivals
            },
            x="iteration",
        )  # fmt: skip
    figures.ranges(
        directory / "accuracy_against_neurons",
        {
            f"{CRITERIA[name]}: test accuracy (%)": _drawn({
                label: _line(
                    group, name, _accuracies, x=lambda cell: sum(cell["left"].values())
                )
                for label, group in labelled.items()
            })
            for name in config.criteria.split(",")
        },
        x="neurons left",
        logarithmic=True,
    )  # fmt: skip


def _gain(group: dict[str, Any], name: str) -> _Line:
    """Iterations, and what a criterion gains over L1 at each, for the seeds of both."""
    steps, gains = [], []
    for row in group["iterations"]:
        if {name, BASELINE} <= set(row["criteria"]):
            ours, theirs = diverged.pairs(row["criteria"][name], row["criteria"][BASELINE], "test")
            if ours:
                steps.append(row["iteration"])
                gains.append(list(100 * (np.array(ours) - np.array(theirs))))
    return steps, gains
