"""What made a result: the command lines and the commits of its runs.

They are in a file beside `summary.json`, not in it: a study that goes on after an interruption,
with another command line or a later commit, ends with the same summary.
"""

import json
import logging
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from ntt_sparse.training.files import one_line, write_text

FILE = "provenance.json"
_HERE = Path(__file__).resolve()
_SECONDS = 10
_logger = logging.getLogger(__name__)


class Origin(NamedTuple):
    """One run of a study, or a part of one: what was called, and of which version.

    Attributes:
        command: The command line.
        version: Of the package.
        commit: Of the checkout, with `-changed` where files differed from it; empty outside one.
    """

    command: str
    version: str
    commit: str


def note(workdir: Path) -> None:
    """Adds this process to what made the results of a folder, unless it is the same again.

    A folder that cannot be written or a file that is damaged is a warning: results matter more.
    """
    path = workdir / FILE
    try:
        known = read(path)
    except ValueError as error:
        _logger.warning("%s; it is written anew", error)
        known = []
    if (here := origin()) not in known:
        runs = [each._asdict() for each in (*known, here)]
        try:
            write_text(path, json.dumps({"runs": runs}, indent=2) + "\n")
        except OSError as error:
            _logger.warning("%s cannot be written (%s)", path, error.strerror)


def read(path: Path) -> list[Origin]:
    """What a file of `note` holds; nothing if it is not there.

    Raises:
        ValueError: It is damaged; one line.
    """
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        found = [Origin(**{name: each[name] for name in Origin._fields}) for each in runs]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({one_line(error)})") from error
    if any(not isinstance(value, str) for each in found for value in each):
        raise ValueError(f"{path} holds something else than texts")
    return found


def origin() -> Origin:
    """What this process is."""
    return Origin(_command(), _version(), commit_of(_HERE))


def _command() -> str:
    # With -m, of which sys.argv has but a path.
    return shlex.join(["python", *sys.orig_argv[1:]])


def _version() -> str:
    try:
        return metadata.version("ntt_sparse")
    except metadata.PackageNotFoundError:
        return "not installed"


def commit_of(path: Path) -> str:
    """The commit of the checkout that a file belongs to; empty if there is none.

    A file that lies in a checkout of something else, as installed packages may, is of none.
    """
    folder = path.parent
    if _git(folder, "ls-files", "--error-unmatch", path.name) is None:
        return ""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return ""
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ":/*.py")
    return f"{commit}-changed" if changed else commit


def committed_with(path: Path) -> str:
    """The last commit that changed a file; empty where its history is not known.

    So it is of a file that is not in a checkout or differs from its commit, and in one whose
    history is cut off.
    """
    folder = path.parent
    if _git(folder, "rev-parse", "--is-shallow-repository") != "false":
        return ""
    if _git(folder, "status", "--porcelain", "--", path.name) != "":
        return ""
    return _git(folder, "log", "-1", "--format=%H", "--", path.name) or ""


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or `None` where it fails or is not there."""
    command: Sequence[str] = ("git", "-C", str(folder), *arguments)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
