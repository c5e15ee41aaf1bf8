"""The report of the CKA-SR study: summary.json, report.md and the figures."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures
from experiments.cka_sr_members import Run, member_names, runs_of
from experiments.cka_sr_stages import BASELINE, EPSILONS, REGULARISERS
from experiments.statistics import holm, paired, spread
from ntt_sparse.training.files import write_text
from ntt_sparse.training.metrics import MetricsLog

# Ni et al. 2023, appendix: test accuracy of single runs, by data, model, density, regulariser.
_PUBLISHED = {
    ("cifar10", "resnet20"): {
        0.05: {BASELINE: 0.8416, "cka_sr": 0.8503, "cca_sr": 0.8458},
    },
    ("cifar100", "resnet20"): {
        0.3: {BASELINE: 0.6542, "cka_sr": 0.6560, "aug_cka_sr": 0.6585},
        0.15: {BASELINE: 0.6037, "cka_sr": 0.6086, "aug_cka_sr": 0.6089},
        0.1: {BASELINE: 0.5696, "cka_sr": 0.5725, "aug_cka_sr": 0.5702},
        0.05: {BASELINE: 0.4727, "cka_sr": 0.4826, "aug_cka_sr": 0.4839},
        0.02: {BASELINE: 0.3374, "cka_sr": 0.3444, "aug_cka_sr": 0.3460},
        0.002: {BASELINE: 0.0295, "cka_sr": 0.0332, "aug_cka_sr": 0.0304},
    },
}


def write(config: Any, workdir: Path) -> dict[str, Any]:
    """Writes everything from metrics and measurements alone, so that it can be repeated.

    Returns:
        The summary.
    """
    log = MetricsLog(workdir / "supervised.jsonl", "supervised")
    rows = _rows(log, runs_of(config))
    summary = {
        "config": json.loads(json.dumps(config.to_dict())),
        "supervised": rows,
        "chosen_by_validation": _chosen(rows),
        "published": _PUBLISHED.get((config.data.name, config.model.name), {}),
    }
    write_text(workdir / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_text(workdir / "report.md", _markdown(config, summary))
    _draw(config, workdir, rows)
    return summary


def _rows(log: MetricsLog, runs: list[Run]) -> list[dict[str, Any]]:
    """One entry per regulariser, coefficient and density, compared with none at that density."""
    columns = {
        name: log.column(name)[1][-1]
        for name in (
            "similarity/cka",
            "similarity/cka_debiased",
            *tuple(f"epsilon_sparsity/{epsilon!r}" for epsilon in EPSILONS),
        )
    }
    steps, validation = log.column("validation/accuracy")
    _, test = log.column("test/accuracy")
    # The first record of the best validation accuracy; test accuracy is only looked up.
    best = np.argmax(validation, axis=0)
    at_best = test[best, np.arange(len(runs))]
    groups: dict[tuple[str, float, float], list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault((run.regulariser, run.coefficient, run.density), []).append(index)
    rows = []
    for (regulariser, coefficient, density), members in groups.items():
        row: dict[str, Any] = {
            "regulariser": regulariser,
            "coefficient": coefficient,
            "density": density,
            "seeds": [runs[i].seed for i in members],
            "test_accuracy_last": spread(test[-1, members]),
            "test_accuracy_best_validation": spread(at_best[members]),
            "best_validation_step": steps[best[members]].tolist(),
            "validation_accuracy_last": spread(validation[-1, members]),
            **{name: spread(values[members]) for name, values in columns.items()},
        }
        if regulariser != BASELINE:
            reference = groups[BASELINE, 0.0, density]
            for name, values in (("last", test[-1]), ("best_validation", at_best)):
                row[f"less_baseline_{name}"] = paired(values[members], values[reference])
        rows.append(row)
    _correct(rows)
    return rows


def _correct(rows: list[dict[str, Any]]) -> None:
    """Adds p-values corrected for the number of comparisons in the study."""
    for name in ("less_baseline_last", "less_baseline_best_validation"):
        compared = [row[name] for row in rows if name in row]
        corrected = holm([comparison["p_value"] for comparison in compared])
        for comparison, p_value in zip(compared, corrected, strict=True):
            comparison["p_value_holm"] = p_value


def _chosen(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each regulariser and density the coefficient of best mean validation accuracy."""
    best: dict[tuple[str, float], dict[str, Any]] = {}
    for row in rows:
        key = (row["regulariser"], row["density"])
        score = row["validation_accuracy_last"]["mean"]
        if key not in best or score > best[key]["validation_accuracy_last"]["mean"]:
            best[key] = row
    return [
        {name: row[name] for name in ("regulariser", "density", "coefficient")}
        for row in best.values()
    ]


