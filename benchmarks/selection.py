"""Exact mask selection against sorting, interleaved in one process.

    python benchmarks/selection.py --millions 25

Prints medians, the ratio to one `jnp.sort` of all scores, and temporary memory.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ntt_sparse.pruning import masks


def _seconds(fn: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    jax.block_until_ready(fn(*arguments))
    return time.perf_counter() - began


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=25.0, help="scores, in ten leaves")
    parser.add_argument("--density", type=float, default=0.03)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = int(options.millions * 100)
    scores = {
        f"layer_{i}": jnp.abs(jax.random.normal(jax.random.key(i), (rows, 1000))) for i in range(10)
    }
    count = masks.keep_counts(scores, options.density)
    counts = masks.keep_counts(scores, options.density, scope="layer")
    candidates = {
        "jnp.sort of all": jax.jit(
            lambda tree, _: jnp.sort(jnp.concatenate([leaf.ravel() for leaf in tree.values()]))
        ),
        "global mask": jax.jit(masks.from_counts),
        "layerwise mask": jax.jit(masks.from_counts),
    }
    arguments = {name: (scores, count) for name in candidates}
    arguments["layerwise mask"] = (scores, counts)
    temporary = {}
    for name, fn in candidates.items():
        compiled = fn.lower(*arguments[name]).compile()
        temporary[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        _seconds(fn, *arguments[name])
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(options.rounds):
        order = list(candidates)
        for name in order[round_ % 3 :] + order[: round_ % 3]:
            times[name].append(_seconds(candidates[name], *arguments[name]))
    print(f"{'':<16}{'median ms':>10}{'ratio to sort':>15}{'temp MiB':>10}")
    for name, seconds in times.items():
        ratios = [s / base for s, base in zip(seconds, times["jnp.sort of all"], strict=True)]
        median, ratio = statistics.median(seconds), statistics.median(ratios)
        print(f"{name:<16}{1e3 * median:>10.0f}{ratio:>15.3f}{temporary[name]:>10.0f}")


if __name__ == "__main__":
    main()
