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
    """
    positive, negative = jnp.asarray(positive), jnp.sort(jnp.asarray(negative))
    lower = jnp.searchsorted(negative, positive, side="left")
    not_higher = jnp.searchsorted(negative, positive, side="right")
    return jnp.mean((lower + not_higher) / (2 * len(negative)))


def average_precision(positive: Float[ArrayLike, " p"], negative: Float[ArrayLike, " q"]) -> Scalar:
    """The mean over positive examples of the precision at the score of each.

    Precision at a score is the part that is positive among all examples with that score or a
    higher one, so this is the sum of precisions weighted by the growth of recall, without
    interpolation.

    Args:
        positive: Scores of positive examples, at least one.
        negative: Scores of negative ones.
    """
    positive, negative = jnp.sort(jnp.asarray(positive)), jnp.sort(jnp.asarray(negative))
    right, wrong = (_at_least(scores, positive) for scores in (positive, negative))
    return jnp.mean(right / (right + wrong))


def _at_least(scores: Float[Array, " n"], bounds: Float[Array, " p"]) -> Array:
    """How many of sorted scores are not lower than each bound."""
    return len(scores) - jnp.searchsorted(scores, bounds, side="left")
