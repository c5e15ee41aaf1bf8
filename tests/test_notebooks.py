"""Notebooks: those of Jupyter say what their scripts say, and the scripts run."""

import importlib
import json
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))


@pytest.fixture
def make(monkeypatch):
    """The script that makes notebooks of scripts."""
    pytest.importorskip("jupytext")
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("make")


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the script reads and writes, that says where the repository is."""
    shutil.copytree(FOLDER, tmp_path / "notebooks", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    def address(url):
        text = re.sub(r"\[project\.urls\]\n(.+\n)*", "", (ROOT / "pyproject.toml").read_text())
        urls = f'[project.urls]\nRepository = "{url}"\n' if url else ""
        (tmp_path / "pyproject.toml").write_text(text + urls)
        return tmp_path

    return address


def written(root):
    """All that the script writes, by name."""
    paths = [root / "README.md", *(root / "notebooks").glob("*.ipynb")]
    return {path.name: path.read_text() for path in paths}


def test_there_are_all_of_them():
    assert [path.stem[0] for path in SCRIPTS] == ["1", "2", "3", "4"]
    assert {path.stem for path in SCRIPTS} == {path.stem for path in FOLDER.glob("*.ipynb")}


def test_what_is_committed_is_what_is_made(make, checkout):
    root = checkout(make.repository(ROOT))
    make.main(root)
    assert written(root) == written(ROOT), "run: python notebooks/make.py"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_is_that_of_the_script(make, script):
    """Cell by cell as jupytext reads both, but for the badge and what installs."""
    jupytext = pytest.importorskip("jupytext")
    expected = jupytext.read(script, fmt="py:percent").cells
    found = jupytext.read(script.with_suffix(".ipynb")).cells
    url = make.repository(ROOT)
    badge = f"{make.badge(url, script.stem)}\n\n" if url else ""
    sources = [cell.source.removeprefix(badge) for cell in found]
    sources[sources.index(make.installation(url))] = make.INSTALL
    assert sources == [cell.source for cell in expected], "run: python notebooks/make.py"
    assert [cell.cell_type for cell in found] == [cell.cell_type for cell in expected]
    assert not any(cell.get("outputs") for cell in found)


def test_with_an_address_colab_opens_and_installs(make, checkout):
    for name in ("owner/old", "some-owner/ntt_sparse"):  # The second replaces the first.
        root = checkout(f"https://github.com/{name}")
        make.main(root)
    made = written(root)
    assert not any("owner/old" in text for text in made.values())
    for script in SCRIPTS:
        opens = (
            "https://colab.research.google.com/github/some-owner/ntt_sparse/blob/main/notebooks/"
            f"{script.stem}.ipynb"
        )
        assert made["README.md"].count(opens) == 1
        first, *cells = json.loads(made[f"{script.stem}.ipynb"])["cells"]
        assert opens in first["source"][0] and first["cell_type"] == "markdown"
        code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
        assert code[0] == [
            '%pip install --quiet "ntt_sparse @ git+https://github.com/some-owner/ntt_sparse"'
        ]
    checkout(None)
    make.main(root)
    made = written(root)
    assert made["README.md"] == make.with_badges((ROOT / "README.md").read_text(), None)
    for script in SCRIPTS:
        cells = json.loads(made[f"{script.stem}.ipynb"])["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        assert code[0].splitlines()[-1].split() == ["%pip", "install", "--quiet", ".."]


@pytest.mark.parametrize("url", ["https://github.com/a/b.git", "https://github.com/a/b/"])
def test_addresses_as_they_are_written(make, checkout, url):
    assert make.repository(checkout(url)) == "https://github.com/a/b"


@pytest.mark.parametrize(
    "url",
    ["github.com/a/b", "https://github.com/a", "https://x.org/a/b", "https://github.com/a/.."],
)
def test_other_addresses_are_refused(make, checkout, url):
    root = checkout(url)
    before = written(root)
    with pytest.raises(ValueError, match="Colab opens notebooks of"):
        make.main(root)
    assert written(root) == before


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
        assert set(names["accuracies"]) >= {"NTT", "SNIP, global", "random"}
    if script.stem.startswith("2"):
        assert {matrix.shape for matrix in names["matrices"].values()} == {(6, 6)}
    if script.stem.startswith("3"):
        assert float(abs(names["before"] - names["after"]).max()) < 1e-4
    if script.stem.startswith("4"):
        assert printed.count("CKA-SR:") == 2


@pytest.mark.slow
def test_what_the_first_says_of_its_numbers_is_so(capsys):
    script = SCRIPTS[0]
    names = {"__name__": "notebook"}
    exec(compile(script.read_text(), str(script), "exec"), names)
    assert "distance to the teacher" in capsys.readouterr().out
    accuracies = names["accuracies"]
    early = {name: found[0] for name, found in accuracies.items()}
    ahead = {name for name in early if early[name] > early["NTT"]}
    assert ahead == {"SNIP, global", "Logit-SNIP, global"}
    late = {name: found[1] for name, found in accuracies.items()}
    for name in ("magnitude", "random", "SNIP, layer", "SNIP, global", "Logit-SNIP, global"):
        assert late[name] >= late["NTT"], name


def test_a_script_without_its_cells_is_named_and_nothing_is_written(make, checkout):
    root = checkout("https://github.com/a/b")
    script = root / "notebooks" / SCRIPTS[-1].name
    script.write_text(script.read_text().replace(make.INSTALL, "# Nothing."))
    before = written(root)
    with pytest.raises(ValueError, match=rf"{script.name}: expected a title in Markdown first"):
        make.main(root)
    assert written(root) == before
