"""Sets of ratings: formats, splits, and files that are damaged."""

import os
import sys

import h5py
import numpy as np
import pytest

from ntt_sparse.data import ratings
from ntt_sparse.data.ratings import Ratings

MATRIX = np.array([[1.0, 0, 3.5, 2], [0, 5, 4, 0], [2.5, 0, 0, 1]])
TRAINING = np.array([[1.0, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, 0]])
TEST = np.array([[0.0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]])


def write_mat(path, **matrices):
    """Columns one after the other, as MATLAB writes matrices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, matrix in (
            {"M": MATRIX, "Otraining": TRAINING, "Otest": TEST} | matrices
        ).items():
            if matrix is not None:
                file[name] = matrix.T
    return path


def triplets(part):
    return list(zip(*(column.tolist() for column in part), strict=True))


@pytest.mark.parametrize("folder", ["flixster", "monti/flixster"])
def test_matrices_of_monti(tmp_path, folder):
    write_mat(tmp_path / folder / "training_test_dataset.mat")
    data = ratings.load("flixster", tmp_path)
    assert (data.num_users, data.num_items, data.name) == (3, 4, "flixster")
    assert triplets(data.train) == [(0, 0, 1.0), (0, 3, 2.0), (1, 1, 5.0), (1, 2, 4.0), (2, 0, 2.5)]
    assert triplets(data.test) == [(0, 2, 3.5), (2, 3, 1.0)]
    assert ratings.levels(data.train).tolist() == [1.0, 2.0, 2.5, 4.0, 5.0]


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ({"Otest": None}, "it lacks Otest"),
        ({"M": MATRIX[:, :3]}, "expected the same (m, n) each"),
        ({"Otraining": 2 * TRAINING}, "Otraining holds other values than 0 and 1"),
        ({"Otest": np.full((3, 4), np.nan)}, "Otest holds other values than 0 and 1"),
        ({"Otest": np.zeros((3, 4))}, "Otest is 0 everywhere"),
        ({"Otest": TRAINING}, "5 ratings are in Otraining and in Otest"),
        ({"M": np.where(MATRIX == 5, np.nan, MATRIX)}, "M is nan for user 1 and item 1"),
        ({"M": np.where(MATRIX == 1, 0, MATRIX)}, "M is 0.0 for user 0 and item 0"),
        ({"M": np.where(MATRIX == 3.5, np.inf, MATRIX)}, "M is inf for user 0 and item 2"),
        ({"M": np.where(MATRIX == 3.5, 1e39, MATRIX)}, "M is inf for user 0 and item 2"),
        ({"M": MATRIX.astype("S")}, "cannot be read as ratings of Monti"),
        ({"M": MATRIX + 1j}, "cannot be read as ratings of Monti"),
    ],
    ids=str,
)
def test_damaged_matrices_are_refused(tmp_path, matrices, message):
    path = write_mat(tmp_path / "damaged.mat", **matrices)
    with pytest.raises(ValueError) as raised:
        ratings.read_monti(path, "flixster")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("cut", [0, 20, 600])
def test_a_file_that_was_cut_short_is_refused(tmp_path, cut):
    path = write_mat(tmp_path / "cut.mat")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"cannot be read as ratings of Monti et al\.") as raised:
        ratings.read_monti(path, "flixster")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_damaged_inside_is_refused(tmp_path):
    path = write_mat(tmp_path / "inside.mat")
    path.write_bytes(path.read_bytes().replace(b"HEAP", b"HOPE"))
    with pytest.raises(ValueError, match=r"cannot be read as ratings of Monti et al\."):
        ratings.read_monti(path, "flixster")


def test_without_h5py_a_line_says_what_to_install(tmp_path, monkeypatch):
    path = write_mat(tmp_path / "whole.mat")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"pip install 'ntt_sparse\[recommenders\]'"):
        ratings.read_monti(path, "flixster")


@pytest.mark.parametrize("folder", [".", "ml-100k"])
def test_lines_of_movielens(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "u1.base").write_text("2\t1\t5\t881\n1\t3\t4\t882\n1\t2\t1\t883\n")
    (tmp_path / folder / "u1.test").write_text("3\t2\t3\t884\n")
    data = ratings.load("ml_100k", tmp_path)
    assert (data.num_users, data.num_items) == (3, 3)
    assert triplets(data.train) == [(0, 1, 1.0), (0, 2, 4.0), (1, 0, 5.0)]
    assert triplets(data.test) == [(2, 1, 3.0)]


@pytest.mark.parametrize(
    ("base", "test", "message"),
    [
        ("1\t2\t3\t4\n", "1\t2\t4\t5\n", "item 2 of user 1 more than once"),
        ("1\t2\t3\t4\n1\t2\t3\t4\n", "1\t1\t1\t1\n", "item 2 of user 1 more than once"),
        ("1\t0\t3\t4\n", "1\t1\t1\t1\n", "the first three from 1 to (943, 1682, 5)"),
        ("1\t2\t6\t4\n", "1\t1\t1\t1\n", "the first three from 1 to (943, 1682, 5)"),
        ("999999999999\t2\t3\t4\n", "1\t1\t1\t1\n", "the first three from 1 to (943"),
        ("1\t2\t3\n", "1\t1\t1\t1\n", "holds numbers (1, 3)"),
        ("1\t2\tthree\t4\n", "1\t1\t1\t1\n", "cannot be read as ratings of MovieLens"),
        ("1\t2\t3\t4\n1\t2\n", "1\t1\t1\t1\n", "cannot be read as ratings of MovieLens"),
    ],
    ids=repr,
)
def test_damaged_lines_are_refused(tmp_path, base, test, message):
    (tmp_path / "u1.base").write_text(base)
    (tmp_path / "u1.test").write_text(test)
    with pytest.raises(ValueError) as raised:
        ratings.load("ml_100k", tmp_path)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:loadtxt")
def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "u1.base").write_text("")
    (tmp_path / "u1.test").write_text("1\t1\t1\t1\n")
    with pytest.raises(ValueError, match="the first three from 1 to"):
        ratings.load("ml_100k", tmp_path)


def test_mistakes_of_a_name_or_folder(tmp_path):
    with pytest.raises(ValueError, match="ratings 'netflix' are unknown: expected one of flixster"):
        ratings.load("netflix")
    with pytest.raises(ValueError, match="say in which folder"):
        ratings.load("douban")
    with pytest.raises(FileNotFoundError, match=r"no ratings 'douban': expected .*monti/douban"):
        ratings.load("douban", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected .*u1\.base"):
        ratings.load("ml_100k", tmp_path)
    (tmp_path / "u1.base").write_text("1\t2\t3\t4\n")
    with pytest.raises(FileNotFoundError, match=r"no ratings at .*u1\.test"):
        ratings.load("ml_100k", tmp_path)


def test_made_ratings_have_a_taste_to_learn():
    first, second = ratings.load("made"), ratings.make(0)
    for one, other in zip(first.train + first.test, second.train + second.test, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(ratings.make(1).train.users[:50], first.train.users[:50])
    pairs = [set(zip(part.users, part.items, strict=True)) for part in (first.train, first.test)]
    assert len(pairs[0]) == len(first.train.users) and not pairs[0] & pairs[1]
    assert ratings.levels(first.train).tolist() == [1, 2, 3, 4, 5]
    # There is something to learn: the means of users and items alone leave less than the whole.
    rest = first.train.values - first.train.values.mean()
    means = np.zeros_like(rest)
    for column in first.train[:2]:
        total = np.bincount(column, rest) / np.maximum(np.bincount(column), 1)
        means += total[column]
    assert np.std(rest - means) < 0.9 * np.std(rest)


def test_taking_some():
    part = Ratings(*(np.arange(3).astype(kind) for kind in ("int32", "int32", "float32")))
    assert triplets(ratings.take(part, np.array([2, 0]))) == [(2, 2, 2.0), (0, 0, 0.0)]


@pytest.mark.skipif("MONTI_DIR" not in os.environ, reason="MONTI_DIR names no folder of ratings")
@pytest.mark.parametrize(
    ("name", "train", "test", "levels"),
    [
        ("flixster", 23_556, 2_617, 10),
        ("douban", 123_202, 13_689, 5),
        ("yahoo_music", 4_802, 533, 69),
    ],
)
def test_the_published_counts(name, train, test, levels):
    data = ratings.load(name, os.environ["MONTI_DIR"])
    assert (data.num_users, data.num_items) == (3000, 3000)
    assert (len(data.train.values), len(data.test.values)) == (train, test)
    assert len(ratings.levels(data.train)) == levels
