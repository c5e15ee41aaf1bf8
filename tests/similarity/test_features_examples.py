"""Features of the first examples alone: the same values and gradients as cutting them out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ntt_sparse.models.resnet import ResNet
from ntt_sparse.similarity.features import capture, capture_nnx

PATTERNS = ["stage2_block1:input", "stage?_block1", "Dense_0"]


def losses(whole, first, variables, x):
    """With features cut by hand and with those captured short; the outputs count too."""

    def loss(captured, variables, cut):
        output, features, state = captured(variables, x, train=True, mutable=["batch_stats"])
        shapes = {name: f.shape for name, f in features.items()}
        parts = [jnp.sum(jnp.sin(f[:3] if cut else f)) for f in features.values()]
        return jnp.sum(output**2) + sum(parts), (shapes, state)

    return [
        jax.jit(jax.value_and_grad(lambda v, c=c, cut=cut: loss(c, v, cut), has_aux=True))(
            variables
        )
        for c, cut in ((whole, True), (first, False))
    ]


def test_linen(x64):
    module = ResNet(blocks_per_stage=1, channels=(4, 8), shortcut="B")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 6, 6, 3)))
    variables = module.init(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
    (expected, shapes), (value, short) = (
        ((value, grads), (shapes, state))
        for (value, (shapes, state)), grads in losses(
            capture(module, PATTERNS), capture(module, PATTERNS, examples=3), variables, x
        )
    )
    assert {name: s[0] for name, s in shapes[0].items()} == dict.fromkeys(shapes[0], 6)
    assert {name: s[0] for name, s in short[0].items()} == dict.fromkeys(shapes[0], 3)
    for ours, theirs in zip(
        jax.tree.leaves((value, short[1])), jax.tree.leaves((expected, shapes[1])), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_nnx(x64):
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64), jnp.tanh,
        nnx.Linear(4, 2, rngs=nnx.Rngs(1), param_dtype=jnp.float64),
    )  # fmt: skip
    graphdef, state = nnx.split(model)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    gradients = []
    for apply, cut in (
        (capture_nnx(graphdef, "layers/0"), 2),
        (capture_nnx(graphdef, "layers/0", examples=2), None),
    ):

        def loss(state, apply=apply, cut=cut):
            output, features = apply(state, x)
            assert len(features["layers/0"][:cut]) == 2
            return jnp.sum(output**2) + jnp.sum(jnp.sin(features["layers/0"][:cut]))

        gradients.append(jax.tree.leaves(jax.jit(jax.grad(loss))(state)))
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_a_batch_may_be_smaller():
    """As the last one of a set."""
    module, x = ResNet(blocks_per_stage=1, channels=(4,), norm="none"), jnp.ones((2, 5, 5, 3))
    variables = module.init(jax.random.key(0), x)
    _, features = capture(module, "Conv_0", examples=8)(variables, x)
    assert len(features["Conv_0"]) == 2


def test_a_number_of_numpy_is_a_number_of_examples():
    module, x = ResNet(blocks_per_stage=1, channels=(4,), norm="none"), jnp.ones((4, 5, 5, 3))
    variables = module.init(jax.random.key(0), x)
    _, features = capture(module, "Conv_0", examples=np.int64(2))(variables, x)
    assert len(features["Conv_0"]) == 2


@pytest.mark.parametrize("examples", [0, -1, 2.5])
def test_bad_input(examples):
    module, x = ResNet(blocks_per_stage=1, channels=(4,), norm="none"), jnp.ones((2, 5, 5, 3))
    variables = module.init(jax.random.key(0), x)
    with pytest.raises((ValueError, TypeError)):
        capture(module, "Conv_0", examples=examples)(variables, x)
