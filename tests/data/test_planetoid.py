"""Citation graphs: what is read, what is refused, and what is fetched."""

import hashlib
import os
import pickle
import urllib.request
from pathlib import Path

import numpy as np
import planetoid_files as files
import pytest

from ntt_sparse.data import _unpickle, planetoid

# Node 8 is in no file but the graph; test nodes are not in their order.
KNOWN, TEST = 6, [9, 7, 6]
LISTS = {0: [1, 2, 2], 1: [0], 2: [0, 9], 3: [3], 6: [7], 7: [6], 8: []}


def made(seed=0):
    random = np.random.RandomState(seed)
    x = random.randint(0, 3, (10, 4)).astype(np.float32)
    y = np.eye(3, dtype=np.int32)[random.randint(0, 3, 10)]
    x[8], y[8] = 0, 0
    return x, y


def contents(**changed):
    return files.parts(*made(), KNOWN, TEST, LISTS) | changed


def load(folder, **changed):
    files.write(folder, "made", contents(**changed))
    return planetoid.load("made", folder)


def test_a_graph_of_known_files(tmp_path):
    x, y = made()
    graph = load(tmp_path / "planetoid")
    np.testing.assert_array_equal(graph.x.dense(), x)
    expected = np.where(y.any(1), y.argmax(1), -1)
    assert graph.y.tolist() == expected.tolist() and graph.y[8] == -1
    assert graph.edges.tolist() == [[0, 1], [0, 2], [2, 9], [6, 7]]
    assert (graph.num_nodes, graph.num_classes, graph.name) == (10, 3, "made")
    order = graph.x.rows * 4 + graph.x.columns
    assert np.all(np.diff(order) > 0) and np.all(graph.x.values != 0)
    # Also through the folder above.
    assert planetoid.load("made", tmp_path).edges.shape == (4, 2)


CSR = files.csr(made()[0][:KNOWN])
# Nodes 0 and 1 have the list that is at place 0.
SHARED = files.pickled(
    files.neighbours({0: []})[:-1].replace(b"](e", b"](e" + b"q\0") + files.integer(1) + b"h\0u"
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"allx": files.pickled(CSR)[:-30]}, "ind.made.allx cannot be read"),
        ({"allx": b""}, "ind.made.allx cannot be read"),
        ({"allx": files.pickled(files.array(made()[0]))}, "it holds array"),
        ({"ally": files.pickled(CSR)}, "it holds matrix"),
        ({"ally": files.pickled(files.array(np.ones((6, 3), np.int32)))}, "holds no classes"),
        ({"ally": files.pickled(files.array(made()[1][:5]))}, "do not fit together"),
        ({"tx": files.pickled(files.csr(made()[0][:2]))}, "do not fit together"),
        ({"tx": files.pickled(files.csr(np.ones((3, 5))))}, "do not fit together"),
        ({"test.index": b"9\n7\n5\n"}, "do not fit together"),
        ({"test.index": b"9\n7\n2000000000\n"}, "do not fit together"),
        ({"test.index": b"9\n7\n7\n"}, "some twice"),
        ({"test.index": b"9\n7\nsix\n"}, "ind.made.test.index is damaged"),
        ({"graph": files.pickled(files.neighbours({0: [10]}))}, "an edge has the nodes 0 to 10"),
        ({"graph": files.pickled(files.neighbours({-1: [2]}))}, "an edge has the nodes -1 to 2"),
        (
            {"allx": files.pickled(files.csr(made()[0][:KNOWN], indptr=np.arange(7)))},
            "no sparse matrix of shape (6, 4)",
        ),
        (
            {"tx": files.pickled(files.csr(np.ones((3, 4)), indices=np.full(12, 4)))},
            "no sparse matrix of shape (3, 4)",
        ),
        (
            {"tx": files.pickled(files.csr(np.ones((3, 4)), indices=np.zeros(12, int)))},
            "no sparse matrix of shape (3, 4)",
        ),
        (
            {"tx": files.pickled(files.csr(np.ones((3, 4)), data=np.full(12, np.nan)))},
            "not finite",
        ),
        (
            {"tx": files.pickled(files.csr(np.ones((3, 4)), data=np.full(12, 1e300)))},
            "not finite in float32",
        ),
        (
            {"tx": files.pickled(files.csr(np.ones((3, 4)), indptr=np.arange(0, 13, 4.0)))},
            "rows and columns that are no integers",
        ),
        ({"graph": SHARED}, "it holds one list of two nodes"),
    ],
)
def test_damaged_files(tmp_path, changed, message):
    with pytest.raises(ValueError) as raised:
        load(tmp_path, **changed)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("part", ["tx", "graph", "test.index"])
