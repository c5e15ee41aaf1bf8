"""Exact tangent kernels of any differentiable function, without a look inside it.

Both methods take a network as `fn(leaves, x)` over a flat list of weight arrays,
and one mask (or `None`) per leaf. They return K[i, j, o, q] = <J_o(x1_i), J_q(x2_j)>
with the entries that a mask switches off left out of the inner product.
Examples are taken one by one: `fn` may not mix the examples of a batch.

References:
    Novak et al., "Fast Finite Width Neural Tangent Kernel", ICML 2022, Sections 3.1
    (Jacobian contraction) and 3.2 (NTK-vector products).
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from ntt_sparse.ntk._varying import varying_as

Leaves: TypeAlias = list[Float[Array, "..."]]
LeafMasks: TypeAlias = Sequence[Bool[Array, "..."] | None]
FlatFn: TypeAlias = Callable[[Leaves, Shaped[Array, "n ..."]], Float[Array, "n k"]]


def jacobian_contraction(
    fn: FlatFn,
    leaves: Leaves,
    masks: LeafMasks,
    x1: Shaped[Array, "n1 ..."],
    x2: Shaped[Array, "n2 ..."],
    *,
    trace: bool = False,
) -> Float[Array, "n1 n2 k k"] | Float[Array, "n1 n2"]:
    """Builds the Jacobian of every example, then contracts the two stacks leaf by leaf.

    Costs 2 n1 n2 k^2 P operations and (n1 + n2) k P numbers of memory for P
    parameters. The traced kernel costs k times fewer operations.
    """
    jacobians = jax.vmap(lambda example: _gradients(fn, leaves, example))
    jacobians1 = jacobians(x1)
    # The same array on both sides is differentiated once.
    jacobians2 = jacobians1 if x2 is x1 else jacobians(x2)
    spec = "iop,jop->ij" if trace else "iop,jqp->ijoq"
    kernels = [
        jnp.einsum(spec, _flat(select(j1, mask)), _flat(j2), precision="highest")
        for j1, j2, mask in zip(jacobians1, jacobians2, masks, strict=True)
    ]
    return functools.reduce(jnp.add, kernels)


def vector_products(
    fn: FlatFn,
    leaves: Leaves,
    masks: LeafMasks,
    x1: Shaped[Array, "n1 ..."],
    x2: Shaped[Array, "n2 ..."],
    *,
    trace: bool = False,
) -> Float[Array, "n1 n2 k k"] | Float[Array, "n1 n2"]:
    """Pushes the k output gradients of each example of `x2` forward through all of `x1`.

    Column (j, q) of the kernel is the directional derivative of the outputs at
    `x1` along the gradient of output q at `x2_j`: one backward pass, then one
    batched forward pass. Costs about 6 n1 n2 k P operations, k times fewer than
    the contraction, and holds the k gradients of a single example at a time;
    its own derivative recomputes them, so that it holds no more.
    """
    _, push = jax.linearize(lambda w: fn(w, x1), leaves)

    @jax.checkpoint
    def column(example):
        rows = _gradients(fn, leaves, example)
        rows = [select(row, mask) for row, mask in zip(rows, masks, strict=True)]
        products = jax.vmap(push)(rows)  # (q, i, o)
        return jnp.einsum("oio->i", products) if trace else products

    columns = jax.lax.map(column, x2)
    return columns.T if trace else columns.transpose(2, 0, 3, 1)


def select(array: Float[Array, "..."], mask: Bool[Array, "..."] | None) -> Float[Array, "..."]:
    """Sets entries to zero where `mask` is False; the mask covers the trailing axes."""
    return array if mask is None else jnp.where(mask, array, jnp.zeros((), array.dtype))


def _gradients(fn: FlatFn, leaves: Leaves, example: Shaped[Array, "..."]) -> Leaves:
    """The gradients of all outputs for one example, one array `(k, *leaf.shape)` per leaf."""
    output, pull = jax.vjp(lambda w: fn(w, example[None])[0], leaves)
    basis = varying_as(jnp.eye(output.size, dtype=output.dtype), output)
    return jax.vmap(pull)(basis)[0]


def _flat(jacobian: Float[Array, "n k ..."]) -> Float[Array, "n k p"]:
    return jacobian.reshape(*jacobian.shape[:2], -1)
