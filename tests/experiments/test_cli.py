"""The command line: every mistake is one line, comes before any work, and changes nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import ntt_study
from experiments.cli import UserError, claim_workdir
from experiments.configs import ntt as configs
from ntt_sparse.training.metrics import MetricsLog

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
        (["--config.seeds=1,1"], 1, "expected different values"),
        (["--config.seeds=4294967297"], 1, "2**32 - 1"),
        (["--config.density=abc"], 1, "expected a fraction in (0, 1]"),
        (["--config.supervised.patience=-1"], 1, "config.supervised.patience is -1"),
        (
            ["--config.probe=3", "--config.methods=snip"],
            1,
            "config.methods must have ntt and dense",
        ),
        (["--config.transfer.validation_fraction=0.0007"], 1, "kernel pairs need two"),
        (["--config.snip_batch_size=100000"], 1, "there are 1293 training images"),
        (["--config.model.name=lenet_300"], 1, "unknown model 'lenet_300'"),
        (["--config.model.name=lenet5_caffe"], 1, 'padding="SAME"'),
        (["--config.data.name=no_such_set", "--data_dir=/nowhere"], 1, "not prepared"),
        (["--config.transfer.batch_size=1"], 1, "at least two examples"),
        (["--config.supervised.batch_size=5000"], 1, "no batch can be filled"),
        (["--config.transfer.wrt=some"], 1, "expected one of 'masked', 'all'"),
        (["--config.supervised.validation_fraction=0.0001"], 1, "validation"),
        (["--config.transfer.kernel_weight=-1"], 1, "config.transfer.kernel_weight is -1"),
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
    for flag in ("config", "workdir", "data_dir"):
        assert re.search(rf"^  --{flag}: ", result.stdout, re.M), flag
    assert "mnist_lenet5_caffe" in result.stdout


def test_a_work_directory_belongs_to_one_config(tmp_path):
    config = {"a": {"b": 1, "c": (1, 2)}, "d": "x"}
    for _ in range(2):
        with claim_workdir(tmp_path / "w", config) as workdir:
            before = (workdir / "config.json").read_bytes()
    other = config | {"a": {"b": 2, "c": (1, 2)}}
    with pytest.raises(UserError, match=r"another config \(a\.b was 1, is 2\)"):
        with claim_workdir(tmp_path / "w", other):
            pytest.fail("it was claimed")
    assert (tmp_path / "w" / "config.json").read_bytes() == before


def test_a_directory_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "summary.json").write_text("precious")
    with pytest.raises(UserError, match=r"holds summary\.json but no config.json"):
        with claim_workdir(tmp_path, {}):
            pytest.fail("it was claimed")
    assert (tmp_path / "summary.json").read_text() == "precious"


def test_a_work_directory_has_one_process(tmp_path):
    with claim_workdir(tmp_path / "w", {}):
        with pytest.raises(UserError, match="another process works in"):
            with claim_workdir(tmp_path / "w", {}):
                pytest.fail("it was claimed twice")
    with claim_workdir(tmp_path / "w", {}):
        pass


def test_a_work_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "w").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written.*choose a folder of your own"):
        with claim_workdir(tmp_path / "w", {}):
            pytest.fail("it was claimed")
    assert (tmp_path / "w").read_text() == "mine"


def saved(directory):
    return {path.name for path in directory.glob("*") if path.name.isdigit()}


@pytest.mark.parametrize("stage", ["transfer", "supervised"])
def test_a_study_killed_in_either_stage_ends_bit_identical(tmp_path, finished_smoke, stage):
    """Between two checkpoints, with mask refreshes before and after."""
    workdir = tmp_path / "work"
    arguments = (*finished_smoke.arguments, f"--workdir={workdir}")
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(finished_smoke.cache),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while not saved(workdir / "checkpoints" / stage):
        assert process.poll() is None, "the run ended early"
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (workdir / "summary.json").exists()
    result = run(finished_smoke.cache, *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"stage {stage} goes on from step" in result.stderr
    for name in ("summary.json", "transfer.jsonl", "supervised.jsonl"):
        assert (workdir / name).read_bytes() == (finished_smoke.workdir / name).read_bytes()


def test_a_checkpoint_of_another_config_is_refused(tmp_path, finished_smoke):
    workdir = tmp_path / "work"
    shutil.copytree(finished_smoke.workdir, workdir)
    settings = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(settings | {"density": [0.04]}))
    arguments = [argument.replace("0.05", "0.04") for argument in finished_smoke.arguments]
    result = run(finished_smoke.cache, *arguments, f"--workdir={workdir}")
    assert result.returncode == 1
    assert "belong to a run with other settings or data" in result.stderr


def test_eight_devices_end_where_one_does(tmp_path, finished_smoke):
    """In this process, which has eight: members and batches are both spread."""
    config = configs.get_config("digits_lenet300,smoke")
    for field, value in finished_smoke.fields.items():
        node = config
        *parents, last = field.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = value
    assert jax.device_count() == 8
    ntt_study.run(config, tmp_path / "w")
    for name in ("transfer", "supervised"):
        one = MetricsLog(finished_smoke.workdir / f"{name}.jsonl", name).records
        eight = MetricsLog(tmp_path / "w" / f"{name}.jsonl", name).records
        assert [record["step"] for record in one] == [record["step"] for record in eight]
    _, one = MetricsLog(finished_smoke.workdir / "transfer.jsonl", "t").column("validation/loss")
    _, eight = MetricsLog(tmp_path / "w" / "transfer.jsonl", "t").column("validation/loss")
    np.testing.assert_allclose(eight, one, rtol=1e-4)
    _, one = MetricsLog(finished_smoke.workdir / "supervised.jsonl", "s").column("test/loss")
    _, eight = MetricsLog(tmp_path / "w" / "supervised.jsonl", "s").column("test/loss")
    np.testing.assert_allclose(eight, one, rtol=1e-3)


def test_a_finished_study_is_only_drawn_again(finished_smoke):
    before = (finished_smoke.workdir / "summary.json").read_bytes()
    (finished_smoke.workdir / "report.md").unlink()
    arguments = (*finished_smoke.arguments, f"--workdir={finished_smoke.workdir}")
    result = run(finished_smoke.cache, *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (finished_smoke.workdir / "summary.json").read_bytes() == before
    assert "summary.json: " in result.stdout and "figures: " in result.stdout
    assert json.loads(before)["supervised"][0]["test_accuracy_last"]["values"]
