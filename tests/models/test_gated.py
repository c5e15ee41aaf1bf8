"""Gated layers against those of Linen, gated networks against smaller ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ntt_sparse import models
from ntt_sparse.gates import channels, layer
from ntt_sparse.gates.dam import Dam
from ntt_sparse.models import gated
from ntt_sparse.models.described import parameter_shapes
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.models.preresnet import Bottleneck, PreResNet
from ntt_sparse.models.vgg import Vgg
from ntt_sparse.pruning.masks import named_leaves

X = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (5, 1, "VALID"), (1, 1, 0), (1, 2, 0),
                                    (3, 1, "SAME"), (1, 2, "SAME")],
)  # fmt: skip
def test_a_convolution_without_a_gate_is_that_of_linen(size, stride, padding):
    ours = gated.Conv(4, size, stride, padding)
    theirs = nn.Conv(4, (size, size), stride, padding=padding)
    params = ours.init(jax.random.key(1), X)
    jax.tree.map(np.testing.assert_array_equal, params, theirs.init(jax.random.key(1), X))
    params["params"]["bias"] = jnp.arange(4.0)
    np.testing.assert_allclose(ours.apply(params, X), theirs.apply(params, X), atol=1e-5)


def test_a_dense_layer_without_a_gate_is_that_of_linen():
    x = X[:, 0, 0]
    ours, theirs = gated.Dense(4), nn.Dense(4)
    params = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, theirs.init(jax.random.key(1), x))
    np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), atol=1e-6)


@pytest.mark.parametrize("layer", [gated.Conv(4, 3, kind=Dam()), gated.Dense(4, kind=Dam())])
def test_gated_weights_are_gated_features(layer):
    """Values and derivatives, the gate's among them."""
    x = X if isinstance(layer, gated.Conv) else X[:, 0, 0]
    params = layer.init(jax.random.key(1), x)["params"]
    params = {**params, "bias": jnp.arange(1.0, 5.0), "gate": {"beta": jnp.float32(-2.0)}}
    assert np.count_nonzero(Dam().values(params["gate"], 4)) == 3

    def on_features(params):
        plain = {name: params[name] for name in ("kernel", "bias")}
        return layer.clone(kind=None).apply({"params": plain}, x) * Dam().values(params["gate"], 4)

    def ours(params):
        return layer.apply({"params": params}, x)

    np.testing.assert_allclose(ours(params), on_features(params), atol=1e-5)
    grads = [jax.grad(lambda p, f=f: jnp.sum(jnp.sin(f(p))))(params) for f in (ours, on_features)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *grads)


def test_dtypes():
    layer = gated.Conv(4, 3, kind=Dam(), dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(1), X)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert layer.apply(params, X).dtype == jnp.bfloat16


def test_a_closed_channel_is_as_good_as_none():
    """LeNet with closed gates is the LeNet that never had these channels."""
    # Where the first channels are closed, as many as each gate says.
    closed = {"Conv_0": 1, "Conv_1": 2, "Dense_0": 3}
    widths = {"Conv_0": 4, "Conv_1": 5, "Dense_0": 6}
    whole = LeNet(3, ((4,), (5,)), 3, (6, 4), activation="tanh", kind=Dam(), gated=3)
    x = jax.random.normal(jax.random.key(2), (2, 14, 14, 1))
    params = whole.init(jax.random.key(3), x)["params"]
    for name, count in closed.items():
        mu = 5 * np.arange(1, widths[name] + 1) / widths[name]
        params[name]["gate"]["beta"] = jnp.float32(-mu[count - 1])
    gates = {name: Dam().values(params[name]["gate"], widths[name]) for name in closed}
    small = LeNet(3, ((3,), (3,)), 3, (3, 4), activation="tanh")
    flat = np.arange(5 * 4).reshape(4, 5)[:, closed["Conv_1"] :].ravel()
    open_ = {name: np.arange(count, widths[name]) for name, count in closed.items()}
    inputs = {
        "Conv_0": [0],
        "Conv_1": open_["Conv_0"],
        "Dense_0": flat,
        "Dense_1": open_["Dense_0"],
    }
    left = {}
    for name, each in params.items():
        kernel, bias = np.asarray(each["kernel"]), np.asarray(each["bias"])
        if name in gates:
            kernel, bias = kernel * gates[name], bias * gates[name]
            kernel, bias = kernel[..., open_[name]], bias[open_[name]]
        if name in inputs:
            kernel = kernel.take(np.asarray(inputs[name]), axis=kernel.ndim - 2)
        left[name] = {"kernel": kernel, "bias": bias}
    np.testing.assert_allclose(
        whole.apply({"params": params}, x), small.apply({"params": left}, x), atol=1e-5
    )


def test_a_bottleneck_by_its_formula():
    """Each convolution is of what is normalised and rectified; the shortcut is of the input."""
    block = Bottleneck(2, stride=2, shortcut=True)
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 5))
    variables = block.init(jax.random.key(1), x)
    p = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])

    def normalise(y, name):
        y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
        return np.maximum(y * p[name]["scale"] + p[name]["bias"], 0)

    y = normalise(x, "BatchNorm_0") @ p["Conv_0"]["kernel"][0, 0]
    y = np.pad(normalise(y, "BatchNorm_1"), ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = sum(
        y[:, i : i + 4 : 2, j : j + 4 : 2] @ p["Conv_1"]["kernel"][i, j]
        for i in range(3)
        for j in range(3)
    )
    y = normalise(y, "BatchNorm_2") @ p["Conv_2"]["kernel"][0, 0]
    y = y + x[:, ::2, ::2] @ p["shortcut"]["kernel"][0, 0]
    state = {"batch_stats": variables["batch_stats"]}
    ours, _ = block.apply({"params": p, **state}, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(ours, y, atol=1e-4)


def test_a_bottleneck_whose_last_gate_is_closed_is_its_shortcut():
    block = Bottleneck(2, kind=Dam())
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 8))
    variables = block.init(jax.random.key(1), x)
    variables["params"]["Conv_2"]["gate"]["beta"] = jnp.float32(-5.0)
    np.testing.assert_array_equal(block.apply(variables, x), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeNet(activation="swish"), "activation is 'swish', expected one of relu, tanh"),
        (lambda: LeNet(hidden=(3,), gated=1), "gated is 1, expected None, or with a kind"),
        (lambda: LeNet(hidden=(3,), kind=Dam(), gated=2), "1 to 1, the number of hidden layers"),
        (lambda: PreResNet(0), "num_outputs is 0"),
        (lambda: PreResNet(channels=()), "channels are"),
        (lambda: Vgg(stages=((), (3,))), "stages are"),
        (lambda: Vgg(0), "num_outputs is 0"),
        (lambda: models.create("vgg19").network((8, 8, 3)), "16 x 16 pixels or more"),
        (lambda: models.create("lenet_300_100", kind=Dam()), "unknown keyword"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["preresnet20", "vgg19", "lenet5"])
def test_described_parameters_are_those_there_are(name):
    shape = (28, 28, 1) if name == "lenet5" else (32, 32, 3)
    module = models.create(name, num_outputs=7, kind=Dam())

    def init(key):
        params = module.init(key, jnp.zeros((1, *shape)))["params"]
        return params, layer.find(params)

    params, found = jax.eval_shape(init, jax.random.key(0))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    network = module.network(shape)

    assert set(found) == set(channels.sizes(network))
    assert total - len(found) == channels.whole(network).parameters
    shapes = {path: leaf.shape for path, leaf in named_leaves(params).items() if "gate" not in path}
    assert {k: leaf.shape for k, leaf in parameter_shapes(network).items()} == shapes
