"""How close to sparse a network is."""

import jax.numpy as jnp
from jaxtyping import ArrayLike

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
        A fraction in [0, 1], float32; NaN where no weight counts.

    Raises:
        ValueError: No leaf is prunable, or masks that do not fit.
    """
    kept = full(params, prunable=prunable) if masks is None else masks
    check(params, kept)
    weights, kept = named_leaves(params), named_leaves(kept)
    small = sum(jnp.sum((jnp.abs(weights[name]) < epsilon) & mask) for name, mask in kept.items())
    return jnp.float32(small) / sum(jnp.sum(mask) for mask in kept.values())
