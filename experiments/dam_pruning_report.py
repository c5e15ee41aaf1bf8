"""The report of the structured pruning study: summary.json, report.md and the figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import diverged, figures, summaries
from experiments.dam_pruning_members import runs_of
from experiments.dam_pruning_published import Published, published, similarities
from experiments.dam_pruning_stages import Stage, gone
from experiments.stage import seconds_per_step
from experiments.statistics import correct, paired, spread
from experiments.tables import difference, percent
from ntt_sparse.gates.channels import Counts
from ntt_sparse.training.metrics import MetricsLog

_COUNTS = Counts._fields
_AXES = ("parameters left", "test accuracy (%)")
_SETTING = ("coefficient", "target", "order", "cka_sr")


def write(config: Any, workdir: Path, whole: Counts, stages: Sequence[Stage]) -> dict[str, Any]:
    """Writes everything from metrics and measurements alone, so that it can be repeated.

    Args:
        config: The settings.
        workdir: Where the files are.
        whole: What the network costs with all channels open.
        stages: Those of the study; the last one is what is reported.

    Returns:
        The summary.
    """
    logs = {stage.name: MetricsLog(workdir / f"{stage.name}.jsonl", stage.name) for stage in stages}
    log = logs[stages[-1].name]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, run in enumerate(runs_of(config)):
        groups.setdefault(run[:-1], []).append(index)
    out = gone(config, stages, workdir)
    groups = diverged.left(groups, out)
    rows = _rows(config, log, groups, whole)
    matrices = []
    if config.similarity:
        matrices = _add_similarity(workdir / "similarities.npz", groups, rows)
    summary = {
        "config": summaries.settings(config),
        "whole": whole._asdict(),
        "stages": [
            {
                "name": stage.name,
                "steps": stage.plan.total_steps,
                "seconds": _seconds(workdir, stage),
            }
            for stage in stages
        ],
        "networks": rows,
        "published": [row._asdict() for row in published(config)],
    }
    if out:
        summary["diverged"] = diverged.rows(out)
    summaries.write(workdir, summary, _markdown(config, workdir, summary))
    _draw(config, workdir, log, groups, rows)
    if len(stages) > 1:
        _draw_stages(config, workdir, logs, groups)
    labelled = {
        _label(config, setting): matrix for setting, matrix in zip(groups, matrices, strict=False)
    }
    if labelled := {label: matrix for label, matrix in labelled.items() if matrix.size}:
        figures.heat_maps(workdir / "figures" / "channel_similarity", labelled, axis="channel")
    return summary


def _rows(
    config: Any, log: MetricsLog, groups: dict[tuple[Any, ...], list[int]], whole: Counts
) -> list[dict[str, Any]]:
    """One entry per setting, over its seeds, of the last step and of the best validation."""
    names = (*_COUNTS, "test/accuracy", "validation/accuracy", "widths")
    columns = {name: log.column(name)[1] for name in names}
    last = {name: column[-1] for name, column in columns.items()}
    # The first record of the best validation accuracy; the rest is only looked up there.
    best = np.argmax(columns["validation/accuracy"], axis=0)
    at_best = {
        name: columns[name][best, np.arange(len(best))] for name in ("test/accuracy", "parameters")
    }
    offsets = config.gate == "dam" and config.budget
    if offsets:
        last["reached"] = log.column("reached")[1][-1]
    rows = []
    for setting, members in groups.items():
        rows.append({
            **dict(zip(_SETTING, setting, strict=True)),
            "seeds": [runs_of(config)[index].seed for index in members],
            **({"reached": int(np.sum(last["reached"][members]))} if offsets else {}),
            "test_accuracy": spread(last["test/accuracy"][members]),
            "test_accuracy_best_validation": spread(at_best["test/accuracy"][members]),
            "parameters_best_validation": spread(at_best["parameters"][members]),
            "validation_accuracy": spread(last["validation/accuracy"][members]),
            **{name: spread(last[name][members]) for name in _COUNTS},
            **{
                f"pruned_{name}": spread(1 - last[name][members] / getattr(whole, name))
                for name in _COUNTS
            },
            "widths": np.asarray(last["widths"])[members].astype(int).tolist(),
        })  # fmt: skip
        without = groups.get((*setting[:-1], 0.0))
        if setting[-1] and without is not None:
            baseline = {
                "seeds": [runs_of(config)[index].seed for index in without],
                "test_accuracy": spread(last["test/accuracy"][without]),
            }
            ours, theirs = diverged.pairs(rows[-1], baseline, "test_accuracy")
            if ours:
                rows[-1]["less_baseline_last"] = paired(ours, theirs)
    correct([row["less_baseline_last"] for row in rows if "less_baseline_last" in row])
    return rows


def _add_similarity(
    path: Path, groups: dict[tuple[Any, ...], list[int]], rows: list[dict[str, Any]]
) -> list[np.ndarray]:
    """Adds mean, spread and maximum of the similarity between different channels (Table 7).

    Returns:
        The matrix of the first seed of each setting.
    """
    with np.load(path, allow_pickle=False) as arrays:
        cka, used = arrays["cka"], arrays["used"]
    matrices = [each[np.ix_(places, places)] for each, places in zip(cka, used, strict=True)]
    for row, members in zip(rows, groups.values(), strict=True):
        values = [matrices[index] for index in members]
        values = [matrix[~np.eye(len(matrix), dtype=bool)] for matrix in values]
        # With one channel or none there is nothing to compare.
        values = [each for each in values if each.size]
        row["channel_similarity"] = {
            name: spread([float(measure(each)) for each in values]) if values else None
            for name, measure in (("mean", np.mean), ("std", np.std), ("max", np.max))
        }
    return [matrices[members[0]] for members in groups.values()]


def _seconds(workdir: Path, stage: Stage) -> float | None:
    seconds = seconds_per_step(workdir, stage.name) * stage.plan.total_steps
    return round(seconds, 1) if np.isfinite(seconds) else None


def _markdown(config: Any, workdir: Path, summary: dict[str, Any]) -> str:
    whole, rows = summary["whole"], summary["networks"]
    regularised = any(config.cka_sr.coefficients)
    names = (
        "lambda", "target, reached" if "reached" in rows[0] else "target", "order",
        *(("CKA-SR", "less without") if regularised else ()),
        "accuracy (%)", "parameters", "pruned parameters (%)", "pruned channels (%)",
        "pruned multiply-adds (%)", "best: accuracy (%)", "parameters",
    )  # fmt: skip

    def add(row: dict[str, Any]) -> tuple[str, str]:
        return f"{row['cka_sr']:g}", difference(row.get("less_baseline_last"))

    lines = [
        f"# Structured pruning with gates: {config.name}",
        "",
        f"{config.model.name}: {whole['channels']:,} gated channels, {whole['parameters']:,} "
        f"parameters, {whole['multiply_adds']:,} multiply-adds. Means and standard deviations "
        f"over seeds {list(config.seeds)}, after the last step, and accuracy and parameters at "
        "the step of best validation accuracy; nothing is chosen by the test set. A parameter "
        "counts while something computed from the input reaches the output through it.",
        "",
        f"| {' | '.join(names)} |",
        "| --- " * len(names) + "|",
    ]
    for row in rows:
        cells = (
            f"{row['coefficient']:g}",
            _target(config, row),
            str(row["order"]),
            *(add(row) if regularised else ()),
            percent(row["test_accuracy"]) + diverged.of_seeds(row["test_accuracy"], config.seeds),
            f"{row['parameters']['mean']:,.0f}",
            *(percent(row[f"pruned_{name}"]) for name in ("parameters", "channels")),
            percent(row["pruned_multiply_adds"]),
            percent(row["test_accuracy_best_validation"]),
            f"{row['parameters_best_validation']['mean']:,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    if len(summary["stages"]) > 1:
        lines += _stage_lines(summary["stages"], len(runs_of(config)))
    if (workdir / "compact.json").exists():
        lines += _compact_lines(config, json.loads((workdir / "compact.json").read_text()))
    if summary["published"]:
        lines += _published_lines(summary["published"])
    if config.similarity:
        lines += _similarity_lines(config, summary["networks"])
    lines += diverged.lines(summary.get("diverged", ()))
    return "\n".join(lines) + "\n"


def _target(config: Any, row: dict[str, Any]) -> str:
    if not config.budget:
        return ""
    reached = f", {row['reached']}/{len(row['seeds'])}" if "reached" in row else ""
    return f"{row['target']:g}{reached}"


def _in_percent(value: dict[str, Any]) -> dict[str, Any]:
    return {name: value[name] and 100 * value[name] for name in ("mean", "std")}


def _published_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "Published (Bu et al. 2021):",
        "",
        "| lambda | accuracy (%) | parameters | pruned parameters (%) | pruned channels (%) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in (Published(**each) for each in rows):
        known = (row.parameters, row.pruned_parameters, row.pruned_channels)
        formats = (",.0f", ".2f", ".2f")
        cells = [f"{row.coefficient:g}", f"{row.accuracy:.2f}"]
        cells += [
            "" if value is None else format(value, spec)
            for value, spec in zip(known, formats, strict=True)
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _similarity_lines(config: Any, rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        f"Linear CKA between the maps of different channels of {config.similarity}, on "
        f"{config.probe} held-out images:",
        "",
        "| network | mean | standard deviation | maximum |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        values = row["channel_similarity"].values()
        cells = [_label(config, tuple(row[name] for name in _SETTING))]
        cells += ["" if value is None else f"{value['mean']:.3f}" for value in values]
        lines.append(f"| {' | '.join(cells)} |")
    if (config.model.name, config.data.name) == ("preresnet164", "cifar10"):
        lines += ["", f"Published (Table 7): {similarities()}."]
    return lines


def _draw(
    config: Any,
    workdir: Path,
    log: MetricsLog,
    groups: dict[tuple[Any, ...], list[int]],
    rows: list[dict[str, Any]],
) -> None:
    directory = workdir / "figures"
    ours: dict[str, list[Any]] = {}
    for row in rows:
        name = f"ours, CKA-SR {row['cka_sr']:g}" if row["cka_sr"] else "ours"
        point = (row["parameters"], _in_percent(row["test_accuracy"]))
        ours.setdefault(name, []).append(point)
    theirs = [
        ({"mean": row.parameters, "std": None}, {"mean": row.accuracy, "std": None})
        for row in published(config)
        if row.parameters is not None
    ]
    figures.trade_offs(
        directory / "accuracy_against_parameters",
        {_AXES: ours | ({"published": theirs} if theirs else {})},
        logarithmic=_AXES[:1],
    )
    labels = {setting: _label(config, setting) for setting in groups}
    steps, opened = log.column("channels")
    figures.channels_over_training(
        directory / "channels_over_training",
        steps,
        {labels[setting]: opened[:, members] for setting, members in groups.items()},
    )
    figures.layer_widths(
        directory / "layer_widths",
        {
            labels[setting]: np.mean(row["widths"], axis=0)
            for setting, row in zip(groups, rows, strict=True)
        },
    )


def _stage_lines(stages: list[dict[str, Any]], networks: int) -> list[str]:
    lines = [
        "",
        f"Stages, of all {networks} networks together, compiling and records included:",
        "",
        "| stage | steps | seconds |",
        "| --- | --- | --- |",
    ]
    for stage in stages:
        seconds = "" if stage["seconds"] is None else f"{stage['seconds']:.0f}"
        lines.append(f"| {stage['name']} | {stage['steps']} | {seconds} |")
    return lines


def _compact_lines(config: Any, found: dict[str, Any]) -> list[str]:
    """One line per setting: the largest difference of all seeds, latency of the first."""
    worst = max(row["difference"] for row in found.values())
    lines = [
        "",
        "Made small (first seed of each setting; milliseconds of one evaluation before and after, "
        f"here and then). The outputs of all {len(found)} differ by at most {worst:.1e} of the "
        "largest.",
        "",
        "| network | parameters | constants | multiply-adds | batch 1 | batch 128 | removed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        if "latency" not in row:
            continue
        times = [f"{each['before']:.3g} → {each['after']:.3g}" for each in row["latency"].values()]
        cells = [
            name, f"{row['parameters']:,}", f"{row['constants']:,}", f"{row['multiply_adds']:,}",
            *times, ", ".join(row["removed"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _draw_stages(
    config: Any,
    workdir: Path,
    logs: Mapping[str, MetricsLog],
    groups: dict[tuple[Any, ...], list[int]],
) -> None:
    """Accuracy and channels through the stages (Fig. 7)."""
    steps, offset = [], 0
    columns: dict[str, list[Any]] = {"validation/accuracy": [], "channels": []}
    for log in logs.values():
        at, _ = log.column("channels")
        steps.append(np.asarray(at) + offset)
        offset += int(at[-1])
        for name, found in columns.items():
            found.append(log.column(name)[1])
    joined = {name: np.concatenate(found) for name, found in columns.items()}
    figures.through_stages(
        workdir / "figures" / "stages",
        np.concatenate(steps),
        {
            _label(config, setting): {
                "validation accuracy (%)": 100 * joined["validation/accuracy"][:, members],
                "open channels": joined["channels"][:, members],
            }
            for setting, members in groups.items()
        },
        boundaries=[int(each[-1]) for each in steps[:-1]],
    )


def _label(config: Any, setting: tuple[Any, ...]) -> str:
    """What tells a setting from the others of the study."""
    coefficient, target, order, cka_sr = setting
    parts = [f"λ = {coefficient:g}"]
    if config.budget:
        parts.append(f"target {target:g}")
    if any(config.orders):
        parts.append(f"order {order}")
    if any(config.cka_sr.coefficients):
        parts.append(f"CKA-SR {cka_sr:g}")
    return ", ".join(parts)
