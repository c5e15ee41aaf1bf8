"""The objective of a convolutional network on many devices, with members, and against Jacobians."""

import functools

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


def draw():
    """Student, masks, teacher and inputs."""
    rng = np.random.default_rng(0)
    student, teacher = (
        {name: jnp.asarray(rng.normal(size=shape) * 0.3) for name, shape in SHAPES.items()}
        for _ in range(2)
    )
    masks = {
        name: jnp.asarray(rng.random(shape) < 0.15) if len(shape) > 1 else None
        for name, shape in SHAPES.items()
    }
    return student, masks, teacher, jnp.asarray(rng.normal(size=(8, 5, 6, 2)))


def value_and_grad(student, masks, teacher, x, **options):
    def loss(params):
        return ntt_loss(net, params, masks, teacher, x, kernel_weight=0.3, **options)[0]

    return jax.value_and_grad(loss)(student)


# Compiled once for all cases of a distance.
by_jacobians = jax.jit(
    functools.partial(value_and_grad, method="jacobian"), static_argnames="distance"
)


def on_one_device(arguments, options):
    return jax.jit(functools.partial(value_and_grad, **options))(*arguments)


def on_four_devices(arguments, options):
    spread = jax.shard_map(
        functools.partial(value_and_grad, axis_name="data", **options),
        mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P(), P(), P("data")),
        out_specs=P(),
    )
    return jax.jit(spread)(*arguments)


def with_members(arguments, options):
    student, masks, teacher, x = arguments
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (student, masks))
    batched = jax.vmap(functools.partial(value_and_grad, **options), (0, 0, None, None))
    return jax.tree.map(lambda leaf: leaf[1], jax.jit(batched)(*members, teacher, x))


PLACES = [on_one_device, on_four_devices, with_members]

# Derivatives of several examples together, or one by one; kernels whole, or a row at a time.
WAYS = {
    "together-full": (structured._CACHE, difference._WHOLE, {"max_density": 0.2}),
    "one_by_one-full": (0, difference._WHOLE, {"max_density": 0.2}),
    "one_by_one-sketch": (0, difference._WHOLE, {"distance": "sketch"}),
    "rows": (0, 0, {"max_density": 0.2}),
    "rows-in_blocks": (0, 0, {"memory_limit": 50_000}),
}

# On one device, kernels of convolutions are compared elsewhere too.
USUAL = [
    ("together-full", with_members),
    ("rows-in_blocks", on_four_devices),
]


@pytest.mark.parametrize(
    ("way", "place"),
    [
        pytest.param(way, place, marks=[pytest.mark.slow] * ((way, place) not in USUAL))
        for way in WAYS
        for place in PLACES
    ],
)
def test_everywhere_the_same(x64, monkeypatch, way, place):
    cache, whole, options = WAYS[way]
    monkeypatch.setattr(structured, "_CACHE", cache)
    monkeypatch.setattr(difference, "_WHOLE", whole)
    sketch = {"key": jax.random.key(0), "distance": "sketch"} if "distance" in options else {}
    arguments = draw()
    assert_close(place(arguments, options | sketch), by_jacobians(*arguments, **sketch))
