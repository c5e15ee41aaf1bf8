"""The report of the study: summary.json, report.md and the figures."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from experiments import diverged, figures, summaries
from experiments.ntt_members import METHODS, Run, member_names, supervised_runs, transfer_runs
from experiments.published import of_settings
from experiments.statistics import spread
from experiments.study import asked_densities
from experiments.tables import percent
from ntt_sparse.training.metrics import MetricsLog


def write(config: Any, workdir: Path) -> dict[str, Any]:
    """Writes everything from the metrics files alone, so that it can be repeated.

    Returns:
        The summary.
    """
    supervised = MetricsLog(workdir / "supervised.jsonl", "supervised")
    runs = supervised_runs(config)
    students, out = gone(config, workdir)
    summary = {
        "config": summaries.settings(config),
        "supervised": _supervised_summary(supervised, runs, out),
    }
    if students or out:
        summary["diverged"] = diverged.rows(students, out)
    transfer = None
    if "ntt" in config.methods.split(","):
        transfer = MetricsLog(workdir / "transfer.jsonl", "transfer")
        summary["transfer"] = _transfer_summary(transfer, transfer_runs(config), students)
    summary["published"] = _published(config)
    summaries.write(workdir, summary, _markdown(config, summary))
    _draw(config, workdir / "figures", summary, transfer, supervised, students, out)
    return summary


def gone(config: Any, workdir: Path) -> tuple[diverged.Gone, diverged.Gone]:
    """Students that diverged in the transfer, and networks of the supervised stage.

    A network whose student has diverged is gone as well.
    """
    runs, students = supervised_runs(config), transfer_runs(config)
    before: diverged.Gone = {}
    if "ntt" in config.methods.split(","):
        before = diverged.gone(workdir, "transfer", member_names(students))
    places = {run: index for index, run in enumerate(students)}
    names = member_names(runs)
    heirs = diverged.heirs(names, [places.get(run) for run in runs], before)
    return before, diverged.gone(workdir, "supervised", names, heirs)


def _published(config: Any) -> list[dict[str, Any]]:
    """What the authors' notebooks have of these settings: an entry for each density."""
    found: dict[float, dict[str, Any]] = {}
    for item in of_settings("ntt", config):
        for row in item.entries():
            if row["density"] in asked_densities(config):
                entry = found.setdefault(row["density"], {"density": row["density"]})
                entry[row["method"]] = round(row["test_accuracy_last"] / 100, 6)
                for name in ("loss_before", "loss_after"):
                    if row.get(name) is not None:
                        entry[name] = row[name]
    return list(found.values())


