import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from made_sets import load_arrays, make_arrays, refused, save_npz

from ntt_sparse.data import images, npz

# --- digits -----------------------------------------------------------------------------


def test_digits():
    data = images.load("digits")
    assert data.name == "digits" and data.num_classes == 10 and data.input_shape == (8, 8, 1)
    assert data.train.x.shape == (1293, 8, 8, 1)
    assert data.validation.x.shape == (144, 8, 8, 1)
    assert data.test.x.shape == (360, 8, 8, 1)
    assert data.train.x.dtype == np.float32 and data.train.y.dtype == np.int32
    np.testing.assert_allclose(data.mean, [4.88938544], rtol=1e-8)
    np.testing.assert_allclose(data.std, [6.02075369], rtol=1e-8)
    assert data.test.y[:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]
    assert np.bincount(data.test.y).tolist() == [27, 35, 36, 29, 30, 40, 44, 39, 39, 41]


def test_digits_parts_are_all_digits_once():
    from sklearn.datasets import load_digits

    data = images.load("digits", dtype=np.float64)
    x = np.concatenate([split.x for split in (data.train, data.validation, data.test)])
    pixels = np.rint(x[..., 0] * data.std + data.mean).reshape(1797, 64)
    expected = load_digits().images.reshape(1797, 64)
    np.testing.assert_array_equal(np.unique(pixels, axis=0), np.unique(expected, axis=0))


# --- standardisation --------------------------------------------------------------------


def test_standardised_over_the_whole_training_split(tmp_path):
    made = make_arrays()
    x, y = made["train"]
    data = load_arrays(tmp_path, validation_fraction=0.25)
    mean = x.astype(np.float64).mean((0, 1, 2))
    std = x.astype(np.float64).std((0, 1, 2))
    np.testing.assert_allclose(data.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(data.std, std, rtol=1e-12)
    train, held_out = images.split_indices(len(x), 0.25)
    for split, x_raw, y_raw in (
        (data.train, x[train], y[train]),
        (data.validation, x[held_out], y[held_out]),
        (data.test, *made["test"]),
    ):
        np.testing.assert_allclose(split.x, (x_raw - mean) / std, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(split.y, y_raw)
        assert split.x.dtype == np.float32 and split.y.dtype == np.int32
    assert data.name == "made" and data.num_classes == 4 and data.input_shape == (5, 7, 3)


def test_test_pixels_do_not_change_the_inputs(tmp_path):
    plain = load_arrays(tmp_path)
    bright = load_arrays(tmp_path, x_test=np.full((12, 5, 7, 3), 255, np.uint8))
    np.testing.assert_array_equal(plain.mean, bright.mean)
    np.testing.assert_array_equal(plain.train.x, bright.train.x)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtype(tmp_path, dtype):
    data = load_arrays(tmp_path, dtype=dtype)
    assert {data.train.x.dtype, data.validation.x.dtype, data.test.x.dtype} == {np.dtype(dtype)}
    x = np.concatenate([data.train.x, data.validation.x]).astype(np.float64)
    tolerance = {2: 1e-3, 4: 1e-6, 8: 1e-13}[np.dtype(dtype).itemsize]
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=tolerance)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=tolerance)


def test_bfloat16_is_float32_rounded(tmp_path):
    single, half = load_arrays(tmp_path), load_arrays(tmp_path, dtype=jnp.bfloat16)
    assert half.train.x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.train.x, single.train.x.astype(jnp.bfloat16))


def test_large_offsets_keep_their_detail(tmp_path):
    # At 1e9 neighbouring float32 numbers are 64 apart, far more than the spread of 1.
    x = np.random.RandomState(0).randn(40, 5, 7, 3) + 1e9
    data = load_arrays(tmp_path, x=x, validation_fraction=0.0)
    expected = (x - x.mean((0, 1, 2))) / x.std((0, 1, 2))
    np.testing.assert_allclose(data.train.x, expected, atol=1e-4)


def test_integer_dtype_is_refused(tmp_path):
    refused(tmp_path, "dtype is int32, expected floating", dtype=np.int32)


@settings(deadline=None, max_examples=30)
@given(
    x=hnp.arrays(
        np.uint8, st.tuples(st.integers(2, 4), *[st.integers(1, 5)] * 2, st.integers(1, 3))
    )
)
def test_statistics_agree_with_numpy_or_say_constant(x):
    std = x.astype(np.float64).std((0, 1, 2))
    if (std == 0).any():
        with pytest.raises(ValueError, match="are constant"):
            images.channel_statistics(x)
    else:
        mean, result = images.channel_statistics(x)
        np.testing.assert_allclose(mean, x.astype(np.float64).mean((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(result, std, rtol=1e-12)


def test_statistics_cross_chunks():
    # More images than one chunk, and a last chunk that is not full.
    x = np.random.RandomState(0).randint(0, 256, (2500, 2, 3, 2)).astype(np.uint8)
    mean, std = images.channel_statistics(x)
    np.testing.assert_allclose(mean, x.reshape(-1, 2).mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, x.reshape(-1, 2).std(0), rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 255.0])
def test_constant_channels_are_named(tmp_path, value):
    x = make_arrays()["train"][0].astype(np.float64)
    x[..., 1] = value
    refused(tmp_path, rf"channels \[1\] are constant \({value:g}\)", x=x)


# --- validation split -------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(10, 400),
    fractions=st.tuples(st.floats(0.1, 0.9), st.floats(0.1, 0.9)),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_smaller_validation_set_is_a_prefix_of_a_larger_one(n, fractions, seed):
    (_, small), (train, large) = (images.split_indices(n, f, seed) for f in sorted(fractions))
    np.testing.assert_array_equal(small, large[: len(small)])
    assert len(large) == round(max(fractions) * n)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, large])), np.arange(n))
    assert (np.diff(train) > 0).all()


