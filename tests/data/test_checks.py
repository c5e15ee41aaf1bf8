import logging

import numpy as np
import pytest
from made_sets import load_arrays, make_arrays, refused, save_npz

from ntt_sparse.data import images

# --- labels -----------------------------------------------------------------------------


def test_labels_with_a_second_axis_are_flattened(tmp_path):
    made = make_arrays()
    data = load_arrays(
        tmp_path, y=made["train"][1][:, None], y_test=made["test"][1][:, None].astype(np.uint8)
    )
    np.testing.assert_array_equal(data.test.y, made["test"][1])


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_labels_of_svhn_files_wrap_around(tmp_path, caplog, dtype):
    # 1..10 with 10 for the digit 0; the test split need not hold every class.
    y = (np.arange(40) % 10 + 1).astype(dtype)
    y_test = (np.arange(12) % 3 + 8).astype(dtype)
    with caplog.at_level(logging.WARNING):
        data = load_arrays(tmp_path, y=y, y_test=y_test, validation_fraction=0.0)
    assert data.num_classes == 10
    assert data.train.y[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert data.test.y[:4].tolist() == [8, 9, 0, 8]
    assert "labels are 1..10: mapped with % 10, so that 10 becomes 0" in caplog.text


@pytest.mark.parametrize(
    "train, test, expected",
    [
        # A gap: classes 2, 3 and 5 of a larger set, not a shifted count.
        ([2, 3, 5], [2, 5], 6),
        # Zero-based, with class 0 in the test split alone.
        ([1, 2, 3], [0, 3], 4),
    ],
)
def test_zero_based_labels_are_left_alone(tmp_path, caplog, train, test, expected):
    y, y_test = np.resize(train, 40), np.resize(test, 12)
    data = load_arrays(tmp_path, y=y, y_test=y_test, validation_fraction=0.0)
    assert data.num_classes == expected and not caplog.records
    np.testing.assert_array_equal(data.train.y, y)
    np.testing.assert_array_equal(data.test.y, y_test)


def test_stored_num_classes_counts(tmp_path):
    arrays = make_arrays()
    data = images.load(save_npz(tmp_path / "a.npz", arrays, num_classes=9))
    assert data.num_classes == 9
    with pytest.raises(ValueError, match=r"train label 3 .* expected class indices 0\.\.2"):
        images.load(save_npz(tmp_path / "b.npz", arrays, num_classes=3))


def test_stored_num_classes_settles_the_convention(tmp_path, caplog):
    arrays = make_arrays(num_classes=3)
    shifted = {split: (x, y + 1) for split, (x, y) in arrays.items()}
    # Classes 1, 2 and 3 of 4, where class 0 has no example.
    data = images.load(
        save_npz(tmp_path / "a.npz", shifted, num_classes=4), validation_fraction=0.0
    )
    np.testing.assert_array_equal(data.train.y, shifted["train"][1])
    assert not caplog.records
    data = images.load(
        save_npz(tmp_path / "b.npz", shifted, num_classes=3), validation_fraction=0.0
    )
    np.testing.assert_array_equal(data.train.y, shifted["train"][1] % 3)
    assert "mapped with % 3" in caplog.text


def test_one_hot_labels_are_refused(tmp_path):
    y = np.eye(4, dtype=np.int64)[make_arrays()["train"][1]]
    refused(tmp_path, r"train labels have shape \(40, 4\) and look one-hot", y=y)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"y": np.full(40, -1)}, "train label -1 of example 0 is out of range"),
        ({"y_test": np.arange(12) - 2}, "test label -2 of example 0 is out of range"),
        ({"y_test": np.arange(12)}, r"test label 4 of example 4 .* expected class indices 0\.\.3"),
        # One-based training labels, and a test label beyond them.
        (
            {"y": np.arange(40) % 4 + 1, "y_test": np.arange(12) % 5 + 1},
            "test label 5 of example 4 is out of range",
        ),
        ({"y": np.zeros(40)}, "train labels are of dtype float64, expected integers"),
        ({"y": np.zeros((40, 1, 1), int)}, r"train labels have shape \(40, 1, 1\)"),
        ({"y": np.zeros(39, int)}, "train has 40 images but 39 labels"),
        ({"y_test": np.zeros(13, int)}, "test has 12 images but 13 labels"),
    ],
)
def test_labels_out_of_order(tmp_path, changes, message):
    refused(tmp_path, message, **changes)


# --- pixels -----------------------------------------------------------------------------


def test_images_without_channel_axis(tmp_path):
    made = make_arrays((5, 7, 1))
    x, x_test = made["train"][0][..., 0], made["test"][0][..., 0]
    data = load_arrays(tmp_path, x=x, x_test=x_test, validation_fraction=0.0)
    assert data.input_shape == (5, 7, 1)
    np.testing.assert_allclose(data.train.x[..., 0], (x - x.mean()) / x.std(), atol=1e-5)


def test_binary_images(tmp_path):
    made = make_arrays()
    x, x_test = made["train"][0] > 127, made["test"][0] > 127
    data = load_arrays(tmp_path, x=x, x_test=x_test)
    np.testing.assert_allclose(data.mean, x.mean((0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_must_be_finite(tmp_path, value):
    x = make_arrays()["test"][0].astype(np.float32)
    x[3, 1, 1, 1] = value
    refused(tmp_path, "test image 3 holds NaN or infinite pixels", x_test=x)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": np.zeros((40, 35))}, r"train images have shape \(40, 35\), expected \(n, h, w\)"),
        ({"x_test": np.zeros((0, 5, 7, 3))}, "test images have shape .* the split is empty"),
        ({"x": np.zeros((40, 5, 0, 3))}, "the split is empty"),
        ({"x": np.zeros((40, 3, 8, 8))}, "looks like channels first"),
        ({"x": np.full((40, 5, 7, 3), "a")}, "train images are of dtype <U1, expected numbers"),
        ({"x_test": np.zeros((12, 5, 7, 1))}, r"\(5, 7, 3\), test images \(5, 7, 1\)"),
    ],
)
def test_pixels_out_of_order(tmp_path, changes, message):
    refused(tmp_path, message, **changes)
