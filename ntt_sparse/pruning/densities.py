"""Layer densities: how a network's budget of weights is spread over its layers.

Each function returns `{path: density}` over the prunable leaves, in tree order,
which `masks.from_scores` takes as its density.
"""

import math
import sys

import jax.numpy as jnp
from jaxtyping import ArrayLike, PyTree, Real

from ntt_sparse._types import Masks
from ntt_sparse.pruning._checks import check_density
from ntt_sparse.pruning.masks import (
    Prunable,
    layer_densities,
    map_prunable,
    matrices,
    named_leaves,
)


def uniform(
    params: PyTree, density: Real[ArrayLike, ""], *, prunable: Prunable = matrices
) -> dict[str, float]:
    """The same density in every layer.

    Args:
        params: Parameters or their shapes (`jax.eval_shape`).
        density: Fraction kept, in (0, 1].
        prunable: Predicate `(path, leaf) -> bool`: which leaves are counted.

    Returns:
        `{path: density}`.

    Raises:
        ValueError: `density` is outside (0, 1], or no leaf is prunable.
    """
    density = check_density(density)
    return dict.fromkeys(_shapes(params, prunable), density)


def erk(
    params: PyTree, density: Real[ArrayLike, ""], *, prunable: Prunable = matrices
) -> dict[str, float]:
    """Erdős-Rényi-Kernel densities: small layers are kept denser than large ones.

    The density of a layer is `min(1, eps * sum(shape) / prod(shape))`, with eps
    such that the network as a whole has the density asked for. Kernel dimensions
    count like input and output dimensions. A leaf without entries gets 1, and
    counts for nothing.

    Args:
        params: Parameters or their shapes (`jax.eval_shape`).
        density: Fraction kept of all prunable weights together, in (0, 1].
        prunable: Predicate `(path, leaf) -> bool`: which leaves are counted.

    Returns:
        `{path: density}`, each in (0, 1]; `sum(density * size) / N` is `density`.

    Raises:
        ValueError: `density` is outside (0, 1], or no leaf is prunable or all that are
            have no entries.

    References:
        Evci et al.: Rigging the lottery: making all tickets winners, ICML 2020,
        section 3. Liu et al.: The unreasonable effectiveness of random pruning,
        ICLR 2022, section 3.1.
    """
    density = check_density(density)
    shapes = _shapes(params, prunable)
    size = {name: math.prod(shape) for name, shape in shapes.items() if 0 not in shape}
    if not size:
        raise ValueError(f"prunable are {list(shapes)}, which have no entries: expected some")
    raw = {name: sum(shapes[name]) / size[name] for name in size}
    sparse = dict.fromkeys(size)
    budget = density * sum(size.values())
    while sparse:
        largest = max(raw[name] for name in sparse)
        eps = budget / sum(raw[name] * size[name] for name in sparse)
        if eps * largest <= 1.0:
            return {name: eps * raw[name] if name in sparse else 1.0 for name in shapes}
        # These cannot hold their share: they become dense, the others share what is left.
        for name in [name for name in sparse if raw[name] == largest]:
            del sparse[name]
            budget -= size[name]
    return dict.fromkeys(shapes, 1.0)


def from_masks(masks: Masks) -> dict[str, float]:
    """The densities of the layers of given masks.

    A random mask with the layer densities of another one is
    `masks.from_scores(saliency.random(key, params), from_masks(other))`. The counts are
    then the same in every layer: `round(density * size)` is what the mask keeps there.

    An empty layer gets the smallest positive normal float in place of the 0 that
    `from_scores` refuses. It counts for nothing in sums, rounds to no weight, and
    `from_scores` warns of the empty layer. Masks that are empty throughout are refused
    there, as a network without a weight.

    Args:
        masks: Masks of one network, not traced; `None` leaves have no density.

    Returns:
        `{path: density}`, each in (0, 1].

    Raises:
        ValueError: No leaf of `masks` is an array, or a leaf is not boolean.

    References:
        Liu et al.: The unreasonable effectiveness of random pruning, ICLR 2022,
        section 3.1 (the densities of SNIP and of GraSP).
    """
    leaves = named_leaves(masks)
    if not leaves:
        raise ValueError("masks hold no array: every leaf is None, so no density is defined")
    for name, mask in leaves.items():
        if mask.dtype != jnp.bool_:
            raise ValueError(
                f"mask of {name!r} is {mask.dtype}, expected bool: masks select, scores do not; "
                "make them with masks.from_scores"
            )
    rows = layer_densities(masks)
    return {name: row.density if row.kept else sys.float_info.min for name, row in rows.items()}


def _shapes(params: PyTree, prunable: Prunable) -> dict[str, tuple[int, ...]]:
    """The shapes of the prunable leaves, by path."""
    leaves = named_leaves(map_prunable(lambda _, leaf: leaf, params, prunable))
    return {name: jnp.shape(leaf) for name, leaf in leaves.items()}
