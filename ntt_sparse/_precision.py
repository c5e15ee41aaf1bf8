"""Half precision where it is not enough."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Shaped


def at_least_single(x: Shaped[ArrayLike, "..."]) -> Shaped[Array, "..."]:
    """The array in float32, or as it is where that is wider.

    For sums and comparisons: in half precision small squares are zero, large ones infinite, and a
    sum of many stops growing.
    """
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
