"""The command line: every mistake is one line, comes before any work, and changes nothing."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import cli, ntt_study
from experiments.cli import UserError, claim_workdir
from experiments.configs import ntt as configs
from ntt_sparse.training.metrics import MetricsLog

ROOT = Path(__file__).parents[2]
CONFIG = "experiments/configs/ntt.py"


def command(*arguments):
    return [sys.executable, "-m", "experiments.ntt", *arguments]


def environment():
    return os.environ | {"JAX_NUM_CPU_DEVICES": "1"}


def run(*arguments):
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config.densty=0.1"], 2, "no field 'densty': did you mean density"),
        ([f"--config={CONFIG}:mnist_lenet30"], 2, "did you mean 'mnist_lenet300'"),
        (["--config=configs/ntt.py:mnist_lenet300"], 2, "no config file 'configs/ntt.py'"),
        (["--config.supervised.epochs=many"], 2, "invalid literal"),
        (["--bogus"], 2, "Unknown command line flag 'bogus'"),
        (["run"], 2, "unexpected arguments ['run']"),
        (["--config.density=abc"], 1, "expected a fraction in (0, 1]"),
        (["--config.data.name=no_such_set", "--data_dir=/nowhere"], 1, "not prepared"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_are_one_line_before_any_work(tmp_path, arguments, code, message):
    workdir = tmp_path / "work"
    result = run(f"--workdir={workdir}", *arguments)
    assert result.returncode == code
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert message in lines[0]
    assert not workdir.exists()


def test_a_platform_that_is_not_there_is_one_line_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    result = run(f"--workdir={tmp_path / 'work'}")
    assert result.returncode == 1 and not (tmp_path / "work").exists()
    (line,) = result.stderr.split("\n")[1:-1]
    assert "JAX finds no device (JAX_PLATFORMS='abacus'; RuntimeError: " in line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": (1.5,)}, "expected a fraction in (0, 1]"),
        ({"density": (0.0,)}, "expected a fraction in (0, 1]"),
        ({"density": (1e-9,)}, "keeps none of"),
        ({"methods": "ntt,snap"}, "config.methods is 'ntt,snap'"),
        ({"seeds": (1, 1)}, "expected different values"),
        ({"seeds": (4294967297,)}, "2**32 - 1"),
        ({"supervised.patience": -1}, "config.supervised.patience is -1"),
        ({"probe": 3, "methods": "snip"}, "config.methods must have ntt and dense"),
        ({"transfer.validation_fraction": 0.0007}, "kernel pairs need two"),
        ({"snip_batch_size": 100000}, "there are 1293 training images"),
        ({"model.name": "lenet_300"}, "unknown model 'lenet_300'"),
        ({"model.name": "lenet5_caffe"}, 'padding="SAME"'),
        ({"transfer.batch_size": 1}, "at least two examples"),
        ({"supervised.batch_size": 5000}, "no batch can be filled"),
        ({"transfer.wrt": "some"}, "expected one of 'masked', 'all'"),
        ({"supervised.validation_fraction": 0.0001}, "validation"),
        ({"transfer.kernel_weight": -1.0}, "config.transfer.kernel_weight is -1"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_run_are_refused_before_any_work(tmp_path, fields, message):
    """In this process; the command line prints such an error as that of a density above."""
    config = configs.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    with pytest.raises(UserError) as raised:
        ntt_study.run(config, tmp_path / "w")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "w").exists()


def test_help_explains_itself():
    result = run("--help")
    assert "Neural Tangent Transfer" in result.stdout
    for flag in ("config", "workdir", "data_dir"):
        assert re.search(rf"^  --{flag}: ", result.stdout, re.M), flag
    assert "mnist_lenet5_caffe" in result.stdout


COMMANDS = sorted(
    path.stem
    for path in (ROOT / "experiments").glob("*.py")
    if path.stem != "cli" and 'if __name__ == "__main__"' in path.read_text()
)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    result = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", "--help"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0 and not result.stderr.strip()
    assert f"python -m experiments.{name}" in result.stdout
    assert re.search(rf"^\S*/experiments/{name}\.py:\n(  --\w+: .+\n)", result.stdout, re.M)


@pytest.mark.parametrize("arguments", [[f"--config={CONFIG}:fig"], ["--config", f"{CONFIG}:fig"]])
def test_configs_are_found_without_a_checkout(tmp_path, arguments):
    """As where the package was installed: from a folder that holds no configs."""
    result = subprocess.run(
        command(*arguments),
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2 and not list(tmp_path.iterdir())
    # The file was loaded, and knows no such name.
    assert result.stderr.startswith("\nerror: unknown config 'fig'")


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


def guarded(tmp_path, body):
    """A command of its own, and how it ends."""
    script = tmp_path / "command.py"
    script.write_text(
        "import time\nfrom pathlib import Path\nfrom experiments import cli\n"
        "from ntt_sparse.training.files import append_text\n"
        f"WORKDIR = {str(tmp_path / 'w')!r}\ndef main():\n    {body}\ncli.launch(main, doc='')\n"
    )
    return subprocess.Popen(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_second_process_of_a_work_directory_ends_with_3_and_a_dead_one_holds_nothing(tmp_path):
    first = guarded(
        tmp_path,
        "with cli.claim_workdir(WORKDIR, {}): print('claimed', flush=True); time.sleep(300)",
    )
    assert first.stdout.readline() == "claimed\n"
    second = guarded(tmp_path, "cli.claim_workdir(WORKDIR, {}).__enter__()")
    _, said = second.communicate(timeout=120)
    assert second.returncode == 3
    assert said.strip().startswith("error: another process works in") and "\n" not in said.strip()
    first.kill()
    first.communicate()
    with claim_workdir(tmp_path / "w", {}):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_full_disk_is_one_line(tmp_path):
    process = guarded(tmp_path, "append_text(Path('/dev/full'), 'a record')")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.strip() == (
        "error: No space left on device: /dev/full; when that is mended, the same command goes on "
        "from the last checkpoint"
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a folder no one can write")
@pytest.mark.parametrize("folder", ["/proc/ntt_sparse", "/sys/ntt_sparse"])
def test_a_work_directory_that_cannot_be_written_is_refused(folder):
    with pytest.raises(UserError, match=f"work directory {folder} cannot be written"):
        with claim_workdir(folder, {}):
            pass


def test_a_process_killed_as_it_wrote_its_settings_leaves_a_directory_that_can_be_used(tmp_path):
    (tmp_path / "config.json.tmp").write_text('{"na')
    with claim_workdir(tmp_path, {"name": "a"}):
        assert json.loads((tmp_path / "config.json").read_text()) == {"name": "a"}
    assert not (tmp_path / "config.json.tmp").exists()


@pytest.mark.parametrize("content", ["", '{"name": ', "\xff", "[" * 100_000])
def test_damaged_settings_are_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="latin1")
    with pytest.raises(UserError, match=r"config\.json is damaged") as raised:
        with claim_workdir(tmp_path, {}):
            pass
    assert "\n" not in str(raised.value)


def test_a_work_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "w").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written.*choose a folder of your own"):
        with claim_workdir(tmp_path / "w", {}):
            pytest.fail("it was claimed")
    assert (tmp_path / "w").read_text() == "mine"


def saved(directory):
    return {path.name for path in directory.glob("*") if path.name.isdigit()}


def kill_in(stage, workdir, arguments):
    """Starts the study, or goes on with it, and kills it at a checkpoint of the stage.

    Returns:
        What it had written to stderr.
    """
    log = workdir.parent / f"{stage}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command(*arguments), cwd=ROOT, env=environment(),
            stderr=stderr, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        while not saved(workdir / "checkpoints" / stage):
            assert process.poll() is None, "the run ended early"
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (workdir / "summary.json").exists()
    return log.read_text()


@pytest.mark.parametrize(
    "stages", [["transfer"], pytest.param(["transfer", "supervised"], marks=pytest.mark.slow)]
)
def test_a_killed_study_ends_bit_identical(tmp_path, finished_smoke, stages):
    """Between two checkpoints, with mask refreshes before and after."""
    workdir = tmp_path / "work"
    arguments = (*finished_smoke.arguments, f"--workdir={workdir}")
    goes_on = "goes on"
    for stage in stages:
        said = kill_in(stage, workdir, arguments)
        assert (goes_on in said) == (stage != stages[0])
        goes_on = f"stage {stage} goes on from step"
    result = run(*arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    assert goes_on in result.stderr
    for name in ("summary.json", "transfer.jsonl", "supervised.jsonl"):
        assert (workdir / name).read_bytes() == (finished_smoke.workdir / name).read_bytes()


@pytest.mark.slow
def test_a_checkpoint_of_another_config_is_refused(tmp_path, finished_smoke):
    workdir = tmp_path / "work"
    shutil.copytree(finished_smoke.workdir, workdir)
    settings = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(settings | {"density": [0.04]}))
    arguments = [argument.replace("0.05", "0.04") for argument in finished_smoke.arguments]
    result = run(*arguments, f"--workdir={workdir}")
    assert result.returncode == 1
    assert "belong to a run with other settings or data" in result.stderr


@pytest.mark.slow
def test_eight_devices_end_where_one_does(tmp_path, finished_smoke, eight_devices):
    """In this process, which has eight: members and batches are both spread."""
    config = configs.get_config("digits_lenet300,smoke")
    with config.unlocked():
        config.update_from_flattened_dict(finished_smoke.fields | {"checkpoint_seconds": 60.0})
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


@pytest.mark.slow
def test_a_finished_study_is_only_drawn_again(finished_smoke):
    """By the command line; tests of other studies see the same in this process."""
    before = (finished_smoke.workdir / "summary.json").read_bytes()
    (finished_smoke.workdir / "report.md").unlink()
    arguments = (*finished_smoke.arguments, f"--workdir={finished_smoke.workdir}")
    result = run(*arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (finished_smoke.workdir / "summary.json").read_bytes() == before
    assert "summary.json: " in result.stdout and "figures: " in result.stdout
    assert json.loads(before)["supervised"][0]["test_accuracy_last"]["values"]


def test_an_error_of_files_ends_one_of_several_processes_at_once(monkeypatch):
    """In the ordinary way it would wait for the others, which wait for it."""
    left = []
    monkeypatch.setattr(cli.cluster, "is_joined", lambda: True)
    monkeypatch.setattr(cli.cluster, "leave_after_error", lambda: left.append(True))

    def main():
        raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(OSError, match="Stale"):
        cli._guard(main)
    assert left == [True]
