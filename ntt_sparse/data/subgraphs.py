"""Enclosing subgraphs of pairs of a user and an item, extracted once and joined in batches.

The subgraph of a pair holds the user and the item, all items that the user rated and all users
who rated the item, and the ratings between them, without that of the pair itself.

Source: Zhang & Chen 2020, "Inductive matrix completion based on graph neural networks",
https://arxiv.org/abs/1904.12058, Section 3.1, of one hop.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from ntt_sparse.data.ratings import Ratings

# Pairs at a time, whose table of item places stays in the cache of a core.
_CHUNK = 64
_LARGEST = 2**31 - 1


class RatingGraph(NamedTuple):
    """Ratings by user and by item, as rows one after the other.

    Attributes:
        user_start: `(users + 1,)`, where the ratings of each user begin.
        user_items: `(n,)`, the items of each user, ascending.
        user_levels: `(n,)`, their levels.
        item_start: `(items + 1,)`, where the ratings of each item begin.
        item_users: `(n,)`, the users of each item, ascending.
        item_levels: `(n,)`, their levels.
    """

    user_start: Integer[np.ndarray, "_"]
    user_items: Integer[np.ndarray, " n"]
    user_levels: Integer[np.ndarray, " n"]
    item_start: Integer[np.ndarray, "_"]
    item_users: Integer[np.ndarray, " n"]
    item_levels: Integer[np.ndarray, " n"]


class Subgraphs(NamedTuple):
    """The subgraphs of `p` pairs.

    Nodes of a subgraph are counted from 0: the target user, the target item, the other users, the
    other items. An edge is a rating of one level; those that an other node has with a target
    come with the node. In compiled programs the columns are JAX arrays.

    Attributes:
        users: How many other users each has.
        items: How many other items.
        node_start: Where its other nodes begin in `levels`.
        levels: Of the rating between an other node and the target on the other side.
        edge_start: Where its edges between other nodes begin in the next three.
        edge_counts: How many there are.
        edge_users: Their users, as nodes of the subgraph.
        edge_items: Their items, as nodes of the subgraph.
        edge_levels: Their levels.
    """

    users: Integer[np.ndarray, " p"]
    items: Integer[np.ndarray, " p"]
    node_start: Integer[np.ndarray, " p"]
    levels: Integer[np.ndarray, " nodes"]
    edge_start: Integer[np.ndarray, " p"]
    edge_counts: Integer[np.ndarray, " p"]
    edge_users: Integer[np.ndarray, " edges"]
    edge_items: Integer[np.ndarray, " edges"]
    edge_levels: Integer[np.ndarray, " edges"]


class Sizes(NamedTuple):
    """What the subgraphs of a batch are padded to, see `sizes_of`."""

    nodes: int
    edges: int


class Edges(NamedTuple):
    """Ratings between nodes; padding is of a node that is not there, one past the last."""

    users: Int[Array, " e"]
    items: Int[Array, " e"]
    levels: Int[Array, " e"]


class Graphs(NamedTuple):
    """The subgraphs of a batch as one graph of parts that are not connected.

    Attributes:
        labels: Of the nodes: 0 target users, 1 target items, 2 other users, 3 other items. Nodes
            past those of the batch are padding, which has no edges.
        partners: For each other node, the target that it has a rating with, as its place in
            `targets` row by row; `2 b` for targets and padding.
        levels: Of these ratings.
        edges: The ratings between other nodes.
        targets: The nodes of the target user and of the target item of each pair.
    """

    labels: Int[Array, " n"]
    partners: Int[Array, " n"]
    levels: Int[Array, " n"]
    edges: Edges
    targets: Int[Array, "b 2"]


class _Rows(NamedTuple):
    """Neighbours of some targets, one target after the other."""

    owner: Integer[np.ndarray, " k"]
    ids: Integer[np.ndarray, " k"]
    levels: Integer[np.ndarray, " k"]


def index(
    ratings: Ratings, num_users: int, num_items: int, levels: Float[np.ndarray, " r"]
) -> RatingGraph:
    """Ratings as a graph.

    Args:
        ratings: Of different pairs.
        num_users: Users, with those who rated nothing.
        num_items: Items, with those that nobody rated.
        levels: All values that ratings have, ascending.

    Raises:
        ValueError: A user or an item is out of range, a pair is there twice, or a rating is none
            of the levels.
    """
    users, items = np.asarray(ratings.users, np.int64), np.asarray(ratings.items, np.int64)
    check_pairs(users, items, num_users, num_items)
    keys = users * num_items + items
    if len(np.unique(keys)) < len(keys):
        raise ValueError("a pair of a user and an item has more than one rating, expected one")
    place = np.minimum(np.searchsorted(levels, ratings.values), len(levels) - 1)
    if bad := np.flatnonzero(levels[place] != ratings.values).tolist():
        raise ValueError(
            f"rating {bad[0]} is {ratings.values[bad[0]]}, expected one of the {len(levels)} levels"
            f" from {levels[0]} to {levels[-1]}"
        )
    place = place.astype(np.uint8 if len(levels) <= 256 else np.int32)
    by_user, by_item = np.lexsort((items, users)), np.lexsort((users, items))
    return RatingGraph(
        _starts(users, num_users), items[by_user].astype(np.int32), place[by_user],
        _starts(items, num_items), users[by_item].astype(np.int32), place[by_item],
    )  # fmt: skip


def check_pairs(
    users: Integer[np.ndarray, "_"],
    items: Integer[np.ndarray, "_"],
    num_users: int,
    num_items: int,
) -> None:
    """Checks pairs of users and items.

    Raises:
        ValueError: There are not as many users as items, or one is out of range.
    """
    if len(users) != len(items):
        raise ValueError(f"{len(users)} users and {len(items)} items are no pairs")
    for name, values, count in (("user", users, num_users), ("item", items, num_items)):
        if bad := values[(values < 0) | (values >= count)].tolist():
            raise ValueError(f"{name} {bad[0]} is out of range: there are {count}, counted from 0")


def extract(
    graph: RatingGraph,
    users: Integer[np.ndarray, "_"],
    items: Integer[np.ndarray, "_"],
    *,
    most: int | None = None,
    seed: int = 0,
) -> Subgraphs:
    """The subgraphs of pairs, which may have a rating in the graph or not.

    Other users and items are ascending, and edges by user, then item.

    Args:
        graph: Of the ratings that are known.
        users: The user of each pair.
        items: The item of each pair.
        most: Other users, and other items, of a subgraph; where there are more, so many are
            drawn. By default all stay.
        seed: Of what is drawn, which depends on the other pairs too.

    Returns:
        The subgraphs, in the order of the pairs.

    Raises:
        ValueError: A user or an item is out of range, `most` is below 1, a subgraph has more
            than 32,767 nodes, or all have more than 2^31 edges.
    """
    users, items = np.asarray(users, np.int64), np.asarray(items, np.int64)
    num_users, num_items = len(graph.user_start) - 1, len(graph.item_start) - 1
    check_pairs(users, items, num_users, num_items)
    if most is not None and most < 1:
        raise ValueError(f"{most=} other users and items, expected 1 or more")
    rng = np.random.RandomState(seed)
    places = np.full((min(_CHUNK, max(len(users), 1)), num_items), -1, np.int32)
    parts = [
        _extract(graph, users[i : i + _CHUNK], items[i : i + _CHUNK], most, rng, places)
        for i in range(0, max(len(users), 1), _CHUNK)
    ]
    return concatenate(parts)


def concatenate(parts: Sequence[Subgraphs]) -> Subgraphs:
    """Subgraphs of several sets of pairs as one set.

    Raises:
        ValueError: Together they have more than 2^31 edges.
    """
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    joined = Subgraphs(*columns)
    # Those with targets are counted with the nodes.
    if (edges := max(len(joined.levels), len(joined.edge_users))) > _LARGEST:
        raise ValueError(
            f"the subgraphs have {edges} edges, expected less than 2^31: draw fewer neighbours"
        )
    return joined._replace(
        node_start=_before(joined.users + joined.items), edge_start=_before(joined.edge_counts)
    )


def sizes_of(subgraphs: Subgraphs, batches: Integer[np.ndarray, "... b"]) -> Sizes:
    """Sizes that every one of some batches fits in.

    They are rounded up to one of eight sizes between a power of two and the next, so that few
    programs are compiled, and padding adds an eighth at most.

    Args:
        subgraphs: Of the pairs.
        batches: Pairs of each batch, as indices.
    """
    nodes = np.asarray(subgraphs.users + subgraphs.items + 2, np.int64)[batches].sum(-1)
    edges = np.asarray(subgraphs.edge_counts, np.int64)[batches].sum(-1)
    return Sizes(_rounded(int(nodes.max())), _rounded(int(edges.max())))


def join(subgraphs: Subgraphs, pairs: Int[Array, " b"], sizes: Sizes) -> Graphs:
    """The subgraphs of a batch as one graph, in a compiled program.

    Args:
        subgraphs: Of all pairs, as JAX arrays.
        pairs: Those of the batch, as indices.
        sizes: From `sizes_of`, for batches with this one among them: edges and nodes beyond them
            are lost.
    """
    users = jnp.asarray(subgraphs.users)[pairs]
    others = users + jnp.asarray(subgraphs.items)[pairs]
    first = _first(others + 2)
    graph, local, real = _slots(others + 2, sizes.nodes)
    other = real & (local >= 2)
    is_user = local < users[graph] + 2
    labels = jnp.where(other, jnp.where(is_user, 2, 3), jnp.minimum(local, 1))
    # Users have a rating with the target item, items with the target user.
    partners = jnp.where(other, 2 * graph + is_user, 2 * len(pairs))
    place = jnp.where(other, jnp.asarray(subgraphs.node_start)[pairs][graph] + local - 2, 0)
    levels = _picked(subgraphs.levels, place)

    graph, local, real = _slots(jnp.asarray(subgraphs.edge_counts)[pairs], sizes.edges)
    place = jnp.where(real, jnp.asarray(subgraphs.edge_start)[pairs][graph] + local, 0)
    at_user, at_item = (
        jnp.where(real, first[graph] + _picked(column, place), sizes.nodes)
        for column in (subgraphs.edge_users, subgraphs.edge_items)
    )
    edges = Edges(at_user, at_item, _picked(subgraphs.edge_levels, place))
    targets = jnp.stack([first, first + 1], axis=1)
    # Worked out once, and not anew wherever they are read.
    return jax.lax.optimization_barrier(Graphs(labels, partners, levels, edges, targets))


def _extract(
    graph: RatingGraph,
    users: np.ndarray,
    items: np.ndarray,
    most: int | None,
    rng: np.random.RandomState,
    places: np.ndarray,
) -> Subgraphs:
    """The subgraphs of some pairs; `places`, -1 everywhere, is so again afterwards."""
    raters = _neighbours(graph.item_start, graph.item_users, graph.item_levels, items, users)
    rated = _neighbours(graph.user_start, graph.user_items, graph.user_levels, users, items)
    raters, rated = (_drawn(rows, len(users), most, rng) for rows in (raters, rated))
    num_users, num_items = (
        np.bincount(rows.owner, minlength=len(users)) for rows in (raters, rated)
    )
    if np.max(num_users + num_items, initial=0) + 2 >= 2**15:
        raise ValueError("a subgraph has more than 32,767 nodes: draw fewer neighbours")
    # Where the items of each subgraph are among its nodes.
    nodes = 2 + num_users[rated.owner] + _within(num_items)
    places[rated.owner, rated.ids] = nodes
    # All ratings of the other users, of which those of items of the subgraph stay.
    begin = graph.user_start[raters.ids]
    counts = graph.user_start[raters.ids + 1] - begin
    rating = _ranges(begin, counts)
    row = np.repeat(np.arange(len(raters.ids), dtype=np.int32), counts)
    found = places.reshape(-1)[
        np.repeat(raters.owner * places.shape[1], counts) + graph.user_items[rating]
    ]
    places[rated.owner, rated.ids] = -1
    inside = np.flatnonzero(found >= 0)
    row = row[inside]
    levels = np.concatenate([raters.levels, rated.levels])
    order = np.argsort(np.concatenate([raters.owner, rated.owner]), kind="stable")
    counted = np.bincount(raters.owner[row], minlength=len(users))
    empty = np.zeros(len(users), np.int32)
    return Subgraphs(
        num_users.astype(np.int32), num_items.astype(np.int32), empty, levels[order],
        empty, counted.astype(np.int32), (2 + _within(num_users))[row].astype(np.int16),
        found[inside].astype(np.int16), graph.user_levels[rating[inside]],
    )  # fmt: skip


def _neighbours(
    start: np.ndarray, ids: np.ndarray, levels: np.ndarray, targets: np.ndarray, without: np.ndarray
) -> _Rows:
    """The neighbours of targets, but for one of each."""
    begin = start[targets]
    counts = start[targets + 1] - begin
    place = _ranges(begin, counts)
    owner = np.repeat(np.arange(len(targets), dtype=np.int32), counts)
    stay = ids[place] != without[owner]
    place = place[stay]
    return _Rows(owner[stay], ids[place], levels[place])


def _drawn(rows: _Rows, count: int, most: int | None, rng: np.random.RandomState) -> _Rows:
    """At most so many neighbours of each target, in their order."""
    counts = np.bincount(rows.owner, minlength=count)
    if most is None or np.max(counts, initial=0) <= most:
        return rows
    order = np.lexsort((rng.uniform(size=len(rows.owner)), rows.owner))
    stay = np.sort(order[_within(counts) < most])
    return _Rows(*(column[stay] for column in rows))


def _ranges(begin: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ranges of so many numbers, one after the other."""
    return np.repeat(begin - _before(counts), counts) + np.arange(counts.sum(), dtype=begin.dtype)


