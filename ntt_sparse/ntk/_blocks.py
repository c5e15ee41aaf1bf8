"""Batches taken in blocks: side by side, or as a sum whose derivative comes along."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ntt_sparse._types import Scalar
from ntt_sparse.ntk._varying import varying_as


def map_blocks(fn: Callable[..., Any], size: int, *batches: Any) -> Any:
    """Applies a function of batches, pytrees of arrays `(n, ...)`, to one block after the other."""
    if _count(batches) == size:
        return fn(*batches)
    whole, rest = _split(size, batches)
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

    Where the sum is differentiated, the derivative of a block is made along with its value:
    nothing is kept or made twice.

    Args:
        fn: `(rows, shared, constant_rows, constants) -> scalar`, additive over rows.
        size: The rows of a block; the last one may have fewer.
        rows: Floating-point arrays `(n, ...)`.
        shared: Floating-point arrays that all blocks take whole.
        constant_rows: Arrays `(n, ...)` without a derivative.
        constants: Arrays without a derivative.
    """
    # An axis of length one, for the values of blocks to lie along.
    values = map_blocks(
        lambda rows, constant_rows: fn(rows, shared, constant_rows, constants)[None],
        size,
        rows,
        constant_rows,
    )
    return jnp.sum(values)


def _sum_blocks_fwd(fn, size, rows, shared, constant_rows, constants):
    value_and_grad = jax.value_and_grad(fn, argnums=(0, 1))

    def add(sums, block):
        value, (d_rows, d_shared) = value_and_grad(block[0], shared, block[1], constants)
        return jax.tree.map(jnp.add, sums, (value, d_shared)), d_rows

    operands = (rows, shared, constant_rows, constants)
    value = jax.eval_shape(fn, *operands)
    sums = varying_as((jnp.zeros((), value.dtype), jax.tree.map(jnp.zeros_like, shared)), operands)
    if _count(rows) == size:
        (value, d_shared), d_rows = add(sums, (rows, constant_rows))
        return value, (d_rows, d_shared)
    whole, rest = _split(size, (rows, constant_rows))
    sums, blocks = jax.lax.scan(add, sums, whole)
    d_rows = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), blocks)
    if rest is not None:
        sums, last = add(sums, rest)
        d_rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), d_rows, last)
    value, d_shared = sums
    return value, (d_rows, d_shared)


def _sum_blocks_bwd(fn, size, residuals, d_value):
    scaled = jax.tree.map(lambda d: (d_value * d).astype(d.dtype), residuals)
    return *scaled, None, None


sum_blocks.defvjp(_sum_blocks_fwd, _sum_blocks_bwd)


def _count(batches: Any) -> int:
    (n,) = {len(x) for x in jax.tree.leaves(batches)}
    return n


def _split(size: int, batches: Any) -> tuple[Any, Any]:
    """Blocks of one size along a new axis, and what is left, if anything."""
    n = _count(batches)
    end = n - n % size
    whole = jax.tree.map(lambda x: x[:end].reshape(-1, size, *x.shape[1:]), batches)
    return whole, jax.tree.map(lambda x: x[end:], batches) if end < n else None
