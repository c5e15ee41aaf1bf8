"""Where compiled programs are kept."""

import subprocess
import sys

import jax

from experiments import compilation


def test_the_folder_is_of_the_user_and_the_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compilation.folder()
    assert first.parent == tmp_path / "ntt_sparse" and first == compilation.folder()
    monkeypatch.setattr(compilation, "_processor", lambda: "another")
    assert compilation.folder().parent == first.parent and compilation.folder() != first
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(compilation.folder()).startswith("/somewhere/.cache/ntt_sparse/jax-")


def test_what_the_environment_says_is_left(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    compilation.keep_programs()
    assert jax.config.jax_compilation_cache_dir == before


_PROGRAM = """
from experiments.compilation import keep_programs
keep_programs()
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(float(jax.jit(lambda x: x * 3)(2.0)))
"""


def test_a_second_run_finds_what_the_first_compiled(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = []
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == "6.0"
        kept.append(sorted(path.name for path in compilation.folder().glob("*-cache")))
    assert kept[0] and kept[0] == kept[1]
