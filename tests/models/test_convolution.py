"""Every way to compute a convolution against XLA's, with derivatives, and where each is taken."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import every_pair
from jax import export

from ntt_sparse import _program, models, ntk
from ntt_sparse.models import convolution
from ntt_sparse.models.described import Described
from ntt_sparse.pruning import saliency

convolve = functools.partial(convolution.convolve, values_only=True)
# Size, channels and features: of one pixel, of few terms (two), of too many.
KERNELS = [(1, 5, 4), (3, 3, 4), (4, 2, 3), (3, 8, 4)]


def native(x, kernel, stride, padding):
    padding = padding if isinstance(padding, str) else [padding] * 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def operands(size, channels, features, image=(9, 8), dtype=None):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, *image, channels)), dtype)
    return x, jnp.asarray(rng.normal(size=(size, size, channels, features)), dtype)


def same(found, expected, tolerance):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    scale = np.max(np.abs(np.asarray(expected, float)))
    np.testing.assert_allclose(
        np.asarray(found, float), np.asarray(expected, float), rtol=0, atol=tolerance * scale
    )


@pytest.mark.variants(12)
@pytest.mark.parametrize(
    ("kernel", "strides", "dtype"),
    every_pair(
        KERNELS,
        [(1, "VALID"), (1, (1, 1)), (2, "SAME"), (3, (0, 0)), (2, (2, 1))],
        ["float64", "float32"],
    ),
)
def test_values_and_derivatives_are_those_of_the_convolution(kernel, strides, dtype):
    """Forward and reverse mode, by images and kernels, and one within the other."""
    stride, padding = strides
    tolerance = {"float64": 1e-12, "float32": 2e-6}[dtype]
    with jax.enable_x64(dtype == "float64"):
        args = operands(*kernel, dtype=dtype)
        rng = np.random.default_rng(1)
        moved = [jnp.asarray(rng.normal(size=each.shape), dtype) for each in args]

        def all_of(fn):
            def run(*args):
                y, tangent = jax.jvp(fn, args, tuple(moved))
                weights = jnp.cos(jnp.arange(y.size, dtype=dtype)).reshape(y.shape)
                grad = jax.grad(lambda *args: jnp.sum(weights * fn(*args) ** 2), (0, 1))
                # The second is a derivative of derivatives.
                return y, tangent, *jax.jvp(grad, args, tuple(moved))

            return jax.jit(run)(*args)

        found, expected = (
            jax.tree.leaves(all_of(lambda x, k, f=f: f(x, k, stride, padding)))
            for f in (convolve, native)
        )
        for each, wanted in zip(found, expected, strict=True):
            same(each, wanted, tolerance)


@pytest.mark.variants(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", [(1, 64, 4), (3, 7, 4), (5, 2, 4)])
def test_half_precision_is_rounded_once(kernel, dtype):
    """As far from the exact sums as one rounding, and XLA's, are."""
    x, k = operands(*kernel, dtype=dtype)
    exact = native(x.astype("float32"), k.astype("float32"), 1, "VALID")
    found = convolve(x, k, 1, "VALID")
    assert found.dtype == dtype
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(found.astype("float32"), exact, rtol=1.01 * half_ulp, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_members_have_kernels_of_their_own(kernel):
    x, k = operands(*kernel)
    several = jnp.stack([k, 2 * k, -k])
    found = jax.vmap(lambda k: convolve(x, k, 2, "SAME"))(several)
    expected = jnp.stack([native(x, each, 2, "SAME") for each in several])
    same(found, expected, 2e-6)


@pytest.mark.parametrize(
    ("kernel", "dtype", "kept"),
    [
        ((1, 5, 4), "float32", False),
        ((3, 3, 4), "float32", False),
        ((5, 1, 16), "float32", False),
        ((5, 1, 17), "float32", True),
        ((3, 8, 4), "float32", True),
        ((3, 3, 4), "bfloat16", True),
    ],
)
def test_which_convolutions_are_xlas_on_cpu(kernel, dtype, kept):
    args = operands(*kernel, dtype=dtype)
    text = jax.jit(lambda x, k: convolve(x, k, 1, "VALID")).lower(*args).as_text()
    assert ("convolution" in text) == kept


def test_training_steps_have_xlas():
    args = operands(3, 3, 4)
    text = jax.jit(lambda x, k: convolution.convolve(x, k, 1, "SAME")).lower(*args).as_text()
    assert "convolution" in text


def test_accelerators_keep_theirs():
    """The same program for several platforms."""
    args = operands(3, 3, 4)
    program = jax.jit(lambda x, k: convolve(x, k, 1, "SAME"))
    texts = {
        platform: export.export(program, platforms=platforms)(*args).mlir_module()
        for platform, platforms in {
            "cuda": ("cuda",), "tpu": ("tpu",), "cpu": ("cpu",), "both": ("cpu", "cuda")
        }.items()
    }  # fmt: skip
    assert {name: "stablehlo.convolution" in text for name, text in texts.items()} == {
        "cuda": True, "tpu": True, "cpu": False, "both": True
    }  # fmt: skip
    both = export.export(program, platforms=("cpu", "cuda"))(*args)
    same(both.call(*args), native(*args, 1, "SAME"), 2e-6)


def test_the_derivative_of_one_pixel_transposes_no_features():
    """They would be copied, together with all that makes them: twice the time of a network."""
    x, k = operands(1, 16, 64, image=(32, 32))

    def loss(k, x):
        return jnp.sum(jnp.sin(convolve(jnp.tanh(x), k, 1, "VALID")))

    text = str(jax.jit(jax.grad(loss)).lower(k, x).compile().as_text())
    assert "[3072,64]" in text and "[64,3072]" not in text and "[16,3072]" not in text


def test_programs_are_read_as_convolutions():
    x, k = operands(3, 2, 4)
    program = _program.read(lambda w, x: convolve(x[None], w[0], 1, "SAME"), [k], x[0])
    names = [step.equation.primitive.name for step in program.steps]
    assert names.count("conv_general_dilated") == 1 and "cond" not in names


def test_the_tangent_kernel_has_its_rules():
    module = Described(models.create("lenet5", num_outputs=3).network((32, 32, 1)))
    params = jax.jit(lambda key: models.init(module, key, (32, 32, 1)))(jax.random.key(0))
    x = np.random.default_rng(1).standard_normal((3, 32, 32, 1), np.float32)
    kernel = functools.partial(ntk.empirical_ntk, models.apply_fn(module))
    found, expected = (
        jax.jit(functools.partial(kernel, method=method))(params, x)
        for method in ("structured", "jacobian")
    )
    same(found, expected, 1e-5)


def test_synaptic_flow_goes_through():
    module = Described(models.create("lenet5", num_outputs=3).network((32, 32, 1)))
    shape = (32, 32, 1)
    params = jax.jit(lambda key: models.init(module, key, shape))(jax.random.key(0))
    scores = jax.jit(lambda p: saliency.synflow(models.apply_fn(module), p, shape))(params)
    leaves = [leaf for leaf in jax.tree.leaves(scores) if leaf is not None]
    assert leaves and all(np.isfinite(leaf).all() and (leaf >= 0).all() for leaf in leaves)


def test_outside_of_programs_each_shape_is_compiled_once():
    x, k = operands(3, 1, 2, image=(11, 7))
    convolve(x, k, 1, "SAME")
    program: Any = convolution._of_few_terms
    size = program._cache_size()
    convolve(x + 1, k, 1, "SAME")
    assert program._cache_size() == size
