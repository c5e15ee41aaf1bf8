"""Studies side by side: what is read, corrected and refused."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sparse_training_problems import get_config

from experiments import sparse_training_study as study
from experiments.cli import UserError
from experiments.sparse_training_compare import compare
from experiments.statistics import paired, spread

SHARED = {"data": {"name": "digits"}, "model": {"name": "a"}, "evaluated": 0}
NONE = [0.5, 0.6, 0.7]
# By method, what CKA-SR reaches with the same seeds.
REACHED = {"snip": [0.52, 0.63, 0.71], "rigl": [0.49, 0.61, 0.74]}


def entry(name, values, empty):
    row = {
        "regulariser": name, "coefficient": 0.0 if name == "none" else 0.1, "density": 0.1,
        "seeds": [1, 2, 3], "test_accuracy_last": spread(values), "empty_layers": empty,
    }  # fmt: skip
    if name != "none":
        for compared in ("last", "bits"):
            row[f"less_baseline_{compared}"] = {**paired(values, NONE), "p_value_holm": 0.0}
    return row


@pytest.fixture
def runs(tmp_path):
    folders = []
    for method, values in REACHED.items():
        folder = tmp_path / f"run_{method}"
        folder.mkdir()
        config = {**SHARED, "seeds": [1, 2, 3], "method": method}
        empty = {"Dense_0/kernel": 2} if method == "snip" else {}
        rows = [entry("none", NONE, empty), entry("cka_sr", values, {})]
        summary = {"config": config, "supervised": rows}
        (folder / "summary.json").write_text(json.dumps(summary))
        folders.append(folder)
    return folders


def test_tables(runs, tmp_path):
    compared = compare(runs, tmp_path / "compared")
    assert list(compared["methods"]) == ["snip", "rigl"]
    # Folders that tell them apart where methods do not, and paths where folders do not.
    again = runs[0].parent / "again" / runs[0].name
    shutil.copytree(runs[0], again)
    twice = compare([runs[0], again], tmp_path / "twice")["methods"]
    assert list(twice) == [str(runs[0]), str(again)]
    named = compare([again, again.parent.parent / runs[1].name, runs[0]], tmp_path / "three")
    assert len(named["methods"]) == 3
    p = {m: paired(values, NONE)["p_value"] for m, values in REACHED.items()}
    assert p["snip"] < p["rigl"]
    corrected = {m: max(2 * p["snip"], p["rigl"]) if m == "rigl" else 2 * p["snip"] for m in p}
    for method, rows in compared["methods"].items():
        for name in ("less_baseline_last", "less_baseline_bits"):
            assert rows[1][name]["p_value_holm"] == pytest.approx(corrected[method])
    report = (tmp_path / "compared" / "report.md").read_text()
    assert "| snip | 60.00 ± 10.00* |" in report and "| rigl | 60.00 ± 10.00 |" in report
    assert f"| snip | +2.00 ({corrected['snip']:.2g}) |" in report
    assert json.loads((tmp_path / "compared" / "summary.json").read_text()) == compared
    names = {path.name for path in (tmp_path / "compared" / "figures").iterdir()}
    assert {"accuracy_against_density.png", "less_baseline_against_density.png"} <= names


@pytest.mark.slow
def test_studies_themselves_on_the_command_line(tmp_path):
    """Of the two methods that differ least: their studies are what is read."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, density in zip(folders, ((0.3,), (0.3, 0.1)), strict=True):
        fields = {"seeds": (1,), "supervised.max_steps": 4, "supervised.record_every": 4}
        config = get_config("mnist_random", density=density, coefficients=(0.1, 0.2), **fields)
        study.run(config, folder)
    command = [
        sys.executable, "-m", "experiments.sparse_training_compare",
        f"--runs={','.join(map(str, folders))}", f"--workdir={tmp_path / 'out'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path.cwd(), check=True)
    assert "| a | " in done.stdout and "CKA-SR, 0.2:" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("| a |"))
    assert line.endswith("|  |"), "of a density that was not run there is nothing"
    command[3] = "--runs=nowhere,there"
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "nowhere/summary.json is not there" in failed.stderr.strip().splitlines()[-1]


