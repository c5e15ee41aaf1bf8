"""The structured kernel of convolutions and embeddings, and its bound on memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from made_weights import as_flat, assert_equal, assert_equals_jacobian_method, value_and_grad

from ntt_sparse.ntk import empirical_ntk, structured

# Of `small_cnn`: height, width, channels in and channels out.
KERNELS = {"deep": (3, 3, 2, 36), "wide": (2, 1, 1, 36), "last": (2, 2, 36, 2)}
BIAS = (36,)


def small_cnn(w, x):
    """Rectangular, with strides, a depthwise convolution and more channels than `_SHALLOW`."""
    options = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    x = jnp.tanh(jax.lax.conv_general_dilated(x, w["deep"], (1, 2), **options) + w["b"])
    groups = x.shape[-1]
    x = jax.lax.conv_general_dilated(x, w["wide"], (2, 1), feature_group_count=groups, **options)
    x = jnp.tanh(jax.lax.conv_general_dilated(jnp.tanh(x), w["last"], (1, 1), **options))
    return jnp.mean(x, axis=(1, 2))


# In bytes: all pairs of examples of `small_cnn` meet at once, or block after block.
LIMITS = structured.MEMORY_LIMIT, 60_000


def draw(seed, scale=lambda channels_in: 1.0):
    rng = np.random.default_rng(seed)
    weights = {
        name: jnp.asarray(rng.normal(size=shape) * scale(shape[-2]))
        for name, shape in KERNELS.items()
    }
    weights["b"] = jnp.asarray(rng.normal(size=BIAS))
    return weights, rng


def test_deep_convolutions_have_a_rule_and_meet_in_blocks(x64):
    weights, _ = draw(8)
    leaves, not_masked = [*weights.values()], [None for _ in weights]
    fn = as_flat(small_cnn, weights)
    for limit in LIMITS:
        layout = structured.plan(fn, leaves, jnp.ones((5, 5, 6, 2)), limit)
        assert [list(weights)[leaf] for leaf in layout.shared] == ["deep", "wide", "last"]
        network = structured.Network(layout, fn, leaves, not_masked, {})
        block = structured._block([network], 5, 3, structured.Options(memory_limit=limit))
        assert (block == (5, 3)) == (limit == structured.MEMORY_LIMIT)


# In blocks they are also in the test below, and their traces in that of neural-tangents.
@pytest.mark.parametrize(
    ("output", "limit"),
    [
        ("full", LIMITS[0]),
        pytest.param("trace", LIMITS[1], marks=pytest.mark.slow),
        pytest.param("full", LIMITS[1], marks=pytest.mark.slow),
    ],
)
def test_deep_convolutions_in_blocks(x64, output, limit):
    # Drawn smaller where more channels come in.
    weights, rng = draw(8, lambda channels_in: 1 / channels_in)
    x1, x2 = (jnp.asarray(rng.normal(size=(n, 5, 6, 2))) for n in (5, 3))
    assert_equals_jacobian_method(small_cnn, weights, x1, x2, output=output, memory_limits=[limit])


# Promises that are kept are in the objective of convolutional networks too.
@pytest.mark.parametrize(
    ("max_density", "limit"),
    [
        (0.01, LIMITS[0]),
        pytest.param(0.2, LIMITS[0], marks=pytest.mark.slow),
        pytest.param(0.2, LIMITS[1], marks=pytest.mark.slow),
    ],
)
def test_a_promised_density_changes_nothing(x64, max_density, limit):
    """Kept as promised (by 0.2), or not (by 0.01): value and gradient are those of the mask."""
    weights, rng = draw(10)
    masks = {name: jnp.asarray(rng.random(w.shape) < 0.15) for name, w in weights.items()}
    masks["wide"] = jnp.zeros(KERNELS["wide"], bool).at[0, 0, 0, ::8].set(True)
    x1, x2 = (jnp.asarray(rng.normal(size=(n, 5, 6, 2))) for n in (3, 2))
    arguments = small_cnn, weights, x1, x2
    expected = value_and_grad(*arguments, masks=masks, method="jacobian")
    options = {"max_density": max_density, "memory_limit": limit}
    assert_equal(value_and_grad(*arguments, masks=masks, **options), expected)


def test_the_memory_limit_bounds_memory():
    """With its gradient; four times the pairs take the memory of the bound, not four times it."""
    weights = {"conv": jnp.ones((3, 3, 3, 64)), "dense": jnp.ones((64, 5))}

    def network(w, x):
        options = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        x = jax.lax.conv_general_dilated(x, w["conv"], (1, 1), **options)
        return jnp.tanh(x).mean((1, 2)) @ w["dense"]

    def mebibytes(n, limit):
        def objective(w, x):
            return jnp.sum(empirical_ntk(network, w, x, x + 1, memory_limit=limit) ** 2)

        program = jax.jit(jax.grad(objective)).lower(weights, jnp.ones((n, 8, 8, 3))).compile()
        return program.memory_analysis().temp_size_in_bytes / 2**20

    free, bound = mebibytes(256, 2**30), mebibytes(256, 2**21)
    # The Jacobians of 512 examples take 17 MiB.
    assert free > 17
    assert bound < free / 2


# Few positions and many channels: sensitivities are small, Jacobians are not.
@pytest.mark.parametrize("side", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_promised_density_saves_memory(side):
    """With its gradient: Jacobians are then made for the kept weights alone, of both batches."""
    rng = np.random.default_rng(11)
    shape = (3, 3, 64, 64)
    weights = {"in": jnp.ones((1, 1, 3, 64)), "conv": jnp.ones(shape), "dense": jnp.ones((64, 5))}
    masks = {"in": None, "conv": jnp.asarray(rng.random(shape) < 0.01), "dense": None}
    n = 32

    def network(w, x):
        options = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        x = jax.lax.conv_general_dilated(x, w["in"], (1, 1), **options)
        x = jax.lax.conv_general_dilated(jnp.tanh(x), w["conv"], (1, 1), **options)
        return jnp.tanh(x).mean((1, 2)) @ w["dense"]

    def temporary(max_density):
        def objective(w, x):
            options = {"masks": masks, "max_density": max_density}
            return jnp.sum(empirical_ntk(network, w, x, x + 1, **options) ** 2)

        program = (
            jax.jit(jax.grad(objective)).lower(weights, jnp.ones((n, side, side, 3))).compile()
        )
        return program.memory_analysis().temp_size_in_bytes

    jacobian = n * 5 * math.prod(shape) * 4
    assert temporary(1.0) > 2 * jacobian
    assert temporary(0.02) < jacobian


CONVOLUTIONS = {
    "same": {"padding": "SAME"},
    "valid": {"padding": "VALID"},
    "strides": {"padding": "SAME", "window_strides": (2, 3)},
    "dilated_window": {"padding": "VALID", "rhs_dilation": (2, 1)},
    "dilated_input": {"padding": ((1, 2), (0, 1)), "lhs_dilation": (2, 3)},
    "cropped": {"padding": ((-1, 0), (2, -2))},
    "channels_first": {"padding": "SAME", "dimension_numbers": ("NCHW", "HWIO", "NHWC")},
    "odd_layout": {"padding": "VALID", "dimension_numbers": ("HNCW", "OHIW", "CWNH")},
    "one_position": {"padding": "VALID", "window_strides": (9, 9)},
    "groups": {"padding": "SAME", "feature_group_count": 2},
    "two_images": {"padding": "VALID", "dimension_numbers": ("CHWN", "HWIO", "NHWC")},
}


# Whose options the others have too.
COVERED = ("same", "valid", "channels_first")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in COVERED)) for name in CONVOLUTIONS],
)
def test_convolutions(x64, name):
    options = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    options |= CONVOLUTIONS[name]
    lhs, rhs, _ = options["dimension_numbers"]
    # Images of 6 x 7 with 2 channels (which "two_images" takes for two images).
    sizes = {"N": 1, "H": 6, "W": 7, "C": 2}
    if name == "two_images":
        sizes |= {"N": 2, "C": 1}
    window = {"H": 3, "W": 2, "I": sizes["C"] // options.get("feature_group_count", 1), "O": 4}
    rng = np.random.default_rng(5)
    weights = {"conv": jnp.asarray(rng.normal(size=[window[axis] for axis in rhs]))}
    x1, x2 = (jnp.asarray(rng.normal(size=(n, *(sizes[axis] for axis in lhs)))) for n in (3, 2))

    def network(w, x):
        def one(image):
            result = jnp.tanh(jax.lax.conv_general_dilated(image, w["conv"], **options))
            return result.reshape(-1)[:7:2]

        return one(x[0])[None] if len(x) == 1 else jax.lax.map(one, x)

    layout = structured.plan(as_flat(network, weights), [*weights.values()], x1)
    found = [name for name in ("dense", "shared", "direct", "rest") if getattr(layout, name)]
    expected = {"one_position": "dense", "two_images": "direct"}
    assert found == [expected.get(name, "shared")]
    assert_equals_jacobian_method(network, weights, x1, x2)


def looked_up(w, x):
    tokens = jnp.take(w["table"], x, axis=0)
    return jnp.tanh(jnp.tanh(tokens) @ w["dense"]).mean(1)


def indexed(w, x):
    """One row per example, of a table of matrices."""
    return jnp.tanh(jnp.tanh(w["stack"][x[:, 0]]).sum(1) @ w["dense"])


def clipped(w, x):
    tokens = jnp.take(w["table"], 2 * x - 3, axis=0, mode="clip")
    return jnp.tanh(jnp.tanh(tokens) @ w["dense"]).mean(1)


def columns(w, x):
    """Not rows of the table: without a rule."""
    tokens = jnp.take(w["table"], x % 3, axis=1).swapaxes(0, 1)
    return jnp.tanh(tokens.sum(2) @ jnp.ones((7, 2)))


def tied(w, x):
    """An embedding that reads its own table for the logits."""
    return jnp.tanh(jnp.take(w["table"], x, axis=0)).mean(1) @ w["table"].T


RULES = {
    looked_up: "shared", indexed: "dense", clipped: "shared", columns: "direct", tied: "direct"
}  # fmt: skip


@pytest.mark.parametrize(
    ("network", "output"),
    [
        (looked_up, "full"),
        (indexed, "trace"),
        (clipped, "trace"),
        (columns, "full"),
        (tied, "trace"),
        pytest.param(looked_up, "trace", marks=pytest.mark.slow),
        pytest.param(indexed, "full", marks=pytest.mark.slow),
        pytest.param(clipped, "full", marks=pytest.mark.slow),
        pytest.param(columns, "trace", marks=pytest.mark.slow),
        pytest.param(tied, "full", marks=pytest.mark.slow),
    ],
)
def test_embeddings(x64, network, output):
    rng = np.random.default_rng(11)
    shapes = {"table": (7, 3), "stack": (7, 2, 3), "dense": (3, 2)}
    weights = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    x1, x2 = (jnp.asarray(rng.integers(0, 7, size=(n, 5))) for n in (4, 3))
    layout = structured.plan(as_flat(network, weights), [*weights.values()], x1)
    leaf = 1 if network is indexed else 0
    rules = ("dense", "shared", "direct", "rest")
    assert [name for name in rules if leaf in getattr(layout, name)] == [RULES[network]]
    assert_equals_jacobian_method(network, weights, x1, x2, output=output)


def test_tokens_outside_the_table(x64):
    """Such a token reads zeros here: no row has a part in it."""
    weights = {"table": jnp.asarray(np.random.default_rng(12).normal(size=(4, 3)))}
    x = jnp.asarray([[0, 9, 1], [3, 3, 4]])

    def network(w, x):
        return jnp.tanh(jnp.take(w["table"], x, axis=0, mode="fill", fill_value=0.0)).sum(1)

    assert_equals_jacobian_method(network, weights, x, x)


def test_flax_embedding(x64):
    x = jnp.asarray(np.random.default_rng(13).integers(0, 6, size=(4, 5)))
    net = nn.Sequential([nn.Embed(6, 3), nn.Dense(4), nn.tanh, lambda x: x.mean(1), nn.Dense(2)])
    params = jax.tree.map(jnp.float64, jax.jit(net.init)(jax.random.key(0), x))
    leaves, treedef = jax.tree.flatten(params)
    layout = structured.plan(lambda w, x: net.apply(treedef.unflatten(w), x), leaves, x)
    shapes = {layout_leaf: leaves[layout_leaf].shape for layout_leaf in layout.shared}
    assert (6, 3) in shapes.values()
    value, expected = (
        jax.jit(functools.partial(empirical_ntk, net.apply, method=method))(params, x)
        for method in ("structured", "jacobian")
    )
    np.testing.assert_allclose(value, expected, rtol=1e-11, atol=1e-12)
