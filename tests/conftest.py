"""Test environment: eight host devices, CPU only, set before JAX is imported.

`NPROC` sizes XLA's CPU thread pool: with more forced devices than threads a
collective waits for participants that never get a thread, and XLA aborts.

Nearly all time goes into compiling programs that run once. So they are compiled without
the optimisations of LLVM (`XLA_FLAGS= python -m pytest` tests with them), and what was
compiled is kept for the other processes of a session and for the next sessions of a week
(`JAX_COMPILATION_CACHE_DIR= python -m pytest` keeps nothing).
"""

import contextlib
import importlib
import os
import runpy
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # The file alone: the package is imported later, under the hook that checks its types.
    compilation = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "compilation.py"))
    compiled = compilation["folder"]() / "tests"
    # Where there is no home to write in, nothing is kept.
    with contextlib.suppress(OSError):
        compiled.mkdir(parents=True, exist_ok=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for program in compiled.glob("*-cache"):
        # Which another session may do, too.
        with contextlib.suppress(OSError):
            if program.stat().st_mtime < time.time() - 7 * 24 * 3600:
                program.unlink()

import jax
import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of tests marked `variants(n)`, n cases spread over all are run by default."""
    cases = {}
    for item in items:
        if item.get_closest_marker("variants") and not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in cases.values():
        (count,) = found[0].get_closest_marker("variants").args
        usual = {round(i * (len(found) - 1) / max(count - 1, 1)) for i in range(count)}
        for index, item in enumerate(found):
            if index not in usual:
                item.add_marker(pytest.mark.slow)
    # The longest first, so that no process waits for another one's last test.
    items.sort(key=lambda item: item.path.name not in ("test_docs.py", "test_notebooks.py"))


@pytest.fixture
def x64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def compilations():
    """A context manager that yields the names of the programs that XLA compiles meanwhile."""

    @contextlib.contextmanager
    def watch():
        names = []

        def listen(event, duration, **kwargs):
            del duration
            if event == "/jax/core/compile/backend_compile_duration":
                names.append(kwargs.get("fun_name", event))

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield names
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return watch


@pytest.fixture
def load_benchmark(monkeypatch):
    """A module of `benchmarks/` by name, which may be that of other modules too."""

    def load(name):
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load
