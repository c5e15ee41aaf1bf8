import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.pruning import densities, masks, saliency


def resnet20(num_classes):
    """Shapes of the CIFAR ResNet-20 with 1x1 projection shortcuts."""
    shapes = {"conv": (3, 3, 3, 16)}
    for stage, (before, width) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
        for block in range(3):
            inputs = before if block == 0 else width
            shapes[f"b{stage}.{block}.c1"] = (3, 3, inputs, width)
            shapes[f"b{stage}.{block}.c2"] = (3, 3, width, width)
        if before != width:
            shapes[f"b{stage}.shortcut"] = (1, 1, before, width)
    shapes["fc"] = (64, num_classes)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return {**params, "bias": jax.ShapeDtypeStruct((num_classes,), jnp.float32)}


COLUMNS = ["conv", "b1.2.c2", "b2.0.c1", "b2.shortcut", "b2.1.c1"]
COLUMNS += ["b3.0.c1", "b3.shortcut", "b3.2.c2", "fc"]
# Computed by hand from the published algorithm, rounded to 4 decimals.
GOLDEN = [
    (100, 0.10, [0.9293, 0.2648, 0.1882, 1.0, 0.1220, 0.0889, 0.7684, 0.0584, 0.4115]),
    (100, 0.05, [0.4598, 0.1310, 0.0931, 0.7759, 0.0603, 0.0440, 0.3802, 0.0289, 0.2036]),
    (100, 0.02, [0.1839, 0.0524, 0.0372, 0.3104, 0.0241, 0.0176, 0.1521, 0.0116, 0.0814]),
    (100, 0.002, [0.0184, 0.0052, 0.0037, 0.0310, 0.0024, 0.0018, 0.0152, 0.0012, 0.0081]),
    (10, 0.05, [0.4748, 0.1353, 0.0961, 0.8012, 0.0623, 0.0454, 0.3926, 0.0298, 0.9486]),
]


def total_density(params, layer_densities):
    sizes = {n: leaf.size for n, leaf in params.items() if n in layer_densities}
    kept = sum(layer_densities[name] * size for name, size in sizes.items())
    return kept / sum(sizes.values())


@pytest.mark.parametrize(("classes", "density", "expected"), GOLDEN)
def test_erk_of_resnet20(classes, density, expected):
    params = resnet20(classes)
    total = {10: 270_896, 100: 276_656}[classes]
    assert sum(p.size for n, p in params.items() if n != "bias") == total
    actual = densities.erk(params, density)
    assert "bias" not in actual
    np.testing.assert_allclose([actual[c] for c in COLUMNS], expected, rtol=0, atol=5e-5)
    assert total_density(params, actual) == pytest.approx(density, abs=1e-6)
    assert all(0.0 < value <= 1.0 for value in actual.values())


SHAPE = st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(SHAPE, min_size=1, max_size=6), st.floats(1e-4, 1.0))
def test_erk_meets_the_density_within_range(shapes, density):
    params = {str(i): jax.ShapeDtypeStruct(s, jnp.float32) for i, s in enumerate(shapes)}
    actual = densities.erk(params, density)
    assert list(actual) == list(params)
    assert all(0.0 < value <= 1.0 for value in actual.values())
    assert total_density(params, actual) == pytest.approx(density, rel=1e-6)
    # Layers that are not dense are proportional to sum(shape) / prod(shape).
    ratios = [v / (sum(s) / np.prod(s)) for v, s in zip(actual.values(), shapes, strict=True)]
    sparse = [r for r, v in zip(ratios, actual.values(), strict=True) if v < 1.0]
    if sparse:
        np.testing.assert_allclose(sparse, sparse[0], rtol=1e-9)
        assert max(ratios) <= max(sparse) * (1 + 1e-9)


def test_the_capacity_check_runs_more_than_once():
    # N = 512 and sum(shape) is 5, 6, 12, 51. At d = .3 the budget is 153.6 and
    # eps = 153.6 / 74 = 2.076, so that the first layer (p = 1.25) is dense; without it
    # eps = 149.6 / 69 = 2.168, so that the second (p = .75) is dense too; then
    # eps = 141.6 / 63 = 2.248 leaves .843 and .245.
    shapes = {"a": (1, 4), "b": (2, 4), "c": (4, 8), "d": (12, 39)}
    raw = {name: sum(s) / np.prod(s) for name, s in shapes.items()}
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    eps = (0.3 * 512 - 4 - 8) / (12 + 51)
    actual = densities.erk(params, 0.3)
    expected = {"a": 1.0, "b": 1.0, "c": eps * raw["c"], "d": eps * raw["d"]}
    assert actual == pytest.approx(expected, rel=1e-12)


def test_uniform_and_its_predicate():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4), "c": jnp.ones((1, 1))}
    assert densities.uniform(params, 0.25) == {"a": 0.25, "c": 0.25}
    chosen = densities.uniform(params, 0.25, prunable=lambda path, leaf: path == "b")
    assert chosen == {"b": 0.25}


@pytest.mark.parametrize("distribution", [densities.uniform, densities.erk])
def test_density_one_is_dense(distribution):
    assert set(distribution(resnet20(10), 1.0).values()) == {1.0}


