"""Operands, weights, batches and outputs of other dtypes: no kernel is silently of another number.

The reference is the Jacobian method, which reads no program.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ntt_sparse.ntk import empirical_ntk, structured

METHODS = ["jacobian", "ntk_vector_products", "structured"]
EPS = float(jnp.finfo(jnp.bfloat16).eps)


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def value_and_grad(network, weights, x1, x2=None, **options):
    def objective(w):
        value = empirical_ntk(network, w, x1, x2, **options)
        return jnp.sum(value * jnp.cos(jnp.arange(value.size)).reshape(value.shape)), value

    (_, value), grad = jax.jit(jax.value_and_grad(objective, has_aux=True))(weights)
    return [value, *jax.tree.leaves(grad)]


def rules(network, weights, x):
    """The names of the leaves with one vector per example, with several, and of the biases."""
    names = [*weights]
    layout = structured.plan(
        lambda leaves, x: network(dict(zip(names, leaves, strict=True)), x), [*weights.values()], x
    )
    groups = layout.dense, layout.shared, layout.biases.values()
    return [[names[leaf] for leaf in group] for group in groups]


def assert_equal_methods(network, weights, x1, x2=None, rtol=1e-5):
    ours, expected = (
        value_and_grad(network, weights, x1, x2, method=method)
        for method in ("structured", "jacobian")
    )
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = np.float64(a), np.float64(b)
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def perceptron(w, x):
    return jnp.tanh(0.01 * jnp.matmul(x, w["a"])) @ w["b"]


kernel_of_perceptron = jax.jit(
    functools.partial(empirical_ntk, perceptron), static_argnames="method"
)


def mixer(w, x):
    """Several vectors per example."""
    return jnp.tanh(0.01 * jnp.einsum("nti,ij->ntj", x.reshape(-1, 2, 3), w["a"])).mean(1) @ w["b"]


@pytest.mark.variants(6)
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int16", "bfloat16", "float16"])
@pytest.mark.parametrize("network", [perceptron, mixer])
def test_products_with_inputs_of_other_dtypes(network, dtype):
    """JAX multiplies them as they are; their squares need the dtype of the result."""
    weights = {"a": draw(6 if network is perceptron else 3, 5), "b": draw(5, 2)}
    x = np.random.default_rng(1).integers(0, 100, (3, 6)) + (0.375 if "float" in dtype else 0)
    x = jnp.asarray(x, dtype)
    expected = [["a", "b"], [], []] if network is perceptron else [["b"], ["a"], []]
    assert rules(network, weights, x) == expected
    assert_equal_methods(network, weights, x)


@pytest.mark.parametrize("part", [jnp.real, jnp.abs])
def test_complex_operands_have_no_rule(part):
    weights = {"a": draw(4, 5), "b": draw(5, 2)}

    def spectral(w, x):
        return part(jnp.fft.rfft(x) @ w["a"]) @ w["b"]

    x = draw(3, 6)
    assert rules(spectral, weights, x) == [["b"], [], []]
    assert_equal_methods(spectral, weights, x)


def test_hidden_values_in_half_precision():
    weights = {"a": draw(6, 5), "b": draw(5, 2)}

    def network(w, x):
        return jnp.tanh(x @ w["a"]).astype(jnp.bfloat16) @ w["b"]

    x = draw(3, 6)
    assert rules(network, weights, x) == [["a", "b"], [], []]
    assert_equal_methods(network, weights, x)


@pytest.mark.parametrize("channels", [1, 40])
def test_convolutions_keep_the_dtype_of_their_result(channels):
    """In patches and, of many channels, without: products of bfloat16 summed in float32."""
    w, x = draw(3, 3, channels, 4, dtype=jnp.bfloat16), draw(2, 5, 5, channels, dtype=jnp.bfloat16)

    def network(w, x):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.float32,
        ).reshape(len(x), -1)[:, :3]  # fmt: skip

    layout = structured.plan(lambda leaves, x: network(leaves[0], x), [w], x)
    factors = jax.jit(lambda w: structured._factors(layout, [w], {}, x, None, memory_limit=2**30))
    outputs = factors(w).outputs
    wide = w.astype(jnp.float32), x.astype(jnp.float32)
    exact = jax.jit(network)(*wide)
    # A sum of 9 * channels exact products in float32, far below the rounding of bfloat16.
    np.testing.assert_allclose(outputs, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    kernel_of = jax.jit(functools.partial(empirical_ntk, network), static_argnames="method")
    kernel, exact = kernel_of(w, x, method="structured"), kernel_of(*wide, method="jacobian")
    assert kernel.dtype == jnp.float32
    np.testing.assert_allclose(kernel, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize(("dtype", "ids"), [("uint8", [0, 255, 2]), ("int8", [-5, 127, 1])])
@pytest.mark.parametrize("mode", ["clip", "fill"])
def test_lookups_with_small_indices(dtype, ids, mode):
    """A table of more rows than the indices can count."""
    weights = {"table": draw(300, 3), "b": draw(3, 2)}
    numbers = jax.lax.GatherDimensionNumbers((1,), (0,), (0,))

    def network(w, x):
        def rows(i):
            return jax.lax.gather(
                w["table"], i[:, None], numbers, (1, 3), mode=mode, fill_value=0.0
            )

        return jnp.tanh(jax.vmap(rows)(x)).mean(1) @ w["b"]

    x = jnp.asarray([ids, ids[::-1]], dtype)
    assert rules(network, weights, x) == [["b"], ["table"], []]
    assert_equal_methods(network, weights, x)


class HalfPrecision(nn.Module):
    @nn.compact
    def __call__(self, x):
        options = {"dtype": jnp.bfloat16, "bias_init": nn.initializers.normal()}
        x = jnp.tanh(nn.Conv(4, (3, 3), **options)(x)).mean((1, 2))
        x = jnp.tanh(nn.Dense(6, **options)(x))
        return nn.Dense(2, **options)(x)


def test_computation_in_half_precision_keeps_its_structure():
    """Flax casts each weight once; the methods differ by rounding to bfloat16 and no more."""
    net, x = HalfPrecision(), draw(3, 5, 5, 2)
    params = jax.jit(net.init)(jax.random.key(0), x)["params"]
    leaves, treedef = jax.tree.flatten(params)

    def flat(leaves, x):
        return net.apply({"params": treedef.unflatten(leaves)}, x)

    layout = structured.plan(flat, leaves, x)
    assert {leaves[leaf].shape for leaf in layout.dense} == {(4, 6), (6, 2)}
    assert {leaves[leaf].shape for leaf in layout.biases.values()} == {(6,), (2,)}
    assert [leaves[leaf].shape for leaf in layout.shared] == [(3, 3, 2, 4)]
    masks = jax.tree.map(lambda w: jnp.asarray(draw(*w.shape, seed=1) > 0), params)
    ours, expected = (
        value_and_grad(
            lambda p, x: net.apply({"params": p}, x), params, x, masks=masks, method=method
        )
        for method in ("structured", "jacobian")
    )
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype == jnp.float32
        # Both carry the rounding of some ten operations in bfloat16.
        np.testing.assert_allclose(a, b, rtol=0, atol=10 * EPS * np.abs(b).max())


def test_a_cast_weight_of_one_product_rounds_once(x64):
    """Each factor of the kernel is the product; its cast back, in the Jacobian, rounds it."""
    w, x = draw(4, 3, dtype=jnp.float64), draw(5, 4, dtype=jnp.float64)

    def network(w, x):
        product = x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
        return product.astype(jnp.float64)

    kernel = empirical_ntk(network, w, x, method="structured")
    narrow = np.float64(x.astype(jnp.bfloat16))
    exact = np.einsum("ij,oq->ijoq", narrow @ narrow.T, np.eye(3))
    np.testing.assert_allclose(kernel, exact, rtol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_the_dtype_of_the_kernel(x64, method):
    """That to which outputs and leaves promote, whatever the inputs and the projections are."""
    single, double = jnp.float32, jnp.float64
    cases = [
        # leaves, inputs, dtype of outputs, expected
        (single, single, single, single),
        (single, double, double, double),
        (single, single, jnp.bfloat16, single),
        (double, single, single, double),
        (single, jnp.int8, single, single),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    ]
    for leaf, inputs, outputs, expected in cases:
        w, x = draw(4, 3, dtype=leaf), jnp.ones((2, 4), inputs)
        for projections in (None, (jnp.ones((2, 1, 3), double), jnp.ones((2, 2, 3), single))):
            kernel = jax.jit(
                functools.partial(
                    empirical_ntk,
                    lambda w, x, outputs=outputs: (x @ w).astype(outputs),
                    projections=projections,
                    method=method,
                )
            )(w, x)
            assert kernel.dtype == expected
            scale = 4.0 if projections is None else 12.0
            shape = (2, 2, 3, 3) if projections is None else (2, 2, 1, 2)
            factor = np.eye(3) if projections is None else 1.0
            np.testing.assert_array_equal(kernel, np.broadcast_to(scale * factor, shape))


@pytest.mark.variants(4)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("one", "two"), [("float32", "float64"), ("float64", "float32"), ("bfloat16", "float32")]
)
def test_batches_of_two_floating_dtypes_meet_in_the_wider(x64, method, one, two):
    weights = {"a": draw(6, 5), "b": draw(5, 2)}
    x1, x2 = draw(3, 6, dtype=one), draw(2, 6, seed=1, dtype=two)
    wide = jnp.promote_types(one, two)
    kernel, expected = (
        kernel_of_perceptron(weights, *batches, method=method)
        for batches in ((x1, x2), (x1.astype(wide), x2.astype(wide)))
    )
    np.testing.assert_array_equal(kernel, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("one", "two"), [("uint8", "float32"), ("int32", "uint8")])
def test_other_batches_of_two_dtypes_are_refused(method, one, two):
    """A network may do something else with each, such as scaling pixels."""
    x1, x2 = jnp.ones((3, 6), one), jnp.ones((2, 6), two)
    with pytest.raises(ValueError, match=f"^x1 is {one} and x2 {two}, expected one dtype"):
        empirical_ntk(perceptron, {"a": draw(6, 5), "b": draw(5, 2)}, x1, x2, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_leaves_that_are_not_floating_are_constants(method):
    """A counter that nothing reads, one that scales, indices, a key and a Python number."""
    weights = {"a": draw(6, 5), "b": draw(5, 2)}
    others = {
        "count": jnp.asarray(7),
        "scale": jnp.asarray(3),
        "order": jnp.asarray([1, 0]),
        "key": jax.random.key(0),
    }
    x = draw(3, 6)

    def network(p, x):
        noise = jax.random.normal(p["key"], (2,))
        return perceptron(p, x)[:, p["order"]] * p["scale"] + noise + p["shift"]

    masks = {name: jnp.arange(w.size).reshape(w.shape) % 3 > 0 for name, w in weights.items()}
    kernel = jax.jit(
        lambda weights, others: inspect.unwrap(empirical_ntk)(
            network,
            weights | others | {"shift": True},
            x,
            masks=masks | dict.fromkeys(others | {"shift": True}),
            method=method,
        )
    )(weights, others)
    plain = kernel_of_perceptron(weights, x, masks=masks, method="jacobian")
    expected = 9 * plain[:, :, ::-1, ::-1]
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("method", METHODS)
def test_a_python_float_is_a_weight(method):
    kernel = inspect.unwrap(empirical_ntk)(
        lambda p, x: p["slope"] * x, {"slope": 2.0}, jnp.asarray([[3.0], [4.0]]), method=method
    )
    np.testing.assert_array_equal(kernel[..., 0, 0], [[9, 12], [12, 16]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("network", "params", "message"),
    [
        (
            lambda p, x: jnp.abs(x @ p["a"]),
            {"a": draw(6, 2) + 1j},
            "leaf 'a' of params is complex64, expected real numbers: hold the real and",
        ),
        (lambda p, x: x @ p["a"] + 1j, {"a": draw(6, 2)}, "outputs of apply_fn are complex64, exp"),
        (
            lambda p, x: (x @ p["a"]).astype(int),
            {"a": draw(6, 2)},
            "outputs of apply_fn are int32, expected real floating point",
        ),
        (lambda p, x: x, {}, "params hold no floating-point leaf, expected one"),
        (lambda p, x: x * p["a"], {"a": jnp.asarray(2)}, "params hold no floating-point leaf"),
        (lambda p, x: x, {"a": "b"}, "leaf 'a' of params is a str, expected an array"),
    ],
)
def test_what_has_no_tangent_kernel_is_refused(network, params, message, method):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        inspect.unwrap(empirical_ntk)(network, params, draw(3, 6), method=method)
    assert "\n" not in str(error.value)
