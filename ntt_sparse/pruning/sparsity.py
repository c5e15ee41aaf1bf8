"""How close to sparse a network is."""

from typing import cast

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from ntt_sparse._types import Masks, Params, Scalar
from ntt_sparse.pruning.masks import Prunable, check, full, matrices, named_leaves


def epsilon_sparsity(
    params: Params,
    epsilon: ArrayLike,
    *,
    masks: Masks | None = None,
    prunable: Prunable = matrices,
) -> Scalar:
    r"""The fraction of weights with $|w| < \epsilon$; with masks, of those that are kept.

    For weights that are zero or larger than epsilon it is the sparsity (Ni et al. 2023,
    "Learning sparse neural networks with identity layers", appendix, Theorem 1).

    Args:
        params: Parameters.
        epsilon: A positive number; may be traced.
        masks: Masks of the structure of `params`. With them, pruned weights do not count, and
            leaves without a mask do not either.
        prunable: Predicate `(path, leaf) -> bool`: which leaves count where there are no masks.

    Returns:
        A fraction in [0, 1], float32; NaN where masks keep no weight.

    Raises:
        ValueError: No leaf is prunable or has a mask, masks that do not fit, or an epsilon that
            is not positive.
    """
    # The negated form also refuses NaN.
    if not isinstance(epsilon, Tracer) and not float(cast(float, epsilon)) > 0:
        raise ValueError(f"{epsilon=}, expected a positive number")
    kept = full(params, prunable=prunable) if masks is None else masks
    check(params, kept)
    if not jax.tree.leaves(kept):
        raise ValueError("no leaf has a mask, expected one at least: every mask is None")
    weights, kept = named_leaves(params), named_leaves(kept)
    small = sum(jnp.sum(_below(weights[name], epsilon) & mask) for name, mask in kept.items())
    return jnp.float32(small) / sum(jnp.sum(mask) for mask in kept.values())


def _below(weights: Array, epsilon: ArrayLike) -> Array:
    # In half precision epsilon itself may be zero.
    precise = jnp.result_type(jnp.float32, weights, epsilon)
    return jnp.abs(weights.astype(precise)) < jnp.asarray(epsilon, precise)
