"""Runs the commands of README.md, in their order, each for seconds to minutes.

    python benchmarks/readme.py --folder /tmp/readme

Those of `results/README.md` too; what installs, and what stands inside of a sentence, is left out.
Studies run with their `smoke` option: settings that it shrinks are its own, all others are those of
the command. Benchmarks take one turn. `TFDS_DATA_DIR`, `PLANETOID_DIR` and `MONTI_DIR` say where
the data is; what is not run is named. One line for each command, with its seconds; the exit code is
1 where one failed. A study that has ended in this folder is not trained again.
"""

import argparse
import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# Bash expands loops, functions and lines that go on; what would run says what it was given, and
# what it finds in the environment of what commands set there.
_STUBS = {
    "python": 'printf "%s\\0" "${NTT_SPARSE_MEMORY-}" "$@" >> "$LOG"; printf "\\n" >> "$LOG"',
    "taskset": 'shift 2; exec "$@"',
    "pip": "",
    "mount": "",
}
HOME = "/home/somebody"
# Of a study's settings those that say how long it takes, whether its `smoke` has them or not.
_SIZES = {"epochs", "max_steps", "record_every", "decay_epochs", "ensemble"}
# By a word of the command.
_NOT_RUN = {
    "imagenet_random": "no such folder of images",
    "sphinx": "tests/test_docs.py",
    "--readme=README.md": "tests/experiments/test_report.py",
}


def blocks() -> list[str]:
    """The blocks of shell commands, without those of an environment of their own, which CI runs."""
    pages = (ROOT / "README.md", ROOT / "results" / "README.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    return ["\n".join(line for line in b.splitlines() if ".venv/" not in line) for b in found]


class Command(NamedTuple):
    """A `python` of a block.

    Attributes:
        memory: That its environment gives it for waves; empty where it says nothing.
        arguments: Of its command line.
    """

    memory: str
    arguments: list[str]


def commands_of(block: str) -> list[Command]:
    """Every `python` in a block."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for stub, body in _STUBS.items():
            (folder / stub).write_text(f"#!/bin/bash\n{body}\n")
            (folder / stub).chmod(0o755)
        log = folder / "log"
        log.touch()
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}", "HOME": HOME, "LOG": str(log),
        }  # fmt: skip
        subprocess.run(["bash", "-euo", "pipefail", "-c", block], env=environment, check=True)
        lines = [line.split("\0")[:-1] for line in log.read_text().splitlines()]
        return [Command(memory, arguments) for memory, *arguments in lines]


def config_of(study: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The name of a command's settings, `None` without any, and the other arguments."""
    if not (ROOT / "experiments" / "configs" / f"{study}.py").exists() or "--help" in arguments:
        return None, arguments
    configs = importlib.import_module(f"experiments.configs.{study}")
    (default,) = configs.get_config.__defaults__
    names = [a.partition(":")[2] for a in arguments if a.startswith("--config=")]
    return (names or [default])[0], [a for a in arguments if not a.startswith("--config=")]


def small_study(arguments: list[str]) -> list[str]:
    """The command of a study with `smoke`, and without settings which that shrinks."""
    study = arguments[1].removeprefix("experiments.")
    name, rest = config_of(study, arguments[2:])
    if name is None:
        return arguments
    shrunk = set()
    if "smoke" not in name.split(","):
        get_config = importlib.import_module(f"experiments.configs.{study}").get_config
        whole, little = flat(get_config(name)), flat(get_config(f"{name},smoke"))
        shrunk = {field for field, value in whole.items() if little[field] != value}
        name += ",smoke"

    def stays(argument):
        field = argument.partition("=")[0].removeprefix("--config.")
        return field not in shrunk and field.rpartition(".")[2] not in _SIZES

    config = f"--config=experiments/configs/{study}.py:{name}"
    return [*arguments[:2], config, *filter(stays, rest)]


def flat(config) -> dict:
    """`{"field.of.base": value}`."""
    found = {}
    for key, value in config.items():
        inner = flat(value) if hasattr(value, "items") else {"": value}
        found |= {f"{key}.{rest}".rstrip("."): leaf for rest, leaf in inner.items()}
    return found


def small_benchmark(arguments: list[str]) -> list[str]:
    """The command of a benchmark with one turn."""
    path, *rest = arguments
    rest = [str(ROOT / path), *rest]
    if "--rounds" in rest:
        rest[rest.index("--rounds") + 1] = "1"
    elif '"--rounds"' in (ROOT / path).read_text() and "--memory" not in rest:
        rest += ["--rounds", "1"]
    return rest


def with_data(arguments: list[str]) -> list[str]:
    """The command with the folders of data that the environment has.

    Raises:
        LookupError: There is none.
    """
    line = "\0".join(arguments)
    graphs = "experiments.dam_graph" in arguments or arguments[0].endswith("/graphs.py")
    places = {
        f"{HOME}/tensorflow_datasets": "TFDS_DATA_DIR",
        f"{HOME}/data": "PLANETOID_DIR" if graphs else "MONTI_DIR",
    }
    for place, variable in places.items():
        if place in line:
            if not os.environ.get(variable):
                raise LookupError(f"{variable} is not set")
            line = line.replace(place, str(Path(os.environ[variable]).absolute()))
    return line.split("\0")


def small(arguments: list[str]) -> list[str]:
    """What runs in the place of a command.

    Raises:
        LookupError: It is not run, and why.
    """
    for word, reason in _NOT_RUN.items():
        if any(word in argument for argument in arguments):
            raise LookupError(reason)
    if arguments[0] == "-m":
        return with_data(small_study(arguments))
    return with_data(small_benchmark(arguments))


def run(command: list[str], folder: Path, memory: str, seconds: float) -> tuple[str, str]:
    """Runs a command with the code of this checkout, whatever is installed.

    Returns:
        What became of it, and the end of what it printed; empty where all went well.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if memory:
        environment["NTT_SPARSE_MEMORY"] = memory
    with tempfile.TemporaryFile() as printed:
        # In a session of its own, so that what it starts ends with it.
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=printed,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        word = ""
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            word = f"FAILED (more than {seconds:.0f} s)"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if not (word or process.wait()):
            return "ok", ""
        printed.seek(0)
        said = printed.read().decode(errors="replace")[-2000:]
        return word or f"FAILED ({process.returncode})", said


def main(argv: list[str] | None = None) -> None:
    """Runs the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the studies write")
    parser.add_argument(
        "--only", default="", help="commands with this in them; some need what others have written"
    )
    parser.add_argument(
        "--seconds", type=float, default=3600, help="after which a command has failed"
    )
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    seen, failed = set(), 0
    for memory, arguments in (each for block in blocks() for each in commands_of(block)):
        line = " ".join(arguments)
        if line in seen or options.only not in line:
            continue
        seen.add(line)
        try:
            command = small(arguments)
        except LookupError as error:
            print(f"not run ({error}): python {line}", flush=True)
            continue
        begin = time.monotonic()
        word, said = run(command, options.folder, memory, options.seconds)
        took = time.monotonic() - begin
        print(f"{word} {took:.0f} s: python {' '.join(command)}\n{said}".rstrip(), flush=True)
        failed += word != "ok"
    if not seen:
        parser.error(f"no command has {options.only!r} in it")
    print(f"{len(seen)} commands, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
