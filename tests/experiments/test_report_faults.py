"""The report of what cannot be read, or written."""

import errno
import json
import os

import pytest
from summaries import pruned, table5a

from experiments.cli import UserError
from experiments.configs import dam_pruning
from experiments.report import report
from experiments.report_commands import plain
from experiments.report_gather import gather
from experiments.report_readings import READINGS
from experiments.report_short import END, START


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it is no JSON"),
        ("[1]", "it is no object of JSON"),
        ('{"config": NaN}', "it holds NaN"),
        ("{}", "it has no field 'config'"),
        ('{"config": {"name": "nothing"}}', "is of no study there is"),
        ('{"config": {"name": 3}}', "config.name is 3"),
        ('{"config": 3}', "a field is not what it should be"),
        ("[" * 100_000, "it is nested too deeply"),
        (b"\xff", "can't decode"),
        (f'{{"config": 1{"0" * 400}}}', "it holds 10000000000000000000..., a number beyond 1e+100"),
        (f'{{"config": -{"9" * 5000}}}', "a number beyond 1e+100"),
        ('{"config": -1e999}', "it holds -1e999, a number beyond"),
        ({}, "it has no field 'networks'"),
        ({"networks": []}, "it has no entries"),
        ({"networks": [3]}, "a field is not what it should be"),
        ({"networks": [pruned(0.1, [0.5], [1, 2])]}, "1 values stand for 2 seeds"),
        ({"networks": [pruned(0.1, [0.5], [1], parameters={"values": ["a"]})]}, "'a' is no finite"),
        ({"networks": [pruned([1], [0.5], [1])]}, "coefficient is [1]"),
        ({"networks": [pruned(0.1, [0.5], [1], target={})]}, "target is {}"),
        ({"networks": [pruned("\ud800", [0.5], [1])]}, "it holds half of a character"),
        ({"networks": [pruned(10**400, [0.5], [1])]}, "a number beyond"),
        # Sums of such, and their squares, are beyond what a float holds.
        ({"networks": [pruned(0.1, [0.5], [1], parameters={"values": [1.7e308]})]}, "1.7e+308, a"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_read_is_a_line(tmp_path, content, message):
    if isinstance(content, dict):
        config = plain(dam_pruning.get_config("table5a"))
        content = json.dumps({"config": config, **content})
    table5a(tmp_path / "good", (1, 2), [0.96, 0.97])
    (tmp_path / "bad").mkdir()
    path = tmp_path / "bad" / "summary.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    gathered = report(tmp_path)
    (line,) = gathered.problems
    assert line.startswith(f"{path}: ") and message in line and "\n" not in line
    assert len(gathered.runs) == 1
    assert "## Not read" in (tmp_path / "REPORT.md").read_text()


def test_a_summary_whose_numbers_overflow_is_a_line(tmp_path, monkeypatch):
    def overflow(summary, settings):
        raise OverflowError("int too large to convert to float")

    table5a(tmp_path / "a", (1,), [0.96])
    monkeypatch.setitem(READINGS, "dam_pruning", READINGS["dam_pruning"]._replace(rows=overflow))
    (line,) = gather(tmp_path).problems
    assert line == f"{tmp_path / 'a' / 'summary.json'}: int too large to convert to float"


def test_folders_and_pages_that_cannot_be_read_are_lines(tmp_path, monkeypatch):
    for name in ("a", "closed"):
        table5a(tmp_path / name, (1,), [0.96])
    for name in ("gone.md", "summary.json"):
        (tmp_path / name).symlink_to("nowhere")
    scandir = os.scandir

    def refuse(path):
        # Root, as whom tests may run, may search every folder.
        if os.fspath(path) == os.fspath(closed):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    closed = tmp_path / "closed"
    assert report(tmp_path).problems == [
        f"{closed}: it cannot be searched (Permission denied)",
        f"{tmp_path / 'summary.json'}: it cannot be read (No such file or directory)",
        f"{tmp_path / 'gone.md'}: it cannot be read (No such file or directory)",
    ]
    closed = tmp_path
    with pytest.raises(UserError, match=r"cannot be searched \(Permission denied\)\): mend that"):
        report(tmp_path)


def test_what_made_a_summary_is_no_folder(tmp_path):
    table5a(tmp_path / "a", (1,), [0.96])
    (tmp_path / "a" / "provenance.json").mkdir()
    (line,) = report(tmp_path).problems
    assert line.startswith(f"{tmp_path / 'a' / 'provenance.json'} cannot be read")


def test_what_cannot_be_written_leaves_all_as_it_was(tmp_path):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    table5a(results / "a", (1,), [0.96])
    # Nothing is written where the README has no markers.
    readme.write_text("no markers")
    with pytest.raises(UserError, match=r"README\.md: expected one line"):
        report(results, readme)
    assert [path.name for path in results.iterdir()] == ["a"]
    old = f"a\n{START}\nold\n{END}\nb\n"
    readme.write_text(old)
    (results / "report.html").mkdir()
    (results / "REPORT.md").write_text("old")
    with pytest.raises(UserError) as raised:
        report(results, readme)
    assert str(raised.value) == (
        f"{results / 'report.html'} cannot be written (Is a directory): "
        "mend that and run this again"
    )
    assert readme.read_text() == old and (results / "REPORT.md").read_text() == "old"
    assert sorted(path.name for path in results.iterdir()) == ["REPORT.md", "a", "report.html"]


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match=r"no summary\.json.*run a study first"):
        report(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        report(tmp_path / "nowhere")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match="it is no JSON"):
        report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
