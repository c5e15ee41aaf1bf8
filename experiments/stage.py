"""One stage of a study, over whatever devices and memory there are."""

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments import waves
from experiments.study import concatenate
from ntt_sparse.data.stream import Stream
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import processes
from ntt_sparse.training.checkpoint import Checkpoints, digest
from ntt_sparse.training.divergence import none_left
from ntt_sparse.training.files import append_line
from ntt_sparse.training.loop import Plan, fit
from ntt_sparse.training.memory import compiled_bytes, local_bytes, with_sharding
from ntt_sparse.training.metrics import MetricsLog, Record, TensorBoard
from ntt_sparse.training.program import Program, gather, make_program
from ntt_sparse.training.state import Member, TrainState, num_members
from ntt_sparse.training.step import StepFn
from ntt_sparse.training.stopping import EarlyStopping, is_active

# What each run of each stage took; unlike records it is of this machine and moment.
_SECONDS = "seconds.jsonl"
_logger = logging.getLogger(__name__)


def fit_stage(
    config: Any,
    workdir: Path,
    stage: str,
    names: Sequence[str],
    members: Member,
    step_fn: StepFn,
    plan: Plan,
    train_data: Any,
    evaluate: Callable[..., Any],
    evaluation_data: tuple[Any, ...],
    mode: meshes.MemberMode,
    *,
    batch_size: int,
    stopping: EarlyStopping | None = None,
    pick: Callable[..., Any] = gather,
    made: bool = False,
    freeze: bool = False,
) -> Member:
    """Runs one stage over whatever devices there are, or goes on with it.

    Members that do not fit the memory together train in waves, one after another, as far as
    `$NTT_SPARSE_MEMORY` or what is free of it allows, see `experiments.waves`; what they record is
    what they record together, on a batched axis to rounding.

    Args:
        config: The study's settings; a checkpoint of other settings is refused.
        workdir: Where records and checkpoints go.
        stage: Name of the stage.
        names: One for each member.
        members: At the start, with a leading member axis.
        step_fn: From `make_step`.
        plan: When to record and to end.
        train_data: Pytree of arrays `(n, ...)`, or a stream.
        evaluate: `(member, *evaluation_data) -> {name: value}` of one member.
        evaluation_data: What it looks at besides.
        mode: How the members of one device ride.
        batch_size: Examples per step and member.
        stopping: When the stage ends before its last step; members that stop one by one have
            `ACTIVE` in their context.
        pick: How a step gets its batch, see `make_program`.
        made: The data follow from the settings. They are then not compared with those of a
            checkpoint, as their last digits differ between machines and numbers of cores.
        freeze: A member that diverges stays as it was and the others go on, for stages whose
            report knows of it, see `experiments.diverged`; by default it ends the study.

    Returns:
        The members at the end.

    Raises:
        DivergenceError: A member diverged, or with `freeze` every one.
    """
    streamed = isinstance(train_data, Stream)
    arrays, evaluation_data = jax.tree.map(
        jnp.asarray, (() if streamed else train_data, evaluation_data)
    )
    compiled = functools.partial(
        _compiled, step_fn, evaluate, len(evaluation_data), mode, batch_size, pick,
        stopping is not None and stopping.alone,
        # Where one is all there is, nothing would go on.
        freeze and len(names) > 1,
    )  # fmt: skip

    def bytes_of(size: int) -> int:
        _logger.info("%s: compiling for %d member%s", stage, size, "" if size == 1 else "s")
        program, mapped = compiled(meshes.auto_mesh(size, batch_size))
        data = train_data if streamed else arrays
        return _bytes_taken(program, mapped, members, size, data, evaluation_data)

    def devices_of(size: int) -> int | None:
        try:
            return meshes.auto_mesh(size, batch_size).shape["member"]
        except ValueError:
            # Of several processes, one would have nothing to do. Of all members that is an error.
            if size == len(names):
                raise
            return None

    parts = waves.cut(workdir, stage, len(names), bytes_of, devices_of)
    mesh = meshes.auto_mesh(parts[0].stop, batch_size)
    _logger.info(
        "%s: %d members%s, %d steps, mesh %s, %s", stage, len(names),
        "" if len(parts) == 1 else f" in {len(parts)} waves", plan.total_steps, dict(mesh.shape),
        mode,
    )  # fmt: skip

    @functools.cache
    def placed(mesh: Mesh) -> Any:
        return processes.place((arrays, evaluation_data), meshes.replicated(mesh))

    data_digest = "" if made else digest(placed(mesh)).tobytes().hex()
    if streamed:
        data_digest += train_data.identity
    first = processes.is_first()
    logs = [MetricsLog(wave.records, stage, writes=first) for wave in parts]
    folder = workdir / "tensorboard" / stage
    boards = [TensorBoard(folder, names[wave.first : wave.stop]) for wave in parts if first]

    def fit_wave(index: int, should_stop: Callable[[list[Record]], bool]) -> TrainState:
        wave = parts[index]
        own = names[wave.first : wave.stop]
        mesh = meshes.auto_mesh(len(own), batch_size)
        program, mapped = compiled(mesh)
        train_arrays, shared = placed(mesh)
        identity = json.dumps([config.to_dict(), own, data_digest], sort_keys=True)
        with Checkpoints(workdir / "checkpoints" / wave.label, identity=identity) as checkpoints:
            with _timed(workdir, stage, checkpoints, plan.start, len(parts)):
                return fit(
                    program,
                    _some(members, wave.first, wave.stop),
                    train_data if streamed else train_arrays,
                    plan,
                    log=logs[index],
                    checkpoints=checkpoints,
                    member_names=own,
                    evaluate=lambda current: mapped(current, *shared),
                    should_stop=should_stop,
                    **({"revise": stopping.revise} if stopping else {}),
                    tensorboard=boards[index] if first else None,
                    all_may_diverge=len(parts) > 1,
                )

    states = _fit_all(fit_wave, parts, logs, stopping)
    step = max(int(state.step) for state in states)
    if step < plan.total_steps:
        _logger.info("stage %s stopped early, at step %d", stage, step)
    for board in boards:
        board.close()
    if len(parts) > 1:
        _join_records(workdir, stage, names, parts, logs)
    return _join_members([processes.localise(state.members) for state in states])


