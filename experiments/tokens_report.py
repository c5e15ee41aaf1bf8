"""The report of dynamic tokens: summary.json, report.md and a figure."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import figures
from experiments.published import of_settings
from experiments.statistics import correct, paired, spread
from experiments.tables import difference, percent
from experiments.tokens_members import (
    NONE,
    PRETRAIN,
    Variant,
    dynamic,
    stage_of,
    transformer,
    variants,
    wholes,
)
from ntt_sparse.models.tokens import dynamic_multiply_adds
from ntt_sparse.models.vit import multiply_adds
from ntt_sparse.training.files import write_text
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
    rows = _rows(config, workdir, input_shape, num_outputs)
    summary = {
        "config": json.loads(json.dumps(config.to_dict())),
        "networks": rows,
    }
    write_text(workdir / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_text(workdir / "report.md", _markdown(config, rows))
    curves: dict[str, list[Any]] = {}
    for row in rows:
        point = ({"mean": row["multiply_adds"] / 1e6, "std": None}, row["test_accuracy"])
        curves.setdefault(f"CKA: {row['cka']}", []).append(point)
    figures.trade_offs(workdir / "figures" / "accuracy_against_cost", {(_COST, _ACCURACY): curves})
    return summary


def _rows(
    config: Any, workdir: Path, input_shape: tuple[int, ...], num_outputs: int
) -> list[dict[str, Any]]:
    """An entry for each kind of whole transformers, and for each variant."""
    module = transformer(config, num_outputs)
    count = len(config.seeds)
    shape = (input_shape[0], input_shape[1], input_shape[2])
    log = MetricsLog(workdir / f"{PRETRAIN}.jsonl", PRETRAIN)
    rows = []
    for index, cka in enumerate(wholes(config)):
        members = slice(count * index, count * (index + 1))
        similarity = log.column("similarity")[1][-1, members]
        rows.append(
            _row(None, cka, log, members)
            | {"similarity": spread(similarity)}
            | {"multiply_adds": multiply_adds(module, shape), "parameters": _size(module, shape)}
        )
    for variant in variants(config):
        stage, network = stage_of(variant), dynamic(config, module, variant)
        log = MetricsLog(workdir / f"{stage}.jsonl", stage)
        rows.append(
            _row(variant.keep, variant.cka, log, slice(0, count))
            | {
                "multiply_adds": dynamic_multiply_adds(network, shape),
                "parameters": _size(network, shape),
            }
        )
    by_kind = {(row["keep"], row["cka"]): row["test_accuracy"]["values"] for row in rows}
    for row in rows:
        values = by_kind[row["keep"], row["cka"]]
        if row["cka"] != NONE and (row["keep"], NONE) in by_kind:
            row["less_without"] = paired(values, by_kind[row["keep"], NONE])
        if row["keep"] is not None:
            whole = Variant(row["keep"], row["cka"]).whole
            row["less_whole"] = paired(values, by_kind[None, whole])
    for name in ("less_without", "less_whole"):
        correct([row[name] for row in rows if name in row])
    return rows


def _row(keep: float | None, cka: str, log: MetricsLog, members: slice) -> dict[str, Any]:
    return {
        "keep": keep,
        "cka": cka,
        **{
            f"{name}_accuracy": spread(log.column(f"{name}/accuracy")[1][-1, members])
            for name in ("validation", "test")
        },
    }


def _size(module: Any, shape: tuple[int, int, int]) -> int:
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _markdown(config: Any, rows: list[dict[str, Any]]) -> str:
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
            percent(row["test_accuracy"]),
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
    ]
    return "\n".join(lines) + "\n"
