"""Gates inside networks: a Linen layer, and where its parameters are in a network's."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float, Int, Real

from ntt_sparse._types import Params, Scalar
from ntt_sparse.gates.dam import Dam

# Linen's own names of modules, or those of a field.
_NAME = re.compile(r"gate(_?\d+)?", re.IGNORECASE)

ORDER = "order"
"""The collection that holds the ranks of channels, where they are not those of the index."""


@runtime_checkable
class Kind(Protocol):
    """A kind of gate, as pure functions of its parameters: `Dam`, `L1`."""

    def init(self, n: int) -> dict[str, Array]:
        """The parameters of a layer of `n` channels at the start."""
        ...

    def values(
        self, params: Mapping[str, Array], n: int, *, ranks: Int[ArrayLike, " n"] | None = None
    ) -> Float[Array, " n"]:
        """What its channels are multiplied by, `(n,)`, none below zero; zero is closed."""
        ...

    def penalty(self, layers: Sequence[Mapping[str, Array]]) -> Scalar:
        """What is minimised to close channels, of the parameters of all layers."""
        ...


class Gate(nn.Module):
    """The gates of one layer.

    Called with features, it multiplies their last axis. A convolution or dense layer that has
    no bias may as well be multiplied itself, which is the same function at a fraction of the
    work: `kernel * gate(n=...)`, its last axis being the channels.

    The order of the channels is that of their index, unless the variables hold `ranks` for
    this layer in the collection `order`.

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
                numbers, or the kind does not permit the number of channels.
        """
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
        ranks = self.get_variable(ORDER, "ranks") if self.has_variable(ORDER, "ranks") else None
        values = self.kind.values(params, width, ranks=ranks)
        return values if features is None else features * values.astype(features.dtype)


def find(params: Params) -> dict[str, Any]:
    """The parameters of the gates of a network: of modules named `gate`, `gate1`, `Gate_0`, ...

    Args:
        params: Parameters, nested mappings.

    Returns:
        The parameters of each gate by its path, such as `"stage1_block1/gate1"`, sorted as
        JAX sorts a tree.

    Raises:
        ValueError: There is none.
    """
    found: dict[str, Any] = {}

    def visit(tree, path):
        for key, value in sorted(tree.items()):
            if isinstance(value, Mapping):
                if _NAME.fullmatch(key):
                    found["/".join((*path, key))] = value
                else:
                    visit(value, (*path, key))

    visit(params, ())
    if not found:
        raise ValueError(
            "the parameters hold no gate: expected modules named gate, gate1, Gate_0 or the like"
        )
    return found


def replace(params: Params, gates: Mapping[str, Any]) -> Params:
    """The parameters of a network with those of some gates, by path, in place of its own.

    Raises:
        ValueError: A path is not there, or what it holds has another structure or shape.
    """

    def put(tree, keys, value, path):
        if not isinstance(tree, Mapping) or keys[0] not in tree:
            raise ValueError(f"the parameters hold no {path!r}: expected paths as `find` has them")
        here = tree[keys[0]]
        if len(keys) > 1:
            value = put(here, keys[1:], value, path)
        elif (old := jax.tree.map(jnp.shape, here)) != (new := jax.tree.map(jnp.shape, value)):
            raise ValueError(f"{path!r} holds arrays of shapes {old}, got {new}")
        return {**tree, keys[0]: value}

    for path, value in gates.items():
        params = put(params, path.split("/"), value, path)
    return params
