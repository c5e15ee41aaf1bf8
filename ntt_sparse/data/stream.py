"""Data that do not fit on the devices: read in windows of a few steps, ahead of their use.

Which examples a step sees, and how they are drawn, follows from the order of the pass and the
number of the step alone, as for data on the device: a run that was stopped goes on with the same
batches. Grain reads ahead in threads.
"""

import importlib.util
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

_MEMORY = 2**28
_MOST_STEPS = 32


class StreamError(ValueError):
    """An example could not be read."""


class Window(NamedTuple):
    """The data of some steps.

    Attributes:
        stop: The step after the last of them.
        data: Pytree of arrays `(rows, ...)`.
        orders: `(M, steps * batch_size)`, for each member which rows its steps see, as an order
            of a pass that is as long: step `s` has those from `(s % steps) * batch_size` on.
    """

    stop: int
    data: Any
    orders: Int[np.ndarray, "M rows"]


class Stream:
    """Examples that are read when they are needed.

    Attributes:
        size: Examples.
        identity: What tells these data from others, for checkpoints.
    """

    def __init__(
        self,
        read: Callable[[int, np.random.RandomState], Any],
        size: int,
        *,
        identity: str,
        memory: int = _MEMORY,
        threads: int = 16,
    ):
        """A stream of what a function reads.

        Args:
            read: `(index, rng) -> example`, a pytree of arrays of fixed shapes; called in
                threads. What it draws is its own to each pass and each order of the data.
            size: Examples; indices are from 0 to that less one.
            identity: See the attributes.
            memory: Bytes of a window, about; there are a few.
            threads: That read.

        Raises:
            ImportError: Grain is not installed.
        """
        if importlib.util.find_spec("grain") is None:
            raise ImportError("streams are read by Grain: pip install grain")
        self.size, self.identity = size, identity
        self._read, self._memory, self._threads = read, memory, threads

    def example(self) -> Any:
        """One example as a batch, for shapes and dtypes."""
        one = self._read(0, np.random.RandomState(0))
        return jax.tree.map(lambda leaf: np.asarray(leaf)[None], one)

    def windows(
        self, orders: Int[np.ndarray, "M n"], batch_size: int, first: int, start: int, stop: int
    ) -> Iterator[Window]:
        """The data of the steps from `start` to `stop`, which lie in one pass.

        Args:
            orders: Of the pass, for each member.
            batch_size: Examples in a step of a member.
            first: The step at which the pass begins.
            start: The first step that is wanted.
            stop: The step after the last.

        Raises:
            StreamError: An example could not be read.
        """
        import grain

        # Members of one seed share an order, and what is read for it.
        shared = {zlib.crc32(order.tobytes()): order for order in orders}
        keys = list(shared)
        place = np.array([keys.index(zlib.crc32(order.tobytes())) for order in orders])
        steps = self.window_steps(len(keys) * batch_size)
        rows = steps * batch_size
        begin = start - start % steps
        count = -(-(stop - begin) // steps)
        blank = jax.tree.map(np.zeros_like, jax.tree.map(lambda leaf: leaf[0], self.example()))

        def load(number: int) -> Any:
            """A row of a window; those of steps that are not wanted are blank."""
            window, row = divmod(number, len(keys) * rows)
            which, slot = divmod(row, rows)
            step = begin + window * steps + slot // batch_size
            if not start <= step < stop:
                return blank
            position = (step - first) * batch_size + slot % batch_size
            # Its stream is frozen, that of Generator may change between releases of NumPy.
            rng = np.random.RandomState(np.array([keys[which], position], np.uint32))
            return self._read(int(shared[keys[which]][position]), rng)

        numbers = grain.MapDataset.range(count * len(keys) * rows)
        options = grain.ReadOptions(
            num_threads=self._threads, prefetch_buffer_size=2 * len(keys) * rows
        )
        batches = numbers.map(load).to_iter_dataset(options).batch(len(keys) * rows)
        table = place[:, None] * rows + np.arange(rows)
        ends = range(begin + steps, begin + (count + 1) * steps, steps)
        iterator = iter(batches)
        for end in ends:
            # Whatever the reader of the moment raises.
            try:
                data = next(iterator)
            except Exception as error:
                cause = str(error).strip().splitlines() or [type(error).__name__]
                raise StreamError(cause[0]) from error
            yield Window(min(end, stop), data, table.astype(np.int32))

    def window_steps(self, examples: int) -> int:
        """Steps of a window, where each needs so many examples."""
        each = sum(leaf.nbytes for leaf in jax.tree.leaves(self.example()))
        return int(np.clip(self._memory // max(examples * each, 1), 1, _MOST_STEPS))
