"""The command line of every study: flags, one-line errors, exit codes."""

import difflib
import errno
import fcntl
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from experiments import cluster, provenance
from experiments.compilation import keep_programs
from ntt_sparse.training.files import one_line, write_text

_logger = logging.getLogger(__name__)

# Of a disk that is full, read only, of somebody else or broken: not of a mistake in a program.
_OF_DISKS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO")
    if hasattr(errno, name)
}

# The flags belong to the module that calls `start`, whose --help lists them.
flags.disclaim_key_flags()


class UserError(Exception):
    """Something the user asked for cannot be done; the message is one complete line."""


class BusyError(UserError):
    """Another process works in the work directory."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors of checking a user's input into a `UserError`.

    To be put around preparation only, so that a bug while training keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error


def _find_devices() -> None:
    """Starts JAX, which fails in many ways where what `JAX_PLATFORMS` says is not there."""
    import jax

    try:
        jax.devices()
    except Exception as error:
        asked = os.environ.get("JAX_PLATFORMS")
        said = one_line(error).rstrip(": ")
        raise UserError(
            f"JAX finds no device (JAX_PLATFORMS={asked!r}; {said}): without that "
            "variable it takes the best that there is; for a GPU, install jax[cuda13]"
        ) from error


def start(
    name: str, configs: ModuleType, *, doc: str | None, study: str = "", distributed: bool = False
) -> None:
    """The whole command line of a study: defines and parses its flags, runs it and exits.

    Exit codes: 0 done, 1 failed, 2 the command line is wrong, 3 another process works in the work
    directory, 130 interrupted.

    Args:
        name: Of the command.
        configs: The module of its configs. `get_config()` gives the default; all configs of
            a study have the same fields.
        doc: What `--help` says, before the docstring of the configs.
        study: Of which `experiments.STUDY_study` holds `run(config, workdir, data_dir=)`, by
            default the name; it is imported late, so that `--help` and errors of flags come at
            once.
        distributed: Whether several processes can run it together.
    """
    fields = set(_flatten(configs.get_config().to_dict()))
    _refuse_unknown_fields(fields)
    config = config_flags.DEFINE_config_file(
        "config",
        str(configs.__file__),
        "Settings, FILE.py:NAME; fields are set by --config.FIELD=VALUE.",
    )
    # It is defined in another module.
    flags.declare_key_flag("config")
    workdir = flags.DEFINE_string(
        "workdir", None, f"Where results and checkpoints go; by default runs/{name}-CONFIG."
    )
    data_dir = flags.DEFINE_string(
        "data_dir",
        None,
        "Prepared TensorFlow Datasets, by default $TFDS_DATA_DIR; files of graphs or ratings.",
    )

    together = flags.DEFINE_bool(
        "distributed",
        False,
        "Runs one study on the devices of all processes of a Slurm, Open MPI or Kubernetes job.",
    )

    def main():
        if together.value and not distributed:
            raise UserError(f"{name} runs in one process: leave out --distributed")
        # A file that cannot be loaded is an error when its values are first asked for.
        with user_errors():
            chosen = config.value
            missing = fields - set(_flatten(chosen.to_dict()))
            if missing:
                raise ValueError(
                    f"the config has no {', '.join(sorted(missing))}: it is that of another study"
                )
        keep_programs()
        if together.value:
            with user_errors():
                cluster.join()
        _find_devices()
        # What the environment says is wrong before any work; imported here, as it imports this.
        importlib.import_module("experiments.waves").memory_limit()
        module = importlib.import_module(f"experiments.{study or name}_study")
        # A name is one folder, whatever is in it.
        folder = re.sub(r"[^\w.-]", "-", f"{name}-{chosen.name}")
        written = Path(workdir.value or f"runs/{folder}")
        module.run(chosen, written, data_dir=data_dir.value)
        if not _is_first():
            return
        print(f"\n{(written / 'report.md').read_text()}")
        for made in ("networks", "figures", "summary.json"):
            print(f"{made}: {written / made}")

    launch(main, doc=f"{doc}\n{configs.__doc__}")


def launch(main: Callable[[], None], *, doc: str | None) -> None:
    """Parses the flags, runs a command with one-line errors, and exits.

    Args:
        main: What runs when all flags have their values.
        doc: What `--help` says.
    """
    sys.modules["__main__"].__doc__ = doc
    app.run(lambda _: _guard(main), flags_parser=_parse_flags)


def _refuse_unknown_fields(known: Collection[str]) -> None:
    # An unknown field would fail in the middle of defining the flag.
    for field in (arg.split("=")[0].lstrip("-") for arg in sys.argv):
        name = field.removeprefix("config.")
        if field.startswith("config.") and name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = (
                f": did you mean {' or '.join(close)}?"
                if close
                else f", only {', '.join(sorted(known))}"
            )
            _exit(2, f"error: the config has no field {name!r}{hint}")


def _guard(main: Callable[[], None]) -> None:
    from ntt_sparse.data.stream import StreamError
    from ntt_sparse.training.checkpoint import CheckpointError
    from ntt_sparse.training.loop import DivergenceError

    _log_to_stderr()
    try:
        main()
    except (UserError, CheckpointError, DivergenceError, StreamError) as error:
        logging.getLogger("experiments").debug("the error came from here", exc_info=True)
        _exit(3 if isinstance(error, BusyError) else 1, f"error: {error}")
    except OSError as error:
        if error.errno not in _OF_DISKS:
            if cluster.is_joined():
                cluster.leave_after_error()
            raise
        _exit(
            1,
            f"error: {error.strerror}: {error.filename or 'a file'}; when that is mended, the same "
            "command goes on from the last checkpoint",
        )
    except KeyboardInterrupt as error:
        _exit(130, f"interrupted: {error}" if str(error) else "interrupted")
    except Exception:
        if not cluster.is_joined():
            raise
        cluster.leave_after_error()


def _is_first() -> bool:
    from ntt_sparse.training.processes import is_first

    return is_first()


def _log_to_stderr() -> None:
    """Shows this project's own messages, and of the libraries' only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    # Orbax abandons tasks when a checkpoint cannot be read, and repeats an error of writing in each
    # of its threads; we say what is wrong ourselves.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    absl_logging.get_absl_logger().addFilter(
        lambda record: "orbax" not in Path(record.pathname).parts
    )
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name in ("ntt_sparse", "experiments"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _exit(code: int, line: str) -> NoReturn:
    print(f"\n{line}", file=sys.stderr)
    if cluster.is_joined():
        cluster.leave(code)
    sys.exit(code)


def _parse_flags(argv: list[str]) -> list[str]:
    argv = _with_installed_configs(argv)
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, ValueError, OSError, KeyError, TypeError) as error:
        _exit(2, f"error: {_cause(str(error))}; see --help")
    except SystemExit:
        # After --help, for which absl exits with 1.
        sys.exit(0)
    if len(rest) > 1:
        _exit(2, f"error: unexpected arguments {rest[1:]}; flags start with --, see --help")
    return rest


