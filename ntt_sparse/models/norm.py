"""Batch normalisation as the networks here have it."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ntt_sparse.gates.layer import LAYER, NORM, SCALE, Gate, Kind

# Two passes: the one-pass variance cancels for features that are nearly constant.
STABLE = {"epsilon": 1e-5, "use_fast_variance": False}


def batch_norm(
    x: Float[Array, "... c"],
    train: bool,
    dtype: Any,
    param_dtype: Any,
    *,
    scale: float = 1.0,
    kind: Kind | None = None,
) -> Float[Array, "... c"]:
    """Normalises channels, and gates them where that is their place; for `nn.compact` methods.

    Running statistics have momentum 0.9.

    Args:
        x: Features.
        train: Whether by the statistics of the batch, or by the running ones.
        dtype: Of the computation; `None` for that of inputs and params together.
        param_dtype: Of the parameters.
        scale: Of every channel at the start.
        kind: Of the gates, named `Gate_0`, `Gate_1`, ... by Linen.
    """
    fields = batch_norm_fields(train, dtype, param_dtype)
    y = nn.BatchNorm(scale_init=nn.initializers.constant(scale), **fields)(x)
    return Gate(kind)(y) if kind is not None and kind.place == NORM else y


def norm_gate(kind: Kind | None, norm: str, index: int) -> str | None:
    """The path of the gate on the normalisation of a path that is its module's `index`-th."""
    if kind is None or kind.place == LAYER:
        return None
    return norm if kind.place == SCALE else f"{norm.rpartition('BatchNorm_')[0]}Gate_{index}"


def layer_kind(kind: Kind | None) -> Kind | None:
    """The kind of gate on layers that are normalised afterwards."""
    return kind if kind is not None and kind.place == LAYER else None


def batch_norm_fields(train: bool, dtype: Any, param_dtype: Any) -> dict[str, Any]:
    """The fields of `nn.BatchNorm`; arguments as those of `batch_norm`."""
    # Statistics are float32 at least; Flax keeps them in float64 only without this.
    double = all(jnp.dtype(kind) == "float64" for kind in (param_dtype, dtype or "float64"))
    return {
        "use_running_average": not train,
        "momentum": 0.9,
        "force_float32_reductions": not double,
        "dtype": dtype,
        "param_dtype": param_dtype,
        **STABLE,
    }
