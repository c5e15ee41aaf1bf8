"""The report of sparse training: summary.json, report.md and the figures."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures
from experiments.sparse_training_l0 import summarise
from experiments.sparse_training_lottery import logs_of
from experiments.sparse_training_members import Run, member_names, runs_of
from experiments.sparse_training_stages import BASELINE, EPSILONS, REGULARISERS
from experiments.statistics import correct, paired, spread
from experiments.study import asked_densities
from experiments.tables import difference, percent
from ntt_sparse.data.text import is_text
from ntt_sparse.training.files import write_text
from ntt_sparse.training.metrics import MetricsLog

# Ni et al. 2023, appendix: test accuracy in percent, of single runs.
_TABLE2_COEFFICIENTS = (1e-5, 2e-5, 5e-5, 8e-5, 1e-4, 2e-4, 5e-4, 8e-4, 1e-3, 2e-3, 5e-3, 1e-2)
_TABLE2_BASELINE = 84.16
# By samples of a batch (0: all) and one batch in how many.
_TABLE2 = {
    (0, 1): "84.69 84.38 84.42 84.45 84.11 84.40 84.39 85.03 84.82 84.08 83.86 84.03",
    (16, 5): "84.06 84.52 84.44 84.90 84.59 84.59 84.42 84.61 84.40 84.61 84.71 84.17",
    (8, 5): "84.19 84.51 84.44 84.45 84.97 83.88 84.68 84.41 84.56 84.52 84.00 84.41",
    (4, 5): "84.71 84.35 84.62 84.20 83.85 84.30 84.87 84.92 84.62 84.67 84.27 76.08",
    (8, 10): "84.28 84.27 84.62 84.14 84.27 84.06 84.25 84.17 84.19 84.59 84.43 84.08",
}
_TABLE3_CCA = 84.58
# Pre-training: without, CKA-SR.
_TABLE4 = {
    ("cifar100", "resnet18"): (75.61, 76.32),
    ("cifar100", "resnet50"): (77.39, 78.94),
    ("imagenet", "resnet18"): (69.62, 69.90),
    ("imagenet", "resnet50"): (76.15, 76.39),
}
# By density: without, CKA-SR, AugCKA-SR; the coefficients are not said.
_TABLE5 = {
    0.3: (65.42, 65.60, 65.85),
    0.15: (60.37, 60.86, 60.89),
    0.1: (56.96, 57.25, 57.02),
    0.05: (47.27, 48.26, 48.39),
    0.02: (33.74, 34.44, 34.60),
    0.002: (2.95, 3.32, 3.04),
}


def published(config: Any) -> list[dict[str, Any]]:
    """What the paper has for these settings; a coefficient of `None` is not said."""
    random = (config.method, config.layer_densities) == ("random", "erk")
    if not random:
        return []
    rows: list[tuple[float, str, float | None, float]] = []
    data = Path(config.data.name).name
    if table4 := _TABLE4.get((data, config.model.name)):
        whole, regularised = table4
        rows += [(1.0, BASELINE, 0.0, whole), (1.0, "cka_sr", None, regularised)]
    small = config.model.name == "resnet20"
    if small and config.data.name == "cifar10":
        rows.append((0.05, BASELINE, 0.0, _TABLE2_BASELINE))
        values = _TABLE2.get((config.samples, config.every), "").split()
        rows += [
            (0.05, "cka_sr", coefficient, float(value))
            for coefficient, value in zip(_TABLE2_COEFFICIENTS, values, strict=False)
        ]
        rows.append((0.05, "cca_sr", None, _TABLE3_CCA))
    if small and config.data.name == "cifar100":
        for density, values in _TABLE5.items():
            names = (BASELINE, "cka_sr", "aug_cka_sr")
            rows += [
                (density, name, 0.0 if name == BASELINE else None, value)
                for name, value in zip(names, values, strict=True)
            ]
    return [
        {
            "density": density,
            "regulariser": name,
            "coefficient": coefficient,
            "test_accuracy": round(value / 100, 6),
        }
        for density, name, coefficient, value in rows
        if density in config.density and name in (BASELINE, *config.regularisers.split(","))
    ]


def write(config: Any, workdir: Path, layers: dict[str, int]) -> dict[str, Any]:
    """Writes everything from metrics and measurements alone, so that it can be repeated.

    Args:
        config: The settings.
        workdir: Where the files are.
        layers: The size of each prunable layer, by name, in the order of the masks.

    Returns:
        The summary.
    """
    logs = [MetricsLog(path, path.stem) for path in logs_of(config, workdir)]
    rows = _rows(logs, runs_of(config), text=is_text(config.data.name))
    for row in rows:
        row["empty_layers"] = _empty(row["kept"], list(layers))
    summary = {
        "config": json.loads(json.dumps(config.to_dict())),
        "layers": layers,
        "supervised": rows,
        "chosen_by_validation": _chosen(rows),
        "published": published(config),
    }
    if gates := summarise(config, workdir):
        summary["gates"] = gates
    write_text(workdir / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_text(workdir / "report.md", _markdown(config, summary))
    _draw(config, workdir, rows)
    return summary


def _rows(logs: list[MetricsLog], runs: list[Run], *, text: bool) -> list[dict[str, Any]]:
    """One entry per regulariser, coefficient and density, compared with none at that density.

    The members of the logs together are the runs. Of a text there are also the bits that each byte
    takes, the mean loss by logarithms of two.
    """

    def column(name: str) -> Any:
        return np.concatenate([log.column(name)[1] for log in logs], axis=1)

    columns = {
        name: column(name)[-1]
        for name in (
            "similarity/cka",
            "similarity/cka_debiased",
            *tuple(f"epsilon_sparsity/{epsilon!r}" for epsilon in EPSILONS),
        )
    }
    kept = column("kept")[-1]
    steps, _ = logs[0].column("validation/accuracy")
    validation, test = column("validation/accuracy"), column("test/accuracy")
    # The first record of the best validation accuracy; test accuracy is only looked up.
    best = np.argmax(validation, axis=0)
    at_best = test[best, np.arange(len(runs))]
    bits = column("test/loss")[-1] / math.log(2) if text else None
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
            "kept": np.asarray(kept)[members].astype(int).tolist(),
        }
        compared = {"last": test[-1], "best_validation": at_best}
        if bits is not None:
            row["test_bits_last"] = spread(bits[members])
            compared["bits"] = bits
        if regulariser != BASELINE:
            reference = groups[BASELINE, 0.0, density]
            for name, values in compared.items():
                row[f"less_baseline_{name}"] = paired(values[members], values[reference])
        rows.append(row)
    for name in ("less_baseline_last", "less_baseline_best_validation", "less_baseline_bits"):
        correct([row[name] for row in rows if name in row])
    return rows


def _empty(kept: list[list[int]], names: list[str]) -> dict[str, int]:
    """Layers without any weight, and in how many seeds."""
    seeds = np.sum(np.asarray(kept) == 0, axis=0).tolist()
    return {name: count for name, count in zip(names, seeds, strict=True) if count}


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


def label(row: dict[str, Any]) -> str:
    """The regulariser of an entry and its coefficient, or "none"."""
    if row["regulariser"] == BASELINE:
        return "none"
    coefficient = "not said" if row["coefficient"] is None else repr(row["coefficient"])
    return f"{REGULARISERS[row['regulariser']].label}, {coefficient}"


def _markdown(config: Any, summary: dict[str, Any]) -> str:
    epsilons = ", ".join(f"{epsilon:g}" for epsilon in EPSILONS)
    samples = config.samples or "all"
    lines = [
        f"# Sparse training: {config.name}",
        "",
        f"Masks: {config.method}, {config.layer_densities}"
        + (f", {config.rounds} rounds." if config.rounds > 1 else "."),
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
            label(row),
            percent(row["test_accuracy_last"]),
            difference(row.get("less_baseline_last")),
            percent(row["test_accuracy_best_validation"]),
            f"{row['similarity/cka']['mean']:.3f} / {row['similarity/cka_debiased']['mean']:.3f}",
            small,
        )
        lines.append(f"| {' | '.join(cells)} |")
    texts = [row for row in summary["supervised"] if "test_bits_last" in row]
    if texts:
        lines += ["", "Bits of a byte of the test text; less none in hundredths of a bit:", ""]
    for row in texts:
        bits, less = row["test_bits_last"], difference(row.get("less_baseline_bits"))
        deviation = "" if bits["std"] is None else f" ± {bits['std']:.4f}"
        lines.append(
            f"- density {row['density']!r}, {label(row)}: {bits['mean']:.4f}{deviation}"
            + (f"; {less}" if less else "")
        )
    empty = [row for row in summary["supervised"] if row["empty_layers"]]
    if empty:
        lines += ["", "Layers left without any weight, and in how many seeds:", ""]
    for row in empty:
        names = ", ".join(f"{name} ({count})" for name, count in row["empty_layers"].items())
        lines.append(f"- density {row['density']!r}, {label(row)}: {names}")
    lines += ["", "Coefficients of best mean validation accuracy after the last step:", ""]
    lines += [
        f"- density {row['density']!r}: {label(row)}"
        for row in summary["chosen_by_validation"]
        if row["regulariser"] != BASELINE
    ]
    if "gates" in summary:
        lines += [
            "",
            "What gates alone kept, before that, and test accuracy with these weights:",
            "",
        ]
    for row in summary.get("gates", ()):
        parts = 100 * np.asarray(row["kept"]) / sum(summary["layers"].values())
        lines.append(
            f"- {label(row)}: {np.mean(parts):.2f} % of the weights ({np.min(parts):.2f} to "
            f"{np.max(parts):.2f}), {percent(spread(row['test_accuracy']))}"
        )
    if summary["published"]:
        lines += ["", "Published, single runs:", ""]
    for row in summary["published"]:
        lines.append(
            f"- density {row['density']!r}: {label(row)}: {100 * row['test_accuracy']:.2f}"
        )
    return "\n".join(lines) + "\n"


def _draw(config: Any, workdir: Path, rows: list[dict[str, Any]]) -> None:
    directory = workdir / "figures"
    _draw_differences(directory, config, rows)
    with np.load(workdir / "measurements.npz", allow_pickle=False) as file:
        measured = {name: file[name] for name in file.files}
    index = {name: i for i, name in enumerate(member_names(runs_of(config)))}
    seed = config.seeds[0]
    for density in asked_densities(config):
        shown = {
            label(row): index[
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
            curves.setdefault(label(row), []).append(point)
    figures.paired_differences(directory / "less_baseline_against_density", curves)
    for density in asked_densities(config):
        lines: dict[str, list[tuple[float, dict[str, Any]]]] = {}
        for row in rows:
            if row["regulariser"] != BASELINE and row["density"] == density:
                point = (row["coefficient"], row["less_baseline_last"])
                lines.setdefault(REGULARISERS[row["regulariser"]].label, []).append(point)
        name = f"less_baseline_against_coefficient_d{density!r}"
        figures.paired_differences(directory / name, lines, x="coefficient")
    accuracies: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        accuracies.setdefault(label(row), []).append((row["density"], row["test_accuracy_last"]))
    figures.accuracy_against_density(directory / "accuracy_against_density", accuracies, None)
