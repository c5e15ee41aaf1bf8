r"""Centred kernel alignment (CKA): how alike two representations of the same examples are.

With the centred Gram matrices $K = H X X^\top H$ and $L = H Y Y^\top H$ of features
$X$ `(n, p)` and $Y$ `(n, q)` of the same n examples,

$$\mathrm{CKA}(X, Y) = \frac{\langle K, L \rangle}{\|K\|_F \|L\|_F} \in [0, 1].$$

It does not change under orthogonal maps of the features and under their scaling, but does
under other linear maps. Features of more than one axis (images, tokens) are flattened.

The plain estimate is biased upwards: with many more features than examples even
independent ones come out near 1 (0.98 for n = 16 and p = 1024). `debiased=True` takes the
unbiased estimate of each HSIC; it can be negative, and needs four examples.

Of features that are the same for all examples, up to rounding, the similarity to
anything, themselves included, is 0 here, with a gradient of zero.

References:
    Kornblith et al., "Similarity of neural network representations revisited",
    ICML 2019. Song et al., "Feature selection via dependence maximization", JMLR
    2012, Eq. 5, for the unbiased estimate. Nguyen et al., "Do wide and deep networks
    learn the same things?", ICLR 2021, Eq. 2 and 3, for minibatches.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from ntt_sparse._types import Scalar
from ntt_sparse.similarity import grams
from ntt_sparse.similarity.grams import Features

_LEAST_FRACTION, _LARGEST_FRACTION = 1e-3, 1e6


class HSICSums(NamedTuple):
    """The three sums over minibatches that CKA is the ratio of."""

    cross: Float[Array, "l m"]
    first: Float[Array, " l"]
    second: Float[Array, " m"]


def linear_cka(
    x: Features,
    y: Features,
    *,
    debiased: bool = False,
    axis_name: str | None = None,
) -> Scalar:
    """Linear CKA of two sets of features, by Gram matrices or by features, as is cheaper.

    Args:
        x: Features `(n, ...)`.
        y: Features of the same examples, `(n, ...)`.
        debiased: Whether to take the unbiased estimates of HSIC.
        axis_name: Inside `jax.pmap` or `jax.shard_map`, the axis over which the examples
            are split; the value is then that of all of them, on every device. Gradients
            are taken as those of a mean over devices: complete in `shard_map` for params
            that enter replicated, averaged by `jax.lax.pmean` in `pmap`.

    Returns:
        The similarity, in [0, 1] unless debiased; 0 where features are constant.

    Raises:
        ValueError: Different numbers of examples, none, or fewer than four to be debiased.
    """
    return cka_matrix([x, y], debiased=debiased, axis_name=axis_name)[0, 1]


def cka_distance(
    x: Features,
    y: Features,
    *,
    debiased: bool = False,
    axis_name: str | None = None,
) -> Scalar:
    """`1 - linear_cka(x, y)`; see there."""
    return 1.0 - linear_cka(x, y, debiased=debiased, axis_name=axis_name)


def cka_matrix(
    features: Sequence[Features],
    others: Sequence[Features] | None = None,
    *,
    debiased: bool = False,
    axis_name: str | None = None,
) -> Float[Array, "l m"]:
    """Linear CKA of all pairs of layers, as one product.

    Args:
        features: Features of L layers, `(n, ...)` each, of any shapes.
        others: Features of M layers of another network for the same examples; by default
            those of the same network.
        debiased: Whether to take the unbiased estimates of HSIC.
        axis_name: As for `linear_cka`.

    Returns:
        Similarities `(L, M)`. Where both are the same features it is 1, or 0 if these are
        constant.

    Raises:
        ValueError: No layers, different numbers of examples, or too few of them.
    """
    first = _prepared(features, axis_name, debiased)
    second = first if others is None else _prepared(others, axis_name, debiased)
    if len(first[0]) != len(second[0]):
        raise ValueError(
            f"the networks saw {len(first[0])} and {len(second[0])} examples: CKA compares "
            "representations of the same ones"
        )
    if _features_are_cheaper(first if others is None else first + second):
        value = _by_features(first, None if others is None else second, debiased)
    else:
        one = _stacked_units(first, debiased)
        two = one if others is None else _stacked_units(second, debiased)
        value = grams.matmul(one, two.T)
    return grams.averaged(value, axis_name)


def rbf_cka(
    x: Features,
    y: Features,
    *,
    fraction: float = 1.0,
    debiased: bool = False,
    axis_name: str | None = None,
) -> Scalar:
    r"""CKA with Gaussian kernels $\exp(-d^2 / 2 \sigma^2)$.

    Args:
        x: Features `(n, ...)`.
        y: Features of the same examples, `(n, ...)`.
        fraction: The bandwidth sigma of each side is this fraction of the median distance
            between its examples, pairs of equal examples left out.
        debiased: Whether to take the unbiased estimates of HSIC.
        axis_name: As for `linear_cka`.

    Returns:
        The similarity, in [0, 1] unless debiased; 0 where features are constant.

    Raises:
        ValueError: As for `linear_cka`, or a fraction below 1e-3 (all examples are alike) or
            above 1e6 (as `linear_cka`, but for rounding).
    """
    # The negated form also refuses NaN.
    if not _LEAST_FRACTION <= fraction <= _LARGEST_FRACTION:
        raise ValueError(
            f"{fraction=}, expected a multiple of the median distance from {_LEAST_FRACTION} to "
            f"{_LARGEST_FRACTION}"
        )
    sides = _prepared([x, y], axis_name, debiased)
    units = [_rbf_unit(side, fraction, debiased) for side in sides]
    return grams.averaged(jnp.sum(units[0] * units[1]), axis_name)


def nhsic(
    x: Features,
    y: Features,
    *,
    axis_name: str | None = None,
) -> Scalar:
    r"""Normalised HSIC without centring, $\|Y^\top X\|_F^2 / (\|X^\top X\|_F \|Y^\top Y\|_F)$.

    The similarity that CKA-SR is motivated by (Ni et al. 2023, appendix, Eq. 3), which
    takes features to have zero mean; `linear_cka` centres them.

    Args:
        x: Features `(n, ...)`.
        y: Features of the same examples, `(n, ...)`.
        axis_name: As for `linear_cka`.

    Returns:
        The similarity, in [0, 1]; 0 where all features are zero.

    Raises:
        ValueError: Different numbers of examples, or none.
    """
    sides = _prepared([x, y], axis_name, debiased=False)
    never = jnp.zeros((), bool)
    first, second = (grams.unit(grams.gram(side), never) for side in sides)
    return grams.averaged(jnp.sum(first * second), axis_name)


def hsic_sums(
    features: Sequence[Features],
    others: Sequence[Features] | None = None,
    *,
    axis_name: str | None = None,
) -> HSICSums:
    """What one minibatch adds to minibatch CKA: unbiased HSIC of all pairs, and of each layer.

    Add the results of minibatches with `jax.tree.map(operator.add, ...)`, and give the sums
    to `cka_of_sums`. Fourth powers of features must fit their dtype; `minibatch_cka` has no
    such limit.

    Args:
        features: Features of L layers, `(n, ...)` each.
        others: Features of M layers of another network; by default the same ones.
        axis_name: As for `linear_cka`.

    Raises:
        ValueError: No layers, different numbers of examples, or fewer than four.
    """
    first = _prepared(features, axis_name, debiased=True)
    second = first if others is None else _prepared(others, axis_name, debiased=True)
    n = len(first[0])
    if len(second[0]) != n:
        raise ValueError(f"the networks saw {n} and {len(second[0])} examples")

    def stacked(side):
        centred = [grams.centred_gram(x) for x in side]
        # The rounding that is left of constant features would be as long as any once divided.
        matrices = [jnp.where(each.is_constant(), 0.0, each.matrix) for each in centred]
        return jnp.stack([grams.u_centre(matrix).ravel() for matrix in matrices])

    one = stacked(first)
    two = one if others is None else stacked(second)
    count = n * (n - 3)
    sums = HSICSums(
        grams.matmul(one, two.T) / count,
        jnp.sum(one**2, axis=1) / count,
        jnp.sum(two**2, axis=1) / count,
    )
    return jax.tree.map(lambda value: grams.averaged(value, axis_name), sums)


def cka_of_sums(sums: HSICSums) -> Float[Array | np.ndarray, "l m"]:
    """Minibatch CKA `(L, M)` from the sums of `hsic_sums`; 0 where a layer is constant."""
    xp = np if isinstance(sums.cross, np.ndarray) else jnp
    first, second = (
        xp.where(own > 0, 1 / xp.sqrt(xp.where(own > 0, own, 1)), 0)
        for own in (sums.first, sums.second)
    )
    return first[:, None] * sums.cross * second


def minibatch_cka(
    batches: Iterable[Sequence[Features]],
    others: Iterable[Sequence[Features]] | None = None,
) -> Float64[np.ndarray, "l m"]:
    """CKA over a data set that does not fit into memory, one minibatch after another.

    HSIC is averaged over minibatches before the ratio is formed (Nguyen et al. 2021, Eq. 2).
    The sums are float64. The expectation of each HSIC does not depend on the batch size, and
    the value converges to the debiased CKA of the whole set.

    Args:
        batches: For each minibatch the features of L layers, `(n, ...)` each. A last batch of
            fewer than four is left out.
        others: The same of the M layers of another network, for the same minibatches; by
            default those of the same network. Two generators are read in turn.

    Returns:
        Similarities `(L, L)`, or `(L, M)` of two networks.

    Raises:
        ValueError: There is no batch of four examples or more, or batches differ in their
            layers or number.
    """
    total: HSICSums | None = None
    small = False
    both = batches if others is None else zip(batches, others, strict=True)
    for batch in both:
        if small:
            raise ValueError("a batch of fewer than four examples is not the last one")
        sides = [list(batch)] if others is None else [list(side) for side in batch]
        for side, name in zip(sides, ("features", "others"), strict=False):
            if not side:
                raise ValueError(f"a batch of {name} holds no layer, expected one or more")
        small = len(sides[0][0]) < 4
        if small:
            continue
        sums, *scales = (jax.tree.map(_float64, part) for part in _scaled_sums(*sides))
        one, two = scales[0], scales[-1]
        sums = HSICSums(one[:, None] * sums.cross * two, one**2 * sums.first, two**2 * sums.second)
        if total is not None and total.cross.shape != sums.cross.shape:
            raise ValueError(
                f"batches hold {total.cross.shape} and {sums.cross.shape} layers, expected the "
                "same in each"
            )
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    if total is None:
        raise ValueError("minibatch CKA needs a batch of four examples or more, there is none")
    return np.asarray(cka_of_sums(total))


def _float64(x: Array) -> np.ndarray:
    return np.asarray(x, np.float64)


@jax.jit
def _scaled_sums(*sides: list[Array]) -> tuple[Any, ...]:
    """The sums of features of size one, and the squares of what they were divided by."""
    scaled, scales = [], []
    for side in sides:
        largest = [jnp.max(jnp.abs(grams.flat(x)), initial=0) for x in side]
        scales.append(jnp.stack([jnp.where(scale > 0, scale, 1) for scale in largest]))
        scaled.append([grams.flat(x) / scale for x, scale in zip(side, scales[-1], strict=True)])
    return hsic_sums(*scaled), *(scale**2 for scale in scales)


def _prepared(
    features: Sequence[Features], axis_name: str | None, debiased: bool
) -> list[Float[Array, "_ _"]]:
    """Flat features of all examples, of one dtype, checked."""
    grams.check_collection(features, "features")
    if not features:
        raise ValueError("there are no features to compare, expected those of one layer or more")
    counts = [len(x) for x in features]
    if len(set(counts)) > 1:
        raise ValueError(
            f"layers have features of {counts} examples: CKA compares representations of the "
            "same ones"
        )
    result = [grams.gather_examples(grams.flat(x), axis_name) for x in features]
    if debiased:
        grams.check_debiased(len(result[0]))
    dtype = jnp.result_type(*result)
    return [x.astype(dtype) for x in result]


def _features_are_cheaper(features: list[Float[Array, "_ _"]]) -> bool:
    """Whether covariances of all features cost less than Gram matrices of all examples."""
    n, p, layers = len(features[0]), sum(x.shape[1] for x in features), len(features)
    return p * p < n * (p + layers**2)


def _stacked_units(features: list[Float[Array, "_ _"]], debiased: bool) -> Float[Array, "l nn"]:
    return jnp.stack([grams.unit_gram(x, debiased=debiased).ravel() for x in features])


def _by_features(
    first: list[Float[Array, "_ _"]], second: list[Float[Array, "_ _"]] | None, debiased: bool
) -> Float[Array, "l m"]:
    r"""From one covariance of all features: $\langle K, L \rangle = \|X^\top Y\|_F^2$."""
    features = first + (second or [])
    n, eps = len(features[0]), jnp.finfo(features[0].dtype).eps
    centred, constant = [], []
    for x in features:
        mean = jnp.mean(x, axis=0)
        spread = jnp.sum((x - mean) ** 2)
        zero = spread <= (grams.ROUNDINGS * eps) ** 2 * (spread + n * jnp.sum(mean**2))
        # Of one scale, so that squares of products neither over- nor underflow.
        centred.append((x - mean) * jax.lax.rsqrt(jnp.where(zero, 1.0, spread)))
        constant.append(zero)
    z = jnp.concatenate(centred, axis=1)
    layer = np.repeat(np.arange(len(features)), [x.shape[1] for x in features])
    members = jnp.asarray(layer[:, None] == np.arange(len(features)), z.dtype)
    # The covariance is the Gram matrix of features: the same product, the same derivative.
    squares = grams.matmul(members.T, grams.matmul(grams.gram(z.T) ** 2, members))
    if debiased:
        # Without the terms of examples with themselves (Kornblith et al. 2019, their code).
        lengths = jnp.stack([jnp.sum(x**2, axis=1) for x in centred])
        totals = jnp.sum(lengths, axis=1)
        squares = squares - n / (n - 2) * grams.matmul(lengths, lengths.T)
        squares = squares + totals[:, None] * totals / ((n - 1) * (n - 2))
    own = jnp.diagonal(squares)
    # Self-similarities are at least 1/n, debiased ones may be rounding alone.
    zero = jnp.stack(constant) | (own <= grams.ROUNDINGS * eps * debiased)
    scale = jnp.where(zero, 0.0, jax.lax.rsqrt(jnp.where(zero, 1.0, own)))
    result = scale[:, None] * squares * scale
    return result if second is None else result[: len(first), len(first) :]


def _rbf_unit(x: Float[Array, "n p"], fraction: float, debiased: bool) -> Float[Array, "n n"]:
    centred = grams.centred_gram(x)
    inner, zero = centred.matrix, centred.is_constant()
    lengths = jnp.diagonal(inner)
    squared = jnp.maximum(lengths[:, None] + lengths - 2 * inner, 0.0)
    # Rounding leaves equal examples a distance; without it the median is taken of the rest.
    rounding = grams.ROUNDINGS * jnp.finfo(x.dtype).eps * jnp.max(lengths)
    apart = (squared > rounding) & ~zero
    median = jnp.nanmedian(jnp.where(apart, squared, jnp.nan))
    width = 2 * fraction**2 * jnp.where(zero, 1.0, median)
    # The constant that expm1 leaves off is taken off by centring, in fewer digits.
    centred = grams.centre(jnp.expm1(-squared / width))
    return grams.unit(grams.u_centre(centred) if debiased else centred, zero)
