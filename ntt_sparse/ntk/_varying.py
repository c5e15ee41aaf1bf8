"""Varying axes of `jax.shard_map`: which values differ between devices.

Inside `shard_map` a derivative by a replicated value is summed over devices. That
is right for a loss, but would add up the Jacobians of different examples, so
tangent kernels mark the weights as varying first.
"""

from typing import Any

import jax


def varying_as(tree: Any, others: Any) -> Any:
    """Marks the leaves of `tree` as varying over all axes over which `others` vary."""
    axes = frozenset().union(*map(_axes, jax.tree.leaves(others)))

    def cast(leaf):
        missing = tuple(axes - _axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _axes(x: Any) -> frozenset[Any]:
    aval = jax.typeof(x)
    # JAX 0.12 moved `vma` into the manual axis type.
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma
