"""Networks to be made small, by name, and what every small network must be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ntt_sparse import models
from ntt_sparse.gates import channels, layer
from ntt_sparse.gates.l1 import L1
from ntt_sparse.models.autoencoder import Autoencoder, Perceptron
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.models.preresnet import PreResNet
from ntt_sparse.models.resnet import ResNet
from ntt_sparse.models.vgg import Vgg
from ntt_sparse.pruning import masks as pruning_masks

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
        return jax.device_put(noise.astype(like.dtype))

    return module, shape, jax.tree_util.tree_map_with_path(leaf, dict(shapes))


def with_gates(name, seed, closed=0.5):
    """Variables whose gates are between a half and two, or closed; one at least is open."""
    module, shape, variables = large(name)
    rng = np.random.default_rng(seed)
    gates = {}
    for path, n in channels.sizes(module.network(shape)).items():
        values = rng.uniform(0.5, 2, n) * (rng.random(n) > closed)
        values[rng.integers(n)] = 1
        gates[path] = {"scale": jax.device_put(values.astype(np.float32))}
    return {**variables, "params": layer.replace(variables["params"], gates)}


def neuron_masks(name, seed, closed=0.4):
    """Masks of all weights of some outputs of each layer but the last."""
    module, shape, variables = large(name)
    rng = np.random.default_rng(seed)
    last = list(module.network(shape).nodes)[-1]

    def mask(path, leaf):
        if path == f"{last}/kernel":
            return np.ones(leaf.shape, bool)
        open_ = rng.random(leaf.shape[-1]) > closed
        open_[rng.integers(len(open_))] = True
        return np.broadcast_to(open_, leaf.shape)

    return pruning_masks.map_prunable(mask, variables["params"])


def outputs(module, variables, x, **kwargs):
    return jax.jit(functools.partial(module.apply, **kwargs))(variables, x)


def same(got, expected, tolerance=1e-5):
    scale = max(1.0, float(np.max(np.abs(expected))))
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
