"""Canonical correlation analysis (CCA) of features: three measures, and a loss.

Similarities are in [0, 1], and 1 for features that agree; a distance is 1 - similarity.
Features are `(n, ...)` arrays of n examples, flattened behind the first axis and centred over
the examples; computation is in float32 at least. All run under `jit` and `vmap`.
`ridge_cca` is made to differentiate; the others go through singular vectors, whose gradients
are unbounded, and are made to measure with. With an `axis_name`, inside `jax.pmap` or
`jax.shard_map`, examples are split over that axis, and the value is that of all of them.

A singular direction below the rounding of the features (of duplicate or constant ones) does
not count. Features that are not finite give NaN.
"""

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ntt_sparse._types import Scalar
from ntt_sparse.similarity.grams import Features, averaged, flat, gather_examples, matmul

Share: TypeAlias = Literal["values", "variance"]
"""What a share is of: the sum of singular values, or the sum of their squares."""


def canonical_correlations(
    x: Features, y: Features, *, axis_name: str | None = None
) -> Float[Array, "k"]:
    """The cosines of the principal angles between the spaces spanned by centred features.

    Args:
        x: Features `(n, ...)` with p1 entries for each example.
        y: Features `(n, ...)` of the same examples, with p2 entries each. Where p1 + p2 > n - 1,
            the first p1 + p2 - (n - 1) correlations are 1 whatever the features.
        axis_name: The axis over which examples are split, if they are.

    Returns:
        Correlations `(min(p1, p2),)` in [0, 1], descending; zeros come last for directions
        that do not count.

    Raises:
        ValueError: Numbers of examples that differ, empty features, or p1 or p2 above n - 2:
            n - 1 features span everything, and all correlations are 1.

    References:
        Hotelling, "Relations between two sets of variates", Biometrika 1936; computed as by
        Björck and Golub, "Numerical methods for computing angles between linear subspaces",
        Mathematics of Computation 1973, theorem 1.
    """
    x, y = _narrow_pair(x, y, axis_name)
    return averaged(_correlations(_directions(x), _directions(y)), axis_name)


def cca_similarity(
    x: Features, y: Features, *, squared: bool = False, axis_name: str | None = None
) -> Scalar:
    """The mean canonical correlation, over as many as the smaller rank.

    It does not change with invertible affine maps of x or y. 0 when one side is constant.

    Args:
        x: Features `(n, ...)`.
        y: Features `(n, ...)` of the same examples.
        squared: Take the mean of the squares, R^2_CCA.
        axis_name: The axis over which examples are split, if they are.

    Raises:
        ValueError: As `canonical_correlations`.

    References:
        Kornblith et al., "Similarity of neural network representations revisited", ICML 2019,
        table 1.
    """
    x, y = _narrow_pair(x, y, axis_name)
    return averaged(_mean_correlation(_directions(x), _directions(y), squared), axis_name)


def svcca_similarity(
    x: Features,
    y: Features,
    *,
    threshold: float = 0.99,
    of: Share = "values",
    squared: bool = False,
    axis_name: str | None = None,
) -> Scalar:
    """Singular vector CCA: the mean canonical correlation of leading singular directions.

    Each side keeps the smallest number of directions whose share reaches the threshold, at
    least one; the mean is over the smaller number. It does not change with orthogonal maps,
    scale and offsets of x or y. 0 when one side is constant. Features may outnumber
    examples, but a side that keeps n - 1 directions correlates perfectly with anything.

    Args:
        x: Features `(n, ...)`.
        y: Features `(n, ...)` of the same examples.
        threshold: The share to reach, in (0, 1].
        of: Whether it is a share of the sum of singular `"values"`, as in published code, or
            of their squares, the `"variance"`.
        squared: Take the mean of the squared correlations.
        axis_name: The axis over which examples are split, if they are.

    Raises:
        ValueError: Numbers of examples that differ or are below 3, empty features, a
            threshold outside (0, 1], or an unknown `of`.

    References:
        Raghu et al., "SVCCA: singular vector canonical correlation analysis for deep learning
        dynamics and interpretability", NeurIPS 2017, section 2.
    """
    # The negated form also refuses NaN.
    if not 0 < threshold <= 1:
        raise ValueError(f"{threshold=}, expected a share in (0, 1]: 1 keeps every direction")
    if of not in ("values", "variance"):
        raise ValueError(f"{of=} is unknown: expected 'values' or 'variance'")
    x, y = _pair(x, y, axis_name)
    if x.shape[0] < 3:
        raise ValueError(f"{x.shape[0]} examples, expected 3 or more: fewer always correlate")
    a, b = _leading(_directions(x), threshold, of), _leading(_directions(y), threshold, of)
    return averaged(_mean_correlation(a, b, squared), axis_name)


