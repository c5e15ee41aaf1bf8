"""Selection in both its forms, for few and for many entries, against a stable sort in NumPy.

What `masks.from_counts` makes of it is in `test_masks.py`.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ntt_sparse.pruning._select import LARGE, largest

# Rows of 256 entries and more, and leaves that are less than a row, empty, or one number.
SHAPES = [(12, 260), (3, 4), (2, 9, 2, 150), (0, 7), (), (301,)]
TOTAL = sum(int(np.prod(shape)) for shape in SHAPES)
# 1: the form for many entries, whatever there is.
FORMS = {"few": LARGE, "many": 1}


def parts(flat):
    """An array as leaves of those shapes."""
    pieces = np.split(flat, np.cumsum([int(np.prod(shape)) for shape in SHAPES])[:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, SHAPES, strict=True)]


def expected(flat, count):
    """The reference: NumPy's stable sort, which has NaN last, and both zeros as equal."""
    flat = np.asarray(flat).astype(np.float64)
    kept = np.zeros(flat.size, bool)
    kept[np.argsort(-flat, kind="stable")[:count]] = True
    return kept


def joined(leaves):
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in leaves])


def random_bits(rng, dtype):
    """Any numbers a float can be: denormals, both infinities and many NaN among them."""
    size = np.dtype(dtype).itemsize
    return rng.integers(0, 256, (TOTAL, size), np.uint8).view(dtype).reshape(TOTAL)


def distinct(rng, dtype):
    return rng.permutation(TOTAL).astype(np.float32).astype(dtype)


def few_values(rng, dtype):
    values = np.array([-np.inf, -2, -1e-40, -0.0, 0.0, 1e-40, 0.5, 1.0078125, np.inf, np.nan])
    return rng.choice(values, TOTAL).astype(dtype)


def tied_here_and_there(rng, dtype):
    """Each value a few times: ties are cut among few entries."""
    return rng.integers(0, TOTAL // 3, TOTAL).astype(np.float32).astype(dtype)


def equal(rng, dtype):
    return np.full(TOTAL, rng.normal(), dtype)


def tied_in_rows(rng, dtype):
    """Two of each value side by side: in one row, or the last of one and the first of the next."""
    pairs = np.repeat(rng.permutation(TOTAL // 2 + 1), 2)[rng.integers(2) :][:TOTAL]
    return pairs.astype(np.float32).astype(dtype)


KINDS = [random_bits, distinct, few_values, tied_here_and_there, equal, tied_in_rows]
FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64]


# Each form and each dtype.
@pytest.mark.variants(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_selection_equals_a_stable_sort(form, dtype):
    counts = st.integers(0, TOTAL) | st.sampled_from([0, 1, TOTAL - 1, TOTAL])

    @hypothesis.settings(deadline=None, max_examples=60)
    @hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS), counts)
    def check(seed, kind, count):
        flat = kind(np.random.default_rng(seed), np.dtype(dtype))
        leaves = [jnp.asarray(leaf) for leaf in parts(flat)]
        assert leaves[0].dtype == dtype
        selected = largest(leaves, count, large=FORMS[form])
        assert [(leaf.shape, leaf.dtype) for leaf in selected] == [(s, bool) for s in SHAPES]
        np.testing.assert_array_equal(joined(selected), expected(flat, count))

    with jax.enable_x64(dtype == jnp.float64):
        check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [distinct, few_values, tied_in_rows])
def test_every_count_of_members(form, kind):
    """Traced counts, members with scores of their own, and all counts of one."""
    rng = np.random.default_rng(0)
    flat = np.stack([kind(rng, np.dtype(np.float32))[:48] for _ in range(2)])
    leaves = [flat[:, :30].reshape(2, 5, 6), flat[:, 30:].reshape(2, 18)]
    select = functools.partial(largest, large=FORMS[form])
    counts = jnp.arange(49)
    of_all = jax.jit(jax.vmap(jax.vmap(select, (None, 0)), (0, None)))(leaves, counts)
    for member in range(2):
        for count in range(49):
            kept = joined([leaf[member, count] for leaf in of_all])
            np.testing.assert_array_equal(kept, expected(flat[member], count))


