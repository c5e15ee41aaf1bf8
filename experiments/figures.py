"""Figures, each as PNG and PDF, drawn without a display."""

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ntt_sparse.training.files import write_bytes

_SPREAD_ALPHA = 0.2
_MARKERS = "osD^v<>Pp*"


@contextmanager
def _figure(path: Path, rows: int = 1, columns: int = 1, **kwargs: Any) -> Iterator[Any]:
    """A grid of axes that is saved as `path`.png and `path`.pdf."""
    # Imported here, and not through pyplot: no display, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **kwargs)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(True, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without dates, so that the same numbers give the same files.
    options: dict[str, dict[str, Any]] = {
        "png": {"dpi": 150, "metadata": {"Software": None}},
        "pdf": {"metadata": {"CreationDate": None}},
    }
    for kind, how in options.items():
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, **how)
        write_bytes(Path(f"{path}.{kind}"), drawn.getvalue())


def accuracy_against_density(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]],
    reference: str | None,
) -> None:
    """Test accuracy of each method against density; the reference, if any, is a line.

    Args:
        path: Where to, without a suffix.
        curves: `{label: [(density, {"mean": ..., "std": ...}), ...]}`.
        reference: Label of the network that all are compared with, the dense one.
    """
    with _figure(path, figsize=(6.4, 4.2)) as axes:
        axis = axes[0, 0]
        for index, (label, unsorted_points) in enumerate(curves.items()):
            points = sorted(unsorted_points, key=lambda point: point[0])
            densities = np.array([density for density, _ in points])
            mean = 100 * np.array([value["mean"] for _, value in points])
            std = 100 * np.array([value["std"] or 0.0 for _, value in points])
            if label == reference:
                axis.axhline(mean[0], color="black", linestyle="--", label=label)
                axis.axhspan(mean[0] - std[0], mean[0] + std[0], color="black", alpha=0.08)
                continue
            axis.errorbar(
                densities, mean, std, label=label, marker=_MARKERS[index % len(_MARKERS)],
                color=f"C{index}", capsize=3, markersize=5,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel("density (fraction of weights kept)")
        axis.set_ylabel("test accuracy (%)")
        axis.legend(fontsize="small", frameon=False)


def paired_differences(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]],
    *,
    x: str = "density (fraction of weights kept)",
) -> None:
    """Paired differences of test accuracy against a setting, with confidence intervals.

    Args:
        path: Where to, without a suffix.
        curves: `{label: [(setting, {"mean": ..., "low": ..., "high": ...}), ...]}`.
        x: What the setting is.
    """
    with _figure(path, figsize=(7.2, 4.4)) as axes:
        axis = axes[0, 0]
        axis.axhline(0.0, color="black", linewidth=1)
        for index, (label, unsorted_points) in enumerate(curves.items()):
            points = sorted(unsorted_points, key=lambda point: point[0])
            values = [value for _, value in points]
            # Side by side, where intervals would cover each other.
            shift = 1.0 + 0.04 * (index - (len(curves) - 1) / 2)
            densities = shift * np.array([density for density, _ in points])
            mean = 100 * np.array([value["mean"] for _, value in points])
            low, high = (
                100 * np.array([v["mean"] if v[end] is None else v[end] for v in values])
                for end in ("low", "high")
            )
            axis.errorbar(
                densities, mean, (mean - low, high - mean), label=label,
                marker=_MARKERS[index % len(_MARKERS)], color=f"C{index % 10}", capsize=2,
                markersize=4, linewidth=1, alpha=0.5 + 0.5 * (index < 10),
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel(x)
        axis.set_ylabel("test accuracy less that without (points)")
        # Nothing may be compared, or all of it have diverged.
        if curves:
            axis.legend(fontsize="x-small", frameon=False, ncols=2)


def heat_maps(path: Path, matrices: Mapping[str, np.ndarray], *, axis: str = "layer") -> None:
    """Similarities between layers or channels of several networks, on one colour scale.

    Args:
        path: Where to, without a suffix.
        matrices: `{label: (L, L)}`.
        axis: What is compared.
    """
    columns = min(5, len(matrices))
    rows = -(-len(matrices) // columns)
    lowest = min(0.0, *(float(np.min(matrix)) for matrix in matrices.values()))
    with _figure(path, rows, columns, figsize=(2.6 * columns + 0.6, 2.7 * rows)) as axes:
        image = None
        for cell in axes.flat:
            cell.grid(False)
            cell.set_visible(False)
        for cell, (label, matrix) in zip(axes.flat, matrices.items(), strict=False):
            cell.set_visible(True)
            image = cell.imshow(matrix, vmin=lowest, vmax=1.0, origin="lower", cmap="magma")
            cell.set_title(label, fontsize="small")
            cell.set_xlabel(axis)
        axes[0, 0].figure.colorbar(image, ax=axes, shrink=0.8)


def histograms(path: Path, edges: np.ndarray, counts: Mapping[str, np.ndarray]) -> None:
    """Surviving weights of several networks, side by side on the same axes.

    Args:
        path: Where to, without a suffix.
        edges: `(bins + 1,)`.
        counts: `{label: (bins,)}`.
    """
    columns = min(5, len(counts))
    rows = -(-len(counts) // columns)
    highest = max(int(np.max(values)) for values in counts.values())
    with _figure(path, rows, columns, figsize=(2.6 * columns, 2.2 * rows)) as axes:
        for axis in axes.flat:
            axis.set_visible(False)
        for axis, (label, values) in zip(axes.flat, counts.items(), strict=False):
            axis.set_visible(True)
            axis.stairs(values, edges, fill=True, color="C0")
            axis.set_ylim(0, 1.05 * highest)
            axis.set_title(label, fontsize="small")
            axis.set_xlabel("weight")


def accuracy_over_training(
    path: Path, steps: np.ndarray, lines: Mapping[str, np.ndarray], title: str
) -> None:
    """Test accuracy over supervised steps, mean and standard deviation over members.

    Args:
        path: Where to, without a suffix.
        steps: `(r,)`.
        lines: `{label: (r, members)}`, fractions.
        title: Title of the figure.
    """
    with _figure(path, figsize=(6.4, 4.2)) as axes:
        axis = axes[0, 0]
        for index, (label, values) in enumerate(lines.items()):
            _band(axis, steps, 100 * values, label, f"C{index}")
        axis.set_title(title)
        axis.set_xlabel("supervised training step")
        axis.set_ylabel("test accuracy (%)")
        axis.legend(fontsize="small", frameon=False)


def channels_over_training(
    path: Path,
    steps: np.ndarray,
    lines: Mapping[str, np.ndarray],
    dimensions: Mapping[str, int] | None = None,
) -> None:
    """Open channels over steps, of a bottleneck beside the dimension of the data, if known.

    Args:
        path: Where to, without a suffix.
        steps: `(r,)`.
        lines: `{label: (r, members)}`.
        dimensions: `{label: dimension}`.
    """
    with _figure(path, figsize=(6.4, 4.2)) as axes:
        axis = axes[0, 0]
        for index, (label, values) in enumerate(lines.items()):
            _band(axis, steps, values, label, f"C{index}")
            if dimensions:
                axis.axhline(dimensions[label], color=f"C{index}", linestyle=":", linewidth=1)
        axis.set_xlabel("training step")
        axis.set_ylabel("open channels")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize="small", frameon=False, ncols=1 + len(lines) // 12)


def through_stages(
    path: Path,
    steps: np.ndarray,
    lines: Mapping[str, Mapping[str, np.ndarray]],
    boundaries: Sequence[int],
) -> None:
    """Quantities over the steps of several stages, a panel for each.

    Args:
        path: Where to, without a suffix.
        steps: `(r,)`, counted on from stage to stage.
        lines: `{label: {quantity: (r, members)}}`, of the same quantities each.
        boundaries: Steps at which a stage ends and another begins.
    """
    quantities = list(next(iter(lines.values())))
    with _figure(path, 1, len(quantities), figsize=(4.6 * len(quantities), 3.8)) as axes:
        for axis, quantity in zip(axes[0], quantities, strict=True):
            for index, (label, values) in enumerate(lines.items()):
                _band(axis, steps, values[quantity], label, f"C{index}")
            for step in boundaries:
                axis.axvline(step, color="grey", linestyle=":", linewidth=1)
            axis.set_xlabel("training step, of all stages")
            axis.set_ylabel(quantity)
        axes[0, 0].legend(fontsize="small", frameon=False)


def trade_offs(
    path: Path,
    panels: Mapping[
        tuple[str, str], Mapping[str, Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]]
    ],
    logarithmic: Collection[str] = (),
) -> None:
    """One quantity against another, a panel for each pair, means with standard deviations.

    Args:
        path: Where to, without a suffix.
        panels: `{(x, y): {label: [(x spread, y spread), ...]}}`, each spread a mapping
            `{"mean": ..., "std": ...}`; names label the axes.
        logarithmic: Those on a logarithmic axis.
    """
    with _figure(path, 1, len(panels), figsize=(4.6 * len(panels), 3.8)) as axes:
        for axis, ((x, y), curves) in zip(axes[0], panels.items(), strict=True):
            for index, (label, unsorted_points) in enumerate(curves.items()):
                points = sorted(unsorted_points, key=lambda point: point[0]["mean"])
                mean, std = (
                    np.array([[spread[name] or 0.0 for spread in point] for point in points]).T
                    for name in ("mean", "std")
                )
                axis.errorbar(
                    mean[0], mean[1], std[1], std[0], label=label, color=f"C{index}", capsize=2,
                    marker=_MARKERS[index % len(_MARKERS)], markersize=4, linewidth=1,
                )  # fmt: skip
            for name, set_label, set_scale in (
                (x, axis.set_xlabel, axis.set_xscale),
                (y, axis.set_ylabel, axis.set_yscale),
            ):
                set_label(name)
                set_scale("log" if name in logarithmic else "linear")
        axes[0, 0].legend(fontsize="small", frameon=False)


def grid_map(
    path: Path,
    values: Mapping[tuple[float, float], float],
    names: tuple[str, str],
    title: str,
) -> None:
    """One number for each pair of settings, as coloured and written cells.

    Args:
        path: Where to, without a suffix.
        values: `{(x, y): value}`; a pair that is not there is an empty cell.
        names: Of the two settings.
        title: Of the figure.
    """
    xs, ys = (sorted({pair[axis] for pair in values}) for axis in (0, 1))
    matrix = np.array([[values.get((x, y), np.nan) for x in xs] for y in ys])
    with _figure(path, figsize=(1.1 * len(xs) + 2, 0.8 * len(ys) + 1.6)) as axes:
        axis = axes[0, 0]
        axis.grid(False)
        axis.imshow(matrix, origin="lower", cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(matrix):
            text = "-" if np.isnan(value) else f"{value:.3g}"
            color = "black" if np.isnan(value) else "white"
            axis.text(column, row, text, ha="center", va="center", color=color)
        axis.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        axis.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
        axis.set_xlabel(names[0])
        axis.set_ylabel(names[1])
        axis.set_title(title, fontsize="medium")


def transfer_terms(
    path: Path, steps: np.ndarray, terms: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """The transfer loss and its unweighted parts over steps, on logarithmic axes.

    Args:
        path: Where to, without a suffix.
        steps: `(r,)`.
        terms: `{term: {label: (r, members)}}`.
    """
    titles = {
        "loss": "loss",
        "kernel": "kernel distance",
        "output": "output distance",
        "l2": "squared norm of survivors",
    }
    with _figure(path, 1, len(terms), figsize=(3.2 * len(terms), 3.2)) as axes:
        for axis, (term, lines) in zip(axes[0], terms.items(), strict=True):
            for index, (label, values) in enumerate(lines.items()):
                _band(axis, steps, values, label, f"C{index}")
            axis.set_title(titles.get(term, term))
            axis.set_xlabel("transfer step")
            if all(np.all(values > 0) for values in lines.values()):
                axis.set_yscale("log")
        axes[0, 0].legend(fontsize="small", frameon=False)


def output_evolution(path: Path, steps: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
    """How the outputs of networks on a few inputs move during supervised training.

    One panel per network output, one line per input; beside them the mean distance of
    each network's outputs to those of the first network.

    Args:
        path: Where to, without a suffix.
        steps: `(r,)`.
        outputs: `{label: (r, inputs, k)}`; the first is the reference (the teacher).
    """
    styles = ["-", "--", ":"]
    reference = next(iter(outputs.values()))
    num_outputs = reference.shape[2]
    with _figure(path, 1, num_outputs + 1, figsize=(4.2 * (num_outputs + 1), 3.6)) as axes:
        for output in range(num_outputs):
            axis = axes[0, output]
            for index, (label, values) in enumerate(outputs.items()):
                for example in range(values.shape[1]):
                    axis.plot(
                        steps, values[:, example, output], styles[index % 3], color=f"C{index}",
                        label=label if example == 0 else None, linewidth=1.2, alpha=0.8,
                    )  # fmt: skip
            axis.set_title(f"output {output + 1}")
            axis.set_xlabel("supervised training step")
        axes[0, 0].legend(fontsize="small", frameon=False)
        axis = axes[0, -1]
        for index, (label, values) in enumerate(list(outputs.items())[1:], start=1):
            distance = np.linalg.norm(values - reference, axis=2).mean(1)
            axis.plot(steps, distance, styles[index % 3], color=f"C{index}", label=label)
        axis.set_title("mean distance to the teacher's outputs")
        axis.set_xlabel("supervised training step")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize="small", frameon=False)


def _band(axis: Any, x: np.ndarray, values: np.ndarray, label: str, color: str) -> None:
    """The mean over the last axis with a band of one standard deviation."""
    mean = values.mean(1)
    axis.plot(x, mean, label=label, color=color, linewidth=1.5)
    if values.shape[1] > 1:
        std = values.std(1, ddof=1)
        axis.fill_between(x, mean - std, mean + std, color=color, alpha=_SPREAD_ALPHA, linewidth=0)


def layer_widths(path: Path, widths: Mapping[str, np.ndarray]) -> None:
    """Open channels of each gated layer.

    Args:
        path: Where to, without a suffix.
        widths: `{label: (layers,)}`.
    """
    with _figure(path, figsize=(7.2, 4.2)) as axes:
        axis = axes[0, 0]
        for index, (label, values) in enumerate(widths.items()):
            axis.step(
                np.arange(1, len(values) + 1), values, where="mid", label=label,
                color=f"C{index % 10}", linewidth=1,
            )  # fmt: skip
        axis.set_xlabel("gated layer")
        axis.set_ylabel("open channels")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize="x-small", frameon=False, ncols=2)


def ranges(
    path: Path,
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]]],
    *,
    x: str,
    logarithmic: bool = False,
) -> None:
    """Means over members with bars from the lowest to the highest, a panel for each quantity.

    Args:
        path: Where to, without a suffix.
        panels: `{quantity: {label: (xs, values of the members at each x)}}`.
        x: What is on the horizontal axis.
        logarithmic: Whether that axis is.
    """
    with _figure(path, 1, len(panels), figsize=(1.2 + 4.8 * len(panels), 4.0)) as axes:
        for axis, (quantity, lines) in zip(axes[0], panels.items(), strict=True):
            for index, (label, (xs, values)) in enumerate(lines.items()):
                mean, low, high = (
                    np.array([reduce(members) for members in values])
                    for reduce in (np.mean, np.min, np.max)
                )
                axis.errorbar(
                    xs, mean, (mean - low, high - mean), label=label, color=f"C{index % 10}",
                    marker=_MARKERS[index % len(_MARKERS)], capsize=2, markersize=4, linewidth=1,
                )  # fmt: skip
            axis.set_xlabel(x)
            axis.set_ylabel(quantity)
            axis.set_xscale("log" if logarithmic else "linear")
        axes[0, 0].legend(fontsize="small", frameon=False)
