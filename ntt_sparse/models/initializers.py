"""Initialisers that several networks share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""N(0, 2 / fan out), of convolutions of the networks for CIFAR that are pruned by channels."""

torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1, 1) / sqrt(fan in), as PyTorch starts kernels; its biases are `torch_bias_init`."""


def torch_bias_init(fan_in: int) -> Callable[..., Array]:
    """An initialiser of biases, U(-1, 1) / sqrt(fan in), as PyTorch starts them."""
    limit = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init
