"""The report of dynamic tokens: summary.json, report.md and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import diverged, figures, summaries
from experiments.published import of_settings
from experiments.statistics import correct, paired, spread
from experiments.tables import difference, percent
from experiments.tokens_members import (
    NONE,
    PRETRAIN,
    Variant,
    dynamic,
    gone_dynamic,
    gone_whole,
    stage_of,
    transformer,
    variants,
    wholes,
)
from ntt_sparse.models.tokens import dynamic_multiply_adds
from ntt_sparse.models.vit import multiply_adds
from ntt_sparse.training.metrics import MetricsLog

_COST, _ACCURACY = "multiply-adds (millions)", "test accuracy"


def write(
    config: Any, workdir: Path, input_shape: tuple[int, ...], num_outputs: int
) -> dict[str, Any]:
    """Writes everything from the metrics alone, so that it can be repeated.

    Args:
        config: The settings.
        workdir: Where the files are.
        input_shape: Of an image.
        num_outputs: Of the networks.

    Returns:
        The summary.
    """
    whole = gone_whole(config, workdir)
    dynamic = {each: gone_dynamic(config, workdir, each, whole) for each in variants(config)}
    rows = _rows(config, workdir, input_shape, num_outputs, whole, dynamic)
    summary = {
        "config": summaries.settings(config),
        "networks": rows,
    }
    gone = diverged.rows(whole, *dynamic.values())
    if gone:
        summary["diverged"] = gone
    summaries.write(workdir, summary, _markdown(config, rows, gone))
    curves: dict[str, list[Any]] = {}
    for row in rows:
        point = ({"mean": row["multiply_adds"] / 1e6, "std": None}, row["test_accuracy"])
        curves.setdefault(f"CKA: {row['cka']}", []).append(point)
    figures.trade_offs(workdir / "figures" / "accuracy_against_cost", {(_COST, _ACCURACY): curves})
    return summary


def _rows(
    config: Any,
    workdir: Path,
    input_shape: tuple[int, ...],
    num_outputs: int,
    gone_whole: diverged.Gone,
    gone: Mapping[Variant, diverged.Gone],
) -> list[dict[str, Any]]:
    """An entry for each kind of whole transformers, and for each variant, if any are left."""
    module = transformer(config, num_outputs)
    count = len(config.seeds)
    shape = (input_shape[0], input_shape[1], input_shape[2])
    log = MetricsLog(workdir / f"{PRETRAIN}.jsonl", PRETRAIN)
    rows = []
    groups = {
        cka: range(count * index, count * (index + 1)) for index, cka in enumerate(wholes(config))
    }
    for cka, members in diverged.left(groups, gone_whole).items():
        similarity = log.column("similarity")[1][-1, members]
        rows.append(
            _row(config, None, cka, log, members)
            | {"similarity": spread(similarity)}
            | {"multiply_adds": multiply_adds(module, shape), "parameters": _size(module, shape)}
        )
    for variant in variants(config):
        members = [index for index in range(count) if index not in gone[variant]]
        if not members:
            continue
        stage, network = stage_of(variant), dynamic(config, module, variant)
        log = MetricsLog(workdir / f"{stage}.jsonl", stage)
        rows.append(
            _row(config, variant.keep, variant.cka, log, members)
            | {
                "multiply_adds": dynamic_multiply_adds(network, shape),
                "parameters": _size(network, shape),
            }
        )
    by_kind = {(row["keep"], row["cka"]): row for row in rows}
    for row in rows:
        compared = {}
        if row["cka"] != NONE:
            compared["less_without"] = by_kind.get((row["keep"], NONE))
        if row["keep"] is not None:
            compared["less_whole"] = by_kind[None, Variant(row["keep"], row["cka"]).whole]
        for name, baseline in compared.items():
            if baseline is None:
                continue
            ours, theirs = diverged.pairs(row, baseline, "test_accuracy")
            # Of no seed there are both where the others diverged.
            if ours:
                row[name] = paired(ours, theirs)
    for name in ("less_without", "less_whole"):
        correct([row[name] for row in rows if name in row])
    return rows


def _row(
    config: Any, keep: float | None, cka: str, log: MetricsLog, members: list[int]
) -> dict[str, Any]:
    count = len(config.seeds)
    return {
        "keep": keep,
        "cka": cka,
        "seeds": [config.seeds[index % count] for index in members],
        **{
            f"{name}_accuracy": spread(log.column(f"{name}/accuracy")[1][-1, members])
            for name in ("validation", "test")
        },
    }


def _size(module: Any, shape: tuple[int, int, int]) -> int:
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _markdown(config: Any, rows: list[dict[str, Any]], gone: Sequence[dict[str, Any]] = ()) -> str:
    lines = [
        f"# Dynamic tokens: {config.name}",
        "",
        f"{config.model.name} on {config.data.name}; inference, in which dropped tokens are gone, "
        f"after the last step, mean ± standard deviation over seeds {list(config.seeds)}. Less "
        f"the same without CKA ({config.cka_sr.regulariser}, {config.cka_sr.coefficient:g}, in the "
        "training of the whole transformer; in the decision similarities as "
        f"{config.redundancy.to_dict()}), and less the whole transformer from which it starts, for "
        "the same seeds, with 95 % interval and the p-value of a paired t-test (in brackets "
        "corrected by Holm).",
        "",
        "| keep | CKA | parameters | multiply-adds | test accuracy | validation | less without CKA "
        "| less whole | published |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    table = {
        # Of the whole transformer, which keeps all tokens.
        (None if row["keep"] == 1 else row["keep"], row["cka"]): row
        for table in of_settings("cka_sr", config)
        if table.id == "table1"
        for row in table.entries()
    }
    for row in rows:
        published = table.get((row["keep"], row["cka"]))
        cells = (
            "all" if row["keep"] is None else f"{row['keep']:g}",
            row["cka"],
            f"{row['parameters']:,}",
            f"{row['multiply_adds'] / 1e6:,.1f}M",
            percent(row["test_accuracy"]) + diverged.of_seeds(row["test_accuracy"], config.seeds),
            percent(row["validation_accuracy"]),
            difference(row.get("less_without")),
            difference(row.get("less_whole")),
            "" if published is None else f"{published['test_accuracy']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    found = [f"{percent(row['similarity'])} ({row['cka']})" for row in rows if row["keep"] is None]
    lines += [
        "",
        "Mean CKA of different blocks of the whole transformers on held-out images, in percent: "
        f"{', '.join(found)}.",
        *diverged.lines(gone),
    ]
    return "\n".join(lines) + "\n"
