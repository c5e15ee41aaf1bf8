"""Activations by name."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

ACTIVATIONS: Mapping[str, Callable[[Any], Any]] = {
    "none": lambda x: x,
    "relu": nn.relu,
    "leaky_relu": lambda x: nn.leaky_relu(x, 0.01),
    "elu": nn.elu,
    "tanh": jnp.tanh,
    # Sitzmann et al. 2020, https://arxiv.org/abs/2006.09661, of frequency 1.
    "sine": jnp.sin,
}


def check_activation(field: str, name: str, known: tuple[str, ...]) -> None:
    """Checks the name of an activation against those that a model takes.

    Raises:
        ValueError: It is none of them.
    """
    if name not in known:
        raise ValueError(f"{field} is {name!r}, expected one of {', '.join(known)}")
