"""Graph autoencoders in PyTorch Geometric and in PyTorch, for `graphs.py`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch_geometric.nn import GAE, GCNConv
from torch_geometric.utils import add_self_loops, negative_sampling

_HIDDEN, _SIZE = 32, 16


class Encoder(nn.Module):
    """Two graph convolutions of PyTorch Geometric, which keep the weights of messages."""

    def __init__(self, features: int):
        super().__init__()
        self.first = GCNConv(features, _HIDDEN, cached=True)
        self.last = GCNConv(_HIDDEN, _SIZE, cached=True)

    def forward(self, x: Any, edges: Any) -> Any:
        """The codes of nodes."""
        return self.last(self.first(x, edges).relu(), edges)


class SparseEncoder(nn.Module):
    """The same with products of sparse matrices."""

    def __init__(self, features: int, adjacency: Any):
        super().__init__()
        self.adjacency = adjacency
        self.weights = nn.ParameterList(
            nn.init.xavier_uniform_(torch.empty(shape))
            for shape in ((features, _HIDDEN), (_HIDDEN, _SIZE))
        )
        self.biases = nn.ParameterList(torch.zeros(width) for width in (_HIDDEN, _SIZE))

    def forward(self, x: Any, edges: Any) -> Any:
        """The codes of nodes."""
        del edges
        hidden = torch.sparse.mm(x, self.weights[0])
        hidden = (torch.sparse.mm(self.adjacency, hidden) + self.biases[0]).relu()
        return torch.sparse.mm(self.adjacency, hidden @ self.weights[1]) + self.biases[1]


def _sparse(places: Any, values: Any, shape: tuple[int, int]) -> Any:
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=True).coalesce()


def steps(
    x: Any, edges: np.ndarray, rate: float, threads: int | None
) -> dict[str, Callable[[], Any]]:
    """A training step of each.

    Args:
        x: Features, an `Entries`.
        edges: `(2 m, 2)`, links in both directions.
        rate: Of Adam.
        threads: Of PyTorch; `None`: as many as it takes.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    index = torch.as_tensor(edges.T.astype(np.int64)).contiguous()
    with_loops, _ = add_self_loops(index, num_nodes=x.shape[0])
    degree = torch.bincount(with_loops[0]).float()
    weights = (degree[with_loops[0]] * degree[with_loops[1]]) ** -0.5
    places = torch.as_tensor(np.stack([x.rows, x.columns]).astype(np.int64))
    sparse = _sparse(places, torch.as_tensor(x.values), x.shape)
    adjacency = _sparse(with_loops, weights, (x.shape[0], x.shape[0]))
    candidates = {
        "PyTorch Geometric": (Encoder(x.shape[1]), torch.as_tensor(x.dense())),
        "PyTorch, sparse (COO)": (SparseEncoder(x.shape[1], adjacency), sparse),
    }

    def step(encoder: nn.Module, features: Any) -> Callable[[], float]:
        model = GAE(encoder)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)

        def run() -> float:
            optimizer.zero_grad(set_to_none=True)
            codes = model.encode(features, index)
            # Not self-pairs either, as in 2021.
            others = negative_sampling(with_loops, x.shape[0])
            loss = model.recon_loss(codes, index, others)
            loss.backward()
            optimizer.step()
            return loss.item()

        return run

    return {name: step(*candidate) for name, candidate in candidates.items()}
