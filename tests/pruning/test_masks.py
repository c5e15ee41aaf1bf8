import warnings

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ntt_sparse.pruning import masks, rounds, saliency

SHAPES = {"a": (3, 4), "b": (2, 1, 5)}
SIZE = 22
# Few distinct values, so that most cuts fall among ties; both ends of every float format.
VALUES = [-np.inf, -2.0, -1.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 1.0, 1.0078125, 3e4, np.inf, np.nan]
COUNTS = st.integers(0, SIZE)


def score_trees(dtype):
    """Score trees of the fixed shapes, with `None` between the leaves."""

    def build(values):
        flat = jnp.asarray(np.array(values), dtype)
        return {"a": flat[:12].reshape(3, 4), "ab": None, "b": flat[12:].reshape(2, 1, 5)}

    return st.lists(st.sampled_from(VALUES), min_size=SIZE, max_size=SIZE).map(build)


def keep_largest(arrays, count):
    """The reference: a stable sort in float64; NumPy sorts NaN last."""
    arrays = [np.asarray(a).astype(np.float64) for a in arrays]
    order = np.argsort(-np.concatenate([a.ravel() for a in arrays]), kind="stable")
    kept = np.zeros(order.size, bool)
    kept[order[:count]] = True
    parts = np.split(kept, np.cumsum([a.size for a in arrays])[:-1])
    return [part.reshape(a.shape) for part, a in zip(parts, arrays, strict=True)]


def assert_same_masks(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == bool
        np.testing.assert_array_equal(a, e)


def kept(tree):
    return int(sum(leaf.sum() for leaf in jax.tree.leaves(tree)))


def random_scores(seed=0, shapes=SHAPES):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)}


# Selection against a stable sort


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_global_selection_equals_a_stable_sort(dtype):
    @hypothesis.settings(deadline=None)
    @hypothesis.given(score_trees(dtype), COUNTS)
    def check(scores, count):
        a, b = keep_largest([scores["a"], scores["b"]], count)
        assert_same_masks(masks.from_counts(scores, count), {"a": a, "ab": None, "b": b})

    check()


@pytest.mark.usefixtures("x64")
def test_global_selection_equals_a_stable_sort_in_float64():
    # Two values that float32 cannot tell apart.
    values = [*VALUES, 1.0 + 1e-12, 1e-310]

    def check(draw):
        scores = {"a": jnp.asarray(np.array(draw[:12]).reshape(3, 4)), "b": jnp.asarray(draw[12:])}
        assert scores["a"].dtype == jnp.float64
        for count in (1, 7, 15):
            a, b = keep_largest([scores["a"], scores["b"]], count)
            assert_same_masks(masks.from_counts(scores, count), {"a": a, "b": b})

    strategy = st.lists(st.sampled_from(values), min_size=SIZE, max_size=SIZE)
    hypothesis.settings(deadline=None)(hypothesis.given(strategy)(check))()


@hypothesis.settings(deadline=None)
@hypothesis.given(score_trees(jnp.float32), st.integers(0, 12), st.integers(0, 10))
def test_selection_by_layer_equals_a_stable_sort_of_each(scores, count_a, count_b):
    actual = masks.from_counts(scores, {"a": count_a, "ab": None, "b": count_b})
    (a,), (b,) = keep_largest([scores["a"]], count_a), keep_largest([scores["b"]], count_b)
    assert_same_masks(actual, {"a": a, "ab": None, "b": b})


def test_many_distinct_scores():
    scores = random_scores(shapes={"a": (300, 100), "b": (20_000,), "c": (1, 1)})
    for count in (1, 999, 25_000, 50_000):
        expected = dict(zip("abc", keep_largest(list(scores.values()), count), strict=True))
        assert_same_masks(masks.from_counts(scores, count), expected)


