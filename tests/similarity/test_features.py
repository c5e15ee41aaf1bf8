"""Features of Flax Linen models against the network by hand; stages of features."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captured import (
    F64,
    MLP,
    assert_close,
    assert_features,
    data,
    everything,
    init,
    lifts,
    mlp_by_hand,
)
from flax import linen as nn

from ntt_sparse.models.resnet import ResidualBlock, ResNet
from ntt_sparse.similarity import features as similarity_features
from ntt_sparse.similarity.features import capture, select

# Features by hand, whatever the model's own transforms


@lifts
@pytest.mark.usefixtures("x64")
def test_features_by_hand_in_order_of_execution(lift):
    module, x = MLP(lift), data()
    variables = init(module, x)
    output, found = capture(module, everything)(variables, x)
    expected = mlp_by_hand(variables["params"], x)
    assert_features(found, expected)
    np.testing.assert_array_equal(output, found["head"])


@lifts
@pytest.mark.usefixtures("x64")
def test_patterns_select_and_later_patterns_find_no_stale_trace(lift):
    module, x = MLP(lift), data()
    variables = init(module, x)
    expected = mlp_by_hand(variables["params"], x)
    for patterns, names in {
        "*": ["zeta/Dense_0", "zeta", "alpha/Dense_0", "alpha", "head"],
        "*a": ["zeta", "alpha"],
        "*/*": ["zeta/Dense_0", "alpha/Dense_0"],
        "[az]*a:input": ["zeta:input", "alpha:input"],
        "alpha": ["alpha"],
        ("alpha", "zeta:input", "al*"): ["zeta:input", "alpha/Dense_0", "alpha"],
    }.items():
        for _ in range(2):
            found = capture(module, patterns)(variables, x)[1]
            assert_features(found, {name: expected[name] for name in names})


@lifts
@pytest.mark.usefixtures("x64")
def test_gradient_through_features_is_that_of_the_network_by_hand(lift):
    module, x = MLP(lift), data()
    variables = init(module, x)
    apply = capture(module, ["zeta", "alpha/Dense_0"])

    def loss(found):
        return jnp.sum(found["zeta"] ** 3) + jnp.sum(jnp.sin(found["alpha/Dense_0"]))

    actual = jax.jit(jax.grad(lambda p: loss(apply({"params": p}, x)[1])))(variables["params"])
    expected = jax.grad(lambda p: loss(mlp_by_hand(p, x)))(variables["params"])
    assert float(jnp.abs(expected["alpha"]["Dense_0"]["kernel"]).min()) > 0
    assert not np.any(expected["head"]["kernel"])
    assert_close(actual, expected, rtol=1e-10)


@pytest.mark.parametrize("compiled", [False, True])
def test_order_inside_a_trace_is_that_of_execution(compiled):
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(12):
                x = nn.Dense(2)(x)
            return x

    x = jnp.ones((1, 2))
    variables = Deep().init(jax.random.key(0), x)
    apply, seen = capture(Deep(), "*"), []

    def fn(variables, x):
        found = apply(variables, x)[1]
        seen.append(list(found))
        return found

    outside = (jax.jit(fn) if compiled else fn)(variables, x)
    assert seen == [[f"Dense_{i}" for i in range(12)]]
    # The dict of a compiled function is sorted by JAX, which the docstring warns of.
    assert list(outside) == (sorted(seen[0]) if compiled else seen[0])


# Calls and names


class Twice(nn.Module):
    def setup(self):
        self.shared = Derived(2, param_dtype=F64)
        self.between = nn.Dense(2, param_dtype=F64)

    def __call__(self, x):
        x = self.between(self.shared(x))
        return self.shared(inputs=self.shared(x))

    def encode(self, x):
        return self.between(x)


class Derived(nn.Dense):
    """Its call is two calls, its own and that of the base class, of one feature."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


