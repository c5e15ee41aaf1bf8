import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads

from ntt_sparse import models
from ntt_sparse.models import lenet
from ntt_sparse.models.dropout import Dropout


def shapes(name, input_shape, **kwargs):
    """Parameter shapes, without computing anything."""
    module = models.create(name, **kwargs)
    init = functools.partial(models.init, module, input_shape=input_shape)
    return jax.eval_shape(init, jax.random.key(0))


def init(module, input_shape):
    """Compiled, which is faster than one operation after the other."""
    return jax.jit(lambda key: models.init(module, key, input_shape))(jax.random.key(0))


def count(params, minimum_rank):
    return sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim >= minimum_rank)


# Architectures


@pytest.mark.parametrize(
    ("name", "image", "padding", "weights", "parameters"),
    [
        ("lenet_300_100", (28, 28, 1), None, 266_200, 266_610),
        ("lenet5_caffe", (28, 28, 1), "VALID", 430_500, 431_080),
        ("lenet5", (28, 28, 1), "VALID", 61_470, 61_706),
        ("lenet5", (32, 32, 1), "VALID", 61_470, 61_706),
        # Biases: 64 + 64 + 128 + 128 + 512 + 10 = 906.
        ("conv4", (32, 32, 3), "VALID", 1_903_296, 1_904_202),
        ("conv4", (32, 32, 3), "SAME", 4_459_200, 4_460_106),
        ("conv4_dropout", (32, 32, 3), "VALID", 1_903_296, 1_904_202),
    ],
)
def test_parameter_counts(name, image, padding, weights, parameters):
    options = {} if padding is None else {"padding": padding}
    params = shapes(name, image, **options)
    assert (count(params, 2), count(params, 0)) == (weights, parameters)


@pytest.mark.parametrize(
    "name", ["lenet_300_100", "lenet5_caffe", "lenet5", "conv4", "conv4_dropout"]
)
def test_two_outputs(name):
    module = models.create(name, num_outputs=2)
    x = jax.ShapeDtypeStruct((3, 28, 28, 1), jnp.float32)
    params = shapes(name, (28, 28, 1), num_outputs=2)
    assert jax.eval_shape(models.apply_fn(module), params, x).shape == (3, 2)


@pytest.mark.parametrize("image", [(784,), (28, 28), (28, 28, 1)])
def test_the_perceptron_flattens_any_input(image):
    assert shapes("lenet_300_100", image)["Dense_0"]["kernel"].shape == (784, 300)


@pytest.mark.parametrize(
    ("name", "image", "padding", "flat"),
    [
        # 29 - 4 = 25, pooled 12, - 4 = 8, pooled 4; 31 - 4 = 27, pooled 13, - 4 = 9, pooled 4.
        ("lenet5_caffe", (29, 31, 1), "VALID", 4 * 4 * 50),
        ("lenet5_caffe", (29, 31, 1), "SAME", 7 * 7 * 50),
        ("conv4", (17, 35, 3), "VALID", 1 * 5 * 128),  # 17: 13, 6, 2, 1; 35: 31, 15, 11, 5
        ("lenet5", (40, 28, 1), "VALID", 7 * 5 * 16),  # 40: 36, 18, 14, 7; 28 on 32: 28, 14, 10, 5
        ("lenet5", (20, 20, 1), "SAME", 8 * 8 * 16),  # also on 32: 32, 16, 16, 8
    ],
)
def test_any_image_size(name, image, padding, flat):
    params = shapes(name, image, padding=padding)
    assert params["Dense_0"]["kernel"].shape[0] == flat


def reference(params, x, *, padding, stages):
    """The network in `jax.lax` convolutions and a windowed reduction."""

    def conv(x, layer):
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, layer["kernel"], (1, 1), padding, dimension_numbers=dimensions
        )
        return jnp.maximum(y + layer["bias"], 0)

    layers = iter(range(sum(stages)))
    for length in stages:
        for _ in range(length):
            x = conv(x, params[f"Conv_{next(layers)}"])
        window = (1, 2, 2, 1)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
    x = x.reshape(len(x), -1)
    dense = [params[name] for name in sorted(params) if name.startswith("Dense")]
    for layer in dense[:-1]:
        x = jnp.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return x @ dense[-1]["kernel"] + dense[-1]["bias"]


