"""The loop around compiled chunks: records, checkpoints, progress, interruption.

Where chunks are cut depends on the clock (of the first process, so that progress shows and
`Ctrl-C` is heard), what they compute does not: every step is a pure function of the state, and
sums of metrics travel in the state. A run that was killed and started again therefore
ends bit-identical to an unbroken one.
"""

import dataclasses
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from ntt_sparse.data.stream import StreamError
from ntt_sparse.training.checkpoint import CheckpointError, Checkpoints
from ntt_sparse.training.divergence import DivergenceError, Watch
from ntt_sparse.training.feed import Feed
from ntt_sparse.training.metrics import MetricsLog, Record, TensorBoard
from ntt_sparse.training.processes import Decision, decide, fetch, is_first, meet
from ntt_sparse.training.program import Program
from ntt_sparse.training.state import Member, TrainState, num_members

__all__ = ["DivergenceError", "Interrupted", "Plan", "fit"]

_logger = logging.getLogger(__name__)

# A chunk takes about this long: short enough for progress and Ctrl-C, long enough
# that the host costs nothing.
_CHUNK_SECONDS = 1.0
_MOST_STEPS = 2**31 - 1


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C or SIGTERM) and left a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """When a stage does what.

    Attributes:
        total_steps: Optimiser steps of the stage, at least 1.
        steps_per_epoch: Steps in one pass over the data, `ntt_sparse.data.batches.steps_per_epoch`;
            a new order is drawn after it.
        record_every: Steps between records; there is one before and one at the end too.
        checkpoint_seconds: Least time between checkpoints; 0 saves after every chunk.
        start: Step at which the stage begins, for members that have done that many: order of
            the data and random draws are those of a run that comes by. (A schedule goes by the
            state of the optimiser.)
    """

    total_steps: int
    steps_per_epoch: int
    record_every: int
    checkpoint_seconds: float = 60.0
    start: int = 0

    def __post_init__(self):
        for name in ("total_steps", "steps_per_epoch", "record_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.total_steps > _MOST_STEPS:
            raise ValueError(
                f"total_steps is {self.total_steps}, expected at most {_MOST_STEPS}: steps are "
                "counted in 32 bits"
            )
        if not 0 <= self.start < self.total_steps:
            raise ValueError(
                f"start is {self.start}, expected 0 or more and less than the {self.total_steps} "
                "steps of the stage"
            )

    def next_stop(self, step: int) -> int:
        """The next step at which something happens on the host, or the data order changes."""
        boundaries = [
            step - step % every + every for every in (self.record_every, self.steps_per_epoch)
        ]
        return min(*boundaries, self.total_steps)


def fit(
    program: Program,
    members: Member,
    data: Any,
    plan: Plan,
    *,
    log: MetricsLog,
    checkpoints: Checkpoints,
    member_names: Sequence[str],
    evaluate: Callable[[Member], Mapping[str, Array]] | None = None,
    should_stop: Callable[[list[Record]], bool] = lambda records: False,
    revise: Callable[[TrainState, list[Record]], TrainState] = lambda state, records: state,
    tensorboard: TensorBoard | None = None,
    all_may_diverge: bool = False,
) -> TrainState:
    """Runs a stage to its end, from its newest checkpoint if there is one.

    Args:
        program: From `ntt_sparse.training.program.make_program`.
        members: Members at the start, with a leading member axis.
        data: Pytree of arrays `(n, ...)`, on the devices, or a `Stream` of examples.
        plan: When to record, to save and to end.
        log: Where records go; its records are cut back to those of the checkpoint.
        checkpoints: Where checkpoints are found and left.
        member_names: One name per member, for messages.
        evaluate: `(members) -> {name: (M, ...)}`, joined into every record. Names are none of a
            record's own: `"stage"`, `"step"`, `"diverged"` and what begins with `"train/"`.
        should_stop: Looks at all records after each of them; `True` ends the stage.
        revise: Changes the state after a record, by all records up to it, for example to stop
            single members; the same shapes, dtypes and shardings.
        tensorboard: A second sink for the scalars of the records.
        all_may_diverge: Of a program that freezes members: none need be left, as others train
            elsewhere.

    Returns:
        The final state, which is checkpointed.

    Raises:
        DivergenceError: A term of the loss, the parameters or a value that `evaluate`
            returned stopped being finite; the newest checkpoint is from before that. Of a
            program that freezes members: of every member, unless all may. One that is frozen is
            a warning, it is in `"diverged"` of each record from then on, and its values there are
            null.
        Interrupted: SIGINT or SIGTERM came; a checkpoint of the last step is on disk.
        StreamError: Data of the next steps could not be read; a checkpoint of the step before is
            on disk.
        CheckpointError: Checkpoints are there, but none can be used, they are of steps after the
            end of the plan, or the records of `log` do not belong to them.
        ValueError: There is not a name for each member, arrays of the data do not hold as many
            examples as each other, or `evaluate` returned something else than values by member.
    """
    if len(member_names) != num_members(members):
        raise ValueError(
            f"{len(member_names)} member_names for {num_members(members)} members, expected one "
            "for each"
        )

    def record(state: TrainState) -> TrainState:
        state = _record(state, log, evaluate, tensorboard, watch)
        return revise(state, log.records)

    def save(state: TrainState) -> None:
        if tensorboard is not None:
            tensorboard.flush()
        checkpoints.save(int(state.step), state, records=len(log.records))

    with _interruption() as interrupted:
        feed = Feed(program, data, plan.steps_per_epoch, plan.total_steps)
        state = _restore(program.init(members, feed.example, plan.start), log, checkpoints, plan)
        watch = Watch(
            log.stage, member_names, freeze=program.freeze,
            found=log.diverged(), all_may=all_may_diverge,
        )  # fmt: skip
        if not log.records:
            state = record(state)
        step, length = int(state.step), 1
        saved_at = time.monotonic()
        with _progress(plan, step, log.stage) as progress:
            while step < plan.total_steps and not should_stop(log.records):
                try:
                    fed = feed.at(state, step)
                except StreamError:
                    save(state)
                    raise
                stop = min(plan.next_stop(step), step + length, fed.stop)
                began = time.monotonic()
                state = program.chunk(state, fed.data, fed.permutations, np.int32(stop))
                loss = watch.look(state)
                # A clock may be too coarse to see a chunk.
                per_step = max(time.monotonic() - began, 1e-9) / (stop - step)
                length = int(np.clip(_CHUNK_SECONDS / per_step, 1, min(4 * length, _MOST_STEPS)))
                progress(stop - step, loss)
                step = stop
                if step % plan.record_every == 0 or step == plan.total_steps:
                    state = record(state)
                due = time.monotonic() - saved_at >= plan.checkpoint_seconds
                length, due, asked = decide(Decision(length, due, interrupted()))
                stopping = asked and step < plan.total_steps
                if stopping or due:
                    save(state)
                    saved_at = time.monotonic()
                if stopping:
                    meet("stopped")
                    raise Interrupted(
                        f"stopped at step {step} of {plan.total_steps} of stage {log.stage!r}; "
                        "the same command goes on from here"
                    )
        save(state)
        if decide(Decision(1, False, interrupted())).stop:
            meet("stopped")
            raise Interrupted(
                f"stopped after step {step} of stage {log.stage!r}; the same command goes on from "
                "here"
            )
    return state


def _record(
    state: TrainState,
    log: MetricsLog,
    evaluate: Callable[[Member], Mapping[str, Array]] | None,
    tensorboard: TensorBoard | None,
    watch: Watch,
) -> TrainState:
    """Writes what was measured since the last record; the state with its sums cleared."""
    values = {} if evaluate is None else fetch(dict(evaluate(state.members)))
    _check_values(values, num_members(state.members))
    state = watch.evaluated(state, values)
    sums, since = fetch((state.sums, state.since))
    if np.any(since):
        # Of a member that has stopped there is no loss.
        steps = np.where(since, since, np.nan)
        values |= {f"train/{name}": total / steps for name, total in sums.items()}
    log.write(int(state.step), values, diverged=watch.by_member())
    if tensorboard is not None:
        tensorboard.write(log.stage, int(state.step), watch.without(values))
    # Subtraction keeps the sharding, so that the next chunk does not compile again.
    cleared = jax.tree.map(lambda leaf: leaf - leaf, state.sums)
    return state._replace(sums=cleared, since=state.since - state.since)


def _check_values(values: Mapping[str, Any], members: int) -> None:
    for name, value in values.items():
        if name in ("stage", "step", "diverged") or name.startswith("train/"):
            raise ValueError(f"evaluate returned {name!r}, a name that records have for their own")
        if np.shape(value)[:1] != (members,):
            raise ValueError(
                f"evaluate returned {name!r} of shape {np.shape(value)}, expected {members} "
                "members along the first axis"
            )


def _restore(
    state: TrainState, log: MetricsLog, checkpoints: Checkpoints, plan: Plan
) -> TrainState:
    restored = checkpoints.restore(state)
    if restored is None:
        log.truncate(0)
        return state
    state, records = restored
    if int(state.step) > plan.total_steps:
        raise CheckpointError(
            f"the checkpoint in {checkpoints.directory} is of step {int(state.step)}, after the "
            f"end of this plan, {plan.total_steps}: choose another directory, or as many steps"
        )
    try:
        log.truncate(records)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    steps = [record["step"] for record in log.records]
    if steps != sorted(set(steps)) or (steps and steps[-1] > int(state.step)):
        raise CheckpointError(
            f"{log.path} does not belong to the checkpoint of step {int(state.step)}: its records "
            "are of other steps; delete the stage's checkpoints to start it again"
        )
    _logger.info("stage %s goes on from step %d", log.stage, int(state.step))
    return state


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Remembers the first SIGINT or SIGTERM; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received = []
    previous = {}

    def handler(signum, frame):
        del frame
        received.append(signum)
        for number, old in previous.items():
            signal.signal(number, old)
        _logger.warning("stopping after this chunk; once more to stop at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handler)
    try:
        yield lambda: bool(received)
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def _progress(plan: Plan, step: int, stage: str) -> Iterator[Callable[[int, float], None]]:
    """A progress bar with loss and time left; log lines where there is no terminal."""
    from tqdm import tqdm

    with tqdm(
        total=plan.total_steps,
        initial=step,
        desc=stage,
        unit="step",
        dynamic_ncols=True,
        disable=not is_first(),
        # A pipe or a log file gets a line now and then, a terminal a live bar.
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    ) as bar:

        def advance(steps: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update(steps)

        yield advance
