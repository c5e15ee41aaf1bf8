"""Supervised terms and evaluation against formulas written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from ntt_sparse.training import terms
from ntt_sparse.training.step import TermInputs


@pytest.fixture
def member():
    return jax.tree.map(lambda leaf: leaf[0], problems.members((4,)))


def logits_by_hand(member, x):
    p, m = member.params, member.masks
    p = {
        k: np.asarray(v, np.float64) * (1 if m[k] is None else np.asarray(m[k]))
        for k, v in p.items()
    }
    return np.tanh(x @ p["in"] + p["bias"]) @ p["out"]


def cross_entropy_by_hand(logits, y):
    shifted = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(y)), y]


@pytest.mark.parametrize("batch_size", [1, 7, 96, 1000])
def test_evaluation_counts_every_example_once(member, batch_size):
    x, y = problems.data(3)
    values = terms.evaluate_supervised(
        problems.apply_fn, member.params, member.masks, (x, y), batch_size=batch_size
    )
    logits = logits_by_hand(member, x)
    np.testing.assert_allclose(values["loss"], cross_entropy_by_hand(logits, y).mean(), rtol=1e-5)
    np.testing.assert_allclose(values["accuracy"], (logits.argmax(1) == y).mean(), rtol=1e-6)


def test_evaluation_of_nothing_raises(member):
    with pytest.raises(ValueError, match="empty"):
        terms.evaluate_supervised(
            problems.apply_fn, member.params, member.masks, (np.zeros((0, 6)), np.zeros(0, int))
        )


def test_evaluation_of_other_labels_raises(member):
    x, y = problems.data()
    with pytest.raises(ValueError, match="96 inputs and 90 labels, expected as many"):
        terms.evaluate_supervised(problems.apply_fn, member.params, member.masks, (x, y[:90]))


def test_evaluation_in_half_precision_counts_in_single(member):
    """997 of 1000 right is not a number of bfloat16, nor is their sum."""
    labels = np.zeros(1000, int)
    labels[:3] = 1

    def zeros(params, x):
        return jnp.zeros((len(x), 2), jnp.bfloat16).at[:, 0].set(1)

    values = terms.evaluate_supervised(
        zeros, member.params, member.masks, (np.zeros((1000, 6)), labels), batch_size=300
    )
    np.testing.assert_allclose(values["accuracy"], 0.997, rtol=1e-6)
    right, wrong = np.log1p(np.exp(-1.0)), np.log1p(np.exp(1.0))
    np.testing.assert_allclose(values["loss"], 0.997 * right + 0.003 * wrong, rtol=1e-5)


def test_labels_that_would_broadcast_are_refused():
    for loss in ("cross_entropy", "squared_error"):
        for labels in (jnp.arange(4)[:, None], jnp.arange(1), jnp.arange(3)):
            with pytest.raises(ValueError, match=r"labels have shape .* and outputs \(4, 4\)"):
                terms.example_losses(jnp.eye(4), labels, loss)


def inputs(member, batch):
    return TermInputs(member.params, member.masks, (), batch, jax.random.key(0))


def test_supervised_term_is_the_mean_loss_and_logs_accuracy(member):
    def without_dropout(params, x, **kwargs):
        assert kwargs["train"] is True and set(kwargs["rngs"]) == {"dropout"}
        return problems.apply_fn(params, x)

    x, y = problems.data(1)
    loss, details = terms.supervised(without_dropout)(inputs(member, (x, y)))
    logits = logits_by_hand(member, x)
    np.testing.assert_allclose(loss, cross_entropy_by_hand(logits, y).mean(), rtol=1e-5)
    np.testing.assert_allclose(details["accuracy"], (logits.argmax(1) == y).mean(), rtol=1e-6)


def test_squared_error_is_half_the_distance_to_the_one_hot_target():
    outputs, labels = jnp.array([[0.5, -1.0], [2.0, 0.0]]), jnp.array([0, 1])
    losses = terms.example_losses(outputs, labels, "squared_error")
    np.testing.assert_allclose(losses, [0.5 * (0.25 + 1.0), 0.5 * (4.0 + 1.0)])


def test_cross_entropy_of_extreme_logits_is_finite():
    outputs = jnp.array([[500.0, -500.0], [-500.0, 500.0]])
    losses = terms.example_losses(outputs, jnp.array([0, 0]), "cross_entropy")
    np.testing.assert_allclose(losses, [0.0, 1000.0])


def test_unknown_loss_raises():
    # The type hook of the tests refuses it first.
    with pytest.raises((ValueError, TypeError), match="'cross_entropy'"):
        terms.example_losses(jnp.zeros((1, 2)), jnp.zeros(1, int), "hinge")


def test_weight_decay_counts_survivors_and_no_biases(member):
    member.params["bias"] = jnp.full(16, 100.0)
    loss, details = terms.weight_decay(0.01)(inputs(member, None))
    expected = sum(
        np.sum(np.asarray(member.params[name])[np.asarray(member.masks[name])] ** 2)
        for name in ("in", "out")
    )
    np.testing.assert_allclose(details["sum_of_squares"], expected, rtol=1e-6)
    np.testing.assert_allclose(loss, 0.01 * expected, rtol=1e-6)


def test_examples_of_many_labels():
    """An example counts with the means of its loss and of its hits."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 3, 4)).astype(np.float32), rng.integers(4, size=(5, 3))
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(chances, labels[..., None], -1))[..., 0].mean(1)
    losses = terms.example_losses(jnp.asarray(logits), labels, "cross_entropy")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    smooth = terms.example_losses(jnp.asarray(logits), labels, "cross_entropy", label_smoothing=0.2)
    shared = 0.8 * expected - 0.2 * np.log(chances).mean((1, 2))
    np.testing.assert_allclose(smooth, shared, rtol=1e-5)
    squares = terms.example_losses(jnp.asarray(logits), labels, "squared_error")
    distances = 0.5 * ((logits - np.eye(4)[labels]) ** 2).sum(-1).mean(1)
    np.testing.assert_allclose(squares, distances, rtol=1e-5)
    params, masks = {"w": jnp.ones((1, 1))}, {"w": None}
    # Two at a time, so that there is one that is filled up.
    found = terms.evaluate_supervised(
        lambda params, x: x * params["w"], params, masks, (logits, labels), batch_size=2
    )
    hits = np.mean(logits.argmax(-1) == labels)
    np.testing.assert_allclose(found["loss"], expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], hits, rtol=1e-6)
