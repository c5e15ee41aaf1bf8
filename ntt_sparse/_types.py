"""Shared aliases: the contract of each kind of argument, written once.

Shapes are jaxtyping annotations; the tests execute them through beartype, in
production they cost nothing.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Array, Float, Key, PyTree, Shaped

Params: TypeAlias = PyTree[Shaped[Array, "..."]]
"""Network parameters: any pytree of arrays."""

Masks: TypeAlias = PyTree
"""A pytree of the structure of its params: boolean arrays, or `None` for a leaf never pruned."""

Scores: TypeAlias = PyTree
"""A pytree of the structure of its params: float arrays (larger is kept), or `None`."""

PRNGKey: TypeAlias = Key[Array, ""]
"""A typed JAX random key, `jax.random.key(seed)`."""

Scalar: TypeAlias = Float[Array, ""]
"""A floating-point scalar."""


ApplyFn: TypeAlias = Callable[..., Any]
"""A pure function: `apply_fn(params, x)` maps inputs `(n, ...)` to outputs `(n, k)`."""
