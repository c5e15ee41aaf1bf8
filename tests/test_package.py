"""The package as a whole: what importing it costs, and that the README tells the truth."""

import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest

import ntt_sparse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# With what was measured.
PAGES = README + (ROOT / "results" / "README.md").read_text()
HEAVY = (
    *("tensorflow", "matplotlib", "sklearn", "orbax", "tensorflow_datasets", "tensorboardX"),
    "neural_tangents",
    "h5py",
)


def modules(package):
    return [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]


def test_no_module_imports_anything_heavy():
    names = modules(ntt_sparse)
    assert "ntt_sparse.objectives.ntt" in names
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Who may import whom: an arrow that is not here is a mistake.
ROOMS = {
    "ntk": {"_program", "_precision", "_types", "ntk"},
    "data": {"_types", "data"},
    "gates": {"_precision", "_types", "gates"},
    "models": {"_precision", "_types", "gates", "models", "similarity"},
    # Small networks are built from descriptions, as models.
    "pruning": {
        *(
            "_program",
            "_precision",
            "_types",
            "gates",
            "models.convolution",
            "models.described",
            "pruning",
        ),
    },
    "similarity": {"_precision", "_types", "similarity"},
    "objectives": {"_precision", "_types", "ntk", "objectives", "pruning.masks", "similarity"},
    # Of gates and models, descriptions and what runs them, which files hold.
    "training": {
        *(
            "_precision",
            "_types",
            "data.batches",
            "data.stream",
            "gates.network",
            "gates.network_text",
            "models.described",
            "pruning.masks",
        ),
        "training",
    },
}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downwards_only(room):
    for path in (ROOT / "ntt_sparse" / room).rglob("*.py"):
        text = path.read_text()
        found = re.findall(r"^\s*from ntt_sparse\.(\S+) import (\w+)", text, re.M)
        found = [(module, f"{module}.{name}") for module, name in found]
        found += [
            (name, name) for name in re.findall(r"^\s*from ntt_sparse import (\w+)", text, re.M)
        ]
        for candidates in found:
            allowed = any(
                name == arrow or name.startswith(f"{arrow}.")
                for name in candidates
                for arrow in ROOMS[room]
            )
            assert allowed, f"{path.name} imports {candidates[1]}"


def test_every_public_function_is_documented():
    for name in modules(ntt_sparse):
        module = importlib.import_module(name)
        assert module.__doc__, name
        for attribute, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") == name:
                assert attribute.startswith("_") or value.__doc__, f"{name}.{attribute}"


def test_the_readme_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transfer, made_small = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(transfer, "README.md", "exec"), {})
    assert re.search(r"total\s+2,510\s+50,200\s+0\.05000", capsys.readouterr().out)
    names = {}
    exec(compile(made_small, "README.md", "exec"), names)
    whole, left, constants = map(int, capsys.readouterr().out.split())
    assert (whole, constants) == (61_706, 0) and left < 20_000
    x = np.ones((2, 28, 28, 1), np.float32)
    expected = names["small"].module.apply(names["small"].variables, x)
    np.testing.assert_allclose(names["module"].apply(names["variables"], x), expected)
    program = jax.export.deserialize(bytearray(names["program"]))
    np.testing.assert_allclose(program.call(x), expected, atol=1e-6)


def test_wheels_hold_every_file_that_is_read():
    """Installed packages have modules, and of other files those that pyproject.toml names."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = settings["tool"]["setuptools"]["package-data"]
    for folder in ("ntt_sparse", "experiments"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_dir() or path.suffix == ".py" or "__pycache__" in path.parts:
                continue
            package = ".".join(path.parent.relative_to(ROOT).parts)
            assert any(path.match(pattern) for pattern in named.get(package, [])), path
    packages = [*(ROOT / "ntt_sparse").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    assert all((path.parent / "__init__.py").is_file() for path in packages)


def has_field(config, path):
    for field in path.split("."):
        if field not in config:
            return False
        config = config[field]
    return True


def test_the_readme_names_what_exists():
    for module in re.findall(r"^\| `(ntt_sparse\.[\w.]+)`", README, re.M):
        importlib.import_module(module)
    configs = {
        path.stem: importlib.import_module(f"experiments.configs.{path.stem}")
        for path in ROOT.glob("experiments/configs/*.py")
        if path.stem not in ("__init__", "common")
    }
    commands = re.findall(
        r"--config=experiments/configs/(\w+)\.py(?::([\w,]+))?((?:[^\n]*\\\n)*[^\n]*)",
        PAGES,
    )
    assert {study for study, _, _ in commands} == set(configs)
    for study, options, rest in commands:
        config = configs[study].get_config(*[options] if options else [])
        for path in re.findall(r"--config\.([\w.]+)=", rest):
            assert has_field(config, path), (study, options, path)
    # In the text around the commands a field is of any of the studies.
    defaults = [module.get_config() for module in configs.values()]
    for path in re.findall(r"--config\.([\w.]+)=", PAGES):
        assert any(has_field(config, path) for config in defaults), path


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?://)([^)#\s]+)", text)
    assert links
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_style(arguments):
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    sys.version_info < (3, 12), reason="NumPy and JAX for this Python know less of their own types"
)
def test_types():
    pytest.importorskip("basedpyright")
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_private_jax_is_imported():
    # It restores a name that neural-tangents looks for there, for as long as that is imported.
    exempt = ROOT / "ntt_sparse" / "ntk" / "neural_tangents.py"
    for path in [*ROOT.glob("ntt_sparse/**/*.py"), *ROOT.glob("experiments/**/*.py")]:
        if path == exempt:
            continue
        assert not re.search(r"jax\._src|jax\.interpreters", path.read_text()), path
