"""Weights, masks and comparisons for the tests of tangent kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from ntt_sparse.ntk import empirical_ntk

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


def assert_equals_jacobian_method(network, weights, x1, x2, **options):
    """Value and gradient, half of the weights masked."""
    masks = masks_like(weights)

    def value_and_grad(method):
        def objective(w):
            arguments = {"masks": masks, "method": method, **options}
            value = empirical_ntk(network, w, x1, x2, **arguments)
            return jnp.sum(jnp.sin(value)), value

        return jax.jit(jax.value_and_grad(objective, has_aux=True))(weights)

    (_, value), grad = value_and_grad("structured")
    (_, expected), expected_grad = value_and_grad("jacobian")
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    for name, leaf in expected_grad.items():
        bound = 1e-11 * np.abs(leaf).max()
        np.testing.assert_allclose(grad[name], leaf, rtol=0, atol=bound, err_msg=name)
