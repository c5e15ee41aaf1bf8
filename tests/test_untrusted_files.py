"""Files from elsewhere, damaged in every way: a loader reads them or raises its own error.

A handful of examples of each here; to look further:

    NTT_SPARSE_FUZZ=2000 python -m pytest tests/test_untrusted_*.py
"""

import contextlib
import io
import json
import struct
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzzing import CHANGES, damaged, damages, fuzzed, replaced, written
from PIL import Image

from experiments import provenance
from ntt_sparse.data import folders, images, npz, planetoid, ratings, text
from ntt_sparse.gates.l1 import L1
from ntt_sparse.models import _published
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.pruning.compact import compact
from ntt_sparse.training import checkpoint, deploy, export
from ntt_sparse.training.metrics import MetricsLog

sys.path += [str(Path(__file__).parent / "data")]
import planetoid_files

MOST_BYTES = 200 * 2**20
PARAMS = {"Dense_0": {"kernel": jnp.ones((5, 4)), "bias": jnp.zeros(4)}}
MASKS = {"Dense_0": {"kernel": jnp.ones((5, 4), bool), "bias": None}}


class Loader(NamedTuple):
    """How files are made in a folder, and how they are read from there."""

    make: Any
    load: Any
    errors: Any = (ValueError,)


def network_file(folder):
    export.save_network(
        folder / "n.safetensors", PARAMS, MASKS, {"batch_stats": {"m": jnp.ones(2)}}
    )


def load_network_file(folder):
    path = folder / "n.safetensors"
    errors = []
    for load in (
        export.load_network,
        export.load_model_state,
        lambda p: export.load_masks(p, PARAMS),
    ):
        try:
            load(path)
        except ValueError as error:
            errors.append(error)
    if errors:
        raise errors[-1]


MODULE = LeNet(2, (), 5, (4, 3), kind=L1(), gated=2)
NETWORK = MODULE.network((5,))
GATES = {"Dense_0/gate": np.array([1.0, 0, 1, 1]), "Dense_1/gate": np.ones(3)}


def small(folder, name):
    params = MODULE.init(jax.random.key(0), jnp.ones((1, 5)))["params"]
    found = compact(MODULE, {"params": params}, (5,), gates=GATES)
    deploy.save(folder / name, found.module, found.variables)


def weights(folder):
    from safetensors.numpy import save_file

    save_file(
        {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float16)}, folder / "w.safetensors"
    )


def load_weights(folder):
    shapes = {
        "w": jax.ShapeDtypeStruct((2, 3), jnp.float32),
        "b": jax.ShapeDtypeStruct((3,), jnp.float32),
    }
    _published.read(
        folder / "w.safetensors",
        lambda arrays: _published.fit(dict(arrays), shapes, "it", "fields"),
    )


def image_set(folder, save=np.savez):
    pixels = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
    labels = np.arange(6) % 3
    save(folder / "set.npz", x_train=pixels, y_train=labels, x_test=pixels[:3], y_test=labels[:3])


def graph(folder):
    x = np.arange(40, dtype=np.float32).reshape(10, 4) % 3
    y = np.eye(3, dtype=np.int32)[np.arange(10) % 3]
    lists = {i: [(i + 1) % 10] for i in range(10)}
    planetoid_files.write(folder, "made", planetoid_files.parts(x, y, 6, [9, 7, 6, 8], lists))


def monti(folder):
    with h5py.File(folder / "r.mat", "w") as file:
        file["M"] = np.array([[1.0, 2], [3, 4]])
        file["Otraining"] = np.array([[1.0, 0], [1, 0]])
        file["Otest"] = np.array([[0.0, 1], [0, 0]])


def lines(folder):
    (folder / "u1.base").write_text("2\t1\t5\t881\n1\t3\t4\t882\n1\t2\t1\t883\n")
    (folder / "u1.test").write_text("3\t2\t3\t884\n")


def pictures(folder, kind="png"):
    for split in ("train", "val"):
        (folder / split / "a").mkdir(parents=True)
        pixels = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
        Image.fromarray(pixels).save(folder / split / "a" / f"x.{kind}")


