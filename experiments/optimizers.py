"""Optimisers that studies share."""

from typing import Any

import jax
import optax

from ntt_sparse.pruning import masks as pruning_masks


def adamw(settings: Any, total_steps: int, rate: float) -> optax.GradientTransformation:
    """AdamW with a rate that rises and then falls by a cosine, as transformers are trained.

    Weights of layers decay, but no vectors, and nothing that tokens or their places begin with.

    Args:
        settings: Of a stage: `warmup`, the fraction of steps in which the rate rises, and
            `weight_decay`.
        total_steps: Of the stage.
        rate: The largest.
    """
    warmup = round(settings.warmup * total_steps)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else rate, rate, warmup, max(total_steps, warmup + 1)
    )
    return optax.adamw(schedule, weight_decay=settings.weight_decay, mask=_decaying)


def _decaying(params: Any) -> Any:
    return jax.tree.map_with_path(
        lambda path, leaf: pruning_masks.kernels(pruning_masks.path_name(path), leaf), params
    )
