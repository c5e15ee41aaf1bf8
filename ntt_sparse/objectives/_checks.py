"""Checks that objectives share."""

import math
from typing import cast

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import ArrayLike


def check_weight(name: str, value: ArrayLike) -> None:
    """Checks the weight of a term, as far as it is known while tracing.

    Raises:
        ValueError: It is not a scalar, negative, infinite or NaN.
    """
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} has shape {jnp.shape(value)}, expected a scalar")
    # The negated form also refuses NaN.
    if not isinstance(value, Tracer) and not 0.0 <= float(cast(float, value)) < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number of at least 0")
