"""Image sets as `.npz` files, with the keys of Keras' `mnist.npz`.

Pickled arrays are never read: a file from elsewhere must not be able to run code.
"""

import contextlib
import math
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

KEYS = ("x_train", "y_train", "x_test", "y_test")

# Deflate makes at most 1032 bytes of one.
_MOST_DEFLATED = 1100


class Arrays(NamedTuple):
    """The arrays of an image set as they are stored, unchecked."""

    x_train: Shaped[np.ndarray, "..."]
    y_train: Shaped[np.ndarray, "..."]
    x_test: Shaped[np.ndarray, "..."]
    y_test: Shaped[np.ndarray, "..."]
    num_classes: int | None = None
    """`None` where the source does not say, and the labels have to."""


def read(path: Path) -> Arrays:
    """Reads an image set.

    Args:
        path: A file with the arrays `x_train`, `y_train`, `x_test` and `y_test`, and
            optionally the integer `num_classes`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds pickled objects, or lacks an array.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no image set at {path}: expected an .npz file with {_listed(KEYS)}"
        )
    try:
        with path.open("rb") as file:
            content = _content(np.load(file, allow_pickle=False), path.stat().st_size)
    except Exception as error:  # Damaged zips and headers raise many kinds.
        raise ValueError(
            f"{path} cannot be read as an .npz image set ({_first_line(error)}): it is damaged, "
            "or holds pickled objects instead of plain arrays"
        ) from error
    if missing := [key for key in KEYS if key not in content]:
        raise ValueError(
            f"{path} lacks {_listed(missing)}: it holds {_listed(tuple(content)) or 'no arrays'}, "
            f"expected {_listed(KEYS)}"
        )
    count = content.get("num_classes")
    if count is not None and (count.shape != () or count.dtype.kind not in "iu" or count < 1):
        found = " ".join(str(count).split())[:50]
        raise ValueError(f"{path}: num_classes is {found}, expected a positive integer")
    return Arrays(
        *(content[key] for key in KEYS), num_classes=None if count is None else int(count)
    )


def write(path: Path, arrays: Arrays) -> None:
    """Writes an image set so that `path` is at every moment absent or complete.

    Raises:
        OSError: The folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {key: value for key, value in arrays._asdict().items() if value is not None}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **content)
        os.replace(temporary, path)
    finally:
        # Already gone when the replacement went through.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _content(file: Any, stored: int) -> dict[str, np.ndarray]:
    """The arrays this module knows; others in the file are not even decompressed."""
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("it is a single array")
    known = [key for key in (*KEYS, "num_classes") if key in file.files]
    for key in known:
        size = _claimed(file, key)
        # NumPy takes the memory before it reads.
        if size > _MOST_DEFLATED * stored:
            raise ValueError(f"{key} has {size} bytes, where the file has {stored}")
    return {key: file[key] for key in known}


def _claimed(file: Any, key: str) -> int:
    """Bytes of an array, by its header."""
    name = key if key in file.zip.namelist() else f"{key}.npy"
    with file.zip.open(name) as member:
        version = np.lib.format.read_magic(member)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(member)
    return math.prod(shape) * dtype.itemsize


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
