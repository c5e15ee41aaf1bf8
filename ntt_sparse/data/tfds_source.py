"""Image sets prepared by TensorFlow Datasets, read without the network.

Sets prepared as ArrayRecord are read without TensorFlow. Decoded images are
kept as `.npz` under `$NTT_SPARSE_CACHE` (default `~/.cache/ntt_sparse`), since
decoding takes seconds and reading them back a fraction of one.
"""

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import io
import json
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from ntt_sparse.data import npz

logger = logging.getLogger(__name__)

KNOWN = (
    "cifar10",
    "cifar100",
    "emnist",
    "fashion_mnist",
    "kmnist",
    "mnist",
    "svhn_cropped",
)
"""Names offered when a name looks misspelt; any other image classification set loads too."""

_ARRAY_RECORD = "array_record"
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_CHUNK = 512


def read(name: str, data_dir: str | os.PathLike[str] | None = None) -> npz.Arrays:
    """Reads the `train` and `test` splits of a prepared set, from the cache where possible.

    Args:
        name: Name in TensorFlow Datasets, `"mnist"`, or with a config, `"emnist/letters"`.
        data_dir: Where the set was prepared; default `$TFDS_DATA_DIR`, then
            `~/tensorflow_datasets`. The newest version is taken.

    Returns:
        Images uint8 `(n, h, w, c)` and labels int64 `(n,)`, in the order they are stored.

    Raises:
        FileNotFoundError: The set is not prepared in `data_dir`.
        ValueError: The files are damaged, need TensorFlow, or hold no images with labels.
    """
    folder = find(name, data_dir)
    path = cache_path(name, folder)
    if (arrays := _read_cache(path)) is None:
        arrays = _decode_folder(folder)
        _write_cache(path, arrays)
    return arrays


