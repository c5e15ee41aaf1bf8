"""Networks described node by node: what is computed from what, and where gates are.

A description holds no parameters. `ntt_sparse.gates.channels` counts with it what closed gates
leave of a network, `ntt_sparse.pruning.compact` builds what is left, and
`ntt_sparse.models.described` runs it. Features have their channels last.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

ACTIVATION_NAMES = ("none", "relu", "leaky_relu", "elu", "tanh", "sine")
"""Functions that an `Activation` may have, see `ntt_sparse.models.activations`."""


@dataclasses.dataclass(frozen=True)
class Input:
    """The input of the network: `(height, width, channels)`, or another shape of one example."""

    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with zeros around its input.

    Attributes:
        input: The node it reads.
        channels: Of the output.
        size: Height and width of the kernel.
        stride: Of its positions.
        padding: Rows and columns of zeros before and after the input.
        bias: Whether there is one.
        gate: Path of the gate on its outputs, as `ntt_sparse.gates.layer.find` has it.
    """

    input: str
    channels: int
    size: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    bias: bool = False
    gate: str | None = None


@dataclasses.dataclass(frozen=True)
class Dense:
    """A dense layer, of all positions of its input; the other fields are those of `Conv`."""

    input: str
    channels: int
    bias: bool = True
    gate: str | None = None


@dataclasses.dataclass(frozen=True)
class Norm:
    """Channels normalised, scaled and shifted, then gated.

    Attributes:
        input: The node it reads.
        groups: How many groups of channels have statistics of their own in each example; 0 for
            those of every channel in a batch.
        gate: Path of the gate on its outputs.
        epsilon: What is added to variances: 1e-5 in all models here and in `nn.BatchNorm`, but
            1e-6 in Flax's `nn.GroupNorm`.
    """

    input: str
    groups: int = 0
    gate: str | None = None
    epsilon: float = 1e-5


@dataclasses.dataclass(frozen=True)
class Activation:
    """A function of each number: one of `ntt_sparse.models.activations`, and its name.

    The slope of `"leaky_relu"` below zero is 0.01.
    """

    input: str
    function: str


@dataclasses.dataclass(frozen=True)
class Pool:
    """The largest of the positions under a window; those outside of the input do not count.

    Attributes:
        input: The node it reads.
        size: Height and width of the window.
        stride: Of its positions.
        padding: Rows and columns outside of the input before and after it that windows reach.
    """

    input: str
    size: int = 2
    stride: int = 2
    padding: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean over positions."""

    input: str


@dataclasses.dataclass(frozen=True)
class Field:
    """The input centred on zeros, up to a height and width."""

    input: str
    size: int


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Numbers dropped at a rate in training."""

    input: str
    rate: float


@dataclasses.dataclass(frozen=True)
class Add:
    """The sum of nodes of one shape."""

    inputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Multiply:
    """The product of nodes of one shape."""

    inputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Subsample:
    """Every `stride`-th position, and channels of zeros after those there are."""

    input: str
    channels: int
    stride: int


@dataclasses.dataclass(frozen=True)
class Reshape:
    """The same numbers in another shape; the last node of a network."""

    input: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Select:
    """Some channels of a node."""

    input: str
    channels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Embed:
    """The channels of a node at places among `size`, the others zero."""

    input: str
    places: tuple[int, ...]
    size: int


@dataclasses.dataclass(frozen=True)
class Shift:
    """A node plus a learnable constant, the same for all examples.

    Attributes:
        input: The node.
        rows: How often each row of the constant is repeated; empty for one number per channel.
        columns: How often each column is.
    """

    input: str
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Constant:
    """What a `Shift` adds, by itself: the same features of a shape for every example.

    Attributes:
        input: A node, of which only the number of examples is read.
        shape: Of the features.
        rows: See `Shift`.
        columns: See `Shift`.
    """

    input: str
    shape: tuple[int, ...]
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()


