"""Batches taken in blocks: side by side, or as a sum whose derivative comes along."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ntt_sparse._precision import at_least_single
from ntt_sparse._types import Scalar
from ntt_sparse.ntk._varying import varying_as


def map_blocks(fn: Callable[..., Any], size: int, *batches: Any) -> Any:
    """Applies a function of batches, pytrees of arrays `(n, ...)`, to one block after the other."""
    if _count(batches) == size:
        return fn(*batches)
    whole, rest = _cut(size, batches)
    blocks = jax.lax.map(lambda batches: fn(*batches), whole)
    parts = [jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), blocks)]
    if rest is not None:
        parts.append(fn(*rest))
    return jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_blocks(
    fn: Callable[..., Scalar], size: int, rows: Any, shared: Any, constant_rows: Any, constants: Any
) -> Scalar:
    """The sum of a function over blocks of rows, of which no more than one is ever held.

    Where the sum is differentiated, the derivative of a block is made along with its value, and
    by those arrays alone that a derivative is asked of. Sums are kept in float32 or wider.

    Args:
        fn: `(rows, shared, constant_rows, constants) -> scalar`, additive over rows.
        size: The rows of a block; the last one may have fewer.
        rows: Floating-point arrays `(n, ...)`.
        shared: Floating-point arrays that all blocks take whole.
        constant_rows: Arrays `(n, ...)` without a derivative.
        constants: Arrays without a derivative.
    """

    # An axis of length one, for the values of blocks to lie along.
    def value(rows, constant_rows):
        return _wide(fn(rows, shared, constant_rows, constants))[None]

    return jnp.sum(map_blocks(value, size, rows, constant_rows))


def _sum_blocks_fwd(fn, size, rows, shared, constant_rows, constants):
    (row_leaves, rows_tree), (shared_leaves, shared_tree) = map(jax.tree.flatten, (rows, shared))
    row_wanted, shared_wanted = (
        [leaf.perturbed for leaf in leaves] for leaves in (row_leaves, shared_leaves)
    )
    rows, shared, constant_rows, constants = jax.tree.map(
        lambda leaf: leaf.value, (row_leaves, shared_leaves, constant_rows, constants)
    )

    def value(some_rows, some_shared, rows, constant_rows):
        block = rows_tree.unflatten(_merged(row_wanted, some_rows, rows))
        whole = shared_tree.unflatten(_merged(shared_wanted, some_shared, shared))
        return fn(block, whole, constant_rows, constants)

    value_and_grad = jax.value_and_grad(value, argnums=(0, 1))
    some_shared = _chosen(shared_wanted, shared)

    def add(sums, block):
        rows, constant_rows = block
        value, (d_rows, d_shared) = value_and_grad(
            _chosen(row_wanted, rows), some_shared, rows, constant_rows
        )
        return jax.tree.map(jnp.add, sums, _wide((value, d_shared))), d_rows

    operands = (rows, shared, constant_rows, constants)
    start = jax.eval_shape(lambda: add((0.0, some_shared), (rows, constant_rows))[0])
    sums = varying_as(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), start), operands)
    if _count(rows) == size:
        sums, d_rows = add(sums, (rows, constant_rows))
    else:
        whole, rest = _cut(size, (rows, constant_rows))
        sums, blocks = jax.lax.scan(add, sums, whole)
        d_rows = [y.reshape(-1, *y.shape[2:]) for y in blocks]
        if rest is not None:
            sums, last = add(sums, rest)
            d_rows = [jnp.concatenate(pair) for pair in zip(d_rows, last, strict=True)]
    value, d_shared = sums
    d_shared = [d.astype(leaf.dtype) for d, leaf in zip(d_shared, some_shared, strict=True)]
    # No derivative is None, leaf by leaf.
    d_rows = rows_tree.unflatten(_merged(row_wanted, d_rows, [None] * len(row_wanted)))
    d_shared = shared_tree.unflatten(_merged(shared_wanted, d_shared, [None] * len(shared_wanted)))
    return value, (d_rows, d_shared)


def _sum_blocks_bwd(fn, size, residuals, d_value):
    if isinstance(d_value, SymbolicZero):
        return None, None, None, None
    scaled = jax.tree.map(lambda d: (d_value * d).astype(d.dtype), residuals)
    return *scaled, None, None


sum_blocks.defvjp(_sum_blocks_fwd, _sum_blocks_bwd, symbolic_zeros=True)


def _wide(tree: Any) -> Any:
    """In float32 at least, as many small numbers added in less would come to a halt."""
    return jax.tree.map(at_least_single, tree)


def _chosen(wanted: Sequence[bool], leaves: Sequence[Any]) -> list[Any]:
    return [leaf for leaf, is_wanted in zip(leaves, wanted, strict=True) if is_wanted]


def _merged(wanted: Sequence[bool], some: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The wanted leaves from one list, the rest from another."""
    left = iter(some)
    return [next(left) if wants else other for wants, other in zip(wanted, others, strict=True)]


def _count(batches: Any) -> int:
    (n,) = {len(x) for x in jax.tree.leaves(batches)}
    return n


def _cut(size: int, batches: Any) -> tuple[Any, Any]:
    """Blocks of one size along a new axis, and what is left, if anything."""
    n = _count(batches)
    end = n - n % size
    whole = jax.tree.map(lambda x: x[:end].reshape(-1, size, *x.shape[1:]), batches)
    return whole, jax.tree.map(lambda x: x[end:], batches) if end < n else None