def _with_installed_configs(argv: list[str]) -> list[str]:
    """Finds `experiments/configs/NAME.py` beside this module where there is no checkout."""
    root = Path(__file__).parents[1]

    def found(argument: str, before: str) -> str:
        flag = re.match(r"--?config=", argument)
        if flag is None and before not in ("--config", "-config"):
            return argument
        path, colon, name = argument[flag.end() if flag else 0 :].partition(":")
        if Path(path).is_file():
            return argument
        if not re.fullmatch(r"experiments/configs/\w+\.py", path) or not (root / path).is_file():
            _exit(2, f"error: there is no config file {path!r}: expected FILE.py:NAME; see --help")
        return f"{flag[0] if flag else ''}{root / path}{colon}{name}"

    return [argv[0], *map(found, argv[1:], argv)]


def _cause(message: str) -> str:
    """One line: the exception inside a report of a config file that failed to load, or all."""
    inner = re.findall(r"^\s*\w*Error: (.+)$", message, re.M)
    return inner[-1] if inner else " ".join(message.split())


@contextmanager
def writing_into(workdir: Path) -> Iterator[None]:
    """Says that a work directory cannot be written, a `UserError`, where the block finds so."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"work directory {workdir} cannot be written ({error.strerror}): "
            "choose a folder of your own with --workdir"
        ) from error


@contextmanager
def claim_workdir(workdir: str | Path, config: dict[str, Any]) -> Iterator[Path]:
    """Holds a work directory for this config, alone, while the block runs.

    The first of several processes holds it for all; to the others it is the same folder.

    Yields:
        The directory; it holds `config.json` and `provenance.json`.

    Raises:
        BusyError: Another process works in it.
        UserError: It belongs to another config, or cannot be written. Nothing is changed.
    """
    from ntt_sparse.training.processes import is_first, meet

    workdir = Path(workdir)
    if not is_first():
        meet("the work directory is claimed")
        yield workdir
        return
    with writing_into(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    with lock:
        try:
            # Released by the system when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"another process works in {workdir}: wait for it, or choose another --workdir"
            ) from error
        except OSError as error:
            _logger.warning("%s cannot be locked (%s): run one process there", workdir, error)
        with user_errors():
            _check_owner(workdir, json.loads(json.dumps(config)))
        provenance.note(workdir)
        meet("the work directory is claimed")
        yield workdir


def _check_owner(workdir: Path, config: dict[str, Any]) -> None:
    """Finds `config`, which went through JSON, in config.json, or writes it there."""
    path = workdir / "config.json"
    if not path.exists():
        # The latter is left by a process that was killed as it wrote the settings.
        own = (".lock", f"{path.name}.tmp")
        foreign = sorted(entry.name for entry in workdir.iterdir() if entry.name not in own)
        if foreign:
            raise ValueError(
                f"work directory {workdir} holds {', '.join(foreign[:5])} but no config.json: "
                "choose another --workdir or an empty folder"
            )
        write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
        return
    try:
        existing = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): choose another --workdir") from error
    if existing != config:
        old, new = _flatten(existing), _flatten(config)
        differing = [
            f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        raise ValueError(
            f"work directory {workdir} belongs to another config ({'; '.join(differing)}): "
            "choose another --workdir or the same settings"
        )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {k: v for key, sub in tree.items() for k, v in _flatten(sub, f"{prefix}{key}.").items()}
