"""Noise on gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.training.transforms import gradient_noise


def test_noise_is_in_proportion_to_each_gradient():
    grads = {
        "a": jnp.full(40_000, 3.0),
        "b": 1e-4 * jax.random.normal(jax.random.key(0), (40_000,)),
    }
    transform = gradient_noise(0.05, jax.random.key(1))
    noisy, _ = transform.update(grads, transform.init(grads))
    for name, rms in (("a", 3.0), ("b", 1e-4)):
        noise = np.asarray(noisy[name] - grads[name], float)
        # 40,000 draws: the spread of their standard deviation is 0.35 %.
        np.testing.assert_allclose(noise.std(), 0.05 * rms, rtol=0.03)
        assert abs(noise.mean()) < 4 * 0.05 * rms / 200


def test_small_gradients_of_half_precision_get_noise():
    """Their squares are zero in float16."""
    grads = {"a": jnp.full(10_000, 1e-5, jnp.float16)}
    transform = gradient_noise(0.5, jax.random.key(1))
    noisy, _ = transform.update(grads, transform.init(grads))
    assert noisy["a"].dtype == jnp.float16
    noise = np.asarray(noisy["a"], float) - np.asarray(grads["a"], float)
    np.testing.assert_allclose(noise.std(), 0.5 * float(grads["a"][0]), rtol=0.05)


def test_noise_is_another_in_each_step_and_leaf_and_the_same_for_a_key():
    grads = {"a": jnp.ones(5), "b": jnp.ones(5), "c": jnp.zeros(3)}
    transform = gradient_noise(0.1, jax.random.key(1))
    state = transform.init(grads)
    first, state = transform.update(grads, state)
    second, _ = transform.update(grads, state)
    again, _ = transform.update(grads, gradient_noise(0.1, jax.random.key(1)).init(grads))
    assert not np.any(first["a"] == first["b"])
    assert not np.any(first["a"] == second["a"])
    jax.tree.map(np.testing.assert_array_equal, first, again)
    np.testing.assert_array_equal(first["c"], np.zeros(3))


def test_refusals():
    for fraction in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected 0 or more"):
            gradient_noise(fraction, jax.random.key(0))
    with pytest.raises(ValueError, match="needs a key"):
        gradient_noise(0.1, None).init({})
