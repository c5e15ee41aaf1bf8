"""The model of a description: any network of nodes, as one Linen module."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, ArrayLike, Float

from ntt_sparse._types import PRNGKey
from ntt_sparse.gates import network as graph
from ntt_sparse.gates.network import Constant, Conv, Dense, Network, Node, Norm, Shift
from ntt_sparse.models.activations import ACTIVATIONS
from ntt_sparse.models.convolution import convolve
from ntt_sparse.models.gated import add_bias
from ntt_sparse.models.lenet import max_pool, pad_to_field
from ntt_sparse.models.norm import STABLE, batch_norm_fields
from ntt_sparse.models.resnet import subsample_and_pad

_KERNEL_INIT = nn.initializers.lecun_normal()
STATISTICS = "batch_stats"
"""The collection of running statistics."""


class Described(nn.Module):
    """The network that a description describes, without its gates.

    Its variables are those of the model that was described: parameters by the paths that are
    the names of nodes, running statistics in the collection `batch_stats`, which `train=True`
    updates with `mutable=["batch_stats"]`. With gates that are one it gives the outputs of that
    model. What `ntt_sparse.pruning.compact` makes is one of these.

    Attributes:
        network: The description.
        dtype: Of the computation; by default that of inputs and params together.
        param_dtype: Of the parameters.
    """

    network: Network
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "n ..."], *, train: bool = False) -> Float[Array, "..."]:
        """The outputs of a batch.

        Args:
            x: Examples `(n, ...)` of the shape that was described.
            train: Whether normalisation uses the statistics of the batch, and dropout drops,
                which takes `rngs={"dropout": key}`.

        Returns:
            Outputs `(n, ...)`.

        Raises:
            ValueError: Examples have another shape.
        """
        params = {
            name: self.param(name, lambda key, tree=tree: _made(tree, key, self.param_dtype))
            for name, tree in _nested(parameter_shapes(self.network)).items()
        }
        stored = {
            name: self.variable(STATISTICS, name, _made, tree, None, jnp.float32)
            for name, tree in _nested(statistics_shapes(self.network)).items()
        }
        drops = train and any(isinstance(n, graph.Dropout) for n in self.network.nodes.values())
        values, statistics = evaluate(
            self.network, params, {name: each.value for name, each in stored.items()}, x,
            train=train, dtype=self.dtype, key=self.make_rng("dropout") if drops else None,
        )  # fmt: skip
        if train and not self.is_initializing():
            for name, each in stored.items():
                each.value = statistics[name]
        return values[list(self.network.nodes)[-1]]


class _Leaf(NamedTuple):
    """An array to be made."""

    shape: tuple[int, ...]
    init: Callable[..., Any]


def parameter_shapes(network: Network) -> dict[str, _Leaf]:
    """The shape and the initialiser of each parameter, by its path."""
    found: dict[str, _Leaf] = {}
    zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
    shapes = graph.shapes(network)
    for name, node in network.nodes.items():
        channels = shapes[name][-1:]
        if isinstance(node, Conv):
            size = (node.size, node.size)
            kernel = (*size, shapes[node.input][-1], node.channels)
            found[f"{name}/kernel"] = _Leaf(kernel, _KERNEL_INIT)
        elif isinstance(node, Dense):
            kernel = (math.prod(shapes[node.input]), node.channels)
            found[f"{name}/kernel"] = _Leaf(kernel, _KERNEL_INIT)
        elif isinstance(node, Norm):
            found[f"{name}/scale"] = _Leaf(channels, ones)
            found[f"{name}/bias"] = _Leaf(channels, zeros)
        elif isinstance(node, Shift | Constant):
            positions = (len(node.rows), len(node.columns)) if node.rows else ()
            found[f"{name}/bias"] = _Leaf((*positions, *channels), zeros)
        if isinstance(node, Conv | Dense) and node.bias:
            found[f"{name}/bias"] = _Leaf(channels, zeros)
    return found


def statistics_shapes(network: Network) -> dict[str, _Leaf]:
    """The shape and the initialiser of each running statistic, by its path."""
    found: dict[str, _Leaf] = {}
    shapes = graph.shapes(network)
    for name, node in network.nodes.items():
        if isinstance(node, Norm) and not node.groups:
            found[f"{name}/mean"] = _Leaf(shapes[name][-1:], nn.initializers.zeros_init())
            found[f"{name}/var"] = _Leaf(shapes[name][-1:], nn.initializers.ones_init())
    return found


def _nested(leaves: Mapping[str, _Leaf]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def _made(tree: Any, key: PRNGKey | None, dtype: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda each: isinstance(each, _Leaf))
    keys = jax.random.split(jax.random.key(0) if key is None else key, len(leaves))
    made = [leaf.init(each, leaf.shape, dtype) for leaf, each in zip(leaves, keys, strict=True)]
    return structure.unflatten(made)


def evaluate(
    network: Network,
    params: Mapping[str, Any],
    statistics: Mapping[str, Any],
    x: Float[ArrayLike, "n ..."],
    *,
    train: bool = False,
    dtype: Any = None,
    key: PRNGKey | None = None,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Runs a network node by node.

    Args:
        network: Its description. Gates are not applied: they belong into the parameters.
        params: Nested, by the paths that are the names of nodes.
        statistics: Running statistics of batch normalisation, nested likewise.
        x: Examples `(n, ...)`.
        train: Whether normalisation uses the statistics of the batch, and dropout drops.
        dtype: Of the computation; by default that of inputs and params together.
        key: For dropout.

    Returns:
        The value of each node, and the running statistics, updated if `train`.

    Raises:
        ValueError: Examples have another shape than was described.
    """
    x = jnp.asarray(x)
    if x.shape[1:] != (expected := graph.input_shape(network)):
        raise ValueError(f"examples have shape {x.shape[1:]}, expected {expected}")
    flat_params = traverse_util.flatten_dict(dict(params), sep="/")
    flat_statistics = traverse_util.flatten_dict(dict(statistics), sep="/")
    values: dict[str, Array] = {}
    for index, (name, node) in enumerate(network.nodes.items()):
        if isinstance(node, graph.Input):
            values[name] = x
            continue
        given = [values[before] for before in graph.inputs(node)]
        if isinstance(node, Norm):
            own = {leaf: flat_params[f"{name}/{leaf}"] for leaf in ("scale", "bias")}
            paths = {leaf: f"{name}/{leaf}" for leaf in ("mean", "var")}
            if node.groups:
                values[name] = _group_norm(node, own, given[0], dtype)
                continue
            state = {leaf: flat_statistics[path] for leaf, path in paths.items()}
            values[name], state = _batch_norm(node, own, state, given[0], train, dtype)
            flat_statistics |= {path: state[leaf] for leaf, path in paths.items()}
        elif isinstance(node, graph.Dropout):
            rngs = {"dropout": jax.random.fold_in(key, index)} if key is not None else {}
            drop = nn.Dropout(node.rate, deterministic=not train, parent=None)
            values[name] = cast(Array, drop.apply({}, given[0], rngs=rngs))
        else:
            kernel = flat_params.get(f"{name}/kernel")
            bias = flat_params.get(f"{name}/bias")
            values[name] = _run(node, given, kernel, bias, train, dtype)
    return values, traverse_util.unflatten_dict(flat_statistics, sep="/")


