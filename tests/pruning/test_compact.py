"""Small networks against the large ones they come from, on every architecture there is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import (
    GATED,
    MASKED,
    check_counts,
    large,
    neuron_masks,
    outputs,
    same,
    size,
    with_gates,
    without_gates,
)

from ntt_sparse import models
from ntt_sparse.gates import channels, layer
from ntt_sparse.gates import network as graph
from ntt_sparse.gates.dam import Dam
from ntt_sparse.gates.l1 import L1
from ntt_sparse.gates.slimming import Slimming
from ntt_sparse.models.described import Described
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.models.vgg import Vgg
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.pruning.compact import compact, compact_network


def example(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


# Those of one class with another are left out.
@pytest.mark.variants(8)
@pytest.mark.parametrize(
    "name", sorted((GATED | MASKED).keys() - {"vgg19", "preresnet20", "resnet20"})
)
def test_descriptions_are_the_models(name):
    module, shape, variables = large(name)
    x = example(3, *shape)
    network = graph.check(module.network(shape))
    own = variables
    if name in GATED:
        ones = {
            path: {"scale": jax.device_put(np.ones(n, np.float32))}
            for path, n in channels.sizes(network).items()
        }
        variables = {**variables, "params": layer.replace(variables["params"], ones)}
        own = {**variables, "params": without_gates(variables["params"])}
    same(outputs(Described(network), own, x), outputs(module, variables, x))
    made = jax.eval_shape(Described(network).init, jax.random.key(0), x)
    weights = pruning_masks.named_leaves(variables["params"])
    expected = {path: leaf.shape for path, leaf in weights.items() if "gate" not in path}
    assert {k: v.shape for k, v in pruning_masks.named_leaves(made["params"]).items()} == expected
    assert channels.whole(network).parameters == sum(map(np.prod, expected.values()))


# One small network of each class.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] * (name not in ("same", "narrow", "vgg", "quadratic"))
        )
        for name in GATED
    ],
)
def test_gated_networks_keep_their_outputs(name):
    module, shape, _ = large(name)
    variables = with_gates(name, 1)
    x = example(5, *shape)
    small = compact(module, variables, shape)
    same(outputs(small.module, small.variables, x), outputs(module, variables, x))
    network = module.network(shape)
    gates = layer.values(module.kind, variables, network)
    open_ = {path: value > 0 for path, value in gates.items()}
    # By JAX, where the small network was counted by NumPy.
    assert small.after == jax.jit(functools.partial(channels.count, network))(open_)
    assert small.before == channels.whole(network)
    check_counts(small)
    assert small.after.parameters < small.before.parameters


@pytest.mark.variants(3)
@pytest.mark.parametrize("name", MASKED)
def test_masked_networks_keep_their_outputs(name):
    module, shape, variables = large(name)
    masks = neuron_masks(name, 1)
    x = example(5, *shape)
    small = compact(module, variables, shape, masks=masks)
    masked = {**variables, "params": pruning_masks.apply(variables["params"], masks)}
    same(outputs(small.module, small.variables, x), outputs(module, masked, x))
    check_counts(small)
    # Channels in groups are normalised by all of a group.
    if "group" not in name:
        assert small.after.parameters < 0.8 * small.before.parameters


@jax.jit
def apply_narrow(variables, x):
    return GATED["narrow"][0].apply(variables, x)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_any_gates(seed, closed):
    """Residual networks with a padded 3x3 convolution, layers closed whole among them."""
    module, shape, variables = large("narrow")
    rng = np.random.default_rng(seed)
    gates = {
        path: {"scale": jnp.asarray(rng.uniform(0.5, 2, n) * (rng.random(n) > closed), jnp.float32)}
        for path, n in channels.sizes(module.network(shape)).items()
    }
    variables = {**variables, "params": layer.replace(variables["params"], gates)}
    x = jnp.asarray(rng.standard_normal((3, *shape)), jnp.float32)
    small = compact(module, variables, shape, empty="remove")
    same(outputs(small.module, small.variables, x), apply_narrow(variables, x))
    check_counts(small)
    open_ = {path: np.asarray(gate["scale"]) > 0 for path, gate in gates.items()}
    assert small.after == channels.count(module.network(shape), open_)


def test_double_precision_is_exact():
    with jax.enable_x64(True):
        module = Vgg(4, ((6, 5), (8, 7)), L1(), param_dtype=jnp.float64)
        x = np.random.default_rng(0).standard_normal((3, 10, 12, 3))
        variables = jax.jit(module.init)(jax.random.key(1), x)
        gates = {
            path: {"scale": jax.device_put((np.arange(n) % 2).astype(float))}
            for path, n in channels.sizes(module.network(x.shape[1:])).items()
        }
        noisy = jax.tree.map(
            lambda leaf: jax.device_put(
                np.asarray(leaf) + 0.3 * np.cos(np.arange(leaf.size)).reshape(leaf.shape)
            ),
            variables,
        )
        noisy["params"] = layer.replace(noisy["params"], gates)
        small = compact(module, noisy, x.shape[1:])
        expected = outputs(module, noisy, x)
        np.testing.assert_allclose(outputs(small.module, small.variables, x), expected, rtol=1e-12)
        assert small.constants > 0


def test_training_goes_on_as_in_the_large_network():
    module, shape, _ = large("vgg")
    variables = with_gates("vgg", 3)
    x = example(6, *shape)
    train = {"train": True, "mutable": ["batch_stats"]}
    # In training a closed channel is its shift, in evaluation so if its running mean is zero.
    clean = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    variables = {**variables, "batch_stats": clean}
    small = compact(module, variables, shape)
    expected, state = outputs(module, variables, x, **train)
    got, small_state = outputs(small.module, small.variables, x, **train)
    same(got, expected, 1e-4)
    for name, statistics in small_state["batch_stats"].items():
        kept = small.kept[name]
        for leaf, value in statistics.items():
            same(value, state["batch_stats"][name][leaf][kept], 1e-4)


def closed_inside(closed):
    """A PreResNet with convolutions closed whole."""
    module, shape, variables = large("preresnet")
    gates = {
        path: {"scale": jnp.zeros(n) if path.removesuffix("/gate") in closed else jnp.ones(n)}
        for path, n in channels.sizes(module.network(shape)).items()
    }
    return module, shape, {**variables, "params": layer.replace(variables["params"], gates)}


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    "closed",
    [
        # Its constant passes a padded convolution, normalisation, ReLU: a map, not a number.
        ["stage1_block2/Conv_0"],
        ["stage2_block1/Conv_0", "stage1_block1/Conv_1", "stage2_block2/Conv_2"],
        # The outputs do not depend on the input.
        ["Conv_0"],
    ],
)
def test_layers_left_empty(closed):
    module, shape, variables = closed_inside(closed)
    with pytest.raises(ValueError, match=f"no channel is left of .*{closed[0]}.*empty='remove'"):
        compact(module, variables, shape)
    small = compact(module, variables, shape, empty="remove")
    assert set(closed) <= set(small.removed)
    x = example(2, *shape)
    same(outputs(small.module, small.variables, x), outputs(module, variables, x))


def test_small_networks_are_as_small_as_they_get():
    module, shape, _ = large("preresnet")
    variables = with_gates("preresnet", 5)
    small = compact(module, variables, shape)
    again = compact_network(
        small.module.network, small.variables["params"], small.variables["batch_stats"]
    )
    assert again.before.parameters == size(again.variables["params"])
    kinds, expected = (
        [type(node) for node in each.module.network.nodes.values()] for each in (again, small)
    )
    assert kinds == expected
    x = example(2, *shape)
    same(outputs(again.module, again.variables, x), outputs(small.module, small.variables, x), 1e-6)


def test_weights_of_zero_are_no_way():
    """Channels that only weights of zero read are taken out, gates or not."""
    module = LeNet(2, (), 5, (4, 3))
    params = models.init(module, jax.random.key(0), (5,))
    kernel = params["Dense_1"]["kernel"].at[2].set(0)
    params = {**params, "Dense_1": {**params["Dense_1"], "kernel": kernel}}
    small = compact(module, {"params": params}, (5,))
    np.testing.assert_array_equal(small.kept["Dense_0"], [0, 1, 3])
    x = example(4, 5)
    same(outputs(small.module, small.variables, x), outputs(module, {"params": params}, x))
    assert small.constants == 0


def test_an_order_of_channels_counts():
    module = models.create("lenet5", kind=Dam(-2.5))
    variables = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 28, 28, 1)))
    ranks = {"Conv_0": {"gate": {"ranks": jnp.array([5, 0, 1, 2, 3, 4])}}}
    rest = {
        path.split("/")[0]: {"gate": {"ranks": jnp.arange(n)}}
        for path, n in channels.sizes(module.network((28, 28, 1))).items()
    }
    variables = {**variables, "gates": {**rest, **ranks}}
    small = compact(module, variables, (28, 28, 1))
    np.testing.assert_array_equal(small.kept["Conv_0"], [0, 4, 5])
    x = example(4, 28, 28, 1)
    same(outputs(small.module, small.variables, x), outputs(module, variables, x))


def test_inputs_that_nothing_reads():
    module = LeNet(3, (), 5, (6, 4))
    params = models.init(module, jax.random.key(0), (12,))
    masks = pruning_masks.full(params)
    masks["Dense_0"]["kernel"] = masks["Dense_0"]["kernel"].at[jnp.array([3, 7])].set(False)
    small = compact(module, {"params": params}, (12,), masks=masks)
    x = example(4, 12)
    expected = outputs(module, {"params": pruning_masks.apply(params, masks)}, x)
    same(outputs(small.module, small.variables, x), expected)
    assert small.after.parameters == 10 * 6 + 6 + 6 * 4 + 4 + 4 * 3 + 3


def test_an_empty_batch():
    module, shape, variables = large("vgg")
    small = compact(module, variables, shape)
    assert small.module.apply(small.variables, jnp.zeros((0, *shape))).shape == (0, 4)


def test_a_small_network_is_compacted_like_any_other():
    module, shape, _ = large("vgg")
    small = compact(module, with_gates("vgg", 5), shape)
    again = compact(small.module, small.variables, shape)
    assert again.module.network == small.module.network
    with pytest.raises(ValueError, match=r"input_shape is \(4, 4, 3\)"):
        compact(small.module, small.variables, (4, 4, 3))


@pytest.mark.parametrize("kind", [Slimming(), L1()])
def test_masks_close_gates_too(kind):
    """As `layer.masks` makes them: what they hold at zero is as if it were zero."""
    module = models.create("lenet5", kind=kind)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    network = module.network((28, 28, 1))
    half = {path: jnp.arange(n) < n // 2 for path, n in channels.sizes(network).items()}
    masks = layer.masks(kind, variables["params"], network, half)
    applied = {"params": pruning_masks.apply(variables["params"], masks)}
    small = compact(module, variables, (28, 28, 1), masks=masks)
    assert small.after == compact(module, applied, (28, 28, 1)).after
    assert small.after.channels == sum(n // 2 for n in channels.sizes(network).values())
    x = example(3, 28, 28, 1)
    same(outputs(small.module, small.variables, x), outputs(module, applied, x))


def test_what_is_no_network():
    module = models.create("lenet5")
    params = module.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    with pytest.raises(ValueError, match="expected 'params' among them"):
        compact(module, params, (28, 28, 1))
    with pytest.raises(ValueError, match="Dense has no method 'network'"):
        compact(nn.Dense(3), {"params": {}}, (4,))
