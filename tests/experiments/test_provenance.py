"""What made a result: commands and commits, in and outside of checkouts."""

import json
import shutil
import subprocess

import pytest

from experiments import provenance
from experiments.cli import claim_workdir

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init")
    (folder / "code.py").write_text("1\n")
    (folder / "summary.json").write_text("{}\n")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    return folder


@needs_git
def test_the_commit_of_a_checkout(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert provenance.commit_of(checkout / "code.py") == head
    # Results are not code.
    (checkout / "summary.json").write_text("{ }\n")
    assert provenance.commit_of(checkout / "code.py") == head
    (checkout / "code.py").write_text("2\n")
    assert provenance.commit_of(checkout / "code.py") == f"{head}-changed"
    # A package that is installed inside a checkout of something else.
    (checkout / "installed.py").write_text("3\n")
    assert provenance.commit_of(checkout / "installed.py") == ""


@needs_git
def test_the_commit_of_a_file(checkout, tmp_path):
    head = git(checkout, "rev-parse", "HEAD")
    (checkout / "code.py").write_text("2\n")
    git(checkout, "commit", "-a", "-m", "second")
    assert provenance.committed_with(checkout / "summary.json") == head
    (checkout / "summary.json").write_text("{ }\n")
    assert provenance.committed_with(checkout / "summary.json") == ""
    git(checkout, "checkout", "summary.json")
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "--depth=1", f"file://{checkout}", str(shallow))
    assert provenance.committed_with(shallow / "summary.json") == ""


def test_outside_a_checkout_and_without_git(tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text("1\n")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit_of(tmp_path / "code.py") == ""
    assert provenance.committed_with(tmp_path / "code.py") == ""
    monkeypatch.setenv("PATH", "")
    here = provenance.origin()
    assert here.commit == "" and here.version and here.command.startswith("python ")


def test_a_work_directory_collects_what_made_it(tmp_path, monkeypatch, caplog):
    workdir = tmp_path / "work"
    for version in ("1", "1", "2"):
        monkeypatch.setattr(provenance, "origin", lambda v=version: provenance.Origin("c", v, ""))
        with claim_workdir(workdir, {"a": 1}):
            pass
    found = provenance.read(workdir / provenance.FILE)
    assert [each.version for each in found] == ["1", "2"]
    (workdir / provenance.FILE).write_text("damaged")
    with claim_workdir(workdir, {"a": 1}):
        pass
    assert [each.version for each in provenance.read(workdir / provenance.FILE)] == ["2"]


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": 3}', '{"runs": [{}]}'])
def test_damaged_files_are_one_line(tmp_path, text):
    path = tmp_path / provenance.FILE
    path.write_text(text)
    with pytest.raises(ValueError, match="cannot be read") as raised:
        provenance.read(path)
    assert "\n" not in str(raised.value)
    wrong = {"runs": [{"command": 1, "version": "", "commit": ""}]}
    path.write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="something else than texts"):
        provenance.read(path)
    assert provenance.read(tmp_path / "missing.json") == []
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match=r"folder\.json cannot be read"):
        provenance.read(tmp_path / "folder.json")
