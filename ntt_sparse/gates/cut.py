"""Cutting channels by a score of each: which of them stay, so that a budget is met.

Channels of all layers are ranked together. Gates that end at numbers between open and closed are
cut in this way (Network Slimming, ChipNet, L1); those of DAM close by themselves.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from ntt_sparse.gates.budget import Cost

Scores = Mapping[str, Real[ArrayLike, "_"]]
"""How much each channel matters, `(n,)`, by the path of its layer."""


def within(
    scores: Scores, target: int | Real[ArrayLike, ""], cost: Cost, *, at_least: int = 0
) -> dict[str, Bool[Array, "_"]]:
    """Which channels stay: those of the highest scores, as many as a budget permits.

    Args:
        scores: Of each layer, `(n,)`, by path. Of equal scores the first stays longest.
        target: The cost that is not to be exceeded; may be traced.
        cost: Of the network whose channels are these; it must not fall when one is opened.
        at_least: Channels of each layer that stay in any case, those of its highest scores.

    Returns:
        Of each layer, `(n,)`. If what stays in any case costs more than the target, that.

    Raises:
        ValueError: There are no scores, they are no vectors of finite numbers, the target is NaN,
            or `at_least` is negative.
    """
    values = check(scores)
    if not isinstance(target, Tracer) and np.isnan(np.asarray(target, float)):
        raise ValueError(f"target is {target}, expected the cost that is not to be exceeded")
    protected = protect(values, at_least)
    least = jnp.int32(sum(min(at_least, value.size) for value in values.values()))
    over = fewest(protected, lambda open_: cost(open_) > target, least)
    return highest(protected, jnp.maximum(over - 1, least))


def check(scores: Scores) -> dict[str, Array]:
    """Scores as arrays.

    Raises:
        ValueError: There are none, they are no vectors, or one is not finite (where they are no
            tracers).
    """
    values = {path: jnp.asarray(score) for path, score in scores.items()}
    if not values:
        raise ValueError("there are no channels, expected scores of one gated layer or more")
    for path, value in values.items():
        if value.ndim != 1:
            raise ValueError(f"the scores of {path!r} have shape {value.shape}, expected (n,)")
        if not isinstance(value, Tracer) and not np.all(np.isfinite(value)):
            raise ValueError(f"the scores of {path!r} are not finite: {np.asarray(value)}")
    return values


def protect(scores: Scores, count: int) -> dict[str, Float[Array, "_"]]:
    """Scores of which the highest `count` of each layer are infinite.

    Raises:
        ValueError: The count is negative.
    """
    if count < 0:
        raise ValueError(f"at_least is {count}, expected 0 channels or more")
    found = {}
    for path, score in scores.items():
        value = jnp.asarray(score, jnp.result_type(float, score))
        top = jnp.argsort(-value, stable=True)[:count]
        found[path] = value.at[top].set(jnp.inf)
    return found


def highest(scores: Scores, count: int | Int[ArrayLike, ""]) -> dict[str, Bool[Array, "_"]]:
    """The `count` channels of the highest scores of all; of equal ones the first. May be traced."""
    values = [jnp.asarray(score) for score in scores.values()]
    place = jnp.argsort(jnp.argsort(-jnp.concatenate(values), stable=True))
    layers = jnp.split(place < count, np.cumsum([len(value) for value in values])[:-1])
    return dict(zip(scores, layers, strict=True))


def fewest(
    scores: Scores,
    enough: Callable[[dict[str, Bool[Array, "_"]]], Bool[ArrayLike, ""]],
    least: int | Int[ArrayLike, ""] = 0,
) -> Int[Array, ""]:
    """How many of the highest scores it takes until they are enough, by bisection.

    Args:
        scores: Of each layer, `(n,)`, by path.
        enough: Of the channels that are open; more of them must not be less.
        least: Where the search begins.

    Returns:
        At least `least`; one more than there are if all are not enough.
    """
    total = sum(jnp.shape(score)[0] for score in scores.values())

    def halve(ends):
        low, high = ends
        middle = (low + high) // 2
        there = enough(highest(scores, middle))
        return jnp.where(there, low, middle + 1), jnp.where(there, middle, high)

    ends = jnp.asarray(least, jnp.int32), jnp.int32(total + 1)
    return jax.lax.while_loop(lambda ends: ends[0] < ends[1], halve, ends)[0]
