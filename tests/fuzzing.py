"""Files and their headers, damaged in every way, and how many of them are tried."""

import os
import pickle
import struct

import hypothesis
import hypothesis.strategies as st
import numpy as np

EXAMPLES = int(os.environ.get("NTT_SPARSE_FUZZ", 12))


def fuzzed(strategy):
    """A test of examples of a strategy."""
    settings = hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    return lambda test: settings(hypothesis.given(strategy)(test))


@st.composite
def damages(draw):
    """What is done to the bytes of a file: cut, changed, doubled, or other bytes in their place."""

    def place():
        return draw(st.floats(0, 1, exclude_max=True))

    numbers = st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1])
    steps = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["cut", "flip", "drop", "double", "number", "bytes", "digit"]))
        if kind == "number":
            size = draw(st.sampled_from("<I >I <Q >Q".split()))
            value = draw(numbers) % 2 ** (32 if size[1] == "I" else 64)
            steps.append(("bytes", place(), struct.pack(size, value)))
        elif kind == "bytes":
            steps.append((kind, place(), draw(st.binary(max_size=8))))
        elif kind == "flip":
            steps.append((kind, place(), draw(st.integers(0, 7))))
        else:
            steps.append((kind, place(), draw(st.integers(1, 40))))
    whole = [b"", b"\0" * 64, b"PK\x03\x04", pickle.dumps({"a": [1]}), pickle.dumps(np.ones(3))]
    return draw(st.one_of(st.just(steps), st.just(steps), st.sampled_from(whole)))


def damaged(content, how):
    if isinstance(how, bytes):
        return how
    for kind, where, value in how:
        at = int(where * len(content))
        if kind == "cut":
            content = content[:at]
        elif kind == "flip":
            content = (
                content[:at]
                + bytes(b ^ 1 << value for b in content[at : at + 1])
                + content[at + 1 :]
            )
        elif kind == "drop":
            content = content[:at] + content[at + value :]
        elif kind == "double":
            content = content[: at + value] + content[at:]
        elif kind == "bytes":
            content = content[:at] + value + content[at + len(value) :]
        else:
            # A digit of a text becomes many.
            digits = [i for i in range(at, len(content)) if chr(content[i]).isdigit()][:1]
            for i in digits:
                content = content[:i] + b"9" * value + content[i + 1 :]
    return content


def written(root, files):
    """A new folder with files."""
    folder = root / str(len(list(root.iterdir())))
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


NUMBERS = st.one_of(st.integers(-3, 10), st.sampled_from([2**31, 2**53, 2**63, 10**30]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def replaced(tree, where, value):
    """A tree of JSON with another value at some place, or without what is there."""
    where = list(where)
    while isinstance(tree, dict | list) and tree:
        keys = sorted(tree) if isinstance(tree, dict) else range(len(tree))
        key = keys[where[0] % len(tree)]
        if len(where) == 1 or not isinstance(tree[key], dict | list) or not tree[key]:
            if value is ...:
                del tree[key]
            else:
                tree[key] = value
            return
        tree, where = tree[key], where[1:]


CHANGES = st.tuples(
    st.lists(st.integers(0, 2**16), min_size=1, max_size=7), st.one_of(VALUES, st.just(...))
)
