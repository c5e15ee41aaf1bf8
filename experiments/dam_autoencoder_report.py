"""The report of the DAM autoencoder study: summary.json, report.md and the figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import diverged, figures, summaries
from experiments.dam_autoencoder_downstream import read_score
from experiments.dam_autoencoder_members import member_names, runs_of
from experiments.dam_representation_members import LABELS
from experiments.statistics import spread
from ntt_sparse.training.metrics import MetricsLog

_CHANNELS, _ERROR, _F1, _LAMBDA = "open channels", "test error", "macro-F1", "lambda"


def write(config: Any, workdir: Path) -> dict[str, Any]:
    """Writes everything from metrics and scores alone, so that it can be repeated.

    Returns:
        The summary.
    """
    rows, steps, out = [], 0, []
    for gate in config.gates.split(","):
        log = MetricsLog(workdir / f"{gate}.jsonl", gate)
        out.append(diverged.gone(workdir, gate, member_names(runs_of(config, gate))))
        groups = diverged.left(_by_coefficient(config, gate), out[-1])
        rows += _rows(config, gate, groups, log, workdir / "downstream")
        steps = int(log.column("bottleneck")[0][-1])
        _draw_training(workdir / "figures" / f"bottleneck_{gate}", groups, log)
    summary = {"config": summaries.settings(config), "networks": rows}
    gone = diverged.rows(*out)
    if gone:
        summary["diverged"] = gone
    summaries.write(workdir, summary, _markdown(config, rows, steps, gone))
    _draw(workdir / "figures" / "gates_compared", rows)
    return summary


def _rows(
    config: Any, gate: str, groups: dict[float, list[int]], log: MetricsLog, scores: Path
) -> list[dict[str, Any]]:
    """One entry per coefficient, over its seeds."""
    runs = runs_of(config, gate)
    last = {name: log.column(name)[1][-1] for name in ("bottleneck", "reconstruction")}
    names, found = member_names(runs), np.full(len(runs), np.nan)
    for index in (index for members in groups.values() for index in members):
        found[index] = read_score(scores / f"{names[index]}.json")
    last["macro_f1"] = found
    return [
        {
            "gate": gate,
            "coefficient": coefficient,
            "seeds": [runs[index].seed for index in members],
            **{name: spread(values[members]) for name, values in last.items()},
        }
        for coefficient, members in groups.items()
    ]


def _by_coefficient(config: Any, gate: str) -> dict[float, list[int]]:
    """The indices of the members of each coefficient, in the order of the seeds."""
    groups: dict[float, list[int]] = {}
    for index, run in enumerate(runs_of(config, gate)):
        groups.setdefault(run.coefficient, []).append(index)
    return groups


def _markdown(
    config: Any, rows: list[dict[str, Any]], steps: int, gone: Sequence[dict[str, Any]] = ()
) -> str:
    examples = config.downstream.examples or "all"
    widths = "-".join(map(str, (*config.model.hidden, config.model.bottleneck)))
    lines = [
        f"# Autoencoders with gates: {config.name}",
        "",
        f"Encoders inputs-{widths} on {config.data.name}, after {steps} steps of "
        f"{config.training.batch_size} images, mean ± standard deviation over seeds "
        f"{list(config.seeds)}: open channels of {config.model.bottleneck}, mean squared error of "
        "test images with pixels from -1 to 1, and macro-F1 on test images of a classifier on the "
        f"codes of {examples} training images.",
        "",
        "| gate | lambda | open channels | of each seed | test error | macro-F1 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        found = [str(int(value)) for value in row["bottleneck"]["values"]]
        cells = (
            LABELS[row["gate"]], f"{row['coefficient']:g}", _text(row["bottleneck"], 1),
            ", ".join(found) + diverged.of_seeds(row["bottleneck"], config.seeds),
            _text(row["reconstruction"], 4), _text(row["macro_f1"], 3),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += diverged.lines(gone)
    return "\n".join(lines) + "\n"


def _text(value: dict[str, Any], digits: int) -> str:
    deviation = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{deviation}"


def _draw_training(path: Path, groups: dict[float, list[int]], log: MetricsLog) -> None:
    """How channels closed: at the end of training lines should be level."""
    steps, bottleneck = log.column("bottleneck")
    lines = {
        f"lambda = {coefficient:g}": bottleneck[:, members]
        for coefficient, members in groups.items()
    }
    figures.channels_over_training(path, steps, lines)


def _draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Fig. 5: what channels are worth, and how many a coefficient leaves."""
    named = [
        {
            "label": LABELS[row["gate"]],
            _CHANNELS: row["bottleneck"],
            _ERROR: row["reconstruction"],
            _F1: row["macro_f1"],
            _LAMBDA: {"mean": row["coefficient"], "std": None},
        }
        for row in rows
    ]
    panels = {}
    for x, y in ((_CHANNELS, _ERROR), (_CHANNELS, _F1), (_LAMBDA, _CHANNELS)):
        curves: dict[str, list[Any]] = {}
        for row in named:
            curves.setdefault(row["label"], []).append((row[x], row[y]))
        panels[x, y] = curves
    # A coefficient of zero has no place on a logarithmic axis.
    positive = all(row["coefficient"] > 0 for row in rows)
    figures.trade_offs(path, panels, (_LAMBDA,) if positive else ())
