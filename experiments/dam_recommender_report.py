"""The report of the recommender study: summary.json, report.md and the figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures
from experiments.dam_recommender_members import LABELS, Run, runs_of
from experiments.dam_recommender_published import published
from experiments.statistics import correct, paired, spread
from ntt_sparse.training.files import write_text
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
    rows, errors = [], {}
    for gate in config.gates.split(","):
        runs = runs_of(config, gate)
        steps, values = _through(workdir, gate, stops)
        errors[gate] = json.loads((workdir / f"test_{gate}.json").read_text())
        last = errors[gate] | {name: column[-1].tolist() for name, column in values.items()}
        rows += [
            _row(config, gate, runs, last, c) for c in dict.fromkeys(r.coefficient for r in runs)
        ]
        _draw_training(workdir / "figures" / f"dimension_{gate}", runs, steps, values["dimension"])
    _compare(rows)
    summary = {
        "config": json.loads(json.dumps(config.to_dict())),
        "steps": stops[-1], "mean_rmse": mean_error, "networks": rows,
    }  # fmt: skip
    write_text(workdir / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_text(workdir / "report.md", _markdown(config, summary, stops))
    _draw(workdir / "figures" / "error_against_dimension", config.data.name, rows)
    return summary


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


def _row(
    config: Any, gate: str, runs: list[Run], last: dict[str, Any], coefficient: float
) -> dict[str, Any]:
    """One entry per coefficient, over its seeds."""
    members = [index for index, run in enumerate(runs) if run.coefficient == coefficient]
    reported = published(config.data.name, gate)
    return {
        "gate": gate,
        "coefficient": coefficient,
        "seeds": list(config.seeds),
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
                row[f"{name}_difference"] = paired(row[name]["values"], plain[name]["values"])
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
            ", ".join(str(int(value)) for value in row["dimension"]["values"]),
        ]
        if held:
            cells.append(_text(row["validation_rmse"], 4))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_differences(summary["networks"])]) + "\n"


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


def _draw_training(path: Path, runs: list[Run], steps: np.ndarray, dimension: np.ndarray) -> None:
    """How channels closed: at the end of training lines should be level."""
    lines = {}
    for coefficient in dict.fromkeys(run.coefficient for run in runs):
        members = [index for index, run in enumerate(runs) if run.coefficient == coefficient]
        lines[f"lambda = {coefficient:g}"] = dimension[:, members]
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
