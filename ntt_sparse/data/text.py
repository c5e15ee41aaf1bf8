"""Texts as bytes, of which each is to be told from those before it."""

import importlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from ntt_sparse.data.images import Split

NUM_TOKENS = 256
"""A token is a byte."""
_INSIDE = "pydoc"


class TextData(NamedTuple):
    """A text, cut into windows.

    Inputs and labels are int32 `(n, t)`, where a label is the token after that of the input.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int
    name: str

    @property
    def input_shape(self) -> tuple[int]:
        """Tokens of one window."""
        return (self.train.x.shape[1],)


def is_text(name: str | os.PathLike[str]) -> bool:
    """Whether a name is one of those that `load` takes."""
    return os.fspath(name) == _INSIDE or Path(name).suffix.lower() == ".txt"


def load(name: str | os.PathLike[str], length: int, *, test_fraction: float = 0.1) -> TextData:
    """Loads a text.

    It is cut into windows one after the other, each of which begins with the token that is the
    last label of the one before. The last part of the text is for testing, no window is of both
    parts, and what is left at their ends is not used.

    Args:
        name: A path that ends in `.txt`, or `"pydoc"`: what the help of Python says of its
            language, half a megabyte of English that comes with it, of the version that runs.
        length: Tokens of a window, 1 or more.
        test_fraction: Of the text, above 0 and below 1.

    Returns:
        The set, whose validation part is empty.

    Raises:
        FileNotFoundError: There is no such file, or Python comes without its help.
        ValueError: The text is too short, or an argument is out of range.
    """
    if not is_text(name):
        raise ValueError(f"text is {os.fspath(name)!r}, expected {_INSIDE!r} or a path to a .txt")
    # The negated forms also refuse NaN.
    if not length >= 1:
        raise ValueError(f"length is {length}, expected 1 or more tokens")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}, expected a number between 0 and 1")
    path, inside = Path(name).expanduser(), os.fspath(name) == _INSIDE
    if not inside and not path.is_file():
        raise FileNotFoundError(f"there is no text {path}")
    content = _help() if inside else path.read_bytes()
    tokens = np.frombuffer(content, np.uint8)
    first = len(tokens) - round(test_fraction * len(tokens))
    parts = [_windows(part, length) for part in (tokens[:first], tokens[first:])]
    if not all(len(part.y) for part in parts):
        raise ValueError(
            f"text {os.fspath(name)!r} has {len(tokens)} bytes, expected windows of {length} for "
            "training and for testing"
        )
    train, test = parts
    empty = Split(train.x[:0], train.y[:0])
    return TextData(train, empty, test, NUM_TOKENS, Path(name).stem)


def _help() -> bytes:
    """The topics of Python's help, in alphabetical order."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise FileNotFoundError(
            "this Python comes without the texts of its help: expected a path to a .txt"
        ) from error
    return "\n".join(topics[name] for name in sorted(topics)).encode()


def _windows(tokens: UInt8[np.ndarray, "n"], length: int) -> Split:
    count = max(len(tokens) - 1, 0) // length
    used = tokens[: count * length + 1].astype(np.int32)
    return Split(used[:-1].reshape(count, length), used[1:].reshape(count, length))