def _some(members: Member, first: int, stop: int) -> Member:
    if stop - first == num_members(members):
        return members
    return jax.tree.map(lambda leaf: leaf[first:stop], members)


def _fit_all(
    fit_wave: Callable[..., TrainState],
    parts: Sequence[waves.Wave],
    logs: Sequence[MetricsLog],
    stopping: EarlyStopping | None,
) -> list[TrainState]:
    """Fits wave after wave, or record by record where members decide together when to stop."""
    if stopping is None or stopping.alone or len(parts) == 1:
        should_stop = stopping.all_stopped if stopping else lambda records: False
        return [fit_wave(index, should_stop) for index in range(len(parts))]
    # So many records are needed to stop, and earlier ones had their say in an earlier run.
    count = max(stopping.patience + 1, min(len(log.records) for log in logs))
    while True:
        reached = functools.partial(_are, count)
        states = [fit_wave(index, reached) for index in range(len(parts))]
        joined = waves.join(parts, logs)[:count]
        if len(joined) < count or stopping.all_stopped(joined):
            return states
        # Before others take their place.
        del states
        count += 1


def _are(count: int, records: list[Record]) -> bool:
    return len(records) >= count


def _join_records(
    workdir: Path,
    stage: str,
    names: Sequence[str],
    parts: Sequence[waves.Wave],
    logs: Sequence[MetricsLog],
) -> None:
    """Writes the records of all waves as those of the stage; raises if every member diverged."""
    log = MetricsLog(workdir / f"{stage}.jsonl", stage, writes=processes.is_first())
    log.replace(waves.join(parts, logs))
    # Before another reads what the first has written.
    processes.meet(f"{stage} joined")
    if len(log.diverged()) == len(names):
        raise none_left(stage, names, log.diverged())


