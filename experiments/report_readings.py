"""How the summary of each study is read: its entries as rows of keys and of values over seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

GAIN = "gain"


class Column(NamedTuple):
    """How a quantity is shown: `%` are fractions, and points are differences of such."""

    heading: str
    unit: str = ""
    digits: int = 2

    @property
    def scale(self) -> float:
        """From what a summary has to what is shown."""
        return 100.0 if self.unit in ("%", "points") else 1.0


class Row(NamedTuple):
    """One entry of a summary: what names it, and of each quantity the values of its seeds.

    A quantity that has no seeds, such as a count of operations, has one value.
    """

    keys: dict[str, Any]
    values: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]


class Baseline(NamedTuple):
    """Which entries others are compared with, seed by seed.

    Attributes:
        key: Of what names an entry.
        value: Of that key in entries of the baseline.
        heading: Of the differences.
        free: Keys in which an entry may differ from that of the baseline besides.
    """

    key: str
    value: Any
    heading: str
    free: Sequence[str] = ()


class Reading(NamedTuple):
    """How the summaries of a study are read.

    Attributes:
        rows: The entries of a summary, from it and its settings. It raises `KeyError`,
            `TypeError`, `AttributeError` or `ValueError` of one that is not whole.
        keys: Headings of what names an entry.
        values: What it measured; the first is what is compared.
        baseline: What others are compared with, if there is such a thing.
        sizes: Quantities that say how large a network is, what tells most first, and what a ratio
            of two is of. Of those in `%`, which are what is pruned, it is of what is kept.
    """

    rows: Callable[[Mapping[str, Any], Mapping[str, Any]], list[Row]]
    keys: Mapping[str, str]
    values: Mapping[str, Column]
    baseline: Baseline | None = None
    sizes: Mapping[str, str] = {}

    def columns(self) -> dict[str, Column]:
        """The quantities, and under `GAIN` the first less that of the baseline."""
        if self.baseline is None:
            return dict(self.values)
        first = next(iter(self.values.values()))
        unit = "points" if first.unit == "%" else first.unit
        return {**self.values, GAIN: Column(self.baseline.heading, unit, first.digits)}


def _numbers(value: Any, count: int = 0) -> tuple[float, ...]:
    """The values of a spread over seeds.

    Raises:
        ValueError: They are no finite numbers, or not as many as there are seeds.
    """
    values = value["values"]
    for each in values:
        if type(each) not in (int, float) or not math.isfinite(each):
            raise ValueError(f"{each!r} is no finite number")
    if not values or (count and len(values) != count):
        raise ValueError(f"{len(values)} values stand for {count} seeds")
    return tuple(float(each) for each in values)


def _seeds(entry: Mapping[str, Any]) -> tuple[int, ...]:
    seeds = entry["seeds"]
    if not seeds or any(type(seed) is not int for seed in seeds):
        raise ValueError(f"seeds are {seeds!r}")
    return tuple(seeds)


def _row(entry: Mapping[str, Any], keys: Mapping[str, Any], names: Sequence[str]) -> Row:
    """The first quantity has to be there; others are those of some settings alone."""
    seeds = _seeds(entry)
    for name, value in keys.items():
        if value is not None and not isinstance(value, str | int | float):
            raise ValueError(f"{name} is {value!r}")
    present = [name for name in names if name == names[0] or entry.get(name) is not None]
    return Row(dict(keys), {name: _numbers(entry[name], len(seeds)) for name in present}, seeds)


def _entries(*keys: str, values: Sequence[str], field: str) -> Callable[..., list[Row]]:
    """Of summaries that are a list of entries with these keys."""

    def rows(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
        del settings
        return [_row(entry, {key: entry[key] for key in keys}, values) for entry in summary[field]]

    return rows


def _ntt(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    del settings
    transfers = {entry["density"]: entry for entry in summary.get("transfer", ())}
    names = ("test_accuracy_last", "test_accuracy_best_validation")
    rows = []
    for entry in summary["supervised"]:
        keys = {name: entry[name] for name in ("method", "density")}
        row = _row(entry, keys, names)
        transfer = transfers.get(entry["density"])
        if entry["method"] == "ntt" and transfer is not None:
            for name in ("loss_before", "loss_after"):
                # Of students whose networks have diverged there is nothing either.
                own = dict(zip(_seeds(transfer), _numbers(transfer[name]), strict=True))
                row.values[name] = tuple(own[seed] for seed in row.seeds)
        rows.append(row)
    return rows


_SPARSE = (
    *("test_accuracy_last", "test_accuracy_best_validation", "similarity/cka"),
    "epsilon_sparsity/0.01",
)
_sparse = _entries("density", "regulariser", "coefficient", values=_SPARSE, field="supervised")


def _compared(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    found = []
    for method, entries in summary["methods"].items():
        for row in _sparse({"supervised": entries}, settings):
            found.append(row._replace(keys={"method": method, **row.keys}))
    return found


_PRUNED = (
    *("test_accuracy", "parameters", "pruned_channels", "pruned_parameters"),
    "test_accuracy_best_validation",
)


def _pruning(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    rows = []
    for entry in summary["networks"]:
        keys = {name: entry[name] for name in ("coefficient", "target", "order")}
        # Of one network, and without CKA-SR, before there was a choice.
        keys = {"gate": settings["gate"], **keys, "cka_sr": entry.get("cka_sr", 0.0)}
        row = _row(entry, keys, _PRUNED)
        for name, value in (entry.get("channel_similarity") or {}).items():
            if value is not None:
                row.values[f"similarity_{name}"] = _numbers(value)
        rows.append(row)
    return rows


def _recommenders(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    data = PurePath(settings["data"]["name"]).stem
    names = ("ensemble_rmse", "rmse", "dimension")
    return [
        _row(
            entry, {"data": data, "gate": entry["gate"], "coefficient": entry["coefficient"]}, names
        )
        for entry in summary["networks"]
    ]


def _neurons(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    seeds = tuple(settings["seeds"])
    names = ("test", "before_training", "agreement", "cumulative_agreement")
    rows = []
    for group in summary["groups"]:
        keys = {name: group[name] for name in ("network", "dropout", "rate")}
        for entry in group["iterations"]:
            for criterion, cell in entry["criteria"].items():
                own = {**keys, "iteration": entry["iteration"], "criterion": criterion}
                cell = {"seeds": seeds, **cell}
                # Of fewer seeds where networks that they are compared with have diverged.
                agreements = [name for name in names if "agreement" in name and name in cell]
                few = [n for n in agreements if len(cell[n]["values"]) < len(cell["seeds"])]
                rows.append(_row(cell, own, [name for name in names if name not in few]))
    return rows


def _tokens(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    rows = []
    for entry in summary["networks"]:
        # All tokens are kept where none are dropped.
        keep = 1.0 if entry["keep"] is None else entry["keep"]
        keys = {"keep": keep, "cka": entry["cka"]}
        row = _row({"seeds": settings["seeds"], **entry}, keys, ("test_accuracy",))
        for name in ("parameters", "multiply_adds"):
            row.values[name] = _numbers({"values": [entry[name]]})
        rows.append(row)
    return rows


_LAST, _BEST = Column("accuracy", "%"), Column("accuracy at best validation", "%")
_SPARSE_KEYS = {
    "density": "density", "regulariser": "regulariser", "coefficient": "coefficient",
}  # fmt: skip
_SPARSE_VALUES = dict(
    zip(
        _SPARSE,
        (_LAST, _BEST, Column("similarity of layers (CKA)"), Column("weights below 0.01")),
        strict=True,
    )
)
_SPARSE_READING = Reading(
    _sparse,
    _SPARSE_KEYS,
    _SPARSE_VALUES,
    Baseline("regulariser", "none", "less none", ("coefficient",)),
)
READINGS = {
    "ntt": Reading(
        _ntt,
        {"method": "method", "density": "density"},
        {
            "test_accuracy_last": _LAST,
            "test_accuracy_best_validation": _BEST,
            "loss_before": Column("transfer loss before", digits=3),
            "loss_after": Column("after", digits=3),
        },
    ),
    "cka_sr": _SPARSE_READING,
    "sparse_training": _SPARSE_READING,
    "sparse_training_compare": _SPARSE_READING._replace(
        rows=_compared, keys={"method": "method", **_SPARSE_KEYS}
    ),
    "tokens": Reading(
        _tokens,
        {"keep": "tokens kept", "cka": "CKA"},
        {
            "test_accuracy": _LAST,
            "parameters": Column("parameters", digits=0),
            "multiply_adds": Column("multiply-adds", digits=0),
        },
        Baseline("cka", "no", "less without CKA"),
        {"multiply_adds": "multiply-adds", "parameters": "parameters"},
    ),
    "neuron_pruning": Reading(
        _neurons,
        {
            "network": "network",
            "dropout": "dropout",
            "rate": "rate",
            "iteration": "iteration",
            "criterion": "criterion",
        },
        {
            "test": _LAST,
            "before_training": Column("accuracy right after pruning", "%"),
            "agreement": Column("agreement with L1", digits=3),
            "cumulative_agreement": Column("agreement up to then", digits=3),
        },
        Baseline("criterion", "l1", "less L1"),
    ),
    "dam_pruning": Reading(
        _pruning,
        {
            "gate": "gate",
            "coefficient": "lambda",
            "target": "target",
            "order": "order",
            "cka_sr": "CKA-SR",
        },
        {
            "test_accuracy": _LAST,
            "parameters": Column("parameters", digits=0),
            "pruned_channels": Column("pruned channels", "%"),
            "pruned_parameters": Column("pruned parameters", "%"),
            "test_accuracy_best_validation": _BEST,
            "similarity_mean": Column("mean similarity", digits=3),
            "similarity_std": Column("its deviation", digits=3),
            "similarity_max": Column("largest", digits=3),
        },
        Baseline("cka_sr", 0.0, "less without CKA-SR"),
        {
            "parameters": "parameters",
            "pruned_parameters": "kept parameters",
            "pruned_channels": "kept channels",
        },
    ),
    "dam_representation": Reading(
        _entries(
            *("gate", "rank", "coefficient", "learning_rate", "initial"),
            values=("bottleneck", "relative_error"),
            field="networks",
        ),
        {
            "gate": "gate",
            "rank": "r",
            "coefficient": "lambda",
            "learning_rate": "learning rate",
            "initial": "first offset",
        },
        {
            "bottleneck": Column("open channels", digits=1),
            "relative_error": Column("relative error", digits=5),
        },
    ),
    "dam_autoencoder": Reading(
        _entries(
            *("gate", "coefficient"),
            values=("reconstruction", "bottleneck", "macro_f1"),
            field="networks",
        ),
        {"gate": "gate", "coefficient": "lambda"},
        {
            "reconstruction": Column("test error", digits=4),
            "bottleneck": Column("open channels", digits=1),
            "macro_f1": Column("macro-F1", digits=3),
        },
        sizes={"bottleneck": "open channels"},
    ),
    "dam_graph": Reading(
        _entries(
            *("method", "coefficient", "size"),
            values=("test_auc", "test_ap", "dimensions"),
            field="networks",
        ),
        {"method": "network", "coefficient": "lambda", "size": "size"},
        {
            "test_auc": Column("test AUC", "%"),
            "test_ap": Column("test AP", "%"),
            "dimensions": Column("open dimensions", digits=1),
        },
        sizes={"dimensions": "open dimensions"},
    ),
    "dam_recommender": Reading(
        _recommenders,
        {"data": "data", "gate": "gate", "coefficient": "lambda"},
        {
            "ensemble_rmse": Column("RMSE, mean prediction", digits=4),
            "rmse": Column("RMSE, last", digits=4),
            "dimension": Column("open channels", digits=1),
        },
        Baseline("gate", "none", "less dropout", ("coefficient",)),
        {"dimension": "open channels"},
    ),
}
"""By the command of a study."""


def add_gains(reading: Reading, rows: Sequence[Row]) -> None:
    """Adds `GAIN`, the difference of each seed, to rows that have an entry of the baseline."""
    if reading.baseline is None:
        return
    baseline, first = reading.baseline, next(iter(reading.values))
    left_out = (baseline.key, *baseline.free)

    def rest(row: Row) -> tuple[Any, ...]:
        return tuple(value for name, value in row.keys.items() if name not in left_out)

    plain = {rest(row): row for row in rows if row.keys[baseline.key] == baseline.value}
    for row in rows:
        other = plain.get(rest(row))
        if other is not None and other is not row and other.seeds == row.seeds:
            pairs = zip(row.values[first], other.values[first], strict=True)
            row.values[GAIN] = tuple(value - less for value, less in pairs)
