"""Checkpoints: a whole run state through Orbax, verified bit by bit when it comes back."""

import contextlib
import datetime
import hashlib
import logging
import re
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ntt_sparse.training.files import one_line
from ntt_sparse.training.processes import fetch, is_first, meet, on_all

_logger = logging.getLogger(__name__)

# To save a state, where a clock jumps.
_ATTEMPTS = 3

_State = TypeVar("_State")


class CheckpointError(RuntimeError):
    """Checkpoints are there, but none of them can be used."""


def digest(tree: Any) -> np.ndarray:
    """A 128-bit fingerprint of every bit of a pytree of arrays, as `(16,)` uint8."""
    content = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.ascontiguousarray(fetch(leaf))
        header = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        content += [header.encode(), array.reshape(-1).view(np.uint8).data]
    return _fingerprint(*content)


def _fingerprint(*content: Any) -> np.ndarray:
    """128 bits of some bytes, as `(16,)` uint8."""
    fingerprint = hashlib.blake2b(digest_size=16)
    for part in content:
        fingerprint.update(part)
    return np.frombuffer(fingerprint.digest(), np.uint8)


def _contents(tree: Any) -> dict[str, str]:
    """Shapes and dtypes of the arrays of a tree, as a checkpoint stores them."""
    stored = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        stored[name] = f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"
    return stored


