"""Files that are either the old or the new one, whenever the process dies or the disk is full."""

import contextlib
import errno
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_text(path: Path, text: str) -> None:
    """Replaces the content of a file in one move."""
    write_bytes(path, text.encode())


def write_texts(texts: Mapping[Path, str]) -> None:
    """Replaces the contents of files that belong together: of all, or of none while one fails.

    What does not fit is known before any is replaced; that the moves after it are one, no system
    promises.

    Raises:
        OSError: One cannot be written; it names the file, and all are as they were.
    """
    _replace({path: text.encode() for path, text in texts.items()})


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the content of a file in one move.

    Raises:
        OSError: It cannot be written; it names the file, which is as it was.
    """
    _replace({path: content})


def _replace(contents: Mapping[Path, bytes]) -> None:
    temporaries = {path: path.with_name(f"{path.name}.tmp") for path in contents}
    try:
        for path, temporary in temporaries.items():
            with naming(path):
                # Nothing is moved to where a folder is.
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                temporary.write_bytes(contents[path])
        for path, temporary in temporaries.items():
            with naming(path):
                os.replace(temporary, path)
    except OSError:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise


def append_text(path: Path, text: str) -> None:
    """Adds to the end of a file.

    Raises:
        OSError: It cannot be written; it names the file.
    """
    with naming(path), path.open("ab") as file:
        file.write(text.encode())


def append_line(path: Path, line: str) -> None:
    """Adds a line, also after one that a kill or a full disk cut short.

    Raises:
        OSError: It cannot be written; it names the file.
    """
    with naming(path), path.open("ab+") as file:
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            if file.read(1) != b"\n":
                line = f"\n{line}"
        file.write(f"{line}\n".encode())


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets errors of writing name the file: of a full disk the system does not say it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        # Of a move; set to None it would still be printed.
        del error.filename2
        raise


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Replaces a compressed file of arrays in one move."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def write_safetensors(path: Path, arrays: Mapping[str, Any], header: Mapping[str, str]) -> None:
    """Replaces a safetensors file of arrays and texts in one move.

    Raises:
        ValueError: Its name does not end in `.safetensors`.
    """
    # Imported here: the library is useful without it.
    from safetensors.flax import save as to_bytes

    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no name of such a file, expected one ending in .safetensors")
    write_bytes(path, to_bytes(dict(arrays), dict(header)))


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The texts and arrays of a safetensors file, all that is in it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none, or damaged.
    """
    from safetensors import safe_open

    if not path.exists():
        raise FileNotFoundError(f"there is no network at {path}")
    try:
        with safe_open(path, framework="flax") as file:
            return dict(file.metadata() or {}), {k: file.get_tensor(k) for k in file.keys()}
    except Exception as error:  # What is damaged raises many kinds.
        raise ValueError(f"{path} is no network file, or damaged ({one_line(error)})") from error


def one_line(error: Exception) -> str:
    """What an error of another library says, as part of a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
