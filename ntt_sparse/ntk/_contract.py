r"""Contractions of layer inputs and output sensitivities into tangent kernels.

For a dense layer $z = W^\top a$ of one example, the gradient of output o is
$a\, \delta_o^\top$ with $\delta_o = \partial f_o / \partial z$. Inner products of such
gradients need neither the gradients nor the Jacobian:

$$\Theta_{ijou} = \sum_{pq} a^1_{ip} a^2_{jp} M_{pq} \delta^1_{ioq} \delta^2_{juq}$$

Shapes: a `(n, p)`, delta `(n, k, q)`, mask `(p, q)`. Two of the products have a
derivative written by hand, because the automatic one is many times slower than
the value; they therefore have no forward-mode derivative.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def _einsum(spec: str, *operands: Array) -> Array:
    return jnp.einsum(spec, *operands, precision="highest")


def dense(
    a1: Float[Array, "n1 p"],
    a2: Float[Array, "n2 p"],
    delta1: Float[Array, "n1 k q"],
    delta2: Float[Array, "n2 k q"],
    mask: Bool[Array, "p q"] | None,
) -> Float[Array, "n1 n2 k k"]:
    """The kernel of one dense layer by its kept weights, all of them if `mask` is `None`."""
    if mask is None:
        return _einsum("ip,jp->ij", a1, a2)[..., None, None] * _einsum(
            "ioq,juq->ijou", delta1, delta2
        )
    return weighted_products(masked_inner(a1, a2, mask), delta1, delta2)


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
    inner: Float[Array, "n1 n2 q"], delta1: Float[Array, "n1 k q"], delta2: Float[Array, "n2 k q"]
) -> Float[Array, "n1 n2 k k"]:
    r"""$\Theta_{ijou} = \sum_q K_{ijq} \delta^1_{ioq} \delta^2_{juq}$, row by row of i.

    A row's intermediate `(n2, k, q)` stays in the processor's cache.
    """

    def row(operands):
        inner, delta1 = operands
        return _einsum("juq,oq->jou", inner[:, None] * delta2, delta1)

    return jax.lax.map(row, (inner, delta1))


def _weighted_products_fwd(inner, delta1, delta2):
    return weighted_products(inner, delta1, delta2), (inner, delta1, delta2)


def _weighted_products_bwd(residuals, d_kernel):
    inner, delta1, delta2 = residuals

    def row(d_delta2, operands):
        inner, delta1, d_kernel = operands  # (n2, q), (k, q), (n2, k, k)
        pulled = _einsum("jou,oq->juq", d_kernel, delta1)
        weighted = inner[:, None] * delta2
        d_inner = jnp.sum(pulled * delta2, axis=1)
        d_delta1 = _einsum("jou,juq->oq", d_kernel, weighted)
        return d_delta2 + pulled * inner[:, None], (d_inner, d_delta1)

    d_delta2, (d_inner, d_delta1) = jax.lax.scan(
        row, jnp.zeros_like(delta2), (inner, delta1, d_kernel)
    )
    return d_inner, d_delta1, d_delta2


weighted_products.defvjp(_weighted_products_fwd, _weighted_products_bwd)


def position_sum(
    inputs: Float[Array, "t p"], delta: Float[Array, "k t q"]
) -> Float[Array, "k p q"]:
    r"""The gradients $\sum_t a_t \delta_{ot}^\top$ of one example."""
    return _einsum("tp,otq->opq", inputs, delta)


def jacobians(
    jacobian1: Float[Array, "n1 k ..."], jacobian2: Float[Array, "n2 k ..."]
) -> Float[Array, "n1 n2 k k"]:
    """The kernel of explicit per-example Jacobians."""
    (n1, k), n2 = jacobian1.shape[:2], len(jacobian2)
    product = _einsum("ap,bp->ab", jacobian1.reshape(n1 * k, -1), jacobian2.reshape(n2 * k, -1))
    return product.reshape(n1, k, n2, k).transpose(0, 2, 1, 3)
