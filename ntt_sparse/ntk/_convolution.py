"""Convolutions of one image as matrix products, with derivatives made for tangent kernels.

XLA's convolutions are slow on CPU where examples have other cotangents, as they do in
the derivative of a tangent kernel, and inside loops. Here all is matrix products. Images
are `(*spatial, c)`, matrices `(p, q)` with p = offsets of the window times c; a row of
patches is what the window sees at one position. `convolve` and `spread_back` have their
derivative written by hand, and therefore none in forward mode.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ntt_sparse.ntk._varying import varying_as


class Geometry(NamedTuple):
    """Where the windows of a convolution lie."""

    image: tuple[int, ...]
    """The shape of the image, `(*spatial, c)`."""
    window: tuple[int, ...]
    positions: tuple[int, ...]
    """Of the window along each axis, which is the shape of the result."""
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    image_dilation: tuple[int, ...]
    window_dilation: tuple[int, ...]


def views(geometry: Geometry, image: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """The values under each offset of the window, `(*positions, c)`: strided slices."""
    spread = [
        (low, high, step - 1)
        for (low, high), step in zip(geometry.padding, geometry.image_dilation, strict=True)
    ]
    found = [jax.lax.pad(image, jnp.zeros((), image.dtype), [*spread, (0, 0, 0)])]
    for axis, size in enumerate(geometry.positions):
        stride, dilation = geometry.strides[axis], geometry.window_dilation[axis]
        length = (size - 1) * stride + 1
        found = [
            jax.lax.slice_in_dim(view, o * dilation, o * dilation + length, stride, axis)
            for view in found
            for o in range(geometry.window[axis])
        ]
    return found


def patches(geometry: Geometry, image: Float[Array, "..."]) -> Float[Array, "t offsets c"]:
    """What the window sees at each position."""
    stacked = jnp.stack(views(geometry, image), axis=-2)
    return stacked.reshape(math.prod(geometry.positions), *stacked.shape[-2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(
    geometry: Geometry, image: Float[Array, "..."], matrix: Float[Array, "p q"]
) -> Float[Array, "t q"]:
    """The convolution of many channels: its derivative by the image makes no patches.

    A patch of the cotangent would be as many times larger than the image as the window
    has offsets; one product for each offset, moved to its place, stays in the cache.
    """
    return _matmul(_rows(geometry, image), matrix)


def _convolve_fwd(geometry, image, matrix):
    return convolve(geometry, image, matrix), (image, matrix)


def _convolve_bwd(geometry, residuals, d_result):
    image, matrix = residuals
    d_matrix = _matmul(_rows(geometry, image).T, d_result)
    return spread_back(geometry, d_result, matrix), d_matrix


convolve.defvjp(_convolve_fwd, _convolve_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def spread_back(
    geometry: Geometry, d_result: Float[Array, "t q"], matrix: Float[Array, "p q"]
) -> Float[Array, "..."]:
    """The derivative of `convolve` by its image, applied to `d_result`."""
    image = jnp.zeros(geometry.image, d_result.dtype)
    parts: Sequence[Array] = jnp.split(matrix, math.prod(geometry.window))
    under = [_matmul(d_result, part.T).reshape(*geometry.positions, -1) for part in parts]
    # Only the shape of the image counts; and, in `shard_map`, over which axes it varies.
    image = varying_as(image, (d_result, matrix))
    _, pull = jax.vjp(functools.partial(views, geometry), image)
    (d_image,) = pull(under)
    return d_image


def _spread_back_fwd(geometry, d_result, matrix):
    return spread_back(geometry, d_result, matrix), (d_result, matrix)


def _spread_back_bwd(geometry, residuals, cotangent):
    d_result, matrix = residuals
    # One product over all positions and offsets is four times faster than one for each offset.
    rows = _rows(geometry, cotangent)
    return _matmul(rows, matrix), _matmul(rows.T, d_result)


spread_back.defvjp(_spread_back_fwd, _spread_back_bwd)


def _rows(geometry: Geometry, image: Array) -> Float[Array, "t p"]:
    rows = patches(geometry, image)
    return rows.reshape(len(rows), -1)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
