"""Citation graphs in the format of Planetoid: Cora, CiteSeer and PubMed.

Nothing is fetched unless `download` is called, and nothing that a file names is called, see
`ntt_sparse.data._unpickle`.

Source: Yang, Cohen & Salakhutdinov 2016, "Revisiting semi-supervised learning with graph
embeddings", https://arxiv.org/abs/1603.08861; files of
https://github.com/kimiyoung/planetoid and https://github.com/tkipf/gcn.
"""

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from ntt_sparse.data import _unpickle
from ntt_sparse.data._unpickle import Csr
from ntt_sparse.data.graphs import Entries, Graph, undirected

NAMES = ("cora", "citeseer", "pubmed")
"""The graphs; another one of the same format is read as well."""

_PARTS = ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")
_URL = "https://raw.githubusercontent.com/tkipf/gcn/master/gcn/data"
_SECONDS = 60.0

CHECKSUMS: Mapping[str, Mapping[str, str]] = {
    "cora": {
        "x": "23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab",
        "y": "94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
        "tx": "b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
        "ty": "41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
        "allx": "9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
        "ally": "2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
        "graph": "58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
        "test.index": "297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
    },
    "citeseer": {
        "x": "d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6",
        "y": "8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924",
        "tx": "539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21",
        "ty": "55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce",
        "allx": "2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668",
        "ally": "f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95",
        "graph": "d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7",
        "test.index": "2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4",
    },
}
"""SHA-256 of the files `ind.NAME.PART`, of the second repository."""


def load(name: str, data_dir: str | os.PathLike[str] | None) -> Graph:
    """Reads a graph.

    Features are as stored. Links have no direction, and are there if either node lists the other;
    loops and what is listed twice are dropped. CiteSeer has nodes without features or class, which
    its files leave out: they have their places here.

    Args:
        name: `"cora"`, `"citeseer"`, `"pubmed"`, or what else stands in the names of the files.
        data_dir: The folder of the files `ind.NAME.*`, or one with a folder `planetoid` of them.

    Raises:
        FileNotFoundError: There are no such files.
        ValueError: A file is damaged, holds anything but arrays, or the files do not fit together.
    """
    folder = find(name, data_dir)
    paths = {part: folder / f"ind.{name}.{part}" for part in _PARTS}
    allx, tx = (_matrix(paths[part]) for part in ("allx", "tx"))
    ally, ty = (_one_hot(paths[part]) for part in ("ally", "ty"))
    test = _test_nodes(paths["test.index"])
    neighbours = _unpickle.read_neighbours(paths["graph"])
    _check_fit(folder, name, allx, tx, ally, ty, test)
    num_nodes = max(allx.shape[0], int(test.max()) + 1)
    nodes = np.concatenate([np.arange(allx.shape[0]), test])
    y = np.full(num_nodes, -1, np.int32)
    hot = np.concatenate([ally, ty])
    y[nodes] = np.where(hot.any(1), hot.argmax(1), -1)
    try:
        pairs = ((i, j) for i, others in neighbours.items() for j in others)
        edges = undirected(pairs, num_nodes)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{paths['graph']} does not fit the features: {error}") from error
    return Graph(_stack(allx, tx, nodes, num_nodes), edges, y, hot.shape[1], name)


def find(name: str, data_dir: str | os.PathLike[str] | None) -> Path:
    """The folder of a graph's files.

    Raises:
        FileNotFoundError: There is none.
    """
    if data_dir is None:
        raise FileNotFoundError(
            f"there is no folder for the graph {name!r}: name the one of its files ind.{name}.x, "
            "... as data_dir (or --data_dir)"
        )
    root = Path(data_dir).expanduser()
    for folder in (root / "planetoid", root):
        if (folder / f"ind.{name}.graph").is_file():
            return folder
    raise FileNotFoundError(
        f"no files ind.{name}.* in {root} or {root / 'planetoid'}: expected a graph in the format "
        f"of Planetoid, such as {', '.join(NAMES)}; ntt_sparse.data.planetoid.download fetches them"
    )


def download(
    name: str,
    folder: str | os.PathLike[str],
    *,
    url: str = _URL,
    checksums: Mapping[str, str] | None = None,
    opener: Callable[..., Any] = urllib.request.urlopen,
) -> None:
    """Fetches the files of a graph that are not there, each of which must be the known one.

    Args:
        name: `"cora"` or `"citeseer"`, or another one with checksums.
        folder: Where they go; it is made. A file appears there complete and checked or not at all.
        url: Of the folder that has the files.
        checksums: SHA-256 by part: x, y, tx, ty, allx, ally, graph and test.index.
        opener: `opener(url, timeout=seconds)` gives a response to read.

    Raises:
        ValueError: The checksums are not known, or a file is not the one they are of.
        OSError: A file cannot be fetched or written.
    """
    checksums = CHECKSUMS.get(name) if checksums is None else checksums
    if checksums is None or set(checksums) != set(_PARTS):
        raise ValueError(
            f"the checksums of the files of {name!r} are not known, and nothing else tells what "
            f"comes: pass those of {', '.join(_PARTS)}, or put the files there yourself"
        )
    root = Path(folder).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    for part in _PARTS:
        path = root / f"ind.{name}.{part}"
        if path.is_file() and _sha256(path.read_bytes()) == checksums[part]:
            continue
        source = f"{url}/{path.name}"
        content = _fetch(source, opener)
        if (found := _sha256(content)) != checksums[part]:
            raise ValueError(
                f"{source} has the SHA-256 {found}, expected {checksums[part]}: it is not the "
                "known file, nothing was written"
            )
        _place(path, content)