@pytest.mark.parametrize(
    ("name", "image", "padding", "stages"),
    [
        ("lenet5_caffe", (16, 19, 2), "VALID", (1, 1)),
        ("lenet5", (33, 32, 1), "VALID", (1, 1)),
        ("conv4", (16, 17, 3), "VALID", (2, 2)),
        ("conv4", (6, 5, 3), "SAME", (2, 2)),
    ],
)
def test_forward_pass(name, image, padding, stages):
    module = models.create(name, padding=padding)
    params = init(module, image)
    x = jax.random.normal(jax.random.key(1), (2, *image))
    actual = jax.jit(models.apply_fn(module))(params, x)
    expected = reference(params, x, padding=padding, stages=stages)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_perceptron_forward_pass():
    module = models.create("lenet_300_100")
    params = init(module, (4, 3))
    x = jax.random.normal(jax.random.key(1), (2, 4, 3))
    expected = reference(params, x, padding=None, stages=())
    np.testing.assert_allclose(models.apply_fn(module)(params, x), expected, rtol=1e-4, atol=1e-5)


def test_small_images_of_lenet5_are_centred_on_zeros():
    x = jax.random.normal(jax.random.key(1), (2, 28, 27, 1))
    padded = lenet.pad_to_field(x, 32)
    assert padded.shape == (2, 32, 32, 1)
    np.testing.assert_array_equal(padded[:, 2:30, 2:29], x)  # 5 columns: 2 before, 3 after
    np.testing.assert_allclose(jnp.sum(jnp.abs(padded)), jnp.sum(jnp.abs(x)), rtol=1e-6)
    module = models.create("lenet5")
    params = init(module, (32, 32, 1))
    apply_fn = models.apply_fn(module)
    np.testing.assert_array_equal(apply_fn(params, x), apply_fn(params, padded))
    assert lenet.pad_to_field(jnp.ones((1, 40, 30, 1)), 32).shape == (1, 40, 32, 1)


def test_initialisation():
    params = init(models.create("conv4"), (32, 32, 3))
    for layer in params.values():
        kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
        receptive = np.prod(kernel.shape[:-2])
        expected = np.sqrt(2 / (receptive * (kernel.shape[-2] + kernel.shape[-1])))
        # The sample deviation has a relative error of about 1 / sqrt(2 n); five of those.
        np.testing.assert_allclose(kernel.std(), expected, rtol=5 / np.sqrt(2 * kernel.size))
        np.testing.assert_allclose(bias.std(), 1e-2, rtol=5 / np.sqrt(2 * bias.size))


