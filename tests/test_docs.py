"""The documentation: its code runs, its commands exist, and no module is missing from it."""

import importlib
import pkgutil
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import ntt_sparse

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("methods/*.md"))]
TEXTS = {path.relative_to(DOCS).as_posix(): path.read_text() for path in PAGES}
METHODS = sorted(name for name in TEXTS if name.startswith("methods/"))


def public_modules():
    names = ["ntt_sparse"]
    names += [info.name for info in pkgutil.walk_packages(ntt_sparse.__path__, "ntt_sparse.")]
    return [name for name in names if "._" not in name]


@pytest.mark.parametrize("name", [*METHODS, "your_own_network.md", "training.md"])
def test_the_code_runs_and_prints_what_it_says(name, capsys):
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", TEXTS[name], re.S | re.M))
    exec(compile(code, name, "exec"), {})
    said = re.findall(r"^print\(.*\)  # (.*)$", code, re.M)
    assert said and capsys.readouterr().out.splitlines() == said


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_where_it_is_from_how_it_is_called_and_what_to_mind(name):
    headings = re.findall(r"^## (.+)$", TEXTS[name], re.M)
    assert headings == ["Definition", "Order of operations", "Choices", "Traps", "Use", "Sources"]
    assert "python -m experiments." in TEXTS[name] and "{py:obj}`" in TEXTS[name]


@pytest.mark.parametrize("name", TEXTS)
def test_names_and_commands_exist(name):
    text = TEXTS[name]
    for full in re.findall(r"\{py:\w+\}`~?(ntt_sparse[\w.]*)`", text):
        owner, _, last = full.rpartition(".")
        try:
            found = importlib.import_module(full)
        except ModuleNotFoundError:
            parent, _, class_name = owner.rpartition(".")
            if class_name[:1].isupper():
                found = getattr(getattr(importlib.import_module(parent), class_name), last)
            else:
                found = getattr(importlib.import_module(owner), last)
        assert found is not None
    for module in re.findall(r"python -m (experiments\.[a-z_]+)", text):
        assert find_spec(module), module
    for study, options in re.findall(r"experiments/configs/(\w+)\.py(?::([\w,]+))?", text):
        configs = importlib.import_module(f"experiments.configs.{study}")
        configs.get_config(*[options] if options else [])


def test_every_package_is_in_the_reference():
    rooms = {name for name in public_modules() if name.count(".") == 1}
    assert rooms == set(re.findall(r"^   (ntt_sparse\.\w+)$", TEXTS["reference.md"], re.M))


def test_it_builds_without_a_warning_and_has_every_module(tmp_path):
    pytest.importorskip("sphinx", reason="pip install '.[docs]' to build the documentation")
    # Elsewhere, as pages of the reference are written beside the others.
    source = tmp_path / "docs"
    for path in DOCS.rglob("*"):
        relative = path.relative_to(DOCS)
        if path.is_file() and relative.parts[0] not in ("_build", "reference"):
            (source / relative).parent.mkdir(parents=True, exist_ok=True)
            (source / relative).write_bytes(path.read_bytes())
    # A theme without a list of all pages on each page, which takes as long as the rest.
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-D", "html_theme=basic"]
    done = subprocess.run(
        [*command, str(source), str(tmp_path / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for name in public_modules()[1:]:
        page = (tmp_path / "html" / "reference" / f"{name}.html").read_text()
        assert f'id="module-{name}"' in page, name
        module = importlib.import_module(name)
        for attribute, value in vars(module).items():
            ours = getattr(value, "__module__", "") == name and callable(value)
            if ours and not attribute.startswith("_"):
                assert f'id="{name}.{attribute}"' in page, f"{name}.{attribute}"


@pytest.fixture
def docstrings(monkeypatch):
    pytest.importorskip("sphinx", reason="pip install '.[docs]' to build the documentation")
    monkeypatch.syspath_prepend(str(DOCS / "_extensions"))
    return importlib.import_module("docstrings")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("`apply` it", ":py:obj:`apply <ntt_sparse.pruning.masks.apply>` it"),
        ("`density=` of `params`", "``density=`` of ``params``"),
        # As it is defined elsewhere, and as it is not at all.
        ("`ntt_sparse.ntk.empirical_ntk`", ":py:obj:`~ntt_sparse.ntk.kernel.empirical_ntk`"),
        ("`ntt_sparse.ntk.no_kernel`", ":py:obj:`~ntt_sparse.ntk.no_kernel`"),
        ("`ntt_sparse.pruning._select`", "``ntt_sparse.pruning._select``"),
        (r"the `Array`s of $\|x\|^2$", r"the ``Array``\ s of :math:`\|x\|^2`"),
        ("``as it is`` and :py:obj:`so`", "``as it is`` and :py:obj:`so`"),
        ("so:\n\n$$a\n  = b$$\n\nEnd.", "so:\n\n\n.. math::\n\n   a\n   = b\n\n\nEnd."),
        (
            "====  ===\na     b\n====  ===\n`x`   1\n      2\n====  ===",
            ".. list-table::\n   :header-rows: 1\n\n   * - a\n     - b\n   * - ``x``\n     - 1 2\n",
        ),
    ],
)
def test_docstrings_become_restructured_text(docstrings, written, expected):
    module = importlib.import_module("ntt_sparse.pruning.masks")
    assert docstrings.translate(written, [module]) == expected
