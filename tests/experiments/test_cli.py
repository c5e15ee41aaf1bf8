"""The command line: every mistake is one line, comes before any work, and changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.cli import claim_workdir

ROOT = Path(__file__).parents[2]
CONFIG = "experiments/configs/ntt.py"


def command(*arguments):
    return [sys.executable, "-m", "experiments.ntt", *arguments]


def environment(tmp_path):
    return os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def run(tmp_path, *arguments):
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config.densty=0.1"], 2, "no field 'densty': did you mean density"),
        ([f"--config={CONFIG}:mnist_lenet30"], 2, "did you mean 'mnist_lenet300'"),
        (["--config.supervised.epochs=many"], 2, "invalid literal"),
        (["--bogus"], 2, "Unknown command line flag 'bogus'"),
        (["run"], 2, "unexpected arguments ['run']"),
        (["--config.density=1.5"], 1, "expected a fraction in (0, 1]"),
        (["--config.density=0.0"], 1, "expected a fraction in (0, 1]"),
        (["--config.density=1e-9"], 1, "keeps none of"),
        (["--config.methods=ntt,snap"], 1, "config.methods is 'ntt,snap'"),
        (["--config.seeds=1,1"], 1, "a value stands there twice"),
        (["--config.model.name=lenet_300"], 1, "unknown model 'lenet_300'"),
        (["--config.model.name=lenet5_caffe"], 1, 'padding="SAME"'),
        (["--config.data.name=no_such_set", "--data_dir=/nowhere"], 1, "not prepared"),
        (["--config.transfer.batch_size=1"], 1, "at least two examples"),
        (["--config.supervised.batch_size=5000"], 1, "no batch can be filled"),
        (["--config.transfer.wrt=some"], 1, "expected one of masked, all"),
        (["--config.supervised.validation_fraction=0.0001"], 1, "validation"),
        (["--config.transfer.kernel_weight=-1"], 1, "expected 0 or more"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_are_one_line_before_any_work(tmp_path, arguments, code, message):
    workdir = tmp_path / "work"
    result = run(tmp_path, f"--workdir={workdir}", *arguments)
    assert result.returncode == code
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert message in lines[0]
    assert not workdir.exists()


def test_help_explains_itself(tmp_path):
    result = run(tmp_path, "--help")
    assert "Neural Tangent Transfer" in result.stdout
    for flag in ("--config", "--workdir", "--data_dir"):
        assert flag in result.stdout


def test_a_work_directory_belongs_to_one_config(tmp_path):
    config = {"a": {"b": 1, "c": (1, 2)}, "d": "x"}
    workdir = claim_workdir(tmp_path / "w", config)
    assert claim_workdir(workdir, config) == workdir
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"another config \(a\.b was 1, is 2\)"):
        claim_workdir(workdir, config | {"a": {"b": 2, "c": (1, 2)}})
    assert (workdir / "config.json").read_bytes() == before


def test_a_work_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "w").write_text("mine")
    with pytest.raises(OSError):
        claim_workdir(tmp_path / "w", {})
    assert (tmp_path / "w").read_text() == "mine"


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, "the run ended early"
        time.sleep(0.02)


@pytest.mark.parametrize("stage", ["transfer", "supervised"])
def test_a_study_killed_in_either_stage_ends_bit_identical(tmp_path, finished_smoke, stage):
    """SIGKILL in the first stage, Ctrl-C in the second."""
    workdir = tmp_path / "work"
    arguments = (*finished_smoke.arguments, f"--workdir={workdir}")
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(finished_smoke.cache),
        stderr=subprocess.PIPE,
        text=True,
        stdout=subprocess.DEVNULL,
    )
    wait_for(workdir / f"{stage}.jsonl", process)
    process.send_signal(signal.SIGKILL if stage == "transfer" else signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    if stage == "supervised":
        assert process.returncode == 130
        assert "interrupted: stopped at step" in stderr
    assert not (workdir / "summary.json").exists()
    result = run(finished_smoke.cache, *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("summary.json", "transfer.jsonl", "supervised.jsonl"):
        assert (workdir / name).read_bytes() == (finished_smoke.workdir / name).read_bytes()


def test_a_finished_study_is_only_drawn_again(finished_smoke):
    before = (finished_smoke.workdir / "summary.json").read_bytes()
    (finished_smoke.workdir / "report.md").unlink()
    arguments = (*finished_smoke.arguments, f"--workdir={finished_smoke.workdir}")
    result = run(finished_smoke.cache, *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (finished_smoke.workdir / "summary.json").read_bytes() == before
    assert "summary: " in result.stdout and "figures: " in result.stdout
    assert json.loads(before)["supervised"][0]["test_accuracy_last"]["values"]