def test_missing_files(tmp_path, part):
    files.write(tmp_path, "made", {k: v for k, v in contents().items() if k != part})
    with pytest.raises(FileNotFoundError, match="made"):
        planetoid.load("made", tmp_path)
    with pytest.raises(FileNotFoundError, match="data_dir"):
        planetoid.load("made", None)


class Marked:
    """Pickled by this Python, it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def calling(module, name, *arguments):
    return files.named(module, name) + files.together(*arguments) + files.CALL


ARRAY = files.array(np.zeros(2, np.int32))
HOSTILE = {
    "a function": calling("os", "system", files.string(b"touch marked")),
    "an evaluation": calling("__builtin__", "eval", files.string(b"open('marked', 'w')")),
    "the same of today": calling("builtins", "exec", files.string(b"open('marked', 'w')")),
    "a reader of NumPy": calling("numpy", "load", files.string(b"marked")),
    "another class of NumPy": calling("numpy.core.multiarray", "scalar", files.NONE),
    "a factory": calling("collections", "defaultdict", files.named("os", "system")),
    "an attribute of what may be named": files.named("numpy", "ndarray.tofile"),
    "an instance": b"(ios\nsystem\n",
    "an extension": b"\x82\x01",
    "something from elsewhere": files.integer(1) + b"Q",
    "a far place": b"]r\xff\xff\xff\x7f",
    "a large number of bytes": b"\x8e" + b"\xff" * 7 + b"\x7f",
    "no name of a type": ARRAY.replace(files.string(b"i4"), b"]"),
    "objects": files.array(np.zeros(2, np.int64), kind=b"O8"),
    "fields": files.array(np.zeros(2, np.int64), kind=b"V8"),
    "too few bytes": files.array(np.zeros(2, np.int32), shape=(10**9, 10**9)),
    "a size below zero": files.array(np.zeros(2, np.int32), shape=(-1, -2)),
    "a class with a state": files.named("numpy", "dtype") + b"}" + files.BUILD,
    "a mapping with a state": calling("collections", "defaultdict") + b"}" + files.BUILD,
    "an array without a state": ARRAY[: ARRAY.index(files.CALL) + 1],
    "a list": b"]",
    # Whatever is looked up in a mapping is hashed, which ends in the stack or not at all.
    "a key that is deep": b"})" + b"\x85" * 10**5 + b"Ns",
    "a key that is long": b"})" + b"q\0h\0\x86" * 60 + b"Ns",
    "the same by two places": b"})" + b"q\0q\1h\0\x86" * 60 + b"Ns",
}  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_pickles_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ind.made.x"
    path.write_bytes(files.pickled(content))
    before = dict(vars(_unpickle._Dtype)), dict(vars(_unpickle._Mapping))
    for read in (_unpickle.read_array, _unpickle.read_csr):
        with pytest.raises(ValueError) as raised:
            read(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "marked").exists()
    assert before == (dict(vars(_unpickle._Dtype)), dict(vars(_unpickle._Mapping)))


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_today_are_refused(tmp_path, protocol):
    """With every protocol, one that would be harmful: loaded by pickle itself it does its harm."""
    marked, path = tmp_path / "marked", tmp_path / "x"
    path.write_bytes(pickle.dumps(Marked(str(marked)), protocol))
    for read in (_unpickle.read_array, _unpickle.read_csr, _unpickle.read_neighbours):
        with pytest.raises(ValueError, match="cannot be read"):
            read(path)
    assert not marked.exists()
    pickle.loads(path.read_bytes())
    assert marked.exists()


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i8", "|u1", ">i2"])
def test_arrays_of_numbers(tmp_path, dtype):
    values = np.arange(6).reshape(2, 3).astype(dtype)
    content = files.array(values).replace(
        files.dtype(dtype[1:].encode()), files.dtype(dtype[1:].encode(), dtype[:1].encode())
    )
    (tmp_path / "x").write_bytes(files.pickled(content))
    found = _unpickle.read_array(tmp_path / "x")
    np.testing.assert_array_equal(found, values)
    assert found.dtype == values.dtype.newbyteorder("=")


def checksums(parts):
    return {part: hashlib.sha256(content).hexdigest() for part, content in parts.items()}


def test_files_are_fetched_once_and_checked(tmp_path):
    parts = contents()
    files.write(tmp_path / "there", "made", parts)
    asked = []

    def opener(url, timeout):
        asked.append(url)
        return urllib.request.urlopen(url, timeout=timeout)

    def fetch():
        planetoid.download(
            "made", tmp_path / "here", url=(tmp_path / "there").as_uri(),
            checksums=checksums(parts), opener=opener,
        )  # fmt: skip

    fetch()
    assert len(asked) == 8 and planetoid.load("made", tmp_path / "here").num_nodes == 10
    (tmp_path / "here" / "ind.made.tx").write_bytes(b"cut short")
    fetch()
    assert len(asked) == 9 and asked[-1].endswith("ind.made.tx")
    assert planetoid.load("made", tmp_path / "here").num_nodes == 10
    assert len(list((tmp_path / "here").iterdir())) == 8


def test_what_is_not_the_known_file_is_not_kept(tmp_path):
    parts = contents()
    files.write(tmp_path / "there", "made", parts | {"ty": parts["ty"] + b"."})
    with pytest.raises(ValueError, match=r"ind\.made\.ty has the SHA-256 .* nothing was written"):
        planetoid.download(
            "made", tmp_path / "here", url=(tmp_path / "there").as_uri(),
            checksums=checksums(parts),
        )  # fmt: skip
    left = {path.name for path in (tmp_path / "here").iterdir()}
    assert left == {"ind.made.x", "ind.made.y", "ind.made.tx"}
    with pytest.raises(OSError, match=r"ind\.made\.x cannot be fetched"):
        planetoid.download(
            "made", tmp_path / "other", url=(tmp_path / "nowhere").as_uri(),
            checksums=checksums(parts),
        )  # fmt: skip
    assert not list((tmp_path / "other").iterdir())
    for known in (None, {"x": "0" * 64}):
        with pytest.raises(ValueError, match="checksums of the files of 'pubmed' are not known"):
            planetoid.download("pubmed", tmp_path / "third", checksums=known)
    assert not (tmp_path / "third").exists()


@pytest.fixture
def real():
    """The folder of the real files, from the environment."""
    folder = os.environ.get("PLANETOID_DIR")
    if not folder:
        pytest.skip("the real graphs are read where PLANETOID_DIR names their folder")
    return folder


@pytest.mark.parametrize(
    ("name", "shape", "entries", "edges", "classes", "degree"),
    [
        ("cora", (2708, 1433), 49_216, 5278, [351, 217, 418, 818, 426, 298, 180], 168),
        ("citeseer", (3327, 3703), 105_165, 4552, [249, 590, 668, 701, 596, 508], 99),
    ],
)
def test_real_graphs(real, name, shape, entries, edges, classes, degree):
    """The well-known sizes; CiteSeer has 15 nodes that its files leave out."""
    graph = planetoid.load(name, real)
    assert graph.x.shape == shape and len(graph.x.values) == entries
    assert graph.edges.shape == (edges, 2)
    assert np.bincount(graph.edges.ravel()).max() == degree
    assert np.bincount(graph.y[graph.y >= 0]).tolist() == classes
    assert np.sum(graph.y < 0) == (15 if name == "citeseer" else 0)
    assert np.unique(graph.x.values).tolist() == [1.0]
    for part, digest in planetoid.CHECKSUMS[name].items():
        content = (planetoid.find(name, real) / f"ind.{name}.{part}").read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
