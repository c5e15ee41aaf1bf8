import shutil

import numpy as np
import pytest
from made_sets import assert_holds, make_arrays, write_images

from ntt_sparse.data import tfds_source


def cached(cache_dir):
    (path,) = cache_dir.iterdir()
    return path


def test_second_read_decodes_nothing(data_dir, cache_dir, monkeypatch):
    arrays = make_arrays()
    write_images(data_dir, "made", arrays)
    tfds_source.read("made", data_dir)
    assert cached(cache_dir).name.startswith("made-1.0.0-")
    monkeypatch.setattr(tfds_source, "_decode_folder", lambda folder: pytest.fail("decoded"))
    result = tfds_source.read("made", data_dir)
    assert_holds(result, arrays)
    assert result.num_classes == 4


@pytest.mark.parametrize("damage", ["garbage", "cut", "pickle"])
def test_damaged_cache_is_replaced(data_dir, cache_dir, caplog, damage):
    arrays = make_arrays()
    write_images(data_dir, "made", arrays)
    tfds_source.read("made", data_dir)
    path = cached(cache_dir)
    content = path.read_bytes()
    if damage == "pickle":
        np.savez(path, **dict.fromkeys(("x_train", "y_train", "x_test", "y_test"), np.array([{}])))
    else:
        path.write_bytes(b"garbage" if damage == "garbage" else content[:-200])
    assert_holds(tfds_source.read("made", data_dir), arrays)
    assert "ignoring the cache of decoded images" in caplog.text
    assert cached(cache_dir).read_bytes()[:2] == b"PK"
    caplog.clear()
    assert_holds(tfds_source.read("made", data_dir), arrays)
    assert "ignoring" not in caplog.text


def test_unwritable_cache_is_not_fatal(data_dir, tmp_path, monkeypatch, caplog):
    arrays = make_arrays()
    write_images(data_dir, "made", arrays)
    # A file where the folder should be stops even the superuser.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NTT_SPARSE_CACHE", str(tmp_path / "file" / "cache"))
    assert_holds(tfds_source.read("made", data_dir), arrays)
    assert "decoded images are not kept" in caplog.text


def test_default_cache_is_in_the_home(data_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("NTT_SPARSE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(data_dir, "made", make_arrays())
    tfds_source.read("made", data_dir)
    assert len(list((tmp_path / ".cache" / "ntt_sparse").iterdir())) == 1


def test_a_set_prepared_anew_is_decoded_anew(data_dir, cache_dir):
    folder = write_images(data_dir, "made", make_arrays())
    tfds_source.read("made", data_dir)
    shutil.rmtree(folder)
    changed = make_arrays(seed=1)
    write_images(data_dir, "made", changed)
    assert_holds(tfds_source.read("made", data_dir), changed)
    assert len(list(cache_dir.iterdir())) == 2
