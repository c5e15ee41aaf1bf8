"""What the next steps of a stage see: data on the devices, or windows of a stream."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ntt_sparse.data.stream import Stream, Window
from ntt_sparse.training.mesh import member_sharding, replicated
from ntt_sparse.training.program import Program
from ntt_sparse.training.state import TrainState


class Fed(NamedTuple):
    """What `Program.chunk` takes for some steps.

    Attributes:
        data: Pytree of arrays `(n, ...)`.
        permutations: `(M, n)`, the order of the data of every member.
        stop: The step after the last for which they hold.
    """

    data: Any
    permutations: Array
    stop: int


class Feed:
    """Data by step, one step after the other.

    Attributes:
        example: Data of the same structure, for shapes and dtypes.
    """

    def __init__(self, program: Program, data: Any, steps_per_epoch: int, total_steps: int):
        """The feed of a stage.

        Args:
            program: That takes the data.
            data: Pytree of arrays `(n, ...)` on the devices, or a stream.
            steps_per_epoch: Steps in a pass.
            total_steps: Of the stage.

        Raises:
            ValueError: A stream is given to one of several processes.
        """
        if isinstance(data, Stream) and jax.process_count() > 1:
            raise ValueError("a stream is read by one process alone, expected arrays")
        self._program, self._data = program, data
        self._epoch_steps, self._total = steps_per_epoch, total_steps
        self._epoch = -1
        self._windows: Iterator[Window] = iter(())
        self._fed = Fed(None, jnp.zeros(0), -1)
        self.example = data.example() if isinstance(data, Stream) else data

    def at(self, state: TrainState, step: int) -> Fed:
        """What the steps from this one on see; it is never less than one before."""
        if step < self._fed.stop:
            return self._fed
        epoch = step // self._epoch_steps
        end = min((epoch + 1) * self._epoch_steps, self._total)
        if not isinstance(self._data, Stream):
            self._fed = Fed(self._data, self._orders(state, epoch, self._data), end)
            return self._fed
        if epoch != self._epoch:
            # Their number is all that orders depend on.
            orders = self._orders(state, epoch, jnp.zeros((self._data.size, 0)))
            self._windows = self._data.windows(
                np.asarray(orders), self._program.batch_size, epoch * self._epoch_steps, step, end
            )
            self._epoch = epoch
        window = next(self._windows)
        mesh = self._program.mesh
        self._fed = Fed(
            jax.device_put(window.data, replicated(mesh)),
            jax.device_put(window.orders, member_sharding(mesh)),
            window.stop,
        )
        return self._fed

    def _orders(self, state: TrainState, epoch: int, data: Any) -> Array:
        return self._program.permutations(state, np.int32(epoch), data)
