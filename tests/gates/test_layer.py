"""Gates inside networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ntt_sparse.gates import dam, layer
from ntt_sparse.gates.l1 import L1


class Folded(nn.Module):
    """A convolution whose channels are gated by their weights."""

    @nn.compact
    def __call__(self, x, folded=True):
        kernel = self.param("kernel", nn.initializers.normal(), (3, 3, x.shape[-1], 6))
        gate = layer.Gate(name="gate")
        if folded:
            kernel = kernel * gate(n=6)
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y if folded else gate(y)


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Folded(name="block")(x)
        return layer.Gate(L1(0.5))(nn.Dense(4)(x.mean((1, 2))))


@pytest.fixture(scope="module")
def network():
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 3))
    return Outer(), x, Outer().init(jax.random.key(0), x)["params"]


def test_folding_is_the_same_function(network):
    _, x, params = network
    for beta in (1.0, -2.0, -6.0):
        variables = {"params": layer.replace(params["block"], {"gate": {"beta": jnp.array(beta)}})}
        one, other = (Folded().apply(variables, x, folded=f) for f in (True, False))
        np.testing.assert_allclose(one, other, atol=1e-6)
        closed = np.asarray(dam.gate(beta, 6)) == 0
        assert np.all(np.asarray(one)[..., closed] == 0)


def test_parameters_of_gates_are_found_and_replaced(network):
    module, x, params = network
    found = layer.find(params)
    assert list(found) == ["Gate_0", "block/gate"]
    assert found["block/gate"] == {"beta": jnp.float32(1)}
    assert found["Gate_0"]["scale"].tolist() == [0.5] * 4
    closed = layer.replace(params, {"Gate_0": {"scale": jnp.array([1.0, 0, -1, 2])}})
    y = module.apply({"params": closed}, x)
    dense = module.apply({"params": layer.replace(params, {"Gate_0": {"scale": jnp.ones(4)}})}, x)
    np.testing.assert_allclose(y, dense * jnp.array([1.0, 0, 0, 2]), rtol=1e-6)
    # The others are as they were.
    assert closed["block"] is params["block"] and closed["Dense_0"] is params["Dense_0"]
    assert params["Gate_0"]["scale"].tolist() == [0.5] * 4


def test_an_order_is_a_variable():
    """So that members of one program may have different ones."""
    x = jnp.ones((1, 4))
    gate = layer.Gate(dam.Dam(initial=-2.0))
    params = gate.init(jax.random.key(0), x)

    def run(ranks):
        return gate.apply({**params, layer.STATE: {"ranks": ranks}}, x)[0]

    ranks = jnp.array([[3, 2, 1, 0], [1, 3, 0, 2]])
    plain = gate.apply(params, x)[0]
    np.testing.assert_array_equal(jax.vmap(run)(ranks), plain[ranks])


def test_features_keep_their_dtype():
    x = jnp.ones((2, 3), jnp.bfloat16)
    gate = layer.Gate()
    assert gate.apply(gate.init(jax.random.key(0), x), x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: layer.Gate().init(jax.random.key(0)), "expected features x, or the number"),
        (lambda: layer.Gate().init(jax.random.key(0), jnp.ones((2, 3)), n=3), "expected features"),
        (lambda: layer.Gate().init(jax.random.key(0), jnp.ones((2, 1))), "on 1 channel"),
        (lambda: layer.Gate(dam.Dam(initial=-5.0)).init(jax.random.key(0), n=4), "closes all 4"),
        (lambda: layer.find({"Dense_0": {"kernel": jnp.ones(2)}}), "hold no gate"),
        (lambda: layer.find({"gated_conv": {"kernel": jnp.ones(2)}}), "hold no gate"),
        (lambda: layer.Gate().init(jax.random.key(0), jnp.ones((2, 3), int)), "are int32"),
        (lambda: layer.replace({"a": {}}, {"b": {}}), "hold no 'b'"),
        (lambda: layer.replace({"a": jnp.ones(3)}, {"a": jnp.ones(5)}), "'a' holds arrays"),
        (lambda: layer.replace({"a": jnp.ones(3)}, {"a/b": jnp.ones(5)}), "hold no 'a/b'"),
        (lambda: layer.replace({"a": {"beta": jnp.ones(())}}, {"a": {}}), "'a' holds"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
