"""Links held out, and pairs that are not linked."""

import jax
import numpy as np
import pytest
from scipy import stats

from ntt_sparse.data import graphs, links


def some_edges(num_nodes=30, count=80, seed=0):
    random = np.random.RandomState(seed)
    pairs = np.argwhere(np.triu(np.ones((num_nodes, num_nodes)), 1))
    return graphs.undirected(pairs[random.permutation(len(pairs))[:count]], num_nodes)


def as_set(pairs):
    return {tuple(pair) for pair in np.asarray(pairs).tolist()}


def test_a_split_holds_every_link_once():
    edges = some_edges()
    split = links.split(edges, 30, seed=3)
    # floor(0.05 * 80) and floor(0.1 * 80).
    assert [len(part) for part in split] == [68, 4, 4, 8, 8]
    found = np.concatenate([split.train, split.validation, split.test])
    assert as_set(found) == as_set(edges) and len(found) == len(edges)
    assert np.all(split.train[:, 0] < split.train[:, 1])
    negatives = np.concatenate([split.validation_negatives, split.test_negatives])
    assert np.all(negatives[:, 0] < negatives[:, 1]) and negatives.max() < 30
    # Of no part of the links, and none twice.
    assert len(as_set(negatives)) == 12 and not as_set(negatives) & as_set(edges)


def test_seeds_split_otherwise_and_again():
    edges = some_edges()
    first, again, other = (links.split(edges, 30, seed=seed) for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert as_set(first.test) != as_set(other.test)
    assert as_set(first.test_negatives) != as_set(other.test_negatives)
    assert [len(part) for part in first] == [len(part) for part in other]


def test_negatives_are_every_other_pair():
    """As many as there are: all pairs without a link, each once."""
    edges = some_edges(num_nodes=8, count=20)
    split = links.split(edges, 8, validation_fraction=0.2, test_fraction=0.2, seed=0)
    negatives = np.concatenate([split.validation_negatives, split.test_negatives])
    everything = as_set(np.argwhere(np.triu(np.ones((8, 8)), 1)))
    assert as_set(negatives) == everything - as_set(edges) and len(negatives) == 8
    with pytest.raises(ValueError, match="10 pairs without a link are asked for"):
        links.split(edges, 8, validation_fraction=0.25, test_fraction=0.25, seed=0)


def test_held_out_negatives_are_uniform():
    edges = some_edges(num_nodes=12, count=40)
    free = sorted(as_set(np.argwhere(np.triu(np.ones((12, 12)), 1))) - as_set(edges))
    counts = dict.fromkeys(free, 0)
    for seed in range(800):
        split = links.split(edges, 12, validation_fraction=0.05, test_fraction=0.05, seed=seed)
        for pair in as_set(split.validation_negatives) | as_set(split.test_negatives):
            counts[pair] += 1
    assert sum(counts.values()) == 4 * 800
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_draws_are_uniform_over_pairs_that_are_not_linked():
    edges = some_edges(num_nodes=9, count=20)
    excluded = links.pair_numbers(edges, 9)
    assert len(excluded) == 2 * 20 + 9 and np.all(np.diff(excluded) > 0)
    drawn = np.asarray(links.sample_unlinked(jax.random.key(0), excluded, 9, 20_000))
    linked = as_set(edges) | as_set(edges[:, ::-1])
    free = {(i, j) for i in range(9) for j in range(9) if i != j} - linked
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    # Each of 32 pairs in both directions, and nothing else.
    assert as_set(found) == free and len(free) == 32
    assert stats.chisquare(counts).pvalue > 1e-3


def test_draws_at_the_ends_of_a_graph():
    """Everything is linked but the first and the last pair."""
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    edges = graphs.undirected([pair for pair in pairs if pair not in ((0, 1), (3, 4))], 5)
    drawn = links.sample_unlinked(jax.random.key(1), links.pair_numbers(edges, 5), 5, 200)
    assert as_set(drawn) == {(0, 1), (1, 0), (3, 4), (4, 3)}


def test_the_largest_graph_is_counted():
    n = 46_340
    edges = np.array([[0, 1], [n - 2, n - 1]], np.int32)
    excluded = links.pair_numbers(edges, n)
    assert excluded[-1] == n * n - 1 and np.all(np.diff(excluded.astype(np.int64)) > 0)
    drawn = np.asarray(links.sample_unlinked(jax.random.key(0), excluded, n, 1000))
    assert drawn.min() >= 0 and drawn.max() < n and np.all(drawn[:, 0] != drawn[:, 1])
    assert drawn[:, 0].max() > 0.99 * n
    with pytest.raises(ValueError, match="expected at most 46340"):
        links.pair_numbers(edges, n + 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation_fraction": 0.0}, "expected parts in"),
        ({"test_fraction": float("nan")}, "expected parts in"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "expected parts in"),
        ({"validation_fraction": 0.01}, "hold out 0 and 8 of 80 links"),
    ],
)
def test_bad_input(fields, message):
    with pytest.raises(ValueError, match=message):
        links.split(some_edges(), 30, seed=0, **fields)


def test_a_complete_graph_has_no_other_pairs():
    edges = graphs.undirected([(i, j) for i in range(4) for j in range(i)], 4)
    with pytest.raises(ValueError, match="all pairs of nodes are linked"):
        links.pair_numbers(edges, 4)
