"""The squared difference of kernels: held whole and in rows, against its formula."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.ntk import difference, empirical_ntk
from ntt_sparse.ntk.difference import squared_difference

SIZES = (7, 11, 5)


def net(w, x):
    hidden = jnp.tanh(x @ w["a"] + w["c"])
    # A scale, which has no matrix of its own.
    return (hidden * w["s"]) @ w["b"]


def draw(seed):
    rng = np.random.default_rng(seed)
    p, q, k = SIZES
    shapes = {"a": (p, q), "c": (q,), "s": (q,), "b": (q, k)}
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def problem():
    rng = np.random.default_rng(3)
    p, q, k = SIZES
    masks = {
        "a": jnp.asarray(rng.random((p, q)) < 0.5),
        "c": None,
        "s": None,
        "b": jnp.asarray(rng.random((q, k)) < 0.5),
    }
    x1, x2 = (jnp.asarray(rng.normal(size=(n, p))) for n in (7, 4))
    return draw(1), masks, draw(2), x1, x2, jnp.asarray([1, 1, 0, 1, 1, 1, 0.5])


def by_definition(params, masks, other, x1, x2, counted, wrt):
    """From Jacobians by JAX, without anything of the code under test."""

    def kernel(weights, kept):
        def rows(x):
            jacobian = jax.vmap(jax.jacrev(lambda w, x: net(w, x[None])[0]), (None, 0))(weights, x)
            return [(jacobian[name] * kept[name]).reshape(len(x), SIZES[2], -1) for name in weights]

        pairs = zip(rows(x1), rows(x2), strict=True)
        return sum(jnp.einsum("iop,jqp->ijoq", one, two) for one, two in pairs)

    ones = {name: 1.0 for name in params}
    kept = {name: 1.0 if mask is None else mask for name, mask in masks.items()}
    weights = {name: leaf * kept[name] for name, leaf in params.items()}
    delta = kernel(weights, kept if wrt == "masked" else ones) - kernel(other, ones)
    return jnp.sum(counted[:, None, None, None] * delta**2)


# Compiled once for all.
definition_and_grad = jax.jit(jax.value_and_grad(by_definition), static_argnums=6)
kernel_by_jacobians = jax.jit(functools.partial(empirical_ntk, net, method="jacobian"))


def outputs(params, x):
    a, b, c, s = (np.asarray(params[name]) for name in "abcs")
    return (np.tanh(x @ a + c) * s) @ b


# Bytes held whole: everything, one row of pairs at a time (four columns of five outputs), two
# rows (the seventh is left over), three.
ROW = 4 * 5 * 5 * 8


WAYS = itertools.product(
    [2**24, 0, 2 * ROW, 3 * ROW + 1], ["masked", "all"], ["params", "kernel"], [2**30, 3000]
)

# Every value of an option, and rows with every value of the others.
USUAL = [
    (2**24, "masked", "params", 2**30),
    (0, "all", "kernel", 2**30),
    (2 * ROW, "masked", "params", 3000),
    (3 * ROW + 1, "masked", "kernel", 3000),
]


@pytest.mark.parametrize(
    ("whole", "wrt", "given", "limit"),
    [pytest.param(*way, marks=[pytest.mark.slow] * (way not in USUAL)) for way in WAYS],
)
def test_equals_its_definition(x64, monkeypatch, whole, wrt, given, limit):
    monkeypatch.setattr(difference, "_WHOLE", whole)
    params, masks, other, x1, x2, counted = problem()
    how = {"masks": masks, "wrt": wrt, "memory_limit": limit}
    if given == "params":
        how["other_params"] = other
    else:
        how["other_kernel"] = kernel_by_jacobians(other, x1, x2)

    def ours(params):
        result = squared_difference(net, params, x1, x2, counted, **how)
        return result.squares, result

    (value, result), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    expected, expected_grads = definition_and_grad(params, masks, other, x1, x2, counted, wrt)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(ours)(params)[0], expected, rtol=1e-12)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, expected_grads[name], rtol=1e-9, atol=1e-9 * expected)
    x = np.concatenate([x1, x2])
    kept = {n: leaf if masks[n] is None else leaf * masks[n] for n, leaf in params.items()}
    np.testing.assert_allclose(result.outputs, outputs(kept, x), rtol=1e-12)
    if given == "params":
        np.testing.assert_allclose(result.other_outputs, outputs(other, x), rtol=1e-12)


def test_no_gradient_reaches_the_other_network(x64, monkeypatch):
    params, masks, other, x1, x2, counted = problem()
    for whole in (2**24, 0):
        monkeypatch.setattr(difference, "_WHOLE", whole)

        @jax.jit
        @jax.grad
        def gradient(other):
            how = {"masks": masks, "other_params": other}
            return squared_difference(net, params, x1, x2, counted, **how).squares

        grads = gradient(other)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_a_large_kernel_is_never_held(monkeypatch):
    """Neither it, nor the other, nor their derivative: temporary memory is a part of one."""
    params, masks, other, *_ = problem()
    n = 512
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2 * n, SIZES[0])))
    kernel = 4 * (n * SIZES[2]) ** 2

    def temporary(whole):
        monkeypatch.setattr(difference, "_WHOLE", whole)

        def loss(params):
            return squared_difference(
                net, params, x[:n], x[n:], jnp.ones(n), masks=masks, other_params=other
            ).squares

        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(2**30) > kernel
    assert temporary(2**18) < kernel / 4


@pytest.mark.parametrize("whole", [2**24, 0])
def test_kernels_of_other_shapes_are_refused(x64, monkeypatch, whole):
    monkeypatch.setattr(difference, "_WHOLE", whole)
    params, masks, _, x1, x2, counted = problem()
    wrong = jnp.zeros((7, 4, 5, 1))
    with pytest.raises(ValueError, match=r"\(7, 4, 5, 1\), the student's \(7, 4, 5, 5\)"):
        jax.eval_shape(
            lambda: squared_difference(
                net, params, x1, x2, counted, masks=masks, other_kernel=wrong
            )
        )


@pytest.mark.variants(1)
@pytest.mark.parametrize("whole", [2**24, 0, 2 * ROW])
def test_the_other_network_is_constant_in_its_parameters_alone(x64, monkeypatch, whole):
    """By the examples, by arrays that the network closes over and by a kernel that is given."""
    monkeypatch.setattr(difference, "_WHOLE", whole)
    params, masks, other, x1, x2, counted = problem()
    kept = {name: 1.0 if mask is None else mask for name, mask in masks.items()}
    weights = {name: leaf * kept[name] for name, leaf in params.items()}

    def ours(x1, x2, shift, **theirs):
        def shifted(w, x):
            return net(w, x + shift)

        how = {"masks": masks, **(theirs or {"other_params": other})}
        return squared_difference(shifted, params, x1, x2, counted, **how).squares

    def expected(x1, x2, shift):
        return by_definition(weights, masks, other, x1 + shift, x2 + shift, counted, "masked")

    arguments = x1, x2, jnp.asarray(0.3)
    found = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(*arguments)
    by_hand = jax.jit(jax.grad(expected, argnums=(0, 1, 2)))(*arguments)
    for grad, right in zip(found, by_hand, strict=True):
        np.testing.assert_allclose(grad, right, rtol=1e-9, atol=1e-9 * np.abs(right).max())

    kernel = kernel_by_jacobians(other, x1, x2)
    own = kernel_by_jacobians(params, x1, x2, masks=masks)
    grad = jax.jit(jax.grad(lambda kernel: ours(x1, x2, 0.0, other_kernel=kernel)))(kernel)
    by_hand = -2 * np.asarray(counted)[:, None, None, None] * np.subtract(own, kernel)
    np.testing.assert_allclose(grad, by_hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("whole", [2 * ROW, pytest.param(0, marks=pytest.mark.slow)])
def test_a_second_derivative(x64, monkeypatch, whole):
    params, masks, other, x1, x2, counted = problem()

    def curvature(whole):
        monkeypatch.setattr(difference, "_WHOLE", whole)

        def loss(w):
            result = squared_difference(
                net, {**params, "b": w}, x1, x2, counted, masks=masks, other_params=other
            )
            return result.squares

        return jax.jit(jax.grad(lambda w: jnp.sum(jax.grad(loss)(w) ** 2)))(params["b"])

    np.testing.assert_allclose(curvature(whole), curvature(2**24), rtol=1e-9)


@pytest.mark.variants(1)
@pytest.mark.parametrize("gradient", [False, True])
def test_half_precision_sums_many_rows(monkeypatch, gradient):
    """A sum of bfloat16 comes to a halt after some hundred terms of one size."""
    params, masks, other, *_ = problem()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, other))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(604, SIZES[0])), jnp.bfloat16)

    def loss(params):
        result = squared_difference(
            net, params, x[:600], x[600:], jnp.ones(600, bool), masks=masks, other_params=half[1]
        )
        return result.squares

    def value(whole):
        monkeypatch.setattr(difference, "_WHOLE", whole)
        if gradient:
            return jax.jit(jax.value_and_grad(loss))(half[0])[0]
        # Anew, as the limit is not among the arguments.
        return jax.jit(lambda params: loss(params))(half[0])

    rows, whole = value(0), value(2**30)
    assert rows.dtype == whole.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(rows), float(whole), rtol=0.02)


def test_leaves_without_room_take_whole_kernels(x64, monkeypatch):
    """Where a leaf is left to NTK-vector products there are no rows, and the value is the same."""
    params, masks, other, x1, x2, counted = problem()

    def value():
        how = {"masks": masks, "other_params": other, "memory_limit": 1}
        fn = jax.jit(lambda p: squared_difference(net, p, x1, x2, counted, **how).squares)
        return fn(params)

    expected = value()
    monkeypatch.setattr(difference, "_WHOLE", 0)
    np.testing.assert_allclose(value(), expected, rtol=1e-12)


def test_one_other_network_is_asked_for():
    params, masks, _, x1, x2, counted = problem()
    with pytest.raises(ValueError, match="either other_params or other_kernel"):
        squared_difference(net, params, x1, x2, counted, masks=masks)
