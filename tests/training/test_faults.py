"""Full disks and clocks that jump: what was written stays whole, and the run goes on."""

import errno
import itertools
import random
import time
import types

import jax
import numpy as np
import problems
import pytest

from ntt_sparse.training import checkpoint, files, loop, mesh, metrics
from ntt_sparse.training.checkpoint import CheckpointError, Checkpoints
from ntt_sparse.training.metrics import MetricsLog, TensorBoard

PLAN = loop.Plan(total_steps=6, steps_per_epoch=6, record_every=6, checkpoint_seconds=0.0)
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def program():
    return problems.program(mesh.make_mesh(devices=jax.devices()[:1]))


def run(workdir, program):
    """The end state; workdir is made."""
    workdir.mkdir(exist_ok=True)
    board = TensorBoard(workdir / "tensorboard", ["a", "b", "c", "d"])
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state = loop.fit(
            program, problems.members(), jax.device_put(problems.data()), PLAN,
            log=MetricsLog(workdir / "metrics.jsonl", "made"), checkpoints=checkpoints,
            member_names=["a", "b", "c", "d"], tensorboard=board,
        )  # fmt: skip
    board.close()
    return checkpoint.digest(state).tobytes(), (workdir / "metrics.jsonl").read_bytes()


def full_at(monkeypatch, number):
    """The disk is full at this write; of a line it then takes half."""
    count = itertools.count(1)

    def append_text(path, text):
        if next(count) != number:
            return files.append_text(path, text)
        files.append_text(path, text[: len(text) // 2])
        raise FULL

    def write_text(path, text):
        if next(count) == number:
            raise FULL
        files.write_text(path, text)

    def save(self, step, state, *, records, original=Checkpoints.save):
        if next(count) == number:
            raise CheckpointError("full")
        original(self, step, state, records=records)

    monkeypatch.setattr(metrics, "append_text", append_text)
    monkeypatch.setattr(metrics, "write_text", write_text)
    monkeypatch.setattr(Checkpoints, "save", save)


def test_a_disk_that_is_full_at_any_write_loses_nothing(tmp_path, program, monkeypatch):
    unbroken = run(tmp_path / "unbroken", program)
    for number in itertools.count(1):
        workdir = tmp_path / str(number)
        with monkeypatch.context() as patched:
            full_at(patched, number)
            try:
                run(workdir, program)
                break
            except (OSError, CheckpointError):
                pass
        assert run(workdir, program) == unbroken
    # The file anew, two records, and a checkpoint after each of at least two chunks.
    assert number > 5


def jumping(monkeypatch, jumps):
    """The time of day is set while checkpoints are written, once in each of the first."""
    offset, clock = 0.0, time.time
    count = itertools.count(20)

    def read():
        nonlocal offset
        if next(count) == 10:
            offset += jumps.pop(0)
        return clock() + offset

    def save(self, *arguments, original=Checkpoints._save):
        nonlocal count
        if jumps:
            count = itertools.count()
        original(self, *arguments)

    monkeypatch.setattr(time, "time", read)
    monkeypatch.setattr(Checkpoints, "_save", save)


def test_clocks_that_jump_or_stand_still_change_nothing(tmp_path, program, monkeypatch):
    unbroken = run(tmp_path / "unbroken", program)
    rng = random.Random(0)
    for name, monotonic in (
        ("still", lambda: 7.0),
        ("jumps", lambda: rng.choice([0.0, 1e9, -1e9])),
    ):
        jumps = [1e8, -2e8]
        with monkeypatch.context() as patched:
            jumping(patched, jumps)
            patched.setattr(loop, "time", types.SimpleNamespace(monotonic=monotonic))
            assert run(tmp_path / name, program) == unbroken and not jumps
            # And once more, from the checkpoint of the end.
            assert run(tmp_path / name, program) == unbroken


def test_a_file_is_the_old_one_where_the_new_one_does_not_fit(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    files.write_npz(path, {"x": np.ones(3)})
    before = path.read_bytes()

    def write_bytes(self, content):
        with self.open("wb") as file:
            file.write(content[:5])
        raise FULL

    monkeypatch.setattr(type(path), "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space left on device") as raised:
        files.write_npz(path, {"x": np.zeros(30)})
    assert raised.value.filename == str(path)
    assert str(raised.value) == f"[Errno 28] No space left on device: {str(path)!r}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]
    assert path.read_bytes() == before


def test_files_that_belong_together_are_all_the_old_ones_where_one_does_not_fit(
    tmp_path, monkeypatch
):
    texts = {tmp_path / name: name for name in ("a", "b", "c")}
    files.write_texts(texts)
    original = type(tmp_path).write_bytes

    def write_bytes(self, content):
        original(self, content[:5])
        if self.name.startswith("b"):
            raise FULL

    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "write_bytes", write_bytes)
        with pytest.raises(OSError, match="No space left on device") as raised:
            files.write_texts({path: "new content" for path in texts})
    assert raised.value.filename == str(tmp_path / "b")
    (tmp_path / "c").unlink()
    (tmp_path / "c").mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        files.write_texts({path: "new content" for path in texts})
    assert raised.value.filename == str(tmp_path / "c")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b", "c"]
    assert [(tmp_path / name).read_text() for name in "ab"] == ["a", "b"]


def test_event_files_on_a_full_disk_are_an_error_and_no_endless_wait(tmp_path, monkeypatch):
    board = TensorBoard(tmp_path, ["a"])
    values = {"loss": np.ones(1)}
    board.write("s", 0, values)
    (file,) = board._files
    monkeypatch.setattr(file._writer, "write_event", lambda event: (_ for _ in ()).throw(FULL))
    for step in range(30):
        with pytest.raises(OSError, match="No space left on device") as raised:
            board.write("s", step, values)
        assert raised.value.filename == str(tmp_path / "a")