def load_pictures(folder):
    for part, _ in folders.read(folder, 8)[:2]:
        part[:]


def state(value=1.0):
    return {"w": jnp.full((2, 3), float(value)), "key": jax.random.key(3), "none": None}


def saved(folder):
    with checkpoint.Checkpoints(folder / "c", identity="a") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), records=step)


def restore(folder):
    with checkpoint.Checkpoints(folder / "c", identity="a") as checkpoints:
        found = checkpoints.restore(state())
    # What is whole is what was saved.
    assert found is None or float(found[0]["w"][0, 0]) == found[1]


def records(folder):
    log = MetricsLog(folder / "m.jsonl", "s")
    for step in range(3):
        log.write(step, {"loss": np.array([0.5, np.nan])})


def read_records(folder):
    log = MetricsLog(folder / "m.jsonl", "s")
    log.truncate(len(log.records))
    assert MetricsLog(folder / "m.jsonl", "s").records == log.records


def origins(folder):
    rows = {"runs": [{"command": "python a", "version": "1", "commit": "ab"}]}
    (folder / "provenance.json").write_text(json.dumps(rows))


LOADERS = {
    "network": Loader(network_file, load_network_file),
    "gates": Loader(
        lambda folder: export.save_gates(folder / "g.safetensors", GATES),
        lambda folder: export.load_gates(folder / "g.safetensors", NETWORK),
    ),
    "compacted": Loader(
        lambda folder: small(folder, "s.safetensors"), lambda f: deploy.load(f / "s.safetensors")
    ),
    "compacted in Orbax": Loader(
        lambda folder: small(folder, "s"), lambda folder: deploy.load(folder / "s")
    ),
    "published weights": Loader(weights, load_weights),
    "image set": Loader(image_set, lambda folder: images.load(folder / "set.npz")),
    "compressed image set": Loader(
        lambda folder: image_set(folder, np.savez_compressed), lambda f: npz.read(f / "set.npz")
    ),
    "graph": Loader(graph, lambda folder: planetoid.load("made", folder)),
    "ratings of Monti": Loader(monti, lambda f: ratings.read_monti(f / "r.mat", "flixster")),
    "ratings of MovieLens": Loader(
        lines, lambda folder: ratings.read_movielens(folder / "u1.base", folder / "u1.test")
    ),
    "PNG": Loader(pictures, load_pictures),
    "JPEG": Loader(lambda folder: pictures(folder, "jpg"), load_pictures),
    "text": Loader(
        lambda folder: (folder / "t.txt").write_text("some words " * 9),
        lambda folder: text.load(folder / "t.txt", 5),
    ),
    "checkpoint": Loader(saved, restore, (checkpoint.CheckpointError,)),
    "records": Loader(records, read_records, ()),
    "provenance": Loader(origins, lambda f: provenance.read(f / "provenance.json")),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files of a loader as they should be, by path within their folder."""
    known = {}

    def files(name):
        if name not in known:
            folder = tmp_path_factory.mktemp("made")
            LOADERS[name].make(folder)
            LOADERS[name].load(folder)
            known[name] = {
                str(path.relative_to(folder)): path.read_bytes()
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
        return known[name]

    return files


@pytest.fixture(scope="module", autouse=True)
def traced_at_most_once():
    """Before Python 3.13.2 each `tracemalloc.stop` may crash the process where threads of a library
    allocate, as those of checkpoints do (python/cpython#128679)."""
    # Tables of characters are made at first use, which is ten times as slow when traced.
    CHANGES.validate()
    yield
    tracemalloc.stop()


@contextlib.contextmanager
def little_memory():
    """What happens inside takes no more than `MOST_BYTES` at once."""
    if not tracemalloc.is_tracing():
        tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    yield
    assert tracemalloc.get_traced_memory()[1] - before < MOST_BYTES


def check(loader, folder):
    """Reads, or refuses in one line that says where; never takes much memory."""
    with little_memory():
        try:
            loader.load(folder)
        except loader.errors as error:
            said = str(error)
            assert type(error) in loader.errors, repr(error)
            assert "\n" not in said and len(said) < 1500 and str(folder) in said, said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOADERS)
def test_damaged_bytes(name, made, tmp_path):
    files = made(name)

    @fuzzed(st.tuples(st.integers(0, 2**16), damages()))
    def test(example):
        which, how = example
        path = sorted(files)[which % len(files)]
        changed = files | {path: damaged(files[path], how)}
        check(LOADERS[name], written(tmp_path, changed))

    test()


@pytest.mark.parametrize("name", ["network", "gates", "compacted", "published weights"])
def test_headers_of_safetensors_that_say_something_else(name, made, tmp_path):
    ((path, content),) = made(name).items()
    size = struct.unpack("<Q", content[:8])[0]

    @fuzzed(st.lists(CHANGES, min_size=1, max_size=2))
    def test(changes):
        header = json.loads(content[8 : 8 + size])
        for where, value in changes:
            replaced(header, where, value)
        changed = json.dumps(header).encode()
        whole = struct.pack("<Q", len(changed)) + changed + content[8 + size :]
        check(LOADERS[name], written(tmp_path, {path: whole}))

    test()


DTYPES = st.sampled_from("u1 i1 i8 f2 f4 f8 c8 ? U3 S2 M8[s] O".split())
ARRAYS = st.tuples(
    DTYPES, st.lists(st.integers(0, 3), max_size=4), st.sampled_from([0, 1, -1, np.nan])
)


def array(dtype, shape, value):
    if dtype.startswith(("U", "S", "M", "O")):
        return np.zeros(shape, dtype)
    with np.errstate(all="ignore"):
        return np.full(shape, value).astype(dtype)


@pytest.mark.filterwarnings("ignore")
def test_image_sets_of_other_arrays(made, tmp_path):
    known = {"x_train": None, "y_train": None, "x_test": None, "y_test": None, "num_classes": None}
    names = st.sampled_from([*known, "other"])

    @fuzzed(st.tuples(st.dictionaries(names, ARRAYS, min_size=1, max_size=3), st.booleans()))
    def test(example):
        changed, compressed = example
        folder = written(tmp_path, made("image set"))
        with np.load(folder / "set.npz") as file:
            arrays = dict(file) | {key: array(*each) for key, each in changed.items()}
        (np.savez_compressed if compressed else np.savez)(folder / "set.npz", **arrays)
        check(LOADERS["image set"], folder)

    test()


def test_a_set_that_claims_to_be_huge_takes_no_memory(tmp_path):
    for shape in ((2**40, 28, 28), (2**31, 2**31, 2**31), (3 * 10**9,)):
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        folder = written(tmp_path, {})
        folder.mkdir()
        image_set(folder)
        with np.load(folder / "set.npz") as file:
            arrays = dict(file)
        del arrays["x_train"]
        np.savez(folder / "set.npz", **arrays)
        with zipfile.ZipFile(folder / "set.npz", "a") as archive:
            archive.writestr("x_train.npy", buffer.getvalue() + b"\0" * 50)
        with pytest.raises(ValueError, match=r"set\.npz cannot be read"):
            npz.read(folder / "set.npz")
        check(LOADERS["image set"], folder)


def test_ratings_and_images_that_claim_to_be_huge_take_no_memory(tmp_path):
    with little_memory():
        with h5py.File(tmp_path / "r.mat", "w") as file:
            for name in ("M", "Otraining", "Otest"):
                file.create_dataset(name, (10**6, 10**6), "f8", chunks=(100, 100))
        with pytest.raises(ValueError, match=r"\(1000000, 1000000\)") as raised:
            ratings.read_monti(tmp_path / "r.mat", "flixster")
        assert "\n" not in str(raised.value)
        pictures(tmp_path)
        path = tmp_path / "train" / "a" / "x.png"
        content = bytearray(path.read_bytes())
        # Width and height of the header, and its checksum.
        content[16:24] = struct.pack(">II", 12_000, 9_000)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.png is no image that can be read"):
            load_pictures(tmp_path)
