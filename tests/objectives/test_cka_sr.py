"""CKA-SR against the published loop over pairs in float64, and its own laws."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from ntt_sparse.objectives.cka_sr import aug_cka_sr, cka_sr, every_nth_batch

OPTIONS = ("samples", "debiased", "similarity")


def maps(*shapes, n=10, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, *shape)) + 0.5 for shape in shapes]


def arrays(features):
    return [jnp.asarray(x) for x in features]


def hsic(x, y, debiased):
    x, y, n = x.reshape(len(x), -1), y.reshape(len(y), -1), len(x)
    k, m = x @ x.T, y @ y.T
    if not debiased:
        h = np.eye(n) - 1 / n
        return np.sum((h @ k @ h) * (h @ m @ h))
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    total = np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2))
    return total - 2 / (n - 2) * (k @ m).sum()


def pair_sum(features, samples, debiased):
    """The published listing: a loop over pairs i < j, twice."""
    features = [x[:samples] for x in features]
    total = 0.0
    for i in range(len(features)):
        for j in range(i + 1, len(features)):
            x, y = features[i], features[j]
            own = hsic(x, x, debiased) * hsic(y, y, debiased)
            total += 2 * hsic(x, y, debiased) / np.sqrt(own)
    return total


@functools.partial(jax.jit, static_argnums=0, static_argnames=OPTIONS)
def total_of(objective, features, **options):
    return objective(features, **options)


STAGES = [((6,), (4, 4, 2), (30,)), ((5, 5), (3,))]


@pytest.mark.variants(2)
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("samples", [None, 8])
def test_against_the_loop_over_pairs(x64, samples, debiased):
    stages = [maps(*shapes, seed=i) for i, shapes in enumerate(STAGES)]
    options = {"samples": samples, "debiased": debiased}
    value = total_of(cka_sr, [arrays(stage) for stage in stages], **options)
    expected = sum(pair_sum(stage, samples, debiased) for stage in stages)
    assert float(value) == pytest.approx(expected, rel=1e-11)
    features = [x for stage in stages for x in stage]
    value = total_of(aug_cka_sr, arrays(features), **options)
    assert float(value) == pytest.approx(pair_sum(features, samples, debiased) / 20, rel=1e-11)


@pytest.mark.variants(4)
@pytest.mark.parametrize("similarity", ["cka", "cca"])
@pytest.mark.parametrize("count", [2, 3, 9])
def test_identical_maps(count, similarity):
    same = arrays(maps((7,))) * count
    assert float(aug_cka_sr(same, similarity=similarity)) == pytest.approx(1.0, abs=1e-5)
    total = cka_sr([same, same], similarity=similarity)
    assert float(total) == pytest.approx(2 * count * (count - 1), rel=1e-5)


@pytest.mark.variants(2)
@pytest.mark.parametrize(
    "options",
    [{}, {"debiased": True}, {"samples": 5}, {"similarity": "cca"}],
    ids=["plain", "debiased", "samples", "cca"],
)
def test_gradients_are_those_of_finite_differences(x64, options):
    features = maps((2, 3), (20,))

    @jax.jit
    def value(*features):
        return aug_cka_sr([*features], **options) + cka_sr([[*features]], **options)

    check_grads(value, features, order=1, modes=("fwd", "rev"), rtol=1e-6)


def test_rows_beyond_the_samples_have_no_gradient():
    features = arrays(maps((6,), (5,)))
    for grad in jax.jit(jax.grad(lambda f: aug_cka_sr(f, samples=4)))(features):
        assert np.all(np.any(grad[:4] != 0, axis=1))
        assert not np.any(grad[4:])


@pytest.mark.parametrize("debiased", [False, True])
def test_float32_and_half_precision(debiased):
    features = maps((40,), (300,), (9,), n=32)
    exact = pair_sum(features, None, debiased)
    single = total_of(cka_sr, [[jnp.asarray(x, jnp.float32) for x in features]], debiased=debiased)
    assert single.dtype == jnp.float32
    # Absolute to the number of pairs: debiased similarities may cancel.
    assert float(single) == pytest.approx(exact, abs=6e-6)
    half = [jnp.asarray(x, jnp.bfloat16) for x in features]
    exact = pair_sum([np.asarray(x, float) for x in half], None, debiased)
    value = total_of(cka_sr, [half], debiased=debiased)
    assert float(value) == pytest.approx(exact, abs=6e-6)


@pytest.mark.parametrize("similarity", ["cka", "cca"])
def test_a_dead_layer_takes_no_part(similarity):
    alive, dead = arrays(maps((6,), (5,))), jnp.full((10, 4), 0.3)

    def value(alive, dead):
        return cka_sr([[*alive, dead, jnp.zeros((10, 2))]], similarity=similarity)

    def expected(alive):
        return cka_sr([alive], similarity=similarity)

    total, grads = jax.jit(jax.value_and_grad(value, (0, 1)))(alive, dead)
    expected_total, expected_grads = jax.jit(jax.value_and_grad(expected))(alive)
    assert float(total) == pytest.approx(float(expected_total), rel=1e-5)
    assert not np.any(grads[1])
    for ours, theirs in zip(grads[0], expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_all_layers_dead():
    dead = [jnp.zeros((6, 3)), jnp.ones((6, 2))]
    value, grads = jax.jit(jax.value_and_grad(aug_cka_sr))(dead)
    assert value == 0
    assert not any(np.any(grad) for grad in grads)


@pytest.mark.variants(1)
@pytest.mark.parametrize(("samples", "options"), [(3, {}), (None, {}), (12, {"similarity": "cca"})])
def test_split_over_devices(x64, samples, options):
    """Value and gradient of the global batch and of its first samples."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 3)))
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(3, 5)))

    def loss(w, x, **axis):
        features = [jnp.tanh(x @ w), jnp.sin(x @ w), x @ w[:, :2] ** 2]
        return aug_cka_sr(features, samples=samples, **options, **axis)

    expected = jax.jit(jax.value_and_grad(loss))(weights, x)
    spread = functools.partial(loss, axis_name="data")

    def parallel(w, x):
        value, grad = jax.value_and_grad(spread)(w, x)
        return value, jax.lax.pmean(grad, "data")

    mapped = jax.pmap(parallel, axis_name="data", in_axes=(None, 0))(weights, x.reshape(8, 2, 3))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        jax.value_and_grad(spread), mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    sharded = jax.jit(sharded)(weights, x)
    for theirs, all_devices, ours in zip(expected, mapped, sharded, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
        for device in all_devices:
            np.testing.assert_allclose(device, theirs, rtol=1e-10, atol=1e-12)


def test_cca_compares_averages_over_positions(x64):
    """Channels are features, not pixels, of which there are more than examples."""
    rng = np.random.default_rng(3)
    features = [jnp.asarray(rng.normal(size=(12, *shape))) for shape in ((4, 4, 3), (2, 5, 4))]
    pooled = [jnp.asarray(np.mean(x, (1, 2))) for x in features]
    value, expected = (total_of(aug_cka_sr, x, similarity="cca") for x in (features, pooled))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert 0 < value < 0.9


def test_no_array_over_pairs_of_layers():
    """Cost and memory are linear in the number of layers."""
    layers = 40
    jaxpr = jax.make_jaxpr(jax.grad(aug_cka_sr))([jnp.ones((8, 30))] * layers)
    assert f"[{layers},{layers}]" not in str(jaxpr)
    # One product for each Gram matrix and its derivative, and one in the branch that centres
    # first.
    assert len(list(products(jaxpr.jaxpr))) == 3 * layers


def products(jaxpr):
    """The matrix products of a program and of the programs in it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        inner = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        )
        for value in inner:
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from products(value)


def test_batches_in_between_do_no_work():
    features = arrays(maps((6,), (5,)))

    def loss(features, step, every):
        return every_nth_batch(aug_cka_sr, features, step, every)

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    expected = jax.jit(jax.value_and_grad(aug_cka_sr))(features)
    for step in range(7):
        value, grads = value_and_grad(features, jnp.int32(step), 3)
        due = step % 3 == 0
        np.testing.assert_allclose(value, expected[0] if due else 0.0, rtol=1e-6)
        for ours, theirs in zip(grads, expected[1], strict=True):
            np.testing.assert_allclose(ours, theirs if due else 0 * theirs, rtol=1e-5, atol=1e-7)
    # Every product is inside a branch, also where members share the step.
    members = jax.vmap(jax.grad(loss), (0, None, None))
    several = [jnp.stack([x, 2 * x]) for x in features]
    for every, conditional in ((3, True), (1, False)):
        outside = [
            equation.primitive.name
            for equation in jax.make_jaxpr(members, static_argnums=2)(
                several, jnp.int32(1), every
            ).eqns
        ]
        assert ("dot_general" in outside) == (not conditional)
        assert ("cond" in outside) == conditional


def test_members_of_other_coefficients(x64):
    """Together they are what they are one by one."""
    features = [jnp.asarray(x).reshape(2, 5, -1) for x in maps((6,), (4,))]
    coefficients = jnp.asarray([0.5, 0.0])

    def loss(features, coefficient):
        return coefficient * aug_cka_sr(features)

    gradient = jax.jit(jax.grad(loss))
    together = jax.jit(jax.vmap(jax.grad(loss)))(features, coefficients)
    for member in (0, 1):
        alone = gradient([x[member] for x in features], coefficients[member])
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_allclose(ours[member], theirs, rtol=1e-10, atol=1e-14)
    assert not any(np.any(grad[1]) for grad in together)


def test_counts_may_be_numbers_of_numpy():
    features = arrays(maps((6,), (5,)))
    assert aug_cka_sr(features, samples=np.int64(8)) == aug_cka_sr(features, samples=8)
    term = every_nth_batch(aug_cka_sr, features, jnp.int32(2), np.int64(2))
    np.testing.assert_allclose(term, aug_cka_sr(features), rtol=1e-6)
    for count in (2.0, "8", None):
        with pytest.raises(ValueError, match=f"every={count!r}, expected 1"):
            inspect.unwrap(every_nth_batch)(aug_cka_sr, features, jnp.int32(2), count)
    with pytest.raises(ValueError, match=r"samples=8.0: expected three"):
        inspect.unwrap(aug_cka_sr)(features, samples=8.0)


def test_bad_input():
    x, y = arrays(maps((3,), (4,)))
    cases = [
        (lambda: cka_sr([]), "needs one stage or more, there are none"),
        (lambda: cka_sr([[x, y], [x]]), "stage 2 has 1 feature maps, expected two or more"),
        (lambda: aug_cka_sr([x]), "AugCKA-SR has 1 feature maps, expected two or more"),
        (lambda: aug_cka_sr([x, y[:5]]), r"feature maps of \[10, 5\] examples"),
        (lambda: aug_cka_sr([x, y], samples=11), "samples=11 of each batch .* the batch has 10"),
        (lambda: aug_cka_sr([x, y], samples=2), "samples=2: expected three examples or more"),
        (lambda: cka_sr([[x, y], [x[:5], y[:5]]]), r"stages have feature maps of \[10, 5\]"),
        (lambda: cka_sr([x, y]), r"stage 1 is an array of shape \(10, 3\)"),
        (lambda: aug_cka_sr(x), r"AugCKA-SR is an array of shape \(10, 3\)"),
        (lambda: aug_cka_sr([x, y], samples=3, debiased=True), "samples=3: .* four or more"),
        (lambda: aug_cka_sr([x[:3], y[:3]], debiased=True), "four examples or more, there are 3"),
        (lambda: aug_cka_sr([x[:2], y[:2]]), "AugCKA-SR has feature maps of 2 examples, expected"),
        (lambda: aug_cka_sr([x[:1], y[:1]]), "of 1 examples, expected three or more"),
        (lambda: cka_sr([[x[:2], y[:2]]], similarity="cca"), "stage 1 has feature maps of 2"),
        (
            lambda: aug_cka_sr([x, y], debiased=True, similarity="cca"),
            "there is no debiased CCA",
        ),
        (lambda: every_nth_batch(aug_cka_sr, [x, y], jnp.int32(0), 0), "every=0, expected 1"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