def _join_members(trained: Sequence[Member]) -> Member:
    if len(trained) == 1:
        return trained[0]
    # One device holds them all, as at the start.
    trained = jax.device_put(trained, jax.local_devices()[0])
    return concatenate(trained)


def _bytes_taken(
    program: Program,
    mapped: Callable[..., Any],
    members: Member,
    size: int,
    train_data: Any,
    evaluation_data: tuple[Any, ...],
) -> int:
    """What a wave of so many members takes of each device, with what others end with.

    The programs that it asks are those which then run.
    """
    mesh, count = program.mesh, num_members(members)
    by_member, everywhere = meshes.member_sharding(mesh), meshes.replicated(mesh)
    if isinstance(train_data, Stream):
        # Of the first wave: members of one key share an order.
        keys = np.asarray(jax.random.key_data(members.key[:size]))
        orders = len({key.tobytes() for key in keys})
        steps = train_data.window_steps(orders * program.batch_size)
        length, n = orders * steps * program.batch_size, steps * program.batch_size
        train_data = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape[1:]), leaf.dtype),
            train_data.example(),
        )
    else:
        n = jax.tree.leaves(train_data)[0].shape[0]
    data, shared = with_sharding(everywhere, (train_data, evaluation_data))
    some = jax.eval_shape(functools.partial(_some, first=0, stop=size), members)
    state = program.shapes(with_sharding(by_member, some), data)
    orders = jax.ShapeDtypeStruct((size, n), jnp.int32, sharding=by_member)
    working = max(
        program.working_bytes(state, data, orders),
        compiled_bytes(mapped, state.members, *shared),
    )
    own = local_bytes(members) // count
    # The state twice: as it starts, and where a checkpoint is written.
    training = 2 * local_bytes(state) + local_bytes(orders) + working + (count - size) * own
    return local_bytes((data, shared)) + max(training, 2 * count * own)


# Stages that follow one another with the same step and evaluation are compiled once.
@functools.lru_cache(maxsize=1)
def _compiled(
    step_fn: StepFn,
    evaluate: Callable[..., Any],
    num_shared: int,
    mode: meshes.MemberMode,
    batch_size: int,
    pick: Callable[..., Any],
    stop_alone: bool,
    freeze: bool,
    mesh: Mesh,
) -> tuple[Program, Callable[..., Any]]:
    """The steps of a stage, and its evaluation over members."""
    program = make_program(
        step_fn, batch_size=batch_size, mesh=mesh, mode=mode, pick=pick,
        active=is_active if stop_alone else None, freeze=freeze,
    )  # fmt: skip
    return program, jax.jit(meshes.map_members(evaluate, mesh, num_shared=num_shared, mode=mode))


@contextlib.contextmanager
def _timed(
    workdir: Path, stage: str, checkpoints: Checkpoints, start: int, num_waves: int
) -> Iterator[None]:
    """Notes what the steps took that a run checkpoints, also of one that is interrupted.

    A step of all members is one of each wave.
    """
    first, began = max(checkpoints.steps(), default=start), time.monotonic()
    try:
        yield
    finally:
        steps = max(checkpoints.steps(), default=start) - first
        if steps > 0 and processes.is_first():
            steps = steps if num_waves == 1 else steps / num_waves
            took = {"stage": stage, "steps": steps, "seconds": time.monotonic() - began}
            # It must not hide what ended the stage.
            with contextlib.suppress(OSError):
                append_line(workdir / _SECONDS, json.dumps(took))


def seconds_per_step(workdir: Path, stage: str) -> float:
    """What a step of a stage took, of all members together, records included.

    Compiling is included where the stage was not compiled before, to ask for its memory.
    From what was measured of each run of the study; NaN if nothing was.
    """
    path = workdir / _SECONDS
    rows = [row for row in _rows(path) if row["stage"] == stage]
    steps = sum(row["steps"] for row in rows)
    return sum(row["seconds"] for row in rows) / steps if steps else float("nan")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """What was measured, without lines that a full disk or a kill cut short."""
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and row.keys() >= {"stage", "steps", "seconds"}:
                yield row
