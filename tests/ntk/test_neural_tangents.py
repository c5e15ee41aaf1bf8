"""Our kernels against those of neural-tangents, and that importing it leaves JAX as it was."""

import functools
import importlib.util
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ntt_sparse.ntk import empirical_ntk, neural_tangents
from ntt_sparse.ntk.jacobian import vector_products

ROOT = Path(__file__).parents[2]
METHODS = ("jacobian", "ntk_vector_products", "structured")
IMPLEMENTATIONS = ("jacobian_contraction", "ntk_vector_products", "structured_derivatives")

installed = pytest.mark.skipif(
    importlib.util.find_spec("neural_tangents") is None,
    reason='neural-tangents is not installed (it comes with the extra "test")',
)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=True)(jnp.tanh(nn.Dense(6)(x)))
        return nn.Dense(3)(nn.relu(nn.Dense(4)(x)))


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(3, (3, 3))(x)), (2, 2), (2, 2))
        x = jnp.tanh(nn.Conv(4, (2, 3), (2, 1), padding=((1, 0), (0, 1)))(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


class Residual(nn.Module):
    """With the three normalisations, that of batches in its form for evaluation."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(4, (3, 3), (2, 2), use_bias=False)(x))
        y = nn.GroupNorm(2)(nn.Conv(4, (2, 2))(nn.relu(x)))
        x = nn.BatchNorm(use_running_average=True)(x + y)
        return nn.Dense(2)(jnp.tanh(x).mean((1, 2)))


class Shared(nn.Module):
    """A square matrix used twice, and once more on the other side."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(5)
        x = jnp.tanh(dense(jnp.tanh(dense(x))))
        return (x @ dense.variables["params"]["kernel"].T)[:, :3]


NETWORKS = {
    "mlp": (Mlp(), (5,)),
    "convolutional": (Convolutional(), (4, 4, 2)),
    "residual": (Residual(), (4, 4, 1)),
    "shared": (Shared(), (5,)),
}


def problem(name):
    """A network, its weights and masks, and two batches of different size, in float64."""
    net, shape = NETWORKS[name]
    rng = np.random.default_rng(list(NETWORKS).index(name))
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *shape)))
    # Positive, as variances are among them.
    values = jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.1, 1, s.shape)), shapes)
    statistics = {key: value for key, value in values.items() if key != "params"}
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes["params"])
    masks = jax.tree.map(
        lambda s: jnp.asarray(rng.random(s.shape) < 0.6) if s.ndim > 1 else None, shapes["params"]
    )
    x1, x2 = (jnp.asarray(rng.normal(size=(n, *shape))) for n in (3, 2))
    return lambda p, x: net.apply({"params": p, **statistics}, x), params, masks, x1, x2


def assert_close(actual, expected):
    """Equal leaf by leaf, relative to the largest entry of all leaves."""
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert scale > 0
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-9 * scale), actual, expected
    )


# The gradients below come with kernels of "mlp".
@installed
@pytest.mark.parametrize(
    ("network", "wrt"),
    [
        pytest.param("residual", "masked", marks=pytest.mark.slow),
        pytest.param("convolutional", "masked", marks=pytest.mark.slow),
        pytest.param("mlp", "masked", marks=pytest.mark.slow),
        pytest.param("shared", "masked", marks=pytest.mark.slow),
        ("shared", "all"),
        pytest.param("mlp", "all", marks=pytest.mark.slow),
    ],
)
def test_kernels_agree(x64, network, wrt):
    fn, params, masks, x1, x2 = problem(network)
    # The program differs by these only in the last product, which small networks show as well.
    outputs = ("full", "trace") if network in ("mlp", "shared") else ("full",)

    @functools.partial(jax.jit, static_argnames="method")
    def kernels(params, masks, method):
        return [
            empirical_ntk(fn, params, x1, x2, masks=masks, wrt=wrt, output=output, method=method)
            for output in outputs
        ]

    expected = kernels(params, masks, "neural_tangents")
    for method in METHODS:
        for actual, one in zip(kernels(params, masks, method), expected, strict=True):
            assert_close(actual, one)


