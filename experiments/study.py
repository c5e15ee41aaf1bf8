"""What studies share: held-out data, one stage over all devices, networks as files."""

import contextlib
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ntt_sparse._types import PRNGKey
from ntt_sparse.data import folders, images
from ntt_sparse.data.augment import pad_crop_flip
from ntt_sparse.data.batches import steps_per_epoch, total_steps
from ntt_sparse.data.folders import FolderImages
from ntt_sparse.data.stream import Stream
from ntt_sparse.data.text import TextData
from ntt_sparse.pruning.masks import LayerDensity, layer_densities
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import processes
from ntt_sparse.training.checkpoint import Checkpoints, digest
from ntt_sparse.training.export import save_network
from ntt_sparse.training.files import append_text
from ntt_sparse.training.loop import Plan, fit
from ntt_sparse.training.metrics import MetricsLog, TensorBoard
from ntt_sparse.training.program import Program, gather, make_program
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import Augment, StepFn
from ntt_sparse.training.stopping import EarlyStopping, is_active

# What each run of each stage took; unlike records it is of this machine and moment.
_SECONDS = "seconds.jsonl"
_Data = TypeVar("_Data", bound=images.ImageData | TextData)
_logger = logging.getLogger(__name__)


def asked_densities(config: Any) -> list[float]:
    """The densities of the settings, where 1 is an integer on a command line."""
    return [float(density) for density in config.density]


def stack(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)


def warn_of_empty_layers(name: str, masks: Any) -> dict[str, LayerDensity]:
    """Logs a warning of layers without any weight. Returns what each layer keeps."""
    rows = layer_densities(masks)
    if empty := [layer for layer, row in rows.items() if row.kept == 0]:
        _logger.warning("%s: layers without any weight: %s", name, ", ".join(empty))
    return rows


def hold_out(data: _Data, fraction: float, seed: int) -> _Data:
    """Splits the training part; with a fraction of 0 the validation set is the training set."""
    if fraction == 0:
        return data._replace(validation=data.train)
    train, validation = images.split_indices(len(data.train.y), fraction, seed)
    return data._replace(
        train=images.take(data.train, train), validation=images.take(data.train, validation)
    )


def unit_pixels(data: images.ImageData) -> images.ImageData:
    """Images whose pixels go from 0 to 1, the darkest and the brightest of those in training."""
    std, mean = data.std.astype(np.float32), data.mean.astype(np.float32)
    train = np.asarray(data.train.x) * std + mean
    low, high = train.min(), train.max()

    def scaled(split: images.Split) -> images.Split:
        return images.Split((np.asarray(split.x) * std + mean - low) / (high - low), split.y)

    return data._replace(
        train=scaled(data.train), validation=scaled(data.validation), test=scaled(data.test)
    )


def training_input(config: Any, split: images.Split) -> tuple[Any, Augment | None]:
    """What `fit_stage` trains on, and how its steps change their batches.

    Images in memory are cropped and mirrored on the device, those of a folder where they are read,
    if the settings augment.
    """
    x, y = split
    if not isinstance(x, FolderImages):
        return (x, y), augment_images if config.data.augment else None

    def read(index: int, rng: np.random.RandomState) -> Any:
        return x.random(index, rng) if config.data.augment else x.central(index), y[index]

    def standardise(key: PRNGKey, batch: Any) -> Any:
        del key
        return folders.standardise(batch[0]), batch[1]

    listed = f"{x.shape} {x.paths} {x.indices.tolist()}"
    return Stream(read, len(y), identity=hashlib.sha256(listed.encode()).hexdigest()), standardise


def make_plan(settings: Any, n: int, checkpoint_seconds: float) -> Plan:
    """The plan of a stage from its settings, for n training examples."""
    per_epoch = steps_per_epoch(n, settings.batch_size)
    steps = settings.max_steps or total_steps(n, settings.batch_size, settings.epochs)
    return Plan(steps, per_epoch, settings.record_every or per_epoch, checkpoint_seconds)


def decayed_rate(settings: Any, total_steps: int, factor: float = 0.1) -> optax.Schedule:
    """The learning rate of a stage, times a factor at fractions of its steps."""
    return optax.piecewise_constant_schedule(
        settings.learning_rate,
        {round(fraction * total_steps): factor for fraction in settings.milestones},
    )


