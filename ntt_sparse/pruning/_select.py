"""The largest entries of several arrays, exactly, without a sort.

The threshold is searched for among integers in the order of the floats. A pass counts the entries
from each of a few integers on, in one read of the arrays, and narrows the bracket in which the
threshold is: first by quantiles of a sample, then where the entries would be if they were spread
evenly between its ends, and by thirds in case they are not. It ends when as many entries as wanted
are above, or when one value is left: then entries of that value are cut by their index, which the
same search finds. Of large arrays the last few entries in the bracket are looked at themselves,
which leaves three passes over 25 million distinct scores, and one that writes the masks.

There are only reductions over whole arrays: no copy of them is made, and but for the sample nothing
moves between devices that hold parts of a leaf.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

# Where a pass looks: in standard deviations from the expected place, and at parts of the bracket.
_SAMPLED = (0.0, 0.0, -2.5, -0.7, 0.7, 2.5)
_SPREAD = (-1.6, -0.4, 0.4, 1.6)
_PARTS = (1 / 3, 2 / 3)

# What is done by size is decided here alone: to begin with a sample and to end with a look at the
# last entries saves passes, but over fewer entries than these they cost less than its compilation.
LARGE = 2**20
# The sample is one of so many entries, and no larger.
_SAMPLE_STEP = 256
_SAMPLE_SIZE = 16384
# Entries of a row: one after another in a leaf, at least so many.
_ROW = 256


class _Bracket(NamedTuple):
    """Two integers, and how many keys there are from each on: as many as wanted, and fewer."""

    low: Int[Array, ""]
    high: Int[Array, ""]
    from_low: Int[Array, ""]
    from_high: Int[Array, ""]


# Keys that are made when the argument is there, in the pass that reads them.
_Keys: TypeAlias = Callable[[Array], list[Array]]


@functools.partial(jax.jit, static_argnames="large")
def largest(
    leaves: list[Float[Array, "..."]], count: Any, *, large: int = LARGE
) -> list[Bool[Array, "..."]]:
    """Which are the `count` largest entries over several arrays, ties in index order.

    NaN is the smallest, and both zeros are equal. Compiled once per set of shapes.

    Args:
        leaves: Floating-point arrays of any shapes.
        count: How many, from 0 to all of them; may be traced.
        large: With so many entries the search begins with a sample; the result is the same.

    Raises:
        ValueError: There are more entries than 32 bits count.
    """
    dtype = _common_dtype(leaves)
    total = sum(leaf.size for leaf in leaves)
    if total >= 2**31:
        raise ValueError(
            f"{total} scores compete with each other, expected fewer than 2^31: "
            "select within layers"
        )
    wanted = jnp.clip(jnp.asarray(count, jnp.int32), 0, total)

    def keys(after):
        (held,) = _not_before(after, leaves)
        return [_key(leaf.astype(dtype)) for leaf in held]

    found, last = _everything(dtype, total), jnp.int32(-1)
    if total < large:
        found = _search(keys, found, wanted)
    else:
        first = _quantiles(_sample(leaves, dtype), found, wanted)
        found, last = _large_search(keys, found, wanted, first, _few(leaves))
    # With nothing wanted it is the upper end that has as many from it on.
    none = found.from_high == wanted
    low = jnp.where(none, found.high, found.low)
    tied = jnp.where(none, 0, found.from_low - found.from_high)
    cut = (tied > 0) & (found.from_low != wanted)

    def places(after):
        """Of tied entries, the later the smaller; -1 of others."""
        (one,) = _not_before(after, jnp.int32(1))
        return [
            jnp.where(key == low, total - 1 - place, -1)
            for key, place in zip(keys(after), _places(leaves, one), strict=True)
        ]

    # No pass is made where there is nothing to cut, or where it is known already.
    room = jnp.where(cut & (last < 0), wanted - found.from_high, tied)
    ends = _Bracket(jnp.int32(0), jnp.int32(total), tied, jnp.int32(0))
    last = jnp.where(cut & (last >= 0), last, total - 1 - _search(places, ends, room).low)
    return [
        (key > low) | ((key == low) & (place <= last))
        for key, place in zip(keys(last), _places(leaves, jnp.int32(1)), strict=True)
    ]


@jax.jit
def zeros_kept_and_cut(leaf: Float[Array, "..."], mask: Bool[Array, "..."]) -> Bool[Array, "2"]:
    """Whether a mask keeps entries of exactly zero, and whether it cuts some."""
    zero = _key(leaf) == 0
    return jnp.stack([jnp.any(zero & mask), jnp.any(zero & ~mask)])


def _not_before(after: Array, *values: Any) -> Any:
    """The values, of which nothing can be made before `after` is there.

    What a pass makes of them costs nothing there; without this XLA takes it out of the loop and
    writes it out, several times the size of the leaves.
    """
    return jax.lax.optimization_barrier((*values, after))[:-1]


def _common_dtype(leaves: list[Array]) -> Any:
    """That of all leaves if it has half precision, else what holds them, float32 at least."""
    dtypes = {jnp.result_type(leaf) for leaf in leaves}
    if len(dtypes) == 1 and dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        return dtypes.pop()
    return jnp.result_type(jnp.float32, *leaves)


def _bits(dtype: Any) -> str:
    return f"int{8 * dtype.itemsize}"


def _infinity(dtype: Any) -> int:
    """The bits of infinity, which is the largest key."""
    return int(np.asarray(np.inf, dtype).view(_bits(dtype)))


def _key(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Integers in the order of the floats, of 32 bits at least."""
    # In integers throughout: where denormals are flushed, they equal zero as floats.
    bits = jax.lax.bitcast_convert_type(x, _bits(x.dtype))
    bits = bits.astype(jnp.promote_types(bits.dtype, jnp.int32))
    magnitude = bits & int(np.iinfo(_bits(x.dtype)).max)
    infinity = _infinity(x.dtype)
    signed = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > infinity, -infinity - 1, signed)


