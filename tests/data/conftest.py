"""No test of this folder reads or writes the user's own sets and cache."""

import pytest


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """Keeps decoded images away from the user's cache."""
    monkeypatch.setenv("NTT_SPARSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """An empty folder for prepared sets; the user's own is out of sight."""
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    (tmp_path / "tfds").mkdir()
    return tmp_path / "tfds"
