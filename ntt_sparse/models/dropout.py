"""Dropout that stays the same when neurons are taken out of a network."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

COLLECTION = "dropout"
"""The collection of what `Dropout` can be given, and the name of its random key."""

# Draws are of 16 bits, half the cost of 32.
_LEVELS = 2**16


class Dropout(nn.Module):
    """Inverted dropout, as `flax.linen.Dropout`, with a rate that may be traced.

    With the variable `units` in the collection `"dropout"`, integers `(p,)` that name the
    channels, what is drawn for a channel depends on its name alone: the channels of a network
    that was made smaller are dropped as they were in the large one. The variable `rate` there
    takes the place of the field.

    Attributes:
        rate: Probability to be dropped, in [0, 1).
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "n *s p"], *, deterministic: bool) -> Float[Array, "n *s p"]:
        """The channels that are not dropped, divided by the probability to stay.

        Args:
            x: Features.
            deterministic: Whether all stay.

        Raises:
            ValueError: The field is out of range, or there is not one name for each channel.
        """
        # The negated form also refuses NaN.
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate is {self.rate}, expected a probability in [0, 1)")
        if deterministic:
            return x
        rate = self.get_variable(COLLECTION, "rate", self.rate)
        units = self.get_variable(COLLECTION, "units", None)
        if isinstance(rate, float | int) and rate == 0:
            return x
        key = self.make_rng(COLLECTION)
        if units is None:
            stay = jax.random.bernoulli(key, 1 - rate, x.shape)
        else:
            if jnp.shape(units) != x.shape[-1:]:
                raise ValueError(f"units have shape {jnp.shape(units)}, expected {x.shape[-1:]}")
            # 0 to 65536, which does not fit 16 bits.
            threshold = jnp.round((1 - jnp.asarray(rate)) * _LEVELS).astype(jnp.uint32)

            def drawn(unit):
                return jax.random.bits(jax.random.fold_in(key, unit), x.shape[:-1], jnp.uint16)

            stay = jnp.moveaxis(jax.vmap(drawn)(units), 0, -1) < threshold
        return jnp.where(stay, x / jnp.asarray(1 - rate, x.dtype), 0)
