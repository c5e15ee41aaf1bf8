"""Networks that really get smaller: channels that do nothing are taken out.

A channel is kept if it depends on the input and the output depends on it, as in
`ntt_sparse.gates.channels`, by the gates and by the weights that are not zero. What the others
add is the same for every input: a channel closed before normalisation and ReLU is its rectified
shift. It is computed once, in double precision, and becomes a bias of the layers that read it.
Where a convolution has zeros around its input that bias differs at the borders, and is kept as
the few different rows and columns that it has. So the small network is the same function.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ntt_sparse._types import Masks, Params
from ntt_sparse.gates import channels
from ntt_sparse.gates import layer as gates_layer
from ntt_sparse.gates import network as graph
from ntt_sparse.gates.channels import Counts
from ntt_sparse.gates.network import Conv, Dense, Network, Norm
from ntt_sparse.models import described
from ntt_sparse.models.described import STATISTICS, Described
from ntt_sparse.pruning import masks as pruning_masks

# Constants that differ by less, relative to the largest, are the same one.
_SAME = 1e-10
_CHOICES = ("refuse", "remove")


class Compacted(NamedTuple):
    """A network without the channels that do nothing.

    Attributes:
        module: An ordinary Linen module; its description is `module.network`.
        variables: Its parameters and running statistics.
        kept: Of each node of the whole network, which channels are left, growing.
        before: What the whole network costs.
        after: What is left of that; `channels` counts open gates.
        constants: Parameters in addition: the biases and shifts that stand for channels that
            were taken out. The small network has `after.parameters + constants` parameters.
        removed: Layers of which nothing is left.
    """

    module: Described
    variables: dict[str, Any]
    kept: dict[str, np.ndarray]
    before: Counts
    after: Counts
    constants: int
    removed: tuple[str, ...]


def compact(
    module: Any,
    variables: Mapping[str, Any],
    input_shape: tuple[int, ...],
    *,
    masks: Masks | None = None,
    gates: Mapping[str, Any] | None = None,
    empty: str = "refuse",
) -> Compacted:
    """The small network of a gated or masked one of `ntt_sparse.models`.

    In evaluation it gives the outputs of the large one, up to rounding. In training it does as
    well, but for the statistics of channels that were taken out, and for dropout on them.

    Args:
        module: The large network, with a method `network` that describes it and, if it has
            gates, their `kind`.
        variables: Of it: `params`, and what else it has.
        input_shape: Of one example. Constants at borders are for images of this size.
        masks: Of the parameters; weights that are masked are zero.
        gates: What channels are multiplied by, `(n,)` of each gate by path, in place of what
            the variables say; such as `ntt_sparse.training.export.load_gates` reads.
        empty: What to do about a layer of which no channel is left: `"refuse"`, or `"remove"`
            it, so that its constant stands in its place (a residual block becomes its
            shortcut).

    Returns:
        The small network, and what it costs.

    Raises:
        ValueError: Masks, gates or parameters do not fit the network, a number is not finite,
            or a layer is left empty and `empty` is `"refuse"`.
    """
    network = graph.check(module.network(input_shape))
    params = variables["params"]
    values = gates
    if values is None:
        values = gates_layer.values(getattr(module, "kind", None), variables, network)
    return compact_network(
        network, params, variables.get(STATISTICS, {}), gates=values, masks=masks, empty=empty,
        dtype=module.dtype if hasattr(module, "dtype") else None,
    )  # fmt: skip


def compact_network(
    network: Network,
    params: Params,
    statistics: Mapping[str, Any] | None = None,
    *,
    gates: Mapping[str, Any] | None = None,
    masks: Masks | None = None,
    empty: str = "refuse",
    dtype: Any = None,
) -> Compacted:
    """The small network of any network that is described.

    Args:
        network: The description.
        params: By the paths that are the names of nodes, nested; what else there is, such as
            parameters of gates, is left alone.
        statistics: Running statistics of batch normalisation, nested likewise.
        gates: What the channels of each gate are multiplied by, `(n,)`, by path.
        masks: See `compact`.
        empty: See `compact`.
        dtype: Of the computation.

    Returns:
        The small network, and what it costs.

    Raises:
        ValueError: See `compact`.
    """
    if empty not in _CHOICES:
        raise ValueError(f"{empty=} is unknown, expected one of {', '.join(_CHOICES)}")
    if masks is not None:
        params = pruning_masks.apply(params, masks)
    weights = _leaves(params, described.parameter_shapes(network), "parameter")
    state = _leaves(statistics or {}, described.statistics_shapes(network), "statistic")
    gates = _checked_gates(network, gates or {})
    weights = _gated(network, weights, gates)

    open_ = {path: jnp.asarray(value != 0) for path, value in gates.items()}
    connected = _connected(network, weights)
    reached, counted = channels.ways(network, open_, connected=connected)
    kept = {name: np.flatnonzero(mask) for name, mask in counted.items()}
    last = list(network.nodes)[-1]
    removed = tuple(
        name
        for name, node in network.nodes.items()
        if isinstance(node, Conv | Dense)
        and not (len(kept[name]) if name != last else np.any(reached[name]))
    )
    if removed and empty == "refuse":
        raise ValueError(
            f"no channel is left of {', '.join(removed)}: keep one open there (a budget with "
            "keep=1), or empty='remove', which puts the constant that they give in their place"
        )
    builder = _Builder(
        network, weights, state, kept, {k: np.asarray(v) for k, v in reached.items()}
    )
    small = builder.build()
    after = channels.count(network, open_, connected=connected)
    after = Counts(*(int(number) for number in after))
    kinds = {leaf.dtype for leaf in weights.values()}
    module = Described(small, dtype, jnp.result_type(*kinds) if kinds else jnp.float32)
    return Compacted(
        module,
        builder.variables(),
        kept,
        channels.whole(network),
        after,
        channels.whole(small).parameters - after.parameters,
        removed,
    )


def _leaves(tree: Any, shapes: Mapping[str, Any], what: str) -> dict[str, np.ndarray]:
    """The arrays that the description asks for, by path, checked."""
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    found: dict[str, np.ndarray] = {}
    for path, leaf in shapes.items():
        if path not in flat:
            raise ValueError(f"there is no {what} {path!r}, expected {sorted(shapes)}")
        value = np.asarray(flat[path])
        if value.shape != leaf.shape:
            raise ValueError(f"{what} {path!r} has shape {value.shape}, expected {leaf.shape}")
        if not np.all(np.isfinite(value)):
            raise ValueError(f"{what} {path!r} is not finite: expected finite numbers")
        found[path] = value
    return found


def _checked_gates(network: Network, gates: Mapping[str, Any]) -> dict[str, np.ndarray]:
    expected = graph.gated_channels(network)
    if set(gates) != set(expected):
        raise ValueError(f"gates are {sorted(gates)}, the network has {sorted(expected)}")
    found = {path: np.asarray(value) for path, value in gates.items()}
    for path, value in found.items():
        if value.shape != (expected[path],):
            raise ValueError(
                f"gate {path!r} has shape {value.shape}, expected ({expected[path]},): one number "
                "per channel"
            )
        if not np.all(np.isfinite(value)):
            raise ValueError(f"gate {path!r} is {value}, expected finite numbers")
    return found


def _gated(
    network: Network, weights: Mapping[str, np.ndarray], gates: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Gates multiplied into what makes their channels, in the precision of the network."""
    result = dict(weights)
    for name, node in network.nodes.items():
        if path := graph.gate(node):
            for leaf in ("kernel", "scale", "bias"):
                if (full := f"{name}/{leaf}") in result:
                    result[full] = result[full] * gates[path].astype(result[full].dtype)
    return result


