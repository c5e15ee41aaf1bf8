"""Every command of the README: its flags parse, and the study accepts its settings."""

import argparse
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

# How ml_collections reads a file of settings.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
readme = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(readme)
BLOCKS = readme.blocks()


def accept(monkeypatch, load_benchmark, arguments: list[str]) -> None:
    """Raises where a command would be refused before work starts."""
    if arguments[0] != "-m":
        parse_benchmark(monkeypatch, load_benchmark, arguments)
    elif arguments[1].startswith("experiments."):
        study = arguments[1].removeprefix("experiments.")
        importlib.import_module(arguments[1])
        source = (ROOT / "experiments" / f"{study}.py").read_text()
        source += (ROOT / "experiments" / "cli.py").read_text()
        ours = [argument for argument in arguments[2:] if argument.startswith("--config")]
        for argument in set(arguments[2:]) - set(ours) - {"--help"}:
            name = argument.removeprefix("--").split("=")[0]
            assert re.search(rf'DEFINE_\w+\(\s*"{name}"', source), argument
        if (ROOT / "experiments" / "configs" / f"{study}.py").exists():
            check_study(monkeypatch, study, ours)


def check_study(monkeypatch, study: str, arguments: list[str]) -> None:
    """Reads the settings as the command line does, which looks for fields there."""
    monkeypatch.setattr(sys, "argv", [study, *arguments])
    values = flags.FlagValues()
    default = str(ROOT / "experiments" / "configs" / f"{study}.py")
    config = config_flags.DEFINE_config_file("config", default, flag_values=values)
    values(sys.argv)
    # One objective of sparse training.
    checks = "sparse_training" if study == "cka_sr" else study
    importlib.import_module(f"experiments.{checks}_checks").check_config(config.value)


class _Parsed(Exception):
    pass


def parse_benchmark(monkeypatch, load_benchmark, arguments: list[str]) -> None:
    """Lets a benchmark read its flags and stops it there."""
    path, *rest = arguments
    assert (ROOT / path).is_file(), path
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        raise _Parsed(parse(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(_Parsed):
        load_benchmark(Path(path).stem).main(rest)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_commands_of_a_block_are_accepted(monkeypatch, load_benchmark, number):
    monkeypatch.chdir(ROOT)
    for _, arguments in readme.commands_of(BLOCKS[number]):
        with monkeypatch.context() as patch:
            accept(patch, load_benchmark, arguments)


def test_no_two_commands_share_a_work_directory():
    """Which the second would refuse, unless it is the same command."""
    settings = {}
    for block in BLOCKS:
        for _, command in readme.commands_of(block):
            study = command[1].removeprefix("experiments.") if command[0] == "-m" else ""
            config, arguments = readme.config_of(study, command[2:])
            for workdir in (a for a in arguments if a.startswith("--workdir=")):
                mine = {study, config, *arguments}
                assert settings.setdefault(workdir, mine) == mine, workdir
    assert len(settings) > 60


def test_what_is_run_small_is_accepted_too(monkeypatch, load_benchmark):
    monkeypatch.chdir(ROOT)
    for name in ("TFDS_DATA_DIR", "PLANETOID_DIR", "MONTI_DIR"):
        monkeypatch.setenv(name, f"{readme.HOME}/of/{name}")
    run = 0
    for block in BLOCKS:
        for _, arguments in readme.commands_of(block):
            try:
                command = readme.small(arguments)
            except LookupError:
                continue
            run += 1
            with monkeypatch.context() as patch:
                accept(patch, load_benchmark, command)
            if any(argument.startswith("--config=") for argument in command):
                assert any(a.startswith("--config=") and a.endswith(",smoke") for a in command)
                assert not any("max_steps" in argument for argument in command)
    assert run > 100
    monkeypatch.delenv("MONTI_DIR")
    with pytest.raises(LookupError, match="MONTI_DIR"):
        readme.small(["benchmarks/subgraphs.py", f"--data_dir={readme.HOME}/data"])


def test_what_is_refused_is_seen(monkeypatch, load_benchmark):
    monkeypatch.chdir(ROOT)
    found = readme.commands_of(
        'for m in 1 2; do NTT_SPARSE_MEMORY=$m python -m experiments.ntt "--x=$m c" \\\n -y; done'
    )
    assert found == [(m, ["-m", "experiments.ntt", f"--x={m} c", "-y"]) for m in "12"]
    assert readme.commands_of("python a.py") == [("", ["a.py"])]
    for arguments, error in (
        (["--config=experiments/configs/ntt.py:none"], flags.IllegalFlagValueError),
        (["--config.density=2"], ValueError),
        (["--config.densities=0.1"], AttributeError),
        (["--workdirs=a"], AssertionError),
    ):
        with pytest.raises(error):
            accept(monkeypatch, load_benchmark, ["-m", "experiments.ntt", *arguments])
    with pytest.raises(SystemExit):
        accept(monkeypatch, load_benchmark, ["benchmarks/cka.py", "--nothing"])


def test_a_command_that_fails_or_does_not_end_says_so(tmp_path):
    program = tmp_path / "a.py"
    program.write_text("import os\nprint(os.environ['NTT_SPARSE_MEMORY'])")
    assert readme.run(["a.py"], tmp_path, "12", 60) == ("ok", "")
    program.write_text("import sys\nsys.exit('no')")
    assert readme.run(["a.py"], tmp_path, "", 60) == ("FAILED (1)", "no\n")
    program.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    word, said = readme.run(["a.py"], tmp_path, "", 3)
    assert word == "FAILED (more than 3 s)"
    # Nothing is left of it: whoever was killed may not be reaped yet.
    state = Path(f"/proc/{int(said)}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
