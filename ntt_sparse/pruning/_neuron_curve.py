"""The curve of one layer, see `ntt_sparse.pruning.neurons`: in double precision, compiled.

Sums over what is gone only grow, and are taken relative to the sums over what there was at a base.
Where less than a hundredth of those is left, their difference would lose its digits: then what is
left is the new base, of which all sums are formed anew.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Relative to the terms of a score.
_ROUNDING = 1e-13
# What is left of the base, at least, and of that without one more neuron.
_LEAST = 1e-2
# A column whose spread is below so many roundings of its size is constant.
_CONSTANT = 16 * float(np.finfo(np.float64).eps)
# Up to 2 GiB of products of neurons are kept; beyond, a row is computed when it is needed.
_MOST_PRODUCTS = 2**28


class PruneCurve(NamedTuple):
    """Neurons in the order of their removal, and what is left after each.

    Attributes:
        order: Indices of neurons, the first to go first; -1 where there was none to remove.
        similarity: CKA of the whole layer with what is left after that removal, in [0, 1]; NaN,
            and the order -1, where activations were not finite.
    """

    order: Int[Array, " count"]
    similarity: Float[Array, " count"]


class _Products(NamedTuple):
    """Inner products of the Gram matrices that single neurons make, $Q$.

    Attributes:
        cross: `(p,)` of each neuron with the reference.
        own: `(p,)` of each with itself.
        row: `index -> (p,)`, of one with each.
        of: `(p,) bool -> (p,)`, of each with the sum of those.
        square: Of the reference with itself.
    """

    cross: Any
    own: Any
    row: Callable[[Any], Any]
    of: Callable[[Any], Any]
    square: Any


class _Base(NamedTuple):
    """The neurons that sums are relative to.

    Attributes:
        cross: Their sum of `cross`.
        square: Their sum of all products.
        total: `(p,)` products of each neuron with their sum.
        start: The square of their CKA.
    """

    cross: Any
    square: Any
    total: Any
    start: Any


class _Gone(NamedTuple):
    """Sums over the neurons that went since the base, and `(p,)` of each with their sum."""

    cross: Any
    total: Any
    square: Any
    row: Any


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
    zero = jnp.zeros((), jnp.float64)
    none = jnp.zeros(x.shape[-1], jnp.float64)
    # A loop of no steps is traced all the same.
    if not count:
        return PruneCurve(jnp.zeros(0, jnp.int32), none[:0])
    features = jnp.where(left, _centred(x), 0)
    products = _products(features, left, None if target is None else _centred(target))
    nothing = _Gone(zero, zero, zero, none)
    first = _base(products, left)
    alone = _scores(products, first, nothing, left)

    def remove(index, carry):
        left, base, gone, order, similarity = carry
        if mode == "given":
            chosen = given[index]
        elif mode == "oneshot":
            chosen = _lowest(*alone, left)
        else:
            chosen = _lowest(*_scores(products, base, gone, left), left)
        order = order.at[index].set(jnp.where(jnp.any(left), chosen, -1))
        left = left.at[chosen].set(False)
        gone = _Gone(
            gone.cross + products.cross[chosen],
            gone.total + base.total[chosen],
            gone.square + 2 * gone.row[chosen] + products.own[chosen],
            gone.row + products.row(chosen),
        )
        base, gone = jax.lax.cond(
            _rest(base, gone.total, gone.square) < _LEAST,
            lambda: (_base(products, left), nothing),
            lambda: (base, gone),
        )
        rest = _rest(base, gone.total, gone.square)
        value = jnp.sqrt(base.start / rest) * jnp.abs(1 - gone.cross / _or_one(base.cross))
        similarity = similarity.at[index].set(jnp.minimum(value, 1))
        return left, base, gone, order, similarity

    carry = (
        left, first, nothing, jnp.zeros(count, jnp.int32), jnp.zeros(count, jnp.float64)
    )  # fmt: skip
    *_, order, similarity = jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), remove, carry)
    return PruneCurve(jnp.where(jnp.isnan(similarity), -1, order), similarity)


def _centred(x: Any) -> Any:
    """Features in double precision, of size one, about their mean; constant ones are zero."""
    x = x.astype(jnp.float64)
    x = x / _or_one(jnp.max(jnp.abs(x)))
    mean = jnp.mean(x, axis=0)
    spread = jnp.sum((x - mean) ** 2, axis=0)
    constant = spread <= _CONSTANT**2 * (spread + len(x) * mean**2)
    return jnp.where(constant, 0, x - mean)


def _products(x: Any, left: Any, target: Any) -> _Products:
    """Of centred features `(n, ..., p)`, zero but for those that are left."""
    n, p = x.shape[0], x.shape[-1]
    x = x.reshape(n, -1, p)
    if x.shape[1] > 1:
        own, row, of = _from_maps(x)
    elif p * p <= _MOST_PRODUCTS:
        own, row, of = _from_covariance(x[:, 0])
    else:
        own, row, of = _from_features(x[:, 0])
    if target is None:
        cross = of(left)
        square = jnp.sum(jnp.where(left, cross, 0))
    else:
        gram = target.reshape(n, -1) @ target.reshape(n, -1).T
        cross, square = _with_gram(x, gram), jnp.sum(gram**2)
    return _Products(cross, own, row, of, square)


def _from_covariance(x: Any) -> Any:
    """`own`, `row` and `of` of features `(n, p)`."""
    covariance = x.T @ x
    return (
        jnp.diagonal(covariance) ** 2,
        lambda index: covariance[index] ** 2,
        lambda chosen: jnp.sum(jnp.where(chosen, covariance**2, 0), 1),
    )


def _from_features(x: Any) -> Any:
    """The same without the covariance."""

    def of(chosen):
        some = jnp.where(chosen, x, 0)
        return _with_gram(x[:, None], some @ some.T)

    return jnp.sum(x**2, axis=0) ** 2, lambda index: (x[:, index] @ x) ** 2, of


def _from_maps(x: Any) -> Any:
    """The same of maps `(n, s, p)`, which are compared whole."""
    matrix = _products_of_maps(x)
    return (
        jnp.diagonal(matrix),
        lambda index: matrix[index],
        lambda chosen: jnp.sum(jnp.where(chosen, matrix, 0), 1),
    )


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


def _base(products: _Products, left: Any) -> _Base:
    total = products.of(left)
    cross = jnp.sum(jnp.where(left, products.cross, 0))
    square = jnp.sum(jnp.where(left, total, 0))
    # Without anything that varies the similarity is zero.
    start = cross / _or_one(square) * (cross / _or_one(products.square))
    return _Base(cross, square, total, start)


def _rest(base: _Base, total: Any, square: Any) -> Any:
    """What of the sum of all products is left, of that of the base; one of nothing."""
    return 1 - (2 * total - square) / _or_one(base.square)


def _scores(products: _Products, base: _Base, gone: _Gone, left: Any) -> tuple[Any, Any]:
    """What 1 - CKA^2, relative to the base, becomes with each neuron gone; and its rounding."""
    whole = _or_one(base.square)
    square = gone.square + 2 * gone.row + products.own
    total = gone.total + base.total
    cross = (gone.cross + products.cross) / _or_one(base.cross)
    rest = _rest(base, total, square)
    least = _LEAST * _rest(base, gone.total, gone.square)
    safe = jnp.maximum(rest, least)
    square, apart = square / whole, 2 * (total / whole - cross)
    score = (square - cross**2 - apart) / safe
    rounding = _ROUNDING * (square + cross**2 + jnp.abs(apart)) / safe

    # At most one neuron has more than three quarters of what there is (as Gram matrices do not
    # cancel). What is left without it is summed anew.
    rest = jnp.where(left, rest, jnp.inf)
    places = jnp.arange(len(rest), dtype=jnp.int32)
    largest = jnp.min(jnp.where(rest <= jnp.min(rest), places, len(rest) - 1))

    def without():
        other = _base(products, left.at[largest].set(False))
        start = jnp.where(base.start > 0, base.start, 1)
        return 1 - other.start / start, _ROUNDING * (1 + other.start / start)

    score_of, rounding_of = jax.lax.cond(
        rest[largest] < least, without, lambda: (score[largest], rounding[largest])
    )
    score, rounding = score.at[largest].set(score_of), rounding.at[largest].set(rounding_of)
    # Nothing is like the reference, or nothing varies: all are tied.
    some = ~(base.start <= 0)
    return jnp.where(some, score, 0), jnp.where(some, rounding, 0)


def _lowest(score: Any, rounding: Any, left: Any) -> Any:
    """The first index of those whose score may be the lowest, up to rounding."""
    # Not `argmin`, which cannot be lowered in double precision where JAX is set to single.
    lowest = jnp.min(jnp.where(left, score + rounding, jnp.inf))
    tied = left & (score - rounding <= lowest)
    p = len(score)
    return jnp.minimum(jnp.min(jnp.where(tied, jnp.arange(p, dtype=jnp.int32), p)), p - 1)


def _or_one(value: Any) -> Any:
    """A divisor: zero is one."""
    return jnp.where(value == 0, 1, value)