def test_scores_may_be_one_array_and_counts_may_be_all_or_none():
    scores = jnp.array([3.0, 1.0, 2.0])
    for count, expected in [(0, [0, 0, 0]), (2, [1, 0, 1]), (3, [1, 1, 1])]:
        assert_same_masks(masks.from_counts(scores, count), np.array(expected, bool))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_counts_under_jit_and_vmap(scope):
    scores = jax.tree.map(lambda *s: jnp.stack(s), *[random_scores(i) for i in range(3)])
    counts = jnp.array([0, 5, 10])
    tree = counts if scope == "global" else {"a": counts, "b": counts // 2}
    batched = jax.jit(jax.vmap(masks.from_counts))(scores, tree)
    for i in range(3):
        member = jax.tree.map(lambda leaf, i=i: leaf[i], scores)
        if scope == "global":
            a, b = keep_largest(list(member.values()), int(counts[i]))
        else:
            (a,) = keep_largest([member["a"]], int(counts[i]))
            (b,) = keep_largest([member["b"]], int(counts[i]) // 2)
        assert_same_masks(jax.tree.map(lambda leaf, i=i: leaf[i], batched), {"a": a, "b": b})


def test_new_scores_counts_and_masks_do_not_recompile(compilations):
    params = random_scores(7)

    @jax.jit
    def step(scores, count, params):
        return masks.apply(params, masks.from_counts(scores, count))

    step(random_scores(0), jnp.asarray(3), params)
    inputs = [(random_scores(i), jnp.asarray(i)) for i in (1, 2)]
    with compilations() as events:
        for scores, count in inputs:
            step(scores, count, params)
    assert events == []


def test_eager_selection_compiles_once(compilations):
    # Of a shape that no other test has.
    first, second = (
        {"a": jax.device_put(np.random.default_rng(seed).random((7, 37), np.float32))}
        for seed in (0, 1)
    )
    with compilations() as events:
        masks.from_scores(first, 0.3)
        assert events
        events.clear()
        masks.from_scores(second, 0.4)
        assert events == []


# Densities


@pytest.mark.parametrize(
    ("density", "scope", "expected"),
    [
        (0.25, "global", {"total": round(0.25 * 22)}),
        (1.0, "global", {"total": 22}),
        (0.25, "layer", {"a": 3, "b": 2}),  # round(2.5) is 2: half to even
        ({"a": 1.0, "b": 0.1}, "global", {"a": 12, "b": 1}),
        ({"a": 0.5, "b": 0.3}, "layer", {"a": 6, "b": 3}),
    ],
)
def test_counts_follow_densities(density, scope, expected):
    result = masks.from_scores(random_scores(), density, scope=scope)
    if "total" in expected:
        assert kept(result) == expected["total"]
    else:
        assert {name: kept(leaf) for name, leaf in result.items()} == expected


def test_global_and_layer_scope_select_differently():
    scores = {"a": jnp.arange(4.0) + 10, "b": jnp.arange(4.0)}
    everywhere = masks.from_scores(scores, 0.625)
    assert {n: kept(m) for n, m in everywhere.items()} == {"a": 4, "b": 1}
    layerwise = masks.from_scores(scores, 0.5, scope="layer")
    assert {n: kept(m) for n, m in layerwise.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_bad_densities_raise(density):
    with pytest.raises(ValueError, match=r"density is .*expected a fraction in \(0, 1\]"):
        masks.from_scores(random_scores(), density)
    with pytest.raises(ValueError, match=r"density of 'b' is .*expected a fraction"):
        masks.from_scores(random_scores(), {"a": 0.5, "b": density})


@pytest.mark.parametrize(
    "half", [np.float32(0.5), np.array(0.5), jnp.float32(0.5), jnp.bfloat16(0.5)]
)
def test_scalars_of_numpy_and_jax_are_densities(half):
    for density in (half, {"a": half, "b": half}):
        actual = masks.from_scores(random_scores(), density, scope="layer")
        assert {name: kept(leaf) for name, leaf in actual.items()} == {"a": 6, "b": 5}
    assert rounds.densities(half, 1) == [0.5]


def test_a_traced_density_says_what_to_do():
    with pytest.raises(ValueError, match=r"density is traced, .*by masks\.keep_counts outside"):
        jax.jit(lambda density: masks.from_scores(random_scores(), density))(0.5)


def test_densities_must_name_every_layer():
    with pytest.raises(ValueError, match=r"missing \['b'\], unknown \['c'\]"):
        masks.from_scores(random_scores(), {"a": 0.5, "c": 0.5})


def test_a_density_that_keeps_nothing_raises():
    with pytest.raises(ValueError, match="keeps none of 22 weights"):
        masks.from_scores(random_scores(), 0.01)


def test_scores_without_arrays_raise():
    with pytest.raises(ValueError, match="nothing to prune"):
        masks.from_scores({"a": None}, 0.5)
    for tree in ({"a": None}, {"a": jnp.zeros((0, 3), bool)}):
        for function in (masks.density, masks.format_layer_densities):
            with pytest.raises(ValueError, match="no density is defined"):
                function(tree)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_leaf_without_entries_counts_for_nothing(scope):
    scores = {"a": jnp.zeros((0, 3)), "b": jnp.arange(4.0)}
    actual = masks.from_scores(scores, 0.5, scope=scope)
    expected = {"a": np.zeros((0, 3), bool), "b": np.array([False, False, True, True])}
    assert_same_masks(actual, expected)
    assert masks.density(actual) == 0.5
    assert masks.format_layer_densities(actual).splitlines()[-1].split()[1:] == [
        "2",
        "4",
        "0.50000",
    ]


def test_an_empty_layer_warns():
    scores = {"a": jnp.ones(4), "b": jnp.zeros(4)}
    with pytest.warns(UserWarning, match="layers left without any weight: b"):
        masks.from_scores(scores, 0.5)


def test_scores_of_zero_that_are_partly_kept_warn():
    """What is then kept goes by its place: SNIP of a head that starts from zeros."""
    params = {"hidden": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "head": jnp.zeros((2, 2))}
    scores = saliency.snip(
        lambda p, x: jnp.sum((x @ p["hidden"] @ p["head"] - 1.0) ** 2), params, jnp.ones((1, 2))
    )
    with pytest.warns(UserWarning, match="weights of head, hidden were picked by their place"):
        layers = masks.from_scores(scores, 0.25, scope="layer")
    np.testing.assert_array_equal(layers["head"], [[True, False], [False, False]])
    scores = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([-0.0, 2.0])}
    with pytest.warns(UserWarning, match="weights of a were picked by their place"):
        masks.from_scores(scores, 0.75)


@pytest.mark.filterwarnings("error")
def test_zeros_that_are_all_kept_or_all_pruned_do_not_warn():
    scores = {"a": jnp.array([0.0, 1.0, 0.0, 2.0]), "b": jnp.array([3.0, -1.0, 0.0])}
    masks.from_scores(scores, 2 / 7)
    masks.from_scores(scores, 6 / 7)
    masks.from_scores(scores, {"a": 0.5, "b": 1.0})
    # Each layer by itself: all zeros of one are kept, all of the other are not.
    masks.from_scores(scores, {"a": 0.5, "b": 0.5})
    # Less than the smallest normal number is not zero, and ties of other scores are no error.
    masks.from_scores({"a": jnp.array([1e-40, 1e-41, 0.0])}, 2 / 3)
    masks.from_scores({"a": jnp.ones(4)}, 0.5)
    jax.jit(lambda: masks.from_scores({"a": jnp.zeros(4)}, 0.5))()


def test_integer_scores_and_foreign_counts_raise():
    with pytest.raises(ValueError, match="scores of 'a' are int32, expected floating point"):
        masks.from_counts({"a": jnp.arange(3)}, 1)
    with pytest.raises(ValueError, match="counts must be one integer or a tree like scores"):
        masks.from_counts(random_scores(), {"a": 1})
    for count in (-1, 4, jnp.int32(4)):
        with pytest.raises(ValueError, match=f"ask for {count} of 3 weights, expected 0 to 3"):
            masks.from_counts({"a": jnp.ones(3)}, {"a": count})
        with pytest.raises(ValueError, match=f"ask for {count} of 3 weights, expected 0 to 3"):
            masks.from_counts({"a": jnp.ones(3)}, count)
    with pytest.raises(ValueError, match=r"counts hold 2\.7, expected integers"):
        masks.from_counts({"a": jnp.ones(3)}, 2.7)
    several = jnp.array([1, 2])
    for counts in (several, {"a": several}):
        for select in (masks.from_counts, jax.jit(masks.from_counts)):
            with pytest.raises(ValueError, match=r"array of shape \(2,\), expected one integer"):
                select({"a": jnp.ones(3)}, counts)


def test_leaves_of_one_name_raise():
    params = {"a/b": jnp.ones((4, 4)), "a": {"b": jnp.ones((8, 8))}}
    with pytest.raises(ValueError, match="two leaves are named 'a/b', expected one"):
        masks.from_scores(saliency.magnitude(params), 0.5, scope="layer")
    # Haiku's names hold slashes, too.
    haiku = {"mlp/~/linear_0": {"w": jnp.ones(2)}, "mlp/~/linear_1": {"w": jnp.ones(2)}}
    assert list(masks.named_leaves(haiku)) == ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]


def test_nan_raises_eagerly_and_is_smallest_under_trace():
    scores = {"a": jnp.array([jnp.nan, -jnp.inf, 1.0])}
    with pytest.raises(ValueError, match="scores of 'a' hold NaN"):
        masks.from_scores(scores, 0.5)
    traced = jax.jit(lambda s: masks.from_scores(s, 2 / 3))(scores)
    assert_same_masks(traced, {"a": np.array([False, True, True])})


def test_constant_scores_within_a_trace():
    scores = random_scores()
    inside = jax.jit(lambda: masks.from_scores(scores, 0.5))()
    assert_same_masks(inside, masks.from_scores(scores, 0.5))


# Applying masks


def test_apply_keeps_none_leaves_and_structure():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "none": None}
    tree = {"kernel": jnp.array([[True, False], [False, True]]), "bias": None, "none": None}
    actual = masks.apply(params, tree)
    assert jax.tree.structure(actual) == jax.tree.structure(params)
    np.testing.assert_array_equal(actual["kernel"], np.eye(2))
    assert actual["bias"] is params["bias"]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pruned_infinity_and_nan_are_zero_with_zero_gradient(value, dtype):
    params = {"w": jnp.array([2.0, value], dtype)}
    tree = {"w": jnp.array([True, False])}

    def loss(params):
        return jnp.sum(masks.apply(params, tree)["w"] ** 2)

    effective, gradient = masks.apply(params, tree)["w"], jax.jit(jax.grad(loss))(params)["w"]
    assert effective.dtype == dtype
    np.testing.assert_array_equal(effective.astype(jnp.float32), [2.0, 0.0])
    np.testing.assert_array_equal(gradient.astype(jnp.float32), [4.0, 0.0])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": None}, "masks must have the structure of params"),
        ({"a": None, "b": None, "c": None}, "masks must have the structure of params"),
        (
            {"a": jnp.ones((4, 3), bool), "b": None},
            r"mask of 'a' is bool\(4, 3\), expected bool\(3",
        ),
        ({"a": jnp.ones((3, 4)), "b": None}, r"mask of 'a' is float32\(3, 4\), expected bool"),
        ({"a": 1.0, "b": None}, "mask of 'a' is float"),
        ({"a": {"x": jnp.ones(2, bool)}, "b": None}, "mask of 'a' is dict"),
    ],
)
def test_masks_that_do_not_fit_raise(tree, message):
    for function in (masks.apply, masks.check, masks.rescale):
        with pytest.raises(ValueError, match=message):
            function(random_scores(), tree)


