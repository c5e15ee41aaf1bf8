"""Several processes of one run, each with devices of its own, through `jax.distributed`.

Every process runs the same program. What they compute together lies in arrays over the devices of
all; what is decided by a clock or a signal is decided together; the first one alone writes. With
one process all of this is what `jax.device_put` and `jax.device_get` do.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding


class Decision(NamedTuple):
    """What processes decide after a chunk.

    Attributes:
        length: Most steps of the next chunk.
        save: Whether a checkpoint is due.
        stop: Whether the run was asked to stop.
    """

    length: int
    save: bool
    stop: bool


def is_first() -> bool:
    """Whether this process writes files, draws and reports."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Waits until every process is here.

    Args:
        name: Of the place; the same on all.
    """
    if jax.process_count() > 1:
        _utils().sync_global_devices(name)


def on_all(fact: bool) -> bool:
    """Whether something holds on every process."""
    if jax.process_count() == 1:
        return fact
    return bool(_utils().process_allgather(np.array(fact)).all())


def least(number: int) -> int:
    """The least of the numbers of all processes."""
    if jax.process_count() == 1:
        return number
    return int(_utils().process_allgather(np.array(number, np.int64)).min())


def of_first(numbers: Sequence[int], count: int) -> list[int]:
    """The numbers of the first process, on all; at most so many, 0 or more each."""
    if jax.process_count() == 1:
        return list(numbers)
    padded = np.full(count, -1, np.int32)
    padded[: len(numbers)] = numbers
    return [number for number in _utils().broadcast_one_to_all(padded).tolist() if number >= 0]


def decide(own: Decision) -> Decision:
    """One decision for all: by the clock of the first process, and by a signal to any."""
    if jax.process_count() == 1:
        return own
    everyone = _utils().process_allgather(np.array(own, np.int32))
    length, save, _ = everyone[0].tolist()
    return Decision(length, bool(save), bool(everyone[:, 2].any()))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts arrays over the devices of a mesh, of all processes.

    Args:
        tree: Pytree of arrays that this process holds whole. Those of the first process count:
            what each computes for itself may differ in its last digits between machines.
        sharding: Of every array.

    Returns:
        The tree of global arrays.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    raw = _utils().broadcast_one_to_all(jax.device_get(jax.tree.map(_raw, tree)))

    def globally(like: Any, value: Any) -> Any:
        value = np.asarray(value)
        placed = jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
        return (
            jax.random.wrap_key_data(placed, impl=jax.random.key_impl(like))
            if _is_key(like)
            else placed
        )

    return jax.tree.map(globally, tree, raw)


def fetch(tree: Any) -> Any:
    """Host copies of arrays over all devices, on every process; keys as their data."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(leaf: Any) -> Any:
        leaf = _raw(leaf)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
            leaf = _utils().process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def localise(tree: Any) -> Any:
    """Arrays over all devices as arrays that this process holds whole."""
    if jax.process_count() == 1:
        return tree

    def local(leaf: Any) -> Any:
        value = jnp.asarray(fetch(leaf))
        return (
            jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
            if _is_key(leaf)
            else value
        )

    return jax.tree.map(local, tree)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _utils() -> Any:
    # Imported here: one process needs none of it.
    from jax.experimental import multihost_utils

    return multihost_utils