def test_the_split_is_frozen():
    _, validation = images.split_indices(60_000, 0.002)
    assert len(validation) == 120
    assert validation[:5].tolist() == [13131, 14170, 37932, 50105, 40269]
    assert images.split_indices(60_000, 0.002, seed=10)[1][:5].tolist() != validation[:5].tolist()


def test_seed_reaches_the_split(tmp_path):
    labels = np.arange(40)
    options = {"y": labels, "y_test": labels[:12], "validation_fraction": 0.5}
    default, other = (load_arrays(tmp_path, seed=seed, **options) for seed in (9, 10))
    np.testing.assert_array_equal(default.validation.y, images.split_indices(40, 0.5, 9)[1])
    np.testing.assert_array_equal(other.validation.y, images.split_indices(40, 0.5, 10)[1])


def test_without_validation_the_stored_order_is_kept(tmp_path):
    data = load_arrays(tmp_path, validation_fraction=0.0)
    assert data.validation.x.shape == (0, 5, 7, 3) and data.validation.y.shape == (0,)
    np.testing.assert_array_equal(data.train.y, make_arrays()["train"][1])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_fraction_out_of_range(tmp_path, fraction):
    refused(tmp_path, r"expected a fraction in \[0, 1\)", validation_fraction=fraction)


def test_fraction_that_empties_a_part(tmp_path):
    refused(tmp_path, "holds out none of 40 training images", validation_fraction=0.01)
    refused(tmp_path, "leaves none of 40 images to train on", validation_fraction=0.99)


# --- files ------------------------------------------------------------------------------


def test_npz_by_text_and_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_npz(tmp_path / "made.npz", make_arrays())
    by_path, by_text = images.load(tmp_path / "made.npz"), images.load("~/made.npz")
    np.testing.assert_array_equal(by_path.train.x, by_text.train.x)


def test_missing_and_damaged_npz(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image set at .*absent\.npz"):
        images.load(tmp_path / "absent.npz")
    np.save(tmp_path / "made.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"made\.npy is a file, expected one that ends in \.npz"):
        images.load(tmp_path / "made.npy")
    with pytest.raises(FileNotFoundError, match=r"no image set at .*absent\.npy: expected"):
        images.load(tmp_path / "absent.npy")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"bad\.npz cannot be read"):
        images.load(tmp_path / "bad.npz")


# --- subset -----------------------------------------------------------------------------


def numbered(labels):
    """A split whose pixels are the positions of the examples."""
    x = np.arange(len(labels), dtype=np.float32).reshape(-1, 1, 1, 1)
    return images.Split(x, np.asarray(labels, np.int32))


def test_subset_takes_the_first_of_each_class():
    split = numbered([3, 7, 7, 1, 3, 7, 3, 7])
    result = images.subset(split, (7, 3), 2)
    assert result.x.shape == (4, 1, 1, 1) and result.y.dtype == np.int32
    pairs = dict(zip(result.x.ravel().tolist(), result.y.tolist(), strict=True))
    assert pairs == {1: 0, 2: 0, 0: 1, 4: 1}


def test_subset_is_shuffled_by_its_seed():
    split = numbered(np.arange(200) % 2)
    first, again, other = (images.subset(split, (0, 1), 50, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.x, again.x)
    assert not np.array_equal(first.y, other.y)
    assert 10 < first.y[:50].sum() < 40
    for result in (first, other):
        np.testing.assert_array_equal(np.sort(result.x.ravel()), np.arange(100))
        np.testing.assert_array_equal(result.y, result.x.ravel() % 2)


@pytest.mark.parametrize(
    "classes, per_class, message",
    [
        ((0, 1), 3, r"class 1 has 2 examples of 3 asked for, among 5 with labels \[0, 1\]"),
        ((0, 4), 1, "class 4 has 0 examples"),
        ((0, 0), 1, "distinct classes"),
        ((), 1, "one or more"),
        ((0,), 0, "at least one example"),
    ],
)
def test_subset_refuses(classes, per_class, message):
    with pytest.raises(ValueError, match=message):
        images.subset(numbered([0, 1, 0, 1, 0]), classes, per_class)


# --- weight -----------------------------------------------------------------------------


def test_the_import_is_light():
    code = (
        "import sys, ntt_sparse.data.images\n"
        "heavy = {'jax', 'sklearn', 'tensorflow', 'tensorflow_datasets', 'PIL', 'matplotlib'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (result.stdout.strip(), result.stderr) == ("", "")


def test_npz_needs_only_numpy(tmp_path):
    save_npz(tmp_path / "made.npz", make_arrays())
    code = (
        "import os, sys\n"
        "for name in ('jax', 'sklearn', 'tensorflow', 'tensorflow_datasets', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "from ntt_sparse.data import images\n"
        "print(len(images.load('made.npz', validation_fraction=0.25).train.x))"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=environment,
    )
    assert (result.stdout.strip(), result.stderr) == ("30", "")


def test_the_cache_format_is_the_npz_format(tmp_path):
    made = make_arrays()
    arrays = npz.Arrays(*made["train"], *made["test"], num_classes=6)
    npz.write(tmp_path / "cached.npz", arrays)
    assert images.load(tmp_path / "cached.npz").num_classes == 6
