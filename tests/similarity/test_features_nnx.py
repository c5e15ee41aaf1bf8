"""Features of Flax NNX models against the network by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captured import assert_close, assert_features, data
from flax import nnx

from ntt_sparse.similarity.features import capture_nnx


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        dtype = jnp.result_type(float)
        self.linear = nnx.Linear(3, 3, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(3, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.norm(self.linear(x)))


class RematBlock(NNXBlock):
    @nnx.remat
    def __call__(self, x):
        return super().__call__(x)


class JitBlock(NNXBlock):
    @nnx.jit
    def __call__(self, x):
        return super().__call__(x)


class NNXMLP(nnx.Module):
    def __init__(self, block, rngs):
        self.zeta = block(rngs)
        self.layers = nnx.List([block(rngs), block(rngs)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, *, train=False):
        x = self.zeta(x)
        for layer in self.layers:
            x = layer(x)
        x = self.layers[0](x)
        return self.drop(x) if train else x


def nnx_by_hand(state, x):
    """The features of `NNXMLP` in the order of execution, batch normalised by running averages."""
    found, layers = {}, state["layers"]
    order = {"zeta": state["zeta"], "layers/0": layers[0], "layers/1": layers[1]}
    for name, call in (*((n, "") for n in order), ("layers/0", "#2")):
        linear, norm = order[name]["linear"], order[name]["norm"]
        found[f"{name}{call}:input"] = x
        y = x @ linear["kernel"][...] + linear["bias"][...]
        found[f"{name}/linear{call}"] = y
        y = (y - norm["mean"][...]) / jnp.sqrt(norm["var"][...] + 1e-5)
        found[f"{name}/norm{call}"] = y = y * norm["scale"][...] + norm["bias"][...]
        found[f"{name}{call}"] = x = jnp.tanh(y)
    return found


def nnx_model(block, train=False):
    model = NNXMLP(block, nnx.Rngs(0))
    (model.train if train else model.eval)()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    keys = iter(jax.random.split(jax.random.key(2), 100))
    params = jax.tree.map(lambda p: p + jax.random.uniform(next(keys), p.shape, p.dtype), params)
    return graphdef, params, rest


nnx_everything = ["*", "zeta:input", "layers/?:input"]
blocks = pytest.mark.parametrize("block", [NNXBlock, RematBlock, JitBlock])


@blocks
@pytest.mark.usefixtures("x64")
def test_nnx_features_by_hand(block):
    graphdef, params, rest = nnx_model(block)
    x, state = data(), nnx.merge_state(params, rest)
    expected = nnx_by_hand(state, x)
    for patterns in (nnx_everything, "layers/0", nnx_everything):
        apply = capture_nnx(graphdef, patterns)
        output, found = apply(state, x)
        names = ["layers/0", "layers/0#2"] if patterns == "layers/0" else expected
        # The running variance is float32, whose epsilon decides.
        assert_features(found, {name: expected[name] for name in names}, rtol=1e-6)
        np.testing.assert_array_equal(output, found["layers/0#2"])
    plain = nnx.merge(graphdef, state, copy=True)
    np.testing.assert_array_equal(plain(x), output)
    assert type(plain.zeta) is block
    found = jax.jit(apply)((params, rest), x)[1]
    assert_features(found, {name: expected[name] for name in sorted(expected)}, rtol=1e-6)


@blocks
@pytest.mark.usefixtures("x64")
def test_nnx_gradient_through_features_is_that_of_the_network_by_hand(block):
    graphdef, params, rest = nnx_model(block)
    x, apply = data(), capture_nnx(graphdef, ["zeta/norm", "layers/1"])

    def loss(found):
        return jnp.sum(found["zeta/norm"] ** 3) + jnp.sum(jnp.sin(found["layers/1"]))

    actual = jax.jit(jax.grad(lambda p: loss(apply((p, rest), x)[1])))(params)
    expected = jax.grad(lambda p: loss(nnx_by_hand(nnx.merge_state(p, rest), x)))(params)
    assert float(jnp.abs(expected["zeta"]["linear"]["kernel"][...]).min()) > 0
    assert_close(actual, expected, rtol=1e-5)


@blocks
def test_nnx_state_is_returned_and_not_changed(block):
    graphdef, params, rest = nnx_model(block, train=True)
    x, state = jax.random.normal(jax.random.key(7), (5, 3)), nnx.merge_state(params, rest)
    before = jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.filter_state(state, nnx.BatchStat)))
    apply = capture_nnx(graphdef, ["zeta/linear", "drop"])
    output, found, updated = apply(state, x, train=True, mutable=True)
    unchanged = nnx.to_pure_dict(nnx.filter_state(state, nnx.BatchStat))
    assert_close(unchanged, before, rtol=0)
    assert jax.tree.structure(updated) == jax.tree.structure(state)
    # Momentum is 0.99, running means start from zero.
    mean = 0.01 * found["zeta/linear"].mean(axis=0)
    np.testing.assert_allclose(updated["zeta"]["norm"]["mean"][...], mean, rtol=1e-5)
    stats = apply(state, x, train=True, mutable=nnx.BatchStat)[2]
    assert_close(stats, nnx.filter_state(updated, nnx.BatchStat), rtol=0)
    # The stream of dropout advances in the updated state, and only there.
    np.testing.assert_array_equal(apply(state, x, train=True)[0], output)
    assert np.any(np.asarray(apply(updated, x, train=True)[0] == 0) != np.asarray(output == 0))


@blocks
@pytest.mark.usefixtures("x64")
def test_nnx_members_on_devices(block):
    graphdef, params, rest = nnx_model(block)
    x, apply = data(), capture_nnx(graphdef, nnx_everything)
    scales = jnp.arange(1.0, 5)
    members = jax.vmap(lambda s: jax.tree.map(lambda p: s * p, params))(scales)
    by_vmap = jax.jit(jax.vmap(lambda p: apply((p, rest), x)[1]))(members)
    by_pmap = jax.pmap(lambda p: apply((p, rest), x)[1])(members)
    for i, scale in enumerate(scales):
        member = jax.tree.map(lambda p, s=scale: s * p, params)
        expected = nnx_by_hand(nnx.merge_state(member, rest), x)
        for found in (by_vmap, by_pmap):
            assert set(found) == set(expected)
            for name in expected:
                np.testing.assert_allclose(found[name][i], expected[name], rtol=1e-5)


class Escaping(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return jax.checkpoint(lambda linear, x: linear(x))(self.linear, x), x


class Holder(nnx.Module):
    def __init__(self, rngs):
        self.pair = Escaping(rngs)

    def __call__(self, x):
        return self.pair(x)[0]


def test_nnx_refusals():
    graphdef, state = nnx.split(Holder(nnx.Rngs(0)))
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"features at \['pair/linear/:1'\] cannot be followed"):
        capture_nnx(graphdef, "*")(state, x)
    with pytest.raises(ValueError, match="output of 'pair' is of type tuple"):
        capture_nnx(graphdef, "pair")(state, x)
    with pytest.raises(ValueError, match=r"'pear' matches no .* did you mean 'pair'\?"):
        capture_nnx(graphdef, "pear")(state, x)
    with pytest.raises(ValueError, match="there is no pattern"):
        capture_nnx(graphdef, [])
    assert list(capture_nnx(graphdef, "pair:input")(state, x)[1]) == ["pair:input"]
