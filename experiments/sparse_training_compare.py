r"""Methods of sparse training side by side, from the work directories of their studies.

Reads the summary.json of each study and writes summary.json, report.md and figures: the accuracy
of every method against density, and what each regulariser adds to it, with p-values corrected
for all comparisons of all studies. The studies differ in their method; the network, its data,
its training and the seeds have to be the same.

    python -m experiments.sparse_training_compare \
        --runs=runs/lth,runs/snip,runs/rigl --workdir=runs/compared
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli, diverged, figures, provenance, summaries
from experiments.sparse_training_report import COMPARED, label
from experiments.sparse_training_stages import BASELINE, REGULARISERS
from experiments.statistics import correct
from experiments.tables import percent
from ntt_sparse.training.files import one_line

# Fields of the settings that are a method's own; all others have to be the same.
_OWN = frozenset({
    *("name", "method", "rounds", "growth", "gradual", "lth", "transform", "l0", "density"),
    *("layer_densities", "regularisers", "coefficients", "score_batch_size", "score_per_class"),
    "checkpoint_seconds",
})  # fmt: skip
_NEEDED = frozenset({
    *("regulariser", "coefficient", "density", "test_accuracy_last", "empty_layers"),
})  # fmt: skip
_A_COMPARISON = "a comparison: low <= mean <= high, p_value in [0, 1] and n"


def compare(runs: Sequence[str | Path], workdir: str | Path) -> dict[str, Any]:
    """Writes the comparison of the studies in some folders.

    Args:
        runs: Work directories of finished studies.
        workdir: Where to; made if it is not there.

    Returns:
        What summary.json holds: `"methods"`, the entries of each study by its label; of their
        comparisons with no regulariser, `"p_value_holm"` is corrected anew.

    Raises:
        UserError: A folder holds no summary of this kind, or the studies differ in more than
            their masks.
    """
    workdir = Path(workdir)
    with cli.user_errors():
        if workdir.resolve() in [Path(run).resolve() for run in runs]:
            raise ValueError(f"--workdir is {workdir}, a study that is compared: expected another")
        found = _summaries([Path(run) for run in runs])
    rows = [row for summary in found.values() for row in summary["supervised"]]
    for name in COMPARED:
        correct([row[name] for row in rows if name in row])
    compared = {
        "shared": _shared(next(iter(found.values()))),
        "methods": {name: summary["supervised"] for name, summary in found.items()},
    }
    with cli.user_errors(), cli.writing_into(workdir):
        (workdir / "figures").mkdir(parents=True, exist_ok=True)
        summaries.write(workdir, compared, _markdown(compared))
    provenance.note(workdir)
    _draw(workdir / "figures", compared["methods"])
    return compared


def _summaries(runs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The summary of each study, by its method, or by its folder where a method comes again.

    Raises:
        ValueError: A folder holds none, or the studies cannot be compared.
    """
    if len(runs) < 2:
        raise ValueError(f"--runs names {len(runs)} studies, expected two or more")
    found = [(run, _read(run / "summary.json")) for run in runs]
    first, expected = found[0]
    for run, summary in found[1:]:
        pair = _shared(summary), _shared(expected)
        for name in sorted(pair[0].keys() | pair[1].keys()):
            theirs, ours = (each.get(name) for each in pair)
            if theirs != ours:
                raise ValueError(
                    f"{run} and {first} differ in config.{name}, {theirs} and {ours}: "
                    "expected studies that differ in their method alone"
                )
    methods = [summary["config"]["method"] for _, summary in found]
    folders = [run.resolve() for run, _ in found]
    # The first of these that tells all apart.
    choices = (methods, [folder.name for folder in folders], [str(run) for run, _ in found])
    labels = next((each for each in choices if len(set(each)) == len(each)), choices[-1])
    if repeated := sorted({name for name in labels if labels.count(name) > 1}):
        raise ValueError(f"--runs names {', '.join(repeated)} more than once, expected each once")
    return {name: summary for name, (_, summary) in zip(labels, found, strict=True)}


def _shared(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary["config"].items() if name not in _OWN}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is not there: run the study to its end first")
    try:
        summary = summaries.read(path)
        rows = summary["supervised"]
        complete = "method" in summary["config"] and rows and "seeds" in summary["config"]
        complete = complete and all(row.keys() >= _NEEDED for row in rows)
        if complete:
            _check(summary)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({one_line(error)}): run its study again"
        ) from error
    if not complete:
        raise ValueError(f"{path} is of another study, expected one of experiments.sparse_training")
    return summary


def _check(summary: Mapping[str, Any]) -> None:
    """Checks the fields that the comparison uses.

    Raises:
        ValueError: One is damaged; the message names it.
    """
    config = summary["config"]
    _expect("config.method", config["method"], isinstance(config["method"], str), "a name")
    _expect("config.seeds", config["seeds"], isinstance(config["seeds"], list), "a list")
    for index, row in enumerate(summary["supervised"]):
        for name, (fits, expected) in _FIELDS.items():
            if name in row:
                _expect(f"supervised[{index}].{name}", row[name], fits(row[name]), expected)