def pwcca_similarity(
    x: Features, y: Features, *, symmetric: bool = False, axis_name: str | None = None
) -> Scalar:
    r"""Projection weighted CCA: correlations weighted by how much of x they account for.

    $$\sum_i \alpha_i \rho_i / \sum_i \alpha_i, \qquad \alpha_i = \sum_j |h_i \cdot x_j|$$

    with $h_i$ the canonical variates of x (orthonormal n-vectors) and $x_j$ its features.
    The weights come from x alone, so the measure is asymmetric; x is usually the side with
    fewer features. It does not change with scale and offsets of x and invertible affine maps
    of y. 0 when one side is constant. Variates of equal correlations are not unique, nor
    are their weights.

    Args:
        x: Features `(n, ...)`.
        y: Features `(n, ...)` of the same examples.
        symmetric: Take the mean of this and of the same with x and y exchanged.
        axis_name: The axis over which examples are split, if they are.

    Raises:
        ValueError: As `canonical_correlations`.

    References:
        Morcos, Raghu, Bengio, "Insights on representational similarity in neural networks
        with canonical correlation", NeurIPS 2018, on projection weighting.
    """
    x, y = _narrow_pair(x, y, axis_name)
    a, b = _directions(x), _directions(y)
    value = _projection_weighted(a, b)
    if symmetric:
        value = (value + _projection_weighted(b, a)) / 2
    return averaged(value, axis_name)


def ridge_cca(
    x: Features, y: Features, *, ridge: float = 0.1, axis_name: str | None = None
) -> Scalar:
    r"""A CCA similarity to train with: the cosine between ridge-whitened kernels.

    $$\langle W_x, W_y \rangle / (\|W_x\| \|W_y\|)$$

    in Frobenius products, with W of `whitened_kernel`. As the ridge goes to 0 it goes to
    $\sum_i \rho_i^2 / \sqrt{r_x r_y}$ for canonical correlations rho and ranks r (R^2_CCA
    when the ranks are equal), as the ridge grows to linear CKA.

    It does not change with orthogonal maps, isotropic scale and offsets of x or y, and is 1
    for x = y. Where features outnumber examples, a small ridge makes any two sides alike.
    Gradients are finite for finite features. Value and gradients are 0 where one side is
    constant (a dead layer) or n < 3.

    Args:
        x: Features `(n, ...)`.
        y: Features `(n, ...)` of the same examples.
        ridge: As in `whitened_kernel`.
        axis_name: The axis over which examples are split, if they are.

    Raises:
        ValueError: Numbers of examples that differ, empty features, or a ridge that is not
            positive and finite.

    References:
        NOCCO of Fukumizu et al., "Kernel measures of conditional dependence", NeurIPS 2007,
        with linear kernels, divided by its norms as kernel alignment is in Cortes et al.,
        "Algorithms for learning kernels based on centered alignment", JMLR 2012.
    """
    x, y = _pair(x, y, axis_name)
    if max(x.shape[1], y.shape[1]) < x.shape[0]:
        _check_ridge(ridge)
        a, b = _whitened_factor(_standard(x), ridge), _whitened_factor(_standard(y), ridge)
        # <A^T A, B^T B> = |A B^T|^2, without n x n matrices.
        cross, xx, yy = (jnp.sum(matmul(c, d.T) ** 2) for c, d in ((a, b), (a, a), (b, b)))
    else:
        a, b = whitened_kernel(x, ridge=ridge), whitened_kernel(y, ridge=ridge)
        cross, xx, yy = jnp.sum(a * b), jnp.sum(a * a), jnp.sum(b * b)
    dead = (xx == 0) | (yy == 0)
    # Selected before the root, whose gradient at 0 is infinite.
    norms = jnp.sqrt(jnp.where(dead, 1, xx)) * jnp.sqrt(jnp.where(dead, 1, yy))
    return averaged(jnp.clip(jnp.where(dead, 0, cross) / norms, 0, 1), axis_name)


