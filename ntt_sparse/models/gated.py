"""Convolutions and dense layers whose channels a gate can close.

The gate multiplies the weights that make a channel, not the channel itself: the same function,
without work of the size of the features. Without a kind of gate they are the layers of Linen,
with the same names and shapes of parameters.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from ntt_sparse.gates.layer import Gate, Kind
from ntt_sparse.models.convolution import convolve


class Conv(nn.Module):
    """A convolution of images, its outputs gated.

    The params are `kernel`, `(height, width, channels, features)`, `bias` and `gate`.

    Attributes:
        features: Channels of the output.
        size: Height and width of the kernel.
        stride: Of its positions.
        padding: "VALID", "SAME", or pixels on each side.
        use_bias: Whether there is a bias, which is gated likewise.
        kind: Of the gate; `None` for none.
        kernel_init: Initialiser of the kernel.
        bias_init: Initialiser of the bias.
        dtype: Of the computation; by default that of inputs and params together.
        param_dtype: Of the parameters but the gate.
    """

    features: int
    size: int
    stride: int = 1
    padding: str | int = "VALID"
    use_bias: bool = True
    kind: Kind | None = None
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 features"]:
        """The gated outputs."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        x, kernel, bias = _gated(self, x, shape)
        padding = self.padding
        if not isinstance(padding, str):
            padding = (padding, padding)
        return add_bias(convolve(x, kernel, self.stride, padding), bias)


class Dense(nn.Module):
    """A dense layer, its outputs gated.

    The params are `kernel`, `(inputs, features)`, `bias` and `gate`.

    Attributes:
        features: Outputs.
        use_bias: Whether there is a bias, which is gated likewise.
        kind: Of the gate; `None` for none.
        kernel_init: Initialiser of the kernel.
        bias_init: Initialiser of the bias.
        dtype: Of the computation; by default that of inputs and params together.
        param_dtype: Of the parameters but the gate.
    """

    features: int
    use_bias: bool = True
    kind: Kind | None = None
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n features"]:
        """The gated outputs."""
        x, kernel, bias = _gated(self, x, (x.shape[-1], self.features))
        return add_bias(x @ kernel, bias)


def add_bias(y: Float[Array, "..."], bias: Float[Array, " features"] | None) -> Float[Array, "..."]:
    """Features plus a bias on their last axis, if there is one."""
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def _gated(layer: Conv | Dense, x: Any, shape: tuple[int, ...]) -> Any:
    """Inputs, kernel and bias in the dtype of the computation, the last two gated."""
    kernel = layer.param("kernel", layer.kernel_init, shape, layer.param_dtype)
    bias = None
    if layer.use_bias:
        bias = layer.param("bias", layer.bias_init, (layer.features,), layer.param_dtype)
    if layer.kind is not None:
        gates = Gate(layer.kind, name="gate")(n=layer.features)
        kernel = kernel * gates.astype(kernel.dtype)
        bias = None if bias is None else bias * gates.astype(bias.dtype)
    return promote_dtype(x, kernel, bias, dtype=layer.dtype)
