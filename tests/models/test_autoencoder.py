"""Autoencoders with gated bottlenecks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.gates.l1 import L1
from ntt_sparse.models.autoencoder import Autoencoder, Perceptron, QRes


def test_a_quadratic_layer():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    params = QRes(4).init(jax.random.key(0), x)["params"]
    u, v = (np.asarray(params[name]["kernel"], float) for name in ("linear", "factor"))
    expected = (x @ u) * (x @ v) + x @ u + np.asarray(params["bias"])
    np.testing.assert_allclose(QRes(4).apply({"params": params}, x), expected, rtol=1e-5)


def test_an_autoencoder_by_hand():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, 2, 3)).astype(np.float32)
    module = Autoencoder(Perceptron((7, 5), activation="elu"), Perceptron((6,), last="tanh"), L1())
    params = module.init(jax.random.key(0), x)["params"]
    gates = np.array([1.0, 0, 0.5, 2, 0], np.float32)
    params["gate"]["scale"] = jnp.asarray(gates)

    def dense(tree, x):
        return x @ np.asarray(tree["kernel"], float) + np.asarray(tree["bias"], float)

    hidden = dense(params["encoder"]["Dense_0"], x.reshape(4, 6))
    hidden = np.where(hidden > 0, hidden, np.expm1(hidden))
    code = dense(params["encoder"]["Dense_1"], hidden) * gates
    np.testing.assert_allclose(
        module.apply({"params": params}, x, method="encode"), code, rtol=1e-5, atol=1e-6
    )
    expected = np.tanh(dense(params["decoder"]["Dense_0"], code)).reshape(x.shape)
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-6)


def test_layers_start_as_documented():
    """Uniform between plus and minus one over the root of the inputs."""
    x = jnp.ones((1, 64))
    params = Perceptron((500,)).init(jax.random.key(0), x)["params"]["Dense_0"]
    for leaf in params.values():
        assert float(jnp.max(jnp.abs(leaf))) <= 1 / 8
        np.testing.assert_allclose(jnp.std(leaf), 1 / 8 / 3**0.5, rtol=0.1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Perceptron((3,), activation="sine"), "activation is 'sine', expected one of"),
        (lambda: Perceptron((3,), last="softmax"), "last is 'softmax'"),
        (lambda: Perceptron(()), "widths are"),
        (lambda: Perceptron((3, 0)), "widths are"),
        (
            lambda: Autoencoder(Perceptron((3,)), Perceptron((4,))).init(
                jax.random.key(0), jnp.ones((1, 5))
            ),
            "decoder gives 4 numbers, an input has 5",
        ),
        (
            lambda: Autoencoder(Perceptron((1,)), Perceptron((5,))).init(
                jax.random.key(0), jnp.ones((1, 5))
            ),
            "on 1 channel",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
