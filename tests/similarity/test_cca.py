import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ntt_sparse.similarity import cca

# Rounding of one operation. A condition number of about 10 in the features below and sums over
# at most 64 examples bring it to about 64 * 10 roundings, to 1000 with the references' own.
ROUNDING = {"float32": 1000 * 2.0**-24, "float64": 1000 * 2.0**-53}

ridge_value = jax.jit(cca.ridge_cca, static_argnames="ridge")
ridge_gradients = jax.jit(jax.value_and_grad(cca.ridge_cca, argnums=(0, 1)))

precision = pytest.mark.parametrize("dtype", ["float32", "float64"])
x64 = pytest.mark.usefixtures("x64")


def correlated(seed=0, n=64, p1=5, p2=7):
    """Features that share two directions, with noise; off centre."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, 2))
    x = shared @ rng.normal(size=(2, p1)) + rng.normal(size=(n, p1)) + 0.5
    y = shared @ rng.normal(size=(2, p2)) + rng.normal(size=(n, p2)) - 2.0
    return x, y


def signals(n, k, seed=0):
    """k orthonormal n-vectors with mean 0, as columns."""
    rng = np.random.default_rng(seed)
    return np.linalg.qr(np.c_[np.ones(n), rng.normal(size=(n, k))])[0][:, 1:]


def known(correlations, scales, n=64, seed=0):
    """Features of one signal each, with given canonical correlations and scales of x."""
    rho, k = np.array(correlations), len(correlations)
    basis = signals(n, 2 * k, seed)
    return basis[:, :k] * scales, basis[:, :k] * rho + basis[:, k:] * np.sqrt(1 - rho**2)


def invertible(rng, p):
    """A matrix of condition number at most 4."""
    left, right = (np.linalg.qr(rng.normal(size=(p, p)))[0] for _ in range(2))
    return left * rng.uniform(0.5, 2, p) @ right


def arrays(dtype, *values):
    return [jnp.asarray(value, dtype) for value in values]


# References: the generalised eigenproblem of covariances, by general solvers.


def eigen_cca(x, y):
    """Canonical correlations, descending, and the coefficients of x, by S_x^-1 S_xy S_y^-1 S_yx."""
    x, y = x - x.mean(0), y - y.mean(0)
    operator = np.linalg.solve(x.T @ x, x.T @ y) @ np.linalg.solve(y.T @ y, y.T @ x)
    squares, coefficients = np.linalg.eig(operator)
    order = np.argsort(-squares.real)[: min(x.shape[1], y.shape[1])]
    return np.sqrt(squares.real[order].clip(0)), coefficients.real[:, order]


def eigen_pwcca(x, y):
    rho, coefficients = eigen_cca(x, y)
    variates = (x - x.mean(0)) @ coefficients
    variates /= np.linalg.norm(variates, axis=0)
    weights = [sum(abs(h @ feature) for feature in x.T) for h in variates.T]
    return np.average(rho, weights=weights)


def leading(x, threshold, power):
    x = x - x.mean(0)
    squares, vectors = np.linalg.eigh(x.T @ x)
    shares = np.sqrt(squares.clip(0)) ** power
    k = 1
    while sum(shares[-k:]) < threshold * sum(shares):
        k += 1
    return x @ vectors[:, -k:]


def cosine(a, b):
    return np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))


def ridged(x, ridge):
    n = len(x)
    centring = np.eye(n) - np.ones((n, n)) / n
    kernel = centring @ x @ x.T @ centring
    return kernel @ np.linalg.inv(kernel + ridge * np.trace(kernel) / n * np.eye(n))


# Canonical correlations


@x64
@precision
def test_correlations_are_those_of_the_eigenproblem_and_of_subspace_angles(dtype):
    x, y = correlated()
    rho = cca.canonical_correlations(*arrays(dtype, x, y))
    assert rho.dtype == dtype
    atol = ROUNDING[dtype]
    np.testing.assert_allclose(rho, eigen_cca(x, y)[0], rtol=0, atol=atol)
    angles = scipy.linalg.subspace_angles(x - x.mean(0), y - y.mean(0))
    np.testing.assert_allclose(rho, np.cos(angles)[::-1], rtol=0, atol=atol)
    exchanged = cca.canonical_correlations(*arrays(dtype, y, x))
    np.testing.assert_allclose(exchanged, rho, rtol=0, atol=atol)


@x64
@precision
def test_signals_of_known_correlation(dtype):
    rho, rng = np.array([0.9, 0.5, 0.2]), np.random.default_rng(1)
    x, y = known(rho, [1.0, 2.0, 4.0])
    mixed = arrays(dtype, x @ invertible(rng, 3) + 3, y @ invertible(rng, 3) - 1)
    plain = arrays(dtype, x, y)
    expected = {
        cca.canonical_correlations: (mixed, rho),
        cca.cca_similarity: (mixed, 1.6 / 3),
        # The variates are the features, so the weights are their scales: 1, 2 and 4.
        cca.pwcca_similarity: (plain, (0.9 + 2 * 0.5 + 4 * 0.2) / 7),
    }
    for function, (features, value) in expected.items():
        np.testing.assert_allclose(function(*features), value, rtol=0, atol=ROUNDING[dtype])
    squared = cca.cca_similarity(*mixed, squared=True)
    np.testing.assert_allclose(squared, (0.81 + 0.25 + 0.04) / 3, rtol=0, atol=ROUNDING[dtype])
    # From the other side all weights are 1.
    both = cca.pwcca_similarity(*plain, symmetric=True)
    np.testing.assert_allclose(both, (2.7 / 7 + 1.6 / 3) / 2, rtol=0, atol=ROUNDING[dtype])


@x64
@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_invariances(seed):
    rng = np.random.default_rng(seed)
    x, y = correlated(seed, n=32, p1=4, p2=3)
    a, b = x @ invertible(rng, 4) * 1e-3 + rng.normal(size=4) * 1e-3, 50 * (y @ invertible(rng, 3))
    x, y, a, b = arrays("float64", x, y, a, b)
    rotated = x @ np.linalg.qr(rng.normal(size=(4, 4)))[0] * 1e4 + 1e4
    cases = [
        (cca.canonical_correlations, a, b),
        (cca.cca_similarity, a, b),
        (cca.svcca_similarity, rotated, y * 7 + 1),
        (cca.pwcca_similarity, 1e3 * x + 1e3, b),
        (cca.ridge_cca, rotated, y * 7 + 1),
    ]
    for function, changed_x, changed_y in cases:
        # The maps multiply condition numbers by 4 on either side.
        atol = 16 * ROUNDING["float64"]
        np.testing.assert_allclose(function(changed_x, changed_y), function(x, y), atol=atol)


# Rank deficiency


@x64
@precision
def test_duplicate_and_constant_columns_add_nothing(dtype):
    x, y = correlated()
    wide = np.c_[x, x[:, :2], np.full(len(x), 0.1), x[:, 0] - 3 * x[:, 1], np.zeros(len(x))]
    rho = cca.canonical_correlations(*arrays(dtype, wide, y))
    assert rho.shape == (7,)
    expected = np.r_[eigen_cca(x, y)[0], 0, 0]
    np.testing.assert_allclose(rho, expected, rtol=0, atol=ROUNDING[dtype])
    for features in ((wide, y), (y, wide)):
        mean = cca.cca_similarity(*arrays(dtype, *features))
        np.testing.assert_allclose(mean, expected[:5].mean(), rtol=0, atol=ROUNDING[dtype])
    alike = cca.canonical_correlations(*arrays(dtype, wide, x))
    np.testing.assert_allclose(alike, np.ones(5), rtol=0, atol=ROUNDING[dtype])
    assert np.max(alike) <= 1


@x64
@precision
def test_projection_weights_of_deficient_and_uncorrelated_directions(dtype):
    # Variates e1 (correlation 1) and e2 (correlation 0). The features e1, e2, e1, e1 + e2 weigh
    # them 3 and 2, wherever the two dimensions that are not there end up in the decomposition.
    for seed in range(5):
        e1, e2, e3 = signals(16, 3, seed).T
        x, y = np.c_[e1, e2, e1, e1 + e2], np.c_[e1, e3]
        value = cca.pwcca_similarity(*arrays(dtype, x, y))
        np.testing.assert_allclose(value, 3 / 5, rtol=0, atol=ROUNDING[dtype])


@precision
@x64
def test_constant_features_are_like_nothing(dtype):
    _, y = correlated(n=49, p2=3)
    columns = [1.0, 0.1, 1 / 3, -0.7]  # Their means over 49 examples are rounded.
    functions = (
        cca.cca_similarity,
        cca.svcca_similarity,
        cca.pwcca_similarity,
        cca.ridge_cca,
        lambda x, y: cca.pwcca_similarity(x, y, symmetric=True),
    )
    for value in (0.0, 0.1, 1e3 / 3, 1e-25, 1e25):
        x, other = arrays(dtype, np.tile(columns, (49, 1)) * value, y)
        for function in functions:
            assert function(x, other) == function(other, x) == function(x, x) == 0
        np.testing.assert_array_equal(cca.canonical_correlations(x, other), np.zeros(3))


def test_features_that_are_not_finite_give_nan():
    for value in (np.nan, np.inf):
        x, y = arrays("float32", *correlated(n=16, p1=3, p2=3))
        x = x.at[2, 1].set(value)
        for function in (
            cca.cca_similarity,
            cca.svcca_similarity,
            cca.pwcca_similarity,
            cca.ridge_cca,
        ):
            assert np.isnan(function(x, y)) and np.isnan(function(y, x))


# SVCCA


@x64
@pytest.mark.parametrize(
    ("threshold", "of", "count"),
    [
        (0.5, "values", 1),  # Shares of singular values: 0.6, 0.3, 0.1.
        (0.59, "values", 1),  # The first alone exceeds it, and is kept.
        (0.61, "values", 2),
        (0.89, "values", 2),
        (0.91, "values", 3),
        (1.0, "values", 3),
        (0.77, "variance", 1),  # Of 36 + 9 + 1: 0.783, 0.196, 0.022.
        (0.79, "variance", 2),
        (0.97, "variance", 2),
        (0.98, "variance", 3),
        (1.0, "variance", 3),
    ],
)
def test_svcca_keeps_the_fewest_directions_that_reach_the_threshold(threshold, of, count):
    rho = [0.9, 0.5, 0.2]
    scales = np.array([6.0, 3.0, 1.0])
    x, y = known(rho, scales)
    x, y = arrays("float64", x, y * scales)
    expected = np.mean(rho[:count])
    value = cca.svcca_similarity(x, y, threshold=threshold, of=of)
    np.testing.assert_allclose(value, expected, rtol=0, atol=ROUNDING["float64"])
    squared = cca.svcca_similarity(x, y, threshold=threshold, of=of, squared=True)
    np.testing.assert_allclose(squared, np.mean(np.square(rho[:count])), rtol=0, atol=1e-12)


@x64
@precision
@pytest.mark.parametrize("of", ["values", "variance"])
def test_svcca_is_cca_of_what_is_kept(dtype, of):
    for p1 in (5, 100):  # 100 features of 64 examples have to be cut.
        x, y = correlated(p1=p1)
        threshold = 0.9 if p1 < 64 else 0.5
        power = 1 if of == "values" else 2
        kept = [leading(z, threshold, power) for z in (x, y)]
        expected = np.mean(eigen_cca(*kept)[0])
        value = cca.svcca_similarity(*arrays(dtype, x, y), threshold=threshold, of=of)
        np.testing.assert_allclose(value, expected, rtol=0, atol=ROUNDING[dtype])


# Projection weights


@x64
@precision
def test_pwcca_is_that_of_the_eigenproblem(dtype):
    x, y = correlated()
    forth, back = eigen_pwcca(x, y), eigen_pwcca(y, x)
    x, y = arrays(dtype, x, y)
    # Variates turn by rounding over the gap between correlations, here above 0.02.
    atol = ROUNDING[dtype] / 0.02
    assert abs(forth - back) > atol
    np.testing.assert_allclose(cca.pwcca_similarity(x, y), forth, rtol=0, atol=atol)
    np.testing.assert_allclose(cca.pwcca_similarity(y, x), back, rtol=0, atol=atol)
    both = cca.pwcca_similarity(x, y, symmetric=True)
    np.testing.assert_allclose(both, (forth + back) / 2, rtol=0, atol=atol)


# Ridge CCA: features in p x p matrices (5), n x n (100), and one of each.

sizes = pytest.mark.parametrize(("p1", "p2"), [(5, 7), (100, 80), (5, 100), (100, 5)])


@x64
@precision
@sizes
@pytest.mark.parametrize("ridge", [1e-2, 0.1, 10.0])
def test_ridge_cca_by_its_formula(dtype, p1, p2, ridge):
    x, y = correlated(p1=p1, p2=p2)
    a, b = ridged(x, ridge), ridged(y, ridge)
    features = arrays(dtype, x, y)
    # The condition number of a ridged kernel is below n / ridge, of a tenth of n over 0.1 here.
    tolerance = ROUNDING[dtype] * max(1, 0.1 / ridge)
    kernel = cca.whitened_kernel(features[0], ridge=ridge)
    np.testing.assert_allclose(kernel, a, rtol=0, atol=tolerance)
    np.testing.assert_allclose(kernel, kernel.T, rtol=0, atol=tolerance)
    np.testing.assert_allclose(np.sum(kernel, axis=0), 0, rtol=0, atol=64 * tolerance)
    value = cca.ridge_cca(*features, ridge=ridge)
    np.testing.assert_allclose(value, cosine(a, b), rtol=0, atol=tolerance)
    itself = cca.ridge_cca(features[0], features[0], ridge=ridge)
    np.testing.assert_allclose(itself, 1, rtol=0, atol=ROUNDING[dtype])


@x64
@pytest.mark.parametrize(("p1", "p2"), [(5, 5), (5, 7)])
def test_ridge_cca_without_ridge_is_the_mean_square(p1, p2):
    x, y = correlated(p1=p1, p2=p2)
    ridge = 1e-9
    value = cca.ridge_cca(*arrays("float64", x, y), ridge=ridge)
    expected = np.sum(eigen_cca(x, y)[0] ** 2) / np.sqrt(p1 * p2)
    # Each side is damped by k / (k + ridge * mean) in product and norm; k > mean / 100 here.
    squares = [np.linalg.svd(z - z.mean(0), compute_uv=False) ** 2 for z in (x, y)]
    damping = sum(2 * ridge * np.sum(k) / len(x) / k[-1] for k in squares)
    np.testing.assert_allclose(value, expected, rtol=damping + ROUNDING["float64"])
    if p1 == p2:
        squared = cca.cca_similarity(*arrays("float64", x, y), squared=True)
        np.testing.assert_allclose(value, squared, rtol=damping + ROUNDING["float64"])


@x64
@sizes
def test_ridge_cca_with_a_large_ridge_is_linear_cka(p1, p2):
    x, y = correlated(p1=p1, p2=p2)
    ridge, n = 1e7, len(x)
    kernels = [(z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y)]
    value = cca.ridge_cca(*arrays("float64", x, y), ridge=ridge)
    # 1 / (k + ridge) varies by k / ridge < n / ridge, in product and norm of either side.
    np.testing.assert_allclose(value, cosine(*kernels), rtol=4 * n / ridge)


@x64
@sizes
def test_ridge_gradient_by_finite_differences(p1, p2):
    rng = np.random.default_rng(3)
    x, y = arrays("float64", *correlated(n=12, p1=p1, p2=p2))
    _, gradients = ridge_gradients(x, y)
    step = 1e-4
    for _ in range(5):
        dx, dy = (jnp.asarray(rng.normal(size=z.shape) / np.sqrt(z.size)) for z in (x, y))
        # Differences to fourth order: truncation of step^4 = 1e-16, rounding of 1e-15 / step.
        ends = [float(ridge_value(x + t * dx, y + t * dy)) for t in step * np.array([-2, -1, 1, 2])]
        difference = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * step)
        slope = jnp.sum(gradients[0] * dx) + jnp.sum(gradients[1] * dy)
        np.testing.assert_allclose(slope, difference, rtol=0, atol=1e-10)


@x64
@sizes
def test_ridge_gradient_in_single_precision(p1, p2):
    features = correlated(p1=p1, p2=p2)
    (_, (single, _)), (_, (double, _)) = (
        ridge_gradients(*arrays(dtype, *features)) for dtype in ("float32", "float64")
    )
    assert single.dtype == jnp.float32
    # The solve in the gradient has the condition number of the kernel once more.
    atol = ROUNDING["float32"] * float(jnp.max(jnp.abs(double)))
    np.testing.assert_allclose(single, double, rtol=0, atol=10 * atol)


@x64
@precision
@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (8, 3), (8, 30)])
def test_nothing_to_compare_has_value_and_gradient_zero(dtype, shape):
    rng = np.random.default_rng(0)
    n = shape[0]
    fills = (0.0, 0.1, 1e3 / 3) if n > 2 else (rng.normal(size=shape), 1.0)
    for width in (2, 40) if n > 2 else (2,):
        for fill in fills:
            x, y = arrays(dtype, np.broadcast_to(fill, shape), rng.normal(size=(n, width)))
            value, gradients = ridge_gradients(x, y)
            assert value == 0
            np.testing.assert_array_equal(gradients[0], np.zeros(x.shape))
            np.testing.assert_array_equal(gradients[1], np.zeros(y.shape))
            np.testing.assert_array_equal(cca.whitened_kernel(x), np.zeros((n, n)))


def test_dead_unit_in_a_live_layer_has_finite_gradient():
    x, y = arrays("float32", *correlated(n=16))
    x = x.at[:, 1].set(0)
    _, (gradient, _) = ridge_gradients(x, y)
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)


@pytest.mark.parametrize(("n", "p"), [(8, 4000), (16, 20000), (300, 20)])
def test_a_ridge_below_rounding_gives_no_nan(n, p):
    rng = np.random.default_rng(0)
    rank_one = np.outer(rng.normal(size=n), rng.normal(size=p))
    x, y = arrays("float32", rank_one, rng.normal(size=(n, 3)))
    loss = jax.jit(jax.value_and_grad(lambda x: cca.ridge_cca(x, y, ridge=1e-30)))
    value, gradient = loss(x)
    assert 0 <= value <= 1 and np.all(np.isfinite(gradient))


# Everything


every = pytest.mark.parametrize(
    "function",
    [
        cca.canonical_correlations,
        cca.cca_similarity,
        cca.svcca_similarity,
        cca.pwcca_similarity,
        cca.ridge_cca,
    ],
)


@x64
@every
def test_jit_and_vmap(function):
    pairs = [correlated(seed, n=32, p1=4, p2=3) for seed in range(3)]
    # Members differ in rank and in what is kept.
    pairs[1][0][:, 1:] = pairs[1][0][:, :1]
    pairs[2][0][:, 0] *= 1000
    expected = np.array([function(*arrays("float64", *pair)) for pair in pairs])
    xs, ys = (jnp.asarray(np.stack(side)) for side in zip(*pairs, strict=True))
    batched = jax.jit(jax.vmap(function))(xs, ys)
    np.testing.assert_allclose(batched, expected, rtol=0, atol=ROUNDING["float64"])


@every
def test_maps_are_flattened_and_half_precision_is_computed_in_single(function):
    x, y = arrays("bfloat16", *correlated(p1=6, p2=4))
    expected = function(x.astype(jnp.float32), y.astype(jnp.float32))
    value = function(x.reshape(64, 3, 2), y.reshape(64, 2, 1, 2))
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, expected)


def test_distances():
    x, y = arrays("float32", *correlated())
    svcca = {"threshold": 0.8, "of": "variance", "squared": True}
    pairs = [
        (cca.cca_distance(x, y), cca.cca_similarity(x, y)),
        (cca.cca_distance(x, y, squared=True), cca.cca_similarity(x, y, squared=True)),
        (cca.svcca_distance(x, y, **svcca), cca.svcca_similarity(x, y, **svcca)),
        (cca.pwcca_distance(x, y), cca.pwcca_similarity(x, y)),
        (
            cca.pwcca_distance(x, y, symmetric=True),
            cca.pwcca_similarity(x, y, symmetric=True),
        ),
        (cca.ridge_cca_distance(x, y, ridge=0.5), cca.ridge_cca(x, y, ridge=0.5)),
    ]
    for distance, similarity in pairs:
        assert 0 < similarity < 1
        np.testing.assert_array_equal(distance, 1 - similarity)


# Errors


@every
def test_numbers_of_examples_must_agree(function):
    with pytest.raises(ValueError, match="x holds 16 examples and y holds 15"):
        function(jnp.ones((16, 2)), jnp.ones((15, 2)))
    for shape in ((16, 0), (0, 2)):
        with pytest.raises(ValueError, match="at least one example with features"):
            function(jnp.ones((16, 2)), jnp.ones(shape))


@pytest.mark.parametrize(
    "function", [cca.canonical_correlations, cca.cca_similarity, cca.pwcca_similarity]
)
def test_as_many_features_as_examples_are_refused(function):
    x, y = jax.random.normal(jax.random.key(0), (2, 6, 5))
    np.testing.assert_array_equal(function(x[:, :4], y[:, :4]).dtype, jnp.float32)
    for features in ((x, y[:, :2]), (y[:, :2], x)):
        with pytest.raises(ValueError, match="has 5 features for 6 examples, expected at most n -"):
            function(*features)


@pytest.mark.parametrize("threshold", [0.0, 1.01, -1.0, np.nan])
def test_thresholds_are_shares(threshold):
    x = jnp.ones((6, 2))
    with pytest.raises(ValueError, match="expected a share in"):
        cca.svcca_similarity(x, x, threshold=threshold)


def test_svcca_needs_three_examples():
    with pytest.raises(ValueError, match="2 examples, expected 3 or more"):
        cca.svcca_similarity(jnp.ones((2, 2)), jnp.ones((2, 2)))


@pytest.mark.parametrize("ridge", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("width", [2, 20])
def test_ridges_are_positive(ridge, width):
    x = jnp.ones((6, width))
    with pytest.raises(ValueError, match="expected a positive finite number"):
        cca.ridge_cca(x, x, ridge=ridge)
    with pytest.raises(ValueError, match="expected a positive finite number"):
        cca.whitened_kernel(x, ridge=ridge)