@pytest.mark.usefixtures("x64")
def test_calls_of_one_module_are_numbered():
    module, x = Twice(), data()[:, :2]
    variables = init(module, x)

    def dense(name, x):
        return x @ variables["params"][name]["kernel"] + variables["params"][name]["bias"]

    expected = {"shared:input": x, "shared": 2 * dense("shared", x)}
    expected |= {"between": (y := dense("between", expected["shared"]))}
    expected |= {"shared#2:input": y, "shared#2": 2 * dense("shared", y)}
    expected |= {"shared#3": 2 * dense("shared", expected["shared#2"])}
    found = capture(module, ["*", "shared*:input"])(variables, x)[1]
    # The input of the last call is no positional argument, which a wildcard passes over.
    assert_features(found, expected)
    with pytest.raises(ValueError, match="first positional argument of 'shared' is of type None"):
        capture(module, "shared:input")(variables, x)
    encoded, found = capture(module, "*")(variables, x, method="encode")
    assert_features(found, {"between": dense("between", x)})
    np.testing.assert_array_equal(encoded, found["between"])


class Outputs(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, rest = Pair(name="pair")(x)
        return Pair(name="pair2")(nn.Dense(2)(x))[0] + rest


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x), x.sum()


def test_outputs_that_are_no_arrays():
    x = jnp.ones((1, 2))
    variables = Outputs().init(jax.random.key(0), x)
    found = capture(Outputs(), "*")(variables, x)[1]
    assert list(found) == ["pair/Dense_0", "Dense_0", "pair2/Dense_0"]
    with pytest.raises(ValueError, match="the output of 'pair' is of type tuple, expected one arr"):
        capture(Outputs(), ["*", "pair"])(variables, x)
    assert "pair:input" in capture(Outputs(), "pair*:input")(variables, x)[1]
    with pytest.raises(ValueError, match=r"'pai\?' matches no module call that gives one array"):
        capture(Outputs(), "pai?")(variables, x)


def test_patterns_without_a_match():
    module, x = ResNet(blocks_per_stage=1, channels=(2, 4, 4)), jnp.zeros((1, 4, 4, 1))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(capture(module, ["Conv_0", "stage2_blok1"]), variables, x)
    message = str(caught.value)
    assert message.startswith("pattern 'stage2_blok1' matches no module call")
    assert "did you mean 'stage2_block1'" in message
    assert "there are ['Conv_0', 'BatchNorm_0', 'stage1_block1'," in message
    deep = ResNet(blocks_per_stage=3, channels=(2, 2))
    with pytest.raises(ValueError, match=r"'q\*' matches .*: there are \[.*\] and 13 more"):
        # 3 modules outside of blocks, and 6 blocks of 5.
        jax.eval_shape(capture(deep, "q*"), jax.eval_shape(deep.init, jax.random.key(0), x), x)
    for never in ("", "Conv", "conv_0", "Conv_0:output", ":input"):
        with pytest.raises(ValueError, match=f"pattern {never!r} matches no module call"):
            jax.eval_shape(capture(module, never), variables, x)
    for empty in ((), []):
        with pytest.raises(ValueError, match="there is no pattern, expected one or more"):
            capture(module, empty)


# The model's own state


def test_resnet_with_batch_statistics():
    module = ResNet(blocks_per_stage=1, channels=(4, 8))
    x = jax.random.normal(jax.random.key(3), (3, 6, 6, 2))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    apply = capture(module, ["stage?_block?", "stage2_block1:input"])

    def block(module, _):
        return isinstance(module, ResidualBlock)

    @jax.jit
    def both(variables, x):
        options = {"train": True, "mutable": ["batch_stats"]}
        ours = apply(variables, x, **options)
        options["mutable"] = ["batch_stats", "intermediates"]
        theirs = module.apply(variables, x, **options, capture_intermediates=block)
        return ours, theirs, apply(variables, x), module.apply(variables, x)

    (output, found, updated), (expected, state), alone, plain = both(variables, x)
    names = ["stage1_block1", "stage2_block1"]
    assert set(found) == {*names, "stage2_block1:input"}
    for name in names:
        inside = state["intermediates"][name]["__call__"][0]
        np.testing.assert_allclose(found[name], inside, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["stage2_block1:input"], found["stage1_block1"])
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    assert set(updated) == {"batch_stats"}
    assert_close(updated["batch_stats"], dict(state["batch_stats"]), rtol=1e-5)
    # Without training nothing else changes, and without `mutable` no state is returned.
    output, found = alone
    np.testing.assert_allclose(output, plain, rtol=1e-5, atol=1e-6)
    assert len(found) == 3