# These two have a leaf of every kind.
@pytest.mark.variants(1)
@installed
@pytest.mark.parametrize("network", ["convolutional", "residual"])
def test_kernels_agree_leaf_by_leaf(x64, network):
    fn, params, masks, x1, x2 = problem(network)
    leaves, treedef = jax.tree.flatten(params)
    # Of the convolutional network a bias, the kernel of a convolution and that of a dense layer.
    numbers = (0, 3, 5) if network == "convolutional" else range(len(leaves))
    masks = treedef.flatten_up_to(masks)

    @functools.partial(jax.jit, static_argnames="method")
    def kernels(leaves, method):
        def kernel(i, mask):
            def alone(leaf, x):
                return fn(jax.tree.unflatten(treedef, [*leaves[:i], leaf, *leaves[i + 1 :]]), x)

            return empirical_ntk(alone, leaves[i], x1, x2, masks=mask, method=method)

        return [kernel(i, masks[i]) for i in numbers]

    expected = kernels(leaves, "neural_tangents")
    for method in METHODS:
        for actual, one in zip(kernels(leaves, method), expected, strict=True):
            assert_close(actual, one)


# The test below has the gradients of all networks, of one implementation after the other.
@installed
@pytest.mark.parametrize(
    ("network", "output", "methods"),
    [
        ("mlp", "full", METHODS),
        # Those of convolutions are compared with Jacobians in tests of `structured`.
        pytest.param("convolutional", "trace", METHODS, marks=pytest.mark.slow),
    ],
)
def test_gradients_agree(x64, network, output, methods):
    fn, params, masks, x1, x2 = problem(network)

    @functools.partial(jax.jit, static_argnames="method")
    @jax.grad
    def gradient(params, method):
        kernel = empirical_ntk(fn, params, x1, x2, masks=masks, output=output, method=method)
        return jnp.sum(kernel**2)

    expected = gradient(params, "neural_tangents")
    for method in methods:
        assert_close(gradient(params, method), expected)


@pytest.mark.variants(1)
@installed
@pytest.mark.parametrize("network", NETWORKS)
def test_all_implementations_agree(x64, network):
    """With our function of the same arguments, also where weights left out are not zero."""
    fn, params, masks, x1, x2 = problem(network)
    leaves, treedef = jax.tree.flatten(params)
    trace = network in ("mlp", "residual")

    @functools.partial(jax.jit, static_argnames="contraction")
    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_kernel(leaves, contraction):
        kernel = contraction(
            lambda leaves, x: fn(jax.tree.unflatten(treedef, leaves), x),
            *(leaves, treedef.flatten_up_to(masks), x1, x2),
            trace=trace,
        )
        return jnp.sum(kernel**2), kernel

    expected = gradient_and_kernel(leaves, vector_products)
    for implementation in IMPLEMENTATIONS:
        contraction = functools.partial(neural_tangents.contraction, implementation=implementation)
        for actual, one in zip(gradient_and_kernel(leaves, contraction), expected, strict=True):
            assert_close(actual, one)


@installed
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_operations_without_a_transpose_of_their_own(x64, implementation):
    """Slices and gathers, for which JAX has other rules than neural-tangents reads."""
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(rng.normal(size=shape)) for shape in ((6, 4), (2, 3))]
    x = jnp.asarray(rng.normal(size=(3, 5)))

    def fn(leaves, x):
        return jnp.tanh(x @ leaves[0][:5, 1:]) * leaves[1][(x[:, 0] > 0).astype(int)]

    hidden, rows = np.tanh(x @ leaves[0][:5, 1:]), (np.asarray(x[:, 0]) > 0).astype(int)
    scale = np.asarray(leaves[1])[rows]
    inner = (x @ x.T)[:, :, None] * (scale * (1 - hidden**2))[:, None] * (scale * (1 - hidden**2))
    inner += (rows[:, None] == rows)[:, :, None] * hidden[:, None] * hidden
    expected = np.einsum("ijo,oq->ijoq", inner, np.eye(3))
    contraction = functools.partial(neural_tangents.contraction, implementation=implementation)
    kernel = jax.jit(lambda leaves, x: contraction(fn, leaves, [None, None], x, x))(leaves, x)
    assert_close(kernel, expected)


