"""Gradient transformations that Optax lacks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ntt_sparse._precision import at_least_single
from ntt_sparse._types import PRNGKey


class GradientNoiseState(NamedTuple):
    """The key of the noise, and the number of updates."""

    key: PRNGKey
    step: jax.Array


def gradient_noise(fraction: float, key: PRNGKey | None) -> optax.GradientTransformation:
    """Adds normal noise to each gradient, in proportion to its size.

    Each leaf gets noise whose standard deviation is `fraction` of the root mean square of its
    gradient. (`optax.add_noise` adds noise of a size given beforehand.)

    Args:
        fraction: 0 or more.
        key: Of the noise, part of the state; `None` where only `update` is needed.

    Returns:
        A transformation. Its `init` raises ValueError where there is no key.

    Raises:
        ValueError: `fraction` is negative or not finite.
    """
    if not 0.0 <= fraction < float("inf"):
        raise ValueError(f"gradient noise of {fraction} of a gradient, expected 0 or more")

    def init(params: Any) -> GradientNoiseState:
        del params
        if key is None:
            raise ValueError("gradient noise needs a key to start from")
        return GradientNoiseState(key, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None):
        del params
        leaves, structure = jax.tree.flatten(updates)
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), max(len(leaves), 1))
        noisy = [
            leaf + _noise(fraction, leaf, each)
            for leaf, each in zip(leaves, keys[: len(leaves)], strict=True)
        ]
        step = jnp.asarray(optax.safe_increment(state.step))
        return jax.tree.unflatten(structure, noisy), GradientNoiseState(state.key, step)

    return optax.GradientTransformation(init, update)


def _noise(fraction: float, leaf: Any, key: PRNGKey) -> Any:
    # Squares of small gradients are zero in float16.
    size = fraction * jnp.sqrt(jnp.mean(at_least_single(leaf) ** 2))
    return (size * jax.random.normal(key, leaf.shape, leaf.dtype)).astype(leaf.dtype)
