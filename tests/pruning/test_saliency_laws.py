"""Laws that every saliency function keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.pruning import masks, saliency

KEY = jax.random.key(3)
X = jax.random.normal(jax.random.key(4), (6, 5))
Y = jax.random.normal(jax.random.key(5), (6, 2))


@functools.partial(jax.jit, static_argnames="dtype")
def init(key, dtype=jnp.float32):
    keys = jax.random.split(key, 4)
    shapes = {"kernel": (5, 4), "bias": (4,), "out": (4, 2), "out_bias": (2,)}
    flat = {
        n: jax.random.normal(k, s, dtype) for (n, s), k in zip(shapes.items(), keys, strict=True)
    }
    return {"hidden": {k: flat[k] for k in ("kernel", "bias")}, "out": flat["out"]}


def network(params, x):
    x = x.astype(params["out"].dtype)
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]


def relu_network(params, x):
    return jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"]) @ params["out"]


def loss(params, batch):
    x, y = batch
    return jnp.mean((network(params, x) - y.astype(params["out"].dtype)) ** 2)


SALIENCIES = {
    "magnitude": saliency.magnitude,
    "random": lambda params, **kwargs: saliency.random(KEY, params, **kwargs),
    "snip": lambda params, **kwargs: saliency.snip(loss, params, (X, Y), **kwargs),
    "logit_snip": lambda params, **kwargs: saliency.logit_snip(network, params, X, **kwargs),
    "grasp": lambda params, **kwargs: saliency.grasp(loss, params, (X, Y), **kwargs),
    "synflow": lambda params, **kwargs: saliency.synflow(relu_network, params, (5,), **kwargs),
}
every_saliency = pytest.mark.parametrize("score", SALIENCIES.values(), ids=SALIENCIES.keys())


@every_saliency
def test_scores_are_none_where_not_prunable(score):
    scores = score(init(KEY))
    assert jax.tree.map(jnp.shape, scores) == {
        "hidden": {"kernel": (5, 4), "bias": None},
        "out": (4, 2),
    }


@every_saliency
def test_the_predicate_overrides(score):
    scores = score(init(KEY), prunable=lambda path, leaf: path == "hidden/bias")
    assert jax.tree.map(jnp.shape, scores) == {
        "hidden": {"kernel": None, "bias": (4,)},
        "out": None,
    }


@every_saliency
def test_no_prunable_leaf_raises(score):
    with pytest.raises(ValueError, match="no leaf is prunable among"):
        score(init(KEY), prunable=lambda path, leaf: False)


@every_saliency
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_dtype_is_kept(score, dtype):
    # Draws and products are never in half precision, whose ties would favour early entries.
    kept = score in (SALIENCIES["magnitude"], SALIENCIES["synflow"])
    expected = jnp.dtype(dtype) if kept else jnp.promote_types(dtype, jnp.float32)
    shapes = jax.eval_shape(score, jax.eval_shape(lambda: init(KEY, dtype)))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {expected}


@every_saliency
def test_scores_are_not_all_equal_and_signed_for_grasp_alone(score):
    leaves = jax.tree.leaves(score(init(KEY)))
    for leaf in leaves:
        assert leaf.max() > leaf.min()
    assert (min(leaf.min() for leaf in leaves) < 0) == (score is SALIENCIES["grasp"])


@pytest.mark.variants(3)
@every_saliency
@pytest.mark.usefixtures("x64")
def test_jit_equals_eager(score):
    params = init(KEY, jnp.float64)
    eager, jitted = score(params), jax.jit(score)(params)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.variants(3)
@every_saliency
def test_new_params_do_not_recompile(score, compilations):
    jitted = jax.jit(score)
    params, others = init(KEY), init(jax.random.key(9))
    jitted(params)
    with compilations() as events:
        jitted(others)
    assert events == []


@pytest.mark.variants(3)
@every_saliency
@pytest.mark.usefixtures("x64")
def test_members_are_scored_apart(score):
    members = jax.vmap(lambda key: init(key, jnp.float64))(jax.random.split(KEY, 3))
    together, one = jax.jit(jax.vmap(score))(members), jax.jit(score)
    for i in range(3):
        alone = one(jax.tree.map(lambda leaf, i=i: leaf[i], members))
        member = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        assert jax.tree.structure(alone) == jax.tree.structure(member)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(member), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


@every_saliency
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_scores_select_masks_that_fit(score, scope):
    params = init(KEY)
    selected = masks.from_scores(score(params), 0.5, scope=scope)
    masks.check(params, selected)
    assert masks.density(selected) == 0.5
