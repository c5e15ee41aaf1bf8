r"""Contractions of layer inputs and output sensitivities into tangent kernels.

For a dense layer $z = W^\top a$ of one example, the gradient of output o is
$a\, \delta_o^\top$ with $\delta_o = \partial f_o / \partial z$. Inner products of such
gradients need neither the gradients nor the Jacobian:

$$\Theta_{ijou} = \sum_{pq} a^1_{ip} a^2_{jp} M_{pq} \delta^1_{ioq} \delta^2_{juq}$$

Shapes: a `(n, p)`, delta `(n, k, q)`, mask `(p, q)`. `masked_inner`, `weighted_products`
and `take_columns` have a derivative written by hand, because the automatic one is many times
slower than the value; they therefore have no forward-mode derivative.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ntt_sparse.ntk.jacobian import select


def _einsum(spec: str, *operands: Array) -> Array:
    return jnp.einsum(spec, *operands, precision="highest")


def dense(
    a1: Float[Array, "n1 p"],
    a2: Float[Array, "n2 p"],
    delta1: Float[Array, "n1 r q"],
    delta2: Float[Array, "n2 s q"],
    mask: Bool[Array, "p q"] | None,
    bias: Bool[Array, " q"] | Literal[True] | None = None,
    *,
    trace: bool = False,
) -> Float[Array, "n1 n2 r s"] | Float[Array, "n1 n2"]:
    """The kernel of one dense layer by its kept weights, all of them if `mask` is `None`.

    A bias is a weight whose input is one: `bias` is its mask, `True` if all of it takes
    part, or `None` without a bias.
    """
    ones = 0 if bias is None else bias
    if mask is None and (bias is None or bias is True):
        inner = _einsum("ip,jp->ij", a1, a2) + ones
        if trace:
            return inner * _einsum("ioq,joq->ij", delta1, delta2)
        return inner[..., None, None] * _einsum("ioq,juq->ijou", delta1, delta2)
    if mask is None:
        inner = _einsum("ip,jp->ij", a1, a2)[..., None] + ones
    else:
        inner = masked_inner(a1, a2, mask) + ones
    if trace:
        return jnp.sum(inner * _einsum("ioq,joq->ijq", delta1, delta2), axis=-1)
    return weighted_products(inner, delta1, delta2)


@jax.custom_vjp
def masked_inner(
    a1: Float[Array, "n1 p"], a2: Float[Array, "n2 p"], mask: Bool[Array, "p q"]
) -> Float[Array, "n1 n2 q"]:
    r"""$K_{ijq} = \sum_p a^1_{ip} a^2_{jp} M_{pq}$, one matrix product over all pairs."""
    return _einsum("ijp,pq->ijq", a1[:, None] * a2, mask.astype(a1.dtype))


def _masked_inner_fwd(a1, a2, mask):
    return masked_inner(a1, a2, mask), (a1, a2, mask)


def _masked_inner_bwd(residuals, d_inner):
    a1, a2, mask = residuals
    d_products = _einsum("ijq,pq->ijp", d_inner, mask.astype(a1.dtype))
    # Sums of products fuse into one pass; as batched matrix products they are slow.
    return jnp.sum(d_products * a2, axis=1), jnp.sum(d_products * a1[:, None], axis=0), None


masked_inner.defvjp(_masked_inner_fwd, _masked_inner_bwd)


@jax.custom_vjp
def weighted_products(
    inner: Float[Array, "n1 n2 q"], delta1: Float[Array, "n1 r q"], delta2: Float[Array, "n2 s q"]
) -> Float[Array, "n1 n2 r s"]:
    r"""$\Theta_{ijou} = \sum_q K_{ijq} \delta^1_{ioq} \delta^2_{juq}$, row by row of i.

    A row's intermediate `(n2, k, q)` stays in the processor's cache.
    """

    def row(operands):
        inner, delta1 = operands
        weighted = inner[:, None] * delta2
        # Rows (j, u) as they lie in memory: the other order would copy them.
        return _einsum("xq,oq->xo", weighted.reshape(-1, weighted.shape[-1]), delta1)

    rows = jax.lax.map(row, (inner, delta1))
    (n2, s), r = delta2.shape[:2], delta1.shape[1]
    return rows.reshape(len(inner), n2, s, r).swapaxes(2, 3)


def _weighted_products_fwd(inner, delta1, delta2):
    return weighted_products(inner, delta1, delta2), (inner, delta1, delta2)


def _weighted_products_bwd(residuals, d_kernel):
    inner, delta1, delta2 = residuals

    def row(d_delta2, operands):
        inner, delta1, d_kernel = operands  # (n2, q), (k, q), (n2, k, k)
        pulled = _einsum("jou,oq->juq", d_kernel, delta1)
        weighted = inner[:, None] * delta2
        # A sum over a short middle axis: as a chain it is a single pass, as a reduction slow.
        d_inner = functools.reduce(
            jnp.add, [pulled[:, u] * delta2[:, u] for u in range(delta2.shape[1])]
        )
        d_delta1 = _einsum("jou,juq->oq", d_kernel, weighted)
        return d_delta2 + pulled * inner[:, None], (d_inner, d_delta1)

    d_delta2, (d_inner, d_delta1) = jax.lax.scan(
        row, jnp.zeros_like(delta2), (inner, delta1, d_kernel)
    )
    return d_inner, d_delta1, d_delta2


weighted_products.defvjp(_weighted_products_fwd, _weighted_products_bwd)


def position_sum(
    inputs: Float[Array, "g t p"], delta: Float[Array, "k g t q"]
) -> Float[Array, "k g q p"]:
    r"""The gradients $\sum_t a_t \delta_{ot}^\top$ of one example, transposed.

    In this order the large result is written once, as rows (o, q) of one matrix product.
    """
    return _einsum("gtp,kgtq->kgqp", inputs, delta)


def jacobians(
    jacobian1: Float[Array, "n1 r ..."],
    jacobian2: Float[Array, "n2 s ..."],
    mask: Bool[Array, "..."] | None = None,
    *,
    trace: bool = False,
) -> Float[Array, "n1 n2 r s"] | Float[Array, "n1 n2"]:
    """The kernel of explicit per-example Jacobians, by the weights that `mask` keeps."""
    (n1, r), (n2, s) = jacobian1.shape[:2], jacobian2.shape[:2]
    kept = select(jacobian1, mask)
    if trace:
        return _einsum("ip,jp->ij", kept.reshape(n1, -1), jacobian2.reshape(n2, -1))
    product = _einsum("ap,bp->ab", kept.reshape(n1 * r, -1), jacobian2.reshape(n2 * s, -1))
    return product.reshape(n1, r, n2, s).transpose(0, 2, 1, 3)


def kept_columns(mask: Bool[Array, " p"], capacity: int) -> Int[Array, " capacity"]:
    """The first kept columns in order, then columns that do not exist, each another."""
    (columns,) = jnp.nonzero(mask, size=capacity, fill_value=0)
    places = jnp.arange(capacity)
    return jnp.where(places < jnp.sum(mask), columns, len(mask) + places)


@jax.custom_vjp
def take_columns(
    rows: Float[Array, "a p"], columns: Int[Array, " capacity"]
) -> Float[Array, "a capacity"]:
    """Columns of a matrix, zeros where they do not exist. No column may be named twice."""
    return jnp.take(rows, columns, axis=1, mode="fill", fill_value=0)


def _take_columns_fwd(rows, columns):
    return take_columns(rows, columns), (columns, jnp.zeros((0, rows.shape[1]), rows.dtype))


def _take_columns_bwd(residuals, d_taken):
    columns, empty = residuals
    zeros = jnp.zeros((len(d_taken), empty.shape[1]), empty.dtype)
    # Every column has a place of its own, which JAX cannot know.
    return zeros.at[:, columns].set(d_taken, mode="drop", unique_indices=True), None


take_columns.defvjp(_take_columns_fwd, _take_columns_bwd)
