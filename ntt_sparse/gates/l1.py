"""A gate for each channel, drawn to zero by its absolute value: the rival of DAM.

Source: Bu et al. 2021, Section 4.4 (the ablation with an L1 norm); Tibshirani 1996.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from ntt_sparse._types import Scalar
from ntt_sparse.gates._checks import check_initial, per_channel


@dataclasses.dataclass(frozen=True)
class L1:
    """Gates `max(m, 0)` of a learnable `m` per channel, see `ntt_sparse.gates.layer`.

    The penalty is the mean gate. No gradient opens a gate that is zero (decay of an `m` below
    zero may).

    Attributes:
        initial: Of each channel, positive.
    """

    initial: float = 1.0
    place = "layer"

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: The gates would start closed, for good.
        """
        check_initial(self.initial, ": a gate that is zero has no derivative and stays closed")

    def init(self, n: int) -> dict[str, Array]:
        """The parameters of one layer of `n` channels: `{"scale": (n,)}`."""
        return {"scale": jnp.full(n, self.initial, jnp.result_type(float))}

    def values(
        self, params: Mapping[str, Array], n: int, *, ranks: Int[ArrayLike, " n"] | None = None
    ) -> Float[Array, " n"]:
        """The gates of a layer of `n` channels, `(n,)`; they know of no order.

        Raises:
            ValueError: There are others than `n`.
        """
        del ranks
        return jax.nn.relu(per_channel(params, "scale", n))

    def penalty(self, layers: Sequence[Mapping[str, Array]]) -> Scalar:
        """The mean over layers of the mean gate."""
        if not layers:
            raise ValueError("there are no gates, expected one per gated layer")
        return jnp.mean(jnp.stack([jnp.mean(jax.nn.relu(layer["scale"])) for layer in layers]))
