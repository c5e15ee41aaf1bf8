"""Makes the notebooks of the scripts beside this file: `python notebooks/make.py`.

Where `pyproject.toml` has `[project.urls]` with a `Repository` on GitHub, each notebook begins with a
badge that opens it in Colab, its first cell of code installs the package from there, and the
README's links to notebooks get the badges too. Without one there are none, and the cell says so.
"""

import re
import tomllib
from pathlib import Path

import jupytext

ROOT = Path(__file__).parents[1]
# The cell of the scripts that an installation takes the place of.
INSTALL = (
    "# Where the package is not installed, such as on Colab, "
    "a `%pip install` of its repository goes here."
)


def repository(root: Path) -> str | None:
    """The address `https://github.com/OWNER/NAME` in `pyproject.toml`, `None` without one."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    url = project.get("urls", {}).get("Repository")
    if url is not None and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise ValueError(
            f"pyproject.toml: Repository is {url!r}; Colab opens notebooks of "
            "https://github.com/OWNER/NAME"
        )
    return url


def badge(url: str, name: str) -> str:
    """Markdown: what opens a notebook of the main branch in Colab."""
    colab = "https://colab.research.google.com"
    path = url.removeprefix("https://github.com/") + f"/blob/main/notebooks/{name}.ipynb"
    return f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{path})"


def notebook(script: Path, url: str | None):
    """The notebook of a script, without outputs."""
    book = jupytext.read(script, fmt="py:percent")
    (install,) = [cell for cell in book.cells if cell.source == INSTALL]
    if url is not None:
        book.cells[0].source = f"{badge(url, script.stem)}\n\n{book.cells[0].source}"
        install.source = f'%pip install --quiet "ntt_sparse @ git+{url}"'
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
    for script in sorted((root / "notebooks").glob("[0-9]*.py")):
        jupytext.write(notebook(script, url), script.with_suffix(".ipynb"), fmt="ipynb")
    readme = root / "README.md"
    readme.write_text(with_badges(readme.read_text(), url))


if __name__ == "__main__":
    main()
