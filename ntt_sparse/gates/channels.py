"""What a network with closed channels consists of: channels, parameters, multiply-adds.

A network is described by its sets of channels and the layers between them, see `Network`. A
channel counts if something that is computed from the input reaches the output through it. A
closed gate therefore also takes away what only fed it or was only fed by it: the block whose
last gate is closed whole, the layers behind a layer without an open channel. The outputs count
in any case, whose biases are all that is left of a network that is cut in two.

What channels that do not count still add does not depend on the input, as a closed channel that
is normalised afterwards is its shift. Behind 1x1 convolutions and dense layers that is a bias;
behind a padded 3x3 convolution it differs at the borders. None of it is counted.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Real


class Channels(NamedTuple):
    """A set of channels: what one layer writes, or the sum of other sets, channel by channel.

    Attributes:
        size: How many.
        gate: Path of the gate on them, as `ntt_sparse.gates.layer.find` has it.
        parameters: Per channel, besides those of layers: bias, scale and shift.
        sources: The sets it is the sum of, of the same size; one for a set that is another one
            normalised. None for what a layer writes, and for the input.
    """

    size: int
    gate: str | None = None
    parameters: int = 0
    sources: tuple[str, ...] = ()


class Layer(NamedTuple):
    """A convolution or dense layer: all channels of a set from all channels of another.

    Attributes:
        inputs: The set it reads.
        outputs: The set it writes.
        window: Weights between two channels: positions of the kernel, or, of a dense layer,
            of the images that are flattened before it.
        positions: Positions of its outputs: 1, or pixels.
    """

    inputs: str
    outputs: str
    window: int = 1
    positions: int = 1


class Network(NamedTuple):
    """A network as sets of channels and the layers between them.

    Attributes:
        channels: By name, each after those it is computed from; the first is the input, the
            last the output.
        layers: In any order; one for each set that is neither a sum nor the input. The names
            of outputs are those of the layers' parameters.
    """

    channels: Mapping[str, Channels]
    layers: tuple[Layer, ...]


class Counts(NamedTuple):
    """What a network costs, as arrays or Python integers.

    Attributes:
        channels: Gated channels that are open, whether they count or not.
        parameters: Of convolutions, dense layers and normalisation, without gates.
        multiply_adds: Of convolutions and dense layers for one example, "FLOPs" in papers on
            pruning.
    """

    channels: Any
    parameters: Any
    multiply_adds: Any


def check(network: Network) -> Network:
    """The network itself, if its description fits together.

    Raises:
        ValueError: A set is computed from one that is unknown or later or of another size, by
            no layer or by several, or a gate is on two sets.
    """
    names, writers = list(network.channels), [layer.outputs for layer in network.layers]
    for layer in network.layers:
        for name in (layer.inputs, layer.outputs):
            if name not in names:
                raise ValueError(f"{layer} is between sets of channels, but {name!r} is none")
        if names.index(layer.inputs) >= names.index(layer.outputs):
            raise ValueError(f"{layer} reads what comes later: expected the inputs first")
    for index, (name, channels) in enumerate(network.channels.items()):
        expected = 0 if channels.sources or index == 0 else 1
        if writers.count(name) != expected:
            raise ValueError(
                f"{writers.count(name)} layers write {name!r}, expected {expected}: a set is the "
                "input, the sum of others or what one layer writes"
            )
        for source in channels.sources:
            if source not in names[:index] or network.channels[source].size != channels.size:
                raise ValueError(
                    f"{name!r} is the sum of {channels.sources}, expected sets before it of "
                    f"{channels.size} channels"
                )
    gates = [channels.gate for channels in network.channels.values() if channels.gate]
    if len(set(gates)) < len(gates):
        raise ValueError(f"gates are {gates}, expected each on one set")
    for name, channels in network.channels.items():
        if channels.gate and channels.size < 2:
            raise ValueError(
                f"{name!r} has a gate on {channels.size} channel: there is none to close without "
                "closing the layer, expected 2 channels or more"
            )
    return network


def sizes(network: Network) -> dict[str, int]:
    """The channels of each gate, by its path.

    Raises:
        ValueError: The network has no gate.
    """
    found = {each.gate: each.size for each in network.channels.values() if each.gate}
    if not found:
        raise ValueError("the network has no gates, there is nothing to count")
    return found


def used(network: Network, open_: Mapping[str, Bool[Array, "_"]]) -> dict[str, Bool[Array, "_"]]:
    """Which channels count: those on a way from the input to the output, and the outputs.

    Args:
        network: Its description.
        open_: Of each gate, which channels are open, `(n,)`.

    Returns:
        By the name of the set, `(size,)`.

    Raises:
        ValueError: Gates are missing, unknown or of another size.
    """
    expected = sizes(network)
    given = {path: jnp.shape(channels) for path, channels in open_.items()}
    if given != {path: (n,) for path, n in expected.items()}:
        raise ValueError(
            f"open channels are of gates and shapes {given}, expected {expected} channels"
        )
    if kinds := {str(jnp.result_type(each)) for each in open_.values()} - {"bool"}:
        raise ValueError(f"open channels are {', '.join(kinds)}, expected booleans")
    writer = {layer.outputs: layer.inputs for layer in network.layers}
    reached: dict[str, Array] = {}
    for name, channels in network.channels.items():
        if channels.sources:
            value = _any([reached[source] for source in channels.sources])
        elif name in writer:
            value = jnp.broadcast_to(jnp.any(reached[writer[name]]), channels.size)
        else:
            value = jnp.ones(channels.size, bool)
        reached[name] = value & open_[channels.gate] if channels.gate else value
    last = list(network.channels)[-1]
    counted: dict[str, Array] = {}
    # From the output back; who reads a set comes after it.
    readers: dict[str, list[Array]] = {name: [] for name in network.channels}
    for name in reversed(list(network.channels)):
        wanted = reached[name] if name == last else reached[name] & _any(readers[name])
        counted[name] = jnp.ones_like(wanted) if name == last else wanted
        channels = network.channels[name]
        for source in channels.sources:
            readers[source].append(wanted)
        if name in writer:
            size = network.channels[writer[name]].size
            readers[writer[name]].append(jnp.broadcast_to(jnp.any(wanted), size))
    return {name: counted[name] for name in network.channels}


def _any(masks: list[Array]) -> Array:
    # Of no masks, where nothing reads a set: a scalar, which broadcasts.
    return functools.reduce(jnp.logical_or, masks, jnp.asarray(False))


def count(network: Network, open_: Mapping[str, Bool[Array, "_"]]) -> Counts:
    """What the network costs whose open channels are these. Works under `jit`.

    Args:
        network: Its description.
        open_: Of each gate, which channels are open, `(n,)`.

    Returns:
        Numbers, int32; float32 and rounded where the whole network has more than that holds.

    Raises:
        ValueError: Gates are missing, unknown or of another size.
    """
    total = whole(network)
    left = {name: jnp.sum(mask, dtype=jnp.int32) for name, mask in used(network, open_).items()}
    opened = jnp.sum(jnp.stack([jnp.sum(mask, dtype=jnp.int32) for mask in open_.values()]))
    numbers = [
        jax.tree.map(lambda n, whole=whole: n.astype(_number_type(whole)), left)
        for whole in total[1:]
    ]
    return Counts(opened, _parameters(network, numbers[0]), _multiply_adds(network, numbers[1]))


def whole(network: Network) -> Counts:
    """What the network costs with all channels open, as Python integers."""
    full = {name: each.size for name, each in network.channels.items()}
    gated = sum(each.size for each in network.channels.values() if each.gate)
    return Counts(gated, _parameters(network, full), _multiply_adds(network, full))


def parameters(network: Network) -> Callable[[dict[str, Bool[Array, "_"]]], Real[Array, ""]]:
    """The cost that counts parameters, for a budget (`ntt_sparse.gates.budget`)."""
    return lambda open_: count(network, open_).parameters


def multiply_adds(network: Network) -> Callable[[dict[str, Bool[Array, "_"]]], Real[Array, ""]]:
    """The cost that counts multiply-adds, for a budget (`ntt_sparse.gates.budget`)."""
    return lambda open_: count(network, open_).multiply_adds


def _number_type(whole: int) -> Any:
    return jnp.int32 if whole <= np.iinfo(np.int32).max else jnp.float32


def _parameters(network: Network, left: Mapping[str, Any]) -> Any:
    weights = sum(left[each.inputs] * left[each.outputs] * each.window for each in network.layers)
    return weights + sum(left[name] * each.parameters for name, each in network.channels.items())


def _multiply_adds(network: Network, left: Mapping[str, Any]) -> Any:
    return sum(
        left[each.inputs] * left[each.outputs] * (each.window * each.positions)
        for each in network.layers
    )
