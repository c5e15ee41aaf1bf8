"""Image sets: read, checked, standardised and split once.

`load` gives plain NumPy arrays, from which `ntt_sparse.data.batches` picks batches on the device,
or the files of a folder, which `ntt_sparse.data.stream` reads ahead of their use. Nothing here
reaches for the network.
"""

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int32, Int64, Real
from numpy.typing import DTypeLike

from ntt_sparse.data import checks, folders, npz, tfds_source
from ntt_sparse.data.folders import FolderImages

_DIGITS_TEST_SIZE = 360
_CHUNK = 1024


class Split(NamedTuple):
    """Examples and their labels."""

    x: Real[np.ndarray, "n ..."] | FolderImages
    """Standardised images, channels last; those of a folder are decoded when they are indexed.
    Of a text windows of tokens."""
    y: Int32[np.ndarray, "n ..."]
    """Class indices, 0 to num_classes - 1; of a text one for each token."""


class ImageData(NamedTuple):
    """An image classification set."""

    train: Split
    validation: Split
    test: Split
    num_classes: int
    name: str
    mean: Float64[np.ndarray, "c"]
    """Mean per channel over the official training split, in stored pixel units."""
    std: Float64[np.ndarray, "c"]
    """Standard deviation per channel over the same pixels."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        h, w, c = self.train.x.shape[1:]
        return h, w, c


def load(
    name: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    validation_fraction: float = 0.1,
    seed: int = 9,
    size: int | None = None,
    dtype: DTypeLike = np.float32,
) -> ImageData:
    """Loads an image classification set.

    Each channel is shifted and scaled to mean 0 and standard deviation 1 over the whole
    official training split, validation part included: stages with different validation
    fractions see identical inputs. The test split is scaled with the same numbers and
    never read for them.

    The validation part is the first `round(validation_fraction * n)` entries of one
    permutation of the training split that depends on `seed` only, so a smaller validation
    set is a prefix of a larger one. The training part keeps the stored order.

    Args:
        name: One of

            * `"digits"`: the 1,797 8x8 digits that come with scikit-learn, 1,437 for
              training and 360 for testing, the same ones always;
            * a path that ends in `.npz`, with arrays `x_train`, `y_train`, `x_test` and
              `y_test` (images `(n, h, w)` or `(n, h, w, c)`, labels `(n,)` or `(n, 1)`) and
              optionally `num_classes`;
            * a folder in the format of ImageNet, with `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`
              (the test split), of which images are read when they are needed, see
              `ntt_sparse.data.folders`; they are standardised by the numbers of ImageNet;
            * a name in TensorFlow Datasets, prepared beforehand: `"mnist"`,
              `"fashion_mnist"`, `"cifar10"`, `"cifar100"` (fine labels), `"svhn_cropped"`, ...
        data_dir: Where TensorFlow Datasets prepared its sets; default `$TFDS_DATA_DIR`,
            then `~/tensorflow_datasets`.
        validation_fraction: Part of the training split to hold out, in [0, 1); 0 gives an
            empty validation split.
        seed: Seed of the permutation, 0 to 2**32 - 1.
        size: Height and width of images of a folder, which is refused without one; others are
            as they are stored.
        dtype: Floating-point type of the images, bfloat16 too; those of a folder are float32.

    Returns:
        The set; its name is `name`, or the stem of the `.npz` file.

    Raises:
        FileNotFoundError: There is no such file, or the set is not prepared.
        ValueError: The files are damaged, the arrays are not images with class indices, or
            an argument is out of range.

    Example:
        >>> data = load("digits", validation_fraction=0.2)
        >>> data.train.x.shape, data.validation.x.shape, data.test.x.shape
        ((1150, 8, 8, 1), (287, 8, 8, 1), (360, 8, 8, 1))
    """
    dtype = np.dtype(dtype)
    # To NumPy, which does not know it, bfloat16 is of no kind.
    if dtype.kind != "f" and dtype.name != "bfloat16":
        raise ValueError(f"dtype is {dtype}, expected floating point: images are standardised")
    path = Path(name)
    if path.suffix == ".npz":
        arrays = npz.read(path.expanduser())
    elif _is_folder(name):
        return _folder(path.expanduser(), size, validation_fraction, seed)
    elif name == "digits":
        arrays = _digits()
    else:
        arrays = tfds_source.read(os.fspath(name), data_dir)
    try:
        x_train, x_test = checks.same_shape(arrays)
        y_train, y_test, num_classes = checks.class_indices(arrays)
        mean, std = channel_statistics(x_train)
    except ValueError as error:
        raise ValueError(f"{os.fspath(name)}: {error}") from error
    train, validation = split_indices(len(x_train), validation_fraction, seed)

    def split(x: Real[np.ndarray, "n h w c"], y: Int32[np.ndarray, "n"]) -> Split:
        return Split(_standardise(x, mean, std, dtype), y)

    return ImageData(
        train=split(x_train[train], y_train[train]),
        validation=split(x_train[validation], y_train[validation]),
        test=split(x_test, y_test),
        num_classes=num_classes,
        name=path.stem if path.suffix == ".npz" else os.fspath(name),
        mean=mean,
        std=std,
    )


def _is_folder(name: str | os.PathLike[str]) -> bool:
    """Whether it is meant: a path that looks like one, or a folder that has a part `train`.

    The sets of TensorFlow Datasets are folders too, in the folder that holds them.
    """
    path = Path(name).expanduser()
    explicit = path.is_absolute() or os.fspath(name).startswith(".")
    return explicit or (path / "train").is_dir()


def take(split: Split, indices: Int64[np.ndarray, "m"]) -> Split:
    """Some examples of a split; those of a folder are still not decoded."""
    x = split.x.select(indices) if isinstance(split.x, FolderImages) else split.x[indices]
    return Split(x, split.y[indices])


def blank(split: Split, n: int = 1) -> Real[np.ndarray, "n ..."]:
    """Zeros of the shape and type of some examples, by which networks get their shapes."""
    return np.zeros((n, *split.x.shape[1:]), split.x.dtype)


def _folder(path: Path, size: int | None, validation_fraction: float, seed: int) -> ImageData:
    """The files of a folder, shuffled once: the first so many are of all classes then.

    Raises:
        ValueError: It is a file, or there is no size.
        FileNotFoundError: It is not there.
        ImportError: Grain, which reads them, is not installed.
    """
    if path.is_file():
        raise ValueError(f"{path} is a file, expected one that ends in .npz, or a folder")
    if size is None and not path.exists():
        raise FileNotFoundError(
            f"no image set at {path}: expected an .npz file, or a folder of images"
        )
    if size is None:
        raise ValueError(
            f"{path} is a folder, and images have to be in memory here: expected a name of "
            "TensorFlow Datasets or an .npz (or a size, to read them when they are needed)"
        )
    if importlib.util.find_spec("grain") is None:
        raise ImportError("images of folders are read by Grain: pip install grain")
    found = folders.read(path, size)
    whole, test = (
        take(Split(*part), _random_state(seed).permutation(len(part[1])).astype(np.int64))
        for part in (found.train, found.val)
    )
    train, validation = split_indices(len(whole.y), validation_fraction, seed)
    mean, std = (np.asarray(each, float) for each in (folders.MEAN, folders.STD))
    return ImageData(
        train=take(whole, train),
        validation=take(whole, validation),
        test=test,
        num_classes=len(found.classes),
        name=path.name,
        mean=mean,
        std=std,
    )


def subset(split: Split, classes: tuple[int, ...], per_class: int, *, seed: int = 0) -> Split:
    """The first `per_class` examples of each class, shuffled, with labels 0..len(classes)-1.

    `subset(data.train, (0, 1), 250)` is the visualisation set of Neural Tangent Transfer
    (250 zeros and 250 ones) where nothing was held out for validation. "First" is in
    stored order; TensorFlow Datasets shuffles a set once while it prepares it.

    Args:
        split: Images and labels.
        classes: Distinct class indices; the i-th becomes label i.
        per_class: Examples of each class, at least 1.
        seed: Seed of the shuffle.

    Raises:
        ValueError: A class has fewer examples, is named twice, or none is named.
    """
    if not classes or len(set(classes)) < len(classes) or per_class < 1:
        raise ValueError(
            f"{classes=} with {per_class=}: expected one or more distinct classes and at least "
            "one example of each"
        )
    found = [np.flatnonzero(split.y == label)[:per_class] for label in classes]
    for label, indices in zip(classes, found, strict=True):
        if len(indices) < per_class:
            raise ValueError(
                f"class {label} has {len(indices)} examples of {per_class} asked for, among "
                f"{len(split.y)} with labels {np.unique(split.y).tolist()}"
            )
    order = _random_state(seed).permutation(len(classes) * per_class)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), per_class)
    return Split(take(split, np.concatenate(found)[order]).x, labels[order])


def split_indices(
    n: int, validation_fraction: float, seed: int = 9
) -> tuple[Int64[np.ndarray, "train"], Int64[np.ndarray, "validation"]]:
    """Which of `n` examples train (in ascending order) and which validate.

    Raises:
        ValueError: The fraction is outside [0, 1), or leaves a part without examples.
    """
    # The negated form also refuses NaN.
    if not 0.0 <= validation_fraction < 1.0:
        raise ValueError(f"{validation_fraction=}, expected a fraction in [0, 1)")
    count = round(validation_fraction * n)
    if validation_fraction > 0 and count == 0:
        raise ValueError(
            f"{validation_fraction=} holds out none of {n} training images: ask for a larger "
            "fraction, or for 0 to train on all"
        )
    if count >= n:
        raise ValueError(f"{validation_fraction=} leaves none of {n} images to train on")
    order = _random_state(seed).permutation(n).astype(np.int64)
    return np.sort(order[count:]), order[:count]


def channel_statistics(
    x: Real[np.ndarray, "n h w c"],
) -> tuple[Float64[np.ndarray, "c"], Float64[np.ndarray, "c"]]:
    """Mean and standard deviation of each channel, accumulated in float64.

    Raises:
        ValueError: A channel is constant, so that no scale is defined.
    """
    # Two passes in chunks: exact like a float64 copy of the set, without holding one.
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(x), _CHUNK)]
    count = x[..., 0].size
    sums = [x[chunk].sum((0, 1, 2), dtype=np.float64) for chunk in chunks]
    mean = np.sum(sums, axis=0) / count
    squares = [((x[chunk] - mean) ** 2).sum((0, 1, 2)) for chunk in chunks]
    std = np.sqrt(np.sum(squares, axis=0) / count)
    if not np.all(np.isfinite(std)):
        raise ValueError(
            "the spread of the training images overflows: pixels are too large to be standardised"
        )
    # Rounding leaves a constant channel of 0.1 a tiny spread above zero.
    constant = np.flatnonzero(std <= 1e-12 * np.abs(mean))
    if constant.size:
        values = ", ".join(f"{value:g}" for value in mean[constant])
        raise ValueError(
            f"channels {constant.tolist()} are constant ({values}) over all training images: "
            "they cannot be standardised, remove them"
        )
    return mean, std


def _standardise(
    x: Real[np.ndarray, "n h w c"],
    mean: Float64[np.ndarray, "c"],
    std: Float64[np.ndarray, "c"],
    dtype: np.dtype,
) -> Float[np.ndarray, "n h w c"]:
    # At least float32, and float64 for pixels that need it; half precision only stores the
    # result. In place, so that a large set is held once.
    work = np.result_type(np.float32, x.dtype, dtype)
    out = x.astype(work)
    out -= mean.astype(work)
    out /= std.astype(work)
    return out.astype(dtype, copy=False)


def _random_state(seed: int) -> np.random.RandomState:
    # The stream of RandomState is frozen; that of Generator may change between releases
    # of NumPy, and with it every split of every published run.
    return np.random.RandomState(seed)


def _digits() -> npz.Arrays:
    """The 8x8 digits inside scikit-learn, cut by a fixed permutation."""
    from sklearn.datasets import load_digits

    pixels, y = load_digits(return_X_y=True)
    x = np.asarray(pixels).reshape(-1, 8, 8)
    order = _random_state(0).permutation(len(x))
    test, train = order[:_DIGITS_TEST_SIZE], np.sort(order[_DIGITS_TEST_SIZE:])
    return npz.Arrays(x[train], y[train], x[test], y[test], num_classes=10)