Node: TypeAlias = (
    Input | Conv | Dense | Norm | Activation | Pool | Mean | Field | Dropout | Add | Multiply
    | Subsample | Reshape | Select | Embed | Shift | Constant
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network as the nodes it consists of.

    Attributes:
        nodes: By name, each after those it reads; the first is the input, the last the output.
            Nodes with parameters have the path of these as a name, `"stage1_block1/Conv_0"`.
    """

    nodes: Mapping[str, Node]

    def __hash__(self) -> int:
        """Of the nodes in their order."""
        return hash(tuple(self.nodes.items()))

    def __eq__(self, other: object) -> bool:
        """Whether nodes and their order are the same: the last one is the output."""
        if not isinstance(other, Network):
            return NotImplemented
        return tuple(self.nodes.items()) == tuple(other.nodes.items())


class Builder:
    """Collects the nodes of a network in the order in which they are computed."""

    def __init__(self, input_shape: tuple[int, ...]):
        """Begins with the input, named `"input"`, of the shape of one example."""
        self.nodes: dict[str, Node] = {"input": Input(tuple(input_shape))}

    def __call__(self, node: Node, name: str = "") -> str:
        """Adds a node and returns its name; without one it gets one of its own.

        Raises:
            ValueError: Another node has the name.
        """
        name = name or f"{type(node).__name__.lower()}_{len(self.nodes)}"
        if name in self.nodes:
            raise ValueError(f"two nodes are named {name!r}, expected a name for each")
        self.nodes[name] = node
        return name

    def network(self) -> Network:
        """The network of the nodes so far, checked.

        Raises:
            ValueError: They do not fit together, see `check`.
        """
        return check(Network(self.nodes))


def image_builder(input_shape: tuple[int, ...]) -> Builder:
    """A builder for networks of images `(height, width, channels)`.

    Raises:
        ValueError: Not the shape of images.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(f"images have shape {input_shape}, expected (height, width, channels)")
    return Builder(input_shape)


def inputs(node: Node) -> tuple[str, ...]:
    """The names of the nodes that a node reads."""
    if isinstance(node, Input):
        return ()
    return node.inputs if isinstance(node, Add | Multiply) else (node.input,)


def input_shape(network: Network) -> tuple[int, ...]:
    """The shape of one example."""
    first = next(iter(network.nodes.values()))
    if not isinstance(first, Input):
        raise ValueError(f"the first node is {first}, expected the input")
    return first.shape


def gate(node: Node) -> str | None:
    """The path of the gate on a node, if it has one."""
    return node.gate if isinstance(node, Conv | Dense | Norm) else None


def gated_channels(network: Network) -> dict[str, int]:
    """The channels of each gate, by its path; empty if there is none."""
    found = shapes(network)
    return {path: found[name][-1] for name, node in network.nodes.items() if (path := gate(node))}


def shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """The shape of each node for one example, by name; channels are last.

    Raises:
        ValueError: Nodes do not fit together.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, node in network.nodes.items():
        for before in inputs(node):
            if before not in found:
                raise ValueError(f"{name!r} reads {before!r}, expected a node before it")
        try:
            shape = _shape(node, [found[before] for before in inputs(node)])
        except (ValueError, IndexError) as error:
            given = ", ".join(f"{before!r} of {found[before]}" for before in inputs(node))
            raise ValueError(f"{name!r}, {node}, does not fit {given or 'here'}: {error}") from None
        if not shape or min(shape) < 1:
            raise ValueError(f"{name!r}, {node}, has shape {shape}, expected sizes above 0")
        found[name] = shape
    return found


def _shape(node: Node, given: list[tuple[int, ...]]) -> tuple[int, ...]:
    match node:
        case Input(shape):
            return shape
        case Conv():
            height, width, _ = given[0]
            padded = (size + sum(node.padding) - node.size for size in (height, width))
            return (*(size // node.stride + 1 for size in padded), node.channels)
        case Dense():
            return (node.channels,)
        case Norm(groups=groups) if groups and given[0][-1] % groups:
            raise ValueError(f"{given[0][-1]} channels in {groups} groups")
        case Pool():
            if max(node.padding) >= node.size:
                raise ValueError(f"padding {node.padding} of windows of {node.size}")
            height, width, channels = given[0]
            padded = (size + sum(node.padding) - node.size for size in (height, width))
            return (*(size // node.stride + 1 for size in padded), channels)
        case Mean():
            return given[0][-1:]
        case Field(size=size):
            height, width, channels = given[0]
            return (max(height, size), max(width, size), channels)
        case Add() | Multiply():
            if len(set(given)) != 1:
                raise ValueError("expected nodes of one shape")
        case Subsample():
            height, width, channels = given[0]
            if node.channels < channels:
                raise ValueError(f"{channels} channels among {node.channels}")
            return (-(-height // node.stride), -(-width // node.stride), node.channels)
        case Reshape(shape=shape):
            if math.prod(shape) != math.prod(given[0]):
                raise ValueError(f"{math.prod(given[0])} numbers in {math.prod(shape)}")
            return shape
        case Select(channels=channels):
            _check_places(channels, given[0][-1])
            return (*given[0][:-1], len(channels))
        case Embed(places=places, size=size):
            if len(places) != given[0][-1]:
                raise ValueError(f"{len(places)} places")
            _check_places(places, size)
            return (*given[0][:-1], size)
        case Shift(rows=rows, columns=columns):
            _check_positions(rows, columns, given[0])
        case Constant(shape=shape, rows=rows, columns=columns):
            _check_positions(rows, columns, shape)
            return shape
    return given[0]


def _check_places(places: tuple[int, ...], size: int) -> None:
    if list(places) != sorted(set(places)) or not all(0 <= place < size for place in places):
        raise ValueError(f"expected growing places among {size}")


def _check_positions(rows: tuple[int, ...], columns: tuple[int, ...], shape: Any) -> None:
    if (rows or columns) and (sum(rows), sum(columns)) != shape[:-1]:
        raise ValueError(f"a constant of {sum(rows)} x {sum(columns)} positions")


def check(network: Network) -> Network:
    """The network itself, if its description fits together.

    Raises:
        ValueError: A node reads one that is unknown or later or has another shape, a gate is on
            two nodes or on one channel, or the first node is no input.
    """
    names = list(network.nodes)
    if not names or not isinstance(network.nodes[names[0]], Input):
        raise ValueError(f"nodes are {names}, expected the input first")
    for name, node in network.nodes.items():
        if isinstance(node, Input) and name != names[0]:
            raise ValueError(f"{name!r} is another input, expected one")
        if isinstance(node, Reshape) and name != names[-1]:
            raise ValueError(f"{name!r} reshapes channels, expected that as the last node alone")
        _check_fields(name, node)
    found = shapes(network)
    gates = [gate(node) for node in network.nodes.values() if gate(node)]
    if len(set(gates)) < len(gates):
        raise ValueError(f"gates are {gates}, expected each on one node")
    for name, node in network.nodes.items():
        if gate(node) and found[name][-1] < 2:
            raise ValueError(
                f"{name!r} has a gate on {found[name][-1]} channel: there is none to close without "
                "closing the layer, expected 2 channels or more"
            )
    return network


def _check_fields(name: str, node: Node) -> None:
    """Checks the values of a node by themselves."""

    def numbers(value, least):
        values = value if isinstance(value, tuple) else (value,)
        return all(type(number) is int and number >= least for number in values)

    least = {
        "shape": 1, "channels": 0 if isinstance(node, Select) else 1, "size": 1, "stride": 1,
        "padding": 0, "groups": 0, "places": 0, "rows": 1, "columns": 1,
    }  # fmt: skip
    for field, value in vars(node).items():
        right = {
            "padding": lambda v: isinstance(v, tuple) and len(v) == 2 and numbers(v, 0),
            "rate": lambda v: isinstance(v, float | int) and 0 <= v < 1,
            "bias": lambda v: isinstance(v, bool),
            "epsilon": lambda v: type(v) in (float, int) and 0 < v < math.inf,
            "gate": lambda v: v is None or (isinstance(v, str) and v),
            "function": lambda v: v in ACTIVATION_NAMES,
            "input": lambda v: isinstance(v, str),
            "inputs": lambda v: len(v) > 0 and all(isinstance(each, str) for each in v),
        }.get(field, lambda v, field=field: numbers(v, least[field]))
        if not right(value):
            raise ValueError(f"{name!r}, {node}, has {field} {value!r}, which makes no sense")
    if not name:
        raise ValueError(f"{node} has no name")
