"""Discriminative masking (DAM): one learnable offset closes the channels of a layer in turn.

Every channel of a layer has a fixed order number. The gate of a channel is exactly zero while
its order number plus the offset of the layer is not positive, so an offset that falls closes
channels one by one, those of the lowest numbers first.

Source: Bu, Daw, Maruf & Karpatne 2021, "Learning compact representations of neural networks
using discriminative masking (DAM)", https://arxiv.org/abs/2110.01684.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int, Real

from ntt_sparse._precision import at_least_single
from ntt_sparse._types import Scalar

Shape: TypeAlias = str | Callable[[Array], Array]
"""`"relu_tanh"`, `"linear"`, `"piecewise_linear"`, or a function of one array."""

# The offset at which the penalty ends, in parts of -k, by where order numbers start.
_FLOORS = {"paper": 1.02, "code": 1.0}
_SHAPES: Mapping[str, Callable[[Array], Array]] = {
    "relu_tanh": lambda z: jnp.tanh(jax.nn.relu(z)),
    "linear": jax.nn.relu,
    "piecewise_linear": lambda z: jnp.minimum(jax.nn.relu(z), 1.0),
}


def order_numbers(
    n: int,
    *,
    k: float = 5.0,
    convention: str = "paper",
    ranks: Int[ArrayLike, "..."] | None = None,
) -> Float[Array, " n"]:
    """The order numbers mu of the channels of a layer (below Eq. 2).

    Args:
        n: Channels, 2 or more.
        k: Their range, a positive number, not traced.
        convention: `"paper"`: `k j / n` for `j = 1..n`; `"code"`, of the published code:
            `k j / n` for `j = 0..n-1`, so that a channel is closed at an offset of zero.
        ranks: Place of each channel in the order, a permutation of `0..n-1`, lowest closed
            first; by default the order is that of the index. See `ntt_sparse.gates.order`.

    Returns:
        `(n,)`, float32, or float64 where JAX has it.

    Raises:
        ValueError: Too few channels, `k` or `convention` make no sense, or `ranks`, where
            they are known, are no permutation.
    """
    if not isinstance(n, int | np.integer) or n < 2:
        raise ValueError(
            f"a gate on {n} channel: there is none to close without closing the layer, "
            "expected 2 channels or more"
        )
    _check_positive("k", k)
    _check_convention(convention)
    # Made on the host: a compiled program may round the same formula otherwise, and then an
    # offset of exactly minus an order number would not close its channel.
    places = np.arange(n) + (1 if convention == "paper" else 0)
    numbers = jnp.asarray((float(k) * places / n).astype(jnp.result_type(float)))
    if ranks is None:
        return numbers
    if jnp.shape(ranks) != (n,):
        raise ValueError(f"ranks have shape {jnp.shape(ranks)}, expected ({n},): one per channel")
    if not isinstance(ranks, Tracer) and sorted(np.asarray(ranks).tolist()) != list(range(n)):
        raise ValueError(f"ranks are {ranks}, expected a permutation of 0..{n - 1}")
    return numbers[jnp.asarray(ranks)]


def gate(
    beta: Real[ArrayLike, "..."],
    n: int,
    *,
    alpha: float = 1.0,
    k: float = 5.0,
    convention: str = "paper",
    shape: Shape = "relu_tanh",
    ranks: Int[ArrayLike, "..."] | None = None,
) -> Float[Array, " n"]:
    r"""The gates of a layer (Eq. 2): $g_j = \max(\tanh(\alpha(\mu_j + \beta)), 0)$.

    Args:
        beta: The offset of the layer. Half precision is raised to float32, in which the order
            numbers of wide layers stay apart.
        n: Channels, 2 or more.
        alpha: Steepness, positive. (The published code squares its parameter.)
        k: Range of the order numbers, positive.
        convention: Where they start, see `order_numbers`.
        shape: `"relu_tanh"`; `"linear"`, `max(z, 0)`; `"piecewise_linear"`, that up to 1; or
            a function of $z = \alpha(\mu + \beta)$ which is exactly 0 for `z <= 0` and grows
            from there.
        ranks: See `order_numbers`.

    Returns:
        `(n,)` values of at least 0. Of the named shapes exactly `active(beta, n)` are not zero
        (a function of small `z` may underflow). Their derivative by `beta` is zero where they
        are zero.

    Raises:
        ValueError: An argument makes no sense, or `shape` never reaches zero.
    """
    _check_positive("alpha", alpha)
    beta = jnp.asarray(beta)
    if beta.shape:
        raise ValueError(f"beta has shape {beta.shape}, expected a scalar: one offset per layer")
    beta = at_least_single(beta)
    mu = order_numbers(n, k=k, convention=convention, ranks=ranks).astype(beta.dtype)
    return _shape(shape)(alpha * (mu + beta))


def active(
    beta: Real[ArrayLike, "..."],
    n: int,
    *,
    k: float = 5.0,
    convention: str = "paper",
) -> Int[Array, ""]:
    """How many gates of a layer are not zero (Eq. 3, which drops a minus sign).

    Counted from the gates as they are in floating point, of any steepness. In exact arithmetic
    it is `ceil(n (1 + beta / k))` in the paper's convention, between 0 and `n`. An offset that
    is NaN has none.

    Args:
        beta: The offset of the layer.
        n: Channels, 2 or more.
        k: Range of the order numbers, positive.
        convention: Where they start, see `order_numbers`.

    Raises:
        ValueError: An argument makes no sense.
    """
    gates = gate(beta, n, k=k, convention=convention, shape="linear")
    return jnp.sum(gates > 0, dtype=jnp.int32)


def penalty(betas: Any, *, k: float = 5.0, convention: str = "paper") -> Scalar:
    r"""The mean offset over layers (Eq. 4, without its $\lambda$).

    An offset below a floor, where the whole layer is closed, counts as the floor, so it is pushed
    no further. With order numbers of the code that is `-k`, as published, one channel below where
    the layer closes. With those of the paper a layer closes at `-k` itself, where decay would lift
    its offset over it again and again; so there the floor is `-1.02 k`. Layers count alike,
    whatever their widths.

    Args:
        betas: A pytree of offsets, scalars.
        k: Range of the order numbers, positive.
        convention: Where they start, see `order_numbers`.

    Returns:
        A scalar of at least the floor.

    Raises:
        ValueError: There is no offset, one is not a scalar, or another argument makes no sense.
    """
    _check_positive("k", k)
    _check_convention(convention)
    leaves = [jnp.asarray(beta) for beta in jax.tree.leaves(betas)]
    if not leaves:
        raise ValueError("there are no offsets, expected one per gated layer")
    if shapes := [leaf.shape for leaf in leaves if leaf.shape]:
        raise ValueError(f"offsets have shapes {shapes}, expected scalars: one per layer")
    beta = jnp.stack([at_least_single(leaf) for leaf in leaves])
    floor = -_FLOORS[convention] * k
    # NaN stays.
    return jnp.mean(jnp.where(beta < floor, floor, beta))


@dataclasses.dataclass(frozen=True)
class Dam:
    """DAM as a gate of a network, see `ntt_sparse.gates.layer`.

    Attributes:
        initial: The offset to start from, at which a channel must be open.
        alpha: Steepness.
        k: Range of the order numbers.
        convention: Where they start.
        shape: Of the gate.
    """

    initial: float = 1.0
    alpha: float = 1.0
    k: float = 5.0
    convention: str = "paper"
    shape: Shape = "relu_tanh"
    place = "layer"

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: One makes no sense, or every layer would start closed.
        """
        _check_positive("alpha", self.alpha)
        order_numbers(2, k=self.k, convention=self.convention)
        _shape(self.shape)
        if not math.isfinite(self.initial):
            raise ValueError(f"initial is {self.initial}, expected a finite offset")

    def order_numbers(
        self, n: int, *, ranks: Int[ArrayLike, "..."] | None = None
    ) -> Float[Array, " n"]:
        """The order numbers of a layer of `n` channels, `(n,)`."""
        return order_numbers(n, k=self.k, convention=self.convention, ranks=ranks)

    def init(self, n: int) -> dict[str, Array]:
        """The parameters of one layer of `n` channels: `{"beta": ()}`.

        Raises:
            ValueError: All channels would start closed: nothing but penalty and decay moves the
                offset of a closed layer.
        """
        with jax.ensure_compile_time_eval():
            last = float(self.order_numbers(n)[-1])
        if self.initial + last <= 0:
            raise ValueError(
                f"initial is {self.initial}, which closes all {n} channels from the start, where "
                f"no task moves it: expected more than {-last:g}"
            )
        return {"beta": jnp.asarray(self.initial, jnp.result_type(float))}

    def values(
        self, params: Mapping[str, Array], n: int, *, ranks: Int[ArrayLike, "..."] | None = None
    ) -> Float[Array, " n"]:
        """The gates of a layer of `n` channels, `(n,)`."""
        return gate(
            params["beta"], n, alpha=self.alpha, k=self.k, convention=self.convention,
            shape=self.shape, ranks=ranks,
        )  # fmt: skip

    def penalty(self, layers: Sequence[Mapping[str, Array]]) -> Scalar:
        """Of all gated layers together."""
        return penalty([layer["beta"] for layer in layers], k=self.k, convention=self.convention)


