"""Early stopping of each member by itself, decided on its own records."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from ntt_sparse.training.metrics import Record
from ntt_sparse.training.state import TrainState
from ntt_sparse.training.step import StepFn

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


def while_active(step_fn: StepFn) -> StepFn:
    """A step that leaves members alone whose context says that they are not active.

    What it logs of them is zero. Where members ride one after another nothing is computed for
    them; on a batched axis it is, and thrown away.

    Args:
        step_fn: From `ntt_sparse.training.step.make_step`, for members with `ACTIVE`, a boolean
            scalar, in their context.
    """

    def step(member: Any, batch: Any, index: Any) -> Any:
        logs = jax.eval_shape(step_fn, member, batch, index)[1]

        def stopped():
            return member, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), logs)

        return jax.lax.cond(member.context[ACTIVE], lambda: step_fn(member, batch, index), stopped)

    return step
