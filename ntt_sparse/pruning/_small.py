"""How the small network of `ntt_sparse.pruning.compact` is put together, node by node."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ntt_sparse.gates import network as graph
from ntt_sparse.gates.network import Conv, Dense, Network, Norm
from ntt_sparse.models import described
from ntt_sparse.models.convolution import convolve
from ntt_sparse.models.described import STATISTICS

# Constants that differ by less, relative to the largest, are the same one.
_SAME = 1e-10


class SmallNetwork:
    """Builds the small network node by node."""

    def __init__(
        self,
        network: Network,
        weights: Mapping[str, np.ndarray],
        state: Mapping[str, np.ndarray],
        kept: Mapping[str, np.ndarray],
        reached: Mapping[str, np.ndarray],
    ):
        """Computes the constants of the whole network.

        Args:
            network: The whole one.
            weights: Its parameters by path, gates and masks in them.
            state: Its running statistics by path.
            kept: Of each node, which channels are kept, growing.
            reached: Of each node, which channels depend on the input.
        """
        self.network, self.weights, self.state = network, weights, state
        self.kept, self.reached = kept, reached
        self.constants = _constants(network, weights, state)
        self.nodes = graph.Builder(graph.input_shape(network))
        self.shapes = graph.shapes(network)
        self.dtype = np.result_type(*weights.values()) if weights else np.dtype(np.float32)
        self.added = 0
        """Numbers of constants that were put in."""
        self.params: dict[str, np.ndarray] = {}
        self.statistics: dict[str, np.ndarray] = {}
        # Of each node of the whole network: its name in the small one, and which of its channels
        # are there. None where no channel is.
        self.there: dict[str, tuple[str | None, np.ndarray]] = {}
        # Those that were aligned before, see `_aligned`.
        self.aligned: dict[tuple[str, bytes, bool], str] = {}

    def build(self) -> Network:
        """The description of the small network."""
        for name, node in self.network.nodes.items():
            wanted = self.kept[name]
            built = self._node(name, node, wanted) if len(wanted) else None
            self.there[name] = (built, wanted)
        return self.nodes.network()

    def variables(self) -> dict[str, Any]:
        """Its parameters and running statistics."""
        found = {"params": _nested(self.params)}
        if self.statistics:
            found[STATISTICS] = _nested(self.statistics)
        return found

    def _node(self, name: str, node: Any, wanted: np.ndarray) -> str:
        match node:
            case graph.Input():
                if len(wanted) < self._width(name):
                    return self._new(graph.Select("input", tuple(wanted.tolist())), "read")
                return "input"
            case graph.Constant(rows=rows, columns=columns):
                # Those it had are counted with the network.
                self.added -= len(wanted) * max(1, len(rows) * len(columns))
                return self._constant(name, self.constants[name][..., wanted])
            case Conv() | Dense():
                return self._layer(name, node, wanted)
            case Norm(groups=groups):
                x = self._aligned(node.input, wanted)
                for leaf in ("scale", "bias"):
                    self.params[f"{name}/{leaf}"] = self.weights[f"{name}/{leaf}"][wanted]
                if not groups:
                    for leaf in ("mean", "var"):
                        self.statistics[f"{name}/{leaf}"] = self.state[f"{name}/{leaf}"][wanted]
                left = groups * len(wanted) // self._width(name)
                return self.nodes(Norm(x, left, epsilon=node.epsilon), name)
            case graph.Add():
                return self._sum(name, node, wanted)
            case graph.Multiply():
                factors = tuple(self._aligned(each, wanted) for each in node.inputs)
                return self.nodes(graph.Multiply(factors), name)
            case graph.Subsample():
                before = self._width(node.input)
                x = self._aligned(node.input, wanted[wanted < before])
                return self.nodes(graph.Subsample(x, len(wanted), node.stride), name)
            case graph.Reshape():
                x = self._aligned(node.input, np.arange(self._width(node.input)))
                return self.nodes(graph.Reshape(x, node.shape), name)
            case graph.Select(channels=taken):
                return self._aligned(node.input, np.array(taken)[wanted])
            case graph.Embed(places=places):
                there = np.isin(wanted, places)
                x = self._aligned(node.input, np.searchsorted(places, wanted[there]))
                return self._placed(x, np.flatnonzero(there), len(wanted))
            case graph.Shift():
                x = self._aligned(node.input, wanted)
                self.params[f"{name}/bias"] = self.weights[f"{name}/bias"][..., wanted]
                return self.nodes(graph.Shift(x, node.rows, node.columns), name)
            case graph.Activation() | graph.Pool() | graph.Mean() | graph.Field() | graph.Dropout():
                x = self._aligned(node.input, wanted)
                return self.nodes(dataclasses.replace(node, input=x), name)
        raise TypeError(f"{name!r} is {node}, of which nothing can be taken out")

    def _width(self, name: str) -> int:
        return len(self.reached[name])

    def _layer(self, name: str, node: Any, wanted: np.ndarray) -> str:
        """A convolution or dense layer; what its lost inputs add becomes its bias."""
        read, width = self.kept[node.input], self._width(node.input)
        kernel = self.weights[f"{name}/kernel"]
        by_channel = kernel.reshape(*kernel.shape[:-2], -1, width, node.channels)
        lost = np.where(self.reached[node.input], 0.0, self.constants[node.input])
        constant = _apply(node, lost, kernel)[..., wanted]
        if node.bias:
            constant = constant + self.weights[f"{name}/bias"][wanted]
        x = self.there[node.input][0]
        if x is None:
            # Of the outputs nothing is left but what they are for every input.
            shape = (*self.shapes[name][:-1], len(wanted))
            self.added -= len(wanted) * node.bias
            return self._constant(name, np.broadcast_to(constant, shape))
        small = by_channel[..., read, :][..., wanted]
        self.params[f"{name}/kernel"] = (
            small.reshape(-1, len(wanted)) if isinstance(node, Dense)
            else small.reshape(*kernel.shape[:2], len(read), len(wanted))
        )  # fmt: skip
        bias, rows, _ = _compressed(constant)
        flat = not rows
        has_bias = flat and bool(node.bias or np.any(bias))
        small_node = dataclasses.replace(
            node, input=x, channels=len(wanted), bias=has_bias, gate=None
        )
        y = self.nodes(small_node, name)
        self.added += len(wanted) * (has_bias - node.bias)
        if has_bias:
            self.params[f"{name}/bias"] = bias.astype(kernel.dtype)
        return y if flat else self._shifted(y, name, constant)

    def _sum(self, name: str, node: graph.Add, wanted: np.ndarray) -> str:
        """A sum: of a channel that is not there in a source, its constant is."""
        parts, constant = [], np.zeros(len(wanted))
        for source in node.inputs:
            new, have = self.there[source]
            missing = ~np.isin(wanted, have)
            constant = constant + np.where(missing, self.constants[source][..., wanted], 0.0)
            if new is not None and not np.all(missing):
                parts.append(self._aligned(source, wanted, fill=False))
        if not parts:
            return self._constant(name, constant)
        y = self.nodes(graph.Add(tuple(parts)), name) if len(parts) > 1 else parts[0]
        return self._shifted(y, name, constant)

    def _aligned(self, source: str, wanted: np.ndarray, *, fill: bool = True) -> str:
        """A node with just these channels; of those that are not there, their constants."""
        key = (source, wanted.tobytes(), fill)
        if key not in self.aligned:
            self.aligned[key] = self._align(source, wanted, fill=fill)
        return self.aligned[key]

    def _align(self, source: str, wanted: np.ndarray, *, fill: bool) -> str:
        new, have = self.there[source]
        constant = np.where(np.isin(wanted, have), 0.0, self.constants[source][..., wanted])
        common = np.intersect1d(wanted, have)
        if new is None or not len(common):
            return self._constant(source, constant)
        if len(common) < len(have):
            places = np.searchsorted(have, common)
            new = self._new(graph.Select(new, tuple(places.tolist())), f"{source}_part")
        new = self._placed(new, np.searchsorted(wanted, common), len(wanted))
        return self._shifted(new, source, constant) if fill else new

    def _placed(self, x: str, places: np.ndarray, size: int) -> str:
        if len(places) == size:
            return x
        return self._new(graph.Embed(x, tuple(places.tolist()), size), f"{x}_placed")

    def _new(self, node: graph.Node, name: str) -> str:
        """Adds a node that the whole network has none of, under a name that is free."""
        free = next(
            candidate
            for candidate in itertools.chain(
                [name], (f"{name}_{number}" for number in itertools.count(1))
            )
            if candidate not in self.network.nodes and candidate not in self.nodes.nodes
        )
        return self.nodes(node, free)

    def _shifted(self, y: str, name: str, constant: Any) -> str:
        """A node plus a constant, unless that is zero."""
        if not np.any(constant):
            return y
        bias, rows, columns = _compressed(constant)
        shift = self._new(graph.Shift(y, rows, columns), f"{name}_shift")
        self.params[f"{shift}/bias"] = bias.astype(self.dtype)
        self.added += bias.size
        return shift

    def _constant(self, name: str, constant: np.ndarray) -> str:
        """A node that is the same for every input."""
        bias, rows, columns = _compressed(constant)
        if not rows and constant.ndim == 3:
            rows, columns = constant.shape[:1], constant.shape[1:2]
            bias = bias[None, None]
        new = self._new(graph.Constant("input", constant.shape, rows, columns), f"{name}_constant")
        self.params[f"{new}/bias"] = bias.astype(self.dtype)
        self.added += bias.size
        return new


def _nested(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    # Put as they are: `jnp.asarray` compiles a copy for every shape.
    arrays = {path: jax.device_put(leaf) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


def _constants(network: Network, weights: Any, state: Any) -> dict[str, np.ndarray]:
    """Every node of one example of zeros, in double precision.

    Of a channel that does not depend on the input this is what it always is.
    """
    with jax.enable_x64(True):
        trees = (
            traverse_util.unflatten_dict(
                {path: jax.device_put(leaf.astype(float)) for path, leaf in leaves.items()},
                sep="/",
            )
            for leaves in (weights, state)
        )
        shape = graph.input_shape(network)
        # Not compiled as a whole: deep networks repeat few kinds of layers.
        params, statistics = trees
        x = jnp.zeros((1, *shape), jnp.float64)
        values, _ = described.evaluate(network, params, statistics, x)
        return {name: np.asarray(value)[0] for name, value in values.items()}


def _apply(node: Any, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """A layer without its bias, of one example, in double precision."""
    if isinstance(node, Dense):
        return x.reshape(-1) @ kernel.astype(np.float64)
    if not np.any(x):
        # Nearly always.
        return np.zeros(node.channels)
    with jax.enable_x64(True):
        y = convolve(
            jax.device_put(x[None]), jax.device_put(kernel.astype(float)), node.stride, node.padding
        )
        return np.asarray(y)[0]


def _compressed(constant: np.ndarray) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]:
    """A constant without repeated rows and columns, and how often each is repeated.

    One that is the same everywhere is one number per channel, with no rows.
    """
    if constant.ndim != 3:
        return constant, (), ()
    # Of each channel by itself, as they may be of any scale.
    limit = _SAME * np.max(np.abs(constant), axis=(0, 1))
    counts = []
    for axis in (0, 1):
        lines = np.moveaxis(constant, axis, 0)
        starts = [0]
        for index in range(1, len(lines)):
            # With where the run began: a drift is no repetition.
            if np.any(np.abs(lines[index] - lines[starts[-1]]) > limit):
                starts.append(index)
        counts.append(tuple(np.diff([*starts, len(lines)]).tolist()))
        constant = np.take(constant, starts, axis)
    if constant.shape[:2] == (1, 1):
        return constant[0, 0], (), ()
    return constant, counts[0], counts[1]
