"""The report of the DAM graph study: summary.json, report.md and the figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import diverged, figures, summaries
from experiments.dam_graph_members import (
    Run,
    gated_runs,
    label,
    member_names,
    plain_runs,
    plain_sizes,
)
from experiments.statistics import correct, paired, spread
from experiments.tables import difference, percent
from ntt_sparse.training.metrics import MetricsLog

_QUANTITIES = ("dimensions", "test_auc", "test_ap", "validation_auc", "validation_ap")
_COMPARED = ("test_auc", "test_ap")
_BASELINES = ("equal", "whole")
_SIZE, _AUC, _AP, _LAMBDA = "embedding size", "test AUC", "test AP", "lambda"


def write(config: Any, workdir: Path) -> dict[str, Any]:
    """Writes everything from the metrics files alone, so that it can be repeated.

    Returns:
        The summary.
    """
    log, runs = MetricsLog(workdir / "dam.jsonl", "dam"), gated_runs(config)
    out = [diverged.gone(workdir, "dam", member_names(True, runs))]
    groups = diverged.left(_groups(runs), out[0])
    rows = _rows("dam", runs, groups, log)
    ended = [size for row in rows for size in row["dimensions"]["values"]]
    for size in plain_sizes(config, ended):
        stage, plain = f"gae{size}", plain_runs(config, size)
        out.append(diverged.gone(workdir, stage, member_names(False, plain)))
        plain_log = MetricsLog(workdir / f"{stage}.jsonl", stage)
        rows += _rows("gae", plain, diverged.left(_groups(plain), out[-1]), plain_log)
    comparisons = _comparisons(config, rows)
    summary = {
        "config": summaries.settings(config),
        "networks": rows,
        "comparisons": comparisons,
    }
    gone = diverged.rows(*out)
    if gone:
        summary["diverged"] = gone
    steps, dimensions = log.column("dimensions")
    summaries.write(workdir, summary, _markdown(config, rows, comparisons, int(steps[-1]), gone))
    _draw(workdir / "figures" / "link_prediction", config, rows)
    _draw_training(workdir / "figures" / "dimensions", groups, steps, dimensions)
    return summary


def _rows(
    method: str, runs: list[Run], groups: dict[tuple[int, float], list[int]], log: MetricsLog
) -> list[dict[str, Any]]:
    """One entry per coefficient and size, over its seeds: values after the last step."""
    last = {name: log.column(name)[1][-1] for name in _QUANTITIES}
    return [
        {
            "method": method,
            "size": runs[members[0]].size,
            "coefficient": runs[members[0]].coefficient,
            "seeds": [runs[index].seed for index in members],
            **{name: spread(values[members]) for name, values in last.items()},
        }
        for members in groups.values()
    ]


def _groups(runs: list[Run]) -> dict[tuple[int, float], list[int]]:
    """The indices of the networks that differ by seed alone, in the order of the seeds."""
    groups: dict[tuple[int, float], list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault((run.size, run.coefficient), []).append(index)
    return groups


def _comparisons(config: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Networks with gates less plain ones of the same seeds, for each coefficient.

    The plain ones are those of equal embedding sizes, seed by seed, and those of the whole size.
    """
    plain = {row["size"]: row for row in rows if row["method"] == "gae"}
    compared = []
    for row in (row for row in rows if row["method"] == "dam"):
        ended = [int(size) for size in row["dimensions"]["values"]]
        sizes = {"equal": ended, "whole": [config.model.bottleneck] * len(ended)}
        seeds = row["seeds"]
        for baseline, name in ((baseline, name) for baseline in _BASELINES for name in _COMPARED):
            against = _plain_values(plain, sizes[baseline], seeds, name)
            there = np.isfinite(against)
            if there.any():
                values = np.array(row[name]["values"])
                compared.append({
                    "coefficient": row["coefficient"],
                    "quantity": name,
                    "baseline": baseline,
                    "seeds": [seed for seed, one in zip(seeds, there, strict=True) if one],
                    **paired(values[there], against[there]),
                })  # fmt: skip
    # One family for each quantity.
    for name in _COMPARED:
        correct([comparison for comparison in compared if comparison["quantity"] == name])
    return compared