class Sower(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(200, name="dense")(x)
        self.sow("intermediates", "dense_output", x)
        x = nn.Dropout(0.5, name="drop")(x, deterministic=not train)
        count = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
        if self.is_mutable_collection("counts"):
            count.value += 1
        return x


def sower_variables(x):
    params = Sower().init(jax.random.key(0), x, False)["params"]
    return {"params": params, "counts": {"calls": jnp.zeros((), jnp.int32)}}


def test_intermediates_and_other_collections_are_as_without_capture():
    module, x = Sower(), jnp.ones((2, 3))
    variables = sower_variables(x)
    for mutable in ("intermediates", ["intermediates", "counts"], True, "counts", []):
        _, expected = module.apply(variables, x, False, mutable=mutable)
        _, found, updated = capture(module, "d*")(variables, x, False, mutable=mutable)
        assert set(updated) == set(expected)
        assert_close(dict(updated), dict(expected), rtol=0)
        assert list(found) == ["dense", "drop"]
    assert (
        int(capture(module, "dense")(variables, x, False, mutable=True)[2]["counts"]["calls"]) == 1
    )


def test_dropout_draws_from_the_key_it_is_given():
    module, x = Sower(), jnp.ones((2, 3))
    variables = sower_variables(x)
    apply = capture(module, ["dense", "drop", "drop:input"])
    rngs = {"dropout": jax.random.key(5)}
    output, found = apply(variables, x, train=True, rngs=rngs)
    np.testing.assert_array_equal(output, module.apply(variables, x, train=True, rngs=rngs))
    np.testing.assert_array_equal(found["dense"], found["drop:input"])
    kept = np.asarray(found["drop"] != 0)
    assert 100 < kept.sum() < 300
    np.testing.assert_allclose(found["drop"], np.where(kept, 2 * found["dense"], 0), rtol=1e-6)
    other = apply(variables, x, train=True, rngs={"dropout": jax.random.key(6)})[1]
    assert np.any(np.asarray(other["drop"] != 0) != kept)


# Stages


def test_select_groups_by_stage():
    names = ["stage1_block1", "stage1_block1:input", "stage2_block1", "stage2_block1#2", "a/b"]
    features = {name: jnp.full(1, i) for i, name in enumerate(names)}

    def indices(*stages):
        return [[int(f[0]) for f in stage] for stage in select(features, stages)]

    assert indices("stage1_*", ["a/b", "stage2_*"]) == [[0], [2, 3, 4]]
    assert indices("stage2_block1", "stage2_block1#2") == [[2, 3], [3]]
    assert indices(["*:input"], ["*", "stage1_*"]) == [[1], [0, 2, 3, 4]]
    assert indices() == []


def test_select_refuses_what_matches_nothing():
    features = {"stage1": jnp.ones(1), "stage2:input": jnp.ones(1)}
    with pytest.raises(ValueError, match="pattern 'stage2' matches no feature: did you mean 'stag"):
        select(features, ["stage1", ["stage1", "stage2"]])
    with pytest.raises(ValueError, match="there is no pattern"):
        select(features, ["stage1", []])


def test_the_examples_of_the_docstrings():
    results = doctest.testmod(similarity_features)
    assert results.attempted > 0
    assert results.failed == 0
