"""Captured features where the model, or who calls it, uses transformations of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captured import F64, MLP, assert_features, data, everything, init, lifts, mlp_by_hand
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from ntt_sparse.objectives.cka_sr import aug_cka_sr
from ntt_sparse.similarity.features import COLLECTION, capture

# Transforms inside the model


class Scanned(nn.Module):
    axes: dict

    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": self.axes, "split_rngs": {"params": True}, "length": 4}
        x, _ = nn.scan(Step, **options)(name="scan")(x, None)
        return nn.Dense(2, name="head", param_dtype=F64)(x)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(3, param_dtype=F64)(x)), None


@pytest.mark.usefixtures("x64")
def test_scan_stacks_or_refuses():
    x = data()
    closed, opened = Scanned({"params": 0}), Scanned({"params": 0, COLLECTION: 0})
    variables = init(closed, x)
    dense = variables["params"]["scan"]["Dense_0"]
    expected, carry = [], x
    for kernel, bias in zip(dense["kernel"], dense["bias"], strict=True):
        expected.append(carry @ kernel + bias)
        carry = jnp.tanh(expected[-1])
    head = variables["params"]["head"]
    by_hand = {"scan/Dense_0": expected, "head": carry @ head["kernel"] + head["bias"]}
    assert_features(capture(opened, "*")(variables, x)[1], by_hand)
    # What compares layers takes them apart, as the docs say.
    layers = [*capture(opened, "*")(variables, x)[1]["scan/Dense_0"]]
    apart = jax.jit(lambda layers: aug_cka_sr(layers))(layers)
    np.testing.assert_allclose(apart, aug_cka_sr([jnp.asarray(each) for each in expected]))
    assert_features(capture(closed, "head")(variables, x)[1], {"head": by_hand["head"]})
    with pytest.raises(ValueError, match=f"'scan/Dense_0' runs in .* add '{COLLECTION}' to its"):
        capture(closed, "*")(variables, x)


class Inner(nn.Module):
    transform: str

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3)
        if self.is_initializing():
            return dense(x)
        return {"jit": jax.jit, "checkpoint": jax.checkpoint}[self.transform](lambda x: dense(x))(x)


@pytest.mark.parametrize("transform", ["jit", "checkpoint"])
@pytest.mark.parametrize("compiled", [False, True])
def test_tracers_of_jax_transforms_inside_the_model_do_not_escape(transform, compiled):
    module, x = Inner(transform), jnp.ones((2, 3))
    variables = module.init(jax.random.key(0), x)
    apply = capture(module, "Dense_0")
    with pytest.raises(ValueError, match="'Dense_0' runs in a transform of JAX that its model"):
        (jax.jit(apply) if compiled else apply)(variables, x)


@lifts
@pytest.mark.usefixtures("x64")
def test_no_tracer_outlives_its_trace(lift):
    module, x = MLP(lift), data()
    variables = init(module, x)
    apply = capture(module, everything)
    with jax.checking_leaks():
        found = jax.jit(apply)(variables, x)[1]
    expected = mlp_by_hand(variables["params"], x)
    assert_features(found, {name: expected[name] for name in sorted(expected)})


# Transforms around the captured function


@lifts
@pytest.mark.usefixtures("x64")
def test_vmap_over_members(lift):
    module, x = MLP(lift), data()
    members = [init(MLP(), x * scale) for scale in (1, 2, 3)]
    members = [jax.tree.map(lambda p, i=i: p + i, m) for i, m in enumerate(members)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    apply = capture(module, everything)
    found = jax.jit(jax.vmap(lambda v: apply(v, x)[1]))(stacked)
    for i, member in enumerate(members):
        expected = mlp_by_hand(member["params"], x)
        for name in expected:
            np.testing.assert_allclose(found[name][i], expected[name], rtol=1e-12)


@pytest.mark.variants(3)
@lifts
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("spread", ["pmap", "shard_map"])
def test_eight_devices(lift, spread):
    module, x = MLP(lift), data(16)
    variables = init(module, x)
    apply = capture(module, everything)

    def fn(variables, x):
        return apply(variables, x)[1]

    if spread == "pmap":
        shards = x.reshape(8, 2, 3)
        found = jax.pmap(fn, in_axes=(None, 0))(variables, shards)
        found = {name: leaf.reshape(16, -1) for name, leaf in found.items()}
    else:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        specs = (PartitionSpec(), PartitionSpec("data"))
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"))
        found = jax.jit(mapped)(variables, x)
    expected = mlp_by_hand(variables["params"], x)
    assert_features(found, {name: expected[name] for name in sorted(expected)})