def identity(leaves, x):
    return x @ leaves[0]


ARGUMENTS = ([jnp.eye(3)], [None], jnp.ones((2, 3)), jnp.ones((2, 3)))


@pytest.mark.parametrize("implementation", ["auto", "magic"])
def test_other_implementations_are_refused(implementation):
    contraction = inspect.unwrap(neural_tangents.contraction)
    with pytest.raises(ValueError, match=rf"^implementation is '{implementation}', expected.*AUTO"):
        contraction(identity, *ARGUMENTS, implementation=implementation)


@installed
def test_structured_derivatives_refuse_what_they_cannot_do(monkeypatch):
    def split(leaves, x):
        left, right = jnp.split(x @ leaves[0], [1], axis=-1)
        return left + jnp.tanh(right)

    structured = functools.partial(
        neural_tangents.contraction, implementation="structured_derivatives"
    )
    with pytest.raises(NotImplementedError, match="multiple outputs are not supported"):
        structured(split, *ARGUMENTS)
    # JAX gives programs without such operations today.
    monkeypatch.setattr(jax, "linearize", lambda f, w: (f(w), lambda t: t[0] * jnp.sin(1.0)))
    with pytest.raises(NotImplementedError, match="sin without a tangent"):
        structured(identity, *ARGUMENTS)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "neural_tangents", None)
    with pytest.raises(ImportError, match=r"pip install neural-tangents$") as error:
        empirical_ntk(lambda p, x: x @ p, jnp.eye(3), jnp.ones((2, 3)), method="neural_tangents")
    assert "\n" not in str(error.value)


def run(code):
    """Runs code in a fresh interpreter where warnings are errors."""
    preamble = """
        import importlib, sys
        import jax, jax.core, jax.extend, jax.numpy as jnp
        import jax.interpreters.ad as ad
        from ntt_sparse.ntk import empirical_ntk
        from ntt_sparse.ntk.neural_tangents import _restored, load

        def seen():
            return {module.__name__: dir(module) for module in (jax.core, jax.extend.core, ad)}

        def ours():
            return [name for name in sys.modules if name.startswith("neural_tangents")]

        def check():
            assert seen() == before
            foreign = {"jax.util", "jax.experimental.jax2tf", "tensorflow", "tf2jax"}
            assert not foreign & {*sys.modules}, foreign & {*sys.modules}
            assert not hasattr(jax, "util")

        def kernel():
            return empirical_ntk(lambda p, x: x @ p, jnp.eye(3), jnp.ones((2, 3)),
                                 method="neural_tangents")

        before = seen()
        assert not ours()
    """
    code = textwrap.dedent(preamble) + textwrap.dedent(code)
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, env=environment
    )


@installed
def test_the_import_leaves_no_trace():
    run("""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(8) as pool:
            packages = set(pool.map(lambda _: load(), range(8)))
        check()
        import neural_tangents
        assert packages == {load(), neural_tangents} and len(packages) == 1
        assert not hasattr(neural_tangents, "experimental")
        assert "neural_tangents.experimental" not in sys.modules
        assert kernel().shape == (2, 2, 3, 3)
        check()
    """)


@installed
def test_the_import_can_be_tried_again():
    run("""
        def fails(attempt):
            try:
                attempt()
            except ImportError as error:
                return str(error)

        # The bridge is what a plain import fails at first where there is no TensorFlow.
        sys.modules["jax.experimental.jax2tf"] = None
        assert fails(lambda: importlib.import_module("neural_tangents"))
        del sys.modules["jax.experimental.jax2tf"]

        sys.modules["frozendict"] = None
        message = fails(load)
        assert message.startswith("neural_tangents cannot be imported on JAX"), message
        assert "frozendict" in message and "\\n" not in message
        assert not ours()
        check()

        del sys.modules["frozendict"]
        kernel()
        check()
    """)


@installed
def test_a_package_that_is_there_is_used():
    run("""
        with _restored():
            import neural_tangents
        assert load() is neural_tangents
        kernel()
        check()
    """)
