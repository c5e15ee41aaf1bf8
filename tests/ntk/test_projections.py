"""Projections of the kernel: exact, and without the full kernel on the way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_weights import as_flat, masks_like, matrices

from ntt_sparse.ntk import empirical_ntk, structured


def network(w, x):
    """With weights of every kind: one is used twice, one at several positions."""
    tokens = jnp.tanh(x.reshape(-1, 2, 3) @ w["first"].reshape(2, 3, 5)[0])
    hidden = jnp.mean(jnp.tanh(tokens @ w["second"] @ w["second"].T), axis=1)
    return jnp.tanh(hidden @ w["second"]) @ w["third"]


def problem():
    weights = {name: matrices()[name] for name in ("first", "second", "third")}
    rng = np.random.default_rng(9)
    x1, x2 = (jnp.asarray(rng.normal(size=(n, 6))) for n in (4, 5))
    u, v = (jnp.asarray(rng.normal(size=shape)) for shape in ((4, 2, 3), (5, 1, 3)))
    return weights, masks_like(weights), x1, x2, u, v


# With a limit of one byte the structured method leaves weights to NTK-vector products.
CASES = [
    ("jacobian", structured.MEMORY_LIMIT),
    ("ntk_vector_products", structured.MEMORY_LIMIT),
    ("structured", structured.MEMORY_LIMIT),
    ("structured", 300),
    ("structured", 1),
    ("auto", 1),
]


def sines_and(kernel_of):
    def objective(*args):
        kernel = kernel_of(*args)
        return jnp.sum(jnp.sin(kernel)), kernel

    return objective


# Compiled once for all methods.
@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
@sines_and
def from_the_full_kernel(w, masks, x1, x2, u, v):
    full = empirical_ntk(network, w, x1, x2, masks=masks, method="jacobian")
    return jnp.einsum("ijoq,iro,jsq->ijrs", full, u, v)


@pytest.mark.variants(3)
@pytest.mark.parametrize(("method", "limit"), CASES)
def test_projections(x64, method, limit):
    """Against the full kernel, with other numbers of projections on the two sides."""
    weights, masks, x1, x2, u, v = problem()

    def projected(w):
        options = {"masks": masks, "method": method, "memory_limit": limit}
        return empirical_ntk(network, w, x1, x2, projections=(u, v), **options)

    ours = jax.jit(jax.value_and_grad(sines_and(projected), has_aux=True))(weights)
    expected = from_the_full_kernel(weights, masks, x1, x2, u, v)
    assert ours[0][1].shape == (4, 5, 2, 1)
    for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max())


def shapes_in(jaxpr):
    """Of all arrays that a program makes, inner programs included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {var.aval.shape for var in equation.outvars}
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= shapes_in(inner)
    return found


@pytest.mark.variants(3)
@pytest.mark.parametrize(("method", "limit"), CASES)
def test_the_full_kernel_is_never_made(method, limit):
    """Nor k gradients of an example: 11 outputs, of which 1 and 2 combinations are asked for."""
    weights = {"once": jnp.ones((6, 13)), "twice": jnp.ones((13, 13)), "last": jnp.ones((13, 11))}

    def wide(w, x):
        return jnp.tanh(jnp.tanh(x @ w["once"] @ w["twice"]) @ w["twice"]) @ w["last"]

    def made(projections):
        program = jax.make_jaxpr(
            lambda w: empirical_ntk(
                wide, w, jnp.ones((4, 6)), jnp.ones((5, 6)),
                projections=projections, method=method, memory_limit=limit,
            )
        )(weights)  # fmt: skip
        return shapes_in(program.jaxpr)

    def is_full(shape):
        return shape.count(11) > 1 or (11 in shape and shape[-2:] == (13, 13))

    assert not [s for s in made((jnp.ones((4, 2, 11)), jnp.ones((5, 1, 11)))) if is_full(s)]
    # The same search finds them where they are.
    assert [s for s in made(None) if is_full(s)]


def test_the_plan_counts_the_gradients_that_are_needed():
    """A weight whose k gradients are too large, and whose few projections are not."""
    weights = {name: matrices()[name] for name in ("first", "second", "third")}
    arguments = as_flat(network, weights), [*weights.values()], jnp.ones((4, 6))
    numbers = weights["second"].size * weights["second"].dtype.itemsize
    # Three outputs on either side.
    assert structured.plan(*arguments, 6 * numbers).direct == [1]
    assert structured.plan(*arguments, 6 * numbers - 1).rest == [0, 1]
    assert structured.plan(*arguments, 3 * numbers, 3).direct == [1]
    assert structured.plan(*arguments, 3 * numbers - 1, 3).rest == [0, 1]
