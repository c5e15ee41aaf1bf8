"""What arrays must be before they count as images with class indices."""

import logging

import numpy as np
from jaxtyping import Int32, Integer, Real, Shaped

from ntt_sparse.data import npz

logger = logging.getLogger(__name__)


def images(x: Shaped[np.ndarray, "..."], split: str) -> Real[np.ndarray, "n h w c"]:
    """Images `(n, h, w)` or `(n, h, w, c)` of finite numbers, with the channel axis."""
    if x.dtype.kind not in "biuf":
        raise ValueError(f"{split} images are of dtype {x.dtype}, expected numbers")
    if x.ndim not in (3, 4):
        raise ValueError(
            f"{split} images have shape {x.shape}, expected (n, h, w) or (n, h, w, channels)"
        )
    if x.size == 0:
        raise ValueError(f"{split} images have shape {x.shape}: the split is empty")
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[2] == x.shape[3] > 4:
        raise ValueError(
            f"{split} images have shape {x.shape}, which looks like channels first: "
            "transpose them to (n, h, w, channels)"
        )
    if x.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))
        if bad.size:
            raise ValueError(f"{split} image {bad[0]} holds NaN or infinite pixels")
    if x.dtype.kind == "b":
        x = x.astype(np.uint8)
    return x if x.ndim == 4 else x[..., None]


def same_shape(arrays: npz.Arrays) -> tuple[Real[np.ndarray, "..."], Real[np.ndarray, "..."]]:
    """The images of both splits as `images` has them, which must be of one shape."""
    x_train, x_test = images(arrays.x_train, "train"), images(arrays.x_test, "test")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"training images are {x_train.shape[1:]}, test images {x_test.shape[1:]}: "
            "both splits must have one shape"
        )
    return x_train, x_test


def class_indices(
    arrays: npz.Arrays,
) -> tuple[Int32[np.ndarray, "train"], Int32[np.ndarray, "test"], int]:
    """The labels of both splits as 0..K-1, and K.

    Where K is not stored it is the largest training label plus one, and at least half of
    the classes must occur in training: a stray label would make many. Labels 1..K, as in
    the original SVHN files where 10 stands for the digit 0, are mapped with `% K`.
    """
    y_train = _check_labels(arrays.y_train, len(arrays.x_train), "train")
    y_test = _check_labels(arrays.y_test, len(arrays.x_test), "test")
    largest = int(y_train.max())
    lowest = min(int(y_train.min()), int(y_test.min()))
    num_classes = largest + 1 if arrays.num_classes is None else arrays.num_classes
    # Without a stored K, only a gapless 1..K is taken for one-based.
    gapless = np.unique(y_train).size == largest > 1
    if lowest >= 1 and (gapless if arrays.num_classes is None else largest == num_classes):
        num_classes = largest
        logger.warning(
            "labels are 1..%d: mapped with %% %d, so that %d becomes 0", largest, largest, largest
        )
        # Out-of-range test labels stay, to be reported below.
        y_train = y_train % num_classes
        y_test = np.where(y_test <= num_classes, y_test % num_classes, y_test)
    if arrays.num_classes is None:
        present = np.unique(y_train).size
        if 2 * present < num_classes:
            raise ValueError(
                f"train labels go up to {largest}, but only {present} different ones occur: "
                "correct them, or store the number of classes as num_classes"
            )
    for split, y in (("train", y_train), ("test", y_test)):
        bad = np.flatnonzero((y < 0) | (y >= num_classes))
        if bad.size:
            raise ValueError(
                f"{split} label {y[bad[0]]} of example {bad[0]} is out of range: expected class "
                f"indices 0..{max(num_classes, 1) - 1}, the classes of the training split"
            )
    return y_train.astype(np.int32), y_test.astype(np.int32), num_classes


def _check_labels(y: Shaped[np.ndarray, "..."], count: int, split: str) -> Integer[np.ndarray, "n"]:
    """Integer labels `(n,)` or `(n, 1)`, one for each image."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2:
        raise ValueError(
            f"{split} labels have shape {y.shape} and look one-hot: store class indices (n,), "
            "such as y.argmax(axis=1)"
        )
    if y.ndim != 1:
        raise ValueError(f"{split} labels have shape {y.shape}, expected (n,)")
    if y.dtype.kind not in "iu":
        raise ValueError(f"{split} labels are of dtype {y.dtype}, expected integers")
    if len(y) != count:
        raise ValueError(f"{split} has {count} images but {len(y)} labels")
    return y
