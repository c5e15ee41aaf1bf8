"""The empirical NTK against explicit NumPy float64 formulas and difference quotients."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import every_pair
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ntt_sparse.ntk import empirical_ntk

METHODS = ["jacobian", "ntk_vector_products", "structured"]  # "auto" is one of them
SIZES = (5, 7, 6, 3)


def mlp(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


# Compiled once for all problems of a size.
kernel_of_mlp = jax.jit(
    functools.partial(empirical_ntk, mlp), static_argnames=("wrt", "output", "method")
)


def problem(seed=0, sizes=SIZES, n1=4, n2=3, density=0.4, dtype=np.float64):
    """Params, masks and two batches as NumPy arrays."""
    rng = np.random.default_rng(seed)
    shapes = list(itertools.pairwise(sizes))
    params = [
        {"bias": rng.normal(size=q).astype(dtype), "kernel": rng.normal(size=(p, q)).astype(dtype)}
        for p, q in shapes
    ]
    masks = [{"bias": None, "kernel": rng.random((p, q)) < density} for p, q in shapes]
    x1, x2 = (rng.normal(size=(n, sizes[0])).astype(dtype) for n in (n1, n2))
    return params, masks, x1, x2


def to_jax(*trees):
    return jax.tree.map(jnp.asarray, trees)


def effective(params, masks):
    return [
        {"bias": p["bias"], "kernel": np.where(m["kernel"], p["kernel"], 0)}
        for p, m in zip(params, masks, strict=True)
    ]


def layer_quantities(weights, x):
    """Layer inputs a (n, p) and output sensitivities delta (n, k, q) of the tanh MLP."""
    inputs = [x]
    for layer in weights[:-1]:
        inputs.append(np.tanh(inputs[-1] @ layer["kernel"] + layer["bias"]))
    k = weights[-1]["bias"].size
    deltas = [np.broadcast_to(np.eye(k), (len(x), k, k))]
    for layer, activation in zip(weights[:0:-1], inputs[:0:-1], strict=True):
        deltas.insert(0, (deltas[0] @ layer["kernel"].T) * (1 - activation**2)[:, None])
    return inputs, deltas


def gram_kernel(params, masks, x1, x2, wrt):
    """Theta_ijoq = sum over layers of sum_ab (M_ab a1_ia a2_ja + 1/p) d1_iob d2_jqb."""
    weights = effective(params, masks)
    total = 0
    for a1, d1, a2, d2, mask in zip(
        *layer_quantities(weights, x1), *layer_quantities(weights, x2), masks, strict=True
    ):
        counted = mask["kernel"] if wrt == "masked" else np.ones_like(mask["kernel"])
        inner = np.einsum("ia,ja,ab->ijb", a1, a2, counted.astype(np.float64)) + 1  # +1: bias
        total = total + np.einsum("ijb,iob,jqb->ijoq", inner, d1, d2)
    return total


@pytest.mark.parametrize(
    ("method", "wrt", "output"), every_pair(METHODS, ["masked", "all"], ["full", "trace"])
)
def test_equals_gram_form_of_mlp(x64, method, wrt, output):
    params, masks, x1, x2 = problem()
    expected = gram_kernel(params, masks, x1, x2, wrt)
    if output == "trace":
        expected = np.einsum("ijoo->ij", expected)
    params, masks, x1, x2 = to_jax(params, masks, x1, x2)
    kernel = kernel_of_mlp(params, x1, x2, masks=masks, wrt=wrt, output=output, method=method)
    np.testing.assert_allclose(kernel, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("wrt", ["masked", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_difference_quotients(x64, method, wrt):
    params, masks, x1, x2 = problem(seed=1)
    leaves, treedef = jax.tree.flatten(params)
    flat = np.concatenate([leaf.ravel() for leaf in leaves])
    kept = np.concatenate(
        [
            np.ones(leaf.size, bool) if mask is None else mask.ravel()
            for leaf, mask in zip(leaves, treedef.flatten_up_to(masks), strict=True)
        ]
    )
    splits = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def f(vector, x):
        parts = zip(np.split(vector, splits), leaves, strict=True)
        weights = jax.tree.unflatten(treedef, [v.reshape(leaf.shape) for v, leaf in parts])
        *_, last = layer_quantities(weights, x)[0]
        return last @ weights[-1]["kernel"] + weights[-1]["bias"]

    point, step = np.where(kept, flat, 0), 1e-5
    directions = np.eye(flat.size)[kept] if wrt == "masked" else np.eye(flat.size)
    jacobians = [
        np.stack(
            [(f(point + step * e, x) - f(point - step * e, x)) / (2 * step) for e in directions]
        )
        for x in (x1, x2)
    ]
    expected = np.einsum("pio,pjq->ijoq", *jacobians)
    params, masks, x1, x2 = to_jax(params, masks, x1, x2)
    kernel = kernel_of_mlp(params, x1, x2, masks=masks, wrt=wrt, method=method)
    # Truncation step^2 and rounding 1e-16 / step leave about 1e-10.
    np.testing.assert_allclose(kernel, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_linear_model(x64, method):
    rng = np.random.default_rng(2)
    a, x = jnp.asarray(rng.normal(size=(9, 1))), rng.normal(size=(5, 9))

    def linear(a, x):
        return x @ a

    @jax.jit
    def kernels_of(a, x, m):
        how = {"masks": m, "method": method}
        return {wrt: empirical_ntk(linear, a, x, wrt=wrt, **how) for wrt in ("masked", "all")}

    for seed in range(3):
        m = np.random.default_rng(seed).random((9, 1)) < 0.5
        kernels = kernels_of(a, jnp.asarray(x), jnp.asarray(m))
        masked_x = x * m.T
        np.testing.assert_allclose(kernels["masked"][..., 0, 0], masked_x @ masked_x.T, rtol=1e-12)
        # The kernel of all weights does not see the mask.
        np.testing.assert_allclose(kernels["all"][..., 0, 0], x @ x.T, rtol=1e-12)


def test_dense_network_needs_no_masks(x64):
    params, masks, x1, x2 = problem()
    everything = jax.tree.map(np.ones_like, masks)
    expected = gram_kernel(params, everything, x1, x2, "all")
    params, x1, x2 = to_jax(params, x1, x2)
    np.testing.assert_allclose(kernel_of_mlp(params, x1, x2), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_one_batch_is_paired_with_itself(x64, method):
    params, masks, x1, _ = problem(seed=3)
    expected = gram_kernel(params, masks, x1, x1, "masked")
    params, masks, x1 = to_jax(params, masks, x1)
    kernel = kernel_of_mlp(params, x1, masks=masks, method=method)
    np.testing.assert_allclose(kernel, expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(kernel, kernel.transpose(1, 0, 3, 2), rtol=1e-12, atol=1e-12)


def odd_network(params, x):
    """Convolution, pooling, a weight used twice, a scale and a product of two weights."""
    x = jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jax.lax.reduce_window(
        jax.nn.relu(x), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    x = x.reshape(len(x), -1) * params["scale"]
    x = jnp.tanh(x @ params["tied"]) @ params["tied"].T
    return jax.nn.log_softmax(x @ (params["left"] @ params["right"]))


# NTK-vector products and Jacobians of other networks are compared with neural-tangents.
@pytest.mark.parametrize(
    ("wrt", "methods"),
    [
        ("masked", ("structured",)),
        pytest.param("masked", ("ntk_vector_products",), marks=pytest.mark.slow),
        pytest.param("all", ("ntk_vector_products", "structured"), marks=pytest.mark.slow),
    ],
)
def test_methods_agree_on_any_function(x64, wrt, methods):
    rng = np.random.default_rng(4)
    shapes = {"conv": (3, 3, 1, 2), "scale": (8,), "tied": (8, 5), "left": (8, 2), "right": (2, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    masks = {name: jnp.asarray(rng.random(shape) < 0.5) for name, shape in shapes.items()}
    masks |= {"scale": None}
    x1, x2 = (jnp.asarray(rng.normal(size=(n, 4, 4, 1))) for n in (3, 2))

    def value_and_grad(method):
        objective = jax.value_and_grad(
            lambda p: jnp.sum(
                empirical_ntk(odd_network, p, x1, x2, masks=masks, wrt=wrt, method=method) ** 2
            )
        )
        return jax.jit(objective)(params)

    expected_value, expected_grad = value_and_grad("jacobian")
    for method in methods:
        value, grad = value_and_grad(method)
        np.testing.assert_allclose(value, expected_value, rtol=1e-11)
        for name in shapes:
            scale = np.abs(expected_grad[name]).max()
            np.testing.assert_allclose(grad[name], expected_grad[name], rtol=0, atol=1e-11 * scale)


@pytest.mark.variants(4)
@pytest.mark.parametrize(
    ("wrt", "output"), [("masked", "full"), ("masked", "trace"), ("all", "full")]
)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_equals_difference_quotients(x64, method, wrt, output):
    params, masks, x1, x2 = problem(seed=5)
    rng = np.random.default_rng(6)
    weight = rng.normal(size=(4, 3, 3, 3))
    if output == "trace":  # sum_ij w_ij sum_o K_ijoo
        weight = weight[:, :, :1, :1] * np.eye(3)

    def reference(params):
        return np.sum(weight * gram_kernel(params, masks, x1, x2, wrt))

    jax_masks, jax_x1, jax_x2 = to_jax(masks, x1, x2)
    jax_weight = jnp.asarray(weight if output == "full" else weight[:, :, 0, 0])

    def objective(params):
        kernel = empirical_ntk(
            mlp, params, jax_x1, jax_x2, masks=jax_masks, wrt=wrt, output=output, method=method
        )
        return jnp.sum(jax_weight * kernel)

    grad = jax.jit(jax.grad(objective))(*to_jax(params))
    step = 1e-5
    for _ in range(4):
        direction = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
        ends = [jax.tree.map(lambda p, d, s=s: p + s * d, params, direction) for s in (step, -step)]
        expected = (reference(ends[0]) - reference(ends[1])) / (2 * step)
        actual = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), grad, direction)))
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    for g, m in zip(grad, masks, strict=True):
        assert np.all(np.asarray(g["kernel"])[~m["kernel"]] == 0)
        assert np.any(np.asarray(g["kernel"])[m["kernel"]] != 0)


@pytest.mark.variants(3)
@pytest.mark.parametrize("wrt", ["masked", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_float32_agrees_with_float64(method, wrt):
    params, masks, x1, x2 = problem(dtype=np.float32)
    expected = gram_kernel(*jax.tree.map(np.float64, (params,)), masks, x1, x2, wrt)
    params, masks, x1, x2 = to_jax(params, masks, x1, x2)
    kernel = kernel_of_mlp(params, x1, x2, masks=masks, wrt=wrt, method=method)
    assert kernel.dtype == jnp.float32
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.variants(3)
@pytest.mark.parametrize("output", ["full", "trace"])
@pytest.mark.parametrize("method", METHODS)
def test_jit_and_members(x64, method, output):
    members = [problem(seed=seed) for seed in range(3)]
    expected = [gram_kernel(*member, "masked") for member in members]
    if output == "trace":
        expected = [np.einsum("ijoo->ij", kernel) for kernel in expected]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    @jax.jit
    @jax.vmap
    def kernels(params, masks, x1, x2):
        return empirical_ntk(mlp, params, x1, x2, masks=masks, output=output, method=method)

    np.testing.assert_allclose(kernels(*stacked), np.stack(expected), rtol=1e-11, atol=1e-11)


@pytest.mark.variants(3)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_rows_split_over_devices(x64, method, check_vma):
    """Replicated params and split examples: Jacobians must not be summed over devices."""
    params, masks, x1, x2 = problem(n1=16)
    expected = gram_kernel(params, masks, x1, x2, "masked")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.shard_map(
        lambda p, m, x1, x2: empirical_ntk(mlp, p, x1, x2, masks=m, method=method),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P()),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    kernel = jax.jit(rows)(*to_jax(params, masks, x1, x2))
    np.testing.assert_allclose(kernel, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.variants(2)
@pytest.mark.parametrize("method", METHODS)
def test_dead_layers_and_constant_inputs_stay_finite(method):
    params, masks, x1, _ = to_jax(*problem(dtype=np.float32))
    empty = jax.tree.map(jnp.zeros_like, masks)

    def relu_net(params, x):
        return mlp([params[0]], jax.nn.relu(mlp(params[1:], x) - 1e6))

    chain = [{"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, *params]
    for fn, p, m in ((mlp, params, empty), (relu_net, chain, None)):
        objective = jax.jit(
            jax.value_and_grad(
                lambda p, x, fn=fn, m=m: jnp.sum(
                    empirical_ntk(fn, p, x, masks=m, method=method) ** 2
                )
            )
        )
        for x in (jnp.zeros_like(x1), jnp.ones_like(x1)):
            value, grad = objective(p, x)
            assert np.isfinite(value)
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grad))


@pytest.mark.parametrize("method", METHODS)
def test_products_are_at_highest_precision(method):
    params, masks, x1, x2 = to_jax(*problem(dtype=np.float32))
    program = jax.make_jaxpr(lambda p: empirical_ntk(mlp, p, x1, x2, masks=masks, method=method))(
        params
    )
    text = str(program)
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST") > 0


X = jnp.ones((4, 5))
GOOD = to_jax(*problem(dtype=np.float32))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, jnp.ones((3, 6))), {}, r"one shape, got \(4, 5\) and \(3, 6\)"),
        ((jnp.ones((0, 5)),), {}, "x1 has shape .0, 5., expected at least one"),
        ((X, jnp.ones((0, 5))), {}, "x2 has shape .0, 5."),
        ((X,), {"wrt": "some"}, "wrt is 'some', expected one of .'masked', 'all'."),
        ((X,), {"output": "diagonal"}, "output is 'diagonal'"),
        ((X,), {"method": "magic"}, "method is 'magic', expected one of .'auto'"),
        ((X,), {"masks": GOOD[1][:2]}, "masks must have the structure of params"),
        ((X,), {"masks": jax.tree.map(jnp.float32, GOOD[1])}, r"'0/kernel' is float32\(5, 7\)"),
        (
            (X,),
            {"masks": jax.tree.map(lambda m: m[1:], GOOD[1])},
            r"bool\(4, 7\), expected bool\(5, 7\)",
        ),
        (
            (X,),
            {"masks": jax.tree.map(lambda m: True, GOOD[1])},
            r"mask of '0/kernel' is a bool, expected an array bool\(5, 7\) or None",
        ),
        ((X,), {"max_density": 0}, r"max_density is 0, expected a fraction in \(0, 1\]"),
        ((X,), {"max_density": "0.1"}, "max_density is '0.1', expected a fraction"),
        ((X,), {"memory_limit": 0}, "memory_limit is 0, expected a number of bytes"),
        ((X,), {"memory_limit": float("nan")}, "memory_limit is nan, expected a number of"),
        ((X,), {"memory_limit": "1G"}, "memory_limit is '1G', expected a number of bytes"),
        (
            (X,),
            {"projections": (jnp.ones((4, 1, 3)),)},
            r"two arrays, u \(4, r, 3\) .* got 1",
        ),
        ((X,), {"projections": jnp.ones((2, 4, 1, 3))}, "projections are two arrays.* no tuple"),
        ((X,), {"projections": (None, jnp.ones((4, 1, 3)))}, "first projection has shape None"),
        (
            (X,),
            {"projections": (jnp.ones((4, 1, 3)), jnp.ones((3, 1, 3)))},
            r"second projection has shape \(3, 1, 3\), expected \(4, r, 3\)",
        ),
        ((X,), {"projections": (1j * jnp.ones((4, 1, 3)),) * 2}, "first projection is complex64"),
        (
            (X,),
            {"projections": (jnp.ones((4, 1, 3)),) * 2, "output": "trace"},
            'projections go with output="full", got',
        ),
    ],
)
def test_errors(arguments, options, message):
    # Without the run-time type checker of the tests, which is first otherwise.
    with pytest.raises(ValueError, match=message) as error:
        inspect.unwrap(empirical_ntk)(mlp, GOOD[0], *arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda p, x: mlp(p, x)[:, 0],
        lambda p, x: mlp(p, x)[:2],
        lambda p, x: (x, x),
        lambda p, x: mlp(p, x)[:, :0],
    ],
)
def test_outputs_must_be_a_matrix(outputs):
    with pytest.raises(ValueError, match=r"apply_fn must map a batch of 4 to an array \(4, k\)"):
        empirical_ntk(outputs, GOOD[0], X)


def test_a_constant_has_no_mask():
    params = {"w": jnp.ones((5, 3)), "count": jnp.asarray([1, 2])}
    masks = {"w": None, "count": jnp.asarray([True, False])}
    with pytest.raises(ValueError, match=r"^mask of 'count' is for a leaf of int32, expected None"):
        empirical_ntk(lambda p, x: x @ p["w"], params, X, masks=masks)
