"""Arrays from pickles of Python 2, of which nothing is ever called.

A pickle is a program: what it names it may call. The module `pickle`, which would run it, has no
part here: the instructions that arrays need are followed below, names stand for records of what
they would have been called with, and arrays are made of the bytes in those records afterwards.
The worst that a file can do is to take long, and memory of a hundred times its size.
"""

import math
import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

_DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8")
_ORDERS = "<>|="

MOST_BYTES = 100 * 2**20
"""Of a file; more than any of Planetoid has."""
# Of a file; a sparse matrix has 18.
_MOST_TUPLES = 100

# Those of the known files, and of the integers and single items that others may have.
_OPCODES = frozenset(
    "APPEND APPENDS BINGET BININT BININT1 BININT2 BINPUT BINSTRING BUILD EMPTY_DICT EMPTY_LIST "
    "EMPTY_TUPLE GLOBAL LONG1 LONG_BINGET LONG_BINPUT MARK NEWFALSE NEWOBJ NEWTRUE NONE PROTO "
    "REDUCE SETITEM SETITEMS SHORT_BINSTRING STOP TUPLE TUPLE1 TUPLE2 TUPLE3".split()
)


class UnpicklingError(ValueError):
    """A pickle holds something else than was asked for."""


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _Record:
    """What a pickle would have called something with, and what it would have given the result."""

    __slots__ = ("arguments", "state")

    def __new__(cls, *arguments: Any) -> "_Record":
        record = super().__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Record):
    """In place of `numpy.core.multiarray._reconstruct`."""

    __slots__ = ()


class _Dtype(_Record):
    """In place of `numpy.dtype`."""

    __slots__ = ()


class _Matrix(_Record):
    """In place of `scipy.sparse.csr.csr_matrix`."""

    __slots__ = ()


class _Name(_Record):
    """In place of what is only handed on: `numpy.ndarray`, `list`."""

    __slots__ = ()


class _Mapping(dict):
    """In place of `collections.defaultdict`: without a default."""

    __slots__ = ()

    def __init__(self, *arguments: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        raise UnpicklingError("a mapping with a state")


_ALLOWED: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Name,
    ("scipy.sparse.csr", "csr_matrix"): _Matrix,
    ("collections", "defaultdict"): _Mapping,
    ("__builtin__", "list"): _Name,
}


class Csr(NamedTuple):
    """A sparse matrix as SciPy stores its rows one after another, not checked."""

    data: Shaped[np.ndarray, " nnz"]
    indices: Shaped[np.ndarray, " nnz"]
    indptr: Shaped[np.ndarray, " rows_and_one"]
    shape: tuple[int, int]


def read_array(path: Path) -> Shaped[np.ndarray, "..."]:
    """Reads a pickled array of numbers.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds anything else, or is damaged.
    """
    return _read(path, "an array of numbers", _array)


def read_csr(path: Path) -> Csr:
    """Reads a pickled sparse matrix of numbers, see `read_array`."""
    return _read(path, "a sparse matrix of rows", _csr)


def read_neighbours(path: Path) -> dict[int, list[int]]:
    """Reads a pickled mapping from integers to lists of integers, see `read_array`."""
    return _read(path, "a mapping from nodes to lists of nodes", _neighbours)


def _read(path: Path, expected: str, convert: Any) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: expected {expected}, as Planetoid has it")
    try:
        size = path.stat().st_size
        _check(size <= MOST_BYTES, f"{size} bytes, more than {MOST_BYTES}")
        return convert(_load(path.read_bytes()))
    except OSError:
        raise
    # Of damaged files the machine of pickle raises nearly anything.
    except Exception as error:
        # Which may be about a name as long as the file.
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as {expected} ({reason}): it is damaged, or not of Planetoid"
        ) from error


def _load(content: bytes) -> Any:
    # What is looked up in a mapping is hashed, and a tuple through all that it holds, as deep and
    # as often as it holds it: tuples are few, and each is at one place alone.
    last, num_tuples, places = "", 0, set()
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name not in _OPCODES:
            raise UnpicklingError(f"it has the instruction {name}")
        if name in ("BINPUT", "LONG_BINPUT"):
            # Places are as many as the largest number says, whatever is in them.
            if not 0 <= int(argument or 0) <= len(content):
                raise UnpicklingError(f"it puts something at place {argument}")
            if "TUPLE" in last:
                places.add(argument)
        else:
            if name in ("BINGET", "LONG_BINGET") and argument in places:
                raise UnpicklingError("it has a tuple at two places")
            num_tuples += "TUPLE" in name
            if num_tuples > _MOST_TUPLES:
                raise UnpicklingError(f"it has more than {_MOST_TUPLES} tuples")
            last = name
        machine.follow(name, argument)
    return machine.pop()


