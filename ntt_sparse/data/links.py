"""Links held out of a graph, and pairs of nodes that are not linked.

Splits are made once, on the host; what a training step draws is drawn on the device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int, Int32, Int64

from ntt_sparse._types import PRNGKey

_MOST_PAIRS = 2**31


class LinkSplit(NamedTuple):
    """The links of a graph in three parts, pairs i < j, and as many pairs without a link."""

    train: Int32[np.ndarray, "train 2"]
    """Sorted; messages are passed along these alone."""
    validation: Int32[np.ndarray, "validation 2"]
    validation_negatives: Int32[np.ndarray, "validation 2"]
    test: Int32[np.ndarray, "test 2"]
    test_negatives: Int32[np.ndarray, "test 2"]


def split(
    edges: Int[np.ndarray, "m 2"],
    num_nodes: int,
    *,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.1,
    seed: int,
) -> LinkSplit:
    """Holds out links, as the example of a graph autoencoder in PyTorch Geometric did in 2021.

    Held-out links are the first ones of a random order, `floor(fraction * m)` of them, so the
    parts of all seeds are of the same sizes. The pairs beside them are drawn without replacement
    from all pairs that no part links.

    Args:
        edges: Pairs i < j, each once, see `ntt_sparse.data.graphs.Graph`.
        num_nodes: Nodes of the graph.
        validation_fraction: In (0, 1).
        test_fraction: In (0, 1); with the other one less than 1.
        seed: Of the order and the pairs, 0 to 2**32 - 1.

    Raises:
        ValueError: A fraction is out of range or holds out no link, or there are fewer pairs
            without a link than are to be drawn.
    """
    # The negated forms also refuse NaN.
    if not (0 < validation_fraction < 1 and 0 < test_fraction < 1) or not (
        validation_fraction + test_fraction < 1
    ):
        raise ValueError(
            f"{validation_fraction=} and {test_fraction=}: expected parts in (0, 1) that leave "
            "links to train on"
        )
    first, second = (int(part * len(edges)) for part in (validation_fraction, test_fraction))
    if not first or not second:
        raise ValueError(
            f"{validation_fraction=} and {test_fraction=} hold out {first} and {second} of "
            f"{len(edges)} links: expected one or more, of a larger part or graph"
        )
    random = np.random.RandomState(seed)
    order = random.permutation(len(edges))
    held, rest = order[: first + second], np.sort(order[first + second :])
    negatives = _unlinked(random, edges, num_nodes, first + second)
    edges = edges.astype(np.int32)
    return LinkSplit(
        edges[rest], edges[held[:first]], negatives[:first], edges[held[first:]], negatives[first:]
    )


def _unlinked(
    random: np.random.RandomState, edges: Int[np.ndarray, "m 2"], num_nodes: int, count: int
) -> Int32[np.ndarray, "count 2"]:
    """Different pairs i < j without a link, uniformly.

    Pairs are numbered row by row: those of i begin at `starts[i]`.
    """
    nodes = np.arange(num_nodes, dtype=np.int64)
    starts = nodes * (2 * num_nodes - nodes - 1) // 2
    linked = np.sort(starts[edges[:, 0]] + edges[:, 1] - edges[:, 0] - 1)
    total = num_nodes * (num_nodes - 1) // 2 - len(linked)
    if count > total:
        raise ValueError(
            f"{count} pairs without a link are asked for, a graph of {num_nodes} nodes and "
            f"{len(linked)} links has {total}: hold out fewer links"
        )
    numbers = _skip(linked, _different(random, total, count))
    rows = np.searchsorted(starts, numbers, side="right") - 1
    columns = numbers - starts[rows] + rows + 1
    return np.stack([rows, columns], axis=1).astype(np.int32)


def _different(
    random: np.random.RandomState, total: int, count: int
) -> Int64[np.ndarray, " count"]:
    """Different integers in [0, total), uniformly: draws in their order, repeated ones dropped."""
    if 2 * count > total:
        return random.permutation(total)[:count].astype(np.int64)
    found = np.zeros(0, np.int64)
    while len(found) < count:
        drawn = np.concatenate([found, random.randint(0, total, 2 * count, np.int64)])
        _, first = np.unique(drawn, return_index=True)
        found = drawn[np.sort(first)]
    return found[:count]


def _skip(members: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The numbers of these ranks among those that are no members, which are sorted."""
    below = members - np.arange(len(members))
    return ranks + np.searchsorted(below, ranks, side="right")


def pair_numbers(
    edges: Int[np.ndarray, "m 2"], num_nodes: int
) -> Int32[np.ndarray, " twice_m_and_n"]:
    """What `sample_unlinked` leaves out: linked pairs in both directions, and self-pairs.

    Args:
        edges: Pairs i < j, each once.
        num_nodes: Nodes of the graph, at most 46,340.

    Returns:
        `(2 m + n,)`, the numbers `i * num_nodes + j` of the pairs, sorted.

    Raises:
        ValueError: The graph has so many pairs that 32 bits do not count them, or all are linked.
    """
    if num_nodes**2 >= _MOST_PAIRS:
        raise ValueError(f"{num_nodes=}, expected at most 46340: pairs are counted in 32 bits")
    i, j, own = edges[:, 0].astype(np.int64), edges[:, 1].astype(np.int64), np.arange(num_nodes)
    numbers = np.concatenate([i * num_nodes + j, j * num_nodes + i, own * num_nodes + own])
    if len(numbers) >= num_nodes**2:
        raise ValueError("all pairs of nodes are linked: there are no others to draw")
    return np.sort(numbers).astype(np.int32)


def sample_unlinked(
    key: PRNGKey, excluded: Int[ArrayLike, " e"], num_nodes: int, count: int
) -> Int[Array, "count 2"]:
    """Draws pairs of different nodes that are not linked, in both directions, on the device.

    Each draw is uniform over all such pairs, exactly: of their numbers without the excluded ones
    the k-th is found by a binary search. Draws are independent, so a pair may come twice; the
    reference draws without replacement, of millions of pairs nearly the same.

    Args:
        key: Of the draw.
        excluded: From `pair_numbers`.
        num_nodes: Nodes of the graph.
        count: Pairs to draw.
    """
    excluded = jnp.asarray(excluded)
    size = excluded.shape[0]
    ranks = jax.random.randint(key, (count,), 0, num_nodes**2 - size, excluded.dtype)
    below = excluded - jnp.arange(size, dtype=excluded.dtype)
    numbers = ranks + jnp.searchsorted(below, ranks, side="right").astype(excluded.dtype)
    return jnp.stack([numbers // num_nodes, numbers % num_nodes], axis=1)
