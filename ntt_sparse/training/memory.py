"""The memory of a device: what there is, what arrays and compiled functions take of it."""

import contextlib
import math
import os
from pathlib import Path, PurePosixPath
from typing import Any

import jax
from jax.sharding import NamedSharding

# The rest is for what no count sees: fragments, programs, the host's own.
_PART = 0.8


def with_sharding(sharding: NamedSharding, tree: Any) -> Any:
    """Shapes of arrays that lie so, from arrays or shapes."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding, weak_type=getattr(leaf, "weak_type", False)
        ),
        tree,
    )


def local_bytes(tree: Any) -> int:
    """What a pytree of arrays or shapes takes on each device: all of those without a sharding."""

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def compiled_bytes(jitted: Any, *arguments: Any) -> int:
    """What a jitted function takes on each device beside its arguments; 0 where none can tell.

    It is compiled for arrays of the shapes, dtypes and shardings of the arguments, once: a call
    with such arrays runs what was compiled here.
    """
    found = jitted.lower(*arguments).compile().memory_analysis()
    if found is None:
        return 0
    # A donated argument is the result's place.
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def device_bytes(asked: str | None = None) -> int | None:
    """What is free of a device of this process, less a reserve; `None` where nothing tells.

    Of an accelerator its allocator says it. Devices on a CPU share what the system has available,
    or the container or job allows.

    Args:
        asked: MiB, to be taken instead.

    Raises:
        ValueError: `asked` is not a number above 0.
    """
    if asked:
        try:
            mebibytes = float(asked)
        except ValueError:
            mebibytes = math.nan
        if not 0 < mebibytes < math.inf:
            raise ValueError(f"{asked!r} is no memory: expected MiB, a number above 0")
        return int(mebibytes * 2**20)
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        return int(_PART * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    free = [size for size in (_available(), *_allowed()) if size is not None]
    return int(_PART * min(free) / jax.local_device_count()) if free else None


def _available() -> int | None:
    """What programs of this machine may still take, files that are cached included."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 2**10
    # Not on Linux: all there is.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _allowed(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """What the control groups of this process, and those around them, leave of their limits."""
    left = []
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            base, limit, used = (
                (root, "memory.max", "memory.current")
                if not controllers
                else (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            )
            inner = PurePosixPath(path.lstrip("/"))
            for group in (inner, *inner.parents):
                with contextlib.suppress(OSError, ValueError):
                    most = int((base / group / limit).read_text())
                    cached = _cached(base / group / "memory.stat")
                    left.append(most - int((base / group / used).read_text()) + cached)
    return [max(size, 0) for size in left]


def _cached(path: Path) -> int:
    """Files in memory that the system gives up for programs."""
    rows = dict(line.split() for line in path.read_text().splitlines())
    return int(rows.get("inactive_file", rows.get("total_inactive_file", 0)))
