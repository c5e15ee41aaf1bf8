"""Texts: windows by hand, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from ntt_sparse.data import text


def test_windows_by_hand(tmp_path):
    path = tmp_path / "letters.txt"
    path.write_bytes(bytes(range(20)) + bytes(range(100, 111)))
    data = text.load(path, 4, test_fraction=11 / 31)
    # 20 bytes for training, so 19 with one before them; 11 for testing.
    np.testing.assert_array_equal(data.train.x, np.arange(16).reshape(4, 4))
    np.testing.assert_array_equal(data.train.y, np.arange(1, 17).reshape(4, 4))
    np.testing.assert_array_equal(data.test.x, 100 + np.arange(8).reshape(2, 4))
    np.testing.assert_array_equal(data.test.y, 101 + np.arange(8).reshape(2, 4))
    assert data.validation.x.shape == (0, 4) and data.train.x.dtype == data.train.y.dtype == "i4"
    assert (data.input_shape, data.num_classes, data.name) == ((4,), 256, "letters")


def test_names():
    assert text.is_text("pydoc") and text.is_text(Path("pydoc")) and text.is_text("A.TXT")
    assert not text.is_text("mnist") and not text.is_text("txt")


def test_letters_that_are_no_ascii(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ä" * 50, encoding="utf-8")
    assert sorted(np.unique(text.load(path, 5).train.x)) == [0xA4, 0xC3]


def test_the_help_of_python():
    pytest.importorskip("pydoc_data.topics")
    first, second = text.load("pydoc", 64), text.load("pydoc", 64)
    np.testing.assert_array_equal(first.train.x, second.train.x)
    # All versions have more than 400 KB.
    assert len(first.train.x) > 5000 and len(first.test.x) > 500
    content = bytes(first.train.x.astype(np.uint8).ravel())
    assert content.count(b"Python") > 50
    assert not set(content) - set(range(9, 11)) - set(range(32, 256))


@pytest.mark.parametrize(
    ("name", "fields", "error", "message"),
    [
        ("mnist", {}, ValueError, "expected 'pydoc' or a path to a .txt"),
        ("absent.txt", {}, FileNotFoundError, "there is no text"),
        ("short.txt", {}, ValueError, "has 12 bytes, expected windows of 8"),
        ("short.txt", {"length": 0}, ValueError, "length is 0"),
        ("short.txt", {"test_fraction": float("nan")}, ValueError, "test_fraction is nan"),
        ("short.txt", {"test_fraction": 1.0}, ValueError, "test_fraction is 1.0"),
    ],
)
def test_refused(tmp_path, monkeypatch, name, fields, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_bytes(b"twelve bytes")
    with pytest.raises(error, match=message):
        text.load(name, **{"length": 8, **fields})


def test_python_without_its_help(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match="without the texts of its help"):
        text.load("pydoc", 8)
