"""The report of the neuron pruning study: summary.json, report.md and the figures."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import diverged, neuron_pruning_figures, summaries
from experiments.neuron_pruning_members import (
    dense_of,
    dense_runs,
    member_names,
    runs_of,
    stage_of,
)
from experiments.neuron_pruning_orders import BASELINE, CRITERIA
from experiments.neuron_pruning_thresholds import READINGS, THRESHOLDS
from experiments.published import agrees, item
from experiments.statistics import correct, paired, spread
from experiments.tables import difference, percent


def write(config: Any, workdir: Path) -> dict[str, Any]:
    """Writes everything from the files of the stages alone, so that it can be repeated.

    Returns:
        The summary.
    """
    groups, thresholds = [], {}
    for network in config.networks.split(","):
        whole = _read(workdir / f"{stage_of(network, None, 0)}.json")
        thresholds[network] = _thresholds(whole["thresholds"])
        for rate, dropout in itertools.product(config.rates, config.dropouts):
            groups.append(_group(config, workdir, network, float(rate), float(dropout), whole))
    correct([
        row["criteria"][name]["difference"]
        for group in groups
        for row in group["iterations"]
        for name in row["criteria"]
        if row["criteria"][name]["difference"] is not None
    ])  # fmt: skip
    gone = diverged.rows(*itertools.chain(*(
        _gone(config, workdir, network) for network in config.networks.split(",")
    )))  # fmt: skip
    summary = {
        "config": summaries.settings(config),
        "groups": groups,
        "thresholds": thresholds,
    }
    if gone:
        summary["diverged"] = gone
    summaries.write(workdir, summary, _markdown(config, groups, thresholds, gone))
    neuron_pruning_figures.draw(workdir / "figures", config, groups)
    return summary


def _gone(config: Any, workdir: Path, network: str) -> list[diverged.Gone]:
    """Networks that diverged, of each training in which they were."""
    dense, runs = dense_runs(config), runs_of(config)
    whole = diverged.gone(workdir, stage_of(network, None, 0), member_names(dense))
    sources = [dense.index(dense_of(run)) for run in runs]
    found, names = [whole], member_names(runs)
    for rate in config.rates:
        found.append(diverged.heirs(names, sources, whole))
        left = [name for index, name in enumerate(names) if index not in found[-1]]
        for iteration in range(1, config.iterations):
            found.append(diverged.gone(workdir, stage_of(network, float(rate), iteration), left))
            left = [name for index, name in enumerate(left) if index not in found[-1]]
    return found


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _group(
    config: Any, workdir: Path, network: str, rate: float, dropout: float, whole: Any
) -> dict[str, Any]:
    """One line of networks for each criterion, at one width, rate and dropout."""
    criteria = config.criteria.split(",")
    dense = [each for each in whole["networks"] if each["dropout"] == dropout]
    iterations = [_iteration(0, {name: dense for name in criteria})]
    gone: dict[tuple[str, int], set[Any]] = {}
    for index in range(1, config.iterations):
        found = _read(workdir / f"{stage_of(network, rate, index)}.json")["networks"]
        found = [each for each in found if each["dropout"] == dropout]
        by_criterion = {
            name: [each for each in found if each["criterion"] == name] for name in criteria
        }
        iterations.append(_iteration(index, by_criterion))
        if BASELINE in criteria:
            _add_agreement(iterations[-1], by_criterion, gone)
    return {"network": network, "rate": rate, "dropout": dropout, "iterations": iterations}


def _iteration(index: int, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds of each criterion, and differences to the baseline for the same seeds.

    Of a criterion of which all networks have diverged there is nothing.
    """
    row: dict[str, Any] = {"iteration": index, "criteria": {}}
    for name, networks in found.items():
        if not networks:
            continue
        layers = list(networks[0]["widths"])
        cell: dict[str, Any] = {
            "seeds": [each["seed"] for each in networks],
            "test": spread([each["test"] for each in networks]),
            "validation": spread([each["validation"] for each in networks]),
            "left": {
                layer: float(np.mean([each["widths"][layer] for each in networks]))
                for layer in layers
            },
            "difference": None,
        }
        if index:
            cell["before_training"] = spread([each["before_training"] for each in networks])
            cell["similarity"] = {
                layer: float(np.mean([each["similarity"][layer] for each in networks]))
                for layer in layers
            }
        row["criteria"][name] = cell
    baseline = row["criteria"].get(BASELINE)
    for name, cell in row["criteria"].items():
        if index and name != BASELINE and baseline is not None:
            ours, theirs = diverged.pairs(cell, baseline, "test")
            if ours:
                cell["difference"] = paired(ours, theirs)
    return row


