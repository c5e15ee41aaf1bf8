"""Canonical correlations, SVCCA and PWCCA; and what all measures, ridge CCA too, have in common."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from cca_problems import (
    ROUNDING,
    arrays,
    compiled,
    correlated,
    eigen_cca,
    eigen_pwcca,
    invertible,
    known,
    leading,
    precision,
    signals,
    x64,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ntt_sparse.similarity import cca

# Canonical correlations


@x64
@precision
def test_correlations_are_those_of_the_eigenproblem_and_of_subspace_angles(dtype):
    x, y = correlated()
    rho = cca.canonical_correlations(*arrays(dtype, x, y))
    assert rho.dtype == dtype
    atol = ROUNDING[dtype]
    np.testing.assert_allclose(rho, eigen_cca(x, y)[0], rtol=0, atol=atol)
    angles = scipy.linalg.subspace_angles(x - x.mean(0), y - y.mean(0))
    np.testing.assert_allclose(rho, np.cos(angles)[::-1], rtol=0, atol=atol)
    exchanged = cca.canonical_correlations(*arrays(dtype, y, x))
    np.testing.assert_allclose(exchanged, rho, rtol=0, atol=atol)


@x64
@precision
def test_signals_of_known_correlation(dtype):
    rho, rng = np.array([0.9, 0.5, 0.2]), np.random.default_rng(1)
    x, y = known(rho, [1.0, 2.0, 4.0])
    mixed = arrays(dtype, x @ invertible(rng, 3) + 3, y @ invertible(rng, 3) - 1)
    plain = arrays(dtype, x, y)
    expected = {
        cca.canonical_correlations: (mixed, rho),
        cca.cca_similarity: (mixed, 1.6 / 3),
        # The variates are the features, so the weights are their scales: 1, 2 and 4.
        cca.pwcca_similarity: (plain, (0.9 + 2 * 0.5 + 4 * 0.2) / 7),
    }
    for function, (features, value) in expected.items():
        np.testing.assert_allclose(function(*features), value, rtol=0, atol=ROUNDING[dtype])
    squared = cca.cca_similarity(*mixed, squared=True)
    np.testing.assert_allclose(squared, (0.81 + 0.25 + 0.04) / 3, rtol=0, atol=ROUNDING[dtype])
    # From the other side all weights are 1.
    both = cca.pwcca_similarity(*plain, symmetric=True)
    np.testing.assert_allclose(both, (2.7 / 7 + 1.6 / 3) / 2, rtol=0, atol=ROUNDING[dtype])


@x64
@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_invariances(seed):
    rng = np.random.default_rng(seed)
    x, y = correlated(seed, n=32, p1=4, p2=3)
    a, b = x @ invertible(rng, 4) * 1e-3 + rng.normal(size=4) * 1e-3, 50 * (y @ invertible(rng, 3))
    rotated = x @ np.linalg.qr(rng.normal(size=(4, 4)))[0] * 1e4 + 1e4
    changed = a, b, rotated, y * 7 + 1, 1e3 * x + 1e3
    x, y, a, b, rotated, scaled, larger = arrays("float64", x, y, *changed)
    cases = [
        (compiled.canonical_correlations, a, b),
        (compiled.cca_similarity, a, b),
        (compiled.svcca_similarity, rotated, scaled),
        (compiled.pwcca_similarity, larger, b),
        (compiled.ridge_cca, rotated, scaled),
    ]
    for function, changed_x, changed_y in cases:
        # The maps multiply condition numbers by 4 on either side.
        atol = 16 * ROUNDING["float64"]
        np.testing.assert_allclose(function(changed_x, changed_y), function(x, y), atol=atol)


# Rank deficiency


@x64
@precision
def test_duplicate_and_constant_columns_add_nothing(dtype):
    x, y = correlated()
    wide = np.c_[x, x[:, :2], np.full(len(x), 0.1), x[:, 0] - 3 * x[:, 1], np.zeros(len(x))]
    rho = cca.canonical_correlations(*arrays(dtype, wide, y))
    assert rho.shape == (7,)
    expected = np.r_[eigen_cca(x, y)[0], 0, 0]
    np.testing.assert_allclose(rho, expected, rtol=0, atol=ROUNDING[dtype])
    for features in ((wide, y), (y, wide)):
        mean = cca.cca_similarity(*arrays(dtype, *features))
        np.testing.assert_allclose(mean, expected[:5].mean(), rtol=0, atol=ROUNDING[dtype])
    alike = cca.canonical_correlations(*arrays(dtype, wide, x))
    np.testing.assert_allclose(alike, np.ones(5), rtol=0, atol=ROUNDING[dtype])
    assert np.max(alike) <= 1


@x64
@precision
def test_projection_weights_of_deficient_and_uncorrelated_directions(dtype):
    # Variates e1 (correlation 1) and e2 (correlation 0). The features e1, e2, e1, e1 + e2 weigh
    # them 3 and 2, wherever the two dimensions that are not there end up in the decomposition.
    for seed in range(5):
        e1, e2, e3 = signals(16, 3, seed).T
        x, y = np.c_[e1, e2, e1, e1 + e2], np.c_[e1, e3]
        value = compiled.pwcca_similarity(*arrays(dtype, x, y))
        np.testing.assert_allclose(value, 3 / 5, rtol=0, atol=ROUNDING[dtype])


@precision
@x64
def test_constant_features_are_like_nothing(dtype):
    _, y = correlated(n=49, p2=3)
    columns = [1.0, 0.1, 1 / 3, -0.7]  # Their means over 49 examples are rounded.
    functions = (
        cca.cca_similarity,
        cca.svcca_similarity,
        cca.pwcca_similarity,
        cca.ridge_cca,
        lambda x, y: cca.pwcca_similarity(x, y, symmetric=True),
    )

    @jax.jit
    def values(x, other):
        pairs = ((x, other), (other, x), (x, x))
        means = [function(*pair) for function in functions for pair in pairs]
        return jnp.stack(means), cca.canonical_correlations(x, other)

    for value in (0.0, 0.1, 1e3 / 3, 1e-25, 1e25):
        means, correlations = values(*arrays(dtype, np.tile(columns, (49, 1)) * value, y))
        np.testing.assert_array_equal(means, np.zeros(15))
        np.testing.assert_array_equal(correlations, np.zeros(3))


def test_features_that_are_not_finite_give_nan():
    for value in (np.nan, np.inf):
        x, y = correlated(n=16, p1=3, p2=3)
        x[2, 1] = value
        x, y = arrays("float32", x, y)
        for function in (
            compiled.cca_similarity,
            compiled.svcca_similarity,
            compiled.pwcca_similarity,
            compiled.ridge_cca,
        ):
            assert np.isnan(function(x, y)) and np.isnan(function(y, x))


# SVCCA


@x64
@pytest.mark.parametrize(
    ("threshold", "of", "count"),
    [
        (0.5, "values", 1),  # Shares of singular values: 0.6, 0.3, 0.1.
        (0.59, "values", 1),  # The first alone exceeds it, and is kept.
        (0.61, "values", 2),
        (0.89, "values", 2),
        (0.91, "values", 3),
        (1.0, "values", 3),
        (0.77, "variance", 1),  # Of 36 + 9 + 1: 0.783, 0.196, 0.022.
        (0.79, "variance", 2),
        (0.97, "variance", 2),
        (0.98, "variance", 3),
        (1.0, "variance", 3),
    ],
)
def test_svcca_keeps_the_fewest_directions_that_reach_the_threshold(threshold, of, count):
    rho = [0.9, 0.5, 0.2]
    scales = np.array([6.0, 3.0, 1.0])
    x, y = known(rho, scales)
    x, y = arrays("float64", x, y * scales)
    expected = np.mean(rho[:count])
    value = cca.svcca_similarity(x, y, threshold=threshold, of=of)
    np.testing.assert_allclose(value, expected, rtol=0, atol=ROUNDING["float64"])
    squared = cca.svcca_similarity(x, y, threshold=threshold, of=of, squared=True)
    np.testing.assert_allclose(squared, np.mean(np.square(rho[:count])), rtol=0, atol=1e-12)


@x64
@precision
@pytest.mark.parametrize("of", ["values", "variance"])
def test_svcca_is_cca_of_what_is_kept(dtype, of):
    for p1 in (5, 100):  # 100 features of 64 examples have to be cut.
        x, y = correlated(p1=p1)
        threshold = 0.9 if p1 < 64 else 0.5
        power = 1 if of == "values" else 2
        kept = [leading(z, threshold, power) for z in (x, y)]
        expected = np.mean(eigen_cca(*kept)[0])
        value = cca.svcca_similarity(*arrays(dtype, x, y), threshold=threshold, of=of)
        np.testing.assert_allclose(value, expected, rtol=0, atol=ROUNDING[dtype])


# Projection weights


@x64
@precision
def test_pwcca_is_that_of_the_eigenproblem(dtype):
    x, y = correlated()
    forth, back = eigen_pwcca(x, y), eigen_pwcca(y, x)
    x, y = arrays(dtype, x, y)
    # Variates turn by rounding over the gap between correlations, here above 0.02.
    atol = ROUNDING[dtype] / 0.02
    assert abs(forth - back) > atol
    np.testing.assert_allclose(cca.pwcca_similarity(x, y), forth, rtol=0, atol=atol)
    np.testing.assert_allclose(cca.pwcca_similarity(y, x), back, rtol=0, atol=atol)
    both = cca.pwcca_similarity(x, y, symmetric=True)
    np.testing.assert_allclose(both, (forth + back) / 2, rtol=0, atol=atol)


# Everything


every = pytest.mark.parametrize(
    "function",
    [
        cca.canonical_correlations,
        cca.cca_similarity,
        cca.svcca_similarity,
        cca.pwcca_similarity,
        cca.ridge_cca,
    ],
)


@x64
@every
def test_jit_and_vmap(function):
    pairs = [correlated(seed, n=32, p1=4, p2=3) for seed in range(3)]
    # Members differ in rank and in what is kept.
    pairs[1][0][:, 1:] = pairs[1][0][:, :1]
    pairs[2][0][:, 0] *= 1000
    expected = np.array([function(*arrays("float64", *pair)) for pair in pairs])
    xs, ys = (jnp.asarray(np.stack(side)) for side in zip(*pairs, strict=True))
    batched = jax.jit(jax.vmap(function))(xs, ys)
    np.testing.assert_allclose(batched, expected, rtol=0, atol=ROUNDING["float64"])


@every
def test_maps_are_flattened_and_half_precision_is_computed_in_single(function):
    x, y = arrays("bfloat16", *correlated(p1=6, p2=4))
    expected = function(x.astype(jnp.float32), y.astype(jnp.float32))
    value = function(x.reshape(64, 3, 2), y.reshape(64, 2, 1, 2))
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, expected)


def test_distances():
    x, y = arrays("float32", *correlated())
    svcca = {"threshold": 0.8, "of": "variance", "squared": True}
    pairs = [
        (cca.cca_distance(x, y), cca.cca_similarity(x, y)),
        (cca.cca_distance(x, y, squared=True), cca.cca_similarity(x, y, squared=True)),
        (cca.svcca_distance(x, y, **svcca), cca.svcca_similarity(x, y, **svcca)),
        (cca.pwcca_distance(x, y), cca.pwcca_similarity(x, y)),
        (
            cca.pwcca_distance(x, y, symmetric=True),
            cca.pwcca_similarity(x, y, symmetric=True),
        ),
        (cca.ridge_cca_distance(x, y, ridge=0.5), cca.ridge_cca(x, y, ridge=0.5)),
    ]
    for distance, similarity in pairs:
        assert 0 < similarity < 1
        np.testing.assert_array_equal(distance, 1 - similarity)


# Errors


@every
def test_numbers_of_examples_must_agree(function):
    with pytest.raises(ValueError, match="x holds 16 examples and y holds 15"):
        function(jnp.ones((16, 2)), jnp.ones((15, 2)))
    for shape in ((16, 0), (0, 2)):
        with pytest.raises(ValueError, match="at least one example with features"):
            function(jnp.ones((16, 2)), jnp.ones(shape))


@pytest.mark.parametrize(
    "function", [cca.canonical_correlations, cca.cca_similarity, cca.pwcca_similarity]
)
def test_as_many_features_as_examples_are_refused(function):
    x, y = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)
    x, y = jnp.asarray(x), jnp.asarray(y)
    assert jax.eval_shape(function, x[:, :4], y[:, :4]).dtype == jnp.float32
    for features in ((x, y[:, :2]), (y[:, :2], x)):
        with pytest.raises(ValueError, match="has 5 features for 6 examples, expected at most n -"):
            function(*features)


@pytest.mark.parametrize("threshold", [0.0, 1.01, -1.0, np.nan])
def test_thresholds_are_shares(threshold):
    x = jnp.ones((6, 2))
    with pytest.raises(ValueError, match="expected a share in"):
        cca.svcca_similarity(x, x, threshold=threshold)


def test_svcca_needs_three_examples():
    with pytest.raises(ValueError, match="2 examples, expected 3 or more"):
        cca.svcca_similarity(jnp.ones((2, 2)), jnp.ones((2, 2)))


# Examples split over devices


@pytest.mark.variants(2)
@pytest.mark.parametrize(
    ("measure", "options"),
    [
        (cca.canonical_correlations, {}),
        (cca.cca_similarity, {"squared": True}),
        (cca.svcca_similarity, {"threshold": 0.9}),
        (cca.pwcca_similarity, {"symmetric": True}),
        (cca.ridge_cca, {"ridge": 0.3}),
        (cca.cca_distance, {}),
    ],
)
def test_split_over_devices(x64, measure, options):
    """On each device the value is that of all examples, in `pmap` and in `shard_map`."""
    x, y = (jnp.asarray(side[:16]) for side in correlated())
    expected = measure(x, y, **options)
    split = functools.partial(measure, axis_name="data", **options)
    mapped = jax.pmap(split, axis_name="data")(*(side.reshape(8, 2, -1) for side in (x, y)))
    for device in mapped:
        np.testing.assert_allclose(device, expected, rtol=1e-9, atol=1e-12)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(split, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P())
    np.testing.assert_allclose(jax.jit(sharded)(x, y), expected, rtol=1e-9, atol=1e-12)


def test_ridge_cca_splits_its_gradient(x64):
    x, y = (jnp.asarray(side[:16]) for side in correlated())
    expected = jax.jit(jax.grad(cca.ridge_cca))(x, y)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    grads = jax.shard_map(
        jax.grad(functools.partial(cca.ridge_cca, axis_name="data")),
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
    )
    np.testing.assert_allclose(jax.jit(grads)(x, y), expected, rtol=1e-8, atol=1e-12)