def _label(row: dict[str, Any]) -> str:
    if row["regulariser"] == BASELINE:
        return "none"
    return f"{REGULARISERS[row['regulariser']].label}, {row['coefficient']!r}"


def _percent(value: dict[str, Any]) -> str:
    deviation = "" if value["std"] is None else f" ± {100 * value['std']:.2f}"
    return f"{100 * value['mean']:.2f}{deviation}"


def _difference(row: dict[str, Any]) -> str:
    value = row.get("less_baseline_last")
    if value is None:
        return ""
    text = f"{100 * value['mean']:+.2f}"
    if value["low"] is None:
        return text
    return (
        f"{text} [{100 * value['low']:+.2f}, {100 * value['high']:+.2f}], "
        f"p = {value['p_value']:.2g} ({value['p_value_holm']:.2g})"
    )


def _markdown(config: Any, summary: dict[str, Any]) -> str:
    epsilons = ", ".join(f"{epsilon:g}" for epsilon in EPSILONS)
    samples = config.samples or "all"
    lines = [
        f"# CKA-SR in random sparse training: {config.name}",
        "",
        f"Test accuracy in percent after the last step, mean ± standard deviation over seeds "
        f"{list(config.seeds)}; less that of the same seeds without a regulariser, with its 95 % "
        "confidence interval and the p-value of a paired t-test (in parentheses corrected for all "
        f"comparisons of this study by Holm's method). {samples} samples of one batch in "
        f"{config.every}. Similarity is the mean CKA between different layers, biased / debiased, "
        f"on {config.probe} held-out images; the last column is the fraction of surviving weights "
        f"below {epsilons}.",
        "",
        "| density | regulariser, coefficient | accuracy | less none | best validation "
        "| similarity | small weights |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in summary["supervised"]:
        small = ", ".join(f"{row[f'epsilon_sparsity/{e!r}']['mean']:.3f}" for e in EPSILONS)
        cells = (
            f"{row['density']!r}",
            _label(row),
            _percent(row["test_accuracy_last"]),
            _difference(row),
            _percent(row["test_accuracy_best_validation"]),
            f"{row['similarity/cka']['mean']:.3f} / {row['similarity/cka_debiased']['mean']:.3f}",
            small,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Coefficients of best mean validation accuracy after the last step:", ""]
    lines += [
        f"- density {row['density']!r}: {_label(row)}"
        for row in summary["chosen_by_validation"]
        if row["regulariser"] != BASELINE
    ]
    for density, values in summary["published"].items():
        parts = [f"{name} {100 * value:.2f}" for name, value in values.items()]
        lines += ["", f"Published (single runs) at density {density:g}: {', '.join(parts)}."]
    return "\n".join(lines) + "\n"


def _draw(config: Any, workdir: Path, rows: list[dict[str, Any]]) -> None:
    directory = workdir / "figures"
    _draw_differences(directory, config, rows)
    with np.load(workdir / "measurements.npz", allow_pickle=False) as file:
        measured = {name: file[name] for name in file.files}
    index = {name: i for i, name in enumerate(member_names(runs_of(config)))}
    seed = config.seeds[0]
    for density in config.density:
        shown = {
            _label(row): index[
                member_names([Run(row["regulariser"], row["coefficient"], density, seed)])[0]
            ]
            for row in rows
            if row["density"] == density
        }
        for name in ("cka", "cka_debiased"):
            figures.heat_maps(
                directory / f"{name}_d{density!r}_s{seed}",
                {label: measured[name][i] for label, i in shown.items()},
            )
        figures.histograms(
            directory / f"weights_d{density!r}_s{seed}",
            measured["edges"],
            {label: measured["counts"][i] for label, i in shown.items()},
        )


def _draw_differences(directory: Path, config: Any, rows: Iterable[dict[str, Any]]) -> None:
    """The gain of each regulariser and coefficient, against density."""
    curves: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        if row["regulariser"] != BASELINE:
            point = (row["density"], row["less_baseline_last"])
            curves.setdefault(_label(row), []).append(point)
    figures.difference_against_density(directory / "less_baseline_against_density", curves)
    accuracies: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        accuracies.setdefault(_label(row), []).append((row["density"], row["test_accuracy_last"]))
    figures.accuracy_against_density(directory / "accuracy_against_density", accuracies, None)