def _check_positive(name: str, value: float) -> None:
    # The negated form also refuses NaN.
    if not isinstance(value, Tracer) and not 0.0 < float(cast(float, value)) < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number above 0")


def _check_convention(convention: str) -> None:
    if convention not in _FLOORS:
        raise ValueError(f"{convention=} is unknown: expected 'paper' or 'code'")


def _shape(shape: Shape) -> Callable[[Array], Array]:
    if not callable(shape):
        if shape not in _SHAPES:
            reason = (
                "; a sigmoid is never exactly zero, so it closes no channel"
                if shape == "sigmoid"
                else ""
            )
            raise ValueError(
                f"{shape=} is unknown: expected one of {', '.join(_SHAPES)} or a function{reason}"
            )
        return _SHAPES[shape]
    with jax.ensure_compile_time_eval():
        z = np.array([-1e3, -10.0, -1.0, -0.1, -1e-3, 0.0, 1e-3, 0.1, 1.0], np.float32)
        values = np.asarray(shape(jnp.asarray(z)))
    closed, opened = values[z <= 0], values[z > 0]
    if values.shape != z.shape or np.any(closed != 0):
        raise ValueError(
            f"shape {getattr(shape, '__name__', shape)} is {np.array2string(closed, precision=3)} "
            f"at {z[z <= 0].tolist()}, expected exactly 0 there: otherwise it closes no channel"
        )
    if not (np.all(opened > 0) and np.all(np.diff(opened) >= 0)):
        raise ValueError(
            f"shape {getattr(shape, '__name__', shape)} is {np.array2string(opened, precision=3)} "
            f"at {z[z > 0].tolist()}, expected positive values that do not fall"
        )
    return shape
