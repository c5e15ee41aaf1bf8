"""The report of the recommender study: summary.json, report.md and the figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import diverged, figures, summaries
from experiments.dam_recommender_members import LABELS, Run, member_names, runs_of
from experiments.dam_recommender_published import published
from experiments.statistics import correct, paired, spread
from ntt_sparse.training.metrics import MetricsLog

_DIMENSION, _ERROR = "open channels", "test RMSE"


def stage(gate: str, stop: int) -> str:
    """The name of the part of training of a kind that ends at a step."""
    return f"{gate}-{stop}"


def write(config: Any, workdir: Path, stops: Sequence[int], mean_error: float) -> dict[str, Any]:
    """Writes everything from metrics and errors alone, so that it can be repeated.

    Args:
        config: The settings.
        workdir: Of the study.
        stops: Steps at which parts of the training end.
        mean_error: Of always predicting the mean rating.

    Returns:
        The summary.
    """
    rows, errors, out = [], {}, []
    for gate in config.gates.split(","):
        runs = runs_of(config, gate)
        steps, values = _through(workdir, gate, stops)
        errors[gate] = json.loads((workdir / f"test_{gate}.json").read_text())
        last = errors[gate] | {name: column[-1].tolist() for name, column in values.items()}
        out.append(gone(workdir, gate, member_names(runs), stops))
        groups = diverged.left(_groups(runs), out[-1])
        rows += [_row(config, gate, runs, last, members) for members in groups.values()]
        path = workdir / "figures" / f"dimension_{gate}"
        _draw_training(path, groups, steps, values["dimension"])
    _compare(rows)
    summary = {
        "config": summaries.settings(config),
        "steps": stops[-1], "mean_rmse": mean_error, "networks": rows,
    }  # fmt: skip
    if any(out):
        summary["diverged"] = diverged.rows(*out)
    summaries.write(workdir, summary, _markdown(config, summary, stops))
    _draw(workdir / "figures" / "error_against_dimension", config.data.name, rows)
    return summary


def gone(workdir: Path, gate: str, names: Sequence[str], stops: Sequence[int]) -> diverged.Gone:
    """Networks of a kind that diverged in any part of the training."""
    found: diverged.Gone = {}
    for stop in stops:
        found = diverged.gone(workdir, stage(gate, stop), names, found)
    return found


def _through(
    workdir: Path, gate: str, stops: Sequence[int]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What was recorded through all parts of the training: steps, and values `(r, members)`."""
    steps: list[np.ndarray] = []
    found: dict[str, list[np.ndarray]] = {}
    for index, stop in enumerate(stops):
        log = MetricsLog(workdir / f"{stage(gate, stop)}.jsonl", stage(gate, stop))
        # A part begins with a record of what the one before ended with.
        first = min(index, 1)
        steps.append(log.column("dimension")[0][first:])
        for name in ("dimension", "validation_rmse"):
            if name in log.records[0]:
                found.setdefault(name, []).append(log.column(name)[1][first:])
    return np.concatenate(steps), {name: np.concatenate(parts) for name, parts in found.items()}