def test_what_cannot_be_compared(runs, tmp_path):
    with pytest.raises(UserError, match="names 1 studies, expected two or more"):
        compare(runs[:1], tmp_path / "out")
    with pytest.raises(UserError, match="run_snip more than once"):
        compare([runs[0], runs[0]], tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out cannot be written \(Not a directory\): choose"):
        compare(runs, tmp_path / "file" / "out")
    with pytest.raises(UserError, match="run_rigl, a study that is compared: expected another"):
        compare(runs, runs[0].parent / "out" / ".." / runs[1].name)
    path = runs[1] / "summary.json"
    good = json.loads(path.read_text())
    for text, message in (
        (json.dumps({**good, "config": {**good["config"], "seeds": [1, 2]}}), "config.seeds"),
        (json.dumps({**good, "config": {**good["config"], "evaluated": 9}}), "config.evaluated, 9"),
        (json.dumps({**good, "supervised": [{"density": 0.1}]}), "is of another study"),
        (json.dumps({"networks": []}), "cannot be read"),
        (json.dumps({**good, "config": {"method": "lth"}}), "is of another study"),
        ("{", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            compare(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("index", "field", "value", "message"),
    [
        (1, "less_baseline_last", 3, "less_baseline_last is 3, expected a comparison"),
        (1, "less_baseline_last", {}, "less_baseline_last is {}, expected a comparison"),
        (1, "less_baseline_last", {**paired([1, 3], [0, 0]), "p_value": 2}, "p_value in"),
        (1, "less_baseline_last", {**paired([1, 3], [0, 0]), "low": 9}, "low <= mean <= high"),
        (1, "less_baseline_best_validation", None, "less_baseline_best_validation is None, "),
        (0, "density", "x", "density is 'x', expected a fraction in"),
        (0, "density", 0, "density is 0, expected"),
        (1, "regulariser", None, "regulariser is None, expected one of none, cka_sr, "),
        (1, "regulariser", [], r"regulariser is \[\], expected one of"),
        (1, "coefficient", {}, "coefficient is {}, expected a number or null"),
        (0, "test_accuracy_last", {"mean": "x" * 99}, "test_accuracy_last is .{60}[.]{3}, exp"),
        (0, "test_accuracy_last", {"mean": 1, "std": True, "values": []}, "expected a spread"),
        (0, "test_accuracy_last", {"mean": 1, "std": -1, "values": []}, "expected a spread"),
        (0, "empty_layers", 1, "empty_layers is 1, expected numbers by layer"),
        (0, "seeds", math.nan, "it holds NaN"),
        (0, "kept", 10**400, "a number beyond"),
    ],
)
def test_a_damaged_entry_is_one_line(runs, tmp_path, index, field, value, message):
    path = runs[1] / "summary.json"
    summary = json.loads(path.read_text())
    summary["supervised"][index][field] = value
    refused(runs, tmp_path / "out", json.dumps(summary), message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", 3, "config.method is 3, expected a name"),
        ("seeds", 3, "config.seeds is 3, expected a list"),
    ],
)
def test_damaged_settings_are_one_line(runs, tmp_path, field, value, message):
    summary = json.loads((runs[1] / "summary.json").read_text())
    summary["config"][field] = value
    refused(runs, tmp_path / "out", json.dumps(summary), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ("3", "it is no object of JSON"),
        ('{"supervised": [3], "config": {"method": "lth", "seeds": [1]}}', "cannot be read"),
    ],
    ids=lambda text: text[:20],
)
def test_a_summary_that_is_no_such_thing_is_one_line(runs, tmp_path, text, message):
    refused(runs, tmp_path / "out", text, message)


def refused(runs, workdir, text, message):
    path = runs[1] / "summary.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        compare(runs, workdir)
    line = str(raised.value)
    assert str(path) in line and "\n" not in line and len(line) < 500
    assert not workdir.exists()
