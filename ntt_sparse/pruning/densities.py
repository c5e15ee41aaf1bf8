"""Layer densities: how a network's budget of weights is spread over its layers.

Each function returns `{path: density}` over the prunable leaves, in tree order,
which `masks.from_scores` takes as its density.
"""

import math

import jax.numpy as jnp
from jaxtyping import PyTree

from ntt_sparse.pruning.masks import (
    Prunable,
    check_density,
    map_prunable,
    matrices,
    named_leaves,
)


def uniform(params: PyTree, density: float, *, prunable: Prunable = matrices) -> dict[str, float]:
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
    check_density(density)
    return dict.fromkeys(_shapes(params, prunable), float(density))


def erk(params: PyTree, density: float, *, prunable: Prunable = matrices) -> dict[str, float]:
    """Erdős-Rényi-Kernel densities: small layers are kept denser than large ones.

    The density of a layer is `min(1, eps * sum(shape) / prod(shape))`, with eps
    such that the network as a whole has the density asked for. Kernel dimensions
    count like input and output dimensions.

    Args:
        params: Parameters or their shapes (`jax.eval_shape`).
        density: Fraction kept of all prunable weights together, in (0, 1].
        prunable: Predicate `(path, leaf) -> bool`: which leaves are counted.

    Returns:
        `{path: density}`, each in (0, 1]; `sum(density * size) / N` is `density`.

    Raises:
        ValueError: `density` is outside (0, 1], or no leaf is prunable.

    References:
        Evci et al.: Rigging the lottery: making all tickets winners, ICML 2020,
        section 3. Liu et al.: The unreasonable effectiveness of random pruning,
        ICLR 2022, section 3.1.
    """
    check_density(density)
    shapes = _shapes(params, prunable)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    sparse = dict.fromkeys(shapes)
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


def _shapes(params: PyTree, prunable: Prunable) -> dict[str, tuple[int, ...]]:
    """The shapes of the prunable leaves, by path."""
    leaves = named_leaves(map_prunable(lambda _, leaf: leaf, params, prunable))
    return {name: jnp.shape(leaf) for name, leaf in leaves.items()}
