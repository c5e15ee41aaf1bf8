r"""Neurons in the order in which they can go: by similarity of representations, and rivals.

The layer's activations of n examples are $X$ `(n, p)`, centred. With $C = X^\top X$,
$Q = C \circ C$ and $r = Q 1$ the similarity of the whole layer to one of which only the neurons
$S$ are left, the others constant, is

$$\mathrm{CKA}(X, X_S) = \frac{\sum_{j \in S} r_j}{\sqrt{1^\top Q 1}\,\sqrt{1_S^\top Q 1_S}}.$$

So one matrix product gives what every removal costs, and each further removal is O(p): with the
removed neurons T, shares $\rho = \sum_T r_j / 1^\top Q 1$ and $q = 1_T^\top Q 1_T / 1^\top Q 1$,

$$1 - \mathrm{CKA}^2 = \frac{q - \rho^2}{1 - 2 \rho + q},$$

whose sums only grow: it keeps the digits that CKA, a number next to one, does not have. The
order is that of brute force, which takes time $\Omega(p^2 n p)$.

All is computed in double precision, whatever the configuration of JAX, also inside of `jax.jit`
and `jax.vmap`. Neurons whose removals differ by rounding alone are tied, and go by index.

References:
    Higgins, "Representation aware pruning with centered kernel alignment", 2023, Section 3.
    Kornblith et al., "Similarity of neural network representations revisited", ICML 2019.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Num

from ntt_sparse._types import PRNGKey

_MODES = ("greedy", "oneshot")
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


def cka_prune_order(
    activations: Num[ArrayLike, "..."],
    count: int,
    *,
    mode: str = "greedy",
    reference: Num[ArrayLike, "..."] | None = None,
    kept: Bool[ArrayLike, " _"] | None = None,
) -> Int[Array, " count"]:
    """Indices `(count,)` of neurons in the order in which they are removed.

    See `cka_prune_curve`, which also says how similar the rest stays.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 5.0, 0.1], [0.0, 5.0, 0.0], [1.0, 5.0, 0.3], [3.0, 5.0, 0.0]])
        >>> cka_prune_order(x, 2).tolist()  # The second never changes, the third hardly.
        [1, 2]
    """
    return cka_prune_curve(activations, count, mode=mode, reference=reference, kept=kept).order


def cka_prune_curve(
    activations: Num[ArrayLike, "..."],
    count: int | None = None,
    *,
    mode: str = "greedy",
    reference: Num[ArrayLike, "..."] | None = None,
    kept: Bool[ArrayLike, " _"] | None = None,
) -> PruneCurve:
    """Removes neuron after neuron, always the one without which the layer is most like itself.

    O(n p^2) operations for the layer, then O(p) for each removal; O(p^2) memory up to
    p = 16,384, O(n p) and O(n p) operations for each removal beyond.

    Args:
        activations: `(n, p)` of the layer, before or after its nonlinearity: n examples of p
            neurons. With axes between, such as `(n, height, width, p)`, a neuron is a channel, and
            what is compared are flattened features, as in `ntt_sparse.similarity.cka`.
        count: How many neurons are removed, 0 to p; all by default.
        mode: `"greedy"`, the algorithm of the paper, or `"oneshot"`, that of its published
            code: neurons by the damage of their removal alone.
        reference: `(n, ...)`, what the layer has to stay like, for the same examples, of any
            number of neurons; by default the activations themselves.
        kept: `(p,)`, neurons that are there; the others are neither compared nor removed.

    Returns:
        The order and the similarity after each removal. Similarities are 0 if the layer is
        constant; the order is then that of indices.

    Raises:
        ValueError: Shapes do not fit, `count` is not possible, the mode is unknown, or (outside
            of a transformation) values are not finite.

    References:
        Higgins 2023, Section 3, "CKA pruning".
    """
    if mode not in _MODES:
        raise ValueError(f"{mode=} is unknown, expected one of {', '.join(_MODES)}")
    dtype = jnp.result_type(float)
    # Also where JAX is set to single precision, or this is traced there.
    with jax.enable_x64(True):
        x, target = _checked_pair(activations, reference)
        left = _checked_kept(kept, x.shape[-1])
        order, similarity = _curve(x, target, left, None, _checked_count(count, left), mode)
        return PruneCurve(order, similarity.astype(dtype))


def similarity_along(
    activations: Num[ArrayLike, "..."],
    order: Int[ArrayLike, " count"],
    *,
    reference: Num[ArrayLike, "..."] | None = None,
) -> Float[Array, " count"]:
    """How similar a layer stays to itself when its neurons go in any order.

    Args:
        activations: See `cka_prune_curve`.
        order: Indices of different neurons, the first to go first.
        reference: See `cka_prune_curve`.

    Returns:
        CKA of the whole layer with what is left after each removal, in [0, 1].

    Raises:
        ValueError: Shapes do not fit, or (outside of a transformation) an index is out of range or
            repeated, or a value is not finite.
    """
    given = jnp.asarray(order, jnp.int32)
    dtype = jnp.result_type(float)
    with jax.enable_x64(True):
        x, target = _checked_pair(activations, reference)
        if not isinstance(given, jax.core.Tracer):
            inside = bool(jnp.all((given >= 0) & (given < x.shape[-1])))
            if not inside or len(np.unique(given)) < len(given):
                raise ValueError(
                    f"order is {given}, expected different numbers from 0 to {x.shape[-1] - 1}"
                )
        left = _checked_kept(None, x.shape[-1])
        return _curve(x, target, left, given, len(given), "given").similarity.astype(dtype)


def l1_prune_order(
    kernel: Num[ArrayLike, "..."], count: int, *, kept: Bool[ArrayLike, " _"] | None = None
) -> Int[Array, " count"]:
    """Indices of the neurons with the smallest L1 norms of their incoming weights.

    Args:
        kernel: `(..., p)`, weights into a layer of p neurons or channels; without biases.
        count: How many are removed, 0 to p.
        kept: `(p,)`, neurons that are there, all by default.

    Returns:
        `(count,)` in the order of removal, ties by index.

    Raises:
        ValueError: As `cka_prune_curve`.

    References:
        Higgins 2023, Section 3, "L1 pruning".
    """
    weights = _checked(kernel, "kernel")
    left = _checked_kept(kept, weights.shape[-1])
    count = _checked_count(count, left)
    norms = jnp.sum(jnp.abs(weights), axis=tuple(range(weights.ndim - 1)))
    return _smallest(norms, left, count)


def random_prune_order(
    key: PRNGKey, p: int, count: int, *, kept: Bool[ArrayLike, " _"] | None = None
) -> Int[Array, " count"]:
    """Indices of `count` of p neurons at random, each order as likely as any other.

    Args:
        key: Of the draw.
        p: Neurons of the layer.
        count: How many are removed, 0 to p.
        kept: `(p,)`, neurons that are there, all by default.

    Raises:
        ValueError: As `cka_prune_curve`.
    """
    left = _checked_kept(kept, p)
    count = _checked_count(count, left)
    places = jax.random.permutation(key, p)
    return _smallest(places, left, count)


def prune_layers(
    activations: Mapping[str, Num[ArrayLike, "..."]],
    counts: Mapping[str, int],
    *,
    mode: str = "greedy",
) -> dict[str, PruneCurve]:
    """The curves of several layers, each as if the others stayed whole.

    Args:
        activations: By layer, see `cka_prune_curve`.
        counts: By layer, how many neurons go.
        mode: See `cka_prune_curve`.

    Raises:
        ValueError: There are no activations of a layer, or as `cka_prune_curve`.
    """
    return {
        name: cka_prune_curve(_of_layer(activations, name), count, mode=mode)
        for name, count in counts.items()
    }


def prune_sequentially(
    activations_of: Callable[[dict[str, Array]], Mapping[str, Num[ArrayLike, "..."]]],
    counts: Mapping[str, int],
    *,
    mode: str = "greedy",
) -> dict[str, PruneCurve]:
    """The curves of several layers, where each sees the pruning of those before it.

    A layer is pruned so that it stays like that of the whole network, of what it computes when
    the layers before it are pruned already. One forward pass for each layer.

    Args:
        activations_of: `{layer: (p,) bool} -> {layer: activations}`: what the network computes
            without the neurons that are `False`; a layer that is not there is whole.
        counts: By layer, from input to output, how many neurons go.
        mode: See `cka_prune_curve`.

    Raises:
        ValueError: There are no activations of a layer, or as `cka_prune_curve`.
    """
    whole = activations_of({})
    kept: dict[str, Array] = {}
    curves = {}
    for name, count in counts.items():
        now = activations_of(dict(kept)) if kept else whole
        curves[name] = cka_prune_curve(
            _of_layer(now, name), count, mode=mode, reference=_of_layer(whole, name)
        )
        p = jnp.shape(_of_layer(whole, name))[-1]
        kept[name] = jnp.ones(p, bool).at[curves[name].order].set(False)
    return curves


def counts_at_rate(widths: Mapping[str, int], rate: float) -> dict[str, int]:
    """How many neurons of each layer a rate of those that are left is; one always stays.

    Args:
        widths: Neurons that are left, by layer.
        rate: In [0, 1); the product is rounded, halves to even.

    Raises:
        ValueError: The rate is out of range.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"{rate=}, expected a fraction of the neurons in [0, 1)")
    return {name: min(round(rate * width), width - 1) for name, width in widths.items()}