@pytest.mark.usefixtures("x64")
def test_double_precision():
    module = models.create("lenet5", param_dtype=jnp.float64)
    params = init(module, (28, 28, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float64")}
    x = jax.random.normal(jax.random.key(1), (2, 28, 28, 1))
    double = models.apply_fn(module)(params, x)
    assert double.dtype == jnp.float64
    single = models.apply_fn(module)(jax.tree.map(jnp.float32, params), x.astype(jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, double, rtol=1e-4, atol=1e-5)


def test_half_precision_computation_with_single_precision_params():
    module = models.create("lenet_300_100", dtype=jnp.bfloat16)
    params = init(module, (9,))
    assert params["Dense_0"]["kernel"].dtype == jnp.float32
    assert models.apply_fn(module)(params, jnp.ones((1, 9))).dtype == jnp.bfloat16


# Refusals


@pytest.mark.parametrize(("name", "smallest"), [("lenet5_caffe", 16), ("conv4", 16)])
def test_images_too_small_for_valid_padding(name, smallest):
    shapes(name, (smallest, smallest, 1))
    for image in [(smallest - 1, 40, 1), (40, smallest - 1, 1), (1, 1, 1)]:
        with pytest.raises(ValueError, match=rf'{image[0]}x{image[1]} vanish .*padding="SAME"'):
            shapes(name, image)
        if min(image) > 1:
            shapes(name, image, padding="SAME")


def test_images_too_small_for_any_padding():
    shapes("conv4", (4, 4, 3), padding="SAME")
    with pytest.raises(ValueError, match=r"3x4 vanish .*use a larger image(?! or)"):
        shapes("conv4", (3, 4, 3), padding="SAME")


def test_lenet5_takes_one_pixel():
    assert count(shapes("lenet5", (1, 1, 1)), 2) == 61_470


def test_inputs_that_are_not_images():
    with pytest.raises(ValueError, match=r"input is \(1, 784\), expected images \(n, height"):
        shapes("conv4", (784,))


@pytest.mark.parametrize("padding", ["same", "CIRCULAR", ""])
def test_unknown_padding(padding):
    with pytest.raises(ValueError, match=r"padding is .*expected one of VALID, SAME"):
        models.create("conv4", padding=padding)


def test_no_outputs():
    with pytest.raises(ValueError, match="num_outputs is 0, expected 1 or more"):
        models.create("conv4", num_outputs=0)


# Dropout


def test_dropout_rates_and_places():
    # With zero kernels a layer's output is its bias, 1 for the convolutions and -1 for the
    # dense layer: what dropout sees is constant, and only before the ReLU is it negative.
    module = models.create("conv4_dropout", padding="SAME")
    params = jax.tree.map(jnp.zeros_like, init(module, (16, 16, 3)))
    for name in params:
        params[name]["bias"] += -1.0 if name.startswith("Dense") else 1.0
    outputs, state = module.apply(
        {"params": params},
        jnp.ones((8, 16, 16, 3)),
        train=True,
        rngs={"dropout": jax.random.key(1)},
        capture_intermediates=lambda module, _: isinstance(module, Dropout),
    )
    captured = {n: np.asarray(v["__call__"][0]) for n, v in state["intermediates"].items()}
    assert list(captured) == ["Dropout_0", "Dropout_1", "Dropout_2"]
    places = [((8, 8, 8, 64), 1 / 0.75, 0.25), ((8, 4, 4, 128), 1 / 0.75, 0.25)]
    places += [((8, 512), -1 / 0.5, 0.5)]
    for values, (shape, kept, rate) in zip(captured.values(), places, strict=True):
        assert values.shape == shape
        np.testing.assert_allclose(values[values != 0], kept, rtol=1e-6)
        deviation = np.sqrt(rate * (1 - rate) / values.size)
        assert abs(np.mean(values == 0) - rate) < 5 * deviation
    assert outputs.shape == (8, 10)


def test_dropout_drops_in_training_only():
    module = models.create("conv4_dropout")
    params = init(module, (16, 16, 1))
    x = jax.random.normal(jax.random.key(1), (2, 16, 16, 1))
    apply_fn = models.apply_fn(module)
    plain = models.apply_fn(models.create("conv4"))(params, x)
    np.testing.assert_array_equal(apply_fn(params, x), plain)
    first, again, other = (
        apply_fn(params, x, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, plain)
    assert not np.allclose(first, other)


# Pooling


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 5, 7, 2), (2, 2, 3, 1)])
def test_max_pool_equals_the_windowed_reduction(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    expected = nn.max_pool(x, (2, 2), strides=(2, 2))
    np.testing.assert_array_equal(lenet.max_pool(x), expected)
    weights = jax.random.normal(jax.random.key(1), expected.shape)
    ours = jax.grad(lambda x: jnp.sum(weights * lenet.max_pool(x) ** 2))(x)
    flax = jax.grad(lambda x: jnp.sum(weights * nn.max_pool(x, (2, 2), strides=(2, 2)) ** 2))(x)
    np.testing.assert_array_equal(ours, flax)


@pytest.mark.usefixtures("x64")
def test_max_pool_derivatives_to_second_order():
    # Entries at least 0.1 apart: no maximum changes within the differences taken.
    x = 0.1 * jax.random.permutation(jax.random.key(0), 32.0 + jnp.arange(32.0)).reshape(1, 4, 4, 2)
    check_grads(lambda x: lenet.max_pool(jnp.asarray(x)) ** 3, (x,), order=2, modes=("fwd", "rev"))


def test_tied_maxima_share_the_gradient():
    x = jnp.array([[3.0, 3.0], [1.0, 3.0]]).reshape(1, 2, 2, 1)
    shared = jax.grad(lambda x: lenet.max_pool(x).sum())(x)
    np.testing.assert_allclose(shared.reshape(2, 2), [[1 / 3, 1 / 3], [0, 1 / 3]], rtol=1e-6)
    first = jax.grad(lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)).sum())(x)
    np.testing.assert_array_equal(first.reshape(2, 2), [[1, 0], [0, 0]])


def test_ties_of_a_dead_window_have_no_gradient():
    x = -jnp.ones((1, 2, 2, 1))
    gradient = jax.grad(lambda x: lenet.max_pool(nn.relu(x)).sum())(x)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(x))
