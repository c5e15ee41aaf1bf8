"""Ranking against scikit-learn and by hand."""

import jax
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from ntt_sparse.training.ranking import average_precision, roc_auc


@jax.jit
def both(positive, negative):
    return roc_auc(positive, negative), average_precision(positive, negative)


def test_by_hand():
    positive, negative = np.float32([5, 2, 1]), np.float32([2, 0, 3])
    auc, precision = both(positive, negative)
    # 5 beats all three; 2 beats 0 and ties with 2; 1 beats 0.
    np.testing.assert_allclose(auc, (3 + 1.5 + 1) / 9)
    # At 5: 1 of 1. At 2: 2 of 4 (5, 3, 2, 2). At 1: 3 of 5.
    np.testing.assert_allclose(precision, (1 + 2 / 4 + 3 / 5) / 3, rtol=1e-6)


@pytest.mark.parametrize("levels", [2, 7, 1_000_000])
def test_as_scikit_learn_with_and_without_ties(levels):
    random = np.random.RandomState(levels)
    positive = (random.randint(0, levels, 90) + 0.2 * levels).astype(np.float32)
    negative = random.randint(0, levels, 70).astype(np.float32)
    labels = np.r_[np.ones(90), np.zeros(70)]
    scores = np.r_[positive, negative]
    auc, precision = both(positive, negative)
    np.testing.assert_allclose(auc, roc_auc_score(labels, scores), rtol=1e-6)
    np.testing.assert_allclose(precision, average_precision_score(labels, scores), rtol=1e-6)


@pytest.mark.parametrize("where", ["positive", "negative"])
def test_scores_that_are_no_numbers_are_no_perfect_ranking(where):
    scores = {"positive": np.float32([3, 4]), "negative": np.float32([1, 2])}
    scores[where][1] = np.nan
    assert all(np.isnan(value) for value in both(**scores))


def test_extremes():
    high, low = np.float32([3, 4]), np.float32([1, 2])
    assert both(high, low) == (1.0, 1.0)
    # The worst order of two and two: precisions 2/4 and 1/3.
    auc, precision = both(low, high)
    assert auc == 0.0
    np.testing.assert_allclose(precision, (1 / 3 + 2 / 4) / 2, rtol=1e-6)
    # Scores that are all equal say nothing.
    assert both(np.zeros(2, np.float32), np.zeros(2, np.float32)) == (0.5, 0.5)
