r"""Gram matrices of features, centred and scaled to unit length.

Centred kernel alignment is the cosine of two centred Gram matrices. Everything in this
room, and the sums over pairs that are minimised, is therefore made of one thing: for each
layer the vector $v = \tilde K / \|\tilde K\|_F$, or zero where features are constant.
"""

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from ntt_sparse._precision import at_least_single
from ntt_sparse._types import Scalar

Features: TypeAlias = Inexact[Array, "_ ..."]
"""Features of some examples, `(n, ...)`."""

# Features whose spread is below so many roundings of their size are constant.
ROUNDINGS = 16

# Where less of the squared features than this is about their mean, they are centred first.
_LEAST_SPREAD = 1 / 32


def check_collection(features: Any, name: str) -> None:
    """Checks that features of several layers are a sequence of arrays.

    Raises:
        ValueError: They are one array, whose rows would be taken for layers, or a mapping.
    """
    if isinstance(features, Mapping):
        raise ValueError(f"{name} is a mapping, expected a sequence: pass list(its.values())")
    if hasattr(features, "shape"):
        raise ValueError(
            f"{name} is an array of shape {features.shape}, expected a sequence of arrays, one "
            "for each layer"
        )


def whole_number(value: Any, least: int, message: str) -> int:
    """A whole number, of NumPy as well as of Python.

    Raises:
        ValueError: It is none, or below `least`; with the message.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(message) from None
    if number < least:
        raise ValueError(message)
    return number


def flat(x: Features, name: str = "features") -> Float[Array, "_ _"]:
    """Features with one row per example, in float32 at least.

    Raises:
        ValueError: There is no axis of examples, there are none, or no features.
    """
    if x.ndim == 0 or x.size == 0:
        raise ValueError(
            f"{name} is of shape {x.shape}, expected (n, ...): at least one example with features"
        )
    return at_least_single(x.reshape(len(x), -1))


def matmul(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """A matrix product in full precision, on every platform."""
    return jnp.matmul(a, b, precision="highest")


def centre(k: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """`H k H`, without a product: row and column means are taken off."""
    k = k - jnp.mean(k, axis=-2, keepdims=True)
    return k - jnp.mean(k, axis=-1, keepdims=True)


class CentredGram(NamedTuple):
    """The inner products of examples about their mean."""

    matrix: Float[Array, "n n"]
    """`H x x^T H`"""
    size: Scalar
    """The sum of all squared features, not centred; it has no derivative."""

    def is_constant(self) -> Bool[Array, ""]:
        """Whether all examples have the same features, up to rounding.

        Features so large that their squares overflow (1e16 and more in float32) are not: what
        is made of them is NaN, and shows.
        """
        eps = jnp.finfo(self.matrix.dtype).eps
        constant = jnp.trace(self.matrix) <= (ROUNDINGS * eps) ** 2 * self.size
        return constant & jnp.isfinite(self.size)


@jax.custom_batching.custom_vmap
def _centred_products(x: Float[Array, "*batch n p"]) -> tuple[Array, Array]:
    """`H x x^T H`, and the trace of `x x^T`."""
    products = matmul(x, jnp.swapaxes(x, -1, -2))
    size = jnp.trace(products, axis1=-2, axis2=-1)
    centred = centre(products)

    def centre_first():
        around_mean = x - jnp.mean(x, axis=-2, keepdims=True)
        around_mean = matmul(around_mean, jnp.swapaxes(around_mean, -1, -2))
        return jnp.where(mean_dominates[..., None, None], around_mean, centred)

    # Centring the product is one pass over the features less, but where the mean dominates it
    # cancels their digits.
    mean_dominates = jnp.trace(centred, axis1=-2, axis2=-1) < _LEAST_SPREAD * size
    return jax.lax.cond(jnp.any(mean_dominates), centre_first, lambda: centred), size


@_centred_products.def_vmap
def _(axis_size: int, batched: list[bool], x: Array) -> tuple[Any, Any]:
    # One condition for all members of a batch: of one for each, both branches would be run.
    del axis_size, batched
    return _centred_products(x), (True, True)


@jax.custom_jvp
def centred_gram(x: Float[Array, "n p"]) -> CentredGram:
    """`H x x^T H`, the inner products of examples about their mean.

    The derivative has a rule because the automatic one takes two products of the size of the
    features, and this one takes one.
    """
    return CentredGram(*_centred_products(x))


@centred_gram.defjvp
def _centred_gram_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    half = centre(matmul(dx, x.T))
    result = centred_gram(x)
    return result, CentredGram(half + half.T, jnp.zeros_like(result.size))


@jax.custom_jvp
def gram(x: Float[Array, "n p"]) -> Float[Array, "n n"]:
    """`x x^T`, with the same derivative rule."""
    return matmul(x, x.T)


@gram.defjvp
def _gram_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    half = matmul(dx, x.T)
    return gram(x), half + half.T


def u_centre(centred: Float[Array, "n n"]) -> Float[Array, "n n"]:
    r"""The U-centred matrix of a centred one: its inner products give unbiased HSIC.

    $\langle\tilde K, \tilde L\rangle = n (n - 3)\, \mathrm{HSIC}_1$ (Song et al. 2012,
    "Feature selection via dependence maximization", Eq. 5; Székely and Rizzo 2014,
    "Partial distance correlation with methods for dissimilarities", Eq. 2.6).
    """
    n = len(centred)
    diagonal = jnp.diagonal(centred)
    # Off the diagonal, the rows of a centred matrix sum to minus the diagonal.
    rows = diagonal / (n - 2)
    total = jnp.sum(diagonal) / ((n - 1) * (n - 2))
    return jnp.where(jnp.eye(n, dtype=bool), 0.0, centred + rows + rows[:, None] - total)


def unit(k: Float[Array, "n n"], zero: Bool[Array, ""]) -> Float[Array, "n n"]:
    """`k` divided by its norm; zeros, with a zero gradient, where told or where it vanishes.

    It is divided by its largest entry first, so that its square neither over- nor underflows.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(k)))
    zero = zero | (largest == 0)
    scaled = k / jnp.where(zero, 1.0, largest)
    norm = jnp.sum(jnp.where(zero, 1.0, scaled) ** 2)
    return jnp.where(zero, 0.0, scaled * jax.lax.rsqrt(norm))


