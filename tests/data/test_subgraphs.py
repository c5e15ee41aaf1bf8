"""Enclosing subgraphs against sets of neighbours, pair by pair, and how batches are joined."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.data import ratings, subgraphs
from ntt_sparse.data.ratings import Ratings

USERS, ITEMS = 17, 13


def made(seed=0, share=0.3):
    """Ratings that are all different, so that the level of an edge says which pair it is."""
    rng = np.random.default_rng(seed)
    users, items = np.nonzero(rng.uniform(size=(USERS, ITEMS)) < share)
    values = rng.permutation(len(users)).astype(np.float32)
    return Ratings(users.astype(np.int32), items.astype(np.int32), values)


def index(known, users=USERS, items=ITEMS):
    return subgraphs.index(known, users, items, ratings.levels(known))


def every_pair():
    return (column.reshape(-1) for column in np.meshgrid(range(USERS), range(ITEMS), indexing="ij"))


def by_pair(known):
    """`{(user, item): value}`."""
    return {(u, i): v for u, i, v in zip(*(column.tolist() for column in known), strict=True)}


def neighbours_by_hand(values, user, item):
    """Other users and other items, as the published code finds them, ascending."""
    raters = sorted(u for u, i in values if i == item and u != user)
    rated = sorted(i for u, i in values if u == user and i != item)
    return raters, rated


def check(values, levels, found, pair, user, item, raters, rated):
    """One of the subgraphs is that of a pair: nodes, edges and their levels."""
    users, items = [user, *raters], [item, *rated]
    assert (found.users[pair], found.items[pair]) == (len(raters), len(rated))
    nodes = [("user", user), ("item", item)]
    nodes += [("user", u) for u in raters] + [("item", i) for i in rated]
    edges = {}
    for number, (role, name) in enumerate(nodes[2:]):
        level = found.levels[found.node_start[pair] + number]
        edges[(name, item) if role == "user" else (user, name)] = levels[level]
    place = slice(found.edge_start[pair], found.edge_start[pair] + found.edge_counts[pair])
    between = zip(
        found.edge_users[place], found.edge_items[place], found.edge_levels[place], strict=True
    )
    for a, b, level in between:
        (role_a, u), (role_b, i) = nodes[a], nodes[b]
        assert (role_a, role_b) == ("user", "item") and a >= 2 and b >= 2 and (u, i) not in edges
        edges[u, i] = levels[level]
    inside = {(u, i) for u in users for i in items} - {(user, item)}
    assert edges == {pair: values[pair] for pair in inside if pair in values}


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_subgraphs_of_all_pairs_by_hand(share):
    """Rated pairs and others, also where nothing is known of a user or an item."""
    known = made(share=share)
    users, items = every_pair()
    found = subgraphs.extract(index(known), users, items)
    values, levels = by_pair(known), ratings.levels(known)
    for pair, (user, item) in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        check(values, levels, found, pair, user, item, *neighbours_by_hand(values, user, item))


@pytest.mark.skipif("MONTI_DIR" not in os.environ, reason="MONTI_DIR names no folder of ratings")
def test_subgraphs_of_real_pairs_by_hand():
    data = ratings.load("yahoo_music", os.environ["MONTI_DIR"])
    values, levels = by_pair(data.train), ratings.levels(data.train)
    graph = subgraphs.index(data.train, data.num_users, data.num_items, levels)
    rng = np.random.default_rng(0)
    for part in (data.train, data.test):
        chosen = ratings.take(part, rng.permutation(len(part.users))[:10])
        found = subgraphs.extract(graph, chosen.users, chosen.items)
        for pair, (user, item, _) in enumerate(zip(*(c.tolist() for c in chosen), strict=True)):
            around = neighbours_by_hand(values, user, item)
            check(values, levels, found, pair, user, item, *around)


def test_neighbours_are_drawn_where_there_are_many():
    known = made(share=0.6)
    graph, values, levels = index(known), by_pair(known), ratings.levels(known)
    users, items = every_pair()
    found = subgraphs.extract(graph, users, items, most=4, seed=3)
    rating_of = {value: pair for pair, value in values.items()}
    drawn = set()
    for pair, (user, item) in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        raters, rated = neighbours_by_hand(values, user, item)
        start = found.node_start[pair]
        count = found.users[pair] + found.items[pair]
        # The rating of a node with a target says who it is.
        around = [rating_of[levels[level]] for level in found.levels[start : start + count]]
        some = [u for u, _ in around[: found.users[pair]]]
        others = [i for _, i in around[found.users[pair] :]]
        assert len(some) == min(4, len(raters)) and len(others) == min(4, len(rated))
        assert some == sorted(set(some) & set(raters))
        assert others == sorted(set(others) & set(rated))
        check(values, levels, found, pair, user, item, some, others)
        drawn.add((item, tuple(some)))
    # Not the first four of each item, for every user.
    assert len({item for item, _ in drawn}) < len(drawn)
    again = subgraphs.extract(graph, users, items, most=4, seed=3)
    other = subgraphs.extract(graph, users, items, most=4, seed=4)
    assert all(map(np.array_equal, found, again)) and not all(map(np.array_equal, found, other))
    enough = subgraphs.extract(graph, users, items, most=USERS)
    assert all(map(np.array_equal, enough, subgraphs.extract(graph, users, items)))


@pytest.fixture(scope="module")
def joined():
    """All pairs in batches of seven, joined by one program that is traced once."""
    known = made()
    users, items = every_pair()
    found = subgraphs.extract(index(known), users, items)
    batches = np.random.default_rng(1).permutation(len(users))[:217].reshape(-1, 7)
    sizes, traced = subgraphs.sizes_of(found, batches), []

    @jax.jit
    def join(found, pairs):
        traced.append(None)
        return subgraphs.join(found, pairs, sizes)

    placed = jax.tree.map(jnp.asarray, found)
    graphs = [jax.device_get(join(placed, jnp.asarray(batch))) for batch in batches]
    assert len(traced) == 1
    return found, batches, sizes, graphs


def test_a_batch_is_its_subgraphs_side_by_side(joined):
    found, batches, sizes, graphs = joined
    fullest = 0
    for batch, graph in zip(batches, graphs, strict=True):
        assert len(graph.labels) == sizes.nodes and len(graph.edges.users) == sizes.edges
        first = partner = edge = 0
        for place, pair in enumerate(batch):
            users, items = found.users[pair], found.items[pair]
            count = 2 + users + items
            nodes = slice(first, first + count)
            assert graph.labels[nodes].tolist() == [0, 1, *[2] * users, *[3] * items]
            assert graph.targets[place].tolist() == [first, first + 1]
            # The targets have no partner; users have the item, items the user.
            assert graph.partners[nodes].tolist() == [
                14, 14, *[2 * place + 1] * users, *[2 * place] * items
            ]  # fmt: skip
            start = found.node_start[pair]
            np.testing.assert_array_equal(
                graph.levels[first + 2 : first + count], found.levels[start : start + count - 2]
            )
            edges, number = found.edge_start[pair], found.edge_counts[pair]
            for name in ("users", "items", "levels"):
                expected = getattr(found, f"edge_{name}")[edges : edges + number].astype(int)
                got = getattr(graph.edges, name)[edge : edge + number]
                np.testing.assert_array_equal(got, expected + (name != "levels") * first)
            first, edge, partner = first + count, edge + number, partner + count - 2
        # What is left is of nobody.
        assert np.all(graph.partners[first:] == 14)
        assert np.sum(graph.partners < 14) == partner
        assert np.all(graph.edges.users[edge:] == sizes.nodes)
        assert np.all(graph.edges.items[edge:] == sizes.nodes)
        fullest = max(fullest, first)
    assert fullest > 7 / 8 * sizes.nodes - 8


def test_the_pair_itself_is_no_edge(joined):
    """Its rating would be the answer: one node of label 0 and 1 each, and no edge between them."""
    _, _, _, graphs = joined
    for graph in graphs:
        targets = set(graph.targets.reshape(-1).tolist())
        assert len(targets) == 14 and set(graph.labels.tolist()) <= {0, 1, 2, 3}
        assert not targets & set(graph.edges.users.tolist() + graph.edges.items.tolist())
        assert np.all(graph.partners[sorted(targets)] == 14)


def test_sizes_are_few_and_pad_by_an_eighth_at_most():
    counts = np.arange(100, 5000)
    blank = np.zeros(len(counts), np.int32)
    found = subgraphs.Subgraphs(counts - 2, blank, blank, blank, blank, counts, *[blank] * 3)
    sizes = [subgraphs.sizes_of(found, np.array([[i]])) for i in range(0, len(counts), 7)]
    for size, count in zip(sizes, counts[::7], strict=True):
        assert count <= size.nodes == size.edges <= max(9 / 8 * count + 1, count + 8)
    # Eight from a power of two to the next.
    assert len({size.nodes for size in sizes}) <= 8 * 6


def test_parts_one_after_the_other():
    known = made()
    users, items = every_pair()
    found = subgraphs.extract(index(known), users, items)
    halves = [
        subgraphs.extract(index(known), users[part], items[part])
        for part in (slice(0, 100), slice(100, None), slice(0, 0))
    ]
    for one, other in zip(found, subgraphs.concatenate(halves), strict=True):
        np.testing.assert_array_equal(one, other)


def test_mistakes_are_refused():
    known = made()
    graph, few = index(known), np.array([0, 1])
    with pytest.raises(ValueError, match="user 17 is out of range: there are 17, counted from 0"):
        subgraphs.extract(graph, np.array([17]), np.array([0]))
    with pytest.raises(ValueError, match="item -1 is out of range"):
        subgraphs.extract(graph, np.array([0]), np.array([-1]))
    with pytest.raises(ValueError, match="2 users and 1 items are no pairs"):
        subgraphs.extract(graph, few, few[:1])
    with pytest.raises(ValueError, match="most=0 other users and items, expected 1 or more"):
        subgraphs.extract(graph, few, few, most=0)
    with pytest.raises(ValueError, match="item 12 is out of range: there are 12"):
        index(known, items=12)
    twice = Ratings(*(np.concatenate([column, column[:1]]) for column in known))
    with pytest.raises(ValueError, match="more than one rating"):
        index(twice)
    for value in (0.5, -1.0, 1e6):
        values = known.values.copy()
        values[3] = value
        with pytest.raises(ValueError, match=f"rating 3 is {value}, expected one of the"):
            subgraphs.index(known._replace(values=values), USERS, ITEMS, ratings.levels(known))
