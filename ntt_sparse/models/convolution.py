"""Convolutions of images: which way each is computed.

All models convolve here. Most convolutions are XLA's. Two kinds are written otherwise, where that
was measured to be faster (`benchmarks/convolutions.py`):

- Of one pixel, as one product of two matrices. XLA is as fast forward, but makes the derivative
  by the kernel of more than two axes from transposed copies of the features, together with
  whatever makes them, many times slower than the product itself.
- Of few terms, on CPU and where no derivative is expected, as the sum of these terms. In training
  steps that is no faster than XLA's, nor are patches side by side for one product (im2col).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Up to which a convolution is written out as a sum on CPU.
_MOST_TERMS, _MOST_FEATURES = 64, 16


def convolve(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw c features"],
    stride: int,
    padding: str | tuple[int, int],
    *,
    values_only: bool = False,
) -> Float[Array, "n h2 w2 features"]:
    """A convolution of images.

    Args:
        x: Images.
        kernel: Square.
        stride: Of its positions.
        padding: "VALID", "SAME", or rows and columns of zeros before and after.
        values_only: Whether the fastest way to values is taken, whose derivatives are right but
            not the fastest.
    """
    size, _, channels, features = kernel.shape
    if size == 1 and padding in ("VALID", "SAME", (0, 0)):
        return _of_one_pixel(x, kernel, stride)
    # Half precision is rounded once by XLA's convolutions, but at each term of a sum.
    whole = min(x.dtype.itemsize, kernel.dtype.itemsize) >= 4
    few = size > 1 and size**2 * channels <= _MOST_TERMS and features <= _MOST_FEATURES
    if values_only and few and whole:
        return _of_few_terms(x, kernel, stride, _around(padding, size, stride, x.shape[1:3]))
    return _native(x, kernel, stride, padding)


def _of_one_pixel(x: Any, kernel: Any, stride: int) -> Any:
    x = x[:, ::stride, ::stride]
    y = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
    return y.reshape(*x.shape[:-1], -1)


# Compiled by itself where the rest is not, and then once for each shape.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _of_few_terms(x: Any, kernel: Any, stride: int, around: Any) -> Any:
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _by_terms(x, kernel, stride, around),
        default=lambda x, kernel: _native(x, kernel, stride, around),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _by_terms(x: Any, kernel: Any, stride: int, around: Any) -> Any:
    """A convolution written out as the sum of its terms, its derivatives XLA's.

    XLA makes one loop of the terms. On a CPU that is 1.5 to 7 times as fast as its convolution
    where there are few, as in layers that are pruned to a few channels
    (`benchmarks/compaction.py`).
    """
    size = kernel.shape[0]
    # Each in one piece: what comes before and after is else done anew for every term.
    x = jax.lax.optimization_barrier(jnp.pad(x, [(0, 0), *around, (0, 0)]))
    height, width = (length - size + 1 for length in x.shape[1:3])
    terms = [
        x[:, row : row + height : stride, column : column + width : stride, channel, None]
        * kernel[row, column, channel]
        for channel in range(x.shape[-1])
        for row in range(size)
        for column in range(size)
    ]
    return jax.lax.optimization_barrier(functools.reduce(jnp.add, terms))


@_by_terms.defjvp
def _by_terms_jvp(stride: int, around: Any, primals: Any, tangents: Any) -> Any:
    (x, kernel), (d_x, d_kernel) = primals, tangents
    moved = _native(d_x, kernel, stride, around) + _native(x, d_kernel, stride, around)
    return _by_terms(x, kernel, stride, around), moved


def _around(padding: Any, size: int, stride: int, lengths: Sequence[int]) -> Any:
    """Zeros before and after rows and columns."""
    if isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(lengths, (size, size), (stride, stride), padding)
        return tuple((int(before), int(after)) for before, after in pads)
    return (tuple(padding),) * 2


def _native(x: Any, kernel: Any, stride: int, padding: Any) -> Any:
    if not isinstance(padding, str) and not isinstance(padding[0], tuple):
        padding = (padding, padding)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