def test_full_and_the_predicate():
    params = {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    assert_same_masks(masks.full(params), {"layer": {"kernel": np.ones((2, 3)), "bias": None}})
    biases = masks.full(params, prunable=lambda path, leaf: path == "layer/bias")
    assert_same_masks(biases, {"layer": {"kernel": None, "bias": np.ones(3)}})
    with pytest.raises(ValueError, match="no leaf is prunable among"):
        masks.full({"bias": jnp.ones(3)})


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.LayerNorm()(nn.Dense(4)(x))
        return nn.MultiHeadDotProductAttention(2)(x, x), None


def test_biases_and_scales_of_several_axes_are_not_prunable():
    """Of attention, of layers that are scanned over, and of members that are stacked."""
    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    x = jnp.ones((1, 5, 4))
    scanned = jax.eval_shape(stack().init, jax.random.key(0), x, None)["params"]
    members = jax.eval_shape(
        jax.vmap(lambda key: Layer().init(key, x, None)), jax.random.split(jax.random.key(0), 3)
    )["params"]
    for params in (scanned, members):
        assert {leaf.ndim for leaf in jax.tree.leaves(params)} == {2, 3, 4}
        names = set(masks.named_leaves(masks.map_prunable(lambda name, _: name, params)))
        assert names == {name for name in masks.named_leaves(params) if name.endswith("kernel")}


def test_predicates_see_through_the_variables_of_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(5, 4, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)

    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    assert "attention/query/bias/value" in masks.named_leaves(state)
    expected = {f"attention/{name}/kernel/value" for name in ("query", "key", "value", "out")}
    assert set(masks.named_leaves(masks.full(state, prunable=masks.kernels))) == expected
    expected |= {"embed/embedding/value"}
    assert set(masks.named_leaves(masks.full(state))) == expected
    masks.check(state, masks.full(state))


# Reports and rescaling

REPORTED = {
    "x": jnp.array([[True, False], [False, False]]),
    "y": None,
    "z": jnp.array([True, True, False, False]),
}


def test_density_and_report():
    assert masks.density(REPORTED) == 3 / 8
    assert jax.jit(masks.density)(REPORTED) == 3 / 8
    assert masks.layer_densities(REPORTED) == {"x": (1, 4, 0.25), "z": (2, 4, 0.5)}
    lines = masks.format_layer_densities(REPORTED).splitlines()
    assert [line.split() for line in lines] == [
        ["layer", "kept", "total", "density"],
        ["x", "1", "4", "0.25000"],
        ["z", "2", "4", "0.50000"],
        ["total", "3", "8", "0.37500"],
    ]


def test_a_report_of_traced_masks_raises():
    with pytest.raises(ValueError, match=r"mask of 'x' is traced, expected known values"):
        jax.jit(masks.layer_densities)(REPORTED)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float64, 1e-15), (jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)]
)
def test_rescale_divides_by_the_root_of_the_density(dtype, tolerance):
    params = {"x": jnp.full((2, 3), 1.5, dtype), "y": jnp.full(5, 7.0, dtype)}
    tree = {"x": jnp.array([[True, False, True], [False, False, False]]), "y": None}
    actual = masks.rescale(params, tree)
    # Two of six are kept: 1.5 / sqrt(2 / 6).
    expected = np.array([[1.5 * np.sqrt(3.0), 0, 1.5 * np.sqrt(3.0)], [0, 0, 0]])
    assert actual["x"].dtype == dtype
    np.testing.assert_allclose(actual["x"].astype(jnp.float64), expected, rtol=tolerance)
    assert actual["y"] is params["y"]