def _groups(runs: list[Run]) -> dict[float, list[int]]:
    """The indices of the networks of each coefficient, in the order of the seeds."""
    groups: dict[float, list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(run.coefficient, []).append(index)
    return groups


def _row(
    config: Any, gate: str, runs: list[Run], last: dict[str, Any], members: list[int]
) -> dict[str, Any]:
    """An entry of the networks of one coefficient, over its seeds."""
    reported = published(config.data.name, gate)
    return {
        "gate": gate,
        "coefficient": runs[members[0]].coefficient,
        "seeds": [runs[member].seed for member in members],
        **{name: spread([values[m] for m in members]) for name, values in last.items()},
        "published": None if reported is None else reported._asdict(),
    }


def _compare(rows: list[dict[str, Any]]) -> None:
    """Adds to rows of gates how their errors differ from those of dropout, seed by seed."""
    plain = next((row for row in rows if row["gate"] == "none"), None)
    for name in ("rmse", "ensemble_rmse"):
        differences = []
        for row in rows:
            if plain is not None and row["gate"] != "none":
                ours, theirs = diverged.pairs(row, plain, name)
                if ours:
                    row[f"{name}_difference"] = paired(ours, theirs)
                    differences.append(row[f"{name}_difference"])
        correct(differences)


def _markdown(config: Any, summary: dict[str, Any], stops: Sequence[int]) -> str:
    held = config.data.validation_fraction
    printed = any(row["published"] for row in summary["networks"])
    lines = [
        f"# Compact recommenders: {config.name}",
        "",
        f"{config.data.name}, {config.training.epochs} epochs ({summary['steps']} steps of "
        f"{config.training.batch_size} ratings"
        + (f", {held:.0%} of the training ratings held out" if held else "")
        + f"), mean ± standard deviation over seeds {list(config.seeds)}: root mean squared error "
        "on test ratings, of the last network and of the mean prediction of the "
        f"networks at steps {', '.join(map(str, stops))}, and open channels of the code of "
        f"{config.model.code} in the last. Always predicting the mean rating has an error of "
        f"{summary['mean_rmse']:.4f}."
        + (" In brackets what the paper reports (Table 1), after 100 epochs." if printed else ""),
        "",
        "| method | lambda | RMSE, last | RMSE, mean prediction | dimension | of each seed |"
        + (" RMSE, held out |" if held else ""),
        "| --- | --- | --- | --- | --- | --- |" + (" --- |" if held else ""),
    ]
    for row in summary["networks"]:
        reported = row["published"]
        brackets = ("", "") if reported is None else (
            f" ({reported['rmse']:.4f} ± {reported['spread']:.4f})", f" ({reported['dimension']})"
        )  # fmt: skip
        cells = [
            LABELS[row["gate"]],
            "" if row["gate"] == "none" else f"{row['coefficient']:g}",
            _text(row["rmse"], 4),
            _text(row["ensemble_rmse"], 4) + brackets[0],
            _text(row["dimension"], 1) + brackets[1],
            ", ".join(str(int(value)) for value in row["dimension"]["values"])
            + diverged.of_seeds(row["dimension"], config.seeds),
        ]
        if held:
            cells.append(_text(row["validation_rmse"], 4))
        lines.append(f"| {' | '.join(cells)} |")
    lines += _differences(summary["networks"])
    lines += diverged.lines(summary.get("diverged", ()))
    return "\n".join(lines) + "\n"


def _differences(rows: list[dict[str, Any]]) -> list[str]:
    """Gates less dropout, seed by seed."""
    lines = []
    for row in rows:
        if "rmse_difference" in row:
            texts = [
                f"{name}: {_difference(row[f'{key}_difference'])}"
                for key, name in (("rmse", "last"), ("ensemble_rmse", "mean prediction"))
            ]
            lines.append(f"- lambda {row['coefficient']:g}: {'; '.join(texts)}")
    if not lines:
        return []
    return ["", "RMSE with gates less that with dropout, paired by seed, with the 95% interval "
            "and the p-value (corrected by Holm):", "", *lines]  # fmt: skip


def _difference(value: dict[str, Any]) -> str:
    text = f"{value['mean']:+.4f}"
    if value["low"] is None:
        return text
    return (
        f"{text} [{value['low']:+.4f}, {value['high']:+.4f}], p = {value['p_value']:.2g} "
        f"({value['p_value_holm']:.2g})"
    )


def _text(value: dict[str, Any], digits: int) -> str:
    deviation = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{deviation}"


def _draw_training(
    path: Path, groups: dict[float, list[int]], steps: np.ndarray, dimension: np.ndarray
) -> None:
    """How channels closed: at the end of training lines should be level."""
    lines = {
        f"lambda = {coefficient:g}": dimension[:, members]
        for coefficient, members in groups.items()
    }
    figures.channels_over_training(path, steps, lines)


def _draw(path: Path, data: str, rows: list[dict[str, Any]]) -> None:
    """Table 1 as a figure: errors against channels, ours beside the published ones."""
    curves: dict[str, list[Any]] = {}
    for row in rows:
        label = LABELS[row["gate"]]
        curves.setdefault(label, []).append((row["dimension"], row["ensemble_rmse"]))
        reported = published(data, row["gate"])
        if reported is not None:
            point = (
                {"mean": reported.dimension, "std": None},
                {"mean": reported.rmse, "std": reported.spread},
            )
            curves[f"{label}, published"] = [point]
    figures.trade_offs(path, {(_DIMENSION, _ERROR): curves})
