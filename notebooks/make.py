"""Makes the notebooks of the scripts beside this file: `python notebooks/make.py`.

Where `pyproject.toml` has `[project.urls]` with a `Repository` (or `Source`) on GitHub, each
notebook begins with a badge that opens it in Colab, its first cell of code installs the package
from there, and the README's links to notebooks get the badges too. Without one there are no badges,
and the cell installs the checkout that the notebook lies in, unless there is an installation.
"""

import re
import tomllib
from pathlib import Path

import jupytext

ROOT = Path(__file__).parents[1]
# The cell of the scripts that an installation takes the place of.
INSTALL = "# Notebooks install the package here."
# Kernels start in the folder of their notebook. What is installed there may be editable: it stays.
FROM_CHECKOUT = """\
import importlib.util

if importlib.util.find_spec("ntt_sparse") is None:
    %pip install --quiet .."""


def repository(root: Path) -> str | None:
    """The address `https://github.com/OWNER/NAME` in `pyproject.toml`, `None` without one."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # Labels are compared as package indices do.
    urls = {label.lower(): url for label, url in project.get("urls", {}).items()}
    url = urls.get("repository", urls.get("source"))
    if url is None:
        return None
    found = re.fullmatch(r"https://github\.com/([\w-][\w.-]*/[\w-][\w.-]*?)(\.git)?/?", url)
    if found is None:
        raise ValueError(
            f"pyproject.toml: the repository is {url!r}; Colab opens notebooks of "
            "https://github.com/OWNER/NAME"
        )
    return f"https://github.com/{found[1]}"


def badge(url: str, name: str) -> str:
    """Markdown: what opens a notebook of the main branch in Colab."""
    colab = "https://colab.research.google.com"
    path = url.removeprefix("https://github.com/") + f"/blob/main/notebooks/{name}.ipynb"
    return f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{path})"


def installation(url: str | None) -> str:
    """The first cell of code."""
    return FROM_CHECKOUT if url is None else f'%pip install --quiet "ntt_sparse @ git+{url}"'


def notebook(script: Path, url: str | None):
    """The notebook of a script, without outputs."""
    book = jupytext.read(script, fmt="py:percent")
    first, *rest = book.cells
    installs = [cell for cell in rest if cell.source == INSTALL]
    if first.cell_type != "markdown" or len(installs) != 1:
        raise ValueError(
            f"{script}: expected a title in Markdown first, and one cell of code that is: {INSTALL}"
        )
    installs[0].source = installation(url)
    if url is not None:
        first.source = f"{badge(url, script.stem)}\n\n{first.source}"
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    return book


def with_badges(readme: str, url: str | None) -> str:
    """The README with a badge behind each link to a notebook."""
    link = r"(\[[^\]]+\]\(notebooks/(\w+)\.ipynb\))(?: \[!\[Open in Colab\]\(.*?\)\]\(.*?\))?"
    behind = (lambda found: " " + badge(url, found[2])) if url else lambda found: ""
    return re.sub(link, lambda found: found[1] + behind(found), readme)


def main(root: Path = ROOT) -> None:
    """Writes the notebooks and the README's badges."""
    url = repository(root)
    scripts = sorted((root / "notebooks").glob("[0-9]*.py"))
    # All are read before one is written.
    for script, book in [(script, notebook(script, url)) for script in scripts]:
        jupytext.write(book, script.with_suffix(".ipynb"), fmt="ipynb")
    readme = root / "README.md"
    text = with_badges(readme.read_text(encoding="utf-8"), url)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