def test_rescale_of_an_empty_layer_is_zero():
    actual = masks.rescale({"x": jnp.ones((2, 2))}, {"x": jnp.zeros((2, 2), bool)})
    np.testing.assert_array_equal(actual["x"], np.zeros((2, 2)))


def test_a_fair_selection_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks.from_scores(random_scores(), 0.5)


# Gradients through masks


def test_pruned_weights_get_the_gradient_of_being_there():
    """That of the effective weights, where `apply` has zero; the value is that of `apply`."""
    params = {"w": jnp.array([[1.0, -2.0], [jnp.inf, 0.5]]), "b": jnp.ones(2)}
    kept_weights = {"w": jnp.array([[True, False], [False, True]]), "b": None}

    def loss(p):
        return jnp.sum((jnp.ones((3, 2)) @ p["w"] + p["b"] - 4.0) ** 2)

    effective = masks.apply(params, kept_weights)
    jax.tree.map(
        np.testing.assert_array_equal, masks.straight_through(params, kept_weights), effective
    )
    expected = jax.grad(loss)(effective)
    got = jax.jit(jax.grad(lambda p: loss(masks.straight_through(p, kept_weights))))(params)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    plain = jax.grad(lambda p: loss(masks.apply(p, kept_weights)))(params)
    np.testing.assert_array_equal(plain["w"], jnp.where(kept_weights["w"], expected["w"], 0))
    with pytest.raises(ValueError, match="masks must have the structure of params"):
        masks.straight_through(params, {"w": kept_weights["w"]})