def augment_images(key: PRNGKey, batch: Any) -> Any:
    """Pads, crops and mirrors the images of a batch `(x, y)`."""
    x, y = batch
    return pad_crop_flip(key, x), y


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
    mesh = meshes.auto_mesh(len(names), batch_size)
    streamed = isinstance(train_data, Stream)
    placed, evaluation_data = processes.place(
        jax.tree.map(jnp.asarray, (() if streamed else train_data, evaluation_data)),
        meshes.replicated(mesh),
    )
    program, mapped = _compiled(
        step_fn,
        evaluate,
        len(evaluation_data),
        mesh,
        mode,
        batch_size,
        pick,
        stopping is not None and stopping.alone,
        # Where one is all there is, nothing would go on.
        freeze and len(names) > 1,
    )
    _logger.info(
        "%s: %d members, %d steps, mesh %s, %s", stage, len(names), plan.total_steps,
        dict(mesh.shape), mode,
    )  # fmt: skip
    log = MetricsLog(workdir / f"{stage}.jsonl", stage, writes=processes.is_first())
    board = TensorBoard(workdir / "tensorboard" / stage, names) if processes.is_first() else None
    data_digest = "" if made else digest((placed, evaluation_data)).tobytes().hex()
    if streamed:
        data_digest += train_data.identity
    identity = json.dumps([config.to_dict(), names, data_digest], sort_keys=True)
    with Checkpoints(workdir / "checkpoints" / stage, identity=identity) as checkpoints:
        with _timed(workdir, stage, checkpoints, plan.start):
            state = fit(
                program,
                members,
                train_data if streamed else placed,
                plan,
                log=log,
                checkpoints=checkpoints,
                member_names=names,
                evaluate=lambda current: mapped(current, *evaluation_data),
                **(
                    {"should_stop": stopping.all_stopped, "revise": stopping.revise}
                    if stopping
                    else {}
                ),
                tensorboard=board,
            )
    if board is not None:
        board.close()
    return processes.localise(state.members)


# Stages that follow one another with the same step and evaluation are compiled once.
@functools.lru_cache(maxsize=1)
def _compiled(
    step_fn: StepFn,
    evaluate: Callable[..., Any],
    num_shared: int,
    mesh: Mesh,
    mode: meshes.MemberMode,
    batch_size: int,
    pick: Callable[..., Any],
    stop_alone: bool,
    freeze: bool,
) -> tuple[Program, Callable[..., Any]]:
    """The steps of a stage, and its evaluation over members."""
    program = make_program(
        step_fn, batch_size=batch_size, mesh=mesh, mode=mode, pick=pick,
        active=is_active if stop_alone else None, freeze=freeze,
    )  # fmt: skip
    return program, jax.jit(meshes.map_members(evaluate, mesh, num_shared=num_shared, mode=mode))


@contextlib.contextmanager
def _timed(workdir: Path, stage: str, checkpoints: Checkpoints, start: int) -> Iterator[None]:
    """Notes what the steps took that a run checkpoints, also of one that is interrupted."""
    first, began = max(checkpoints.steps(), default=start), time.monotonic()
    try:
        yield
    finally:
        steps = max(checkpoints.steps(), default=start) - first
        if steps > 0 and processes.is_first():
            took = {"stage": stage, "steps": steps, "seconds": time.monotonic() - began}
            # It must not hide what ended the stage.
            with contextlib.suppress(OSError):
                append_text(workdir / _SECONDS, json.dumps(took) + "\n")


def seconds_per_step(workdir: Path, stage: str) -> float:
    """What a step of a stage took, of all members together, compiling and records included.

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


def save_networks(
    directory: Path, names: Sequence[str], members: Member, gone: Collection[int] = ()
) -> None:
    """Writes each trained network, as it was after the last step, under its name.

    Args:
        directory: Where to; made if it is not there.
        names: One for each member.
        members: With a leading member axis.
        gone: Indices of those that diverged, which are not written.
    """
    if not processes.is_first():
        return
    directory.mkdir(exist_ok=True)
    trees = jax.device_get((members.params, members.masks, members.model_state))
    for index, name in enumerate(names):
        if index in gone:
            continue
        params, masks, state = jax.tree.map(lambda leaf, i=index: jnp.asarray(leaf[i]), trees)
        save_network(directory / f"{name}.safetensors", params, masks, state)
