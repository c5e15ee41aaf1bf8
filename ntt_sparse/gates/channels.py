"""What a network with closed channels consists of: channels, parameters, multiply-adds.

A network is described by its nodes, see `ntt_sparse.gates.network`. A channel counts if
something that is computed from the input reaches the output through it. A closed gate therefore
also takes away what only fed it or was only fed by it: the block whose last gate is closed
whole, the layers behind a layer without an open channel. The outputs count in any case, whose
biases are all that is left of a network that is cut in two.

What channels that do not count still add does not depend on the input, as a closed channel that
is normalised afterwards is its shift. None of it is counted; `ntt_sparse.pruning.compact` folds
it into biases, and says how many numbers that takes.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Real

from ntt_sparse.gates import network as graph
from ntt_sparse.gates.network import (
    Add,
    Constant,
    Conv,
    Dense,
    Embed,
    Input,
    Multiply,
    Network,
    Node,
    Norm,
    Reshape,
    Select,
    Shift,
    Subsample,
)

_Booleans = Bool[Array | np.ndarray, "..."]
_Channels = Bool[Array | np.ndarray, "_"]

NORM_PARAMETERS = 2
"""Of a normalised channel: scale and shift."""


class Counts(NamedTuple):
    """What a network costs, as arrays or Python integers.

    Attributes:
        channels: Gated channels that are open, whether they count or not.
        parameters: Of layers, normalisation and constants, without gates.
        multiply_adds: Of convolutions and dense layers for one example, "FLOPs" in papers on
            pruning.
    """

    channels: Any
    parameters: Any
    multiply_adds: Any


def sizes(network: Network) -> dict[str, int]:
    """The channels of each gate, by its path.

    Raises:
        ValueError: The network has no gate.
    """
    found = graph.gated_channels(network)
    if not found:
        raise ValueError("the network has no gates, there is nothing to count")
    return found


def used(
    network: Network,
    open_: Mapping[str, Any],
    *,
    connected: Mapping[str, _Booleans] | None = None,
) -> dict[str, _Channels]:
    """Which channels count: those on a way from the input to the output, and the outputs.

    Channels that are normalised in groups count together. NumPy's arrays are worked on where they
    are, and give such; others may be traced.

    Args:
        network: Its description.
        open_: Of each gate, which channels are open, `(n,)`.
        connected: Of layers, by name, which inputs reach which outputs, `(inputs, outputs)`; of
            batch normalisation which channels pass, `(n,)`. By default all do.

    Returns:
        By the name of the node, `(channels,)`.

    Raises:
        ValueError: Gates are missing, unknown or of another size, or what is connected does not
            fit the network.
    """
    return ways(network, open_, connected=connected)[1]


def ways(
    network: Network,
    open_: Mapping[str, Any],
    *,
    connected: Mapping[str, _Booleans] | None = None,
) -> tuple[dict[str, _Channels], dict[str, _Channels]]:
    """Which channels depend on the input, and which of them count; see `used`."""
    _check_open(network, open_)
    connected = connected or {}
    _check_connected(network, connected)
    xp = _array_module([*open_.values(), *connected.values()])
    width = {name: shape[-1] for name, shape in graph.shapes(network).items()}
    reached: dict[str, Any] = {}
    for name, node in network.nodes.items():
        given = [reached[before] for before in graph.inputs(node)]
        value = _forward(xp, node, given, width[name], connected.get(name))
        path = graph.gate(node)
        reached[name] = value & open_[path] if path else value
    counted: dict[str, Any] = {}
    # From the output back; who reads a node comes after it.
    readers: dict[str, list[Any]] = {name: [] for name in network.nodes}
    last = list(network.nodes)[-1]
    for name, node in reversed(list(network.nodes.items())):
        if name == last:
            counted[name] = xp.ones_like(reached[name])
            wanted = reached[name]
        else:
            wanted = reached[name] & _any(readers[name])
            if isinstance(node, Norm) and node.groups:
                wanted = _whole_groups(xp, wanted, node.groups)
            counted[name] = wanted
        for before in graph.inputs(node):
            needed = _backward(xp, node, wanted, width[before], connected.get(name))
            readers[before].append(needed)
    return reached, {name: counted[name] for name in network.nodes}


def _array_module(arrays: list[Any]) -> Any:
    """NumPy for its own arrays: of a deep network JAX would compile hundreds of operations."""
    return np if all(isinstance(each, np.ndarray) for each in arrays) else jnp


def _forward(xp: Any, node: Node, given: list[Any], width: int, connected: Any) -> Any:
    match node:
        case Input():
            return xp.ones(width, bool)
        case Conv() | Dense() if connected is not None:
            return xp.any(given[0][:, None] & connected, 0)
        case Conv() | Dense() | Reshape():
            return xp.broadcast_to(xp.any(given[0]), (width,))
        case Constant():
            return xp.zeros(width, bool)
        case Norm(groups=groups) if groups:
            return _whole_groups(xp, given[0], groups)
        case Norm() if connected is not None:
            return given[0] & connected
        case Add() | Multiply():
            return _any(given)
        case Subsample():
            return xp.pad(given[0], (0, width - len(given[0])))
        case Select(channels=channels):
            return given[0][np.array(channels)]
        case Embed(places=places):
            return _embed(xp, given[0], places, width)
    return given[0]


def _backward(xp: Any, node: Node, wanted: Any, width: int, connected: Any) -> Any:
    """Which of the `width` channels that a node reads are wanted for those of its own."""
    match node:
        case Conv() | Dense() if connected is not None:
            return xp.any(wanted[None] & connected, 1)
        case Conv() | Dense() | Reshape():
            return xp.broadcast_to(xp.any(wanted), (width,))
        case Constant():
            return xp.zeros(width, bool)
        case Subsample():
            return wanted[:width]
        case Select(channels=channels):
            return _embed(xp, wanted, channels, width)
        case Embed(places=places):
            return wanted[np.array(places)]
    return wanted


def _embed(xp: Any, channels: Any, places: tuple[int, ...], width: int) -> Any:
    """Channels in their places among others that are closed."""
    source = np.full(width, len(places))
    source[np.array(places)] = np.arange(len(places))
    return xp.pad(channels, (0, 1))[source]


def _whole_groups(xp: Any, channels: Any, groups: int) -> Any:
    size = len(channels) // groups
    return xp.repeat(xp.any(channels.reshape(groups, size), 1), size)


def _any(masks: list[Any]) -> Any:
    # Of no masks, where nothing reads a node: a scalar, which broadcasts.
    return functools.reduce(operator.or_, masks) if masks else np.False_


def _check_sizes(network: Network, gates: Mapping[str, Any]) -> None:
    expected = {path: (n,) for path, n in graph.gated_channels(network).items()}
    given = {path: jnp.shape(channels) for path, channels in gates.items()}
    if given != expected:
        raise ValueError(f"channels are of gates and shapes {given}, expected {expected}")


def _check_open(network: Network, open_: Mapping[str, Any]) -> None:
    _check_sizes(network, open_)
    if kinds := {str(jnp.result_type(each)) for each in open_.values()} - {"bool"}:
        raise ValueError(f"open channels are {', '.join(kinds)}, expected booleans")


def _check_connected(network: Network, connected: Mapping[str, Any]) -> None:
    shapes = graph.shapes(network)
    for name, passes in connected.items():
        node = network.nodes.get(name)
        if isinstance(node, Conv | Dense):
            expected = (shapes[node.input][-1], node.channels)
        elif isinstance(node, Norm) and not node.groups:
            expected = shapes[name][-1:]
        else:
            raise ValueError(
                f"connected has {name!r}, expected names of convolutions, dense layers and batch "
                "normalisation"
            )
        if passes.shape != expected or passes.dtype != bool:
            raise ValueError(
                f"connected[{name!r}] is {passes.dtype} of shape {passes.shape}, expected booleans "
                f"of shape {expected}"
            )


def count(
    network: Network,
    open_: Mapping[str, Any],
    *,
    connected: Mapping[str, _Booleans] | None = None,
) -> Counts:
    """What the network costs whose open channels are these. Works under `jit`, see `used`.

    Args:
        network: Its description.
        open_: Of each gate, which channels are open, `(n,)`.
        connected: See `used`.

    Returns:
        Numbers, int32; float32 and rounded where the whole network has more than that holds. Of
        NumPy's arrays exact Python integers.

    Raises:
        ValueError: Gates are missing, unknown or of another size, or what is connected does not
            fit the network.
    """
    return tally(network, open_, used(network, open_, connected=connected))


def tally(network: Network, open_: Mapping[str, Any], counted: Mapping[str, Any]) -> Counts:
    """What a network costs of which these channels count, as `count` has it.

    Args:
        network: Its description.
        open_: Of each gate, which channels are open, `(n,)`.
        counted: From `used`.
    """
    if _array_module([*open_.values(), *counted.values()]) is np:
        exact = {name: int(np.sum(mask)) for name, mask in counted.items()}
        opened = sum(int(np.sum(mask)) for mask in open_.values())
        return Counts(opened, _parameters(network, exact), _multiply_adds(network, exact))
    total = whole(network)
    left = {name: jnp.sum(mask, dtype=jnp.int32) for name, mask in counted.items()}
    opened = [jnp.sum(mask, dtype=jnp.int32) for mask in open_.values()]
    numbers = [
        jax.tree.map(lambda n, whole=whole: n.astype(_number_type(whole)), left)
        for whole in total[1:]
    ]
    return Counts(
        jnp.sum(jnp.stack(opened)) if opened else jnp.int32(0),
        _parameters(network, numbers[0]),
        _multiply_adds(network, numbers[1]),
    )


def whole(network: Network) -> Counts:
    """What the network costs with all channels open, as Python integers."""
    shapes = graph.shapes(network)
    full = {name: shape[-1] for name, shape in shapes.items()}
    gated = sum(full[name] for name, node in network.nodes.items() if graph.gate(node))
    return Counts(gated, _parameters(network, full), _multiply_adds(network, full))


def parameters(network: Network) -> Callable[[dict[str, Bool[Array, "_"]]], Real[Array, ""]]:
    """The cost that counts parameters, for a budget (`ntt_sparse.gates.budget`)."""
    return lambda open_: count(network, open_).parameters


def multiply_adds(network: Network) -> Callable[[dict[str, Bool[Array, "_"]]], Real[Array, ""]]:
    """The cost that counts multiply-adds, for a budget (`ntt_sparse.gates.budget`)."""
    return lambda open_: count(network, open_).multiply_adds


def _number_type(whole: int) -> Any:
    return jnp.int32 if whole <= np.iinfo(np.int32).max else jnp.float32


def _layers(network: Network) -> list[tuple[str, Conv | Dense, int, int]]:
    """Layers with the weights between two channels, and the positions of their outputs."""
    shapes = graph.shapes(network)
    found = []
    for name, node in network.nodes.items():
        if isinstance(node, Conv):
            found.append((name, node, node.size**2, math.prod(shapes[name][:-1])))
        elif isinstance(node, Dense):
            # All positions of what it reads.
            found.append((name, node, math.prod(shapes[node.input][:-1]), 1))
    return found


def _parameters(network: Network, left: Mapping[str, Any]) -> Any:
    total = sum(
        left[node.input] * left[name] * window + left[name] * int(node.bias)
        for name, node, window, _ in _layers(network)
    )
    for name, node in network.nodes.items():
        if isinstance(node, Norm):
            total += left[name] * NORM_PARAMETERS
        elif isinstance(node, Shift | Constant):
            total += left[name] * max(1, len(node.rows) * len(node.columns))
    return total


def _multiply_adds(network: Network, left: Mapping[str, Any]) -> Any:
    return sum(
        left[node.input] * left[name] * (window * positions)
        for name, node, window, positions in _layers(network)
    )


def soft_fractions(network: Network, gates: Mapping[str, Real[Array, "_"]]) -> dict[str, Any]:
    """How much of a network is there whose channels are open by halves, differentiably.

    A channel counts by its own gate and by the gates it is read through: what is normalised and
    then gated takes the weights before it along. What a sum has of a channel is the most that one
    of its parts has. With gates of zeros and ones, one at least of each layer open, this is
    `count`. ChipNet holds networks to budgets of this kind.

    Args:
        network: Its description.
        gates: Of each gate, how far its channels are open, `(n,)` between 0 and 1.

    Returns:
        Fractions of the whole between 0 and 1, by what is counted: `channels`, `volume` (of
        gated features), `parameters` and `multiply_adds`.

    Raises:
        ValueError: Gates are missing, unknown or of another size, or there is none.
    """
    sizes(network)
    _check_sizes(network, gates)
    shapes = graph.shapes(network)
    there: dict[str, Array] = {}
    volume = []
    for name, node in network.nodes.items():
        given = [there[before] for before in graph.inputs(node)]
        value = _soft(node, given, shapes[name][-1])
        if path := graph.gate(node):
            value = value * gates[path]
            volume.append((math.prod(shapes[name][:-1]), gates[path]))
        there[name] = value
    # From the output back: the most that one of its readers reads of a channel.
    read: dict[str, list[Array]] = {name: [] for name in network.nodes}
    left = {}
    for name, node in reversed(list(network.nodes.items())):
        wanted = (
            functools.reduce(jnp.maximum, read[name]) if read[name] else jnp.ones_like(there[name])
        )
        left[name] = jnp.sum(there[name] * wanted)
        path = graph.gate(node)
        through = wanted * gates[path] if path and isinstance(node, Norm) else wanted
        for before in graph.inputs(node):
            read[before].append(_soft_read(node, through, shapes[before][-1]))
    full = whole(network)
    opened = [value for _, value in volume]
    return {
        "channels": sum(jnp.sum(value) for value in opened) / sum(map(len, opened)),
        "volume": sum(area * jnp.sum(value) for area, value in volume)
        / sum(area * len(value) for area, value in volume),
        "parameters": _parameters(network, left) / full.parameters,
        "multiply_adds": _multiply_adds(network, left) / full.multiply_adds,
    }


def _soft_read(node: Node, wanted: Any, width: int) -> Any:
    match node:
        case Conv() | Dense() | Reshape():
            return jnp.ones(width)
        case Constant():
            return jnp.zeros(width)
        case Subsample():
            return wanted[:width]
        case Select(channels=channels):
            return jnp.zeros(width).at[np.array(channels)].set(wanted)
        case Embed(places=places):
            return wanted[np.array(places)]
    return wanted


def _soft(node: Node, given: list[Any], width: int) -> Any:
    match node:
        case Input() | Conv() | Dense() | Reshape() | Constant():
            return jnp.ones(width)
        case Add() | Multiply():
            return functools.reduce(jnp.maximum, given)
        case Subsample():
            return jnp.pad(given[0], (0, width - len(given[0])))
        case Select(channels=channels):
            return given[0][np.array(channels)]
        case Embed(places=places):
            return jnp.zeros(width).at[np.array(places)].set(given[0])
    return given[0]
