"""Random changes of training images: pure functions of a key, computed on device.

Nothing is carried from step to step, and members of one compiled program, each with
its own key, change their images independently under `vmap`.
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from ntt_sparse._types import PRNGKey

Padding: TypeAlias = Literal["reflect", "constant"]
"""What lies outside an image: its mirror image without the edge repeated, or zero."""


def pad_crop_flip(
    key: PRNGKey,
    x: Shaped[Array, "*shape"],
    *,
    pad: int = 4,
    mode: Padding = "reflect",
    flip: bool = True,
) -> Shaped[Array, "*shape"]:
    """Pads each image, crops it back at a random place and mirrors it half of the time.

    Each image is padded by `pad` pixels on all sides, cut back to its size with its
    corner at one of the `(2 * pad + 1)^2` places, all equally likely, and then mirrored
    left to right with probability 1/2. With the defaults this is the usual augmentation
    of 32 x 32 images.

    Example i draws with the key folded with i: its draw depends on nothing else, neither
    on the number of examples nor on how they are spread over devices. Inside
    `shard_map`, where each device counts its own examples from 0, fold the key with the
    index of the device first.

    Args:
        key: A typed key, another one for each step.
        x: Images `(n, h, w, c)` of any dtype.
        pad: Pixels on each side, at least 0; for `"reflect"` smaller than h and w.
        mode: `"reflect"` continues the image by its mirror image, the edge not repeated.
            `"constant"` puts zeros: black in stored pixels, but after standardisation
            the mean colour of the set.
        flip: Whether to mirror.

    Returns:
        Images of the shape and dtype of `x`.

    Raises:
        ValueError: `x` has not four dimensions, `pad` is out of range, or `mode` is unknown.

    References:
        He et al.: Deep residual learning for image recognition, CVPR 2016, section 4.2.
        The code of Liu et al.: The unreasonable effectiveness of random pruning, ICLR
        2022, pads by reflection.
    """
    _check(x.shape, pad, mode)
    offsets, mirrored = _draw(key, x.shape[0], pad)
    return _select(x, offsets, mirrored if flip else jnp.zeros_like(mirrored), pad, mode)


def _check(shape: tuple[int, ...], pad: int, mode: str) -> None:
    if len(shape) != 4:
        raise ValueError(
            f"x has shape {shape}, expected a batch of images (n, h, w, c): "
            "reshape one image to (1, h, w, c)"
        )
    if mode not in ("reflect", "constant"):
        raise ValueError(f"{mode=} is unknown: expected 'reflect' or 'constant'")
    if not isinstance(pad, int) or pad < 0:
        raise ValueError(f"{pad=}, expected a number of pixels, 0 or more: 0 for no crop")
    if mode == "reflect" and pad >= min(shape[1:3]):
        raise ValueError(
            f"{pad=} pixels cannot be reflected into images of {shape[1]} x {shape[2]}: "
            "expected fewer than the image has, or mode='constant'"
        )


def _draw(key: PRNGKey, n: int, pad: int) -> tuple[Int[Array, "{n} 2"], Bool[Array, "{n}"]]:
    """The corner (row, column) in the padded image, 0 to 2 * pad, and whether to mirror."""

    def one(index):
        place, side = jax.random.split(jax.random.fold_in(key, index))
        offset = jax.random.randint(place, (2,), 0, 2 * pad + 1, jnp.int32)
        # Of a fixed dtype: the default one would draw other sides when float64 is on.
        return offset, jax.random.bernoulli(side, jnp.float32(0.5))

    return jax.vmap(one)(jnp.arange(n))


def _select(
    x: Shaped[Array, "n h w c"],
    offsets: Int[Array, "n 2"],
    mirrored: Bool[Array, "n"],
    pad: int,
    mode: Padding,
) -> Shaped[Array, "n h w c"]:
    """The images that belong to given draws.

    One gather from the images themselves: nothing is padded, and every dtype is exact.
    On CPU slices of padded images took as long or longer, products with one-hot
    matrices and chains of selects several times as long.
    """
    height, width = x.shape[1:3]

    def one(image, offset, mirror):
        rows = offset[0] - pad + jnp.arange(height)
        columns = offset[1] - pad + jnp.arange(width)
        columns = jnp.where(mirror, columns[::-1], columns)
        taken = (_reflected(rows, height)[:, None], _reflected(columns, width))
        pixels = image.at[taken].get(mode="promise_in_bounds")
        if mode == "reflect":
            return pixels
        inside = _inside(rows, height)[:, None] & _inside(columns, width)
        return jnp.where(inside[:, :, None], pixels, jnp.zeros_like(pixels))

    return jax.vmap(one)(x, offsets, mirrored)


def _reflected(index: Int[Array, "p"], size: int) -> Int[Array, "p"]:
    """Places beyond the edges folded back to 0..size-1, clipped where once is not enough."""
    return jnp.clip(size - 1 - jnp.abs(size - 1 - jnp.abs(index)), 0, size - 1)


def _inside(index: Int[Array, "p"], size: int) -> Bool[Array, "p"]:
    return (index >= 0) & (index < size)
