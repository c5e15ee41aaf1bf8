"""Small networks of descriptions made by hand and at random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from small_networks import (
    check_counts,
    outputs,
    same,
)

from ntt_sparse.gates import network as graph
from ntt_sparse.gates import network_text
from ntt_sparse.models.described import Described, parameter_shapes, statistics_shapes
from ntt_sparse.pruning.compact import compact_network


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


class Own(nn.Module):
    """A network of Flax's own modules, of features so small that epsilon is most of a variance."""

    grouped: bool

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(4, (3, 3), use_bias=False, name="a")(x)
        norm = nn.GroupNorm(2, name="n") if self.grouped else nn.BatchNorm(True, name="n")
        return nn.Conv(2, (1, 1), use_bias=False, name="b")(nn.leaky_relu(norm(y)))


@pytest.mark.parametrize("grouped", [True, False])
def test_epsilon_is_that_of_the_network_itself(grouped):
    """Flax adds 1e-6 in group normalisation; a closed channel is folded with the same."""
    build = graph.Builder((5, 6, 1))
    y = build(graph.Conv("input", 4, 3, padding=(1, 1), gate="a/gate"), "a")
    norm = graph.Norm(y, 2, epsilon=nn.GroupNorm().epsilon) if grouped else graph.Norm(y)
    build(graph.Conv(build(graph.Activation(build(norm, "n"), "leaky_relu")), 2, 1), "b")
    module, x = Own(grouped), 1e-3 * jax.random.normal(jax.random.key(1), (3, 5, 6, 1))
    variables = module.init(jax.random.key(0), x)
    params, statistics = variables["params"], variables.get("batch_stats", {})
    closed = jnp.array([1.0, 1, 1, 0])
    small = compact_network(build.network(), params, statistics, gates={"a/gate": closed})
    kernel = params["a"]["kernel"] * closed
    expected = module.apply({**variables, "params": {**params, "a": {"kernel": kernel}}}, x)
    same(outputs(small.module, small.variables, x), expected)
    again = network_text.from_json(network_text.to_json(small.module.network))
    assert again == small.module.network


def test_bad_input():
    network, params, statistics = hand_made()
    gates = {"a/gate": jnp.array([1.0, 0.0])}
    for arguments, message in (
        ({"gates": {}}, r"gates are \[\], the network has \['a/gate'\]"),
        ({"gates": {"a/gate": jnp.ones(3)}}, r"shape \(3,\), expected \(2,\)"),
        ({"gates": {"a/gate": jnp.array([1, jnp.nan])}}, "expected finite numbers"),
        ({"gates": {"a/gate": np.array([1, 1e39])}}, "expected finite numbers"),
        ({"gates": {"a/gate": np.array([1, 1j])}}, "expected finite numbers"),
        ({"gates": {"a/gate": np.array(["1", "2"])}}, "expected finite numbers"),
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
            node = graph.Norm(
                y, int(rng.choice([0, channels_])), None, float(rng.choice([1e-5, 0.1]))
            )
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


@pytest.mark.variants(3)
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


def test_a_network_without_parameters():
    build = graph.Builder((3, 4, 2))
    build(graph.Add((build(graph.Activation("input", "tanh")), "input")))
    agrees(*described(build), jnp.ones((2, 3, 4, 2)))
