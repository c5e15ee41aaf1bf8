"""Enclosing subgraphs of all pairs at once against one pair after the other, in one process.

    python benchmarks/subgraphs.py --data_dir=DATA
    python benchmarks/subgraphs.py --names made --rounds 2

DATA holds `flixster/training_test_dataset.mat` and the like, see `ntt_sparse.data.ratings`. The
peer works as the published code of IGMC does: for each pair rows and columns of SciPy matrices are
sliced, neighbours are sets, and the block of ratings is searched with `scipy.sparse.find`. Both
find as many nodes of each role and edges of each level, which is checked. Ours is timed in two
parts: the extraction, done once, and joining batches of 50 in a compiled program, done in every
step. Microseconds for each pair are medians over rounds, and so are the ratios of the peer's to
their sum in the same round.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timing

from ntt_sparse.data import ratings, subgraphs
from ntt_sparse.data.ratings import RatingData
from ntt_sparse.data.subgraphs import Subgraphs

_BATCH = 50


class Peer(NamedTuple):
    """What the peer finds of a pair."""

    users: Any
    items: Any
    levels: Any
    labels: Any


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description="Enclosing subgraphs, all at once and one by one.")
    parser.add_argument("--data_dir", default=None)
    parser.add_argument("--names", nargs="*", default=list(ratings.MONTI))
    parser.add_argument(
        "--pairs", type=int, default=1000, help="timed at most, drawn from training pairs"
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    if options.pairs < _BATCH or options.rounds < 1:
        parser.error(f"expected at least {_BATCH} pairs and 1 round")
    try:
        sets = [ratings.load(name, options.data_dir) for name in options.names]
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    print(f"microseconds for each of {options.pairs} pairs, medians of {options.rounds} rounds")
    head = ("ratings", "nodes", "edges", "extract", "join", "one by one", "ratio")
    print("".join(f"{title:>14}" for title in head))
    for data in sets:
        _compare(data, options)


def _compare(data: RatingData, options: Any) -> None:
    """Prints one row."""
    levels = ratings.levels(data.train)
    graph = subgraphs.index(data.train, data.num_users, data.num_items, levels)
    drawn = np.random.default_rng(0).permutation(len(data.train.values))[: options.pairs]
    pairs = ratings.take(data.train, drawn[: len(drawn) // _BATCH * _BATCH])
    count = len(pairs.users)
    matrices = _matrices(data, levels)
    found = subgraphs.extract(graph, pairs.users, pairs.items)
    _check(found, [one_by_one(*matrices, u, v) for u, v in zip(*pairs[:2], strict=True)])
    join, batches = _joiner(found, count)
    times = timing.in_turn(
        {
            "extract": lambda: subgraphs.extract(graph, pairs.users, pairs.items),
            "join": lambda: [timing.blocked(join, batch) for batch in batches],
            "peer": lambda: [one_by_one(*matrices, u, v) for u, v in zip(*pairs[:2], strict=True)],
        },
        options.rounds,
    )
    both = [a + b for a, b in zip(times["extract"], times["join"], strict=True)]
    ratio = statistics.median(p / b for p, b in zip(times["peer"], both, strict=True))
    each = [
        f"{1e6 * statistics.median(times[name]) / count:.1f}"
        for name in ("extract", "join", "peer")
    ]
    nodes = np.mean(found.users + found.items + 2)
    edges = np.mean(found.users + found.items + found.edge_counts)
    row = (data.name, f"{nodes:.1f}", f"{edges:.1f}", *each, f"{ratio:.0f}")
    print("".join(f"{cell:>14}" for cell in row), flush=True)


def _joiner(found: Subgraphs, count: int) -> tuple[Any, Any]:
    """What joins a batch, and the batches."""
    batches = np.arange(count).reshape(-1, _BATCH)
    sizes = subgraphs.sizes_of(found, batches)
    placed = jax.tree.map(jnp.asarray, found)
    join = jax.jit(lambda found, batch: subgraphs.join(found, batch, sizes))
    return (lambda batch: join(placed, batch)), jnp.asarray(batches)


def _matrices(data: RatingData, levels: np.ndarray) -> tuple[Any, Any]:
    """Ratings by rows and by columns, as level plus one, so that zero is none."""
    from scipy import sparse

    values = np.searchsorted(levels, data.train.values) + 1
    shape = (data.num_users, data.num_items)
    matrix = sparse.csr_matrix((values, (data.train.users, data.train.items)), shape=shape)
    return matrix, matrix.tocsc()


def one_by_one(rows: Any, columns: Any, user: int, item: int) -> Peer:
    """The subgraph of a pair in the way of the published code, of one hop.

    Args:
        rows: Levels plus one, a SciPy matrix stored by rows.
        columns: The same stored by columns.
        user: Of the pair.
        item: Of the pair.
    """
    from scipy import sparse

    others = set(sparse.find(columns[:, [item]])[0].tolist()) - {user}
    rated = set(sparse.find(rows[[user]])[1].tolist()) - {item}
    users, items = [user, *others], [item, *rated]
    block = rows[users][:, items]
    if block[0, 0]:
        block[0, 0] = 0
    a, b, level = sparse.find(block)
    distances = [0] + [1] * len(others), [0] + [1] * len(rated)
    labels = [2 * d for d in distances[0]] + [2 * d + 1 for d in distances[1]]
    return Peer(a, b + len(users), level - 1, np.array(labels))


def _check(found: Subgraphs, peers: Sequence[Peer]) -> None:
    """Both have the same nodes and, by level, the same numbers of edges."""
    for pair, peer in enumerate(peers):
        near, far = found.node_start[pair], found.edge_start[pair]
        around = found.users[pair] + found.items[pair]
        ours = np.concatenate(
            [
                found.levels[near : near + around],
                found.edge_levels[far : far + found.edge_counts[pair]],
            ]
        )
        labels = np.bincount(peer.labels, minlength=4).tolist()
        if labels != [1, 1, found.users[pair], found.items[pair]] or not np.array_equal(
            np.sort(ours), np.sort(peer.levels)
        ):
            raise AssertionError(f"pair {pair} differs")


if __name__ == "__main__":
    main()