def counts_at_threshold(
    similarities: Mapping[str, Float[ArrayLike, " count"]], threshold: float
) -> dict[str, int]:
    """How many neurons of each layer can go while its similarity stays at a threshold or above.

    Args:
        similarities: By layer, of `cka_prune_curve`; not inside of a transformation.
        threshold: In (0, 1], the same for all layers.

    Returns:
        For each layer the removals before the first that falls below, fewer than all neurons if
        the curve has all of them (without any the similarity is 0).

    Raises:
        ValueError: The threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"{threshold=}, expected a similarity in (0, 1]")
    return {
        name: int(np.sum(np.minimum.accumulate(np.asarray(curve)) >= threshold))
        for name, curve in similarities.items()
    }


def counts_of_total(
    similarities: Mapping[str, Float[ArrayLike, " count"]], total: int
) -> tuple[dict[str, int], float]:
    """How many neurons of each layer go, of `total`, so that they share the highest threshold.

    Args:
        similarities: By layer, of `cka_prune_curve`; not inside of a transformation.
        total: Of all layers together.

    Returns:
        The numbers, and the lowest similarity that a layer has after that.

    Raises:
        ValueError: There are not so many removals in the curves.
    """
    falling = {name: np.minimum.accumulate(np.asarray(c)) for name, c in similarities.items()}
    available = sum(map(len, falling.values()))
    if not 0 <= total <= available:
        raise ValueError(f"{total=}, expected 0 to {available}, the removals in the curves")
    values = np.concatenate([*falling.values(), np.zeros(0)])
    layers = np.repeat(np.arange(len(falling)), [len(curve) for curve in falling.values()])
    # Of one layer in its order, as it falls; of equal ones the first layer's first.
    chosen = np.argsort(-values, kind="stable")[:total]
    numbers = np.bincount(layers[chosen], minlength=len(falling))
    lowest = float(values[chosen[-1]]) if total else 1.0
    return dict(zip(falling, map(int, numbers), strict=True)), lowest


@partial(jax.jit, static_argnames=("count", "mode"))
def _curve(x: Any, target: Any, left: Any, given: Any, count: int, mode: str) -> PruneCurve:
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


def _smallest(values: Any, left: Any, count: int) -> Any:
    """The indices of the smallest values of those left, in order, -1 where there are no more."""
    last = jnp.where(left, 0, 1)
    order = jnp.lexsort((values, last))[:count]
    return jnp.where(left[order], order, -1).astype(jnp.int32)


def _of_layer(activations: Mapping[str, Any], name: str) -> Any:
    if name not in activations:
        raise ValueError(f"there are no activations of {name!r}, only of {sorted(activations)}")
    return activations[name]


def _checked(value: Any, name: str) -> Any:
    array = jnp.asarray(value)
    if array.ndim < 2 or array.shape[0] < 1 or array.shape[-1] < 1:
        raise ValueError(f"{name} has shape {array.shape}, expected two axes or more, none empty")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.float32)
    if not isinstance(array, jax.core.Tracer) and not np.all(np.isfinite(np.asarray(array))):
        raise ValueError(f"{name} holds a number that is not finite")
    return array


def _checked_pair(activations: Any, reference: Any) -> Any:
    x = _checked(activations, "activations")
    target = None if reference is None else _checked(reference, "reference")
    if target is not None and len(target) != len(x):
        raise ValueError(
            f"reference has {len(target)} examples, activations have {len(x)}: CKA compares "
            "representations of the same ones"
        )
    return x, target


def _checked_kept(kept: Any, p: int) -> Any:
    if kept is None:
        return jnp.ones(p, bool)
    left = jnp.asarray(kept)
    if left.shape != (p,):
        raise ValueError(f"kept has shape {left.shape}, expected ({p},): one for each neuron")
    return left


def _checked_count(count: int | None, left: Any) -> int:
    most = len(left) if isinstance(left, jax.core.Tracer) else int(jnp.sum(left))
    count = most if count is None else count
    if not 0 <= count <= most:
        raise ValueError(f"{count=}, expected 0 to {most}, the neurons that are there")
    return count
