"""A network, its features by hand, and comparisons for the tests of captured features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

F64 = jnp.float64


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(3, param_dtype=F64)(x))


# Made once: each class of nn.jit has a cache of its own.
LIFTED = {"none": Block, "remat": nn.remat(Block), "jit": nn.jit(Block)}


class MLP(nn.Module):
    """Two layers of the same width, called once each, then a head."""

    lift: str = "none"

    @nn.compact
    def __call__(self, x):
        x = LIFTED[self.lift](name="zeta")(x)
        x = LIFTED[self.lift](name="alpha")(x)
        return nn.Dense(2, name="head", param_dtype=F64)(x)


def mlp_by_hand(params, x):
    """The features of `MLP` in the order of execution, from its params."""
    found = {}
    for name in ("zeta", "alpha"):
        dense = params[name]["Dense_0"]
        found[f"{name}:input"] = found[f"{name}/Dense_0:input"] = x
        found[f"{name}/Dense_0"] = x @ dense["kernel"] + dense["bias"]
        found[name] = x = jnp.tanh(found[f"{name}/Dense_0"])
    found["head:input"] = x
    found["head"] = x @ params["head"]["kernel"] + params["head"]["bias"]
    return found


def init(module, x, **kwargs):
    """Variables away from zero everywhere, biases included."""
    variables = module.init(jax.random.key(0), x, **kwargs)
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + jax.random.uniform(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, moved)


lifts = pytest.mark.parametrize("lift", ["none", "remat", "jit"])
everything = ["*", "*:input"]


def data(n=5):
    return jax.random.normal(jax.random.key(7), (n, 3), F64)


def assert_features(actual, expected, rtol=1e-12):
    assert list(actual) == list(expected)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=rtol, err_msg=name)


def assert_close(actual, expected, rtol=1e-12):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=1e-14)
