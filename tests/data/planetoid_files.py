"""Files in the format of Planetoid, as Python 2 pickled them, instruction by instruction."""

import struct

import numpy as np

NONE, CALL, BUILD = b"N", b"R", b"b"


def integer(value):
    return b"J" + struct.pack("<i", value)


def string(text):
    return b"T" + struct.pack("<i", len(text)) + text


def together(*items):
    return b"(" + b"".join(items) + b"t"


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def dtype(kind, order=b"<"):
    state = (integer(3), string(order), NONE, NONE, NONE, integer(-1), integer(-1), integer(0))
    arguments = together(string(kind), integer(0), integer(1))
    return named("numpy", "dtype") + arguments + CALL + together(*state) + BUILD


def array(values, *, kind=None, shape=None):
    arguments = together(named("numpy", "ndarray"), together(integer(0)), string(b"b"))
    state = together(
        integer(1),
        together(*map(integer, values.shape if shape is None else shape)),
        dtype(values.dtype.str[1:].encode() if kind is None else kind),
        b"\x89",
        string(values.tobytes()),
    )
    return named("numpy.core.multiarray", "_reconstruct") + arguments + CALL + state + BUILD


def csr(matrix, **changed):
    """A sparse matrix; `changed` are arrays in place of its own."""
    rows, columns = np.nonzero(matrix)
    arrays = {
        "data": matrix[rows, columns].astype("<f4"),
        "indices": columns.astype("<i4"),
        "indptr": np.searchsorted(rows, np.arange(len(matrix) + 1)).astype("<i4"),
    } | changed
    state = string(b"_shape") + together(*map(integer, matrix.shape))
    state += b"".join(string(name.encode()) + array(value) for name, value in arrays.items())
    return named("scipy.sparse.csr", "csr_matrix") + b")\x81" + b"}(" + state + b"u" + BUILD


def neighbours(lists):
    start = named("collections", "defaultdict") + together(named("__builtin__", "list")) + CALL
    items = (
        integer(node) + b"](" + b"".join(map(integer, others)) + b"e"
        for node, others in lists.items()
    )
    return start + b"(" + b"".join(items) + b"u"


def pickled(content):
    return b"\x80\x02" + content + b"."


def parts(x, y, known, test, lists):
    """The files of a graph by part: the first `known` nodes in `allx`, and the test nodes."""
    return {
        "x": pickled(csr(x[:1])),
        "y": pickled(array(y[:1])),
        "allx": pickled(csr(x[:known])),
        "ally": pickled(array(y[:known])),
        "tx": pickled(csr(x[test])),
        "ty": pickled(array(y[test])),
        "graph": pickled(neighbours(lists)),
        "test.index": "".join(f"{node}\n" for node in test).encode(),
    }


def write(folder, name, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for part, content in contents.items():
        (folder / f"ind.{name}.{part}").write_bytes(content)
