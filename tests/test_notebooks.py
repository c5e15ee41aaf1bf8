"""Notebooks: those of Jupyter say what their scripts say, and the scripts run."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def test_there_are_all_of_them():
    assert [path.stem[0] for path in SCRIPTS] == ["1", "2", "3", "4"]
    assert {path.stem for path in SCRIPTS} == {path.stem for path in FOLDER.glob("*.ipynb")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_is_that_of_the_script(script):
    """As `jupytext --to ipynb notebooks/*.py` makes it, without outputs."""
    jupytext = pytest.importorskip("jupytext")
    expected = jupytext.read(script, fmt="py:percent")
    found = jupytext.read(script.with_suffix(".ipynb"))
    cells = [[(c.cell_type, c.source) for c in book.cells] for book in (expected, found)]
    assert cells[0] == cells[1], "run: jupytext --to ipynb notebooks/*.py"
    assert not any(cell.get("outputs") for cell in found.cells)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_script_runs(script, capsys):
    """Of its steps only a few, as most of the time of a test is compilation anyway."""
    source, count = re.subn(r"(?m)^STEPS = \d+$", "STEPS = 6", script.read_text())
    assert count == (not script.stem.startswith("4"))
    names = {"__name__": "notebook"}
    exec(compile(source, str(script), "exec"), names)
    plt.close("all")
    printed = capsys.readouterr().out
    assert "nan" not in printed
    if script.stem.startswith("1"):
        assert set(names["accuracies"]) >= {"NTT", "SNIP", "random"}
    if script.stem.startswith("2"):
        assert {matrix.shape for matrix in names["matrices"].values()} == {(6, 6)}
    if script.stem.startswith("3"):
        assert float(abs(names["before"] - names["after"]).max()) < 1e-4
    if script.stem.startswith("4"):
        assert printed.count("CKA-SR:") == 2