def whitened_kernel(x: Float[Array, "n ..."], *, ridge: float = 0.1) -> Float[Array, "n n"]:
    r"""The linear kernel of centred features with its eigenvalues drawn towards 1.

    $$W = K (K + \lambda I)^{-1}, \qquad \lambda = \text{ridge} \cdot \mathrm{tr}(K) / n$$

    for $K = X X^\top$ of centred X. By Cholesky factors of n x n or p x p matrices,
    whichever are smaller.

    Args:
        x: Features `(n, ...)`.
        ridge: The ridge in mean eigenvalues of K, above 0. It is raised to the rounding of K,
            `eps sqrt(max(n, p))` times its norm: with float32 and few directions that hold
            all variance, about 1e-3 for n = 128 and p = 4096.

    Returns:
        A symmetric matrix `(n, n)` with eigenvalues in [0, 1) and rows that sum to 0. Zero,
        with zero gradients, where x is constant or n < 3 (two examples always agree).

    Raises:
        ValueError: Empty features, or a ridge that is not positive and finite.

    References:
        Fukumizu et al., "Kernel measures of conditional dependence", NeurIPS 2007.
    """
    x = flat(x, "x")
    _check_ridge(ridge)
    features = _standard(x)
    n, p = x.shape
    if p < n:
        factor = _whitened_factor(features, ridge)
        return matmul(factor.T, factor)
    # As I - ridge (K + ridge I)^-1, less the constant vector: more exact than solving for K.
    centring = jnp.eye(n, dtype=x.dtype) - 1 / n
    root, penalty = _ridged_root(matmul(features, features.T), p, ridge)
    inverse = jax.scipy.linalg.solve_triangular(root, centring, lower=True)
    kernel = centring - penalty * matmul(inverse.T, inverse)
    return jnp.where(jnp.any(features != 0), kernel, 0)


def cca_distance(x: Features, y: Features, **options: Any) -> Scalar:
    """`1 - cca_similarity(...)`, in [0, 1]."""
    return 1 - cca_similarity(x, y, **options)


def svcca_distance(x: Features, y: Features, **options: Any) -> Scalar:
    """`1 - svcca_similarity(...)`, in [0, 1]."""
    return 1 - svcca_similarity(x, y, **options)


def pwcca_distance(x: Features, y: Features, **options: Any) -> Scalar:
    """`1 - pwcca_similarity(...)`, in [0, 1]."""
    return 1 - pwcca_similarity(x, y, **options)


def ridge_cca_distance(x: Features, y: Features, **options: Any) -> Scalar:
    """`1 - ridge_cca(...)`, in [0, 1]."""
    return 1 - ridge_cca(x, y, **options)


def _whitened_factor(features: Float[Array, "n p"], ridge: float) -> Float[Array, "p n"]:
    """A with `A^T A` the whitened kernel of standard features."""
    root, _ = _ridged_root(matmul(features.T, features), features.shape[0], ridge)
    return jax.scipy.linalg.solve_triangular(root, features.T, lower=True)


def _ridged_root(
    gram: Float[Array, "k k"], length: int, ridge: float
) -> tuple[Float[Array, "k k"], Scalar]:
    """The Cholesky factor of a ridged Gram matrix of rows of a length, and the ridge in it."""
    # A ridge below the rounding of the Gram matrix would leave it indefinite, its root NaN.
    # The norm is above 1, or 0 for constant features, which need a ridge too.
    norm = jnp.maximum(jnp.linalg.norm(jax.lax.stop_gradient(gram)), 1)
    penalty = jnp.maximum(ridge, jnp.finfo(gram.dtype).eps * math.sqrt(length) * norm)
    return jnp.linalg.cholesky(gram + penalty * jnp.eye(len(gram), dtype=gram.dtype)), penalty


def _standard(x: Float[Array, "n p"]) -> Float[Array, "n p"]:
    """Centred features whose kernel has a mean eigenvalue of 1; 0 where constant or n < 3."""
    centred, resolution = _centred(x)
    trace = jnp.sum(jnp.square(centred))
    dead = (trace <= resolution**2) | (x.shape[0] < 3)
    return jnp.where(dead, 0, centred * jax.lax.rsqrt(jnp.where(dead, 1, trace) / x.shape[0]))


class _Directions(NamedTuple):
    """Centred features, their left singular vectors and values, and which of those count."""

    features: Float[Array, "n p"]
    vectors: Float[Array, "n k"]
    values: Float[Array, "k"]
    kept: Bool[Array, "k"]


def _directions(x: Float[Array, "n p"]) -> _Directions:
    centred, resolution = _centred(x)
    vectors, values, _ = jnp.linalg.svd(centred, full_matrices=False)
    # What rounding adds to singular values: to those of the input, and in the decomposition.
    tolerance = resolution + jnp.finfo(x.dtype).eps * math.sqrt(sum(x.shape)) * values[0]
    # The negated form keeps NaN, here and below, so that it shows in the result.
    return _Directions(centred, vectors, values, ~(values <= tolerance))


