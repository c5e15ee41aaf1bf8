import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse import models
from ntt_sparse.models import resnet

TINY = {"num_outputs": 3, "blocks_per_stage": 1, "channels": (2, 3, 5)}


def shapes(module, image=(32, 32, 3)):
    """Shapes of all variables, without computing anything."""
    x = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), x)


def noisy(module, image):
    """Variables with nothing left at zero or one, and three images; compiles nothing."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        # Vectors are positive, since running variances are among them.
        values = rng.uniform(0.5, 1.5, leaf.shape)
        if len(leaf.shape) > 1:
            values = rng.normal(scale=np.sqrt(2 / np.prod(leaf.shape[:-1])), size=leaf.shape)
        return jnp.asarray(values, module.param_dtype)

    x = jnp.asarray(rng.normal(size=(3, *image)), module.param_dtype)
    return jax.tree.map(draw, shapes(module, image)), x


# Architectures


@pytest.mark.parametrize(
    ("name", "shortcut", "parameters"),
    [
        # Published: 0.27M, 0.46M and 0.85M.
        ("resnet20", "A", 269_722),
        ("resnet32", "A", 464_154),
        ("resnet56", "A", 853_018),
        # Two 1x1 kernels, 16 * 32 + 32 * 64, and their scales and biases, 2 * (32 + 64).
        ("resnet20", "B", 269_722 + 2_560 + 192),
        ("resnet32", "B", 464_154 + 2_560 + 192),
        ("resnet56", "B", 853_018 + 2_560 + 192),
    ],
)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_parameter_counts(name, shortcut, parameters, norm):
    variables = shapes(models.create(name, shortcut=shortcut, norm=norm))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    assert set(variables) == ({"params", "batch_stats"} if norm == "batch" else {"params"})


@pytest.mark.parametrize(("name", "layers"), [("resnet20", 20), ("resnet32", 32), ("resnet56", 56)])
def test_without_norm_there_are_as_many_biases_as_layers(name, layers):
    params = shapes(models.create(name, norm="none"))["params"]
    ranks = [leaf.ndim for leaf in jax.tree.leaves(params)]
    assert (ranks.count(4), ranks.count(2), ranks.count(1)) == (layers - 1, 1, layers)


def test_the_defaults_are_those_of_the_paper():
    assert models.create("resnet20") == resnet.ResNet()
    assert (resnet.ResNet().shortcut, resnet.ResNet().norm) == ("A", "batch")


def test_names_of_the_params():
    params = shapes(resnet.ResNet(**TINY, shortcut="B"))["params"]
    stages = {f"stage{stage}_block1" for stage in (1, 2, 3)}
    assert set(params) == {"Conv_0", "BatchNorm_0", "Dense_0", *stages}
    assert {"Conv_2", "BatchNorm_2"} <= set(params["stage2_block1"])
    assert set(params["stage1_block1"]) == {"Conv_0", "Conv_1", "BatchNorm_0", "BatchNorm_1"}


@pytest.mark.parametrize(
    ("image", "sizes"),
    [
        ((8, 8, 3), [(8, 8), (4, 4), (2, 2)]),
        ((7, 10, 1), [(7, 10), (4, 5), (2, 3)]),
        ((1, 2, 2), [(1, 2), (1, 1), (1, 1)]),
    ],
)
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_output_shapes(image, sizes, shortcut):
    module = resnet.ResNet(**{**TINY, "blocks_per_stage": 2}, shortcut=shortcut, norm="group")

    def features(key):
        x = jnp.zeros((4, *image))
        params = models.init(module, key, image)
        return module.apply(
            {"params": params},
            x,
            capture_intermediates=lambda module, _: isinstance(module, resnet.ResidualBlock),
        )

    outputs, state = jax.eval_shape(features, jax.random.key(0))
    assert outputs.shape == (4, 3)
    blocks = state["intermediates"]
    for stage, (size, channels) in enumerate(zip(sizes, (2, 3, 5), strict=True), start=1):
        for block in (1, 2):
            (feature,) = blocks[f"stage{stage}_block{block}"]["__call__"]
            assert feature.shape == (4, *size, channels)


def test_initialisation():
    module = resnet.ResNet(blocks_per_stage=1, channels=(32,), norm="none")
    params = jax.jit(lambda key: models.init(module, key, (4, 4, 3)))(jax.random.key(0))
    for leaf in map(np.asarray, jax.tree.leaves(params)):
        if leaf.ndim == 1:
            assert not leaf.any()
        else:
            expected = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            # The sample deviation has a relative error of about 1 / sqrt(2 n); five of those.
            np.testing.assert_allclose(leaf.std(), expected, rtol=5 / np.sqrt(2 * leaf.size))


# The forward pass, in NumPy


def convolution(x, layer, stride=1):
    kernel = layer["kernel"]
    _, height, width, _ = x.shape
    edge = len(kernel) // 2
    padded = np.pad(x, [(0, 0), (edge, edge), (edge, edge), (0, 0)])
    taps = [
        padded[:, i : i + height : stride, j : j + width : stride] @ kernel[i, j]
        for i in range(len(kernel))
        for j in range(len(kernel))
    ]
    return sum(taps) + layer.get("bias", 0)


def normalisation(x, layers, stats, index, train):
    if f"GroupNorm_{index}" in layers:
        layer, channels = layers[f"GroupNorm_{index}"], x.shape[-1]
        size = 16 if channels % 16 == 0 else channels
        groups = [x[..., start : start + size] for start in range(0, channels, size)]
        axes = {"axis": (1, 2, 3), "keepdims": True}
        groups = [(g - g.mean(**axes)) / np.sqrt(g.var(**axes) + 1e-5) for g in groups]
        x = np.concatenate(groups, axis=-1)
    elif f"BatchNorm_{index}" in layers:
        layer, running = layers[f"BatchNorm_{index}"], stats[f"BatchNorm_{index}"]
        mean = x.mean(axis=(0, 1, 2)) if train else running["mean"]
        var = x.var(axis=(0, 1, 2)) if train else running["var"]
        x = (x - mean) / np.sqrt(var + 1e-5)
    else:
        return x
    return x * layer["scale"] + layer["bias"]


def reference(variables, x, *, stages, train=False):
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    params, stats = variables["params"], variables.get("batch_stats", {})

    def layer(x, layers, stats, index, stride=1):
        y = convolution(x, layers[f"Conv_{index}"], stride)
        return normalisation(y, layers, stats, index, train)

    x = np.maximum(layer(np.asarray(x, np.float64), params, stats, 0), 0)
    for stage in range(1, stages + 1):
        name = f"stage{stage}_block1"
        block, block_stats = params[name], stats.get(name, {})
        stride = 1 if stage == 1 else 2
        y = np.maximum(layer(x, block, block_stats, 0, stride), 0)
        y = layer(y, block, block_stats, 1)
        if "Conv_2" in block:
            x = layer(x, block, block_stats, 2, stride)
        elif stage > 1:
            kept = x[:, ::2, ::2]
            x = np.zeros_like(y)
            x[..., : kept.shape[-1]] = kept
        x = np.maximum(x + y, 0)
    dense = params["Dense_0"]
    return x.mean(axis=(1, 2)) @ dense["kernel"] + dense["bias"]


@pytest.mark.variants(4)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("shortcut", "norm", "train", "dtype"),
    [
        ("A", "none", False, "float64"),
        ("B", "none", False, "float64"),
        ("A", "group", True, "float64"),
        ("B", "group", False, "float32"),
        ("B", "batch", False, "float64"),
        ("A", "batch", True, "float64"),
        ("B", "batch", True, "float32"),
    ],
)
def test_forward_pass(shortcut, norm, train, dtype):
    # 32 channels are two groups, the others one; 9 x 6 halves to 5 x 3 and 3 x 2.
    module = resnet.ResNet(3, 1, (2, 6, 32), shortcut, norm, param_dtype=jnp.dtype(dtype))
    variables, x = noisy(module, (9, 6, 2))
    apply = jax.jit(functools.partial(module.apply, train=train, mutable=["batch_stats"]))
    actual, _ = apply(variables, x)
    assert actual.dtype == dtype
    expected = reference(variables, x, stages=3, train=train)
    assert len(np.unique(expected)) == expected.size  # not a dead network
    tolerance = 1e-9 if dtype == "float64" else 1e-4
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_models_init_and_apply_fn(norm):
    module = resnet.ResNet(**TINY, norm=norm)
    variables, x = noisy(module, (6, 6, 2))
    init = functools.partial(models.init, module, input_shape=(6, 6, 2))
    assert jax.eval_shape(init, jax.random.key(0)) == shapes(module, (6, 6, 2))["params"]
    apply_fn = jax.jit(functools.partial(models.apply_fn(module), train=True))
    actual = apply_fn(variables["params"], x, rngs={"dropout": jax.random.key(0)})
    expected = reference(variables, x, stages=3)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_half_precision_computation_with_single_precision_params(norm):
    module = resnet.ResNet(**TINY, norm=norm, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, 5, 5, 1), jnp.float32)
    variables = shapes(module, (5, 5, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    apply = functools.partial(module.apply, train=True, mutable=["batch_stats"])
    outputs, state = jax.eval_shape(apply, variables, x)
    assert outputs.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype("float32")}


# Shortcut A


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (1, 2)])
def test_shortcut_a_is_slicing_and_zeros(height, width):
    x = np.arange(2.0 * height * width * 3, dtype=np.float32).reshape(2, height, width, 3) + 1
    actual = np.asarray(resnet.subsample_and_pad(jnp.asarray(x), 5, 2))
    assert actual.shape == (2, (height + 1) // 2, (width + 1) // 2, 5)
    for row in range(actual.shape[1]):
        for column in range(actual.shape[2]):
            expected = x[:, 2 * row, 2 * column]
            np.testing.assert_array_equal(actual[:, row, column, :3], expected)
    np.testing.assert_array_equal(actual[..., 3:], 0)


def test_shortcut_a_of_an_unchanged_shape_is_the_identity():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    np.testing.assert_array_equal(resnet.subsample_and_pad(x, 5, 1), x)


def test_shortcut_a_cannot_drop_channels():
    with pytest.raises(ValueError, match="3 channels cannot be padded to 2"):
        resnet.subsample_and_pad(jnp.ones((1, 2, 2, 3)), 2, 1)


def test_without_residuals_the_network_is_its_shortcuts():
    module = resnet.ResNet(**TINY, norm="none")
    variables, x = noisy(module, (7, 8, 2))
    params = variables["params"]
    for stage in (1, 2, 3):
        params[f"stage{stage}_block1"] = jax.tree.map(
            jnp.zeros_like, params[f"stage{stage}_block1"]
        )
    stem = np.maximum(convolution(np.asarray(x), params["Conv_0"]), 0)
    features = np.zeros((3, 5))
    features[:, :2] = stem[:, ::4, ::4].mean(axis=(1, 2))
    expected = features @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    actual = jax.jit(models.apply_fn(module))(params, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_strided_convolutions_are_centred_on_the_pixels_of_the_shortcut():
    # Both convolutions pass the centre on, so that block and shortcut add up.
    block = resnet.ResidualBlock(2, stride=2, norm="none")
    centre = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2))
    layer = {"kernel": centre, "bias": jnp.zeros(2)}
    for size in (6, 7):
        x = jax.random.uniform(jax.random.key(0), (2, size, size, 2))
        y = block.apply({"params": {"Conv_0": layer, "Conv_1": layer}}, x)
        np.testing.assert_allclose(y, 2 * x[:, ::2, ::2], rtol=1e-6)


# Normalisation


def test_with_group_norm_examples_are_independent():
    module = resnet.ResNet(3, 1, (2, 6, 32), norm="group")
    variables, x = noisy(module, (6, 6, 2))
    apply_fn = jax.jit(models.apply_fn(module))
    params = variables["params"]
    together = apply_fn(params, x)
    np.testing.assert_allclose(apply_fn(params, x[:1])[0], together[0], rtol=1e-5, atol=1e-6)
    others = jnp.concatenate([x[:1], 100 * x[1:]])
    np.testing.assert_array_equal(apply_fn(params, others)[0], together[0])
    assert not np.allclose(together[1], together[0])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_dead_features_have_finite_gradients(norm):
    module = resnet.ResNet(2, 1, (2, 3), norm=norm)
    variables, x = noisy(module, (4, 4, 2))
    apply = functools.partial(module.apply, train=True, mutable=["batch_stats"])

    @jax.jit
    @jax.grad
    def gradient(params, x):
        outputs, _ = apply({**variables, "params": params}, x)
        return jnp.sum(outputs**2)

    dead = jax.tree.map(jnp.zeros_like, variables["params"])
    for params, images in ((dead, x), (variables["params"], jnp.full_like(x, 7.0))):
        for leaf in jax.tree.leaves(gradient(params, images)):
            assert jnp.all(jnp.isfinite(leaf))


def test_training_updates_the_running_statistics():
    module = resnet.ResNet(**TINY)
    variables, x = noisy(module, (6, 6, 2))
    apply = jax.jit(functools.partial(module.apply, train=True, mutable=["batch_stats"]))
    outputs, state = apply(variables, x)
    before, after = variables["batch_stats"], state["batch_stats"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    stem = convolution(np.asarray(x), variables["params"]["Conv_0"])
    for name, value in (("mean", stem.mean(axis=(0, 1, 2))), ("var", stem.var(axis=(0, 1, 2)))):
        expected = 0.9 * before["BatchNorm_0"][name] + 0.1 * value
        np.testing.assert_allclose(after["BatchNorm_0"][name], expected, rtol=1e-5)
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert not np.allclose(old, new)
    evaluate = jax.jit(functools.partial(module.apply, mutable=["batch_stats"]))
    evaluated, unchanged = evaluate(variables, x)
    assert not np.allclose(outputs, evaluated)
    for old, new in zip(*map(jax.tree.leaves, (before, unchanged)), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_running_statistics_keep_their_dtype(dtype):
    module = resnet.ResNet(**TINY, param_dtype=jnp.dtype(dtype))
    x = jnp.ones((2, 4, 4, 1), dtype)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    apply = functools.partial(module.apply, train=True, mutable=["batch_stats"])
    _, state = jax.eval_shape(apply, variables, x)
    for leaf in (*jax.tree.leaves(variables), *jax.tree.leaves(state)):
        assert leaf.dtype == dtype
