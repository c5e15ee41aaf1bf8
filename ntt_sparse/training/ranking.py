"""How well scores tell two kinds of examples apart, on the device."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ntt_sparse._types import Scalar


def roc_auc(positive: Float[ArrayLike, " p"], negative: Float[ArrayLike, " q"]) -> Scalar:
    """The area under the ROC curve.

    It is the chance that a positive example has the higher score than a negative one, a tie
    being half a chance.

    Args:
        positive: Scores of positive examples, at least one.
        negative: Scores of negative ones, at least one.

    Returns:
        From 0 to 1; NaN where a score is NaN, or there are none of a kind.
    """
    positive, negative = jnp.asarray(positive), jnp.sort(jnp.asarray(negative))
    lower = jnp.searchsorted(negative, positive, side="left")
    not_higher = jnp.searchsorted(negative, positive, side="right")
    return _of_numbers(jnp.mean((lower + not_higher) / (2 * len(negative))), positive, negative)


def average_precision(positive: Float[ArrayLike, " p"], negative: Float[ArrayLike, " q"]) -> Scalar:
    """The mean over positive examples of the precision at the score of each.

    Precision at a score is the part that is positive among all examples with that score or a
    higher one, so this is the sum of precisions weighted by the growth of recall, without
    interpolation.

    Args:
        positive: Scores of positive examples, at least one.
        negative: Scores of negative ones.

    Returns:
        From 0 to 1; NaN where a score is NaN, or none is positive.
    """
    positive, negative = jnp.sort(jnp.asarray(positive)), jnp.sort(jnp.asarray(negative))
    right, wrong = (_at_least(scores, positive) for scores in (positive, negative))
    return _of_numbers(jnp.mean(right / (right + wrong)), positive, negative)


def _of_numbers(value: Scalar, *scores: Float[Array, "_"]) -> Scalar:
    # Sorted as the largest of all, NaN would be a perfect score.
    bad = jnp.any(jnp.isnan(jnp.concatenate(scores)))
    return jnp.where(bad, jnp.nan, value)


def _at_least(scores: Float[Array, " n"], bounds: Float[Array, " p"]) -> Array:
    """How many of sorted scores are not lower than each bound."""
    return len(scores) - jnp.searchsorted(scores, bounds, side="left")
