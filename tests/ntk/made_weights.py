"""Weights, masks and comparisons for the tests of tangent kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from ntt_sparse.ntk import empirical_ntk, structured

LEAVES = {
    "first": (6, 5),
    "second": (5, 4),
    "third": (4, 3),
    "wide": (3, 5),
    "row": (1, 4),
    "column": (4, 1),
}


def matrices(seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in LEAVES.items()}


def masks_like(weights, density=0.5, seed=1):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.random(w.shape) < density) for name, w in weights.items()}


def as_flat(network, names):
    return lambda leaves, x: network(dict(zip(names, leaves, strict=True)), x)


def value_and_grad(network, weights, x1, x2, **options):
    def objective(w):
        value = empirical_ntk(network, w, x1, x2, **options)
        return jnp.sum(jnp.sin(value)), value

    (_, value), grad = jax.jit(jax.value_and_grad(objective, has_aux=True))(weights)
    return value, grad


def assert_equal(actual, expected):
    """Of values and gradients, each relative to its largest entry."""
    (value, grad), (expected_value, expected_grad) = actual, expected
    bound = 1e-12 * np.abs(expected_value).max()
    np.testing.assert_allclose(value, expected_value, rtol=0, atol=bound)
    for name, leaf in expected_grad.items():
        bound = 1e-11 * np.abs(leaf).max()
        np.testing.assert_allclose(grad[name], leaf, rtol=0, atol=bound, err_msg=name)


def assert_equals_jacobian_method(
    network, weights, x1, x2, memory_limits=(structured.MEMORY_LIMIT,), **options
):
    """Value and gradient within each limit, half of the weights masked."""
    arguments = network, weights, x1, x2
    options = {"masks": masks_like(weights), **options}
    expected = value_and_grad(*arguments, method="jacobian", **options)
    for limit in memory_limits:
        ours = value_and_grad(*arguments, method="structured", memory_limit=limit, **options)
        assert_equal(ours, expected)
