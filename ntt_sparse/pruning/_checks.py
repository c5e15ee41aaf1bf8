"""What densities and counts must be."""

import numbers
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer


def check_density(value: Any, name: str = "density") -> float:
    """A density as a Python float; scalars of NumPy and of JAX are numbers too.

    Raises:
        ValueError: It is traced, or no fraction in (0, 1].
    """
    if isinstance(value, Tracer):
        raise ValueError(
            f"{name} is traced, expected a known number: make counts of it by masks.keep_counts "
            "outside of the transformation, and take masks.from_counts inside"
        )
    number = value.item() if getattr(value, "shape", None) == () else value
    # The negated form also refuses NaN.
    if not isinstance(number, numbers.Real) or not 0.0 < float(number) <= 1.0:
        raise ValueError(
            f"{name} is {value}, expected a fraction in (0, 1]: density is the part kept, "
            "1 keeps everything"
        )
    return float(number)


def check_count(count: Any, size: int) -> None:
    """Raises ValueError unless `count` is one integer from 0 to `size`, as far as it is known."""
    if jnp.ndim(count):
        raise ValueError(
            f"counts hold an array of shape {jnp.shape(count)}, expected one integer for all "
            "scores, or a tree of them with one for each leaf"
        )
    if not jnp.issubdtype(jnp.result_type(count), jnp.integer):
        raise ValueError(f"counts hold {count}, expected integers")
    if not isinstance(count, Tracer) and not 0 <= int(count) <= size:
        raise ValueError(f"counts ask for {count} of {size} weights, expected 0 to {size}")