@pytest.mark.parametrize("distribution", [densities.uniform, densities.erk])
@pytest.mark.parametrize("density", [0.0, -1.0, 1.01, float("nan")])
def test_bad_densities_raise_before_any_work(distribution, density):
    def never(path, leaf):
        raise AssertionError("the predicate was asked")

    with pytest.raises(ValueError, match=r"expected a fraction in \(0, 1\]"):
        distribution({"a": jnp.ones((2, 2))}, density, prunable=never)


def test_erk_leaves_out_what_has_no_entries():
    params = {"a": jnp.zeros((0, 3)), "b": jnp.zeros((4, 3)), "c": jnp.zeros((2, 2))}
    expected = densities.erk({name: params[name] for name in "bc"}, 0.5)
    assert densities.erk(params, 0.5) == {"a": 1.0, **expected}
    with pytest.raises(ValueError, match=r"prunable are \['a'\], which have no entries"):
        densities.erk({"a": params["a"]}, 0.5)


@pytest.mark.parametrize("distribution", [densities.uniform, densities.erk])
def test_from_scores_takes_the_densities(distribution):
    params = {"a": jnp.ones((20, 10)), "bias": jnp.ones(10), "b": jnp.ones((100, 30))}
    wanted = distribution(params, 0.2)
    scores = saliency.random(jax.random.key(0), params)
    report = masks.layer_densities(masks.from_scores(scores, wanted))
    assert {n: row.kept for n, row in report.items()} == {
        n: round(wanted[n] * params[n].size) for n in ("a", "b")
    }


# Densities of given masks


def kept(selected):
    return {name: row.kept for name, row in masks.layer_densities(selected).items()}


@st.composite
def layers(draw):
    """Sizes and kept counts of a few layers, some empty, not all."""
    # A few sizes only: every other one compiles a program.
    sizes = draw(st.lists(st.sampled_from([1, 3, 49, 10_007]), min_size=1, max_size=5))
    counts = [draw(st.integers(0, size)) for size in sizes]
    hypothesis.assume(any(counts))
    return sizes, counts


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(layers())
@pytest.mark.filterwarnings("ignore:layers left without any weight")
def test_from_masks_gives_the_counts_back(drawn):
    sizes, counts = drawn
    given = {
        str(i): np.random.default_rng(i).permutation(np.arange(size) < count).reshape(1, size)
        for i, (size, count) in enumerate(zip(sizes, counts, strict=True))
    }
    wanted = densities.from_masks({**given, "bias": None})
    assert all(0.0 < value <= 1.0 for value in wanted.values())
    assert [round(wanted[str(i)] * size) for i, size in enumerate(sizes)] == counts
    assert sum(wanted[str(i)] * size for i, size in enumerate(sizes)) == pytest.approx(sum(counts))
    # Scores rise with the index, so that other places are kept than in the masks given.
    scores = {name: jnp.arange(mask.size, dtype=float)[None] for name, mask in given.items()}
    assert list(kept(masks.from_scores(scores, wanted)).values()) == counts


def test_random_masks_with_the_densities_of_snip():
    params = {"a": jnp.ones((20, 10)), "bias": jnp.ones(10), "b": jnp.ones((10, 30))}
    weights = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape), params)
    snip_masks = masks.from_scores(
        saliency.snip(lambda p, x: jnp.sum((x @ p["a"] @ p["b"]) ** 2), weights, jnp.ones((4, 20))),
        0.1,
    )
    drawn = saliency.random(jax.random.key(1), params)
    random_masks = masks.from_scores(drawn, densities.from_masks(snip_masks))
    assert kept(random_masks) == kept(snip_masks)
    assert kept(snip_masks)["a"] / 200 != pytest.approx(kept(snip_masks)["b"] / 300)
    assert np.any(random_masks["a"] != snip_masks["a"])


def test_an_empty_layer_stays_empty_with_a_warning():
    given = {"a": jnp.zeros((2, 3), bool), "b": jnp.array([[True, False, True, True]])}
    wanted = densities.from_masks(given)
    assert wanted["b"] == 0.75
    assert 0.0 < wanted["a"] < 1e-300
    scores = {"a": jnp.ones((2, 3)), "b": jnp.ones((1, 4))}
    with pytest.warns(UserWarning, match="layers left without any weight: a"):
        assert kept(masks.from_scores(scores, wanted)) == {"a": 0, "b": 3}


def test_masks_that_are_empty_throughout_are_refused_by_from_scores():
    wanted = densities.from_masks({"a": jnp.zeros((2, 3), bool)})
    with pytest.raises(ValueError, match="keeps none of 6 weights"):
        masks.from_scores({"a": jnp.ones((2, 3))}, wanted)


def test_from_masks_refuses_what_is_no_mask():
    with pytest.raises(ValueError, match="masks hold no array"):
        densities.from_masks({"a": None})
    with pytest.raises(ValueError, match="mask of 'a' is float32, expected bool"):
        densities.from_masks({"a": jnp.ones((2, 3))})