def _groups(runs: list[Run]) -> dict[tuple[str, float], list[int]]:
    """Indices of the members of each method and density."""
    groups: dict[tuple[str, float], list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault((run.method, run.density), []).append(index)
    return groups


def _supervised_summary(
    log: MetricsLog, runs: list[Run], gone: Collection[int]
) -> list[dict[str, Any]]:
    steps, validation = log.column("validation/accuracy")
    _, test = log.column("test/accuracy")
    _, train = log.column("train/task/accuracy")
    # The first record of the best validation accuracy; test accuracy is only looked up.
    best = np.argmax(validation, axis=0)
    everyone = np.arange(len(runs))
    return [
        {
            "method": method,
            "density": density,
            "seeds": [runs[index].seed for index in members],
            "test_accuracy_last": spread(test[-1, members]),
            "test_accuracy_best_validation": spread(test[best, everyone][members]),
            "best_validation_step": steps[best[members]].tolist(),
            "train_accuracy_since_last_record": spread(train[-1, members]),
        }
        for (method, density), members in diverged.left(_groups(runs), gone).items()
    ]


def _transfer_summary(
    log: MetricsLog, runs: list[Run], gone: Collection[int]
) -> list[dict[str, Any]]:
    rows = []
    for (_, density), members in diverged.left(_groups(runs), gone).items():
        row: dict[str, Any] = {"density": density, "seeds": [runs[i].seed for i in members]}
        for term in ("loss", "kernel", "output", "l2"):
            _, values = log.column(f"validation/{term}")
            row[f"{term}_before"] = spread(values[0, members])
            row[f"{term}_after"] = spread(values[-1, members])
        rows.append(row)
    return rows


def _markdown(config: Any, summary: dict[str, Any]) -> str:
    held_out = config.supervised.validation_fraction
    lines = [
        f"# Neural Tangent Transfer: {config.name}",
        "",
        f"Test accuracy in percent, mean ± standard deviation over seeds {list(config.seeds)}; "
        "after the last step, and at the step of best validation accuracy."
        + ("" if held_out else " Nothing was held out for validation."),
        "",
        "| method | density | last | best validation |",
        "| --- | --- | --- | --- |",
    ]
    for row in summary["supervised"]:
        last, best = row["test_accuracy_last"], row["test_accuracy_best_validation"]
        label = METHODS[row["method"]].label
        fewer = diverged.of_seeds(last, config.seeds)
        lines.append(
            f"| {label} | {row['density']!r} | {percent(last)}{fewer} | {percent(best)}{fewer} |"
        )
    if "transfer" in summary:
        lines += [
            "",
            f'Transfer objective on held-out inputs (wrt="{config.transfer.wrt}"), before → after:',
            "",
            "| density | loss | kernel | output | l2 |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in summary["transfer"]:
            cells = [
                f"{row[f'{term}_before']['mean']:.4g} → {row[f'{term}_after']['mean']:.4g}"
                for term in ("loss", "kernel", "output", "l2")
            ]
            cells[0] += diverged.of_seeds(row["loss_after"], config.seeds)
            lines.append(f"| {row['density']!r} | {' | '.join(cells)} |")
    for row in summary["published"]:
        parts = [
            f"{METHODS[name].label} {100 * row[name]:.2f} %"
            for name in ("ntt", "random")
            if name in row
        ]
        if "loss_before" in row:
            parts.append(f"loss {row['loss_before']} → {row['loss_after']}")
        lines += ["", f'Published (wrt="all") at density {row["density"]:g}: {", ".join(parts)}.']
    lines += diverged.lines(summary.get("diverged", ()))
    return "\n".join(lines) + "\n"


def _draw(
    config: Any,
    directory: Path,
    summary: dict[str, Any],
    transfer: MetricsLog | None,
    supervised: MetricsLog,
    students: Collection[int],
    gone: Collection[int],
) -> None:
    runs = supervised_runs(config)
    rows = summary["supervised"]
    curves = {
        METHODS[method].label: [
            (row["density"], row["test_accuracy_last"]) for row in rows if row["method"] == method
        ]
        for method in config.methods.split(",")
    }
    dense = METHODS["dense"].label
    # Without methods of which every member diverged.
    curves = {label: points for label, points in curves.items() if points}
    figures.accuracy_against_density(directory / "accuracy_against_density", curves, dense)
    steps, accuracy = supervised.column("test/accuracy")
    groups = diverged.left(_groups(runs), gone)
    for density in asked_densities(config):
        lines = {
            METHODS[method].label: accuracy[:, members]
            for (method, group_density), members in groups.items()
            if group_density == density or method == "dense"
        }
        name = f"accuracy_over_training_d{density!r}"
        figures.accuracy_over_training(directory / name, steps, lines, f"density {density!r}")
    if transfer is not None:
        members = diverged.left(_groups(transfer_runs(config)), students)
        terms = {}
        for term in ("loss", "kernel", "output", "l2"):
            steps, values = transfer.column(f"validation/{term}")
            terms[term] = {f"density {d!r}": values[:, i] for (_, d), i in members.items()}
        figures.transfer_terms(directory / "transfer_terms", steps, terms)
    if config.probe:
        steps, outputs = supervised.column("outputs")
        named = dict(zip(member_names(runs), np.moveaxis(outputs, 1, 0), strict=True))
        for density in asked_densities(config):
            for seed in config.seeds:
                shown = {
                    label: named[member_names([Run(method, d, seed)])[0]]
                    for label, method, d in (
                        ("teacher (dense)", "dense", 1.0),
                        ("NTT student", "ntt", density),
                        ("random sparse", "random", density),
                    )
                    if Run(method, d, seed) in runs and runs.index(Run(method, d, seed)) not in gone
                }
                if not shown:
                    continue
                path = directory / f"output_evolution_d{density!r}_s{seed}"
                figures.output_evolution(path, steps, shown)