def _add_agreement(
    row: dict[str, Any],
    found: dict[str, list[dict[str, Any]]],
    gone: dict[tuple[str, int], set[Any]],
) -> None:
    """Parts of the neurons that a criterion prunes which the baseline prunes as well.

    `gone` collects what went before, by criterion and seed; neurons are named by their places in
    the whole network.
    """
    now = {
        (name, each["seed"]): {
            (layer, unit) for layer, units in each["removed"].items() for unit in units
        }
        for name, networks in found.items()
        for each in networks
    }
    for key, units in now.items():
        gone[key] = gone.get(key, set()) | units
    for name, networks in found.items():
        if name == BASELINE:
            continue
        for field, sets in (("agreement", now), ("cumulative_agreement", gone)):
            pairs = [
                (sets[name, each["seed"]], sets[BASELINE, each["seed"]])
                for each in networks
                if (BASELINE, each["seed"]) in now
            ]
            # Where nothing went there is nothing to agree on.
            if pairs and all(own for own, _ in pairs):
                row["criteria"][name][field] = spread(
                    [len(own & other) / len(own) for own, other in pairs]
                )


def _thresholds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over networks of all seeds and dropout rates, for each reading and threshold."""
    found = []
    for reading, threshold in itertools.product(READINGS, THRESHOLDS):
        own = [row for row in rows if row["reading"] == reading and row["threshold"] == threshold]
        found.append({
            "reading": reading,
            "threshold": threshold,
            "left": {
                layer: spread([row["left"][layer] for row in own]) for layer in own[0]["left"]
            },
            "validation": spread([row["validation"] for row in own]),
            "test": spread([row["test"] for row in own]),
        })  # fmt: skip
    return found


def _markdown(
    config: Any,
    groups: Sequence[dict[str, Any]],
    thresholds: dict[str, Any],
    gone: Sequence[dict[str, Any]] = (),
) -> str:
    lines = [
        f"# Neuron pruning by representation: {config.name}",
        "",
        f"Test accuracy in percent, mean and standard deviation over the seeds "
        f"{list(config.seeds)}, and lowest to highest. Differences are of the same seeds, with "
        "95 % intervals and p-values of paired t-tests, in brackets corrected for all "
        "comparisons of this report (Holm). Agreement is the part of the neurons pruned in an "
        "iteration (up to then) that L1 prunes too.",
    ]
    for group in groups:
        lines += ["", *_group_table(config, group)]
    for network, rows in thresholds.items():
        lines += ["", *_threshold_table(network, rows)]
    lines += diverged.lines(gone)
    return "\n".join(lines) + "\n"


def _group_table(config: Any, group: dict[str, Any]) -> list[str]:
    names = config.criteria.split(",")
    rivals = [name for name in names if name != BASELINE and BASELINE in names]
    known = _published(config, group)
    header = ["iteration", "neurons left", *(CRITERIA[name] for name in names)]
    header += [f"{CRITERIA[name]} less L1" for name in rivals]
    header += [f"agreement of {CRITERIA[name]}" for name in rivals]
    header += ["published: CKA (one-shot), L1, agreement"] * bool(known)
    lines = [
        f"## {group['network']}, dropout {group['dropout']:g}, "
        + (f"{100 * group['rate']:g} % in each iteration" if config.amount != "threshold"
           else f"similarity of {config.threshold:g} and more"),
        "",
        f"| {' | '.join(header)} |",
        f"|{' --- |' * len(header)}",
    ]  # fmt: skip
    for row in group["iterations"]:
        found = row["criteria"]
        cells = [str(row["iteration"]), _left(row, names)]
        cells += [
            _with_range(found[name]["test"]) + diverged.of_seeds(found[name]["test"], config.seeds)
            if name in found
            else "-"
            for name in names
        ]
        cells += [difference(found.get(name, {}).get("difference")) for name in rivals]
        for name in rivals:
            cell = found.get(name, {})
            cells.append(
                f"{cell['agreement']['mean']:.3f} ({cell['cumulative_agreement']['mean']:.3f})"
                if "agreement" in cell
                else ""
            )
        if known:
            cells.append(known.get(row["iteration"], ""))
        lines.append(f"| {' | '.join(cells)} |")
    if config.iterations > 1:
        lines += ["", *_before_table(names, group)]
    return lines


def _before_table(names: Sequence[str], group: dict[str, Any]) -> list[str]:
    """What pruning alone does in each iteration."""
    lines = [
        "Right after pruning, before training on: test accuracy, and in brackets the mean CKA of "
        "each layer with what is left of it.",
        "",
        f"| iteration | {' | '.join(CRITERIA[name] for name in names)} |",
        f"|{' --- |' * (1 + len(names))}",
    ]
    for row in group["iterations"][1:]:
        cells = [str(row["iteration"])]
        for name in names:
            if name not in row["criteria"]:
                cells.append("-")
                continue
            cell = row["criteria"][name]
            kept = ", ".join(f"{value:.3f}" for value in cell["similarity"].values())
            cells.append(f"{percent(cell['before_training'])} ({kept})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _left(row: dict[str, Any], names: Sequence[str]) -> str:
    """Neurons of the layers, of each criterion where they differ."""
    found = [
        ", ".join(f"{count:g}" for count in row["criteria"][name]["left"].values())
        for name in names
        if name in row["criteria"]
    ]
    return found[0] if len(set(found)) == 1 else "; ".join(found) or "-"


def _with_range(value: dict[str, Any]) -> str:
    low, high = min(value["values"]), max(value["values"])
    return f"{percent(value)} ({100 * low:.2f} to {100 * high:.2f})"


def _published(config: Any, group: dict[str, Any]) -> dict[int, str]:
    """By iteration what is published of networks like these: CKA (one-shot), L1, agreement."""
    accuracies, agreements = item("neurons", "figure1"), item("neurons", "figure2")
    if not agrees(accuracies.where, config):
        return {}
    found: dict[int, list[str]] = {}
    for table, name, digits in ((accuracies, "test", 2), (agreements, "agreement", 3)):
        for row in table.entries():
            if all(group[key] == row[key] for key in ("network", "dropout", "rate")):
                found.setdefault(row["iteration"], []).append(f"{row[name]:.{digits}f}")
    return {iteration: ", ".join(cells) for iteration, cells in found.items()}


def _threshold_table(network: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"## Similarity thresholds on the whole network, {network}",
        "",
        "Neurons left of each layer (mean, lowest to highest over networks of all seeds and "
        "dropout rates) when neurons go as long as CKA stays at the threshold: of the layer "
        "without all that went before, in the order of CKA or of L1, or without that neuron "
        "alone. Accuracies are those of the pruned network, not trained on.",
        "",
        "| similarity | threshold | neurons left | validation accuracy | test accuracy |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        left = ", ".join(
            f"{value['mean']:.0f} ({min(value['values']):.0f} to {max(value['values']):.0f})"
            for value in row["left"].values()
        )
        lines.append(
            f"| {READINGS[row['reading']]} | {row['threshold']:g} | {left} "
            f"| {percent(row['validation'])} | {percent(row['test'])} |"
        )
    return lines
