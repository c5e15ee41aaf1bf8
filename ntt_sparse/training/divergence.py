"""Members whose numbers stop being finite: an error, or members that take no further part."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ntt_sparse.training.processes import fetch, is_first, place
from ntt_sparse.training.state import TrainState

_logger = logging.getLogger(__name__)

WHOLE = ("params", "model_state")
"""What must be finite of a member, beside what it logs."""

_REMEDY = "lower the learning rate or the weight of that term, in a directory of its own"


class DivergenceError(FloatingPointError):
    """A member stopped being finite, or every one did."""


class Divergence(NamedTuple):
    """Where a member stopped being finite.

    Attributes:
        step: Steps that its state had done; it stays in that state.
        term: The logged or evaluated value that was not finite, or the part of the member.
    """

    step: int
    term: str


class Watch:
    """Looks at the members of a stage; raises, or remembers which of them are frozen."""

    def __init__(
        self,
        stage: str,
        names: Sequence[str],
        *,
        freeze: bool,
        found: Mapping[int, Divergence] | None = None,
        all_may: bool = False,
    ):
        """Begins with what earlier records hold.

        Args:
            stage: Name of the stage, for messages.
            names: One for each member.
            freeze: Whether members are frozen, by a program that does so.
            found: Of members that were frozen before, by index.
            all_may: Whether it is no error that every member is frozen.
        """
        self.found = dict(found or {})
        self._stage, self._names = stage, names
        self._freeze, self._all_may = freeze, all_may

    def look(self, state: TrainState) -> float:
        """Raises, or warns, with step, term and member. The mean loss of all that train.

        Raises:
            DivergenceError: Something was not finite, and members are not frozen, or none is left.
        """
        bad_step, sums, since = fetch((state.bad_step, state.sums, state.since))
        # By step; at one step a term before what it makes bad too: the sum of all, and the member.
        bad = sorted(
            (steps[member], name in ("loss", *WHOLE), name, member)
            for name, steps in bad_step.items()
            for member in np.flatnonzero(steps >= 0).tolist()
        )
        for step, _, name, member in bad:
            self._add(member, Divergence(int(step), name))
        trains = since > 0
        trains[list(self.found)] = False
        return (
            float(np.mean(sums["loss"][trains] / since[trains])) if trains.any() else float("nan")
        )

    def evaluated(self, state: TrainState, values: Mapping[str, Any]) -> TrainState:
        """Looks at the values of a record, `(M, ...)` each; the state without bad members.

        Raises:
            DivergenceError: As `look`.
        """
        count = len(self.found)
        for name, value in values.items():
            finite = np.isfinite(value).reshape(len(self._names), -1).all(1)
            for member in np.flatnonzero(~finite).tolist():
                self._add(member, Divergence(int(state.step), name))
        if len(self.found) == count:
            return state
        # The records say which value it was; to the program the member as a whole is bad.
        steps = np.array(fetch(state.bad_step["params"]))
        for member, found in self.found.items():
            if found.term in values:
                steps[member] = found.step
        # Where it was, so that nothing compiles again.
        sharding: Any = state.bad_step["params"].sharding
        placed = place(jnp.asarray(steps), sharding)
        return state._replace(bad_step={**state.bad_step, "params": placed})

    def by_member(self) -> list[Divergence | None]:
        """One for each member, `None` for those that train; an empty list where all do."""
        return [self.found.get(member) for member in range(len(self._names))] if self.found else []

    def without(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values by member, NaN for those that are frozen."""
        if not self.found:
            return dict(values)
        out = np.isin(np.arange(len(self._names)), list(self.found))
        return {
            name: np.where(out.reshape(-1, *[1] * (np.ndim(value) - 1)), np.nan, value)
            for name, value in values.items()
        }

    def _add(self, member: int, divergence: Divergence) -> None:
        if member in self.found:
            return
        self.found[member] = divergence
        line = (
            f"stage {self._stage!r}: {divergence.term!r} of member {self._names[member]!r} is not "
            f"finite at step {divergence.step}"
        )
        if not self._freeze:
            raise DivergenceError(f"{line}: {_REMEDY}")
        if len(self.found) == len(self._names) and not self._all_may:
            raise none_left(self._stage, self._names, self.found)
        if is_first():
            _logger.warning("%s: it stays as it was before, the others go on", line)


def none_left(stage: str, names: Sequence[str], found: Mapping[int, Divergence]) -> DivergenceError:
    """The error where every member of a stage has diverged; it names the first."""
    step, term, member = min((*divergence, member) for member, divergence in found.items())
    return DivergenceError(
        f"stage {stage!r}: {term!r} of member {names[member]!r} is not finite at step {step}"
        + (f", and none of the {len(names)} members is left" if len(names) > 1 else "")
        + f": {_REMEDY}"
    )
