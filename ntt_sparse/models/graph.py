"""Autoencoders of graphs: graph convolutions, a gate, inner products.

Messages are passed along edges as sums over segments, and features may be sparse: on two cores
with dense ones a training step takes twice as long on Cora, and about three times on CiteSeer
(`benchmarks/graphs.py`).
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int

from ntt_sparse._types import Params, Scalar
from ntt_sparse.gates.layer import Gate, Kind

NOISE = "noise"
"""The RNG that variational codes are drawn with."""
# As in PyTorch Geometric: the exponential of what is beyond is of no use.
_MOST_LOG_STD = 10.0


@struct.dataclass
class SparseMatrix:
    """A matrix by its entries, sorted by row; a pytree whose shape is static.

    Attributes:
        rows: `(nnz,)` integers, not falling.
        columns: `(nnz,)` integers.
        values: `(nnz,)` floating-point numbers; those of one place are summed.
        shape: Rows and columns.
    """

    rows: Any
    columns: Any
    values: Any
    shape: tuple[int, int] = struct.field(pytree_node=False)

    def __matmul__(self, dense: Float[Array, "d k"]) -> Float[Array, "n k"]:
        """The product `(n, k)` with a dense matrix.

        Raises:
            ValueError: It has another number of rows than this has columns.
        """
        if dense.shape[0] != self.shape[1]:
            raise ValueError(
                f"a sparse matrix of shape {self.shape} times a matrix of shape {dense.shape}: "
                f"expected {self.shape[1]} rows"
            )
        terms = dense[self.columns] * jnp.asarray(self.values)[:, None]
        return jax.ops.segment_sum(terms, self.rows, self.shape[0], indices_are_sorted=True)


Features: TypeAlias = SparseMatrix | Float[ArrayLike, "n d"]
"""Features of nodes `(n, d)`, sparse or dense."""


def adjacency(edges: Int[ArrayLike, "m 2"], num_nodes: int) -> SparseMatrix:
    r"""The matrix that a graph convolution passes messages with: $D^{-1/2} (A + I) D^{-1/2}$.

    D holds the row sums of A + I, so all is well with nodes that have no edge.

    Source: Kipf & Welling 2016, https://arxiv.org/abs/1609.02907, Eq. 2.

    Args:
        edges: Undirected, each once, in any order and direction, without loops.
        num_nodes: Nodes of the graph.

    Returns:
        `(num_nodes, num_nodes)` with `2 m + num_nodes` entries, float32 by default.

    Raises:
        ValueError: An edge is a loop, there twice, or of a node that is not there.
    """
    if not isinstance(edges, Tracer):
        _check_edges(np.asarray(edges), num_nodes)
    i, j = jnp.asarray(edges).T
    own = jnp.arange(num_nodes, dtype=i.dtype)
    rows, columns = jnp.concatenate([i, j, own]), jnp.concatenate([j, i, own])
    order = jnp.lexsort((columns, rows))
    scale = jnp.bincount(rows, length=num_nodes).astype(jnp.result_type(float)) ** -0.5
    rows, columns = rows[order], columns[order]
    return SparseMatrix(rows, columns, scale[rows] * scale[columns], (num_nodes, num_nodes))


def _check_edges(edges: np.ndarray, num_nodes: int) -> None:
    _check_nodes("edges", edges, num_nodes)
    ordered = np.sort(edges, axis=1)
    if np.any(ordered[:, 0] == ordered[:, 1]) or len(np.unique(ordered, axis=0)) < len(edges):
        raise ValueError(
            "edges hold a loop or a pair of nodes twice, expected each undirected edge once, as "
            "ntt_sparse.data.graphs.undirected gives them"
        )


def _check_nodes(name: str, pairs: np.ndarray, num_nodes: int) -> None:
    if pairs.size and not 0 <= pairs.min() <= pairs.max() < num_nodes:
        raise ValueError(
            f"{name} have the nodes {pairs.min()} to {pairs.max()}, expected 0 to {num_nodes - 1}"
        )


class GraphConvolution(nn.Module):
    r"""A graph convolution, $\hat{A} X W + b$ (Kipf & Welling 2016).

    Weights start as Glorot & Bengio, uniform, and biases as zeros.

    Attributes:
        features: Outputs for each node.
    """

    features: int

    @nn.compact
    def __call__(self, x: Features, adjacency: SparseMatrix) -> Float[Array, "n features"]:
        """The outputs `(n, features)`; `adjacency` is that of the graph, see `adjacency`."""
        x = x if isinstance(x, SparseMatrix) else jnp.asarray(x)
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return adjacency @ (x @ kernel) + bias


class GCN(nn.Module):
    """Graph convolutions with ReLU between them.

    Attributes:
        widths: Outputs of each.
    """

    widths: tuple[int, ...]

    def __post_init__(self):
        """Checks the widths.

        Raises:
            ValueError: There are none, or one is not positive.
        """
        super().__post_init__()
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths are {self.widths}, expected 1 or more for each layer")

    def setup(self):
        """Names the layers."""
        self.layers = [GraphConvolution(width) for width in self.widths]

    def __call__(self, x: Features, adjacency: SparseMatrix) -> Float[Array, "n features"]:
        """The outputs of the last layer, `(n, widths[-1])`."""
        return self.last(self.hidden(x, adjacency), adjacency)

    def hidden(
        self, x: Features, adjacency: SparseMatrix
    ) -> SparseMatrix | Float[ArrayLike, "n hidden"]:
        """What the last layer reads."""
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x, adjacency))
        return x

    def last(self, x: Features, adjacency: SparseMatrix) -> Float[Array, "n features"]:
        """The last layer."""
        return self.layers[-1](x, adjacency)


class GraphAutoencoder(nn.Module):
    """Codes of nodes whose inner products are the logits of links: GAE, VGAE, and with gates.

    The params are `encoder`, `log_std` of a variational one, and `gate` where there are gates.
    It takes any graph whose nodes have the same features, also one it was not trained on.

    Source: Kipf & Welling 2016, https://arxiv.org/abs/1611.07308; with gates Bu et al. 2021,
    https://arxiv.org/abs/2110.01684, Section 4.3. Widths are those of both.

    Attributes:
        widths: Outputs of each graph convolution; the last is the size of the codes.
        variational: Whether codes of training are drawn from a normal distribution whose
            deviations are learned too. Its mean is the code of a node otherwise.
        kind: Of the gates on codes, which need a size of 2 or more; `None`: there are none.
    """

    widths: tuple[int, ...] = (32, 16)
    variational: bool = False
    kind: Kind | None = None

    def setup(self):
        """Names the parts."""
        self.encoder = GCN(self.widths)
        if self.variational:
            self.log_std = GraphConvolution(self.widths[-1])
        self.gate = _open if self.kind is None else Gate(self.kind)

    def __call__(
        self, x: Features, adjacency: SparseMatrix, pairs: Int[ArrayLike, "p 2"]
    ) -> Float[Array, " p"]:
        """The logits of links between pairs of nodes, `(p,)`."""
        return decode(self.encode(x, adjacency), pairs)

    def encode(self, x: Features, adjacency: SparseMatrix) -> Float[Array, "n size"]:
        """The gated codes of nodes, `(n, widths[-1])`."""
        return self.gate(self.encoder(x, adjacency))

    def posterior(
        self, x: Features, adjacency: SparseMatrix
    ) -> tuple[Float[Array, "n size"], Float[Array, "n size"]]:
        """Means and logarithms of deviations (at most 10) of a variational one, before the gate.

        Raises:
            ValueError: It is not variational.
        """
        if not self.variational:
            raise ValueError("there is a posterior of a variational autoencoder alone")
        hidden = self.encoder.hidden(x, adjacency)
        log_std = jnp.minimum(self.log_std(hidden, adjacency), _MOST_LOG_STD)
        return self.encoder.last(hidden, adjacency), log_std

    def draw(
        self, x: Features, adjacency: SparseMatrix
    ) -> tuple[Float[Array, "n size"], tuple[Float[Array, "n size"], Float[Array, "n size"]]]:
        """Gated codes drawn with the RNG `noise`, and the posterior they are drawn from."""
        mean, log_std = self.posterior(x, adjacency)
        noise = jax.random.normal(self.make_rng(NOISE), mean.shape, mean.dtype)
        return self.gate(mean + jnp.exp(log_std) * noise), (mean, log_std)


def _open(codes: Float[Array, "n size"]) -> Float[Array, "n size"]:
    return codes


def decode(codes: Float[ArrayLike, "n size"], pairs: Int[ArrayLike, "p 2"]) -> Float[Array, " p"]:
    """The inner products of the codes of pairs of nodes, `(p,)`: the logits of their links.

    Raises:
        ValueError: A pair is of a node that is not there; traced pairs are not looked at.
    """
    if not isinstance(pairs, Tracer):
        _check_nodes("pairs", np.asarray(pairs), jnp.shape(codes)[0])
    codes, pairs = jnp.asarray(codes), jnp.asarray(pairs)
    return jnp.sum(codes[pairs[:, 0]] * codes[pairs[:, 1]], axis=1)


def link_loss(positive: Float[ArrayLike, " p"], negative: Float[ArrayLike, " q"]) -> Scalar:
    r"""The cross-entropy of links and other pairs, of equal weight as wholes.

    $-\frac{1}{p} \sum \log \sigma(l^+) - \frac{1}{q} \sum \log (1 - \sigma(l^-))$. The reference
    adds 1e-15 inside the logarithms of rounded probabilities, so that a confident mistake (a
    logit of 17 or more in float32) has a bounded loss and no gradient. This is the function
    itself, finite for all finite logits.

    Source: Kipf & Welling 2016, https://arxiv.org/abs/1611.07308.

    Args:
        positive: Logits of links.
        negative: Logits of pairs that are none.
    """
    linked, other = jnp.asarray(positive), jnp.asarray(negative)
    return jnp.mean(jax.nn.softplus(-linked)) + jnp.mean(jax.nn.softplus(other))


def divergence(mean: Float[ArrayLike, "n size"], log_std: Float[ArrayLike, "n size"]) -> Scalar:
    """The mean over nodes of the Kullback-Leibler divergence from the standard normal."""
    mean, log_std = jnp.asarray(mean), jnp.asarray(log_std)
    terms = mean**2 + jnp.exp(2 * log_std) - 1 - 2 * log_std
    return 0.5 * jnp.mean(jnp.sum(terms, axis=1))


def gates(module: GraphAutoencoder, params: Params) -> Float[Array, " size"]:
    """What codes are multiplied by, `(widths[-1],)`; zero is closed, and one what has no gate."""
    size = module.widths[-1]
    if module.kind is None:
        return jnp.ones(size)
    return module.kind.values(params["gate"], size)


def cut(module: GraphAutoencoder, params: Params) -> tuple[GraphAutoencoder, Params]:
    """The same codes and logits without what is closed: an autoencoder of fewer dimensions.

    Open gates are folded into the last layer. Of a variational one the means are left, which
    are its codes. This runs on the host, after training.

    Args:
        module: Of the params.
        params: Trained.

    Returns:
        An autoencoder without gates, whose `encode` gives `(n, open dimensions)`, and its params.

    Raises:
        ValueError: All dimensions are closed.
    """
    *hidden, size = module.widths
    factors = gates(module, params)
    kept = np.flatnonzero(factors)
    if not len(kept):
        raise ValueError(f"all {size} dimensions are closed: there is no code left")
    layers = dict(params["encoder"])
    name = f"layers_{len(hidden)}"
    layers[name] = jax.tree.map(lambda leaf: (leaf * factors)[..., kept], layers[name])
    return GraphAutoencoder((*hidden, len(kept))), {"encoder": layers}
