r"""ChipNet: continuous gates that become crisp while a budget is met.

Each channel has a parameter $\zeta$, which a logistic function and then a Heaviside-like one turn
into a gate between 0 and 1. Both become steeper from epoch to epoch. The loss holds the network
to a budget, and gates to the ends of their range.

Source: Tiwari, Bamba, Chavan & Gupta 2021, "ChipNet: Budget-aware pruning with Heaviside
continuous approximations", https://arxiv.org/abs/2102.07156, and its published code.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from ntt_sparse._types import Scalar
from ntt_sparse.gates._checks import per_channel
from ntt_sparse.gates.cut import check, fewest, highest

START = (1.0, 2.0)
"""Steepness of the logistic and of the Heaviside function in the first epoch."""
_LIMITS = (6.0, 256.0)
HIGHEST_THRESHOLD = 0.9
"""No gate above this is closed, whatever the budget."""


def logistic(zeta: Real[ArrayLike, "..."], beta: Real[ArrayLike, ""]) -> Float[Array, "..."]:
    r"""$\tilde\zeta = 1 / (1 + e^{-\beta\zeta})$."""
    return jax.nn.sigmoid(jnp.asarray(beta) * jnp.asarray(zeta))


def heaviside(soft: Real[ArrayLike, "..."], gamma: Real[ArrayLike, ""]) -> Float[Array, "..."]:
    r"""$z = 1 - e^{-\gamma\tilde\zeta} + \tilde\zeta e^{-\gamma}$, from 0 to 1."""
    soft, gamma = jnp.asarray(soft), jnp.asarray(gamma)
    return -jnp.expm1(-gamma * soft) + soft * jnp.exp(-gamma)


def continuation(
    epoch: Int[ArrayLike, ""], *, beta_every: float = 5.0, gamma_every: float = 2.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Both steepnesses in an epoch, counted from 0: plus 0.1 in 5 epochs, twice in 2.

    Args:
        epoch: May be traced.
        beta_every: Epochs in which that of the logistic function grows by 0.1, up to 6.
        gamma_every: Epochs in which that of the Heaviside function doubles, up to 256.

    Raises:
        ValueError: They are not above 0.
    """
    # The negated form also refuses NaN.
    if not (beta_every > 0 and gamma_every > 0):
        raise ValueError(f"{beta_every=} and {gamma_every=}, expected numbers of epochs above 0")
    passed = jnp.asarray(epoch, jnp.result_type(float))
    beta = jnp.minimum(START[0] + 0.1 * passed / beta_every, _LIMITS[0])
    gamma = jnp.minimum(START[1] * 2.0 ** (passed / gamma_every), _LIMITS[1])
    return beta, gamma


