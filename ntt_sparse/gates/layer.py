"""Gates inside networks: a Linen layer, and where its parameters are in a network's."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from ntt_sparse._types import Masks, Params, PRNGKey, Scalar
from ntt_sparse.gates.dam import Dam
from ntt_sparse.gates.network import Network, Norm, gate, gated_channels

# Linen's own names of modules, or those of a field.
_NAME = re.compile(r"gate(_?\d+)?", re.IGNORECASE)
_NAMES = "gate, gate1, Gate_0 or the like"
# Parameters of layers that are named gate too, such as those of gated linear units.
_OF_LAYERS = {"kernel", "embedding"}
# Parameters of gates that hardly any other module has alone.
_OF_GATES = ({"beta"}, {"zeta"}, {"log_alpha"})

STATE = "gates"
"""The collection of what gates know besides their parameters, by keywords of `Kind.values`."""
RNG = "dropout"
"""The RNG that random gates are drawn with, as what `flax.linen.Dropout` drops."""
LAYER, NORM, SCALE = "layer", "norm", "scale"
"""Places of gates, see `Kind`."""


@runtime_checkable
class Kind(Protocol):
    """A kind of gate, as pure functions of its parameters.

    There are `Dam`, `L1`, `Slimming`, `ChipNet` and `HardConcrete`.

    Attributes:
        place: `"layer"`: on what a layer writes, before it is normalised; `"norm"`: on what is
            normalised; `"scale"`: the scale of the normalisation is the gate. Without
            normalisation all are on layers.
    """

    place: str

    def init(self, n: int) -> dict[str, Array]:
        """The parameters of a layer of `n` channels at the start."""
        ...

    def values(
        self, params: Mapping[str, Array], n: int, *, ranks: Int[ArrayLike, " n"] | None = None
    ) -> Float[Array, " n"]:
        """What its channels are multiplied by, `(n,)`; zero is closed.

        Keywords are variables of the collection `STATE`.
        """
        ...

    def penalty(self, layers: Sequence[Mapping[str, Array]]) -> Scalar:
        """What is minimised to close channels, of the parameters of all layers."""
        ...


@runtime_checkable
class RandomKind(Kind, Protocol):
    """A kind whose gates are drawn in training: `HardConcrete`.

    `values` takes what `noise` draws by the keyword `noise`.
    """

    def noise(self, key: PRNGKey, n: int) -> Float[Array, " n"]:
        """What the gates of a layer of `n` channels are drawn from, `(n,)`."""
        ...


class Gate(nn.Module):
    """The gates of one layer.

    Its name is what it is found by in the parameters of a network: `gate`, `gate1`, or Linen's own
    `Gate_0`; a list of gates is a field `gate`, of `gate_0` and so on.

    Called with features, it multiplies their last axis. A convolution or dense layer that has
    no bias may as well be multiplied itself, which is the same function at a fraction of the
    work: `kernel * gate(n=...)`, its last axis being the channels.

    What the variables hold for this layer in the collection `gates` goes to the kind, such as
    the `ranks` of its channels in the order of `Dam`. Random gates are drawn where the network
    is applied with an RNG `dropout`.

    Attributes:
        kind: Of the gate.
    """

    kind: Kind = Dam()

    @nn.compact
    def __call__(
        self, x: Real[ArrayLike, "... n"] | None = None, *, n: int | None = None
    ) -> Float[Array, "..."]:
        """The features `(..., n)` times their gates; without features, the gates `(n,)`.

        Raises:
            ValueError: Neither or both of `x` and `n` are given, features are no floating-point
                numbers, the kind does not permit the number of channels, or the module has another
                name than `find` knows.
        """
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise ValueError(
                f"a gate is named {self.name!r}, by which its parameters would not be found: name "
                f"it {_NAMES}"
            )
        if (x is None) == (n is None):
            raise ValueError("expected features x, or the number of channels n for their gates")
        features = None if x is None else jnp.asarray(x)
        if features is not None and not jnp.issubdtype(features.dtype, jnp.floating):
            raise ValueError(f"features are {features.dtype}, expected floating-point numbers")
        width = cast(int, n) if features is None else features.shape[-1]
        start = self.kind.init(width)
        params = {
            name: self.param(name, lambda _, value=value: value) for name, value in start.items()
        }
        known = dict(self.variables.get(STATE, {}))
        if isinstance(self.kind, RandomKind) and self.has_rng(RNG):
            known["noise"] = self.kind.noise(self.make_rng(RNG), width)
        values = self.kind.values(params, width, **known)
        return values if features is None else features * values.astype(features.dtype)


def find(params: Params) -> dict[str, Any]:
    """The parameters of the gates of a network: of modules named `gate`, `gate1`, `Gate_0`, ...

    Layers of that name, which have a kernel or an embedding, are no gates.

    Args:
        params: Parameters, nested mappings, lists and tuples.

    Returns:
        The parameters of each gate by its path, such as `"stage1_block1/gate1"` or
        `"blocks/0/gate"`, sorted as JAX sorts a tree.

    Raises:
        ValueError: There is none, or something has the one parameter of a gate and a name like
            `"hidden_gate"`, by which no gate is known.
    """
    found: dict[str, Any] = {}

    def visit(tree, path):
        for name, value in _children(tree):
            here = (*path, name)
            if _is_gate(name, value):
                found["/".join(here)] = value
                continue
            if "gate" in name.lower() and isinstance(value, Mapping) and set(value) in _OF_GATES:
                raise ValueError(
                    f"{'/'.join(here)!r} has the parameter of a gate, {next(iter(value))!r}, but "
                    f"another name: name its module {_NAMES}"
                )
            visit(value, here)

    visit(params, ())
    if not found:
        raise ValueError(f"the parameters hold no gate: expected modules named {_NAMES}")
    return found


def _children(tree: Any) -> list[tuple[str, Any]]:
    """What a container holds, by name, sorted as JAX sorts it; nothing of what is none."""
    if isinstance(tree, Mapping):
        # JAX itself has no order of numbers and names: numbers come first.
        keys = sorted(tree, key=lambda key: (isinstance(key, str), key))
        return [(str(key), tree[key]) for key in keys]
    if isinstance(tree, list | tuple):
        names = getattr(tree, "_fields", map(str, range(len(tree))))
        return list(zip(names, tree, strict=True))
    return []


def _is_gate(name: str, value: Any) -> bool:
    if not (isinstance(value, Mapping) and value and _NAME.fullmatch(name)):
        return False
    nested = any(isinstance(each, Mapping | list | tuple) for each in value.values())
    return not nested and not _OF_LAYERS & set(value)


def parameters(kind: Kind, params: Params, network: Network) -> dict[str, Any]:
    """The parameters of the gates of a network, by path: scales of normalisation among them.

    Raises:
        ValueError: They are not those that the description has.
    """
    expected = gated_channels(network)
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    norms = _gated_norms(network)
    scales = {
        path: {leaf: flat[f"{path}/{leaf}"] for leaf in ("scale", "bias")}
        for path in expected
        if kind.place == SCALE and path in norms and f"{path}/scale" in flat
    }
    found = scales if len(scales) == len(expected) else scales | find(params)
    if set(found) != set(expected):
        raise ValueError(f"the parameters hold gates {sorted(found)}, expected {sorted(expected)}")
    return {path: found[path] for path in expected}


def _gated_norms(network: Network) -> set[str | None]:
    return {gate(node) for node in network.nodes.values() if isinstance(node, Norm)}


def values(
    kind: Kind | None, variables: Mapping[str, Any], network: Network
) -> dict[str, Float[Array, "_"]]:
    """The gates of a network, by path: what the channels of each are multiplied by, `(n,)`.

    Scales of normalisation are in the network already: they count as one, or as zero where
    scale and shift are.

    Args:
        kind: Of the gates; `None` for a network without.
        variables: Of the network: `params`, and `gates` where these know more.
        network: Its description.

    Raises:
        ValueError: The parameters hold other gates than the description.
    """
    if kind is None:
        return {}
    state: dict[str, dict[str, Any]] = {}
    for path, value in traverse_util.flatten_dict(dict(variables.get(STATE, {}))).items():
        state.setdefault("/".join(path[:-1]), {})[path[-1]] = value
    found: dict[str, Any] = {}
    sizes = gated_channels(network)
    norms = _gated_norms(network)
    for path, params in parameters(kind, variables["params"], network).items():
        if kind.place == SCALE and path in norms:
            found[path] = ((params["scale"] != 0) | (params["bias"] != 0)).astype(float)
        else:
            found[path] = kind.values(params, sizes[path], **state.get(path, {}))
    return found


def state(gates: Network | Iterable[str], **values: Any) -> dict[str, Any]:
    """Variables that tell gates what they know besides their parameters.

    Args:
        gates: Their paths, or the description of the network that has them.
        **values: By keyword of `Kind.values`, for all gates, or mappings by path.

    Returns:
        `{"gates": ...}`, a collection, to be joined with the variables of the network.
    """
    leaves = {
        (*path.split("/"), name): value[path] if isinstance(value, Mapping) else value
        for path in (gated_channels(gates) if isinstance(gates, Network) else gates)
        for name, value in values.items()
    }
    return {STATE: traverse_util.unflatten_dict(leaves)}


def masks(
    kind: Kind, params: Params, network: Network, open_: Mapping[str, Bool[ArrayLike, "_"]]
) -> Masks:
    """Masks that hold closed channels at zero whose gates are factors of their own.

    Of normalised channels that is scale and shift, as in Network Slimming.

    Args:
        kind: Of the gates, which parameters of zero close: `L1` or `Slimming`. The offset of `Dam`
            is one for all channels, and `ChipNet` and `HardConcrete` are half open at zero.
        params: Of the network.
        network: Its description.
        open_: Of each gate, which channels are open, `(n,)`.

    Returns:
        Of the structure of `params`, for `ntt_sparse.pruning.masks.apply`.

    Raises:
        ValueError: Gates are missing, or unknown, or parameters of zero do not close them.
    """
    found = parameters(kind, params, network)
    if set(found) != set(open_):
        raise ValueError(f"open channels are of {sorted(open_)}, expected {sorted(found)}")
    norms = _gated_norms(network) if kind.place == SCALE else set()
    for path in [path for path in found if path not in norms][:1]:
        if not _zeros_close(kind, found[path], gated_channels(network)[path]):
            raise ValueError(
                f"masks do not close gates of {type(kind).__name__}: expected a kind whose gates "
                "are zero where parameters are, L1 or Slimming; lower the offsets of Dam, give "
                "state(network, open=...) to ChipNet, set log_alpha of HardConcrete to -4"
            )
    masked = {
        f"{path}/{leaf}": jnp.asarray(open_[path]) for path, gate in found.items() for leaf in gate
    }
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    return traverse_util.unflatten_dict({path: masked.get(path) for path in flat}, sep="/")


def _zeros_close(kind: Kind, params: Mapping[str, Any], n: int) -> bool:
    """Whether zeros in its parameters close a gate, and each channel has its own."""
    if any(jnp.shape(leaf) != (n,) for leaf in params.values()):
        return False
    # A compiled step may ask, and has to know.
    with jax.ensure_compile_time_eval():
        return not np.any(kind.values({name: jnp.zeros(n) for name in params}, n))


def replace(params: Params, gates: Mapping[str, Any]) -> Params:
    """The parameters of a network with those of some gates, by path, in place of its own.

    Raises:
        ValueError: A path is not there, or what it holds has another structure or shape.
    """

    def put(tree, keys, value, path):
        children = dict(_children(tree))
        if keys[0] not in children:
            raise ValueError(f"the parameters hold no {path!r}: expected paths as `find` has them")
        here = children[keys[0]]
        if len(keys) > 1:
            value = put(here, keys[1:], value, path)
        elif (old := jax.tree.map(jnp.shape, here)) != (new := jax.tree.map(jnp.shape, value)):
            raise ValueError(f"{path!r} holds arrays of shapes {old}, got {new}")
        if isinstance(tree, Mapping):
            return {key: value if str(key) == keys[0] else old for key, old in tree.items()}
        parts = [value if name == keys[0] else old for name, old in children.items()]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)

    for path, value in gates.items():
        params = put(params, path.split("/"), value, path)
    return params
