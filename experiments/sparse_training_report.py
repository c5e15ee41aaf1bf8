"""The report of sparse training: summary.json, report.md and the figures."""

import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import diverged, figures, summaries
from experiments.published import of_settings
from experiments.sparse_training_gone import gone
from experiments.sparse_training_l0 import summarise
from experiments.sparse_training_lottery import logs_of
from experiments.sparse_training_members import Run, member_names, runs_of
from experiments.sparse_training_stages import BASELINE, EPSILONS, REGULARISERS
from experiments.statistics import correct, paired, spread
from experiments.study import asked_densities
from experiments.tables import difference, percent
from ntt_sparse.data.text import is_text
from ntt_sparse.training.metrics import MetricsLog

# Paired differences from no regulariser; those of a study are one family for each of these.
COMPARED = ("less_baseline_last", "less_baseline_best_validation", "less_baseline_bits")


def published(config: Any) -> list[dict[str, Any]]:
    """What the paper has for these settings; a coefficient of `None` is not said."""
    rows = {
        (row["density"], row["regulariser"], row["coefficient"]): row["test_accuracy_last"]
        for item in of_settings("cka_sr", config)
        if "test_accuracy_last" in item.values
        for row in item.entries()
    }
    return [
        {
            "density": density,
            "regulariser": name,
            "coefficient": coefficient,
            "test_accuracy": round(value / 100, 6),
        }
        for (density, name, coefficient), value in rows.items()
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
    runs = runs_of(config)
    left_out, out = gone(config, workdir)
    rows = _rows(logs, runs, left_out, text=is_text(config.data.name))
    for row in rows:
        row["empty_layers"] = _empty(row["kept"], list(layers))
    summary = {
        "config": summaries.settings(config),
        "layers": layers,
        "supervised": rows,
        "chosen_by_validation": _chosen(rows),
        "published": published(config),
    }
    if out:
        summary["diverged"] = out
    if gates := summarise(config, workdir):
        summary["gates"] = gates
    summaries.write(workdir, summary, _markdown(config, summary))
    _draw(config, workdir, rows, left_out)
    return summary


def _rows(
    logs: list[MetricsLog], runs: list[Run], gone: Collection[int], *, text: bool
) -> list[dict[str, Any]]:
    """One entry per regulariser, coefficient and density, compared with none at that density.

    The members of the logs together are the runs; those that are gone are in no entry. Of a text
    there are also the bits that each byte takes, the mean loss by logarithms of two.
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
    groups = diverged.left(groups, gone)
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
        reference = {runs[i].seed: i for i in groups.get((BASELINE, 0.0, density), ())}
        # Of seeds that both have.
        pairs = [(i, reference[runs[i].seed]) for i in members if runs[i].seed in reference]
        if regulariser != BASELINE and pairs:
            ours, theirs = (list(indices) for indices in zip(*pairs, strict=True))
            for name, values in compared.items():
                row[f"less_baseline_{name}"] = paired(values[ours], values[theirs])
        rows.append(row)
    for name in COMPARED:
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


def _difference(value: dict[str, Any] | None, seeds: Collection[int]) -> str:
    """A comparison, with the number of its pairs where some are missing."""
    few = "" if value is None or value["n"] == len(seeds) else f" (n = {value['n']})"
    return difference(value) + few


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
        f"on {config.probe} held-out examples; the last column is the fraction of surviving "
        f"weights below {epsilons}.",
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
            percent(row["test_accuracy_last"])
            + diverged.of_seeds(row["test_accuracy_last"], config.seeds),
            _difference(row.get("less_baseline_last"), config.seeds),
            percent(row["test_accuracy_best_validation"]),
            f"{row['similarity/cka']['mean']:.3f} / {row['similarity/cka_debiased']['mean']:.3f}",
            small,
        )
        lines.append(f"| {' | '.join(cells)} |")
    texts = [row for row in summary["supervised"] if "test_bits_last" in row]
    if texts:
        lines += ["", "Bits of a byte of the test text; less none in hundredths of a bit:", ""]
    for row in texts:
        bits = row["test_bits_last"]
        less = _difference(row.get("less_baseline_bits"), config.seeds)
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
    lines += diverged.lines(summary.get("diverged", ()))
    return "\n".join(lines) + "\n"


def _draw(config: Any, workdir: Path, rows: list[dict[str, Any]], gone: Collection[int]) -> None:
    directory = workdir / "figures"
    _draw_differences(directory, config, rows)
    with np.load(workdir / "measurements.npz", allow_pickle=False) as file:
        measured = {name: file[name] for name in file.files}
    index = {name: i for i, name in enumerate(member_names(runs_of(config)))}
    seed = config.seeds[0]
    for density in asked_densities(config):
        shown = {}
        for row in rows:
            member = Run(row["regulariser"], row["coefficient"], row["density"], seed)
            if row["density"] == density and index[member_names([member])[0]] not in gone:
                shown[label(row)] = index[member_names([member])[0]]
        if not shown:
            continue
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
        if "less_baseline_last" in row:
            point = (row["density"], row["less_baseline_last"])
            curves.setdefault(label(row), []).append(point)
    figures.paired_differences(directory / "less_baseline_against_density", curves)
    for density in asked_densities(config):
        lines: dict[str, list[tuple[float, dict[str, Any]]]] = {}
        for row in rows:
            if "less_baseline_last" in row and row["density"] == density:
                point = (row["coefficient"], row["less_baseline_last"])
                lines.setdefault(REGULARISERS[row["regulariser"]].label, []).append(point)
        name = f"less_baseline_against_coefficient_d{density!r}"
        figures.paired_differences(directory / name, lines, x="coefficient")
    accuracies: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        accuracies.setdefault(label(row), []).append((row["density"], row["test_accuracy_last"]))
    figures.accuracy_against_density(directory / "accuracy_against_density", accuracies, None)
