"""Dropout whose draws follow the neurons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ntt_sparse.models.dropout import COLLECTION, Dropout


def dropped(x, variables=None, *, rate=0.3, seed=0):
    state = {COLLECTION: variables} if variables else {}
    rngs = {"dropout": jax.random.key(seed)}
    return Dropout(rate).apply(state, x, deterministic=False, rngs=rngs)


def test_without_names_it_is_that_of_flax():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)))
    expected = nn.Dropout(0.3).apply(
        {}, x, deterministic=False, rngs={"dropout": jax.random.key(0)}
    )
    np.testing.assert_array_equal(dropped(x), expected)
    np.testing.assert_array_equal(Dropout(0.3).apply({}, x, deterministic=True), x)
    np.testing.assert_array_equal(dropped(x, rate=0.0), x)


@pytest.mark.parametrize("shape", [(4, 9), (3, 2, 2, 9)])
def test_channels_that_stay_are_dropped_as_in_the_whole_network(shape):
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, size=shape))
    whole = dropped(x, {"units": jnp.arange(9)})
    kept = jnp.array([7, 2, 3])
    small = dropped(x[..., kept], {"units": kept})
    np.testing.assert_array_equal(small, whole[..., kept])
    # Otherwise nothing would be dropped, or all, or all channels alike.
    zero = np.asarray(whole == 0).reshape(-1, 9)
    assert 0 < zero.mean() < 1
    assert not (zero == zero[:, :1]).all()
    np.testing.assert_array_equal(whole[whole != 0], (x / jnp.float32(0.7))[whole != 0])


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.7])
def test_the_rate_may_be_traced_and_is_that_of_what_is_dropped(rate):
    x = jnp.ones((400, 50))

    @jax.jit
    def draw(rate):
        return dropped(x, {"units": jnp.arange(50), "rate": rate}, rate=0.9)

    y = np.asarray(draw(jnp.float32(rate)))
    share = np.mean(y == 0)
    # Five standard deviations of 20,000 draws.
    assert abs(share - rate) <= 5 * np.sqrt(rate * (1 - rate) / y.size)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)
    other = dropped(x, {"units": jnp.arange(50), "rate": rate}, seed=1)
    assert rate == 0 or np.any(np.asarray(other) != y)


def test_a_traced_rate_needs_no_names():
    y = jax.jit(lambda rate: dropped(jnp.ones((400, 50)), {"rate": rate}))(0.3)
    assert abs(np.mean(np.asarray(y) == 0) - 0.3) < 0.02


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"rate is 1\.0, expected a probability"):
        dropped(jnp.ones((3, 2)), rate=1.0)
    with pytest.raises(ValueError, match=r"units have shape \(1,\), expected \(2,\)"):
        dropped(jnp.ones((3, 2)), {"units": jnp.arange(1)})