def _run(node: Node, given: list[Any], kernel: Any, bias: Any, train: bool, dtype: Any) -> Any:
    x = given[0]
    match node:
        case Conv():
            x, kernel, bias = promote_dtype(x, kernel, bias, dtype=dtype)
            y = convolve(x, kernel, node.stride, node.padding, values_only=not train)
            return add_bias(y, bias)
        case Dense():
            x, kernel, bias = promote_dtype(x, kernel, bias, dtype=dtype)
            return add_bias(x.reshape(x.shape[0], math.prod(x.shape[1:])) @ kernel, bias)
        case graph.Activation(function=function):
            return ACTIVATIONS[function](x)
        case graph.Pool(size=size, stride=stride, padding=padding):
            return max_pool(x, size, stride, padding)
        case graph.Mean():
            return x.mean(axis=tuple(range(1, x.ndim - 1)))
        case graph.Field(size=size):
            return pad_to_field(x, size)
        case graph.Add():
            return sum(given[1:], start=x)
        case graph.Multiply():
            return math.prod(given[1:], start=x)
        case graph.Subsample(channels=channels, stride=stride):
            return subsample_and_pad(x, channels, stride)
        case graph.Reshape(shape=shape):
            return x.reshape(x.shape[0], *shape)
        case graph.Select(channels=channels):
            return _select(x, channels)
        case graph.Embed(places=places, size=size):
            return _embed(x, places, size)
        case Shift():
            x, bias = promote_dtype(x, bias, dtype=dtype)
            return x + _repeated(bias, node)
        case Constant(shape=shape):
            x, bias = promote_dtype(x, bias, dtype=dtype)
            return jnp.broadcast_to(_repeated(bias, node), (x.shape[0], *shape))
    raise ValueError(f"{node} is unknown")


def _repeated(bias: Any, node: Shift | Constant) -> Any:
    for axis, counts in enumerate((node.rows, node.columns)):
        if counts:
            repeats = np.array(counts)
            bias = jnp.repeat(bias, repeats, axis=axis, total_repeat_length=sum(counts))
    return bias


def _select(x: Any, channels: tuple[int, ...]) -> Any:
    # A slice where that does: XLA joins it with what comes next.
    if channels == tuple(range(channels[0], channels[-1] + 1)):
        return x[..., channels[0] : channels[-1] + 1]
    return x[..., np.array(channels)]


def _embed(x: Any, places: tuple[int, ...], size: int) -> Any:
    if places == tuple(range(places[0], places[-1] + 1)):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(places[0], size - 1 - places[-1])])
    # Reads each channel from its place, or a zero that is put behind.
    source = np.full(size, len(places))
    source[np.array(places)] = np.arange(len(places))
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])[..., source]


def _batch_norm(node: Norm, params: Any, statistics: Any, x: Any, train: bool, dtype: Any) -> Any:
    fields = batch_norm_fields(train, dtype, params["scale"].dtype)
    fields["epsilon"] = node.epsilon
    layer = nn.BatchNorm(**fields, parent=None)
    variables = {"params": params, STATISTICS: statistics}
    if not train:
        return layer.apply(variables, x), statistics
    y, updated = layer.apply(variables, x, mutable=[STATISTICS])
    return y, updated[STATISTICS]


def _group_norm(node: Norm, params: Any, x: Any, dtype: Any) -> Any:
    fields: dict[str, Any] = {**STABLE, "epsilon": node.epsilon}
    fields |= {"dtype": dtype, "param_dtype": params["scale"].dtype}
    return nn.GroupNorm(node.groups, **fields, parent=None).apply({"params": params}, x)
