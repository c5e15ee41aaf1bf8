"""Every command of the README: its flags parse, and the study accepts its settings."""

import argparse
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

# How ml_collections reads a file of settings.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)

# Bash expands loops, functions and lines that go on; what would run says what it was given.
_STUBS = {
    "python": 'printf "%s\\0" "$@" >> "$LOG"; printf "\\n" >> "$LOG"',
    "taskset": 'shift 2; exec "$@"',
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "pip": "",
    "mount": "",
}


def commands_of(folder: Path, block: str) -> list[list[str]]:
    """The arguments of every `python` in a block."""
    for name, body in _STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    log = folder / "log"
    log.touch()
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}", "HOME": "/home/somebody", "LOG": str(log),
        "SCRATCH": "/scratch",
    }  # fmt: skip
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], env=environment, check=True)
    return [line.split("\0")[:-1] for line in log.read_text().splitlines()]


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
def test_the_commands_of_a_block_are_accepted(tmp_path, monkeypatch, load_benchmark, number):
    # Those of the environment of their own are what CI runs.
    block = "\n".join(line for line in BLOCKS[number].splitlines() if ".venv/" not in line)
    monkeypatch.chdir(ROOT)
    for arguments in commands_of(tmp_path, block):
        with monkeypatch.context() as patch:
            accept(patch, load_benchmark, arguments)


def test_what_is_refused_is_seen(monkeypatch, load_benchmark, tmp_path):
    monkeypatch.chdir(ROOT)
    found = commands_of(
        tmp_path, 'for m in a b; do python -m experiments.ntt "--x=$m c" \\\n -y; done'
    )
    assert found == [["-m", "experiments.ntt", f"--x={m} c", "-y"] for m in "ab"]
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
