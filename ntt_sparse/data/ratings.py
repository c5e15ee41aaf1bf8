"""Ratings that users gave to items, read and checked: those of Monti et al., and MovieLens-100K.

Nothing here reaches for the network.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

MONTI = ("flixster", "douban", "yahoo_music")
"""The sets of Monti et al. 2017, https://arxiv.org/abs/1704.06803, with their split."""
MOVIELENS = "ml_100k"
MADE = "made"
NAMES = (*MONTI, MOVIELENS, MADE)

_MATRICES = ("M", "Otraining", "Otest")
# Of a matrix; those of MovieLens-1M would have 22 million.
_MOST_ENTRIES = 10**8
# Of the made set: users, items, rank of the taste, ratings of a user on average.
_MADE = (60, 50, 2, 14.0)
# Of MovieLens-100K: users, items, stars.
_LARGEST = (943, 1682, 5)


class Ratings(NamedTuple):
    """Ratings as triplets, of pairs that are all different, in the order of users, then items."""

    users: Int32[np.ndarray, " n"]
    items: Int32[np.ndarray, " n"]
    values: Float32[np.ndarray, " n"]


class RatingData(NamedTuple):
    """A set of ratings with its split. Users and items are counted from 0."""

    train: Ratings
    test: Ratings
    num_users: int
    num_items: int
    name: str


def load(name: str, data_dir: str | Path | None = None) -> RatingData:
    """Loads a set of ratings.

    Counted on the files of Monti et al., 3,000 users and 3,000 items each (rows and columns; many
    have no rating):

    ===========  ========  ======  ====================================================
    flixster       23,556   2,617  half stars from 0.5 to 5, 10 levels
    douban        123,202  13,689  stars from 1 to 5
    yahoo_music     4,802     533  71 of the levels from 1 to 100, 69 of them in training
    ===========  ========  ======  ====================================================

    Args:
        name: `"flixster"`, `"douban"` or `"yahoo_music"`, from `training_test_dataset.mat` in a
            folder of that name, or in such a one inside `monti`; `"ml_100k"`, the split of
            `u1.base` and `u1.test`, in `ml-100k` or the folder itself; `"made"`, made ratings.
        data_dir: The folder; not needed for made ratings.

    Returns:
        The ratings.

    Raises:
        FileNotFoundError: There are no such files.
        ImportError: h5py is not installed, for sets of Monti et al.
        ValueError: The name is unknown, or a file is damaged.
    """
    if name not in NAMES:
        raise ValueError(f"ratings {name!r} are unknown: expected one of {', '.join(NAMES)}")
    if name == MADE:
        return make()
    if data_dir is None:
        raise ValueError(f"ratings {name!r} are read from files: say in which folder they are")
    root = Path(data_dir)
    if name == MOVIELENS:
        folder = _found([root / "ml-100k", root], "u1.base", name).parent
        return read_movielens(folder / "u1.base", folder / "u1.test")
    folders = [root / "monti" / name, root / name]
    return read_monti(_found(folders, "training_test_dataset.mat", name), name)


def make(seed: int = 0) -> RatingData:
    """Ratings from 1 to 5 by a taste of low rank with some noise; the same ones for a seed."""
    users, items, rank, each = _MADE
    rng = np.random.RandomState(seed)
    taste = rng.normal(size=(users, rank)) @ rng.normal(size=(rank, items)) / rank**0.5
    taste += rng.normal(size=(users, 1)) * 0.5 + rng.normal(size=(1, items)) * 0.5
    noisy = taste + 0.3 * rng.normal(size=taste.shape)
    rated = rng.uniform(size=taste.shape) < each / items
    matrix = np.clip(np.round(3 + noisy), 1, 5)
    test = rated & (rng.uniform(size=taste.shape) < 0.1)
    return RatingData(_triplets(matrix, rated & ~test), _triplets(matrix, test), users, items, MADE)


