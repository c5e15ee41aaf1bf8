"""CKA against float64 formulas written out, published values, invariances and each other."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cka_problems import normal, reference_cka, reference_debiased
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from ntt_sparse.similarity import cka, grams

SHAPES = [(9, 4), (9, 9), (9, 40), (9, 5, 3, 2)]

linear_cka = jax.jit(cka.linear_cka, static_argnames="debiased")
cka_distance = jax.jit(cka.cka_distance, static_argnames="debiased")
cka_matrix = jax.jit(cka.cka_matrix, static_argnames="debiased")


@functools.partial(jax.jit, static_argnums=2)
def rbf_ckas(x, y, fractions):
    return [cka.rbf_cka(x, y, fraction=fraction) for fraction in fractions]


@pytest.mark.variants(6)
@pytest.mark.parametrize(
    ("first", "second", "debiased"),
    [
        pytest.param(*pair, bool(which), marks=[pytest.mark.slow] * ((index + which) % 2))
        for index, pair in enumerate(itertools.combinations_with_replacement(SHAPES, 2))
        for which in (0, 1)
    ],
    ids=str,
)
def test_definition(x64, first, second, debiased):
    x, y = normal(*first) + 3, normal(*second, seed=1) - 1
    expected = (reference_debiased if debiased else reference_cka)(x, y)
    value = linear_cka(jnp.asarray(x), jnp.asarray(y), debiased=debiased)
    assert float(value) == pytest.approx(expected, rel=1e-10, abs=1e-12)
    distance = cka_distance(jnp.asarray(x), jnp.asarray(y), debiased=debiased)
    assert float(distance) == pytest.approx(1 - expected, rel=1e-10, abs=1e-12)


# Mean over draws of two independent Gaussian feature sets, and spread where it is debiased.
INDEPENDENT = [
    (4, 64, 0.944), (4, 1024, 0.997), (8, 64, 0.897), (8, 1024, 0.993), (16, 64, 0.804),
    (16, 1024, 0.985), (32, 64, 0.668), (32, 1024, 0.970), (128, 64, 0.332), (128, 1024, 0.889),
    (256, 64, 0.200), (256, 1024, 0.800), (4, 16384, 1.000), (8, 16384, 0.999), (16, 16384, 0.999),
    (32, 16384, 0.998), (128, 16384, 0.992), (256, 16384, 0.985),
]  # fmt: skip


def of_independent(similarity, n, p):
    """The similarities of twenty pairs of feature sets, one pair at a time."""
    draws = (jnp.asarray(normal(2, n, p, seed=seed), jnp.float32) for seed in range(20))
    compiled = jax.jit(similarity)
    return np.asarray([compiled(x, y) for x, y in draws])


@pytest.mark.variants(4)
@pytest.mark.parametrize(
    ("n", "p", "expected"),
    # Millions of draws take seconds.
    [
        pytest.param(*row, marks=[pytest.mark.slow] * (row[0] * row[1] > 10**6))
        for row in INDEPENDENT
    ],
)
def test_bias_of_independent_features(n, p, expected):
    values = of_independent(lambda x, y: cka.cka_matrix([x, y])[0, 1], n, p)
    # Published to three digits, over other draws.
    error = 0.0005 + 4 * np.std(values) / np.sqrt(20)
    assert np.mean(values) == pytest.approx(expected, abs=error)


@pytest.mark.parametrize(("n", "spread"), [(128, 0.010), (256, 0.006)])
def test_debiased_values_of_independent_features_are_around_zero(n, spread):
    values = of_independent(functools.partial(cka.linear_cka, debiased=True), n, 1024)
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(20)
    assert np.std(values) == pytest.approx(spread, rel=0.6)


@settings(max_examples=20, deadline=None)
@given(
    # Few, so that programs serve several draws.
    shape=st.sampled_from([(4, 30), (12, 7)]),
    scale=st.floats(1e-6, 1e6),
    debiased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_invariances(shape, scale, debiased, seed):
    with jax.enable_x64(True):
        n, p = shape
        x, y = normal(n, p, seed=seed), normal(n, 5, seed=seed + 1)
        rotation, _ = np.linalg.qr(normal(p, p, seed=seed + 2))

        def similarity(x, y):
            return linear_cka(jnp.asarray(x), jnp.asarray(y), debiased=debiased)

        expected = float(similarity(x, y))
        order = np.random.default_rng(seed).permutation(n)
        for changed in (
            similarity(x @ rotation, y),
            similarity(scale * x, y),
            similarity(x + 100.0, y),
            similarity(y, x),
            similarity(x[order], y[order]),
        ):
            assert float(changed) == pytest.approx(expected, abs=1e-8)
        assert float(similarity(x, x @ rotation * scale)) == pytest.approx(1.0, abs=1e-9)
        assert expected <= 1 + 1e-12
        assert debiased or expected >= 0


def test_not_invariant_to_other_linear_maps_or_to_another_order(x64):
    x = jnp.asarray(normal(12, 6))
    stretch = jnp.diag(jnp.asarray([10.0, 1, 1, 1, 1, 1]))
    assert float(linear_cka(x, x @ stretch)) < 0.9
    assert float(linear_cka(x, x[::-1])) < 0.9


@pytest.mark.parametrize("debiased", [False, True])
def test_both_forms_agree(x64, debiased):
    """Gram matrices of examples and covariances of features."""
    features = [normal(20, p, seed=p) + 2 for p in (1, 3, 7)]
    features = [jnp.asarray(x) for x in features]
    flat = [grams.flat(x) for x in features]

    @jax.jit
    def forms(flat):
        two_networks = cka._by_features(flat[:1], flat[1:], debiased)
        return (
            cka._stacked_units(flat, debiased),
            cka._by_features(flat, None, debiased),
            two_networks,
        )

    by_grams, by_features, two_networks = map(np.asarray, forms(flat))
    np.testing.assert_allclose(by_features, by_grams @ by_grams.T, rtol=0, atol=1e-12)
    np.testing.assert_allclose(two_networks, by_features[:1, 1:], rtol=0, atol=1e-12)
    assert cka._features_are_cheaper(flat)
    assert not cka._features_are_cheaper([jnp.zeros((4, 100))])


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("width", [3, 60])
def test_matrix_of_all_pairs(x64, debiased, width):
    first = [normal(10, width, seed=s) for s in range(3)]
    second = [normal(10, 2, width, seed=10 + s) for s in range(2)]
    reference = reference_debiased if debiased else reference_cka
    as_arrays = [[jnp.asarray(x) for x in side] for side in (first, second)]
    own = cka_matrix(as_arrays[0], debiased=debiased)
    expected = [[reference(x, y) for y in first] for x in first]
    np.testing.assert_allclose(own, expected, rtol=0, atol=1e-11)
    both = cka_matrix(*as_arrays, debiased=debiased)
    expected = [[reference(x, y) for y in second] for x in first]
    np.testing.assert_allclose(both, expected, rtol=0, atol=1e-11)


@pytest.mark.variants(3)
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize(
    ("similarity", "p"),
    # The linear one has another form where features outnumber examples.
    [(cka.linear_cka, 3), (cka.linear_cka, 50), (cka.rbf_cka, 3)],
)
def test_gradients_are_those_of_finite_differences(x64, similarity, p, debiased):
    x, y = jnp.asarray(normal(9, p)), jnp.asarray(normal(9, 4, seed=1))
    fn = jax.jit(functools.partial(similarity, debiased=debiased))
    check_grads(fn, (x, y), order=1, modes=("fwd", "rev"), rtol=1e-6)
    if similarity is cka.linear_cka:
        check_grads(fn, (x, y), order=2, modes=("rev",), rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 30.0, 300.0])
def test_float32_against_float64(shift):
    """Features far from zero compared with their spread lose no more digits than they have."""
    x, y = (normal(128, 500, seed=s).astype(np.float32) + np.float32(shift) for s in (0, 1))
    value = float(linear_cka(jnp.asarray(x), jnp.asarray(y)))
    exact = reference_cka(x.astype(float), y.astype(float))
    assert value == pytest.approx(exact, rel=1e-5)


CONSTANT = {
    "zeros": np.zeros((6, 5)),
    "tenths": np.full((6, 5), 0.1),
    "large": np.full((6, 5), 1e4) + np.arange(5) / 3,
    "tiny": np.full((6, 5), 1e-30),
}


@pytest.mark.variants(4)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("width", [1, 40])
def test_constant_features_are_like_nothing(x64, dtype, debiased, width):
    alive = jnp.asarray(normal(6, width), dtype)

    @jax.jit
    def values_and_gradients(dead, alive):
        def total(dead, alive):
            matrix = cka.cka_matrix([dead, alive], debiased=debiased)
            return matrix.sum(), matrix

        by_features = jax.grad(total, (0, 1), has_aux=True)(dead, alive)
        return *by_features, jax.value_and_grad(cka.rbf_cka)(dead, alive)

    for name, features in CONSTANT.items():
        dead = jnp.asarray(features, dtype)
        gradients, matrix, (rbf, rbf_gradient) = values_and_gradients(dead, alive)
        np.testing.assert_allclose(matrix, [[0, 0], [0, 1]], atol=1e-6, err_msg=name)
        assert not np.any(gradients[0]), name
        np.testing.assert_allclose(np.asarray(gradients[1], float), 0, atol=0.02, err_msg=name)
        assert rbf == 0 and not np.any(rbf_gradient), name


@pytest.mark.parametrize("n", [1, 2, 3])
def test_tiny_batches(n):
    x, y = jnp.asarray(normal(n, 5), jnp.float32), jnp.asarray(normal(n, 4, seed=1), jnp.float32)
    # Two centred examples are each other's opposite, in any features.
    expected = {1: 0.0, 2: 1.0, 3: reference_cka(normal(3, 5), normal(3, 4, seed=1))}[n]
    value, gradient = jax.jit(jax.value_and_grad(cka.linear_cka))(x, y)
    assert float(value) == pytest.approx(expected, abs=1e-5)
    assert np.all(np.isfinite(gradient))
    with pytest.raises(ValueError, match=f"needs four examples or more, there are {n}: use"):
        cka.linear_cka(x, y, debiased=True)


@pytest.mark.parametrize("power", [-15, -8, 8, 15])
def test_scales_that_squares_of_products_do_not_hold(power):
    """Fourth powers of these features are outside of float32."""
    x, y = (jnp.asarray(normal(8, p, seed=p), jnp.float32) for p in (3, 30))
    expected = float(linear_cka(x, y))
    scaled = linear_cka(x * 10.0**power, y)
    assert float(scaled) == pytest.approx(expected, rel=1e-4)


def test_orthogonal_examples_have_no_debiased_similarity():
    """Their U-centred Gram matrix is zero: nothing but rounding would be compared."""
    x, y = jnp.eye(7, dtype=jnp.float32), jnp.asarray(normal(7, 20), jnp.float32)
    np.testing.assert_array_equal(cka_matrix([x, y], debiased=True)[0], [0, 0])
    gradient = jax.jit(jax.grad(functools.partial(cka.linear_cka, debiased=True)))(x, y)
    assert np.all(np.isfinite(gradient))


def test_rbf(x64):
    x, y = normal(10, 4), normal(10, 3, seed=1)

    def unit(z, fraction):
        squared = np.sum((z[:, None] - z) ** 2, axis=-1)
        median = np.median(np.sqrt(squared[~np.eye(10, dtype=bool)]))
        k = np.exp(-squared / (2 * (fraction * median) ** 2))
        h = np.eye(10) - 0.1
        return h @ k @ h / np.linalg.norm(h @ k @ h)

    fractions = (0.2, 1.0, 5.0)
    *values, wide = rbf_ckas(jnp.asarray(x), jnp.asarray(y), (*fractions, 1e3))
    for fraction, value in zip(fractions, values, strict=True):
        # The median of squares is the square of the median, where pairs come twice.
        assert float(value) == pytest.approx(np.sum(unit(x, fraction) * unit(y, fraction)))
    # A wide kernel is a linear one.
    assert float(wide) == pytest.approx(reference_cka(x, y), abs=1e-5)
    for fraction in (0.0, -1.0, 1e-20, 1e7, float("nan")):
        with pytest.raises(ValueError, match=r"fraction=.*, expected a multiple of the median"):
            cka.rbf_cka(jnp.asarray(x), jnp.asarray(y), fraction=fraction)


def test_wide_kernels_keep_their_digits_in_float32():
    """One less a small number would lose them."""
    x, y = normal(16, 50).astype(np.float32), normal(16, 50, seed=1).astype(np.float32)
    for value in rbf_ckas(jnp.asarray(x), jnp.asarray(y), (300.0, 1e4, 1e6)):
        assert float(value) == pytest.approx(reference_cka(x, y), rel=1e-4)


def test_nhsic(x64):
    x, y = normal(6, 3) + 2, normal(6, 2, 2, seed=1)
    flat = y.reshape(6, 4)
    expected = np.sum((flat.T @ x) ** 2)
    expected /= np.linalg.norm(x.T @ x) * np.linalg.norm(flat.T @ flat)
    nhsic = jax.jit(cka.nhsic)
    assert float(nhsic(jnp.asarray(x), jnp.asarray(y))) == pytest.approx(expected, rel=1e-12)
    assert nhsic(jnp.zeros((6, 3)), jnp.asarray(y)) == 0
    check_grads(nhsic, (x, y), order=1, rtol=1e-6)


def test_features_that_overflow_are_not_taken_for_constant():
    """Infinite squares give NaN, which shows, and no silent zero."""
    x, y = (jnp.asarray(1e25 * normal(6, p), jnp.float32) for p in (20, 30))
    assert np.isnan(linear_cka(x, y))


def test_members_have_one_condition_together():
    """Not both branches of one each: the mean dominates in the second member alone."""
    x = jnp.asarray(np.stack([normal(6, 20), 100 + normal(6, 20, seed=1)]), jnp.float32)
    batched = jax.vmap(lambda x: grams.centred_gram(x).matrix)
    conditions = [e for e in jax.make_jaxpr(batched)(x).jaxpr.eqns if e.primitive.name == "cond"]
    text = str(jax.make_jaxpr(batched)(x))
    assert len(conditions) == 1 or text.count("cond[") == 1, text
    for member, ours in enumerate(jax.jit(batched)(x)):
        centred = np.asarray(x[member], float)
        centred = centred - centred.mean(0)
        np.testing.assert_allclose(ours, centred @ centred.T, rtol=1e-3, atol=1e-3)
    # A member that needs it does not change the others.
    alone = jax.jit(batched)(x[:1])
    np.testing.assert_allclose(jax.jit(batched)(x)[0], alone[0], rtol=1e-4, atol=1e-5)


def test_bad_input():
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"layers have features of \[4, 5\] examples"):
        cka.linear_cka(x, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="the networks saw 4 and 5 examples"):
        cka.cka_matrix([x], [jnp.ones((5, 3))])
    with pytest.raises(ValueError, match="the networks saw 4 and 5 examples"):
        cka.hsic_sums([x], [jnp.ones((5, 3))])
    with pytest.raises(ValueError, match=r"features is an array of shape \(4, 3\), expected a"):
        grams.check_collection(x, "features")
    with pytest.raises(ValueError, match="features is a mapping"):
        grams.check_collection({"a": x}, "features")
    with pytest.raises(ValueError, match="there are no features to compare"):
        cka.cka_matrix([])
    with pytest.raises(ValueError, match=r"features is of shape \(0, 3\), expected \(n, ...\)"):
        cka.linear_cka(jnp.ones((0, 3)), jnp.ones((0, 3)))


@pytest.mark.parametrize(("width", "debiased"), [(2, True), (50, False)])
def test_split_over_devices(x64, width, debiased):
    """Value and gradient are those of the global batch, in `pmap` and in `shard_map`."""
    weights = jnp.asarray(normal(3, width))
    x = jnp.asarray(normal(8, 2, 3, seed=1))

    def loss(w, x, axis_name=None):
        features = [jnp.tanh(x @ w), x @ jnp.flip(w) ** 2]
        return cka.linear_cka(*features, debiased=debiased, axis_name=axis_name)

    expected = jax.jit(jax.value_and_grad(loss))(weights, x.reshape(16, 3))

    def parallel(w, x):
        value, grad = jax.value_and_grad(functools.partial(loss, axis_name="data"))(w, x)
        return value, jax.lax.pmean(grad, "data")

    mapped = jax.pmap(parallel, axis_name="data", in_axes=(None, 0))(weights, x)
    for ours, theirs in zip(mapped, expected, strict=True):
        for device in ours:
            np.testing.assert_allclose(device, theirs, rtol=1e-10, atol=1e-12)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        jax.value_and_grad(functools.partial(loss, axis_name="data")),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    sharded = jax.jit(sharded)(weights, x.reshape(16, 3))
    for ours, theirs in zip(sharded, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_members():
    x = jnp.asarray(normal(3, 8, 5), jnp.float32)
    y = jnp.asarray(normal(8, 30), jnp.float32)
    mapped = jax.jit(jax.vmap(cka.linear_cka, (0, None)))(x, y)
    np.testing.assert_allclose(mapped, [linear_cka(one, y) for one in x], rtol=1e-6)
