"""Metrics: strict JSON lines that survive a kill, and event files that TensorBoard reads."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest

from ntt_sparse.training.divergence import Divergence
from ntt_sparse.training.metrics import MetricsLog, TensorBoard


def test_lines_read_back_exactly(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", "stage")
    values = np.array([1 / 3, np.float32(0.1), 1e-45, 2**24 + 1], np.float32)
    log.write(3, {"loss": values, "count": np.array([1, 2])})
    again = MetricsLog(tmp_path / "m.jsonl", "stage")
    assert again.records == log.records
    assert again.records[0]["stage"] == "stage"
    steps, column = again.column("loss")
    assert steps.tolist() == [3]
    np.testing.assert_array_equal(column[0].astype(np.float32), values)


def test_values_that_are_not_finite_are_null_and_read_as_nan(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", "stage")
    log.write(0, {"loss": np.array([np.nan, np.inf, 1.0])})
    line = (tmp_path / "m.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] == [None, None, 1.0]
    np.testing.assert_array_equal(log.column("loss")[1], [[np.nan, np.nan, 1.0]])


@pytest.mark.parametrize("tail", ['{"stage": "s", "st', '{"stage": "s", "step": 2}', "\x00\x00\n"])
def test_a_line_cut_short_is_dropped(tmp_path, tail, caplog):
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path, "s")
    log.write(1, {"loss": np.ones(1)})
    path.write_text(path.read_text() + tail)
    again = MetricsLog(path, "s")
    assert [record["step"] for record in again.records] == [1]
    assert "cut short" in caplog.text
    again.truncate(1)
    again.write(2, {"loss": np.ones(1)})
    assert [r["step"] for r in MetricsLog(path, "s").records] == [1, 2]


def test_truncate_cuts_the_file_too_and_never_invents(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", "s")
    for step in range(3):
        log.write(step, {})
    log.truncate(1)
    assert len(MetricsLog(tmp_path / "m.jsonl", "s").records) == 1
    with pytest.raises(ValueError, match="holds 1 records where its checkpoint had 2"):
        log.truncate(2)


def test_a_metric_that_nobody_wrote_is_an_error(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", "s")
    log.write(0, {"loss": np.ones(1)})
    with pytest.raises(KeyError, match=r"'los'.*'loss'"):
        log.column("los")


def event_payloads(path):
    """The records of an event file: length, its checksum, payload, its checksum."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield content[12 : 12 + length]
        content = content[16 + length :]


def test_event_files_hold_tags_and_values(tmp_path):
    board = TensorBoard(tmp_path, ["a", "b"])
    board.write("stage", 7, {"loss": np.array([0.5, 0.25]), "outputs": np.ones((2, 3))})
    board.close()
    for name, value in (("a", 0.5), ("b", 0.25)):
        (path,) = (tmp_path / name).glob("events.out.tfevents*")
        payload = b"".join(event_payloads(path))
        assert b"stage/loss" in payload
        assert struct.pack("<f", value) in payload
        assert b"outputs" not in payload


def test_writing_event_files_imports_no_tensorflow(tmp_path):
    code = (
        "import sys, numpy as np; from ntt_sparse.training.metrics import TensorBoard\n"
        f"board = TensorBoard({str(tmp_path)!r}, ['a'])\n"
        "board.write('s', 1, {'x': np.ones(1)}); board.close()\n"
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_members_that_diverged_are_null_and_others_as_they_were(tmp_path):
    """Whole numbers stay whole, and what is nested keeps its lengths."""
    log = MetricsLog(tmp_path / "m.jsonl", "s")
    values = {"kept": np.array([3, 4]), "rates": np.array([[0.5, 1.0], [2.0, np.nan]])}
    log.write(7, values, diverged=[None, Divergence(5, "loss")])
    (line,) = (tmp_path / "m.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "stage": "s", "step": 7, "kept": [3, None], "rates": [[0.5, 1.0], [None, None]],
        "diverged": [None, {"step": 5, "term": "loss"}],
    }  # fmt: skip
    assert '"kept": [3, null]' in line
    np.testing.assert_array_equal(log.column("rates")[1][0], [[0.5, 1.0], [np.nan, np.nan]])
    # Where nothing else is recorded, too.
    assert log.write(8, {}, diverged=[Divergence(8, "loss")])["diverged"] == [
        {"step": 8, "term": "loss"}
    ]


def test_without_the_package_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    board = TensorBoard(tmp_path, ["a"])
    board.write("s", 1, {"x": np.ones(1)})
    board.close()
    assert not list(tmp_path.iterdir())