def _reason(error: Exception) -> str:
    """What the system says, of what may be a long story of layers around it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = re.findall(r": ([^:]+?) \[os_error_code=", str(error))
    return said[-1] if said else one_line(error)


class Checkpoints:
    """The checkpoints of one stage of a run, in one directory.

    Each holds the state, how many records the metrics file had when it was taken, a
    digest of the state, and what run it belongs to. Saving is atomic (Orbax writes
    aside and renames); a checkpoint that was cut short or changed on disk fails its
    digest and is set aside when an older one can take its place.
    """

    def __init__(self, directory: str | Path, *, identity: str = "", keep: int = 2):
        """Opens a directory, created when the first checkpoint is saved.

        Args:
            directory: Where the checkpoints of this stage are.
            identity: Text that names the run: its settings and data. Checkpoints of
                another identity are refused.
            keep: How many of the newest to keep, at least 1.

        Raises:
            ValueError: `keep` is below 1.
            CheckpointError: What the directory says of its checkpoints cannot be read.
        """
        if keep < 1:
            raise ValueError(f"{keep=} checkpoints: expected at least 1")
        self.directory = Path(directory).absolute()
        self._identity = _fingerprint(identity.encode())
        self._keep = keep
        self._checkpointer = self._open()

    def _open(self) -> Any:
        # Imported here: the library is useful without it, and it is slow to import.
        from orbax.checkpoint import v1 as ocp

        newest: Any = ocp.training.preservation_policies.LatestN(self._keep)
        try:
            return ocp.training.Checkpointer(
                str(self.directory),
                preservation_policy=newest,
                cleanup_tmp_directories=True,
            )
        except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
            # Of what Orbax writes beside the arrays, such as when they were saved.
            which = ", ".join(path.name for path in self._undescribed()) or "which cannot be told"
            raise CheckpointError(
                f"a checkpoint in {self.directory} is damaged ({which}: {one_line(error)}): move "
                "it elsewhere to go on from another one, or the directory to start this stage again"
            ) from error

    def _undescribed(self) -> list[Path]:
        """The checkpoints whose description cannot be read."""
        from orbax.checkpoint import v1 as ocp

        found = []
        for path in sorted(self.directory.iterdir()):
            if path.name.isdigit():
                try:
                    saved = ocp.metadata(str(path)).commit_timestamp_nsecs or 0
                    datetime.datetime.fromtimestamp(saved / 1e9, tz=datetime.UTC)
                except Exception:  # Of damage, as in `restore`.
                    found.append(path)
        return found

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        try:
            self.close()
        except Exception:
            # Orbax says again what went wrong in saving.
            if exc_type is None:
                raise

    def close(self) -> None:
        """Releases Orbax' threads."""
        self._checkpointer.close()

    def steps(self) -> list[int]:
        """The steps that have a finished checkpoint, oldest first."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, step: int, state: Any, *, records: int) -> None:
        """Saves a state; returns when it is on disk. A step already saved is left as it is.

        Args:
            step: Steps done.
            state: A pytree of arrays.
            records: That the metrics file holds.

        Raises:
            CheckpointError: It cannot be written; checkpoints before it are left.
            TypeError: A leaf of the state is no array.
        """
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
                name = jax.tree_util.keystr(path)
                raise TypeError(f"{name} of the state is {leaf!r}, expected an array")
        if step in self.steps():
            return
        meta = {
            "records": np.asarray(records, np.int64),
            "digest": digest(state),
            "identity": self._identity,
        }
        try:
            self._save(step, {"state": state, "meta": meta})
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for a full disk.
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written in {self.directory} "
                f"({_reason(error)}): when that is mended, the same command goes on from the "
                "checkpoint before"
            ) from error

    def _save(self, step: int, content: Any) -> None:
        for attempts_left in reversed(range(_ATTEMPTS)):
            try:
                self._checkpointer.save(step, content)
                return
            except TimeoutError:
                # Orbax waits for its own threads by the time of day, which may have jumped. (One of
                # several processes cannot try again alone.)
                if not attempts_left or jax.process_count() > 1:
                    raise
                with contextlib.suppress(Exception):
                    self.close()
                self._checkpointer = self._open()
                if step in self.steps():
                    return

    def restore(self, like: _State) -> tuple[_State, int] | None:
        """The newest checkpoint that is whole.

        Args:
            like: A state of the structure, shapes, dtypes and shardings to restore:
                arrays, of JAX or NumPy, or `jax.ShapeDtypeStruct`s.

        Returns:
            `(state, records)`, or `None` when there is no checkpoint at all.

        Raises:
            CheckpointError: There are checkpoints, but they are of another run, or none
                is whole.
        """
        steps = self.steps()
        problems = {}
        for step in reversed(steps):
            try:
                restored = self._load(step, like)
            except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
                # Not damage: another run's, or no room for it.
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds for damage.
                _logger.debug("checkpoint of step %d", step, exc_info=True)
                other = self._other_content(step, like)
                problems[step] = other or f"{type(error).__name__} on reading it"
                continue
            for damaged in problems:
                aside = self._set_aside(damaged)
                _logger.warning(
                    "checkpoint of step %d is cut short or changed (%s): moved to %s, "
                    "going on from step %d",
                    damaged, problems[damaged], aside, step,
                )  # fmt: skip
            return restored
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be used, they are cut short, changed or "
                "of another network or version: "
                + "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
                + ". Delete or move that directory to start this stage again"
            )
        return None

    def _load(self, step: int, like: _State) -> tuple[_State, int]:
        def abstract(leaf):
            if isinstance(leaf, np.ndarray | np.generic):
                return np.asarray(leaf)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        meta = {
            "records": np.zeros((), np.int64),
            "digest": np.zeros(16, np.uint8),
            "identity": np.zeros(16, np.uint8),
        }
        tree = {"state": jax.tree.map(abstract, like), "meta": meta}
        loaded = self._read(step, tree)
        found = digest(loaded["state"])
        if not np.array_equal(found, loaded["meta"]["digest"]):
            raise ValueError("its content does not match its digest")
        if not np.array_equal(loaded["meta"]["identity"], self._identity):
            raise CheckpointError(
                f"the checkpoints in {self.directory} belong to a run with other settings or data: "
                "choose another directory, or delete this one"
            )
        return loaded["state"], int(loaded["meta"]["records"])

    def _other_content(self, step: int, like: Any) -> str:
        """How what a checkpoint holds differs from a state; empty where that cannot be told."""
        from orbax.checkpoint import v1 as ocp

        try:
            held = ocp.metadata(str(self.directory / str(step))).metadata["state"]
        except Exception:  # Of damage, as in `restore`.
            return ""
        found, expected = _contents(held), _contents(like)
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                return (
                    f"{name} is {found.get(name, 'not there')}, not {expected.get(name, 'there')}"
                )
        return ""

    def _read(self, step: int, tree: Any) -> Any:
        """One process that cannot read its part fails on all, which go on from the same one."""
        loaded, failure = None, None
        try:
            loaded = self._checkpointer.load(step, tree)
        except Exception as error:
            failure = error
        if not on_all(failure is None):
            raise failure or ValueError("another process cannot read its part")
        return loaded

    def _set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint next to the directory, where nothing overwrites it."""
        aside = self.directory.with_name(f"{self.directory.name}-damaged")
        target = aside / str(step)
        if is_first():
            aside.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(f"{target.name}+")
            (self.directory / str(step)).rename(target)
        meet(f"checkpoint {step} is set aside")
        self._checkpointer.reload()
        return target
