"""Graphs whose nodes have features: their form, and one that is made.

Real ones are read by `ntt_sparse.data.planetoid`, links are held out by `ntt_sparse.data.links`.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Real

# Of the features of nodes that are made: words of the node's own block, and all others.
_OWN_WORD, _OTHER_WORD = 0.15, 0.01


class Entries(NamedTuple):
    """A sparse matrix by its entries, sorted by row and column, none of them twice."""

    rows: Int32[np.ndarray, " nnz"]
    columns: Int32[np.ndarray, " nnz"]
    values: Float32[np.ndarray, " nnz"]
    shape: tuple[int, int]

    def dense(self) -> Float32[np.ndarray, "n d"]:
        """The matrix with its zeros."""
        matrix = np.zeros(self.shape, np.float32)
        matrix[self.rows, self.columns] = self.values
        return matrix


class Graph(NamedTuple):
    """An undirected graph without loops."""

    x: Entries
    """Features of the nodes, `(n, d)`."""
    edges: Int32[np.ndarray, "m 2"]
    """Pairs i < j of nodes, each once, sorted."""
    y: Int32[np.ndarray, " n"]
    """Classes of the nodes, 0 to num_classes - 1, or -1 where none is known."""
    num_classes: int
    name: str

    @property
    def num_nodes(self) -> int:
        """Nodes, isolated ones among them."""
        return self.x.shape[0]


def entries(matrix: Real[np.ndarray, "n d"]) -> Entries:
    """A matrix by its entries that are not zero."""
    rows, columns = np.nonzero(matrix)
    values = matrix[rows, columns].astype(np.float32)
    return Entries(rows.astype(np.int32), columns.astype(np.int32), values, matrix.shape)


def normalise_rows(x: Entries) -> Entries:
    """Features of which each row sums to one; rows of zeros stay.

    Raises:
        ValueError: A feature is negative or not finite.
    """
    if not np.all(np.isfinite(x.values) & (x.values >= 0)):
        raise ValueError("features are negative or not finite, expected numbers of at least 0")
    sums = np.bincount(x.rows, x.values, x.shape[0])[x.rows]
    values = np.divide(x.values, sums, out=np.zeros_like(sums), where=sums > 0)
    return x._replace(values=values.astype(np.float32))


def undirected(
    pairs: Int[np.ndarray, "p 2"] | Iterable[tuple[int, int]], num_nodes: int
) -> Int32[np.ndarray, "m 2"]:
    """Pairs of nodes as the edges of a `Graph`: i < j, each once, sorted, without loops.

    Raises:
        ValueError: A node is not among 0..num_nodes - 1.
    """
    if not isinstance(pairs, np.ndarray):
        pairs = np.asarray(list(pairs), np.int64).reshape(-1, 2)
    if pairs.size and not 0 <= pairs.min() <= pairs.max() < num_nodes:
        raise ValueError(
            f"an edge has the nodes {pairs.min()} to {pairs.max()}, expected 0 to {num_nodes - 1}"
        )
    ordered = np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
    return np.unique(ordered, axis=0).astype(np.int32)


def blocks(
    *,
    num_nodes: int = 600,
    num_blocks: int = 6,
    num_features: int = 240,
    degree: float = 5.0,
    mixing: float = 0.1,
    seed: int = 0,
) -> Graph:
    """A stochastic block model whose nodes say words of their block: citations, made.

    Two nodes of a block are linked more often than others, all pairs independently. A node has
    each word that belongs to its block with a probability of 15 %, each other word with 1 %, and
    at least one.

    Source: Holland, Laskey & Leinhardt 1983, "Stochastic blockmodels: first steps".

    Args:
        num_nodes: At least two for each block; node i is of block `i % num_blocks`.
        num_blocks: Of nodes, and of words.
        num_features: Words, at least one for each block.
        degree: Mean number of neighbours.
        mixing: The part of them that are of other blocks, in [0, 1].
        seed: Of all draws, 0 to 2**32 - 1.

    Returns:
        Features 0 and 1, the blocks as classes.

    Raises:
        ValueError: The numbers permit no such graph.
    """
    if num_blocks < 1 or num_nodes < 2 * num_blocks or num_features < num_blocks:
        raise ValueError(
            f"{num_nodes=} and {num_features=} for {num_blocks=}: expected at least two nodes and "
            "a word for each block"
        )
    random = np.random.RandomState(seed)
    y = np.arange(num_nodes, dtype=np.int32) % num_blocks
    alike = y[:, None] == y
    chance = _chances(alike, degree, mixing)
    pairs = np.argwhere(np.triu(random.uniform(size=alike.shape) < chance, 1))
    words = y[:, None] == np.arange(num_features) % num_blocks
    said = random.uniform(size=words.shape) < np.where(words, _OWN_WORD, _OTHER_WORD)
    # Of one that would say nothing the first word of its block.
    silent = np.flatnonzero(~said.any(1))
    said[silent, y[silent]] = True
    edges = undirected(pairs, num_nodes)
    return Graph(entries(said.astype(np.float32)), edges, y, num_blocks, "blocks")


def _chances(alike: Bool[np.ndarray, "n n"], degree: float, mixing: float) -> np.ndarray:
    """The probability of each link."""
    # The negated forms also refuse NaN.
    if not 0 <= mixing <= 1 or not degree >= 0:
        raise ValueError(f"{degree=} and {mixing=}: expected at least 0, and a part in [0, 1]")
    own = alike.sum(1).mean() - 1
    other = len(alike) - 1 - own
    inside, outside = degree * (1 - mixing) / own, degree * mixing / max(other, 1)
    if max(inside, outside) > 1:
        raise ValueError(f"{degree=} is more neighbours than a block of {own + 1:.0f} nodes has")
    return np.where(alike, inside, outside)
