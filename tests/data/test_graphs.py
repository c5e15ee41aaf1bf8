"""Graphs: their form, features of rows that sum to one, and one that is made."""

import numpy as np
import pytest

from ntt_sparse.data import graphs


def test_edges_are_undirected_and_there_once():
    pairs = [(3, 1), (1, 3), (2, 2), (0, 4), (1, 3)]
    expected = [[0, 4], [1, 3]]
    assert graphs.undirected(pairs, 5).tolist() == expected
    assert graphs.undirected(np.array(pairs), 5).tolist() == expected
    assert graphs.undirected([], 5).shape == (0, 2)
    for wrong in ([(0, 5)], [(-1, 2)]):
        with pytest.raises(ValueError, match="expected 0 to 4"):
            graphs.undirected(wrong, 5)


def test_rows_sum_to_one():
    matrix = np.array([[1.0, 0, 3], [0, 0, 0], [0, 0.5, 0]])
    x = graphs.entries(matrix)
    assert x.rows.tolist() == [0, 0, 2] and x.columns.tolist() == [0, 2, 1]
    np.testing.assert_array_equal(x.dense(), matrix)
    expected = [[0.25, 0, 0.75], [0, 0, 0], [0, 1, 0]]
    np.testing.assert_allclose(graphs.normalise_rows(x).dense(), expected)
    for value in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="negative or not finite"):
            graphs.normalise_rows(graphs.entries(np.array([[1.0, value]])))


def test_a_made_graph_has_its_degrees_and_words():
    graph = graphs.blocks(num_nodes=900, num_blocks=3, degree=8.0, mixing=0.25, seed=1)
    assert graph.y.tolist() == [i % 3 for i in range(900)]
    i, j = graph.edges.T
    assert np.all(i < j) and len(np.unique(graph.edges, axis=0)) == len(graph.edges)
    # Sums of thousands of independent draws.
    assert abs(2 * len(graph.edges) / 900 - 8) < 0.4
    assert abs(np.mean(graph.y[i] != graph.y[j]) - 0.25) < 0.03
    said = graph.x.dense()
    own = np.arange(240) % 3 == graph.y[:, None]
    assert abs(said[own].mean() - 0.15) < 0.005 and abs(said[~own].mean() - 0.01) < 0.001
    assert said.any(1).all()
    again = graphs.blocks(num_nodes=900, num_blocks=3, degree=8.0, mixing=0.25, seed=1)
    np.testing.assert_array_equal(again.edges, graph.edges)
    assert len(graphs.blocks(seed=2).edges) != len(graphs.blocks(seed=3).edges)


def test_a_node_without_words_says_one():
    graph = graphs.blocks(num_nodes=40, num_blocks=4, num_features=4, degree=2.0)
    said = graph.x.dense()
    assert np.all(said.sum(1) >= 1)
    silent = said.sum(1) == 1
    assert np.mean(said[silent].argmax(1) == graph.y[silent]) > 0.9


@pytest.mark.parametrize(
    "fields",
    [
        {"num_nodes": 11},
        {"num_features": 5},
        {"num_blocks": 0},
        {"mixing": 1.1},
        {"mixing": float("nan")},
        {"degree": -1.0},
        {"degree": 200.0},
    ],
)
def test_bad_input(fields):
    with pytest.raises(ValueError, match=r"expected|more neighbours"):
        graphs.blocks(**fields)