def _plain_values(
    plain: dict[int, dict[str, Any]], sizes: list[int], seeds: list[int], name: str
) -> Float[np.ndarray, " seeds"]:
    """Of plain networks of a size for each seed; NaN where there is none."""
    found = {
        (size, seed): value
        for size, row in plain.items()
        for seed, value in zip(row["seeds"], row[name]["values"], strict=True)
    }
    return np.array([found.get(pair, np.nan) for pair in zip(sizes, seeds, strict=True)])


def _markdown(
    config: Any,
    rows: list[dict[str, Any]],
    comparisons: list[dict[str, Any]],
    steps: int,
    gone: Sequence[dict[str, Any]] = (),
) -> str:
    kind = "Variational graph" if config.model.variational else "Graph"
    gated, plain = label(config, True), label(config, False)
    whole = config.model.bottleneck
    lines = [
        f"# {kind} autoencoders with gates: {config.name}",
        "",
        f"Links of {config.data.name}, after {steps} steps on the whole graph, mean ± standard "
        f"deviation over seeds {list(config.seeds)}, each with a split of its own: numbers of a "
        f"code that are not closed, of {whole} at the start, and how well held-out links are told "
        "from as many other pairs (%).",
        "",
        "| network | lambda | embedding size | of each seed | test AUC | test AP "
        "| validation AUC |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        dimensions = row["dimensions"]
        deviation = "" if dimensions["std"] is None else f" ± {dimensions['std']:.1f}"
        cells = (
            label(config, row["method"] == "dam"),
            f"{row['coefficient']:g}" if row["method"] == "dam" else "",
            f"{dimensions['mean']:.1f}{deviation}",
            ", ".join(str(int(value)) for value in dimensions["values"])
            + diverged.of_seeds(dimensions, config.seeds),
            *(percent(row[name]) for name in ("test_auc", "test_ap", "validation_auc")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{gated} less {plain}, seed by seed, in points, with the 95 % interval, and p (corrected "
        "by Holm over the comparisons of AUC, or of AP): of equal embedding sizes, and of "
        f"{whole}. A seed whose code is closed has none of equal size.",
        "",
        f"| lambda | seeds | AUC, equal sizes | AP, equal sizes | AUC, {whole} | AP, {whole} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    keys = ("coefficient", "baseline", "quantity")
    by_key = {tuple(found[key] for key in keys): found for found in comparisons}
    for coefficient in config.coefficients:
        cells = [
            by_key.get((coefficient, baseline, name))
            for baseline in _BASELINES
            for name in _COMPARED
        ]
        seeds = "" if cells[0] is None else str(cells[0]["n"])
        lines.append(f"| {' | '.join([f'{coefficient:g}', seeds, *map(difference, cells)])} |")
    lines += diverged.lines(gone)
    return "\n".join(lines) + "\n"


def _draw(path: Path, config: Any, rows: list[dict[str, Any]]) -> None:
    """Fig. 4: what is predicted from how many numbers, and how many a coefficient leaves."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        curves.setdefault(label(config, row["method"] == "dam"), []).append({
            _SIZE: row["dimensions"],
            _AUC: row["test_auc"],
            _AP: row["test_ap"],
            _LAMBDA: {"mean": row["coefficient"], "std": None},
        })  # fmt: skip
    # From a code that is closed nothing is predicted.
    coded = {
        name: [point for point in points if point[_SIZE]["mean"] > 0]
        for name, points in curves.items()
    }
    gated = label(config, True)
    panels = {
        (x, y): {name: [(p[x], p[y]) for p in points] for name, points in chosen.items() if points}
        for x, y, chosen in (
            (_SIZE, _AUC, coded),
            (_SIZE, _AP, coded),
            (_LAMBDA, _SIZE, {gated: curves[gated]}),
        )
    }
    # A coefficient of zero has no place on a logarithmic axis.
    positive = all(row["coefficient"] > 0 for row in rows if row["method"] == "dam")
    figures.trade_offs(path, panels, (_LAMBDA,) if positive else ())


def _draw_training(
    path: Path,
    groups: dict[tuple[int, float], list[int]],
    steps: np.ndarray,
    dimensions: Float[np.ndarray, "r members"],
) -> None:
    """How dimensions closed: at the end of training lines should be level."""
    lines = {
        f"lambda = {coefficient:g}": dimensions[:, members]
        for (_, coefficient), members in groups.items()
    }
    figures.channels_over_training(path, steps, lines)