def _within(counts: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... anew for each count."""
    return _ranges(np.zeros_like(counts), counts)


def _before(counts: np.ndarray) -> np.ndarray:
    """The sum of the counts before each."""
    return (np.cumsum(counts) - counts).astype(np.int32)


def _starts(rows: np.ndarray, count: int) -> np.ndarray:
    counts = np.bincount(rows, minlength=count)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _rounded(size: int) -> int:
    step = 2 ** max(size.bit_length() - 4, 3)
    return -(-max(size, 1) // step) * step


def _first(counts: Int[Array, " b"]) -> Int[Array, " b"]:
    return jnp.cumsum(counts) - counts


def _slots(
    counts: Int[Array, " b"], size: int
) -> tuple[Int[Array, " s"], Int[Array, " s"], Bool[Array, " s"]]:
    """For slots in turn: which graph each is of, its number there, and whether it is of any."""
    slots = jnp.arange(size)
    ends = jnp.cumsum(counts)
    graph = jnp.sum(ends[:, None] <= slots, axis=0, dtype=jnp.int32)
    graph = jnp.minimum(graph, len(counts) - 1)
    return graph, slots - _first(counts)[graph], slots < ends[-1]


def _picked(column: Any, place: Int[Array, " s"]) -> Int[Array, " s"]:
    """Small integers of a column, which may be empty, wide enough to count with."""
    if not len(column):
        return jnp.zeros(place.shape, jnp.int32)
    return jnp.asarray(column)[place].astype(jnp.int32)
