import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from ntt_sparse.models.resnet import ResidualBlock, ResNet
from ntt_sparse.similarity import features as similarity_features
from ntt_sparse.similarity.features import COLLECTION, capture, capture_nnx, select

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


def data(n=5):
    return jax.random.normal(jax.random.key(7), (n, 3), F64)


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


def assert_features(actual, expected, rtol=1e-12):
    assert list(actual) == list(expected)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=rtol, err_msg=name)


def assert_close(actual, expected, rtol=1e-12):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=1e-14)


lifts = pytest.mark.parametrize("lift", ["none", "remat", "jit"])
everything = ["*", "*:input"]


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


# NNX


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
