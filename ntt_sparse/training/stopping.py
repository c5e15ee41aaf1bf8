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
    """A member stops after so many records in a row without a new best value of a metric.

    It keeps the parameters it has then. What is decided follows from the records alone, so a run
    that goes on from a checkpoint decides the same.

    Attributes:
        metric: Name in the records, of data that are held out for it.
        patience: Records, 1 or more; the one before training does not count.
        higher: Whether higher values are better.
        alone: Whether members stop one by one, or train on until none has a new best value.
    """

    metric: str
    patience: int
    higher: bool = False
    alone: bool = True

    def active(self, records: Sequence[Record]) -> Bool[np.ndarray, " m"] | None:
        """Which members have a new best value in time; `None` before there are enough records.

        Raises:
            ValueError: Records do not hold the metric, or the patience is less than 1.
        """
        if self.patience < 1:
            raise ValueError(f"patience is {self.patience}, expected 1 record or more")
        records = [record for record in records if record["step"]]
        if missing := [record for record in records if self.metric not in record]:
            raise ValueError(
                f"a record holds {sorted(missing[0])}, but no {self.metric!r} to stop by"
            )
        values = np.array([record[self.metric] for record in records], float)
        if len(values) <= self.patience:
            return None
        values = -values if self.higher else values
        # Once stopped, a member's value stays as it is.
        return values[-self.patience :].min(0) < values[: -self.patience].min(0)

    def revise(self, state: TrainState, records: Sequence[Record]) -> TrainState:
        """The state in which members that stop now do not train on."""
        active = self.active(records)
        if active is None or not self.alone:
            return state
        context = dict(state.members.context)
        # Where it was, so that nothing compiles again.
        context[ACTIVE] = jax.device_put(
            jnp.asarray(active) & context[ACTIVE], context[ACTIVE].sharding
        )
        return state._replace(members=state.members._replace(context=context))

    def all_stopped(self, records: Sequence[Record]) -> bool:
        """Whether no member has to train on."""
        active = self.active(records)
        return active is not None and not active.any()


def is_active(member: Member) -> Bool[Array, ""]:
    """Whether a member still trains, by its context; for `make_program(active=...)`."""
    return member.context[ACTIVE]
