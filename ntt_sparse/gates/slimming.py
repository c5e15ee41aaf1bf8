"""Network Slimming: the scales of normalised channels are the gates, drawn to zero by their size.

Training adds the sum of absolute scales to the loss. Then the channels of the smallest scales in
the whole network are cut, scale and shift, and the rest is trained on.

Source: Liu, Li, Shen, Huang, Yan & Zhang 2017, "Learning Efficient Convolutional Networks through
Network Slimming", https://arxiv.org/abs/1708.06519, and the published code of its PyTorch form.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from ntt_sparse._types import Scalar
from ntt_sparse.gates._checks import check_initial, per_channel
from ntt_sparse.gates.cut import check, protect


@dataclasses.dataclass(frozen=True)
class Slimming:
    """Scales as gates, see `ntt_sparse.gates.layer`.

    Where channels are normalised, the scale of the normalisation is the gate, and a channel is
    closed when its scale and its shift are zero. A layer without normalisation gets a factor of
    its own for each channel, which its bias is multiplied by as well.

    Attributes:
        initial: Of each factor, positive. (Scales start as the model has it.)
    """

    initial: float = 1.0
    place = "scale"

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: The factors would start at zero or below.
        """
        check_initial(self.initial)

    def init(self, n: int) -> dict[str, Array]:
        """The parameters of one layer of `n` channels without normalisation: `{"scale": (n,)}`."""
        return {"scale": jnp.full(n, self.initial, jnp.result_type(float))}

    def values(
        self, params: Mapping[str, Array], n: int, *, ranks: Int[ArrayLike, " n"] | None = None
    ) -> Float[Array, " n"]:
        """The factors of a layer of `n` channels, `(n,)`, of either sign.

        Raises:
            ValueError: There are others than `n`.
        """
        del ranks
        return per_channel(params, "scale", n)

    def penalty(self, layers: Sequence[Mapping[str, Array]]) -> Scalar:
        """The sum of absolute scales of all layers, whose derivative at zero is zero (Eq. 1)."""
        if not layers:
            raise ValueError("there are no scales, expected those of one layer or more")
        return jnp.sum(jnp.stack([jnp.sum(_absolute(layer["scale"])) for layer in layers]))


def _absolute(x: Float[Array, "_"]) -> Float[Array, "_"]:
    # Its sign is zero at zero; the derivative of `abs` is one there.
    return x * jax.lax.stop_gradient(jnp.sign(x))


def keep(
    scales: Mapping[str, Real[ArrayLike, "_"]],
    fraction: float | Real[ArrayLike, ""],
    *,
    at_least: int = 0,
) -> dict[str, Bool[Array, "_"]]:
    """Which channels stay when a fraction of all of them goes, those of the smallest scales.

    As the published code has it: the threshold is that entry of the sorted absolute scales which
    the fraction points at, and what is larger stays, so that one more than asked goes, and others
    that are equal to it. Layers may be left without any. (That code leaves the stream of residual
    networks at full width and selects from it; what is counted here is what is read.)

    Args:
        scales: Of each layer, `(n,)`, by path.
        fraction: Of channels to close, at least 0 and below 1. May be traced.
        at_least: Channels of each layer that stay in any case, those of the largest scales.

    Returns:
        Of each layer, `(n,)`.

    Raises:
        ValueError: There are no scales, one is not finite, or a number is out of range.
    """
    values = {path: jnp.abs(scale) for path, scale in check(scales).items()}
    if not isinstance(fraction, Tracer) and not 0.0 <= float(np.asarray(fraction)) < 1.0:
        raise ValueError(f"fraction is {fraction}, expected at least 0 and below 1")
    protected = protect(values, at_least)
    pooled = jnp.sort(jnp.concatenate(list(values.values())))
    threshold = pooled[_place(fraction, len(pooled))]
    return {path: value > threshold for path, value in protected.items()}


def _place(fraction: float | Real[ArrayLike, ""], total: int) -> Int[Array, ""]:
    """How many a fraction of a total is, rounded down, for decimal fractions as written.

    0.6 of 5 is 3, and 0.29 of 100 is 29, where floating point may have a little less.
    """
    return jnp.floor(jnp.round(jnp.asarray(fraction) * total, 3)).astype(jnp.int32)
