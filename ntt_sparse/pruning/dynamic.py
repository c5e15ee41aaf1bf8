"""Masks that change while a network is trained: gradual pruning, SET and RigL.

Pure functions of params and masks, for the `after_update` of a training step. Counts are traced,
so that a new density or fraction never recompiles.

====================  ==================================================================
`gradual`             magnitude pruning with a density that falls over training
`replace`             some connections of each layer go, as many others come
                      (SET: at random; RigL: those of the largest gradients)
====================  ==================================================================

Weights that come start from zero, where `ntt_sparse.pruning.transform.keep_masked` has held them;
those that go and come in one change keep their value. (Published RigL makes no step of the
optimiser where it changes masks; here the change follows the step, with the gradient before it.)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ntt_sparse._types import Masks, Params, Scores
from ntt_sparse.pruning import masks as pruning_masks


def cubic_density(
    step: Int[ArrayLike, ""], *, start: int, end: int, final: ArrayLike, initial: ArrayLike = 1.0
) -> Float[Array, ""]:
    r"""The density at a step of gradual pruning: fast at first, slow in the end.

    $d_f + (d_i - d_f) (1 - (t - t_0) / (t_1 - t_0))^3$ between both steps, constant outside.

    Args:
        step: Steps done; may be traced.
        start: Step from which the density falls.
        end: Step at which it is final.
        final: Density in the end; may be traced.
        initial: Density at the start; may be traced.

    Raises:
        ValueError: The end is not after the start, or a density is no fraction.

    References:
        Zhu & Gupta: To prune, or not to prune, 2017, https://arxiv.org/abs/1710.01878, Eq. 1.
    """
    if not start < end:
        raise ValueError(f"end is {end}, expected a step after start, which is {start}")
    _check_fraction("final", final)
    _check_fraction("initial", initial)
    left = 1 - jnp.clip((jnp.asarray(step) - start) / (end - start), 0.0, 1.0)
    return jnp.asarray(final) + (jnp.asarray(initial) - jnp.asarray(final)) * left**3


def gradual(params: Params, masks: Masks, counts: Any) -> Masks:
    """Masks that keep the largest of the weights that are left.

    Nothing that was pruned comes back: with more to keep than there is nothing changes.

    Args:
        params: Parameters.
        masks: Masks of their structure.
        counts: How many to keep, of the whole network or of each layer, as
            `ntt_sparse.pruning.masks.from_counts` has them; may be traced.

    Raises:
        ValueError: Masks that do not fit, or counts of another structure.
    """
    pruning_masks.check(params, masks)
    kept = pruning_masks.from_counts(_magnitudes(params, masks), counts)
    # More may be asked for than there are.
    return jax.tree.map(lambda new, old: new & old, kept, masks)


def cosine_fraction(
    step: Int[ArrayLike, ""], *, end: int, initial: float = 0.3
) -> Float[Array, ""]:
    r"""The fraction of connections to replace at a step, $\alpha (1 + \cos(\pi t / T)) / 2$.

    Args:
        step: Steps done; may be traced.
        end: Step from which nothing is replaced any more (T).
        initial: Fraction at step 0 (alpha), in (0, 1].

    Raises:
        ValueError: A number is out of range.

    References:
        Evci et al.: Rigging the lottery, ICML 2020, https://arxiv.org/abs/1911.11134, Section 3.
    """
    if end < 1:
        raise ValueError(f"end is {end}, expected step 1 or later")
    if not 0 < initial <= 1:
        raise ValueError(f"initial is {initial}, expected a fraction in (0, 1]")
    passed = jnp.clip(jnp.asarray(step) / end, 0.0, 1.0)
    return initial * (1 + jnp.cos(jnp.pi * passed)) / 2


def replace(params: Params, masks: Masks, scores: Scores, fraction: ArrayLike) -> Masks:
    """Replaces a fraction of the connections of each layer; each keeps its number of weights.

    Of the weights that are there the smallest go. Of what is not there then, those of the
    largest scores come, which may be some that have just gone: with the absolute gradients of
    the network by all its weights as scores this is RigL, with random scores SET (which picks
    among what was not there before; so does `-inf` as the score of what was).

    Args:
        params: Parameters.
        masks: Masks of their structure.
        scores: Of what may come, the larger first, with the structure of the masks. A traced NaN
            counts as the smallest.
        fraction: Of the weights of each layer, rounded down, from 0 to 1; may be traced. No more
            go than can come.

    Returns:
        Masks of the structure of `masks`.

    Raises:
        ValueError: Masks or scores that do not fit, a score that is NaN, or a fraction out of
            range.

    References:
        Mocanu et al. 2018, https://arxiv.org/abs/1707.04780 (SET); Evci et al. 2020,
        https://arxiv.org/abs/1911.11134, Algorithm 1 (RigL).
    """
    pruning_masks.check(params, masks)
    _check_fraction("fraction", fraction)
    given, expected = jax.tree.structure(scores), jax.tree.structure(masks)
    if given != expected:
        raise ValueError(f"scores have the structure {given}, expected {expected} as the masks")
    for name, score in pruning_masks.named_leaves(scores).items():
        shape = pruning_masks.named_leaves(masks)[name].shape
        if jnp.shape(score) != shape:
            raise ValueError(f"scores of {name!r} have shape {jnp.shape(score)}, expected {shape}")
        if not isinstance(score, Tracer) and (count := int(np.sum(np.isnan(score)))):
            raise ValueError(f"scores of {name!r} hold {count} NaN, expected numbers")
    held = jax.tree.map(lambda mask: jnp.sum(mask, dtype=jnp.int32), masks)
    gone = jax.tree.map(
        lambda mask, n: jnp.minimum(_floored(fraction, n), mask.size - n), masks, held
    )
    stay = pruning_masks.from_counts(
        _magnitudes(params, masks), jax.tree.map(lambda n, k: n - k, held, gone)
    )
    stay = jax.tree.map(lambda new, old: new & old, stay, masks)
    absent = jax.tree.map(
        lambda kept, score: jnp.where(kept, -jnp.inf, _finite(score)), stay, scores
    )
    come = pruning_masks.from_counts(absent, gone)
    return jax.tree.map(lambda kept, new: kept | new, stay, come)


def due(step: Int[ArrayLike, ""], *, every: int, start: int = 0, end: int) -> Bool[Array, ""]:
    """Whether masks change after a step: at multiples of `every` above `start`, before `end`.

    Args:
        step: Steps done; may be traced.
        every: Steps between changes.
        start: Step after which changes begin.
        end: Step from which nothing changes any more.

    Raises:
        ValueError: No step would ever be due.
    """
    first = (start // every + 1) * every if every >= 1 else 0
    if every < 1 or first >= end:
        raise ValueError(
            f"{every=}, {start=} and {end=} leave no step at which masks change: expected a "
            "multiple of every between start and end"
        )
    step = jnp.asarray(step)
    return (step % every == 0) & (step > start) & (step < end)


def _check_fraction(name: str, value: ArrayLike) -> None:
    # The negated form also refuses NaN.
    if not isinstance(value, Tracer) and not 0 <= float(np.asarray(value)) <= 1:
        raise ValueError(f"{name} is {value}, expected 0 to 1")


def _finite(score: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Scores above what cannot come; NaN is the smallest of them."""
    score = jnp.asarray(score)
    if not jnp.issubdtype(score.dtype, jnp.floating):
        return score
    return jnp.nan_to_num(score, nan=jnp.finfo(score.dtype).min)


def _magnitudes(params: Params, masks: Masks) -> Any:
    """Absolute weights where they are kept, less than any where not; `None` without a mask."""
    return jax.tree.map(
        lambda mask, leaf: jnp.where(mask, jnp.abs(leaf), -jnp.inf),
        masks,
        jax.tree.map(lambda leaf, mask: None if mask is None else leaf, params, masks),
    )


def _floored(fraction: ArrayLike, count: Any) -> Int[Array, ""]:
    # Fractions as written: 0.3 of 10 is 3, where floating point may have a little less.
    product = jnp.asarray(fraction) * count
    return jnp.floor(product * (1 + 1e-6)).astype(jnp.int32)