def _expect(name: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        short = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
        raise ValueError(f"{name} is {short}, expected {expected}")


def _is_number(value: Any) -> bool:
    # Not a bool; NaN and infinities are refused as the file is read.
    return type(value) in (int, float)


def _is_number_or_none(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_regulariser(value: Any) -> bool:
    return isinstance(value, str) and value in (BASELINE, *REGULARISERS)


def _is_spread(value: Any) -> bool:
    # Figures draw no deviation below zero, and no interval that ends before its middle.
    return (
        isinstance(value, dict)
        and value.keys() >= {"mean", "std", "values"}
        and _is_number(value["mean"])
        and _is_number_or_none(value["std"])
        and (value["std"] or 0) >= 0
        and isinstance(value["values"], list)
    )


def _is_paired(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() >= {"mean", "low", "high", "p_value", "n"}
        and _is_number(value["mean"])
        and _is_number(value["n"])
        and all(_is_number_or_none(value[name]) for name in ("low", "high", "p_value"))
        and (value["low"] is None or value["low"] <= value["mean"])
        and (value["high"] is None or value["high"] >= value["mean"])
        and (value["p_value"] is None or 0 <= value["p_value"] <= 1)
    )


# Of an entry, each with what tells whether it is whole, and what is expected.
_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "regulariser": (_is_regulariser, f"one of {', '.join((BASELINE, *REGULARISERS))}"),
    "coefficient": (_is_number_or_none, "a number or null"),
    "density": (_is_fraction, "a fraction in (0, 1]"),
    "test_accuracy_last": (_is_spread, "a spread over seeds: mean, std and values"),
    "empty_layers": (lambda value: isinstance(value, dict), "numbers by layer"),
    **dict.fromkeys(COMPARED, (_is_paired, _A_COMPARISON)),
}


def _markdown(compared: dict[str, Any]) -> str:
    methods = compared["methods"]
    densities = sorted({row["density"] for rows in methods.values() for row in rows}, reverse=True)
    variants = list(dict.fromkeys(label(row) for rows in methods.values() for row in rows))
    seeds = compared["shared"]["seeds"]
    head = f"| method | {' | '.join(f'{density!r}' for density in densities)} |"
    lines = [
        "# Methods of sparse training",
        "",
        f"Test accuracy in percent after the last step against density, mean ± standard deviation "
        f"over seeds {compared['shared']['seeds']}; an asterisk where a layer lost all its weights "
        "in some seed. Below that what a regulariser adds, for the same seeds, with the p-value of "
        "a paired t-test, corrected by Holm's method for all comparisons here.",
    ]
    for variant in variants:
        regularised = variant != label({"regulariser": BASELINE})
        lines += ["", f"{variant}:" if regularised else "No regulariser:", "", head]
        lines.append("| --- " * (len(densities) + 1) + "|")
        for method, rows in methods.items():
            shown = {row["density"]: row for row in rows if label(row) == variant}
            if shown:
                write = _gain if regularised else _accuracy
                cells = [write(shown[d], seeds) if d in shown else "" for d in densities]
                lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _accuracy(row: dict[str, Any], seeds: Sequence[int]) -> str:
    value = row["test_accuracy_last"]
    return percent(value) + ("*" if row["empty_layers"] else "") + diverged.of_seeds(value, seeds)


def _gain(row: dict[str, Any], seeds: Sequence[int]) -> str:
    gain = row.get("less_baseline_last")
    if gain is None:
        # Of no seed there are both: the others diverged.
        return ""
    text = f"{100 * gain['mean']:+.2f}"
    if gain["p_value"] is not None:
        text += f" ({gain['p_value_holm']:.2g})"
    return text + ("" if gain["n"] == len(seeds) else f" (n = {gain['n']})")


def _draw(directory: Path, methods: dict[str, list[dict[str, Any]]]) -> None:
    accuracies = {
        method: [
            (row["density"], row["test_accuracy_last"])
            for row in rows
            if row["regulariser"] == BASELINE
        ]
        for method, rows in methods.items()
    }
    figures.accuracy_against_density(directory / "accuracy_against_density", accuracies, None)
    gains: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    variants = {label(row) for rows in methods.values() for row in rows}
    for method, rows in methods.items():
        for row in rows:
            if "less_baseline_last" in row:
                # With one regulariser there is nothing to tell apart.
                name = method if len(variants) == 2 else f"{method}, {label(row)}"
                point = (row["density"], row["less_baseline_last"])
                gains.setdefault(name, []).append(point)
    if gains:
        figures.paired_differences(directory / "less_baseline_against_density", gains)


def _start() -> None:
    runs = flags.DEFINE_list("runs", None, "Work directories of studies, with commas.")
    workdir = flags.DEFINE_string("workdir", "runs/compared", "Where the comparison goes.")

    def main() -> None:
        if not runs.value:
            raise cli.UserError("--runs is empty, expected work directories with commas")
        compare(runs.value, workdir.value)
        print((Path(workdir.value) / "report.md").read_text())

    cli.launch(main, doc=__doc__)


if __name__ == "__main__":
    _start()
