"""Ridge CCA by its formula, its limits and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cca_problems import (
    ROUNDING,
    arrays,
    correlated,
    cosine,
    eigen_cca,
    precision,
    ridged,
    x64,
)

from ntt_sparse.similarity import cca

ridge_value = jax.jit(cca.ridge_cca, static_argnames="ridge")
ridge_gradients = jax.jit(jax.value_and_grad(cca.ridge_cca, argnums=(0, 1)))


@functools.partial(jax.jit, static_argnums=2)
def kernel_and_values(x, y, ridge):
    """The kernel of x, and its similarity to y and to itself."""
    pairs = ((x, y), (x, x))
    kernel = cca.whitened_kernel(x, ridge=ridge)
    return kernel, *(cca.ridge_cca(*pair, ridge=ridge) for pair in pairs)


# Ridge CCA: features in p x p matrices (5), n x n (100), and one of each.

sizes = pytest.mark.parametrize(("p1", "p2"), [(5, 7), (100, 80), (5, 100), (100, 5)])


@pytest.mark.variants(6)
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
    kernel, value, itself = kernel_and_values(*features, ridge)
    np.testing.assert_allclose(kernel, a, rtol=0, atol=tolerance)
    np.testing.assert_allclose(kernel, kernel.T, rtol=0, atol=tolerance)
    np.testing.assert_allclose(np.sum(np.asarray(kernel), axis=0), 0, rtol=0, atol=64 * tolerance)
    np.testing.assert_allclose(value, cosine(a, b), rtol=0, atol=tolerance)
    np.testing.assert_allclose(itself, 1, rtol=0, atol=ROUNDING[dtype])


@x64
@pytest.mark.parametrize(("p1", "p2"), [(5, 5), (5, 7)])
def test_ridge_cca_without_ridge_is_the_mean_square(p1, p2):
    x, y = correlated(p1=p1, p2=p2)
    ridge = 1e-9
    value = ridge_value(*arrays("float64", x, y), ridge=ridge)
    expected = np.sum(eigen_cca(x, y)[0] ** 2) / np.sqrt(p1 * p2)
    # Each side is damped by k / (k + ridge * mean) in product and norm; k > mean / 100 here.
    squares = [np.linalg.svd(z - z.mean(0), compute_uv=False) ** 2 for z in (x, y)]
    damping = sum(2 * ridge * np.sum(k) / len(x) / k[-1] for k in squares)
    np.testing.assert_allclose(value, expected, rtol=damping + ROUNDING["float64"])
    if p1 == p2:
        squared = cca.cca_similarity(*arrays("float64", x, y), squared=True)
        np.testing.assert_allclose(value, squared, rtol=damping + ROUNDING["float64"])


@pytest.mark.variants(2)
@x64
@sizes
def test_ridge_cca_with_a_large_ridge_is_linear_cka(p1, p2):
    x, y = correlated(p1=p1, p2=p2)
    ridge, n = 1e7, len(x)
    kernels = [(z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y)]
    value = ridge_value(*arrays("float64", x, y), ridge=ridge)
    # 1 / (k + ridge) varies by k / ridge < n / ridge, in product and norm of either side.
    np.testing.assert_allclose(value, cosine(*kernels), rtol=4 * n / ridge)


@pytest.mark.variants(2)
@x64
@sizes
def test_ridge_gradient_by_finite_differences(p1, p2):
    rng = np.random.default_rng(3)
    x, y = correlated(n=12, p1=p1, p2=p2)
    _, gradients = ridge_gradients(*arrays("float64", x, y))
    step = 1e-4
    for _ in range(5):
        dx, dy = (rng.normal(size=z.shape) / np.sqrt(z.size) for z in (x, y))
        # Differences to fourth order: truncation of step^4 = 1e-16, rounding of 1e-15 / step.
        ends = [
            float(ridge_value(jnp.asarray(x + t * dx), jnp.asarray(y + t * dy)))
            for t in step * np.array([-2, -1, 1, 2])
        ]
        difference = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * step)
        slope = np.vdot(gradients[0], dx) + np.vdot(gradients[1], dy)
        np.testing.assert_allclose(slope, difference, rtol=0, atol=1e-10)


@pytest.mark.variants(2)
@x64
@sizes
def test_ridge_gradient_in_single_precision(p1, p2):
    features = correlated(n=12, p1=p1, p2=p2)
    (_, (single, _)), (_, (double, _)) = (
        ridge_gradients(*arrays(dtype, *features)) for dtype in ("float32", "float64")
    )
    assert single.dtype == jnp.float32
    # The solve in the gradient has the condition number of the kernel once more.
    atol = ROUNDING["float32"] * float(jnp.max(jnp.abs(double)))
    np.testing.assert_allclose(single, double, rtol=0, atol=10 * atol)


@jax.jit
def value_gradients_and_kernel(x, y):
    return *jax.value_and_grad(cca.ridge_cca, argnums=(0, 1))(x, y), cca.whitened_kernel(x)


# One or two examples; then constants in p x p matrices, beside ones in n x n, and in these.
@pytest.mark.variants(5)
@x64
@precision
@pytest.mark.parametrize(
    ("shape", "width"), [((1, 3), 2), ((2, 3), 2), ((8, 3), 2), ((8, 3), 40), ((8, 30), 40)]
)
def test_nothing_to_compare_has_value_and_gradient_zero(dtype, shape, width):
    rng = np.random.default_rng(0)
    n = shape[0]
    for fill in (0.0, 0.1, 1e3 / 3) if n > 2 else (rng.normal(size=shape), 1.0):
        x, y = arrays(dtype, np.broadcast_to(fill, shape), rng.normal(size=(n, width)))
        value, gradients, kernel = value_gradients_and_kernel(x, y)
        assert value == 0
        np.testing.assert_array_equal(gradients[0], np.zeros(x.shape))
        np.testing.assert_array_equal(gradients[1], np.zeros(y.shape))
        np.testing.assert_array_equal(kernel, np.zeros((n, n)))


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


# Errors


@pytest.mark.parametrize("ridge", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("width", [2, 20])
def test_ridges_are_positive(ridge, width):
    x = jnp.ones((6, width))
    with pytest.raises(ValueError, match="expected a positive finite number"):
        cca.ridge_cca(x, x, ridge=ridge)
    with pytest.raises(ValueError, match="expected a positive finite number"):
        cca.whitened_kernel(x, ridge=ridge)