class _Machine:
    """Follows instructions; what it makes are numbers, texts, lists, dictionaries and records."""

    def __init__(self):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.places: dict[Any, Any] = {}

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise UnpicklingError("it takes what is not there")
        return self.stack.pop()

    def pop_many(self, count: int | None = None) -> list[Any]:
        """So many items, or those since the last mark."""
        if count is None:
            if not self.marks:
                raise UnpicklingError("it takes what is not there")
            start = self.marks.pop()
            items = self.stack[start:]
            del self.stack[start:]
            return items
        return [self.pop() for _ in range(count)][::-1]

    def follow(self, name: str, argument: Any) -> None:
        if name in ("BINPUT", "LONG_BINPUT"):
            self.places[argument] = self.top()
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("APPEND", "APPENDS"):
            items = self.pop_many(1 if name == "APPEND" else None)
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop_many(2 if name == "SETITEM" else None)
            self.top(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "BUILD":
            state = self.pop()
            self.top(_Record, _Mapping).__setstate__(state)
        elif name not in ("PROTO", "STOP"):
            self.stack.append(self.made(name, argument))

    def top(self, *kinds: type) -> Any:
        item = self.pop()
        if kinds and not isinstance(item, kinds):
            raise UnpicklingError(f"it changes {_kind(item)}")
        self.stack.append(item)
        return item

    def made(self, name: str, argument: Any) -> Any:
        if name in ("BINGET", "LONG_BINGET"):
            return self.places[argument]
        if name == "GLOBAL":
            return _named(argument)
        if name in ("REDUCE", "NEWOBJ"):
            called, arguments = self.pop_many(2)
            if not isinstance(called, type) or not isinstance(arguments, tuple):
                raise UnpicklingError(f"it calls {_kind(called)}")
            return called(*arguments)
        if "TUPLE" in name:
            sizes = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
            return tuple(self.pop_many(sizes.get(name)))
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name in ("EMPTY_LIST", "EMPTY_DICT"):
            return [] if name == "EMPTY_LIST" else {}
        return argument


def _named(argument: str) -> type:
    module_name, _, global_name = argument.partition(" ")
    try:
        return _ALLOWED[module_name, global_name]
    except KeyError:
        raise UnpicklingError(
            f"it names {module_name}.{global_name}, which is no part of an array"
        ) from None


def _array(found: Any) -> Shaped[np.ndarray, "..."]:
    _check(isinstance(found, _Array), _kind(found))
    _, shape, dtype, fortran, text = found.state
    _check(isinstance(dtype, _Dtype) and isinstance(text, str), _kind(found.state))
    kind, order = dtype.arguments[0], dtype.state[1]
    _check(isinstance(kind, str) and isinstance(order, str), "an array of no type")
    if kind not in _DTYPES or order not in _ORDERS:
        raise UnpicklingError(f"an array of type {order}{kind}, and numbers alone are read")
    _check(all(type(size) is int and size >= 0 for size in shape), "a shape that is none")
    values = np.frombuffer(text.encode("latin1"), np.dtype(order + kind))
    if len(values) != math.prod(shape):
        raise UnpicklingError(f"{len(values)} numbers for an array of shape {shape}")
    # In the order of this machine.
    return values.reshape(shape, order="F" if fortran else "C").astype(kind)


def _csr(found: Any) -> Csr:
    _check(isinstance(found, _Matrix) and isinstance(found.state, dict), _kind(found))
    state = found.state
    shape = state["_shape"]
    _check(
        len(shape) == 2 and all(type(size) is int and size >= 0 for size in shape),
        "a shape that is none",
    )
    arrays = {name: _array(state[name]) for name in ("data", "indices", "indptr")}
    _check(all(array.ndim == 1 for array in arrays.values()), "arrays that are no vectors")
    return Csr(**arrays, shape=(shape[0], shape[1]))


def _neighbours(found: Any) -> dict[int, list[int]]:
    _check(isinstance(found, dict), _kind(found))
    for node, others in found.items():
        _check(type(node) is int, _kind(node))
        _check(isinstance(others, list), _kind(others))
        _check(all(type(other) is int for other in others), f"nodes beside {node} that are none")
    # One list for all nodes would be short here and long where it is used.
    _check(len({id(others) for others in found.values()}) == len(found), "one list of two nodes")
    return dict(found)


def _check(right: bool, held: str) -> None:
    if not right:
        raise UnpicklingError(f"it holds {held}")


def _kind(found: Any) -> str:
    """What something is; never how it looks, which may take for ever."""
    return type(found).__name__.lstrip("_").lower()
