"""Inductive matrix completion by a graph network on enclosing subgraphs (IGMC), with gates.

Source: Zhang & Chen 2020, "Inductive matrix completion based on graph neural networks",
https://arxiv.org/abs/1904.12058; with gates in place of dropout Bu et al. 2021,
https://arxiv.org/abs/2110.01684, Section 4.2.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from ntt_sparse._types import Params, Scalar
from ntt_sparse.gates.layer import RNG, Gate, Kind
from ntt_sparse.models.dropout import Dropout
from ntt_sparse.models.initializers import torch_bias_init, torch_kernel_init

Edges: TypeAlias = tuple[Int[Array, " e"], Int[Array, " e"], Int[Array, " e"]]
"""Users, items and levels of ratings between nodes; nodes past the last are none."""

# Roles of nodes: target user, target item, other user, other item.
_ROLES = 4
# Draws of dropped edges are of 16 bits, half the cost of 32.
_LEVELS = 2**16


class Paths(NamedTuple):
    """The directed edges that messages take, some of them dropped.

    Edges between a target and another node, of which each other node has one, are stored by that
    node.

    Attributes:
        targets: Target nodes.
        levels: Of the edges between other nodes and targets.
        inward: Which of the targets the message of each node goes to, past the last for none.
        outward: Which of the targets sends each node a message, past the last for none.
        source: Where the edges between other nodes begin.
        target: Where they end, past the last node for none.
        edge_levels: Their levels.
    """

    targets: Int[Array, " t"]
    levels: Int[Array, " n"]
    inward: Int[Array, " n"]
    outward: Int[Array, " n"]
    source: Int[Array, " e"]
    target: Int[Array, " e"]
    edge_levels: Int[Array, " e"]


class RelationalConv(nn.Module):
    r"""A relational graph convolution whose weights share a basis, on enclosing subgraphs.

    $h_i' = W_0 h_i + b + \sum_{(j, r)} W_r h_j$ over all edges that end in i, with
    $W_r = \sum_b a_{rb} V_b$. Messages are summed, not averaged, as in the published code.

    Source: Zhang & Chen 2020, Eq. 1; Schlichtkrull et al. 2018, https://arxiv.org/abs/1703.06103,
    Eq. 3.

    Attributes:
        features: Outputs.
        num_levels: Levels of edges.
        bases: Matrices that the weights of all levels are made of.
    """

    features: int
    num_levels: int
    bases: int = 4

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "k d"],
        paths: Paths,
        rows: Int[Array, " n"] | None = None,
        *,
        targets_only: bool = False,
    ) -> Float[Array, "_ features"]:
        """The new states of the nodes.

        Args:
            x: States.
            paths: That messages take.
            rows: Which of the states each node is in, where many share one; by default each has
                its own.
            targets_only: Whether those of the target nodes alone are wanted.

        Returns:
            `(n, features)`, or `(t, features)`.
        """
        inputs = x.shape[1]
        init = _uniform(self.bases * inputs)
        basis = self.param("basis", init, (self.bases, inputs, self.features))
        mixing = self.param("mixing", init, (self.num_levels, self.bases))
        root = self.param("root", init, (inputs, self.features))
        bias = self.param("bias", init, (self.features,))
        weights = jnp.einsum("rb,bdf->rdf", mixing, basis)
        count = len(paths.targets)
        # To a target: the states of its neighbours are added up by level before the product.
        place = paths.inward * self.num_levels + paths.levels
        sums = jax.ops.segment_sum(_at(x, rows), place, count * self.num_levels)
        received = sums.reshape(count, -1) @ weights.reshape(-1, self.features)
        at_targets = _at(rows, paths.targets)
        if targets_only:
            return received + x[at_targets] @ root + bias
        y = _at(x @ root + bias, rows).at[paths.targets].add(received)
        # From a target: its messages at all levels, of which each neighbour reads one.
        place = paths.outward * self.num_levels + paths.levels
        y = y + _read(_table(x[at_targets], weights), place)
        source = _at(rows, paths.source)
        if len(x) * self.num_levels <= self.bases * len(source):
            place = source * self.num_levels + paths.edge_levels
            sent = _read(_table(x, weights), place)
        else:
            sent = _mixed(_read(x, source), basis, mixing[paths.edge_levels])
        return y + jax.ops.segment_sum(sent, paths.target, len(y))


class Igmc(nn.Module):
    """A graph network that rates an item for a user by the ratings around them.

    Four relational convolutions from the roles of nodes, tanh after each; the states of the
    target user and of the target item in all layers make the code of the pair, through a dense
    layer with ReLU, and the rating is linear in it. The code has gates, or dropout in training.

    The params are `convs_0` to `convs_3`, `dense`, `gate` (with a kind) and `readout`.

    Attributes:
        num_levels: Levels of ratings.
        widths: Outputs of the convolutions.
        bases: See `RelationalConv`.
        code: Width of the code, 2 or more with gates.
        kind: Of gates; `None` for dropout.
        dropout: Probability that a number of the code is dropped, without gates.
        edge_dropout: Probability that a directed edge is dropped in training, in [0, 1).
    """

    num_levels: int
    widths: tuple[int, ...] = (32, 32, 32, 32)
    bases: int = 4
    code: int = 128
    kind: Kind | None = None
    dropout: float = 0.5
    edge_dropout: float = 0.2

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: A size is not positive, or a probability is out of range.
        """
        super().__post_init__()
        sizes = (self.num_levels, *self.widths, self.bases, self.code)
        if not self.widths or min(sizes) < 1:
            raise ValueError(
                f"num_levels, widths, bases and code are {self.num_levels}, {self.widths}, "
                f"{self.bases}, {self.code}: expected 1 or more each"
            )
        for field in ("dropout", "edge_dropout"):
            # The negated form also refuses NaN.
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(
                    f"{field} is {getattr(self, field)}, expected a probability in [0, 1)"
                )

    def setup(self):
        """Names the layers."""
        self.convs = [RelationalConv(w, self.num_levels, self.bases) for w in self.widths]
        bias_init = torch_bias_init(2 * sum(self.widths))
        self.dense = nn.Dense(self.code, kernel_init=torch_kernel_init, bias_init=bias_init)
        if self.kind is not None:
            self.gate = Gate(self.kind)
        self.drop = Dropout(self.dropout)
        bias_init = torch_bias_init(self.code)
        self.readout = nn.Dense(1, kernel_init=torch_kernel_init, bias_init=bias_init)

    def __call__(
        self,
        labels: Int[Array, " n"],
        partners: Int[Array, " n"],
        levels: Int[Array, " n"],
        edges: Edges,
        targets: Int[Array, "b 2"],
        *,
        train: bool = False,
    ) -> Float[Array, " b"]:
        """The ratings of pairs, in their own units.

        Args:
            labels: Roles of nodes, 0 to 3: target user, target item, other user, other item.
            partners: For each other node, the target that it has a rating with, as its place in
                `targets` row by row; `2 b` for targets, and for nodes that are padding.
            levels: Of these ratings.
            edges: The ratings between other nodes.
            targets: The nodes of the user and of the item of each pair.
            train: Whether edges, and numbers of the code, are dropped, by the RNG `dropout`.
        """
        code = self.embed(labels, partners, levels, edges, targets, train=train)
        return self.readout(code)[:, 0]

    def embed(
        self,
        labels: Int[Array, " n"],
        partners: Int[Array, " n"],
        levels: Int[Array, " n"],
        edges: Edges,
        targets: Int[Array, "b 2"],
        *,
        train: bool = False,
    ) -> Float[Array, "b code"]:
        """The codes of pairs, gated or with dropout; arguments are those of the network."""
        users, items, between = edges
        ends, starts = jnp.concatenate([users, items]), jnp.concatenate([items, users])
        nodes = targets.reshape(-1)
        paths = Paths(
            nodes, levels, partners, partners, starts, ends, jnp.concatenate([between, between])
        )
        if train and self.edge_dropout:
            paths = self._dropped(paths)
        # What is worked out here is read by all layers.
        paths = jax.lax.optimization_barrier(paths)
        x: Any = jnp.eye(_ROLES)
        rows, states = labels, []
        for conv in self.convs[:-1]:
            x, rows = jnp.tanh(conv(x, paths, rows)), None
            states.append(x[nodes])
        # No other node is looked at after the last.
        states.append(jnp.tanh(self.convs[-1](x, paths, rows, targets_only=True)))
        # All layers of the user, then all of the item.
        joined = jnp.concatenate(states, axis=1).reshape(len(targets), -1)
        code = nn.relu(self.dense(joined))
        return self.drop(code, deterministic=not train) if self.kind is None else self.gate(code)

    def _dropped(self, paths: Paths) -> Paths:
        """Paths of which some lead nowhere, each direction of an edge on its own."""
        ends = (paths.inward, paths.outward, paths.target)
        sizes = [len(end) for end in ends]
        bits = jax.random.bits(self.make_rng(RNG), (sum(sizes),), jnp.uint16)
        stay = bits >= min(round(self.edge_dropout * _LEVELS), _LEVELS - 1)
        limits = (len(paths.targets), len(paths.targets), len(paths.levels))
        kept = [
            jnp.where(part, end, limit)
            for part, end, limit in zip(
                jnp.split(stay, [sizes[0], sizes[0] + sizes[1]]), ends, limits, strict=True
            )
        ]
        return paths._replace(inward=kept[0], outward=kept[1], target=kept[2])

    def cut(self, params: Params) -> tuple["Igmc", Params]:
        """The same function without the numbers of the code whose gates are closed.

        Gates are multiplied into the readout, so that the smaller network has none; it is not
        for training.

        Args:
            params: Of this network.

        Returns:
            The smaller network and its parameters.

        Raises:
            ValueError: There are no gates, or none is open.
        """
        if self.kind is None:
            raise ValueError("the network has no gates: there is nothing to cut")
        tree: Mapping[str, Any] = dict(params)
        gates = self.kind.values(tree["gate"], self.code)
        opened = jnp.flatnonzero(gates > 0)
        if not len(opened):
            raise ValueError("all gates are closed: the network gives the same rating to all pairs")
        dense, readout = tree["dense"], tree["readout"]
        smaller = {name: value for name, value in tree.items() if name != "gate"}
        smaller["dense"] = {
            "kernel": dense["kernel"][:, opened], "bias": dense["bias"][opened]
        }  # fmt: skip
        smaller["readout"] = {
            **readout, "kernel": (gates[:, None] * readout["kernel"])[opened]
        }  # fmt: skip
        return dataclasses.replace(self, code=len(opened), kind=None, dropout=0.0), smaller