@pytest.mark.parametrize("form", FORMS)
def test_leaves_of_several_dtypes(form):
    rng = np.random.default_rng(1)
    flat = rng.normal(size=TOTAL).astype(jnp.bfloat16).astype(np.float32)
    dtypes = [jnp.bfloat16, jnp.float32, jnp.float16, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    leaves = [jnp.asarray(leaf, dtype) for leaf, dtype in zip(parts(flat), dtypes, strict=True)]
    values = joined([np.asarray(leaf).astype(np.float32) for leaf in leaves])
    for count in (1, 1000, TOTAL - 5):
        selected = largest(leaves, count, large=FORMS[form])
        np.testing.assert_array_equal(joined(selected), expected(values, count))


def test_a_tie_cut_between_rows():
    """The last entry of a row and the first of the next are equal: the first of them is kept."""
    flat = np.random.default_rng(5).permutation(40 * 256).astype(np.float32)
    flat[20 * 256] = flat[20 * 256 - 1]
    count = int(np.sum(flat > flat[20 * 256])) + 1
    (selected,) = largest([jnp.asarray(flat.reshape(40, 256))], count, large=1)
    np.testing.assert_array_equal(joined([selected]), expected(flat, count))


@pytest.mark.parametrize("values", ["distinct", "tied"])
def test_more_than_a_million(values):
    rng = np.random.default_rng(2)
    leaves = [rng.normal(size=shape).astype(np.float32) for shape in ((1500, 700), (3, 3, 64, 256))]
    if values == "tied":
        leaves = [np.round(leaf * 2000) / 2000 for leaf in leaves]
    flat = joined(leaves)
    assert flat.size >= LARGE
    for count in (1, 40_003, 900_000):
        np.testing.assert_array_equal(joined(largest(leaves, count)), expected(flat, count))


@pytest.mark.parametrize("form", FORMS)
def test_leaves_spread_over_devices(form):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(3)
    leaves = [rng.integers(0, 50, shape).astype(np.float32) for shape in ((8, 300), (4, 6, 512))]
    specs = [PartitionSpec("x", "y"), PartitionSpec("x", None, "y")]
    spread = [
        jax.device_put(leaf, NamedSharding(mesh, spec))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]
    for count in (0, 700, 5000):
        selected = largest(spread, count, large=FORMS[form])
        np.testing.assert_array_equal(joined(selected), expected(joined(leaves), count))


def test_members_spread_over_devices():
    mesh = jax.make_mesh((8,), ("member",), axis_types=(AxisType.Auto,))
    scores = np.random.default_rng(4).normal(size=(8, 30, 40)).astype(np.float32)
    counts = np.arange(8) * 150
    spread, each = (
        jax.device_put(x, NamedSharding(mesh, PartitionSpec("member"))) for x in (scores, counts)
    )
    (selected,) = jax.jit(jax.vmap(lambda s, n: largest([s], n, large=1)))(spread, each)
    assert selected.sharding.spec[0] == "member"
    for kept, own, count in zip(np.asarray(selected), scores, counts, strict=True):
        np.testing.assert_array_equal(kept.ravel(), expected(own.ravel(), count))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_no_copy_of_the_scores_is_made(form, batch):
    leaves = [jnp.ones((*batch, 600, 1024)), jnp.ones((*batch, 3, 3, 64, 256))]
    select = functools.partial(largest, large=FORMS[form])
    traced = jax.jit(jax.vmap(select, (0, None)) if batch else select)
    memory = traced.lower(leaves, jnp.int32(9)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.05 * sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_by(form):
    def kept(x):
        (mask,) = largest([jnp.abs(x)], 2, large=FORMS[form])
        return jnp.sum(jnp.where(mask, x, 0) ** 2)

    x = jnp.array([[3.0, -1.0], [-4.0, 2.0]])
    np.testing.assert_array_equal(jax.jit(jax.grad(kept))(x), [[6, 0], [-8, 0]])


def test_counts_out_of_range_keep_none_or_all():
    leaves = [jnp.arange(5.0)]
    for count, number in ((-3, 0), (9, 5)):
        assert int(largest(leaves, count)[0].sum()) == number


def test_too_many_entries():
    leaf = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match=r"2147483648 scores compete .* select within layers"):
        jax.eval_shape(largest, [leaf], 1)