def _fetch(source: str, opener: Callable[..., Any]) -> bytes:
    try:
        with opener(source, timeout=_SECONDS) as response:
            return response.read(_unpickle.MOST_BYTES)
    except (OSError, HTTPException) as error:
        raise OSError(
            f"{source} cannot be fetched ({error}): put the file there yourself"
        ) from error


def _place(path: Path, content: bytes) -> None:
    """Writes a file so that it is at every moment absent or complete."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        # Gone already when it was moved.
        Path(temporary).unlink(missing_ok=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _matrix(path: Path) -> Csr:
    """Rows of features, checked: SciPy stores them one after another."""
    csr = _unpickle.read_csr(path)
    if not csr.indptr.dtype.kind == csr.indices.dtype.kind == "i":
        raise ValueError(f"{path} holds rows and columns that are no integers: it is damaged")
    starts, columns = csr.indptr.astype(np.int64), csr.indices.astype(np.int64)
    rows, width = csr.shape
    if (
        max(csr.shape) >= 2**31
        or len(starts) != rows + 1
        or starts[0] != 0
        or starts[-1] != len(columns)
        or np.any(np.diff(starts) < 0)
        or len(csr.data) != len(columns)
        or np.any((columns < 0) | (columns >= width))
        or len(np.unique(np.repeat(np.arange(rows), np.diff(starts)) * width + columns))
        < len(columns)
    ):
        raise ValueError(f"{path} is no sparse matrix of shape {csr.shape}: it is damaged")
    # The negated form also refuses NaN.
    if not np.all(np.abs(csr.data) <= np.finfo(np.float32).max):
        raise ValueError(f"{path} holds features that are not finite in float32: it is damaged")
    return csr


def _one_hot(path: Path) -> np.ndarray:
    """Classes of nodes, one-hot or all zeros, boolean."""
    array = _unpickle.read_array(path)
    if array.ndim != 2 or not np.all((array == 0) | (array == 1)) or np.any(array.sum(1) > 1):
        raise ValueError(f"{path} holds no classes of nodes: expected rows of zeros and a one")
    return array != 0


def _test_nodes(path: Path) -> Int64[np.ndarray, " t"]:
    """The nodes of the rows of `tx`, in their order."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: expected a node in each line")
    try:
        nodes = np.array([int(line) for line in path.read_text().split()], np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged ({error}): expected a node in each line") from error
    if not len(nodes) or len(np.unique(nodes)) < len(nodes):
        raise ValueError(f"{path} holds {len(nodes)} nodes, some twice: expected different ones")
    return nodes


def _check_fit(
    folder: Path, name: str, allx: Csr, tx: Csr, ally: np.ndarray, ty: np.ndarray, test: np.ndarray
) -> None:
    """Checks that the parts are of one graph: rows, columns, and places of the test nodes."""
    rows, width = allx.shape
    if (
        tx.shape != (len(test), width)
        or ally.shape != (rows, ty.shape[1])
        or len(ty) != len(test)
        or test.min() < rows
        # Nodes that are left out are few.
        or test.max() >= rows + 2 * len(test)
    ):
        raise ValueError(
            f"the files ind.{name}.* in {folder} do not fit together: features {allx.shape} and "
            f"{tx.shape}, classes {ally.shape} and {ty.shape}, {len(test)} test nodes from "
            f"{test.min()} to {test.max()}"
        )


def _stack(allx: Csr, tx: Csr, nodes: np.ndarray, num_nodes: int) -> Entries:
    """The features of all nodes; `nodes` are those of the rows of both parts."""
    lengths = np.concatenate([np.diff(part.indptr) for part in (allx, tx)])
    rows = np.repeat(nodes, lengths)
    columns = np.concatenate([part.indices for part in (allx, tx)])
    values = np.concatenate([part.data for part in (allx, tx)])
    order = np.lexsort((columns, rows))
    order = order[values[order] != 0]
    return Entries(
        rows[order].astype(np.int32), columns[order].astype(np.int32),
        values[order].astype(np.float32), (num_nodes, allx.shape[1]),
    )  # fmt: skip
