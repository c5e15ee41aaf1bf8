"""Orders of channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.gates import order


def test_channels_of_low_scores_go_first():
    assert order.by_score(jnp.array([0.3, -1.0, 7.0, 0.3])).tolist() == [1, 0, 3, 2]


def test_a_random_order_is_a_permutation():
    ranks = order.random(jax.random.key(3), 50)
    assert sorted(ranks.tolist()) == list(range(50))
    assert ranks.tolist() != list(range(50))


def test_weight_norms():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32)
    expected = [np.linalg.norm(kernel[..., c]) for c in range(5)]
    np.testing.assert_allclose(order.weight_norms(kernel), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_weight_norms_of_half_precision_keep_their_order(dtype):
    kernel = jax.random.normal(jax.random.key(0), (64, 16), dtype)
    norms = order.weight_norms(kernel)
    expected = np.linalg.norm(np.asarray(kernel, np.float64), axis=0)
    assert norms.dtype == jnp.float32 and len(np.unique(norms)) == 16
    np.testing.assert_array_equal(np.argsort(norms), np.argsort(expected))
    tiny = order.weight_norms(jnp.full((4, 1), 1e-5, dtype))
    np.testing.assert_allclose(tiny, [2e-5], rtol=0.01)


def information_by_hand(places, labels):
    """From counts, in float64: the sum of entropies, each corrected by Miller (1955)."""

    def entropy(*variables):
        counts = np.unique(np.stack(variables), axis=1, return_counts=True)[1]
        p = counts / len(labels)
        return -np.sum(p * np.log(p)) + (len(p) - 1) / (2 * len(labels))

    return entropy(places) + entropy(labels) - entropy(places, labels)


def test_mutual_information():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 60)
    columns = [labels * 1.0, rng.normal(size=60), np.ones(60), labels == 1]
    activations = np.stack(columns, 1).astype(np.float32)
    found = order.mutual_information(activations, labels, 3, bins=4)
    expected = []
    for column in columns:
        column = column.astype(np.float32)
        edges = np.quantile(column, [0.25, 0.5, 0.75])
        expected.append(information_by_hand((column[:, None] > edges).sum(1), labels))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert abs(found[2]) < 1e-6
    # Noise tells less than a class does.
    assert found[0] > found[3] > found[1]
    with_hole = activations.copy()
    with_hole[3, 1] = np.nan
    assert np.isnan(order.mutual_information(with_hole, labels, 3, bins=4)).tolist() == [
        False, True, False, False,
    ]  # fmt: skip


def test_noise_tells_nothing_whether_dense_or_sparse():
    """The bias of the plug-in estimate is larger for channels that use all bins."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 10, 1000)
    dense = rng.normal(size=(1000, 20))
    sparse = np.where(rng.random((1000, 20)) < 0.85, 0, np.abs(dense))
    found = order.mutual_information(np.concatenate([dense, sparse], 1), labels, 10)
    assert np.max(np.abs(np.mean(np.reshape(found, (2, 20)), axis=1))) < 0.01


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: order.by_score(jnp.ones((2, 2))), "one per channel"),
        (lambda: order.by_score(jnp.array([jnp.nan, 1.0])), "expected no NaN"),
        (lambda: order.mutual_information(jnp.ones((4, 2)), jnp.zeros(3, int), 2), "shapes"),
        (lambda: order.mutual_information(jnp.ones((4, 2)), jnp.zeros(4, int), 2, bins=5), "2 to"),
        (
            lambda: order.mutual_information(jnp.ones((4, 2)), jnp.full(4, 2), 2, bins=2),
            "labels are from 2 to 2, expected 0 to 1",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
