"""Small networks against the large ones they come from, on every architecture there is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from ntt_sparse import models
from ntt_sparse.gates import channels, layer
from ntt_sparse.gates import network as graph
from ntt_sparse.gates.dam import Dam
from ntt_sparse.gates.l1 import L1
from ntt_sparse.models.autoencoder import Autoencoder, Perceptron
from ntt_sparse.models.described import Described, parameter_shapes, statistics_shapes
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.models.preresnet import PreResNet
from ntt_sparse.models.resnet import ResNet
from ntt_sparse.models.vgg import Vgg
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.pruning.compact import compact, compact_network

GATED = {
    "lenet5": (models.create("lenet5", kind=L1()), (28, 28, 1)),
    "lenet5 tanh": (models.create("lenet5", kind=L1(), activation="tanh", gated=3), (28, 28, 1)),
    "lenet5 sine": (models.create("lenet5", kind=L1(), activation="sine"), (8, 8, 1)),
    "same": (LeNet(3, ((4, 6), (5,)), 3, (7,), padding="SAME", kind=L1()), (9, 10, 2)),
    "even kernel": (LeNet(3, ((4, 6),), 4, (7,), padding="SAME", kind=L1()), (9, 10, 2)),
    "preresnet": (PreResNet(4, 2, (4, 6), L1()), (9, 9, 3)),
    "narrow": (PreResNet(3, 1, (2, 3), L1()), (6, 7, 2)),
    "preresnet20": (models.create("preresnet20", kind=L1()), (32, 32, 3)),
    "vgg": (Vgg(4, ((6, 5), (8, 7)), L1()), (10, 12, 3)),
    "vgg19": (models.create("vgg19", kind=L1()), (32, 32, 3)),
    "autoencoder": (Autoencoder(Perceptron((9, 6)), Perceptron((9, 20)), L1()), (4, 5)),
    "quadratic": (
        Autoencoder(Perceptron((9, 6), "leaky_relu"), Perceptron((20,), quadratic=True), L1()),
        (20,),
    ),
    "tanh autoencoder": (
        Autoencoder(Perceptron((6,)), Perceptron((9, 12), "elu", "tanh"), L1()), (3, 4)
    ),
}  # fmt: skip
MASKED = {
    "lenet_300_100": (models.create("lenet_300_100"), (8, 8, 1)),
    "lenet5_caffe": (models.create("lenet5_caffe"), (28, 28, 1)),
    "lenet5_caffe same": (models.create("lenet5_caffe", padding="SAME"), (28, 28, 1)),
    "conv4": (models.create("conv4", padding="SAME"), (12, 12, 3)),
    "conv4_dropout": (models.create("conv4_dropout"), (32, 32, 3)),
    "resnet20": (models.create("resnet20"), (16, 16, 3)),
    "resnet a group": (ResNet(4, 2, (32, 32, 64), norm="group"), (9, 9, 3)),
    "resnet a none": (ResNet(4, 2, (5, 5, 8), norm="none"), (9, 9, 3)),
    "resnet b batch": (ResNet(4, 2, (6, 9), shortcut="B"), (9, 9, 3)),
    "resnet b group": (ResNet(4, 1, (32, 6), shortcut="B", norm="group"), (9, 9, 3)),
}


@functools.cache
def large(name):
    """The module, its input shape and variables, with statistics and biases of all signs."""
    module, shape = (GATED | MASKED)[name]
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, *shape)))
    rng = np.random.default_rng(0)

    def leaf(path, like):
        noise = rng.standard_normal(like.shape)
        if path[-1].key in ("var", "scale"):
            noise = np.exp(0.3 * noise)
        elif path[-1].key in ("bias", "mean"):
            noise = 0.5 * noise
        else:
            noise = noise / np.sqrt(like.size / like.shape[-1])
        return jnp.asarray(noise, like.dtype)

    return module, shape, jax.tree_util.tree_map_with_path(leaf, dict(shapes))


def with_gates(name, seed, closed=0.5):
    """Variables whose gates are between a half and two, or closed; one at least is open."""
    module, shape, variables = large(name)
    rng = np.random.default_rng(seed)
    gates = {}
    for path, n in channels.sizes(module.network(shape)).items():
        values = rng.uniform(0.5, 2, n) * (rng.random(n) > closed)
        values[rng.integers(n)] = 1
        gates[path] = {"scale": jnp.asarray(values, jnp.float32)}
    return {**variables, "params": layer.replace(variables["params"], gates)}


def neuron_masks(name, seed, closed=0.4):
    """Masks of all weights of some outputs of each layer but the last."""
    module, shape, variables = large(name)
    rng = np.random.default_rng(seed)
    last = list(module.network(shape).nodes)[-1]

    def mask(path, leaf):
        if path == f"{last}/kernel":
            return jnp.ones(leaf.shape, bool)
        open_ = rng.random(leaf.shape[-1]) > closed
        open_[rng.integers(len(open_))] = True
        return jnp.broadcast_to(open_, leaf.shape)

    return pruning_masks.map_prunable(mask, variables["params"])


def outputs(module, variables, x, **kwargs):
    return jax.jit(functools.partial(module.apply, **kwargs))(variables, x)


def same(got, expected, tolerance=1e-5):
    scale = max(1.0, float(jnp.max(jnp.abs(expected))))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


def without_gates(params):
    return {
        key: without_gates(value) if isinstance(value, dict) else value
        for key, value in params.items()
        if key != "gate"
    }


def check_counts(small):
    """What is counted is what is there, and what was put in is counted where it is."""
    there = channels.whole(small.module.network)
    assert size(small.variables["params"]) == there.parameters
    assert there.parameters == small.after.parameters + small.constants
    assert there.multiply_adds == small.after.multiply_adds and small.constants >= 0


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Those of one class with another are left out.
@pytest.mark.parametrize(
    "name", sorted((GATED | MASKED).keys() - {"vgg19", "preresnet20", "resnet20"})
)
def test_descriptions_are_the_models(name):
    module, shape, variables = large(name)
    x = jax.random.normal(jax.random.key(1), (3, *shape))
    network = graph.check(module.network(shape))
    own = variables
    if name in GATED:
        ones = {path: {"scale": jnp.ones(n)} for path, n in channels.sizes(network).items()}
        variables = {**variables, "params": layer.replace(variables["params"], ones)}
        own = {**variables, "params": without_gates(variables["params"])}
    same(outputs(Described(network), own, x), outputs(module, variables, x))
    made = jax.eval_shape(Described(network).init, jax.random.key(0), x)
    weights = pruning_masks.named_leaves(variables["params"])
    expected = {path: leaf.shape for path, leaf in weights.items() if "gate" not in path}
    assert {k: v.shape for k, v in pruning_masks.named_leaves(made["params"]).items()} == expected
    assert channels.whole(network).parameters == sum(map(np.prod, expected.values()))


@pytest.mark.parametrize("name", GATED)
def test_gated_networks_keep_their_outputs(name):
    module, shape, _ = large(name)
    variables = with_gates(name, 1)
    x = jax.random.normal(jax.random.key(2), (5, *shape))
    small = compact(module, variables, shape)
    same(outputs(small.module, small.variables, x), outputs(module, variables, x))
    network = module.network(shape)
    gates = layer.values(module.kind, variables, network)
    open_ = {path: value > 0 for path, value in gates.items()}
    assert small.after == channels.count(network, open_)
    assert small.before == channels.whole(network)
    check_counts(small)
    assert small.after.parameters < small.before.parameters


@pytest.mark.parametrize("name", MASKED)
def test_masked_networks_keep_their_outputs(name):
    module, shape, variables = large(name)
    masks = neuron_masks(name, 1)
    x = jax.random.normal(jax.random.key(2), (5, *shape))
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


@settings(max_examples=8, deadline=None)
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
    open_ = {path: gate["scale"] > 0 for path, gate in gates.items()}
    assert small.after == channels.count(module.network(shape), open_)


def test_double_precision_is_exact():
    with jax.enable_x64(True):
        module = Vgg(4, ((6, 5), (8, 7)), L1(), param_dtype=jnp.float64)
        x = jax.random.normal(jax.random.key(0), (3, 10, 12, 3), jnp.float64)
        variables = module.init(jax.random.key(1), x)
        gates = {
            path: {"scale": jnp.asarray(np.arange(n) % 2, jnp.float64)}
            for path, n in channels.sizes(module.network(x.shape[1:])).items()
        }
        noisy = jax.tree.map(
            lambda leaf: leaf + 0.3 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), variables
        )
        noisy["params"] = layer.replace(noisy["params"], gates)
        small = compact(module, noisy, x.shape[1:])
        expected = module.apply(noisy, x)
        np.testing.assert_allclose(small.module.apply(small.variables, x), expected, rtol=1e-12)
        assert small.constants > 0


def hand_made():
    """Two channels of which one is closed before its normalisation and a padded convolution."""
    build = graph.Builder((5, 6, 1))
    y = build(graph.Conv("input", 2, 1, gate="a/gate"), "a")
    y = build(graph.Activation(build(graph.Norm(y), "n"), "relu"))
    build(graph.Conv(y, 1, 3, 1, (1, 1)), "b")
    params = {
        "a": {"kernel": jnp.array([[[[2.0, 3.0]]]])},
        "n": {"scale": jnp.array([1.0, 2.0]), "bias": jnp.array([0.0, 0.7])},
        "b": {"kernel": jnp.stack([jnp.eye(3), jnp.arange(9.0).reshape(3, 3)], -1)[..., None]},
    }
    statistics = {"n": {"mean": jnp.array([0.0, 0.1]), "var": jnp.ones(2) - 1e-5}}
    return build.network(), params, statistics


def test_borders_by_hand():
    network, params, statistics = hand_made()
    gates = {"a/gate": jnp.array([1.0, 0.0])}
    small = compact_network(network, params, statistics, gates=gates)
    # The closed channel is relu(2 (0 - 0.1) + 0.7) = 0.5 everywhere, and zero around the image.
    around = np.pad(np.full((5, 6), 0.5), 1)
    weights = np.arange(9.0).reshape(3, 3)
    expected = np.array([
        [np.sum(around[i : i + 3, j : j + 3] * weights) for j in range(6)] for i in range(5)
    ])  # fmt: skip
    (shift,) = (
        node for node in small.module.network.nodes.values() if isinstance(node, graph.Shift)
    )
    assert (shift.rows, shift.columns) == ((1, 3, 1), (1, 4, 1))
    zeros = jnp.zeros((1, 5, 6, 1))
    np.testing.assert_allclose(
        small.module.apply(small.variables, zeros)[0, :, :, 0], expected, rtol=1e-6
    )
    # 1 kernel, scale and shift, 9 weights; 9 numbers for the borders. Of 2 + 4 + 18.
    assert small.before.parameters == 24
    assert (small.after.parameters, small.constants) == (12, 9)
    assert small.after.multiply_adds == 30 + 9 * 30
    np.testing.assert_array_equal(small.kept["a"], [0])


def test_training_goes_on_as_in_the_large_network():
    module, shape, _ = large("vgg")
    variables = with_gates("vgg", 3)
    x = jax.random.normal(jax.random.key(2), (6, *shape))
    train = {"train": True, "mutable": ["batch_stats"]}
    # In training a closed channel is its shift, in evaluation so if its running mean is zero.
    clean = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    variables = {**variables, "batch_stats": clean}
    small = compact(module, variables, shape)
    expected, state = module.apply(variables, x, **train)
    got, small_state = small.module.apply(small.variables, x, **train)
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
    x = jax.random.normal(jax.random.key(4), (2, *shape))
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
    x = jax.random.normal(jax.random.key(4), (2, *shape))
    same(outputs(again.module, again.variables, x), outputs(small.module, small.variables, x), 1e-6)


def test_weights_of_zero_are_no_way():
    """Channels that only weights of zero read are taken out, gates or not."""
    module = LeNet(2, (), 5, (4, 3))
    params = models.init(module, jax.random.key(0), (5,))
    kernel = params["Dense_1"]["kernel"].at[2].set(0)
    params = {**params, "Dense_1": {**params["Dense_1"], "kernel": kernel}}
    small = compact(module, {"params": params}, (5,))
    np.testing.assert_array_equal(small.kept["Dense_0"], [0, 1, 3])
    x = jax.random.normal(jax.random.key(1), (4, 5))
    same(small.module.apply(small.variables, x), module.apply({"params": params}, x))
    assert small.constants == 0


def test_an_order_of_channels_counts():
    module = models.create("lenet5", kind=Dam(-2.5))
    variables = module.init(jax.random.key(0), jnp.ones((1, 28, 28, 1)))
    ranks = {"Conv_0": {"gate": {"ranks": jnp.array([5, 0, 1, 2, 3, 4])}}}
    rest = {
        path.split("/")[0]: {"gate": {"ranks": jnp.arange(n)}}
        for path, n in channels.sizes(module.network((28, 28, 1))).items()
    }
    variables = {**variables, "gates": {**rest, **ranks}}
    small = compact(module, variables, (28, 28, 1))
    np.testing.assert_array_equal(small.kept["Conv_0"], [0, 4, 5])
    x = jax.random.normal(jax.random.key(1), (4, 28, 28, 1))
    same(small.module.apply(small.variables, x), module.apply(variables, x))


def test_bad_input():
    network, params, statistics = hand_made()
    gates = {"a/gate": jnp.array([1.0, 0.0])}
    for arguments, message in (
        ({"gates": {}}, r"gates are \[\], the network has \['a/gate'\]"),
        ({"gates": {"a/gate": jnp.ones(3)}}, r"shape \(3,\), expected \(2,\)"),
        ({"gates": {"a/gate": jnp.array([1, jnp.nan])}}, "expected finite numbers"),
        ({"empty": "keep"}, "empty='keep' is unknown"),
        ({"statistics": {}}, "there is no statistic 'n/mean'"),
        ({"params": {**params, "b": {}}}, "there is no parameter 'b/kernel'"),
        ({"params": {**params, "b": {"kernel": jnp.ones(3)}}}, r"shape \(3,\), expected \(3, 3, 2"),
        (
            {"params": {**params, "a": {"kernel": params["a"]["kernel"] * jnp.inf}}},
            "'a/kernel' is not finite",
        ),
        ({"masks": {"a": None}}, "masks must have the structure of params"),
    ):
        call = {"params": params, "statistics": statistics, "gates": gates, **arguments}
        with pytest.raises(ValueError, match=message):
            compact_network(network, **call)
    small = compact_network(network, params, statistics, gates=gates)
    with pytest.raises(ValueError, match=r"examples have shape \(4, 6, 1\)"):
        small.module.apply(small.variables, jnp.ones((1, 4, 6, 1)))


@pytest.mark.parametrize(
    ("size", "stride", "padding", "channels", "features"),
    [(3, 1, (1, 1), 2, 3), (5, 1, (0, 0), 1, 4), (3, 2, (1, 1), 3, 2), (4, 3, (1, 2), 4, 1)],
)
def test_convolutions_of_few_terms(size, stride, padding, channels, features):
    """They are written out on CPU; values and derivatives are those of the convolution."""
    build = graph.Builder((9, 8, channels))
    build(graph.Conv("input", features, size, stride, padding), "a")
    network = build.network()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 9, 8, channels)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((size, size, channels, features)), jnp.float32)

    def ours(x, kernel):
        return Described(network).apply({"params": {"a": {"kernel": kernel}}}, x)

    def direct(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), [padding, padding],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    assert "conv_general_dilated" not in jax.jit(ours).lower(x, kernel).compile().as_text()
    same(ours(x, kernel), direct(x, kernel))
    weights = jnp.asarray(rng.standard_normal(direct(x, kernel).shape), jnp.float32)
    slopes, expected = (
        jax.grad(lambda x, kernel, f=f: jnp.sum(weights * f(x, kernel)), (0, 1))(x, kernel)
        for f in (ours, direct)
    )
    for got, wanted in zip(slopes, expected, strict=True):
        same(got, wanted)


def described(build, seed=0, scale=0.5):
    """A description with random parameters and statistics, some weights of which are zero."""
    network, rng = build.network(), np.random.default_rng(seed)
    leaves = {}
    for path, leaf in parameter_shapes(network).items():
        value = scale * rng.standard_normal(leaf.shape)
        if path.endswith("scale"):
            value = np.where(rng.random(leaf.shape) < 0.8, 1 + value, 0)
        if path.endswith("kernel"):
            # Outputs, and single weights.
            value = value * (rng.random(leaf.shape[-1]) < 0.7) * (rng.random(leaf.shape) < 0.9)
            # Inputs.
            value = value * (rng.random((*leaf.shape[-2:-1], 1)) < 0.8)
        leaves[path] = jnp.asarray(value, jnp.float32)
    state = {
        path: jnp.asarray(rng.uniform(0.2, 1, leaf.shape), jnp.float32)
        for path, leaf in statistics_shapes(network).items()
    }
    nested = (traverse_util.unflatten_dict(each, sep="/") for each in (leaves, state))
    return network, *nested


def agrees(network, params, statistics, x):
    """Compacts, checks, and returns what came of it."""
    small = compact_network(network, params, statistics, empty="remove")
    variables = {"params": params, "batch_stats": statistics}
    expected = outputs(Described(network), variables, x)
    got = outputs(small.module, small.variables, x)
    assert got.shape == expected.shape
    same(got, expected)
    check_counts(small)
    return small


def random_description(seed):
    """Layers of all kinds one after another, with sums of what came before."""
    rng = np.random.default_rng(seed)
    build = graph.Builder((7, 6, 3))
    y, shapes = "input", {}
    for index in range(7):
        shapes = graph.shapes(graph.Network(build.nodes))
        height, _, channels_ = shapes[y]
        kind = rng.integers(9)
        name = f"n{index}"
        if kind <= 3:
            size = int(rng.integers(1, 4))
            padding = tuple(int(each) for each in rng.integers(0, 3, 2))
            stride = 1 + int(rng.random() < 0.2 and height > 4)
            node = graph.Conv(y, int(rng.integers(2, 6)), size, stride, padding, bool(kind % 2))
        elif kind == 4:
            node = graph.Norm(y, groups=int(rng.choice([0, channels_])))
        elif kind == 5:
            node = graph.Activation(y, str(rng.choice(["relu", "tanh", "sine", "elu"])))
        elif kind == 6:
            node = graph.Subsample(y, channels_ + int(rng.integers(0, 3)), 1)
        else:
            alike = [each for each, shape in shapes.items() if shape == shapes[y]]
            inputs = tuple(str(each) for each in rng.choice(alike, 2))
            node = graph.Add(inputs) if kind == 7 else graph.Multiply(inputs)
        y = build(node, name)
    if rng.random() < 0.7:
        y = build(graph.Activation(build(graph.Conv(y, 3, 3, 1, (1, 1)), "last"), "relu"))
        build(graph.Dense(y, 4), "out")
    return build


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_and_what_is_left_of_them_compacted_again(seed):
    build = random_description(seed)
    network, params, statistics = described(build, seed)
    x = jax.random.normal(jax.random.key(seed), (3, 7, 6, 3))
    small = agrees(network, params, statistics, x)
    # Close more of the small one.
    closed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf.at[..., 0].set(0) if path[-1].key == "kernel" and leaf.shape[-1] > 1 else leaf
        ),
        small.variables["params"],
    )
    state = small.variables.get("batch_stats", {})
    agrees(small.module.network, closed, state, x)


def test_inputs_that_nothing_reads():
    module = LeNet(3, (), 5, (6, 4))
    params = models.init(module, jax.random.key(0), (12,))
    masks = pruning_masks.full(params)
    masks["Dense_0"]["kernel"] = masks["Dense_0"]["kernel"].at[jnp.array([3, 7])].set(False)
    small = compact(module, {"params": params}, (12,), masks=masks)
    x = jax.random.normal(jax.random.key(1), (4, 12))
    expected = module.apply({"params": pruning_masks.apply(params, masks)}, x)
    same(small.module.apply(small.variables, x), expected)
    assert small.after.parameters == 10 * 6 + 6 + 6 * 4 + 4 + 4 * 3 + 3


def test_borders_of_channels_of_other_scales_are_kept():
    """A constant of a million in one channel, of a hundred-thousandth in the next."""
    build = graph.Builder((5, 5, 1))
    y = build(graph.Conv("input", 2, 1, bias=True), "a")
    y = build(graph.Conv(y, 2, 3, 1, (1, 1)), "b")
    build(graph.Norm(y), "n")
    kernel = jnp.zeros((3, 3, 2, 2)).at[1, 1, 1, 0].set(1e6).at[:, :, 1, 1].set(1e-5)
    params = {
        "a": {"kernel": jnp.array([[[[1.0, 0.0]]]]), "bias": jnp.array([0.0, 1.0])},
        "b": {"kernel": kernel.at[0, 0, 0].set(1.0)},
        "n": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
    }
    statistics = {"n": {"mean": jnp.zeros(2), "var": jnp.array([1e12, 1e-10])}}
    x = jnp.zeros((1, 5, 5, 1))
    small = agrees(build.network(), params, statistics, x)
    got = np.asarray(small.module.apply(small.variables, x))[0, :, 2, 1]
    assert got[0] < 0.7 * got[2]


def test_networks_without_parameters_and_empty_batches():
    build = graph.Builder((3, 4, 2))
    build(graph.Add((build(graph.Activation("input", "tanh")), "input")))
    agrees(*described(build), jnp.ones((2, 3, 4, 2)))
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
