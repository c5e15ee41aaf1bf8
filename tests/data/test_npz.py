import zipfile

import numpy as np
import pytest

from ntt_sparse.data import npz


def arrays(**changes):
    base = npz.Arrays(
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        np.array([0, 1]),
        np.ones((1, 3, 4), np.uint8),
        np.array([1]),
    )
    return base._replace(**changes)


@pytest.mark.parametrize("num_classes", [None, 7])
def test_round_trip(tmp_path, num_classes):
    path = tmp_path / "made" / "set.npz"
    npz.write(path, arrays(num_classes=num_classes))
    result = npz.read(path)
    for key in npz.KEYS:
        expected = getattr(arrays(), key)
        np.testing.assert_array_equal(getattr(result, key), expected)
        assert getattr(result, key).dtype == expected.dtype
    assert result.num_classes == num_classes
    assert [child.name for child in path.parent.iterdir()] == ["set.npz"]


def test_compressed_files_and_other_arrays_are_welcome(tmp_path):
    content = {key: getattr(arrays(), key) for key in npz.KEYS}
    # An unknown array is not read, so that it may even be an object.
    np.savez_compressed(tmp_path / "set.npz", note=np.array([{}]), **content)
    np.testing.assert_array_equal(npz.read(tmp_path / "set.npz").x_train, arrays().x_train)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "set.npz"
    npz.write(path, arrays())
    before = path.read_bytes()

    def half(file, **content):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError, match="no space left"):
        npz.write(path, arrays(num_classes=3))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image set at .*absent.npz"):
        npz.read(tmp_path / "absent.npz")


def test_missing_arrays(tmp_path):
    np.savez(tmp_path / "set.npz", x_train=np.ones(2), x=np.ones(2))
    with pytest.raises(ValueError, match="lacks y_train, x_test, y_test: it holds x_train, exp"):
        npz.read(tmp_path / "set.npz")


def test_pickled_objects_are_not_loaded(tmp_path):
    content = {key: getattr(arrays(), key) for key in npz.KEYS}
    np.savez(tmp_path / "set.npz", **(content | {"y_test": np.array([{}])}), allow_pickle=True)
    with pytest.raises(ValueError, match="pickled objects") as raised:
        npz.read(tmp_path / "set.npz")
    assert "\n" not in str(raised.value)


def truncated(content):
    return content[: len(content) // 2]


def flipped(content):
    # A bit of the first array's pixels; the zip checksum notices.
    at = content.index(bytes(range(24)))
    return content[:at] + b"\xff" + content[at + 1 :]


@pytest.mark.parametrize("damage", [truncated, flipped, lambda _: b"", lambda _: b"not a zip"])
def test_damaged_files(tmp_path, damage):
    path = tmp_path / "set.npz"
    npz.write(path, arrays())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"set\.npz cannot be read") as raised:
        npz.read(path)
    assert "\n" not in str(raised.value)


def test_a_single_array_is_no_set(tmp_path):
    np.save(tmp_path / "set.npy", np.ones(3))
    (tmp_path / "set.npy").rename(tmp_path / "set.npz")
    with pytest.raises(ValueError, match="it is a single array"):
        npz.read(tmp_path / "set.npz")


@pytest.mark.parametrize("count", [0, 2.5, [3, 4]])
def test_num_classes_must_be_a_positive_integer(tmp_path, count):
    content = {key: getattr(arrays(), key) for key in npz.KEYS}
    np.savez(tmp_path / "set.npz", num_classes=np.array(count), **content)
    with pytest.raises(ValueError, match="num_classes is"):
        npz.read(tmp_path / "set.npz")


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': ('<f4', 'shape': (2,",
        b"(" * 3000,
        b"{[]: 1}",
        b"{'descr': '<f4', 1: 2}",
        b" {'descr':\n 1}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}",
    ],
)
def test_headers_by_hand(tmp_path, header):
    """What NumPy raises of a header that was not written by it is one line of ours."""
    array = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as file:
        for key in npz.KEYS:
            file.writestr(f"{key}.npy", array)
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz image set") as found:
        npz.read(tmp_path / "set.npz")
    assert "\n" not in str(found.value)
