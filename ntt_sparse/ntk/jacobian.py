"""Exact tangent kernels of any differentiable function, without a look inside it.

Both methods take a network as `fn(leaves, x)` over a flat list of weight arrays,
and one mask (or `None`) per leaf. They return K[i, j, o, q] = <J_o(x1_i), J_q(x2_j)>
with the entries that a mask switches off left out of the inner product; with projections
u and v, the sums over o and q of u[i, r, o] K[i, j, o, q] v[j, s, q], without K itself.
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
Projections: TypeAlias = tuple[Float[Array, "n1 r k"], Float[Array, "n2 s k"]]


def jacobian_contraction(
    fn: FlatFn,
    leaves: Leaves,
    masks: LeafMasks,
    x1: Shaped[Array, "n1 ..."],
    x2: Shaped[Array, "n2 ..."],
    *,
    trace: bool = False,
    projections: Projections | None = None,
) -> Float[Array, "n1 n2 k k"] | Float[Array, "n1 n2 r s"] | Float[Array, "n1 n2"]:
    """Builds the Jacobian of every example, then contracts the two stacks leaf by leaf.

    Costs 2 n1 n2 k^2 P operations and (n1 + n2) k P numbers of memory for P
    parameters. The traced kernel costs k times fewer operations.
    """
    u, v = (None, None) if projections is None else projections
    jacobians = jax.vmap(lambda example, probes: _gradients(fn, leaves, example, probes))
    jacobians1 = jacobians(x1, u)
    # The same array on both sides is differentiated once.
    jacobians2 = jacobians1 if x2 is x1 and projections is None else jacobians(x2, v)
    spec = "iop,jop->ij" if trace else "iop,jqp->ijoq"
    contract = functools.partial(
        jnp.einsum, spec, precision="highest", preferred_element_type=kernel_dtype(fn, leaves, x1)
    )
    kernels = [
        contract(_flat(select(j1, mask)), _flat(j2))
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
    projections: Projections | None = None,
) -> Float[Array, "n1 n2 k k"] | Float[Array, "n1 n2 r s"] | Float[Array, "n1 n2"]:
    """Pushes the k output gradients of each example of `x2` forward through all of `x1`.

    Column (j, q) of the kernel is the directional derivative of the outputs at
    `x1` along the gradient of output q at `x2_j`: one backward pass, then one
    batched forward pass. Costs about 6 n1 n2 k P operations, k times fewer than
    the contraction, and holds the k gradients of a single example at a time;
    its own derivative recomputes them, so that it holds no more. With projections,
    s gradients take the place of k.
    """
    u, v = (None, None) if projections is None else projections
    _, push = jax.linearize(lambda w: fn(w, x1), leaves)

    @jax.checkpoint
    def column(operands):
        rows = _gradients(fn, leaves, *operands)
        rows = [select(row, mask) for row, mask in zip(rows, masks, strict=True)]
        products = jax.vmap(push)(rows)  # (q, i, o)
        if u is not None:
            return jnp.einsum("sio,iro->sir", products, u, precision="highest")
        return jnp.einsum("oio->i", products) if trace else products

    columns = jax.lax.map(column, (x2, v))
    return columns.T if trace else columns.transpose(2, 0, 3, 1)


def select(array: Shaped[Array, "..."], mask: Bool[Array, "..."] | None) -> Shaped[Array, "..."]:
    """Sets entries to zero where `mask` is False; the mask covers the trailing axes."""
    return array if mask is None else jnp.where(mask, array, jnp.zeros((), array.dtype))


def kernel_dtype(fn: FlatFn, leaves: Leaves, x: Shaped[Array, "n ..."]) -> jnp.dtype:
    """The dtype of kernels, to which outputs and leaves promote."""
    return jnp.result_type(jax.eval_shape(fn, leaves, x), *leaves)


def _gradients(
    fn: FlatFn,
    leaves: Leaves,
    example: Shaped[Array, "..."],
    probes: Float[Array, "r k"] | None,
) -> Leaves:
    """The gradients of all outputs, or of r combinations of them, for one example.

    One array `(k, *leaf.shape)` or `(r, *leaf.shape)` per leaf.
    """
    output, pull = jax.vjp(lambda w: fn(w, example[None])[0], leaves)
    if probes is None:
        basis = varying_as(jnp.eye(output.size, dtype=output.dtype), output)
    else:
        basis = probes.astype(output.dtype)
    return jax.vmap(pull)(basis)[0]


def _flat(jacobian: Float[Array, "n k ..."]) -> Float[Array, "n k p"]:
    return jacobian.reshape(*jacobian.shape[:2], -1)