def read_monti(path: str | Path, name: str) -> RatingData:
    """Reads a `.mat` file of Monti et al.: HDF5, with the matrices `M`, `Otraining`, `Otest`.

    Args:
        path: The file.
        name: Of the set.

    Raises:
        ImportError: h5py is not installed.
        ValueError: The file is damaged: matrices are missing or do not fit, masks are not of 0
            and 1 or share entries, or a rating is not positive and finite in float32.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            f"{path} is read by h5py: pip install 'ntt_sparse[recommenders]'"
        ) from error
    try:
        with h5py.File(path, "r") as file:
            content: dict[str, Any] = dict(file)
            if missing := [key for key in _MATRICES if key not in content]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            for key in _MATRICES:
                if math.prod(content[key].shape) > _MOST_ENTRIES:
                    raise ValueError(f"{key} is {content[key].shape}, more than {_MOST_ENTRIES}")
            # MATLAB stores columns one after the other.
            found = [np.asarray(content[key], np.float32).T for key in _MATRICES]
    # HDF5 says whatever it stumbled over, or asks for as much memory as a damaged size says.
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} cannot be read as ratings of Monti et al. ({reason}): it is damaged, or no "
            f"MATLAB v7.3 file with {', '.join(_MATRICES)}"
        ) from error
    matrix, training, test = found
    _check_matrices(path, matrix, training, test)
    users, items = matrix.shape
    return RatingData(
        _triplets(matrix, training == 1), _triplets(matrix, test == 1), users, items, name
    )


def read_movielens(base: str | Path, test: str | Path) -> RatingData:
    """Reads a split of MovieLens-100K: lines of user, item, rating and time, parted by tabs.

    Args:
        base: The training part, such as `u1.base`.
        test: The test part, such as `u1.test`.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file is damaged, or a pair is rated more than once.
    """
    rows = [_read_lines(Path(path)) for path in (base, test)]
    both = np.concatenate(rows)
    num_users, num_items = int(both[:, 0].max()), int(both[:, 1].max())
    pairs = (both[:, 0] - 1) * num_items + both[:, 1] - 1
    order, counts = np.unique(pairs, return_counts=True)
    if np.any(counts > 1):
        user, item = divmod(int(order[counts > 1][0]), num_items)
        raise ValueError(
            f"{base} and {test} hold item {item + 1} of user {user + 1} more than once, expected "
            "every pair once, in one of them"
        )
    parts = [
        _sorted(part[:, 0] - 1, part[:, 1] - 1, part[:, 2].astype(np.float32)) for part in rows
    ]
    return RatingData(parts[0], parts[1], num_users, num_items, MOVIELENS)


def levels(ratings: Ratings) -> Float32[np.ndarray, " r"]:
    """The different values of ratings, ascending: the types of edges between users and items."""
    return np.unique(ratings.values)


def take(ratings: Ratings, indices: Int[np.ndarray, " k"]) -> Ratings:
    """Some of the ratings."""
    return Ratings(*(column[indices] for column in ratings))


def _found(folders: list[Path], file: str, name: str) -> Path:
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    raise FileNotFoundError(
        f"no ratings {name!r}: expected {' or '.join(str(folder / file) for folder in folders)}"
    )


def _check_matrices(
    path: str | Path, matrix: np.ndarray, training: np.ndarray, test: np.ndarray
) -> None:
    named = {"M": matrix, "Otraining": training, "Otest": test}
    shapes = {name: array.shape for name, array in named.items()}
    if matrix.ndim != 2 or len(set(shapes.values())) > 1:
        raise ValueError(f"{path} holds matrices of shapes {shapes}, expected the same (m, n) each")
    for name in ("Otraining", "Otest"):
        if not np.all((named[name] == 0) | (named[name] == 1)):
            raise ValueError(f"{path}: {name} holds other values than 0 and 1: it is no mask")
        if not np.any(named[name]):
            raise ValueError(f"{path}: {name} is 0 everywhere: there are no such ratings")
    if shared := int(np.sum((training == 1) & (test == 1))):
        raise ValueError(
            f"{path}: {shared} ratings are in Otraining and in Otest, expected each in one of them"
        )
    rated = (training == 1) | (test == 1)
    # The negated form also refuses NaN.
    bad = np.argwhere(rated & ~((matrix > 0) & (matrix < np.inf)))
    if bad.size:
        user, item = bad[0]
        raise ValueError(
            f"{path}: M is {matrix[user, item]} for user {user} and item {item}, expected "
            "positive, finite ratings wherever a mask is 1"
        )


def _triplets(matrix: Float[np.ndarray, "u i"], mask: Bool[np.ndarray, "u i"]) -> Ratings:
    users, items = np.nonzero(mask)
    return Ratings(
        users.astype(np.int32), items.astype(np.int32), matrix[users, items].astype(np.float32)
    )


def _sorted(users: np.ndarray, items: np.ndarray, values: np.ndarray) -> Ratings:
    order = np.lexsort((items, users))
    return Ratings(users[order].astype(np.int32), items[order].astype(np.int32), values[order])


def _read_lines(path: Path) -> Int[np.ndarray, "n 4"]:
    """The numbers of a file, checked."""
    try:
        rows = np.loadtxt(path, dtype=np.int64, delimiter="\t", ndmin=2)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no ratings at {path}") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as ratings of MovieLens ({str(error).splitlines()[0]}): "
            "expected lines of user, item, rating and time, parted by tabs"
        ) from error
    first = rows[:, :3]
    if not rows.size or rows.shape[1] != 4 or np.any((first < 1) | (first > _LARGEST)):
        raise ValueError(
            f"{path} holds numbers {rows.shape}, expected lines of user, item, rating and time, "
            f"the first three from 1 to {_LARGEST}"
        )
    return rows
