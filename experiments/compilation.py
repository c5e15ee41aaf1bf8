"""Programs that are compiled once for all runs of a user."""

import hashlib
import os
import platform
from pathlib import Path

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def keep_programs() -> None:
    """Lets JAX keep what it compiles in the user's cache, unless the environment says where.

    An empty `JAX_COMPILATION_CACHE_DIR` keeps nothing.
    """
    import jax

    if _VARIABLE not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder()))


def folder() -> Path:
    """A folder in the user's cache, of processors that know the same instructions.

    Homes are shared between machines, and a program for one processor may stop another.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    digest = hashlib.sha256(_processor().encode()).hexdigest()[:12]
    return Path(home).expanduser() / "ntt_sparse" / f"jax-{digest}"


def _processor() -> str:
    """What tells processors apart: their instructions where Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # As x86 and ARM call them.
    names = ("flags", "Features")
    listed = sorted({line for line in lines if line.startswith(names)})
    return "\n".join([platform.machine(), platform.processor(), *listed])
