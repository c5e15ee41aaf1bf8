"""Masks that change in training, against loops over single weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntt_sparse.pruning import dynamic, masks, saliency
from ntt_sparse.pruning.transform import keep_masked


def network(seed=0, density=0.4):
    rng = np.random.default_rng(seed)
    params = {
        "a": {"kernel": jnp.asarray(rng.normal(size=(5, 6)), jnp.float32), "bias": jnp.ones(6)},
        "b": {"kernel": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)},
    }
    kept = masks.from_scores(saliency.random(jax.random.key(seed), params), density)
    return masks.apply(params, kept), kept


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in masks.named_leaves(tree).items()}


# Gradual pruning


def test_the_density_falls_by_a_cube():
    for step, expected in ((0, 1.0), (10, 1.0), (20, 0.2 + 0.8 * 0.75**3), (50, 0.2), (99, 0.2)):
        got = dynamic.cubic_density(step, start=10, end=50, final=0.2)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    half = jax.jit(lambda t: dynamic.cubic_density(t, start=0, end=4, final=0.1, initial=0.5))
    np.testing.assert_allclose(half(2), 0.1 + 0.4 / 8, rtol=1e-6)


def test_gradual_pruning_keeps_the_largest_of_what_is_left():
    params, kept = network()
    magnitude = np.concatenate(
        [np.abs(params["a"]["kernel"]).ravel(), np.abs(params["b"]["kernel"]).ravel()]
    )
    for density in (0.3, 0.1, 1 / 48):
        count = round(density * 48)
        got = flat(jax.jit(dynamic.gradual)(params, kept, count))
        threshold = np.sort(magnitude)[-count]
        for path, mask in got.items():
            layer, _ = path.split("/")
            np.testing.assert_array_equal(mask, np.abs(params[layer]["kernel"]) >= threshold)
    counts = {"a": {"kernel": 15, "bias": None}, "b": {"kernel": 9}}
    by_layer = flat(dynamic.gradual(params, masks.full(params), counts))
    assert [int(mask.sum()) for mask in by_layer.values()] == [15, 9]


def test_what_is_pruned_stays_pruned():
    params, kept = network(density=0.25)
    jax.tree.map(np.testing.assert_array_equal, dynamic.gradual(params, kept, 43), kept)
    # Weights that are zero without being pruned come before those that are pruned.
    zeros = jax.tree.map(jnp.zeros_like, params)
    got = flat(dynamic.gradual(zeros, kept, 12))
    for path, mask in flat(kept).items():
        np.testing.assert_array_equal(got[path], mask)


# SET and RigL


def one_by_one(weights, mask, scores, fraction):
    """One layer, weight by weight: the smallest go, then the largest scores come."""
    mask = mask.copy().ravel()
    weights, scores = np.abs(weights).ravel(), np.asarray(scores, float).ravel()
    count = min(int(fraction * mask.sum() + 1e-6), int((~mask).sum()))
    # Of equal weights the last go, of equal scores the first come.
    for i in sorted(np.flatnonzero(mask), key=lambda i: (weights[i], -i))[:count]:
        mask[i] = False
    for i in sorted(np.flatnonzero(~mask), key=lambda i: (-scores[i], i))[:count]:
        mask[i] = True
    return mask


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]), st.booleans())
def test_replacing_one_by_one(seed, fraction, dense):
    params, kept = network(seed, density=0.9 if dense else 0.3)
    scores = saliency.random(jax.random.key(seed + 1), params)
    got = flat(jax.jit(dynamic.replace)(params, kept, scores, fraction))
    for path, mask in flat(kept).items():
        layer, _ = path.split("/")
        expected = one_by_one(
            np.asarray(params[layer]["kernel"]), mask, flat(scores)[path], fraction
        )
        np.testing.assert_array_equal(got[path].ravel(), expected)
        assert got[path].sum() == mask.sum()


def test_rigl_brings_the_largest_gradients():
    """A regression whose missing weight is known: it is found, and starts from zero."""
    x = jax.random.normal(jax.random.key(0), (64, 5))
    truth = jnp.array([[0.0], [3.0], [0.0], [0.0], [-1.0]])
    params = {"w": jnp.array([[0.05], [0.0], [0.0], [0.0], [-0.9]])}
    kept = {"w": params["w"] != 0}

    def loss(p):
        return jnp.mean((x @ p["w"] - x @ truth) ** 2)

    gradients = jax.tree.map(jnp.abs, jax.grad(loss)(params))
    new = dynamic.replace(params, kept, gradients, 0.5)
    np.testing.assert_array_equal(new["w"][:, 0], [False, True, False, False, True])
    optimizer = keep_masked(optax.sgd(0.05))
    state = optimizer.init(params)
    for _ in range(200):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, masks=new)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], truth, atol=1e-3)


def test_scores_that_are_no_numbers_cost_no_weights():
    params, kept = network()
    replace = jax.jit(dynamic.replace)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        scores = jax.tree.map(lambda mask, value=value: jnp.full(mask.shape, value), kept)
        new = flat(replace(params, kept, scores, 0.5))
        for path, mask in flat(kept).items():
            assert new[path].sum() == mask.sum()
    # Any number is larger, and outside of a trace there is somebody to tell.
    weights, mask = jnp.array([3.0, 0.0, 0.0]), jnp.array([True, False, False])
    scores = jnp.array([-4.0, jnp.nan, -3.0])
    assert replace(weights, mask, scores, 1.0).tolist() == [False, False, True]
    with pytest.raises(ValueError, match="hold 1 NaN, expected numbers"):
        dynamic.replace(weights, mask, scores, 1.0)


def test_the_fraction_falls_by_a_cosine():
    for step, expected in (
        (0, 0.3),
        (25, 0.15 * (1 + np.sqrt(0.5))),
        (50, 0.15),
        (100, 0),
        (200, 0),
    ):
        got = dynamic.cosine_fraction(step, end=100)
        np.testing.assert_allclose(got, expected, atol=1e-7)


def test_when_masks_change():
    changes = [int(t) for t in range(40) if dynamic.due(t, every=10, end=31)]
    assert changes == [10, 20, 30]
    assert [t for t in range(40) if dynamic.due(t, every=10, start=10, end=30)] == [20]
    assert jax.jit(lambda t: dynamic.due(t, every=3, end=7))(6)


def test_bad_input():
    params, kept = network()
    for arguments in (
        {"every": 100, "end": 100},
        {"every": 0, "end": 9},
        {"every": 5, "start": 10, "end": 15},
    ):
        with pytest.raises(ValueError, match="leave no step at which masks change"):
            dynamic.due(1, **arguments)
    with pytest.raises(ValueError, match="end is 5, expected a step after start, which is 5"):
        dynamic.cubic_density(0, start=5, end=5, final=0.1)
    with pytest.raises(ValueError, match=r"final is -0\.5, expected 0 to 1"):
        dynamic.cubic_density(0, start=0, end=5, final=-0.5)
    with pytest.raises(ValueError, match="initial is 2, expected 0 to 1"):
        dynamic.cubic_density(0, start=0, end=5, final=0.1, initial=2)
    with pytest.raises(ValueError, match="end is 0"):
        dynamic.cosine_fraction(0, end=0)
    with pytest.raises(ValueError, match=r"initial is 1\.5"):
        dynamic.cosine_fraction(0, end=9, initial=1.5)
    with pytest.raises(ValueError, match="fraction is nan"):
        dynamic.replace(params, kept, kept, float("nan"))
    with pytest.raises(ValueError, match="scores have the structure"):
        dynamic.replace(params, kept, {"a": params["a"]["kernel"]}, 0.1)
    short = {"a": {"kernel": jnp.ones(6), "bias": None}, "b": kept["b"]}
    with pytest.raises(ValueError, match=r"scores of 'a/kernel' have shape \(6,\), expected"):
        dynamic.replace(params, kept, short, 0.1)
    with pytest.raises(ValueError, match="masks must have the structure of params"):
        dynamic.gradual(params, {"a": kept["a"]}, 5)
