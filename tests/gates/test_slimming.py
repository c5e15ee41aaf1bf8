"""Network Slimming against its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ntt_sparse import models
from ntt_sparse.gates import channels, layer, slimming
from ntt_sparse.gates.slimming import Slimming
from ntt_sparse.models.preresnet import PreResNet
from ntt_sparse.models.vgg import Vgg
from ntt_sparse.pruning.compact import compact
from ntt_sparse.pruning.masks import apply
from ntt_sparse.pruning.transform import keep_masked


def test_the_penalty_has_the_published_derivative():
    scales = [{"scale": jnp.array([0.5, -2.0, 0.0])}, {"scale": jnp.array([3.0])}]
    value, grads = jax.value_and_grad(Slimming().penalty)(scales)
    assert value == 5.5
    assert [g["scale"].tolist() for g in grads] == [[1, -1, 0], [1]]


@pytest.mark.parametrize(("fraction", "left"), [(0.0, 4), (0.2, 3), (0.39, 3), (0.4, 2), (0.9, 0)])
def test_the_threshold_of_the_published_code(fraction, left):
    """Entry int(total * fraction) of the sorted sizes goes too."""
    scales = {"a": jnp.array([0.5, -2.0, 0.1]), "b": jnp.array([3.0, -0.3])}
    kept = slimming.keep(scales, fraction)
    sizes = np.sort(np.float32([0.5, 2.0, 0.1, 3.0, 0.3]))
    threshold = sizes[int(5 * fraction)]
    for path, scale in scales.items():
        np.testing.assert_array_equal(kept[path], np.abs(scale) > threshold)
    assert sum(int(each.sum()) for each in kept.values()) == left
    floor = slimming.keep(scales, fraction, at_least=1)
    assert floor["a"][1] and floor["b"][0]
    assert jax.jit(slimming.keep)(scales, fraction)["b"].tolist() == kept["b"].tolist()


def test_bad_input():
    for scales, fraction, message in (
        ({}, 0.5, "there are no channels"),
        ({"a": jnp.ones(2)}, 1.0, "fraction is 1.0, expected at least 0 and below 1"),
        ({"a": jnp.ones(2)}, float("nan"), "fraction is nan"),
        ({"a": jnp.array([1, jnp.nan])}, 0.5, "the scores of 'a' are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            slimming.keep(scales, fraction)
    with pytest.raises(ValueError, match="at_least is -1"):
        slimming.keep({"a": jnp.ones(2)}, 0.5, at_least=-1)
    with pytest.raises(ValueError, match="initial is 0"):
        Slimming(0.0)
    with pytest.raises(ValueError, match="there are no scales"):
        Slimming().penalty([])


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (PreResNet(3, 1, (4, 6), Slimming()), (8, 8, 3)),
        (Vgg(3, ((6, 5), (8,)), Slimming()), (8, 8, 3)),
        (models.create("lenet5", kind=Slimming()), (28, 28, 1)),
    ],
)
def test_cut_channels_stay_cut_and_can_be_taken_out(module, shape):
    """With decay and momentum, and the same outputs of the small network."""
    x = jax.random.normal(jax.random.key(0), (6, *shape))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    network = module.network(shape)
    spread = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf + np.float32(0.3) * np.sin(1 + np.arange(leaf.size, dtype=np.float32))
            if path[-1].key in ("scale", "bias") else leaf
        ),
        variables["params"],
    )  # fmt: skip
    gates = layer.parameters(module.kind, spread, network)
    assert {path: gate["scale"].shape for path, gate in gates.items()} == {
        path: (n,) for path, n in channels.sizes(network).items()
    }
    kept = slimming.keep({path: gate["scale"] for path, gate in gates.items()}, 0.4, at_least=1)
    masks = layer.masks(module.kind, spread, network, kept)
    optimizer = keep_masked(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9)))
    state, params = optimizer.init(spread), spread
    for _ in range(3):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = optimizer.update(grads, state, params, masks=masks)
        params = optax.apply_updates(params, updates)
    cut = {**variables, "params": apply(params, masks)}
    values = layer.values(module.kind, cut, network)
    for path, mask in kept.items():
        np.testing.assert_array_equal(values[path] != 0, mask)
    small = compact(module, cut, shape)
    expected = jax.jit(module.apply)(cut, x)
    scale = max(1.0, float(jnp.max(jnp.abs(expected))))
    np.testing.assert_allclose(
        jax.jit(small.module.apply)(small.variables, x), expected, atol=1e-5 * scale
    )
    assert small.after == channels.count(network, jax.tree.map(np.asarray, kept))
    assert small.after.parameters < small.before.parameters
