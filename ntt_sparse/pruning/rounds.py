"""Pruning in rounds: score what is left, prune a little of it, score again.

With 100 rounds and `saliency.synflow` this is SynFlow; with other scores it is iterative SNIP
and the like. One program runs all rounds.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Real

from ntt_sparse._types import Masks, Params, Scores
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.pruning._checks import check_density
from ntt_sparse.pruning.masks import Density, Scope, named_leaves

Schedule: TypeAlias = Literal["exponential", "linear"]


def densities(
    density: Real[ArrayLike, ""], rounds: int, *, schedule: Schedule = "exponential"
) -> list[float]:
    r"""The density after each round, the last of which is the one asked for.

    Args:
        density: Fraction kept in the end, in (0, 1].
        rounds: How many there are, at least 1.
        schedule: `"exponential"`: $d^{e/E}$ after round e of E, the same fraction of what is
            left in each; `"linear"`: $1 - (1 - d) e / E$.

    Raises:
        ValueError: A number is out of range or the schedule is unknown.
    """
    density = check_density(density)
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected 1 or more")
    parts = [e / rounds for e in range(1, rounds)]
    if schedule == "exponential":
        return [*(density**part for part in parts), density]
    if schedule == "linear":
        return [*(1 - (1 - density) * part for part in parts), density]
    raise ValueError(f"{schedule=} is unknown, expected 'exponential' or 'linear'")


def prune(
    score_fn: Callable[[Params], Scores],
    params: Params,
    density: Density,
    *,
    rounds: int = 100,
    schedule: Schedule = "exponential",
    scope: Scope = "global",
) -> Masks:
    """Masks of a density, pruned over several rounds.

    In each round the network is scored whose pruned weights are zero, and the weights of the
    lowest scores go, until as many are left as the schedule has. What is pruned stays pruned.
    Works under `jit` and `vmap`.

    Args:
        score_fn: Scores of params, larger is kept, such as
            `lambda params: saliency.synflow(apply_fn, params, input_shape)`.
        params: Parameters.
        density: Fraction kept in the end, or one for each layer, as in `masks.from_scores`.
        rounds: How many, at least 1. (The paper has 100 for SynFlow.)
        schedule: See `densities`.
        scope: Whether weights compete across the whole network or within their layer.

    Returns:
        Masks of the structure of the scores.

    Raises:
        ValueError: A number is out of range, paths do not match, two leaves have one path, or
            (outside of a transformation; inside NaN counts as the smallest score of those that
            are left, and `run` says whether there was one) scores are NaN.

    Warns:
        UserWarning: Outside of a transformation, a layer ends empty; or nothing told the last
            pruned weights apart, as when no input reaches the output any more.

    References:
        Tanaka, Kunin, Yamins, Ganguli: Pruning neural networks without any data by iteratively
        conserving synaptic flow, NeurIPS 2020, algorithm 1.
    """
    found, finite = run(score_fn, params, density, rounds=rounds, schedule=schedule, scope=scope)
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((found, finite))):
        if not finite:
            raise ValueError("scores hold NaN: the gradients they come from diverged")
        pruning_masks.warn_empty_layers(found)
        if all(jnp.any(mask) for mask in jax.tree.leaves(found)):
            _warn_of_ties(score_fn(pruning_masks.apply(params, found)))
    return found


def run(
    score_fn: Callable[[Params], Scores],
    params: Params,
    density: Density,
    *,
    rounds: int = 100,
    schedule: Schedule = "exponential",
    scope: Scope = "global",
) -> tuple[Masks, Bool[Array, ""]]:
    """As `prune`, without its checks of values: `(masks, whether no score was NaN)`.

    For use under `jit`, where values cannot be checked: look at the flag outside.
    """
    shapes = jax.eval_shape(score_fn, params)
    counts = _counts(shapes, density, rounds, schedule, scope)

    def one(e: Any, carry: tuple[Masks, Any]) -> tuple[Masks, Any]:
        kept, finite = carry
        scores = score_fn(pruning_masks.apply(params, kept))
        finite &= jnp.stack([~jnp.any(jnp.isnan(leaf)) for leaf in jax.tree.leaves(scores)]).all()
        # Below every score, zero included.
        ranked = jax.tree.map(lambda mask, score: jnp.where(mask, score, -jnp.inf), kept, scores)
        return pruning_masks.from_counts(ranked, jax.tree.map(lambda n: n[e], counts)), finite

    everything = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), shapes)
    return jax.lax.fori_loop(0, rounds, one, (everything, jnp.bool_(True)))


def _counts(shapes: Any, density: Density, rounds: int, schedule: Schedule, scope: Scope) -> Any:
    """How many weights are left after each round: `(rounds,)`, or one of these for each leaf."""
    last = pruning_masks.keep_counts(shapes, density, scope=scope)
    if not isinstance(density, Mapping) and scope == "global":
        total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        return _rounded(densities(density, rounds, schedule=schedule), total, last)
    each = density if isinstance(density, Mapping) else dict.fromkeys(named_leaves(shapes), density)
    steps = {name: densities(d, rounds, schedule=schedule) for name, d in each.items()}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, n: _rounded(steps[pruning_masks.path_name(path)], leaf.size, n),
        shapes,
        last,
    )


def _rounded(steps: list[float], total: int, last: int) -> Any:
    return jnp.asarray([*(round(each * total) for each in steps[:-1]), last], jnp.int32)


def _warn_of_ties(scores: Scores) -> None:
    if all(not jnp.any(leaf) for leaf in jax.tree.leaves(scores)):
        warnings.warn(
            "all scores are zero in the end: nothing flows through what is left, so its weights "
            "were picked by their place; keep more, or give each layer its own density",
            stacklevel=3,
        )