def _everything(dtype: Any, total: int) -> _Bracket:
    key = jnp.promote_types(_bits(dtype), jnp.int32)
    low, high = (jnp.asarray(sign * (_infinity(dtype) + 1), key) for sign in (-1, 1))
    return _Bracket(low, high, jnp.int32(total), jnp.int32(0))


def _places(leaves: list[Array], one: Array) -> list[Int[Array, "..."]]:
    """Positions in all leaves one after another; times `one`, so that a pass can make them."""
    result, offset = [], 0
    for leaf in leaves:
        place = jnp.full(leaf.shape, offset, jnp.int32)
        for axis in range(leaf.ndim):
            stride = jnp.int32(np.prod(leaf.shape[axis + 1 :], dtype=np.int64))
            place += jax.lax.broadcasted_iota(jnp.int32, leaf.shape, axis) * (one * stride)
        result.append(place)
        offset += leaf.size
    return result


def _sample(leaves: list[Array], dtype: Any) -> Int[Array, " m"]:
    """Sorted keys of some of the entries."""
    total = sum(leaf.size for leaf in leaves)
    step = max(_SAMPLE_STEP, total // _SAMPLE_SIZE)
    flat = [leaf.reshape(-1)[:: _coprime(step, leaf.size)] for leaf in leaves]
    return jnp.sort(jnp.concatenate([_key(leaf.astype(dtype)) for leaf in flat]))


def _coprime(step: int, size: int) -> int:
    """A step of about this size that does not visit the same columns of each row."""
    while np.gcd(step, size) > 1:
        step -= 1
    return step


def _quantiles(sample: Array, bracket: _Bracket, wanted: Array) -> Int[Array, " looks"]:
    """Where the sample has its threshold, and where it may be, within the error of the sample."""
    size = sample.size
    part = 1 - wanted.astype(jnp.float32) / bracket.from_low
    spread = jnp.sqrt(part * (1 - part) * size) + 1
    index = jnp.round(part * size + spread * jnp.asarray(_SAMPLED, jnp.float32))
    looks = sample[jnp.clip(index, 0, size - 1).astype(jnp.int32)]
    # Both sides of a value: where it is the threshold of many ties, it is found at once.
    return looks.at[0].add(1)


def _undecided(bracket: _Bracket, wanted: Array, few: ArrayLike = 0) -> Array:
    """Whether a bracket of more than `few` keys is to be narrowed."""
    ends = (bracket.from_low != wanted) & (bracket.from_high != wanted)
    inside = bracket.from_low - bracket.from_high
    return ends & (_width(bracket) > 1) & (inside > few)


def _search(keys: _Keys, bracket: _Bracket, wanted: Array) -> _Bracket:
    """Narrows a bracket until `wanted` keys are from one of its ends on, or one value is left."""
    return jax.lax.while_loop(
        lambda b: _undecided(b, wanted),
        lambda b: _narrowed(keys(b.low), b, wanted, _expected(b, wanted)),
        bracket,
    )


def _large_search(
    keys: _Keys, bracket: _Bracket, wanted: Array, first: Array, few: int
) -> tuple[_Bracket, Array]:
    """As `_search`, looking `first` where told, and at the last keys themselves once they are few.

    If that does not decide, the search goes on. All in loops, so that each pass is compiled once.

    Returns:
        The bracket, and what `_among_last` has of its ties.
    """

    def turn(state):
        bracket, _, again = state

        def body(state):
            bracket, begun = state
            looks = jnp.where(begun, _expected(bracket, wanted), first)
            return _narrowed(keys(bracket.low), bracket, wanted, looks), jnp.bool_(True)

        enough = jnp.where(again, 0, few)
        bracket, _ = jax.lax.while_loop(
            lambda state: _undecided(state[0], wanted, enough), body, (bracket, again)
        )
        bracket, last = jax.lax.cond(
            _undecided(bracket, wanted),
            lambda b: _among_last(keys(b.low), b, wanted),
            lambda b: (b, jnp.int32(-1)),
            bracket,
        )
        return bracket, last, jnp.bool_(True)

    start = (bracket, jnp.int32(-1), jnp.bool_(False))
    return jax.lax.while_loop(lambda state: _undecided(state[0], wanted), turn, start)[:2]


def _width(bracket: _Bracket) -> Array:
    """Of a bracket, without a sign: it may be too large for one."""
    unsigned = f"u{bracket.low.dtype}"
    low, high = (jax.lax.bitcast_convert_type(end, unsigned) for end in bracket[:2])
    return high - low


def _expected(bracket: _Bracket, wanted: Array) -> Int[Array, " looks"]:
    """Where the threshold is if keys are spread evenly over the bracket, and the thirds of it."""
    inside = (bracket.from_low - bracket.from_high).astype(jnp.float32)
    part = ((bracket.from_low - wanted).astype(jnp.float32) + 0.5) / inside
    spread = jnp.sqrt((jnp.maximum(part * (1 - part), 0) + 1 / inside) / inside)
    near = part + spread * jnp.asarray(_SPREAD, jnp.float32)
    parts = jnp.clip(jnp.concatenate([near, jnp.asarray(_PARTS, jnp.float32)]), 0, 1)
    width = _width(bracket)
    # In steps of 2^-16 of the width: exact where floats do not hold the integers.
    steps = (parts * 2**16).astype(width.dtype)
    ahead = (width >> 16) * steps + (((width & 0xFFFF) * steps) >> 16)
    ahead = jnp.clip(ahead, 1, jnp.maximum(width, 2) - 1)
    return bracket.low + jax.lax.bitcast_convert_type(ahead, bracket.low.dtype)


def _narrowed(keys: list[Array], bracket: _Bracket, wanted: Array, looks: Array) -> _Bracket:
    """The bracket between those integers where `wanted` lies, after one pass over the keys."""
    found = [
        _reduced([key >= look for look in looks], *_inside(key, bracket), tuple(range(key.ndim)))
        for key in keys
    ]
    *counts, least, most = (jnp.stack(each) for each in zip(*found, strict=True))
    counts = jnp.sum(jnp.stack(counts), axis=1, dtype=jnp.int32)
    # Both ends of what the bracket held: there are as many keys from them on as before.
    low = jnp.maximum(bracket.low, jnp.min(least))
    high = jnp.minimum(bracket.high, jnp.max(most) + 1)
    below, above = (counts >= wanted) & (looks > low), (counts < wanted) & (looks < high)
    return _Bracket(
        jnp.max(looks, initial=low, where=below),
        jnp.min(looks, initial=high, where=above),
        jnp.min(counts, initial=bracket.from_low, where=below),
        jnp.max(counts, initial=bracket.from_high, where=above),
    )


def _inside(key: Array, bracket: _Bracket) -> tuple[list[Array], list[Array]]:
    """Keys whose least, and keys whose most, are the ends of what the bracket holds, if any."""
    ends = jnp.iinfo(key.dtype)
    return (
        [jnp.where(key >= bracket.low, key, jnp.asarray(ends.max, key.dtype))],
        [jnp.where(key < bracket.high, key, jnp.asarray(ends.min, key.dtype))],
    )


def _reduced(
    counted: list[Array], least: list[Array], most: list[Array], axes: tuple[int, ...]
) -> tuple[Array, ...]:
    """Numbers of what is true, least and most of some integers, over the axes.

    One reduction of several operands: XLA makes the operands of such a one as it reads the keys,
    but writes out that of a reduction of one operand.
    """
    operands = (*[truth.astype(jnp.int32) for truth in counted], *least, *most)
    combine = [*[jnp.add] * len(counted), *[jnp.minimum] * len(least), *[jnp.maximum] * len(most)]
    initial = (
        *[jnp.int32(0)] * len(counted),
        *[jnp.asarray(jnp.iinfo(x.dtype).max, x.dtype) for x in least],
        *[jnp.asarray(jnp.iinfo(x.dtype).min, x.dtype) for x in most],
    )
    return tuple(
        jax.lax.reduce(
            operands,
            initial,
            lambda a, b: tuple(fn(x, y) for fn, x, y in zip(combine, a, b, strict=True)),
            axes,
        )
    )


def _row_axes(leaf: Array) -> tuple[int, ...]:
    """The last axes of a leaf that make a row."""
    first, size = leaf.ndim, 1
    while first > 0 and size < _ROW:
        first -= 1
        size *= leaf.shape[first]
    return tuple(range(first, leaf.ndim))


def _few(leaves: list[Array]) -> int:
    """How many entries fall into rows so that hardly ever three of them are in one."""
    rows = sum(int(np.prod(leaf.shape[: leaf.ndim - len(_row_axes(leaf))])) for leaf in leaves)
    return int(0.6 * rows ** (2 / 3))


def _among_last(keys: list[Array], bracket: _Bracket, wanted: Array) -> tuple[_Bracket, Array]:
    """The bracket decided by the keys in it, which one pass finds if no row has more than two.

    Returns:
        The bracket, and the last place at which an entry of its value is kept, if its ties are to
        be cut between two rows; else -1.
    """
    fits = jnp.bool_(True)
    values, ends, offset = [], [], 0
    for key in keys:
        axes = _row_axes(key)
        inside = (key >= bracket.low) & (key < bracket.high)
        number, least, most = _reduced([inside], *_inside(key, bracket), axes=axes)
        fits &= jnp.all(number <= 2)
        found = [jnp.where(number >= n, end, bracket.low - 1) for n, end in ((1, most), (2, least))]
        values.append(jnp.stack(found, -1).reshape(-1))
        row = key.size // max(number.size, 1)
        ends.append(offset - 1 + row * (jnp.arange(2 * number.size, dtype=jnp.int32) // 2 + 1))
        offset += key.size
    values, ends = jnp.concatenate(values), jnp.concatenate(ends)
    room = wanted - bracket.from_high
    low = jnp.sort(values)[values.size - room]
    from_low, from_high = (jnp.sum(t, dtype=jnp.int32) for t in (values >= low, values > low))
    # Of entries of the value itself, those of the first rows.
    tied = values == low
    at = jnp.argmax(jnp.cumsum(tied, dtype=jnp.int32) == room - from_high)
    whole = (at % 2 == 1) | ~tied[at ^ 1]
    last = jnp.where(fits & whole & (from_low != room), ends[at], -1)
    above = bracket.from_high
    found = _Bracket(low, low + 1, from_low + above, from_high + above)
    return jax.tree.map(lambda new, old: jnp.where(fits, new, old), found, bracket), last