def open_gates(module: Igmc, params: Params) -> Bool[Array, " code"]:
    """Which numbers of the code are not closed; without gates all are open."""
    if module.kind is None:
        return jnp.ones(module.code, bool)
    tree: Mapping[str, Any] = dict(params)
    return module.kind.values(tree["gate"], module.code) > 0


def adjacent_rating_penalty(params: Params) -> Scalar:
    r"""How much the weights of neighbouring levels differ: $\sum_l \sum_r |W_{r+1} - W_r|^2$.

    Source: Zhang & Chen 2020, Eq. 6, summed over convolutions as in the published code.

    Args:
        params: Of an `Igmc`.
    """
    total = jnp.zeros(())
    for name, layer in dict(params).items():
        if name.startswith("convs_"):
            steps = jnp.diff(layer["mixing"], axis=0)
            # |sum_b s_b V_b|^2 by the products of the bases, so that no W is made.
            flat = layer["basis"].reshape(len(layer["basis"]), -1)
            total = total + jnp.sum((steps @ (flat @ flat.T)) * steps)
    return total


def _at(values: Any, rows: Any) -> Any:
    """Rows of values; `None` stands for all there are, in their order."""
    if values is None or rows is None:
        return rows if values is None else values
    return values[rows]


def _read(values: Float[Array, "k f"], rows: Int[Array, " e"]) -> Float[Array, "e f"]:
    """Rows of values, zero past the last."""
    return values.at[rows].get(mode="fill", fill_value=0)


def _table(x: Float[Array, "k d"], weights: Float[Array, "r d f"]) -> Float[Array, "_ f"]:
    """The messages W_r x_k, of all levels of a state one after the other."""
    levels, inputs, features = weights.shape
    flat = jnp.moveaxis(weights, 0, 1).reshape(inputs, levels * features)
    return (x @ flat).reshape(-1, features)


def _mixed(
    x: Float[Array, "e d"], basis: Float[Array, "b d f"], shares: Float[Array, "e b"]
) -> Float[Array, "e f"]:
    """The messages of edges by the products of the basis, without the weights of all levels."""
    parts = jnp.split(x @ jnp.concatenate(list(basis), axis=1), len(basis), axis=1)
    return functools.reduce(
        jnp.add, [share[:, None] * part for share, part in zip(shares.T, parts, strict=True)]
    )


def _uniform(fan: int) -> Any:
    """U(-1, 1) / sqrt(fan) of all parameters, as PyTorch Geometric started them until 1.5."""
    limit = fan**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init