def _connected(network: Network, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Which channels feed which, by the weights that are not zero."""
    shapes = graph.shapes(network)
    found = {}
    for name, node in network.nodes.items():
        if isinstance(node, Conv | Dense):
            kernel = weights[f"{name}/kernel"]
            kernel = kernel.reshape(-1, shapes[node.input][-1], node.channels)
            found[name] = jnp.asarray(np.any(kernel != 0, 0))
        elif isinstance(node, Norm) and not node.groups:
            found[name] = jnp.asarray(weights[f"{name}/scale"] != 0)
    return found


class _Builder:
    """Builds the small network node by node."""

    def __init__(self, network, weights, state, kept, reached):
        self.network, self.weights, self.state = network, weights, state
        self.kept, self.reached = kept, reached
        self.constants = _constants(network, weights, state)
        first = next(iter(network.nodes.values()))
        self.nodes = graph.Builder(first.shape)
        self.params: dict[str, np.ndarray] = {}
        self.statistics: dict[str, np.ndarray] = {}
        # Of each node of the whole network: its name in the small one, and which of its channels
        # are there. None where no channel is.
        self.there: dict[str, tuple[str | None, np.ndarray]] = {}

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
                return "input"
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
                return self.nodes(Norm(x, left), name)
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
        x = self._aligned(node.input, wanted)
        fields = {key: value for key, value in vars(node).items() if key != "input"}
        return self.nodes(type(node)(x, **fields), name)

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
        dtype = kernel.dtype
        x = self.there[node.input][0]
        if x is None:
            # Of the outputs nothing is left but what they are for every input.
            return self._constant(name, constant, dtype)
        small = by_channel[..., read, :][..., wanted]
        self.params[f"{name}/kernel"] = (
            small.reshape(-1, len(wanted)) if isinstance(node, Dense)
            else small.reshape(*kernel.shape[:2], len(read), len(wanted))
        )  # fmt: skip
        bias, rows, _ = _compressed(constant)
        flat = not rows
        has_bias = flat and bool(node.bias or np.any(bias))
        fields = {**vars(node), "input": x, "channels": len(wanted), "gate": None}
        y = self.nodes(type(node)(**{**fields, "bias": has_bias}), name)
        if has_bias:
            self.params[f"{name}/bias"] = bias.astype(dtype)
        return y if flat else self._shifted(y, name, constant, dtype)

    def _sum(self, name: str, node: graph.Add, wanted: np.ndarray) -> str:
        """A sum: of a channel that is not there in a source, its constant is."""
        parts, constant = [], 0.0
        for source in node.inputs:
            new, have = self.there[source]
            missing = ~np.isin(wanted, have)
            constant = constant + np.where(missing, self.constants[source][..., wanted], 0.0)
            if new is not None and not np.all(missing):
                parts.append(self._aligned(source, wanted, fill=False))
        dtype = np.result_type(*self.weights.values())
        if not parts:
            return self._constant(name, constant, dtype)
        y = self.nodes(graph.Add(tuple(parts)), name) if len(parts) > 1 else parts[0]
        return self._shifted(y, name, constant, dtype)

    def _aligned(self, source: str, wanted: np.ndarray, *, fill: bool = True) -> str:
        """A node with just these channels; of those that are not there, their constants."""
        new, have = self.there[source]
        dtype = np.result_type(*self.weights.values())
        constant = np.where(np.isin(wanted, have), 0.0, self.constants[source][..., wanted])
        common = np.intersect1d(wanted, have)
        if new is None or not len(common):
            return self._constant(source, constant, dtype)
        if len(common) < len(have):
            places = np.searchsorted(have, common)
            new = self.nodes(graph.Select(new, tuple(places.tolist())))
        new = self._placed(new, np.searchsorted(wanted, common), len(wanted))
        return self._shifted(new, source, constant, dtype) if fill else new

    def _placed(self, x: str, places: np.ndarray, size: int) -> str:
        if len(places) == size:
            return x
        return self.nodes(graph.Embed(x, tuple(places.tolist()), size))

    def _shifted(self, y: str, name: str, constant: Any, dtype: Any) -> str:
        """A node plus a constant, unless that is zero."""
        if not np.any(constant):
            return y
        bias, rows, columns = _compressed(constant)
        shift = self.nodes(
            graph.Shift(y, rows, columns), f"{name}_constant_{len(self.nodes.nodes)}"
        )
        self.params[f"{shift}/bias"] = bias.astype(dtype)
        return shift

    def _constant(self, name: str, constant: np.ndarray, dtype: Any) -> str:
        """A node that is the same for every input."""
        bias, rows, columns = _compressed(constant)
        if not rows and constant.ndim == 3:
            rows, columns = constant.shape[:1], constant.shape[1:2]
            bias = bias[None, None]
        new = self.nodes(
            graph.Constant("input", constant.shape, rows, columns),
            f"{name}_constant_{len(self.nodes.nodes)}",
        )
        self.params[f"{new}/bias"] = bias.astype(dtype)
        return new


def _nested(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    arrays = {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


def _constants(network: Network, weights: Any, state: Any) -> dict[str, np.ndarray]:
    """Every node of one example of zeros, in double precision.

    Of a channel that does not depend on the input this is what it always is.
    """
    with jax.enable_x64(True):
        trees = (
            traverse_util.unflatten_dict(
                {path: jnp.asarray(leaf, jnp.float64) for path, leaf in leaves.items()}, sep="/"
            )
            for leaves in (weights, state)
        )
        shape = next(iter(network.nodes.values())).shape
        # Not compiled as a whole: deep networks repeat few kinds of layers.
        values, _ = described.evaluate(network, *trees, jnp.zeros((1, *shape), jnp.float64))
        return {name: np.asarray(value[0]) for name, value in values.items()}


def _apply(node: Any, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """A layer without its bias, of one example, in double precision."""
    if isinstance(node, Dense):
        return x.reshape(-1) @ kernel.astype(np.float64)
    if not np.any(x):
        # Nearly always.
        return np.zeros(node.channels)
    with jax.enable_x64(True):
        y = described.convolve(
            jnp.asarray(x[None]), jnp.asarray(kernel, jnp.float64), node.stride, node.padding
        )
        return np.asarray(y[0])


def _compressed(constant: np.ndarray) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]:
    """A constant without repeated rows and columns, and how often each is repeated.

    One that is the same everywhere is one number per channel, with no rows.
    """
    if constant.ndim != 3:
        return constant, (), ()
    limit = _SAME * np.max(np.abs(constant), initial=0.0)
    counts = []
    for axis in (0, 1):
        steps = np.abs(np.diff(constant, axis=axis))
        new = np.max(steps, axis=tuple(a for a in range(3) if a != axis), initial=0.0) > limit
        starts = np.concatenate([[0], np.flatnonzero(new) + 1])
        ends = np.append(starts[1:], constant.shape[axis])
        counts.append(tuple((ends - starts).tolist()))
        constant = np.take(constant, starts, axis)
    if constant.shape[:2] == (1, 1):
        return constant[0, 0], (), ()
    return constant, counts[0], counts[1]
