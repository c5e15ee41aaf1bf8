"""The curve of one layer, see `ntt_sparse.pruning.neurons`: in double precision, compiled."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Relative to the terms of a score.
_ROUNDING = 1e-13
# What is left of a layer, of one, below which it counts as nothing.
_LEAST = 1e-11
# A column whose spread is below so many roundings of its size is constant.
_CONSTANT = 16 * float(np.finfo(np.float64).eps)
# Up to 2 GiB of products of neurons are kept; beyond, a row is computed when it is needed.
_MOST_PRODUCTS = 2**28


class PruneCurve(NamedTuple):
    """Neurons in the order of their removal, and what is left after each.

    Attributes:
        order: Indices of neurons, the first to go first; -1 where there was none to remove.
        similarity: CKA of the whole layer with what is left after that removal, in [0, 1].
    """

    order: Int[Array, " count"]
    similarity: Float[Array, " count"]


class _Shares(NamedTuple):
    """What neurons have of the sums that CKA is made of, each sum scaled to one.

    Attributes:
        cross: `(p,)` of the product with the reference.
        total: `(p,)` of the layer's own square, with all other neurons.
        own: `(p,)` with themselves.
        row: `index -> (p,)`, of one neuron with each.
        start: The square of CKA with nothing removed.
    """

    cross: Any
    total: Any
    own: Any
    row: Callable[[Any], Any]
    start: Any


@partial(jax.jit, static_argnames=("count", "mode"))
def curve(x: Any, target: Any, left: Any, given: Any, count: int, mode: str) -> PruneCurve:
    """Removes neurons in turn; to be called where JAX is set to double precision.

    Args:
        x: Activations `(n, ..., p)`.
        target: What they have to stay like, `(n, ...)`, or `None`.
        left: `(p,)` bool, neurons that are there.
        given: `(count,)` indices, of the mode `"given"`.
        count: How many go.
        mode: `"greedy"`, `"oneshot"` or `"given"`.
    """
    shares = _shares(_centred(x) * left, None if target is None else _centred(target))
    zero = jnp.zeros((), jnp.float64)
    none = jnp.zeros(x.shape[-1], jnp.float64)
    first = _scores(shares, zero, zero, zero, none)

    def remove(index, carry):
        left, cross, total, square, row, order, similarity = carry
        if mode == "given":
            chosen = given[index]
        else:
            now = first if mode == "oneshot" else _scores(shares, cross, total, square, row)
            chosen = _lowest(*now, left)
        square = square + 2 * row[chosen] + shares.own[chosen]
        cross, total = cross + shares.cross[chosen], total + shares.total[chosen]
        rest = 1 - 2 * total + square
        # With the last neuron goes everything, and what rounding leaves of it.
        some = jnp.any(left.at[chosen].set(False)) & (rest > _LEAST)
        value = jnp.sqrt(shares.start / jnp.where(some, rest, 1)) * jnp.abs(1 - cross)
        similarity = similarity.at[index].set(jnp.where(some, jnp.minimum(value, 1), 0))
        order = order.at[index].set(jnp.where(jnp.any(left), chosen, -1))
        left = left.at[chosen].set(False)
        return left, cross, total, square, row + shares.row(chosen), order, similarity

    # A loop of no steps is traced all the same.
    if not count:
        return PruneCurve(jnp.zeros(0, jnp.int32), none[:0])
    carry = (
        left, zero, zero, zero, none,
        jnp.zeros(count, jnp.int32), jnp.zeros(count, jnp.float64),
    )  # fmt: skip
    *_, order, similarity = jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), remove, carry)
    return PruneCurve(order, similarity)


def _centred(x: Any) -> Any:
    """Features in double precision, of size one, about their mean; constant ones are zero."""
    x = x.astype(jnp.float64)
    largest = jnp.max(jnp.abs(x))
    x = x / jnp.where(largest > 0, largest, 1)
    mean = jnp.mean(x, axis=0)
    spread = jnp.sum((x - mean) ** 2, axis=0)
    constant = spread <= _CONSTANT**2 * (spread + len(x) * mean**2)
    return jnp.where(constant, 0, x - mean)


def _shares(x: Any, target: Any) -> _Shares:
    """The shares of all neurons of centred features `(n, ..., p)`."""
    n, p = x.shape[0], x.shape[-1]
    x = x.reshape(n, -1, p)
    flat = x[:, 0]
    if x.shape[1] > 1:
        products = _products_of_maps(x)
        row, own, total = products.__getitem__, jnp.diagonal(products), jnp.sum(products, 1)
    elif p * p <= _MOST_PRODUCTS:
        covariance = flat.T @ flat
        own, total = jnp.diagonal(covariance) ** 2, jnp.einsum("ij,ij->i", covariance, covariance)

        def row(index):
            return covariance[index] ** 2
    else:
        own, total = jnp.sum(flat**2, axis=0) ** 2, _with_gram(x, flat @ flat.T)

        def row(index):
            return (flat[:, index] @ flat) ** 2

    whole = jnp.sum(total)
    whole = jnp.where(whole > 0, whole, 1)
    if target is None:
        cross, start = total / whole, jnp.where(jnp.sum(total) > 0, 1.0, 0.0)
    else:
        target = target.reshape(n, -1)
        gram = target @ target.T
        cross, square = _with_gram(x, gram), jnp.sum(gram**2)
        product = jnp.sum(cross)
        start = product**2 / (whole * jnp.where(square > 0, square, 1))
        cross = cross / jnp.where(product > 0, product, 1)
    return _Shares(cross, total / whole, own / whole, lambda index: row(index) / whole, start)


def _with_gram(x: Any, gram: Any) -> Any:
    """For each neuron of `(n, s, p)` the product of its Gram matrix with this one."""
    return jnp.einsum("isp,isp->p", x, jnp.tensordot(gram, x, 1))


def _products_of_maps(x: Any) -> Any:
    """Products `(p, p)` of the Gram matrices of the channels of `(n, s, p)`, row after row."""

    def add(total, features):
        row = jnp.einsum("sp,nsp->np", features, x)
        return total + row.T @ row, None

    p = x.shape[-1]
    return jax.lax.scan(add, jnp.zeros((p, p), x.dtype), x)[0]


def _scores(shares: _Shares, cross: Any, total: Any, square: Any, row: Any) -> tuple[Any, Any]:
    """What 1 - CKA^2, relative to nothing removed, becomes with each neuron; and its rounding."""
    square = square + 2 * row + shares.own
    cross, total = cross + shares.cross, total + shares.total
    rest = 1 - 2 * total + square
    some = rest > _LEAST
    rest = jnp.where(some, rest, 1)
    score = (square - cross**2 - 2 * (total - cross)) / rest
    rounding = _ROUNDING * (square + cross**2 + 2 * jnp.abs(total - cross)) / rest
    return jnp.where(some, score, 1), jnp.where(some, rounding, 0)


def _lowest(score: Any, rounding: Any, left: Any) -> Any:
    """The first index of those whose score may be the lowest, up to rounding."""
    # Not `argmin`, which cannot be lowered in double precision where JAX is set to single.
    lowest = jnp.min(jnp.where(left, score + rounding, jnp.inf))
    tied = left & (score - rounding <= lowest)
    p = len(score)
    return jnp.minimum(jnp.min(jnp.where(tied, jnp.arange(p, dtype=jnp.int32), p)), p - 1)