@dataclasses.dataclass(frozen=True)
class ChipNet:
    """ChipNet as a gate of a network, see `ntt_sparse.gates.layer`.

    Gates are after normalisation. Variables of the collection `gates` say how steep they are,
    `beta` and `gamma`; or, once the network is cut, which are `open`: these are one then, and
    the others zero.

    Attributes:
        initial: Of each parameter. (The published code draws them from 0 to 0.01.)
    """

    initial: float = 0.005
    place = "norm"

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: The parameters would start from no finite number.
        """
        if not math.isfinite(self.initial):
            raise ValueError(f"initial is {self.initial}, expected a finite number")

    def init(self, n: int) -> dict[str, Array]:
        """The parameters of one layer of `n` channels: `{"zeta": (n,)}`."""
        return {"zeta": jnp.full(n, self.initial, jnp.result_type(float))}

    def values(
        self,
        params: Mapping[str, Array],
        n: int,
        *,
        ranks: Int[ArrayLike, " n"] | None = None,
        beta: Real[ArrayLike, ""] = START[0],
        gamma: Real[ArrayLike, ""] = START[1],
        open: Bool[ArrayLike, " n"] | None = None,
    ) -> Float[Array, " n"]:
        """The gates of a layer of `n` channels, `(n,)`; they know of no order.

        Raises:
            ValueError: There are others than `n`.
        """
        del ranks
        zeta = per_channel(params, "zeta", n)
        if open is not None:
            return per_channel({"open": jnp.asarray(open)}, "open", n).astype(zeta.dtype)
        return heaviside(logistic(zeta, beta), gamma)

    def penalty(
        self,
        layers: Sequence[Mapping[str, Array]],
        *,
        beta: Real[ArrayLike, ""] = START[0],
        gamma: Real[ArrayLike, ""] = START[1],
    ) -> Scalar:
        r"""The crispness loss: the mean of $(z - \tilde\zeta)^2$ over all channels."""
        if not layers:
            raise ValueError("there are no gates, expected one per gated layer")
        soft = logistic(jnp.concatenate([layer["zeta"] for layer in layers]), beta)
        return jnp.mean((heaviside(soft, gamma) - soft) ** 2)


def soft_open(
    gates: Mapping[str, Real[ArrayLike, "_"]], steepness: Real[ArrayLike, ""]
) -> dict[str, Float[Array, "_"]]:
    """Gates driven to 0 or 1 about one half, as a budget counts them.

    Args:
        gates: Of each layer, `(n,)`, by path.
        steepness: Of the logistic function: 10 in the first epoch, and 5 more in each.
    """
    return {
        path: jax.nn.sigmoid(jnp.asarray(steepness) * (jnp.asarray(value) - 0.5))
        for path, value in gates.items()
    }


def budget_steepness(epochs: Real[ArrayLike, ""]) -> Float[Array, ""]:
    """The steepness of `soft_open` after so many epochs, a fraction included, up to 60."""
    return jnp.minimum(10.0 + 5.0 * jnp.asarray(epochs, jnp.result_type(float)), 60.0)


def budget_loss(
    gates: Mapping[str, Real[ArrayLike, "_"]],
    cost: Callable[[dict[str, Any]], Any],
    target: Real[ArrayLike, ""],
    steepness: Real[ArrayLike, ""],
) -> Scalar:
    r"""How far a network is from its budget, $(V - V_0)^2$.

    Args:
        gates: Of each layer, `(n,)`, by path.
        cost: What a network costs of which so much of each channel is open, relative to the
            whole, a differentiable function of `{path: (n,)}`, such as `channel_fraction`.
        target: The fraction to meet, above 0 and at most 1; may be traced.
        steepness: See `soft_open`.

    Raises:
        ValueError: The target is out of range.
    """
    _check_target(target)
    return (cost(soft_open(gates, steepness)) - target) ** 2


def _check_target(target: Real[ArrayLike, ""]) -> None:
    # The negated form also refuses NaN.
    if not isinstance(target, Tracer) and not 0.0 < float(np.asarray(target)) <= 1.0:
        raise ValueError(f"target is {target}, expected a fraction above 0, at most 1")


def channel_fraction(gates: Mapping[str, Real[ArrayLike, "_"]]) -> Float[Array, ""]:
    """The fraction of channels that is open, of gates between 0 and 1."""
    values = [jnp.asarray(value) for value in gates.values()]
    if not values:
        raise ValueError("there are no gates, expected one per gated layer")
    return jnp.sum(jnp.concatenate(values)) / sum(value.size for value in values)


def cut(
    gates: Mapping[str, Real[ArrayLike, "_"]],
    target: float | Real[ArrayLike, ""],
    cost: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Bool[Array, "_"]]:
    """Which channels stay: the highest gates, no more than it takes to have a fraction left.

    The published code lowers a threshold in steps of 1e-4 until the budget is there, from at most
    0.9; here it falls from gate to gate. So gates above 0.9 stay, whatever the budget.

    Args:
        gates: Of each layer, `(n,)`, by path.
        target: The fraction that is to be left, between 0 and 1; may be traced.
        cost: What fraction is left where these channels are open, `{path: (n,)}` of zeros and
            ones; it must not fall when one is opened. By default `channel_fraction`.

    Returns:
        Of each layer, `(n,)`.

    Raises:
        ValueError: There are no gates, one is not finite, or the target is out of range.
    """
    values = check(gates)
    _check_target(target)
    cost = cost or channel_fraction

    def enough(open_: Any) -> Any:
        crisp = {path: mask.astype(values[path].dtype) for path, mask in open_.items()}
        # Decimal fractions in single precision.
        return cost(crisp) >= jnp.asarray(target) - 1e-6

    least = [jnp.sum(value > HIGHEST_THRESHOLD, dtype=jnp.int32) for value in values.values()]
    return highest(values, fewest(values, enough, jnp.sum(jnp.stack(least))))
