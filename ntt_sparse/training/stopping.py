"""Early stopping of each member by itself, decided on its own records."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from ntt_sparse.training.metrics import Record
from ntt_sparse.training.state import Member, TrainState

ACTIVE = "active"
"""In the context of a member: whether it still trains."""


class EarlyStopping(NamedTuple):
    """A member stops after so many records in a row without a new lowest value of a metric.

    It keeps the parameters it has then. What is decided follows from the records alone, so a run
    that goes on from a checkpoint decides the same.

    Attributes:
        metric: Name in the records, lower is better; of data that are held out for it.
        patience: Records, 1 or more; the one before training does not count.
    """

    metric: str
    patience: int

    def active(self, records: Sequence[Record]) -> Bool[np.ndarray, " m"] | None:
        """Which members still train after these records; `None` before there are enough."""
        values = np.array([record[self.metric] for record in records if record["step"]], float)
        if len(values) <= self.patience:
            return None
        # Once stopped, a member's value stays as it is.
        return values[-self.patience :].min(0) < values[: -self.patience].min(0)

    def revise(self, state: TrainState, records: Sequence[Record]) -> TrainState:
        """The state in which members that stop now do not train on."""
        active = self.active(records)
        if active is None:
            return state
        context = dict(state.members.context)
        # Where it was, so that nothing compiles again.
        context[ACTIVE] = jax.device_put(
            jnp.asarray(active) & context[ACTIVE], context[ACTIVE].sharding
        )
        return state._replace(members=state.members._replace(context=context))

    def all_stopped(self, records: Sequence[Record]) -> bool:
        """Whether no member trains any more."""
        active = self.active(records)
        return active is not None and not active.any()


def is_active(member: Member) -> Bool[Array, ""]:
    """Whether a member still trains, by its context; for `make_program(active=...)`."""
    return member.context[ACTIVE]
