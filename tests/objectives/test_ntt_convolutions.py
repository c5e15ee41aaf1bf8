"""The objective of a convolutional network on many devices, with members, and against Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ntt_sparse.ntk import difference, structured
from ntt_sparse.objectives.ntt import ntt_loss

# "a" has few input channels and "c" many: their derivatives are made in two ways.
SHAPES = {"a": (3, 3, 2, 34), "b": (34,), "c": (2, 2, 34, 6), "d": (6, 3), "e": (3,)}
OPTIONS = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def net(w, x):
    x = jax.nn.relu(jax.lax.conv_general_dilated(x, w["a"], (1, 1), **OPTIONS) + w["b"])
    x = jnp.tanh(jax.lax.conv_general_dilated(x, w["c"], (2, 2), **OPTIONS))
    return x.mean((1, 2)) @ w["d"] + w["e"]


def assert_close(ours, expected, rtol=1e-11):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


# Derivatives of several examples together, or one by one; kernels whole, or a row at a time.
@pytest.mark.variants(3)
@pytest.mark.parametrize(
    ("cache", "whole", "options"),
    [
        (structured._CACHE, difference._WHOLE, {"max_density": 0.2}),
        (0, difference._WHOLE, {"max_density": 0.2}),
        (0, difference._WHOLE, {"distance": "sketch"}),
        (0, 0, {"max_density": 0.2}),
        (0, 0, {"memory_limit": 50_000}),
    ],
    ids=["together-full", "one_by_one-full", "one_by_one-sketch", "rows", "rows-in_blocks"],
)
def test_everywhere_the_same(x64, monkeypatch, cache, whole, options):
    monkeypatch.setattr(structured, "_CACHE", cache)
    monkeypatch.setattr(difference, "_WHOLE", whole)
    if "distance" in options:
        options = options | {"key": jax.random.key(0)}
    rng = np.random.default_rng(0)
    student, teacher = (
        {name: jnp.asarray(rng.normal(size=shape) * 0.3) for name, shape in SHAPES.items()}
        for _ in range(2)
    )
    masks = {
        name: jnp.asarray(rng.random(shape) < 0.15) if len(shape) > 1 else None
        for name, shape in SHAPES.items()
    }
    x = jnp.asarray(rng.normal(size=(8, 5, 6, 2)))

    def value_and_grad(student, masks, teacher, x, **more):
        def loss(params):
            weight = {"kernel_weight": 0.3}
            return ntt_loss(net, params, masks, teacher, x, **weight, **options, **more)[0]

        return jax.value_and_grad(loss)(student)

    expected = jax.jit(lambda *args: value_and_grad(*args, method="jacobian"))(
        student, masks, teacher, x
    )
    assert_close(jax.jit(value_and_grad)(student, masks, teacher, x), expected)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(
        lambda *args: value_and_grad(*args, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), P(), P(), P("data")),
        out_specs=P(),
    )
    assert_close(jax.jit(spread)(student, masks, teacher, x), expected)

    members = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (student, masks))
    stacked = jax.jit(jax.vmap(value_and_grad, (0, 0, None, None)))(*members, teacher, x)
    assert_close(jax.tree.map(lambda leaf: leaf[1], stacked), expected)
