"""Image sets too large for memory: folders of files, in the format of ImageNet.

A set is a folder with `train` and `val`, and in each of these a folder of images for every class.
Files are listed once, and decoded when they are asked for.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

MEAN = (123.675, 116.28, 103.53)
"""Of the channels of ImageNet, in units of pixels, as everybody takes them."""
STD = (58.395, 57.12, 57.375)
# Of an image; the largest of ImageNet has 61 million.
_MOST_PIXELS = 100_000_000
_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
_SPLITS = ("train", "val")
# Of the area, and of width by height (Szegedy et al. 2015, "Going deeper with convolutions").
_AREAS = (0.08, 1.0)
_ASPECTS = (3 / 4, 4 / 3)
_TRIES = 10
# The shorter side before the central crop, relative to the crop.
_RESIZED = 256 / 224


class FolderImages:
    """Images of files, standardised and decoded when they are indexed by a slice.

    Attributes:
        paths: Of all files, of which these are some.
        indices: `(n,)`, which.
        size: Height and width, after cutting out.
    """

    def __init__(self, paths: Sequence[str], size: int, indices: Int[np.ndarray, "n"]):
        """See the attributes."""
        self.paths, self.size, self.indices = paths, size, indices

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of an array."""
        return (len(self), self.size, self.size, 3)

    @property
    def dtype(self) -> np.dtype:
        """Of what is indexed."""
        return np.dtype(np.float32)

    def __getitem__(self, which: slice) -> Float[np.ndarray, "n h w c"]:
        """The images of a slice in the middle of their files, standardised, float32.

        Raises:
            ValueError: A file is no image.
        """
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(self.central, range(*which.indices(len(self)))))
        pixels = np.stack(found) if found else np.zeros((0, *self.shape[1:]), np.uint8)
        return (pixels - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)

    def select(self, indices: Int[np.ndarray, "m"]) -> "FolderImages":
        """Some of the images, still not decoded."""
        return FolderImages(self.paths, self.size, self.indices[indices])

    def central(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """The middle of an image whose shorter side is 256 / 224 of the size.

        Raises:
            ValueError: The file is no image.
        """
        image = self._open(index)
        short = round(self.size * _RESIZED)
        scale = short / min(image.size)
        width, height = (max(short, round(scale * side)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        # The box of the crop in the image as it is: one resampling, of what is needed.
        box = [(left, width), (top, height), (left + self.size, width), (top + self.size, height)]
        sides = (*image.size, *image.size)
        return self._cut(image, [at * side / n for (at, n), side in zip(box, sides, strict=True)])

    def random(self, index: int, rng: np.random.RandomState) -> UInt8[np.ndarray, "h w 3"]:
        """A random part of an image, of random area and aspect, mirrored in half of all cases.

        Raises:
            ValueError: The file is no image.
        """
        image = self._open(index)
        width, height = image.size
        # As many draws whatever the image is like.
        low, high = np.log(_ASPECTS)
        areas = rng.uniform(*_AREAS, _TRIES) * width * height
        aspects = np.exp(rng.uniform(low, high, _TRIES))
        places, mirrored = rng.uniform(size=2), rng.uniform() < 0.5
        widths, heights = np.sqrt(areas * aspects), np.sqrt(areas / aspects)
        fits = np.flatnonzero((widths <= width) & (heights <= height))
        # Where none fits, the largest part of an allowed aspect, in the middle.
        w, h = min(width, height * _ASPECTS[1]), min(height, width / _ASPECTS[0])
        if len(fits):
            w, h = widths[fits[0]], heights[fits[0]]
        else:
            places = np.full(2, 0.5)
        left, top = places * (width - w, height - h)
        pixels = self._cut(image, [left, top, left + w, top + h])
        return pixels[:, ::-1] if mirrored else pixels

    def _open(self, index: int) -> Any:
        from PIL import Image

        path = self.paths[int(self.indices[index])]
        # Pillow raises OSError, SyntaxError and others on damaged files.
        try:
            with Image.open(path) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels")
                return image.convert("RGB")
        except Exception as error:
            raise ValueError(
                f"{path} is no image that can be read: {' '.join(str(error).split())}"
            ) from error

    def _cut(self, image: Any, box: Sequence[float]) -> np.ndarray:
        from PIL import Image

        limits = (*image.size, *image.size)
        inside = tuple(min(max(at, 0.0), n) for at, n in zip(box, limits, strict=True))
        cut = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=inside)
        return np.asarray(cut)


class Folder(NamedTuple):
    """What is in a folder."""

    train: tuple[FolderImages, np.ndarray]
    """Images and their classes, int32 `(n,)`."""
    val: tuple[FolderImages, np.ndarray]
    classes: tuple[str, ...]
    """Names of the classes, as they are counted: in the order of the alphabet."""


def read(folder: str | os.PathLike[str], size: int = 224) -> Folder:
    """Lists the files of a set.

    Args:
        folder: With `train/CLASS/*` and `val/CLASS/*`, JPEG, PNG or WebP.
        size: Height and width of the images that are made of them.

    Raises:
        ValueError: A part is missing or empty, or classes of the two differ.
    """
    if size < 1:
        raise ValueError(f"size is {size}, expected 1 or more")
    root = Path(folder).expanduser()
    listed = [_list(root / split) for split in _SPLITS]
    names = [[name for name, _ in classes] for classes in listed]
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1]))
        raise ValueError(
            f"{root}/train and {root}/val have different classes, such as {', '.join(odd[:3])}"
        )
    parts = []
    for split, classes in zip(_SPLITS, listed, strict=True):
        paths = [path for _, files in classes for path in files]
        labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(f) for _, f in classes])
        if empty := [name for name, files in classes if not files]:
            raise ValueError(
                f"{root / split / empty[0]} holds no {', '.join(_SUFFIXES)} files: expected images "
                "of each class"
            )
        parts.append((FolderImages(paths, size, np.arange(len(paths))), labels))
    return Folder(*parts, classes=tuple(names[0]))


def _list(split: Path) -> list[tuple[str, list[str]]]:
    if not split.is_dir():
        raise ValueError(f"{split} is not there: expected a folder of images for each class")
    classes = sorted(
        entry.name for entry in os.scandir(split) if _is_seen(entry) and entry.is_dir()
    )
    if not classes:
        raise ValueError(f"{split} holds no folders: expected one for each class")
    return [(name, _files(split / name)) for name in classes]


def _files(folder: Path) -> list[str]:
    return sorted(
        entry.path
        for entry in os.scandir(folder)
        if _is_seen(entry) and entry.name.lower().endswith(_SUFFIXES)
    )


def _is_seen(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".")


def standardise(x: UInt8[Any, "n h w c"]) -> Float[Any, "n h w c"]:
    """Pixels as the networks get them, on the device."""
    import jax.numpy as jnp

    return (jnp.asarray(x, jnp.float32) - jnp.asarray(MEAN)) / jnp.asarray(STD)
