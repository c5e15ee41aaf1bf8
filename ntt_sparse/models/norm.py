"""Batch normalisation as the networks here have it."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

# Two passes: the one-pass variance cancels for features that are nearly constant.
STABLE = {"epsilon": 1e-5, "use_fast_variance": False}

NORM_PARAMETERS = 2
"""Parameters of a normalised channel: scale and shift."""


def batch_norm(
    x: Float[Array, "... c"],
    train: bool,
    dtype: Any,
    param_dtype: Any,
    *,
    scale: float = 1.0,
) -> Float[Array, "... c"]:
    """Normalises channels; for use in `nn.compact` methods.

    Running statistics have momentum 0.9.

    Args:
        x: Features.
        train: Whether by the statistics of the batch, or by the running ones.
        dtype: Of the computation; `None` for that of inputs and params together.
        param_dtype: Of the parameters.
        scale: Of every channel at the start.
    """
    # Statistics are float32 at least; Flax keeps them in float64 only without this.
    double = all(jnp.dtype(kind) == "float64" for kind in (param_dtype, dtype or "float64"))
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        force_float32_reductions=not double,
        scale_init=nn.initializers.constant(scale),
        dtype=dtype,
        param_dtype=param_dtype,
        **STABLE,
    )(x)