def _leading(a: _Directions, threshold: float, of: Share) -> _Directions:
    """Keeps the fewest leading directions whose share of the sum reaches the threshold."""
    shares = a.values if of == "values" else jnp.square(a.values)
    # Kept while what remains from here on is more than may be left out. Summed from the small
    # end, which is exact enough for a threshold of 1.
    remaining = jnp.cumsum(shares[::-1])[::-1]
    return a._replace(kept=a.kept & ~(remaining <= (1 - threshold) * remaining[0]))


def _cosines(a: _Directions, b: _Directions) -> Float[Array, "k1 k2"]:
    return matmul(jnp.where(a.kept, a.vectors, 0).T, jnp.where(b.kept, b.vectors, 0))


def _count(a: _Directions, b: _Directions) -> Array:
    return jnp.minimum(jnp.sum(a.kept), jnp.sum(b.kept))


def _correlations(a: _Directions, b: _Directions) -> Float[Array, "k"]:
    values = jnp.linalg.svd(_cosines(a, b), compute_uv=False)
    return jnp.where(jnp.arange(values.size) < _count(a, b), jnp.clip(values, 0, 1), 0)


def _mean_correlation(a: _Directions, b: _Directions, squared: bool) -> Scalar:
    values = _correlations(a, b)
    return jnp.sum(values**2 if squared else values) / jnp.maximum(_count(a, b), 1)


def _projection_weighted(a: _Directions, b: _Directions) -> Scalar:
    # Directions that do not count get a singular value of 2, above all cosines: they come
    # first, and never mix with those that count but are uncorrelated with b.
    apart = jnp.diag(jnp.where(a.kept, 0, 2).astype(a.vectors.dtype))
    left, values, _ = jnp.linalg.svd(
        jnp.concatenate([_cosines(a, b), apart], axis=1), full_matrices=False
    )
    dropped = jnp.sum(~a.kept)
    left, values = jnp.roll(left, -dropped, axis=1), jnp.roll(values, -dropped)
    variates = matmul(a.vectors, left)
    weights = jnp.sum(jnp.abs(matmul(variates.T, a.features)), axis=1)
    weights = jnp.where(jnp.arange(values.size) < _count(a, b), weights, 0)
    total = jnp.sum(weights)
    weighted = jnp.sum(weights * jnp.clip(values, 0, 1))
    return jnp.clip(weighted / jnp.where(total == 0, 1, total), 0, 1)


def _centred(x: Float[Array, "n p"]) -> tuple[Float[Array, "n p"], Scalar]:
    """Features centred and divided by the largest entry, and the rounding of their norm.

    Every measure here is blind to the scale, so that is no part of any gradient.
    """
    fixed = jax.lax.stop_gradient(x)
    scale = jnp.max(jnp.abs(fixed))
    scale = jnp.where(scale == 0, 1, scale)
    resolution = jnp.finfo(x.dtype).eps * jnp.linalg.norm(fixed / scale)
    # The second pass takes off the rounding of the first mean: constants end at 0.
    centred = x / scale - jnp.mean(x / scale, axis=0)
    return centred - jnp.mean(centred, axis=0), resolution


def _pair(
    x: Array, y: Array, axis_name: str | None
) -> tuple[Float[Array, "n p1"], Float[Array, "n p2"]]:
    x, y = (gather_examples(flat(each, name), axis_name) for each, name in ((x, "x"), (y, "y")))
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"x holds {x.shape[0]} examples and y holds {y.shape[0]}, expected the same number: "
            "compare features of the same examples in the same order"
        )
    dtype = jnp.result_type(x, y)
    return x.astype(dtype), y.astype(dtype)


def _narrow_pair(
    x: Array, y: Array, axis_name: str | None
) -> tuple[Float[Array, "n p1"], Float[Array, "n p2"]]:
    x, y = _pair(x, y, axis_name)
    for name, (n, p) in (("x", x.shape), ("y", y.shape)):
        if p > n - 2:
            raise ValueError(
                f"{name} has {p} features for {n} examples, expected at most n - 2 = {n - 2} (more "
                "correlate perfectly with anything): average maps over positions, take more "
                "examples, or use svcca_similarity"
            )
    return x, y


def _check_ridge(ridge: float) -> None:
    if not 0 < ridge < math.inf:
        raise ValueError(f"{ridge=}, expected a positive finite number of mean eigenvalues")