def find(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the newest prepared version, `<data_dir>/<name>[/<config>]/<version>`.

    Raises:
        FileNotFoundError: The set is not prepared in `data_dir`.
        ValueError: The name is malformed, or several configs are prepared and none is named.
    """
    if not re.fullmatch(r"[\w-]+(/[\w.-]*\w)?", name):
        raise ValueError(
            f"{name!r} is no data set: expected 'digits', a path that ends in .npz, or a name of "
            "TensorFlow Datasets such as 'mnist' or 'emnist/letters'"
        )
    root = _data_dir(data_dir)
    if folder := _newest_version(root / name):
        return folder
    configs = {child.name: _newest_version(child) for child in _children(root / name)}
    prepared = {config: folder for config, folder in configs.items() if folder}
    if len(prepared) == 1:
        return next(iter(prepared.values()))
    if prepared:
        raise ValueError(
            f"{name!r} is prepared in {root} with configs {', '.join(sorted(prepared))}: "
            f"name one, such as '{name}/{min(prepared)}'"
        )
    raise FileNotFoundError(_not_prepared(name, root))


def cache_path(name: str, folder: Path) -> Path:
    """Where the decoded images of a prepared folder are kept.

    The name holds a hash of the folder's descriptions and of the size and time of its files
    (ArrayRecord pads small files to one size), so that a set prepared anew is decoded anew.
    """
    root = os.environ.get("NTT_SPARSE_CACHE") or "~/.cache/ntt_sparse"
    digest = hashlib.sha256()
    for file in sorted(path for path in _children(folder) if path.is_file()):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes())
    stem = f"{name.replace('/', '-')}-{folder.name}-{digest.hexdigest()[:16]}"
    return Path(root).expanduser() / f"{stem}.npz"


def _data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(chosen).expanduser()


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _newest_version(folder: Path) -> Path | None:
    """The subfolder with the highest version that was prepared to the end."""
    versions = {
        tuple(map(int, child.name.split("."))): child
        for child in _children(folder)
        if re.fullmatch(r"\d+\.\d+\.\d+", child.name) and (child / "dataset_info.json").is_file()
    }
    return versions[max(versions)] if versions else None


def _not_prepared(name: str, root: Path) -> str:
    prepared = sorted(
        child.name
        for child in _children(root)
        if any(_newest_version(folder) for folder in (child, *_children(child)))
    )
    known = {"digits", *KNOWN, *prepared}
    close = [] if name in known else difflib.get_close_matches(name, sorted(known), cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    held = f"holds {', '.join(prepared) or 'no prepared set'}" if root.is_dir() else "is no folder"
    return (
        f"{name!r} is not prepared: data_dir {root} {held}.{hint} To prepare it: "
        'pip install tensorflow && python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}, file_format='array_record', data_dir={str(root)!r})"
        '.download_and_prepare()"'
    )


def _read_cache(path: Path) -> npz.Arrays | None:
    if not path.is_file():
        return None
    try:
        return npz.read(path)
    except (OSError, ValueError) as error:
        logger.warning("ignoring the cache of decoded images: %s", error)
        return None


def _write_cache(path: Path, arrays: npz.Arrays) -> None:
    try:
        npz.write(path, arrays)
    except OSError as error:
        logger.warning("decoded images are not kept, %s cannot be written: %s", path, error)


class _Layout(NamedTuple):
    """Where the images and labels of a set are, and what they look like."""

    image_key: str
    label_key: str
    shape: tuple[int, int, int]
    num_classes: int


def _decode_folder(folder: Path) -> npz.Arrays:
    """Decodes both splits of one prepared version; every failure becomes one line."""
    _check_format(folder)
    import tensorflow_datasets as tfds

    # Damage shows as whatever the reader of the moment raises: protobuf, JSON, ArrayRecord
    # and Pillow each have their own errors.
    try:
        builder = tfds.builder_from_directory(str(folder))
        layout = _layout(tfds, builder)
    except Exception as error:
        raise ValueError(f"{folder} cannot be read: {_line(error)}") from error
    arrays: list[np.ndarray] = []
    for split in ("train", "test"):
        try:
            images, labels = _records(tfds, builder, split, layout)
            arrays += [_decode(images, layout.shape), np.asarray(labels, np.int64)]
        except Exception as error:
            raise ValueError(f"split {split} in {folder} cannot be read: {_line(error)}") from error
    return npz.Arrays(*arrays, num_classes=layout.num_classes)


def _check_format(folder: Path) -> None:
    """Raises ValueError unless the file format can be read here."""
    try:
        file_format = json.loads((folder / "dataset_info.json").read_text()).get("fileFormat")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}/dataset_info.json is damaged: {error}") from error
    if file_format != _ARRAY_RECORD and not importlib.util.find_spec("tensorflow"):
        raise ValueError(
            f"{folder} is prepared as {file_format or 'tfrecord'}, which only TensorFlow reads: "
            "pip install tensorflow, or prepare the set again with file_format='array_record'"
        )


def _layout(tfds: Any, builder: Any) -> _Layout:
    """Finds the image and its label; of several labels (CIFAR-100), `label`."""
    features, splits = builder.info.features, sorted(builder.info.splits)

    def key_of(kind: type, preferred: str) -> str:
        # Segmentation masks and the like are subclasses of Image, and not meant.
        keys = [key for key, feature in features.items() if type(feature) is kind]
        if preferred in keys or len(keys) == 1:
            return preferred if preferred in keys else keys[0]
        raise ValueError(
            f"found {len(keys)} features of type {kind.__name__} among {sorted(features)}, "
            f"expected one, or one named {preferred!r}"
        )

    image_key = key_of(tfds.features.Image, "image")
    label_key = key_of(tfds.features.ClassLabel, "label")
    if not {"train", "test"} <= set(splits):
        raise ValueError(f"it holds splits {splits}, expected train and test")
    shape, dtype = features[image_key].shape, np.dtype(features[image_key].np_dtype)
    if None in shape or dtype != np.uint8 or shape[-1] not in _MODES:
        raise ValueError(
            f"its images are {dtype}{shape}, expected one 8-bit shape with 1, 3 or 4 channels: "
            "resize them first and save an .npz"
        )
    return _Layout(image_key, label_key, shape, features[label_key].num_classes)


def _records(tfds: Any, builder: Any, split: str, layout: _Layout) -> tuple[list[bytes], list[int]]:
    """The encoded images and the labels of a split, in stored order."""
    decoders = {layout.image_key: tfds.decode.SkipDecoding()}
    if builder.info.file_format.value == _ARRAY_RECORD:
        source = builder.as_data_source(split, decoders=decoders)
        examples = source.__getitems__(range(len(source)))
    else:
        _hide_accelerators_from_tensorflow()
        # One shard after the other: the default interleaves them.
        config = tfds.ReadConfig(interleave_cycle_length=1)
        dataset = builder.as_dataset(
            split=split, shuffle_files=False, decoders=decoders, read_config=config
        )
        examples = list(tfds.as_numpy(dataset))
    expected = builder.info.splits[split].num_examples
    if len(examples) != expected:
        raise ValueError(f"found {len(examples)} examples, dataset_info.json says {expected}")
    images = [values[layout.image_key] for values in examples]
    return images, [int(values[layout.label_key]) for values in examples]


def _hide_accelerators_from_tensorflow() -> None:
    """Leaves the memory of GPUs to JAX; TensorFlow would take all of it."""
    tf = importlib.import_module("tensorflow")
    # Too late, and the caller's own choice, where TensorFlow has already started.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")


def _decode(images: Sequence[bytes], shape: tuple[int, int, int]) -> UInt8[np.ndarray, "n h w c"]:
    """Decodes PNG or JPEG images in threads (Pillow lets go of the interpreter lock)."""
    from PIL import Image

    pixels = np.empty((len(images), *shape), np.uint8)

    def decode_from(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(images))):
            try:
                with Image.open(io.BytesIO(images[i])) as image:
                    height_width = image.size[::-1]
                    if height_width != shape[:2]:
                        raise ValueError(f"it is {height_width}, expected {shape[:2]}")
                    pixels[i] = np.asarray(image.convert(_MODES[shape[-1]])).reshape(shape)
            # Pillow raises OSError, SyntaxError and others on damaged files.
            except Exception as error:
                raise ValueError(f"image {i}: {_line(error)}") from error

    with ThreadPoolExecutor() as pool:
        # The list raises what a thread raised.
        list(pool.map(decode_from, range(0, len(images), _CHUNK)))
    return pixels


def _line(error: Exception) -> str:
    """The first line of a message; libraries append stack-like notes below it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
