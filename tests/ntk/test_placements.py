"""The structured kernel of whole networks, and inside the transformations of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ntt_sparse.ntk import empirical_ntk, structured


class Nnx(nnx.Module):
    def __init__(self, rngs):
        options = {"rngs": rngs, "param_dtype": jnp.float64}
        self.conv = nnx.Conv(1, 3, (3, 3), **options)
        self.norm = nnx.BatchNorm(3, **options)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(3, 2, **options)

    def __call__(self, x):
        x = jnp.tanh(self.norm(self.conv(x))).mean((1, 2))
        return self.dense(self.dropout(x))


def test_nnx(x64):
    """Split into params and the rest, in the form for evaluation."""
    rng = np.random.default_rng(0)
    model = Nnx(nnx.Rngs(0))
    model.eval()
    model.norm.mean[...] = jnp.asarray(rng.normal(size=3), jnp.float32)
    model.norm.var[...] = jnp.asarray(rng.uniform(0.5, 1.5, size=3), jnp.float32)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x = jnp.asarray(rng.normal(size=(3, 4, 4, 1)))
    masks = jax.tree.map(lambda w: jnp.asarray(rng.random(w.shape) < 0.6), params)

    def apply(params, x):
        return nnx.merge(graph, params, rest)(x)

    leaves, treedef = jax.tree.flatten(params)
    layout = structured.plan(lambda leaves, x: apply(treedef.unflatten(leaves), x), leaves, x)
    assert [leaves[leaf].shape for leaf in layout.shared] == [(3, 3, 1, 3)]
    assert [leaves[leaf].shape for leaf in layout.dense] == [(3, 2)]
    assert [leaves[leaf].shape for leaf in layout.biases.values()] == [(2,)]

    def value_and_grad(method):
        def objective(params):
            value = empirical_ntk(apply, params, x, masks=masks, method=method)
            return jnp.sum(jnp.sin(value)), value

        return jax.jit(jax.value_and_grad(objective, has_aux=True))(params)

    for ours, expected in zip(
        *(jax.tree.leaves(value_and_grad(method)) for method in ("structured", "jacobian")),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


def network(w, x):
    """A convolution, a lookup, a weight used twice, and dense layers with a bias."""
    options = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    h = jnp.tanh(jax.lax.conv_general_dilated(x, w["conv"], (1, 1), **options)).mean((1, 2))
    h = jnp.tanh(jnp.tanh(h @ w["twice"]) @ w["twice"])
    h = h + w["table"][(x[:, 0, 0, 0] > 0).astype(int)]
    return jnp.tanh(h @ w["in"] + w["bias"]) @ w["out"]


SHAPES = {
    "conv": (3, 3, 2, 4),
    "twice": (4, 4),
    "table": (2, 4),
    "in": (4, 5),
    "bias": (5,),
    "out": (5, 3),
}


def problem():
    rng = np.random.default_rng(1)
    weights = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}
    masks = {name: jnp.asarray(rng.random(shape) < 0.5) for name, shape in SHAPES.items()}
    x1, x2 = (jnp.asarray(rng.normal(size=(n, 4, 4, 2))) for n in (8, 3))
    return weights, masks, x1, x2


def sines_and_value(kernel):
    return jnp.sum(jnp.sin(kernel)), kernel


# Compiled once for all places.
@jax.jit
def by_jacobians(w, masks, x1, x2):
    def objective(w):
        kernel = empirical_ntk(network, w, x1, x2, masks=masks, method="jacobian")
        return sines_and_value(kernel)

    return jax.value_and_grad(objective, has_aux=True)(w)


BLOCKS = {"memory_limit": 3000, "max_density": 0.2}


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("pmap", {}),
        pytest.param("vmap", BLOCKS, marks=pytest.mark.slow),
        ("sharded", BLOCKS),
        pytest.param("pmap", BLOCKS, marks=pytest.mark.slow),
        pytest.param("vmap", {}, marks=pytest.mark.slow),
        pytest.param("sharded", {}, marks=pytest.mark.slow),
    ],
)
def test_value_and_gradient(x64, place, options):
    weights, masks, x1, x2 = problem()

    def objective(w, x1):
        def part(x):
            return empirical_ntk(network, w, x, x2, masks=masks, method="structured", **options)

        if place == "vmap":
            kernel = jax.vmap(part)(x1.reshape(8, 1, 4, 4, 2)).reshape(8, 3, 3, 3)
        elif place == "pmap":
            kernel = jax.pmap(part)(x1.reshape(4, 2, 4, 4, 2)).reshape(8, 3, 3, 3)
        else:
            kernel = part(x1)
        return sines_and_value(kernel)

    step = jax.value_and_grad(objective, has_aux=True)
    if place == "sharded":
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        step = jax.jit(step, in_shardings=(whole, rows))
    elif place == "vmap":
        step = jax.jit(step)
    expected = by_jacobians(weights, masks, x1, x2)
    for ours, theirs in zip(*map(jax.tree.leaves, (step(weights, x1), expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11 * np.abs(theirs).max())
