"""The losses of dynamic tokens against sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.objectives import tokens


def test_the_ratio_of_kept_tokens():
    decisions = np.array([[[1, 1, 0, 1], [1, 0, 0, 1]], [[1, 0, 0, 0], [0, 0, 0, 0]]], float)
    kept = np.array([[0.75, 0.5], [0.25, 0.0]])
    expected = np.mean((kept - np.array([[0.7], [0.49]])) ** 2)
    got = tokens.keep_ratio_loss(jnp.asarray(decisions), (0.7, 0.49))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="1 ratios for 2 places"):
        tokens.keep_ratio_loss(jnp.asarray(decisions), (0.7,))
    with pytest.raises(ValueError, match="expected fractions in"):
        tokens.keep_ratio_loss(jnp.asarray(decisions), (0.7, 1.7))


def test_distillation():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 4))
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (teacher, student))
    expected = np.mean(np.sum(p * np.log(p / q), axis=1))
    np.testing.assert_allclose(tokens.distillation_loss(student, teacher), expected, rtol=1e-5)
    np.testing.assert_allclose(tokens.distillation_loss(teacher, teacher), 0, atol=1e-6)
    slope = jax.grad(lambda z: tokens.distillation_loss(jnp.asarray(student), z))
    assert not np.any(slope(jnp.asarray(teacher)))
    far = tokens.distillation_loss(np.array([[500.0, 0.0]]), np.array([[0.0, 500.0]]))
    np.testing.assert_allclose(far, 500, rtol=1e-6)


def test_a_class_that_both_exclude_adds_nothing():
    """Value and gradient are those without the class."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 4))
    excluded = np.full((5, 1), -np.inf)
    wider = [np.concatenate([logits, excluded], axis=1) for logits in (student, teacher)]
    value_and_grad = jax.value_and_grad(tokens.distillation_loss)
    value, slope = value_and_grad(*map(jnp.asarray, (student, teacher)))
    got, wide_slope = value_and_grad(*map(jnp.asarray, wider))
    np.testing.assert_allclose(got, value, rtol=1e-6)
    np.testing.assert_allclose(wide_slope[:, :4], slope, rtol=1e-5, atol=1e-7)
    assert not np.any(wide_slope[:, 4])
    # By the teacher alone; and what is not a number still shows.
    assert np.isfinite(tokens.distillation_loss(np.ones((5, 5)), wider[1]))
    assert np.isnan(tokens.distillation_loss(student, np.full((5, 4), np.nan)))


def test_half_precision_is_computed_in_single():
    rng = np.random.default_rng(0)
    pair = [jnp.asarray(rng.normal(size=(16, 50)), jnp.bfloat16) for _ in range(2)]
    exact = [leaf.astype(jnp.float32) for leaf in pair]
    np.testing.assert_array_equal(tokens.distillation_loss(*pair), tokens.distillation_loss(*exact))
    pair, exact = ([leaf.reshape(4, 4, 50) for leaf in two] for two in (pair, exact))
    kept = jnp.ones((4, 4))
    np.testing.assert_array_equal(
        tokens.token_distillation_loss(*pair, kept), tokens.token_distillation_loss(*exact, kept)
    )


def test_distillation_of_tokens():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 3, 4, 5))
    kept = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    places = np.argwhere(kept)
    expected = np.mean([np.mean((student[i, j] - teacher[i, j]) ** 2) for i, j in places])
    got = tokens.token_distillation_loss(student, teacher, kept)
    np.testing.assert_allclose(got, expected, rtol=1e-5)

    def nothing(features):
        return tokens.token_distillation_loss(features, teacher, np.zeros((3, 4)))

    value, slope = jax.value_and_grad(nothing)(jnp.asarray(student))
    assert value == 0 and not np.any(slope)


def test_shapes_that_would_broadcast_are_refused():
    logits, features = np.ones((4, 3)), np.ones((4, 3, 2))
    for teacher in (logits[:1], logits[0]):
        with pytest.raises(ValueError, match=r"logits have shape \(4, 3\) and the teacher's"):
            tokens.distillation_loss(logits, teacher)
    with pytest.raises(ValueError, match="expected the same, of 2 axes"):
        tokens.distillation_loss(features, features)
    with pytest.raises(ValueError, match=r"features have shape .*, expected the same, of 3 axes"):
        tokens.token_distillation_loss(features, features[..., :1], np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"kept has shape \(1, 3\), expected \(4, 3\)"):
        tokens.token_distillation_loss(features, features, np.ones((1, 3)))