def unit_gram(x: Float[Array, "n p"], *, debiased: bool = False) -> Float[Array, "n n"]:
    """The unit vector of a layer: its centred (or U-centred) Gram matrix over its norm."""
    centred = centred_gram(x)
    zero = centred.is_constant()
    if not debiased:
        return unit(centred.matrix, zero)
    result = u_centre(centred.matrix)
    # Orthogonal examples of one length leave nothing but rounding.
    rounding = ROUNDINGS * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(centred.matrix))
    return unit(result, zero | (jnp.max(jnp.abs(result)) <= rounding))


def check_debiased(n: int) -> None:
    """Checks that there are enough examples for the debiased estimate.

    Raises:
        ValueError: There are fewer than four.
    """
    if n < 4:
        raise ValueError(
            f"the debiased estimate needs four examples or more, there are {n}: use debiased=False"
        )


def gather_examples(x: Array, axis_name: str | None, samples: int | None = None) -> Array:
    """The first examples of the batch that is split over an axis; all by default.

    Raises:
        ValueError: There is no axis of examples, or there are fewer than `samples`.
    """
    if x.ndim == 0:
        raise ValueError("features are a number, expected (n, ...): one entry per example")
    if axis_name is not None:
        # The first of all are among the first of each device.
        x = jax.lax.all_gather(x[:samples], axis_name, tiled=True)
    if samples is not None and samples > len(x):
        raise ValueError(f"{samples=} of each batch are asked for, the batch has {len(x)}")
    return x[:samples]


def averaged(value: Scalar | Float[Array, "..."], axis_name: str | None) -> Array:
    """The mean over an axis of what is the same on all its devices.

    It tells `shard_map` that the value is the same, and makes gradients come out as those of
    a mean over devices.
    """
    return value if axis_name is None else jax.lax.pmean(value, axis_name)
