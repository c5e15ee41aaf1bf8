"""Checks that objectives share."""

import math
from typing import cast

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import ArrayLike

from ntt_sparse._types import Params
from ntt_sparse.pruning import masks as pruning_masks


def check_weight(name: str, value: ArrayLike) -> None:
    """Checks the weight of a term, as far as it is known while tracing.

    Raises:
        ValueError: It is not a scalar, negative, infinite or NaN.
    """
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} has shape {jnp.shape(value)}, expected a scalar")
    # The negated form also refuses NaN.
    if not isinstance(value, Tracer) and not 0.0 <= float(cast(float, value)) < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number of at least 0")


def check_same_shapes(params: Params, teacher_params: Params) -> None:
    """Checks that teacher and student are of one kind.

    Raises:
        ValueError: Structures or shapes differ.
    """
    ours, theirs = jax.tree.structure(params), jax.tree.structure(teacher_params)
    if ours != theirs:
        raise ValueError(f"teacher_params have structure {theirs}, params have {ours}")
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(teacher_params), strict=True
    ):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"teacher's {pruning_masks.path_name(path)!r} has shape {jnp.shape(other)}, "
                f"the student's {jnp.shape(leaf)}"
            )
