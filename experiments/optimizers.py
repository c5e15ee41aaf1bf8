"""Optimisers that studies share."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ntt_sparse.pruning import masks as pruning_masks


def warmed_up(schedule: optax.Schedule, steps: int) -> optax.Schedule:
    """A schedule that rises in equal steps over the first ones; none leave it as it is."""
    if not steps:
        return schedule
    return lambda count: schedule(count) * jnp.minimum(1.0, (count + 1) / steps)


def adamw(settings: Any, total_steps: int, rate: float) -> optax.GradientTransformation:
    """AdamW with a rate that falls by a cosine, as transformers are trained, and rises at first.

    Weights of layers decay, but no vectors, and nothing that tokens or their places begin with.

    Args:
        settings: Of a stage: `warmup`, the fraction of steps in which the rate rises, and
            `weight_decay`.
        total_steps: Of the stage.
        rate: Of which the cosine is.
    """
    cosine = optax.cosine_decay_schedule(rate, total_steps)
    schedule = warmed_up(cosine, round(settings.warmup * total_steps))
    return optax.adamw(schedule, weight_decay=settings.weight_decay, mask=_decaying)


def _decaying(params: Any) -> Any:
    return jax.tree.map_with_path(
        lambda path, leaf: pruning_masks.kernels(pruning_masks.path_name(path), leaf), params
    )
