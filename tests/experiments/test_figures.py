"""The figures of both studies."""

import numpy as np

from experiments import figures


def test_what_figures_show(tmp_path, monkeypatch):
    """Without rendering: the drawn numbers are the given ones."""
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **kwargs: saved.append((file, self)))
    matrices = {f"m{i}": np.array([[1.0, 0.1 * i], [0.1 * i - 0.3, 1.0]]) for i in range(6)}
    figures.heat_maps(tmp_path / "maps", matrices)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps.pdf", "maps.png"]
    axes = [axis for axis in saved[0][1].axes if axis.images]
    assert [axis.get_title() for axis in axes] == list(matrices)
    for axis, matrix in zip(axes, matrices.values(), strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), matrix)
        np.testing.assert_allclose(axis.images[0].get_clim(), (-0.3, 1.0))
    # Empty places of the grid are not shown; the last one is the scale.
    assert sum(axis.get_visible() for axis in saved[0][1].axes) == 6 + 1

    saved.clear()
    figures.histograms(tmp_path / "h", np.arange(4.0), {"a": np.array([1, 5, 2])})
    (axis,) = saved[0][1].axes
    values, edges, _ = axis.patches[0].get_data()
    assert (values.tolist(), edges.tolist()) == ([1, 5, 2], [0.0, 1.0, 2.0, 3.0])

    saved.clear()
    one = {"mean": 0.02, "low": 0.01, "high": 0.05}
    alone = {"mean": -0.03, "low": None, "high": None}
    figures.paired_differences(tmp_path / "d", {"x": [(0.5, alone), (0.1, one)]})
    (axis,) = saved[0][1].axes
    ((line, _, (bars,)),) = axis.containers
    np.testing.assert_allclose(line.get_xydata(), [[0.1, 2.0], [0.5, -3.0]])
    heights = [segment[:, 1].tolist() for segment in bars.get_segments()]
    np.testing.assert_allclose(heights, [[1.0, 5.0], [-3.0, -3.0]])
    assert axis.get_xscale() == "log"

    saved.clear()
    points = [
        ({"mean": 4.0, "std": 1.0}, {"mean": 0.2, "std": 0.1}),
        ({"mean": 1.0, "std": None}, {"mean": 0.5, "std": 0.2}),
    ]
    figures.trade_offs(tmp_path / "t", {("a", "b"): {"x": points}, ("b", "c"): {}}, ("b",))
    axis, other = saved[0][1].axes
    ((line, _, (across, along)),) = axis.containers
    np.testing.assert_allclose(line.get_xydata(), [[1.0, 0.5], [4.0, 0.2]])
    ends = [segment[:, 0].tolist() for segment in across.get_segments()]
    np.testing.assert_allclose(ends, [[1.0, 1.0], [3.0, 5.0]])
    ends = [segment[:, 1].tolist() for segment in along.get_segments()]
    np.testing.assert_allclose(ends, [[0.3, 0.7], [0.1, 0.3]])
    assert (axis.get_xscale(), axis.get_yscale()) == ("linear", "log")
    assert (other.get_xscale(), other.get_xlabel(), other.get_ylabel()) == ("log", "b", "c")

    saved.clear()
    opened = {"few": np.array([[9, 9], [3, 5]]), "many": np.array([[9, 9], [8, 8]])}
    figures.channels_over_training(tmp_path / "o", np.array([0, 10]), opened, {"few": 3, "many": 7})
    (axis,) = saved[0][1].axes
    drawn = [line.get_ydata() for line in axis.lines]
    np.testing.assert_allclose(drawn, [[9, 4], [3, 3], [9, 8], [7, 7]])
