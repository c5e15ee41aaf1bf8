"""Similarities of tokens, and what they take off the chance to be kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.models.redundancy import (
    Redundancy,
    adjusted,
    batch_similarities,
    head_similarities,
    likeness_of,
    remaining,
)
from ntt_sparse.models.tokens import draw_decisions


def less(log_probs, x, policy, redundancy):
    return adjusted(log_probs, likeness_of(x, policy, redundancy, 4), redundancy)


def test_similarities_of_tokens_by_hand():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 12))
    x[1, 3] = np.tile(rng.normal(size=3), 4)
    got = np.asarray(head_similarities(jnp.asarray(x, jnp.float32), 4))
    centring = np.eye(4) - 0.25
    for image in range(2):
        grams = [centring @ m @ m.T @ centring for m in x[image].reshape(5, 4, 3)]
        for i, one in enumerate(grams):
            for j, other in enumerate(grams):
                norms = np.sqrt(np.sum(one**2) * np.sum(other**2))
                # Heads that are all equal are like nothing.
                expected = np.sum(one * other) / norms if norms > 1e-9 else 0
                np.testing.assert_allclose(got[image, i, j], expected, atol=1e-5)


def test_similarities_of_positions_by_hand():
    """CKA of what is at two positions over the images; what is dropped is at its mean."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4, 3))
    policy = np.ones((6, 4))
    policy[[0, 2], 1] = 0
    # Left in one image, and in none.
    policy[1:, 2] = 0
    policy[:, 3] = 0
    dropped = np.where(policy[..., None] > 0, x, 1e3)
    got = np.asarray(batch_similarities(jnp.asarray(dropped, jnp.float32), jnp.asarray(policy)))
    rows = []
    for position in range(4):
        kept = policy[:, position] > 0
        centred = np.zeros((6, 3))
        if kept.any():
            centred[kept] = x[kept, position] - x[kept, position].mean(0)
        rows.append(centred)

    def cka(a, b):
        norms = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
        return np.linalg.norm(a.T @ b) ** 2 / norms if norms > 1e-12 else 0

    expected = [[cka(a, b) for b in rows] for a in rows]
    assert expected[0][1] > 0.01 and expected[0][2] == 0
    np.testing.assert_allclose(got, expected, atol=1e-5)
    # An image alone says nothing, and nothing is NaN.
    alone = batch_similarities(jnp.asarray(x[:1], jnp.float32), jnp.ones((1, 4)))
    np.testing.assert_array_equal(alone, np.zeros((4, 4)))


@pytest.mark.parametrize("reduce", ["mean", "sum", "relative"])
def test_chances_less_what_others_say(reduce):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 12)), jnp.float32)
    policy = np.array([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]])
    chance = rng.uniform(0.2, 0.9, size=(2, 5))
    log_probs = jnp.log(jnp.stack([chance, 1 - chance], -1))
    got, odds = (
        less(log_probs, x, jnp.asarray(policy), Redundancy(0.3, reduce, scale=scale))
        for scale in ("probability", "logarithm")
    )
    alike = np.asarray(head_similarities(x, 4))
    for image in range(2):
        left = np.flatnonzero(policy[image])
        means = [alike[image, i, left[left != i]].mean() for i in range(5)]
        for i in range(5):
            others = left[left != i]
            off = {
                "mean": means[i],
                "sum": alike[image, i, others].sum(),
                "relative": means[i] - np.mean([means[j] for j in left]),
            }
            left_over = np.clip(chance[image, i] - 0.3 * off[reduce], 0.01, 0.99)
            expected = [left_over, 1 - left_over]
            np.testing.assert_allclose(np.exp(got[image, i]), expected, atol=1e-5)
            kept = chance[image, i] * np.exp(-0.3 * off[reduce])
            kept /= kept + 1 - chance[image, i]
            np.testing.assert_allclose(np.exp(odds[image, i]), [kept, 1 - kept], atol=1e-5)


def test_relative_similarities_take_nothing_off_the_mean():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 6, 12)), jnp.float32)
    policy = jnp.asarray([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    chance = jnp.full((3, 6), 0.5)
    log_probs = jnp.log(jnp.stack([chance, 1 - chance], -1))
    redundancy = Redundancy(0.4, "relative")
    got = remaining(log_probs, likeness_of(x, policy, redundancy, 4), redundancy)
    assert bool(jnp.all(jnp.isfinite(got)))
    means = jnp.sum(got * policy, -1)[:2] / jnp.sum(policy, -1)[:2]
    np.testing.assert_allclose(means, 0.5, atol=1e-6)


def test_tokens_without_a_chance_come_back():
    """Where all chances are held, the prediction still has a derivative, of moderate size."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 12)) * 0.01 + rng.normal(size=12), jnp.float32)
    policy, chance = jnp.ones((2, 6)), jnp.full((2, 6), 0.5)

    def adjusted(chance, x):
        log_probs = jnp.log(jnp.stack([chance, 1 - chance], -1))
        return less(log_probs, x, policy, Redundancy(1.0, "mean"))

    np.testing.assert_allclose(jnp.exp(adjusted(chance, x)[..., 0]), 0.01, rtol=1e-4)

    def kept(chance, x):
        return jnp.sum(draw_decisions(jax.random.key(0), adjusted(chance, x), policy))

    # Also where a weight is so large that a number near one is lost beside it.
    huge = less(jnp.log(jnp.full((2, 6, 2), 0.5)), x, policy, Redundancy(1e9, "sum"))
    np.testing.assert_allclose(jnp.exp(huge), [[[0.01, 0.99]] * 6] * 2, rtol=1e-4)
    by_chance, by_token = jax.grad(kept, (0, 1))(chance, x)
    assert np.all(by_chance > 0) and np.all(by_chance < 30)
    # Similarities have none.
    assert not np.any(by_token)


@pytest.mark.parametrize("rows", ["heads", "batch"])
def test_similarities_have_a_derivative_if_asked(rows):
    """By finite differences."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 4, 12)), jnp.float32)
    move = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    policy = jnp.asarray([[1.0, 1, 0, 1]] * 3)

    def value(x, differentiate=True):
        redundancy = Redundancy(1.0, "mean", rows=rows, differentiate=differentiate)
        return jnp.sum(likeness_of(x, policy, redundancy, 4) ** 2)

    slope = jnp.vdot(jax.grad(value)(x), move)
    difference = (value(x + 1e-2 * move) - value(x - 1e-2 * move)) / 2e-2
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(slope, difference, rtol=1e-2)
    assert not np.any(jax.grad(value)(x, differentiate=False))


def test_bad_fields():
    with pytest.raises(ValueError, match=r"weight is -1\.0, expected a finite number"):
        Redundancy(-1.0)
    with pytest.raises(ValueError, match="reduce is 'max', expected one of sum, mean, relative"):
        Redundancy(1.0, "max")
    with pytest.raises(ValueError, match="rows is 'images', expected one of heads, batch"):
        Redundancy(rows="images")
    with pytest.raises(ValueError, match="scale is 'odds'"):
        Redundancy(scale="odds")
