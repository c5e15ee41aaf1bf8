"""Masks of sparse training, by method: those networks start with, and how they change."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.study import asked_densities
from ntt_sparse.pruning import densities, dynamic, rounds, saliency
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.training.loop import DivergenceError, Plan
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import AfterUpdate
from ntt_sparse.training.terms import example_losses

SCORED = ("magnitude", "snip", "logit_snip", "grasp", "synflow")
"""Methods that keep the weights of the largest scores at initialisation."""
GROWN = ("set", "rigl")
"""Methods that start at random and replace connections in training."""
LATER = ("gradual", "lth", "dlth", "l0")
"""Methods that start with all weights."""
METHODS = ("random", *SCORED, *GROWN, *LATER)
PRUNABLE = pruning_masks.kernels
"""Which parameters have masks."""
# Independent of the streams that training folds from a member's key.
_MASK_STREAM, _GROWTH_STREAM = 1000, 1003
# Of GraSP's scoring loss (Wang et al. 2020, their code).
_GRASP_TEMPERATURE = 200.0


def densities_of(config: Any, params: Any, density: float) -> Any:
    """A density by layer, or one for the network where layers share."""
    by_layer = {"erk": densities.erk, "uniform": densities.uniform}.get(config.layer_densities)
    return by_layer(params, density, prunable=PRUNABLE) if by_layer else density


def layer_counts(
    config: Any, params: Any, at: Mapping[float, float] | None = None
) -> dict[float, Any]:
    """Weights to keep at each density: of each layer, or of the whole network.

    Args:
        config: The settings.
        params: Parameters or their shapes.
        at: By the density asked for, one that stands for it; by default itself.
    """
    scores = pruning_masks.map_prunable(lambda _, leaf: leaf, params, PRUNABLE)
    at = at or {density: density for density in asked_densities(config)}
    return {
        density: pruning_masks.keep_counts(
            scores, densities_of(config, params, other), scope="global"
        )
        for density, other in at.items()
    }


def random_scores(key: Any, params: Any) -> Any:
    """Draws that make the random masks of a seed."""
    key = jax.random.fold_in(key, _MASK_STREAM)
    return saliency.random(key, params, prunable=PRUNABLE)


def random_masks(config: Any, params: Any, key: Any, at: Mapping[float, float]) -> dict[float, Any]:
    """Random masks of a seed at densities that stand for others.

    Those of a lower density lie within those of a higher one.

    Args:
        config: The settings.
        params: Parameters or their shapes.
        key: Of the seed.
        at: By the density asked for, that of the mask.
    """
    draws = random_scores(key, params)
    select = jax.jit(pruning_masks.from_counts)
    return {d: select(draws, counts) for d, counts in layer_counts(config, params, at).items()}


def starting_masks(
    config: Any, module: Any, input_shape: tuple[int, ...]
) -> Callable[..., dict[float, Any]]:
    """What makes the masks of a seed: `(key, params, model state, batch) -> {density: masks}`.

    Args:
        config: The settings.
        module: The network.
        input_shape: Of an example.
    """
    # Not one program: XLA takes minutes to compile the draws of a deep network together.
    select = jax.jit(pruning_masks.from_counts)
    by_method = jax.jit(functools.partial(_scores, config.method, module, input_shape))
    # Of a random mask with the layer densities of a scored one.
    by_densities = jax.jit(functools.partial(_scores, config.layer_densities, module, input_shape))

    @functools.partial(jax.jit, static_argnames="density")
    def in_rounds(params: Any, state: Any, batch: Any, density: float) -> Any:
        return rounds.run(
            lambda p: _scores(config.method, module, input_shape, p, state, batch),
            params,
            densities_of(config, params, density),
            rounds=config.rounds,
        )

    def make(key: Any, params: Any, state: Any, batch: Any) -> dict[float, Any]:
        found = {}
        if config.method in LATER:
            return dict.fromkeys(
                (1.0, *asked_densities(config)), pruning_masks.full(params, prunable=PRUNABLE)
            )
        draws = random_scores(key, params)
        for density, counts in layer_counts(config, params).items():
            if config.method in SCORED and config.rounds > 1:
                found[density], finite = in_rounds(params, state, batch, density)
                _check_scores(config, finite)
                continue
            scores = by_method(params, state, batch) if config.method in SCORED else draws
            _check_scores(config, _numbers(scores))
            if config.layer_densities in ("snip", "grasp"):
                scores_of_layers = by_densities(params, state, batch)
                _check_scores(config, _numbers(scores_of_layers))
                scored = select(scores_of_layers, counts)
                counts = jax.tree.map(jnp.sum, scored)
            found[density] = select(scores, counts)
        return found

    return make


def _numbers(scores: Any) -> Any:
    return jnp.stack([~jnp.any(jnp.isnan(leaf)) for leaf in jax.tree.leaves(scores)]).all()


def _check_scores(config: Any, finite: Any) -> None:
    """Refuses masks of scores that are no numbers, which would go by the place of weights."""
    if not finite:
        raise DivergenceError(
            f"scores of method {config.method!r}, layer densities {config.layer_densities!r}, are "
            "NaN at initialisation: the network diverges before it is trained"
        )


def _scores(
    method: str, module: Any, input_shape: tuple[int, ...], params: Any, state: Any, batch: Any
) -> Any:
    """Scores of all prunable weights; batch statistics are those of the batch."""
    x, y = batch

    def logits(p, x):
        # What dropout drops is the same for all networks.
        rngs = {"dropout": jax.random.key(0)}
        variables = {"params": p, **state}
        return module.apply(variables, x, train=True, mutable=list(state), rngs=rngs)[0]

    def loss_fn(p, batch):
        temperature = _GRASP_TEMPERATURE if method == "grasp" else 1.0
        losses = example_losses(logits(p, batch[0]) / temperature, batch[1], "cross_entropy")
        return jnp.mean(losses)

    if method == "magnitude":
        return saliency.magnitude(params, prunable=PRUNABLE)
    if method == "logit_snip":
        return saliency.logit_snip(logits, params, x, prunable=PRUNABLE)
    if method == "synflow":
        # Normalisation as it starts: statistics of zero and one.
        return saliency.synflow(
            lambda p, x: module.apply({"params": p, **state}, x),
            params,
            input_shape,
            prunable=PRUNABLE,
        )
    score = saliency.grasp if method == "grasp" else saliency.snip
    return score(loss_fn, params, (x, y), prunable=PRUNABLE)


def mask_schedule(config: Any, plan: Plan) -> AfterUpdate | None:
    """What changes masks after a step; `None` where they stay.

    Raises:
        ValueError: The schedule would never change anything; the message names the fields.
    """
    if config.method == "gradual":
        return _gradual(config, plan)
    if config.method in GROWN:
        return _replacing(config, plan)
    return None


def _gradual(config: Any, plan: Plan) -> AfterUpdate:
    settings, total = config.gradual, plan.total_steps
    start, end = round(settings.start * total), round(settings.end * total)
    if not start < end <= total:
        raise ValueError(
            f"config.gradual goes from step {start} to {end} of {total}: expected start before end"
        )

    def left(count: Any, size: int, step: Any) -> Any:
        density = dynamic.cubic_density(step, start=start, end=end, final=count / size)
        # The end is exact, whatever the rounding of densities.
        return jnp.where(step >= end, count, jnp.round(density * size).astype(jnp.int32))

    def prune(member: Member, step: Any) -> Member:
        counts, leaves = member.context["counts"], jax.tree.leaves(member.masks)
        if jax.tree_util.treedef_is_leaf(jax.tree.structure(counts)):
            counts = left(counts, sum(leaf.size for leaf in leaves), step)
        else:
            counts = jax.tree.map(lambda mask, n: left(n, mask.size, step), member.masks, counts)
        return member._replace(masks=dynamic.gradual(member.params, member.masks, counts))

    def after_update(member: Member, step: Any, gradients: Any) -> Member:
        del gradients
        due = ((step % settings.every == 0) & (step > start) & (step <= end)) | (step == end)
        return jax.lax.cond(due, prune, lambda member, step: member, member, step)

    return after_update


def _replacing(config: Any, plan: Plan) -> AfterUpdate:
    settings, end = config.growth, round(config.growth.end * plan.total_steps)
    try:
        dynamic.due(0, every=settings.every, end=end)
    except ValueError as error:
        raise ValueError(
            f"config.growth.every is {settings.every} and config.growth.end step {end} of "
            f"{plan.total_steps}: connections would never be replaced, expected fewer steps "
            "between"
        ) from error

    def scores(member: Member, step: Any, gradients: Any) -> Any:
        if config.method == "rigl":
            return jax.tree.map(
                lambda mask, gradient: jnp.abs(gradient), member.masks, _masked(member, gradients)
            )
        key = jax.random.fold_in(jax.random.fold_in(member.key, _GROWTH_STREAM), step)
        draws = saliency.random(key, member.params, prunable=PRUNABLE)
        # Among what was not there before.
        return jax.tree.map(lambda mask, draw: jnp.where(mask, -jnp.inf, draw), member.masks, draws)

    def replace(member: Member, step: Any, gradients: Any) -> Member:
        fraction = dynamic.cosine_fraction(step, end=end, initial=settings.fraction)
        new = dynamic.replace(
            member.params, member.masks, scores(member, step, gradients), fraction
        )
        return member._replace(masks=new)

    def after_update(member: Member, step: Any, gradients: Any) -> Member:
        due = dynamic.due(step, every=settings.every, end=end)
        return jax.lax.cond(due, replace, lambda member, *_: member, member, step, gradients)

    return after_update


def _masked(member: Member, tree: Any) -> Any:
    return jax.tree.map(lambda leaf, mask: None if mask is None else leaf, tree, member.masks)
