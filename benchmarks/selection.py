"""Exact masks of a large tree against sorts and NumPy's selection, in turn in one process.

    python benchmarks/selection.py --millions 25
    python benchmarks/selection.py --millions 100 --rounds 3
    python benchmarks/selection.py --memory 100

Scores are absolute normal numbers in ten leaves. NumPy's candidates get them as one array, but for
`numpy mask`, which makes such masks too (of more than was asked for where scores are tied). Printed
are medians, processor time, the median of the ratios to `numpy partition`, and temporary memory.
`--memory` measures masks, SNIP and CKA-SR with its gradient on a network of so many million
weights, each in a fresh process: the most memory of the process above what it holds with weights
and batch, by the size of the weights, results included; and seconds.
"""

import argparse
import functools
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import blocked, in_turn, ratio

from ntt_sparse.objectives.cka_sr import cka_sr
from ntt_sparse.pruning import masks, saliency

_BASE = "numpy partition"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison that the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=float, default=25.0, help="scores (default 25)")
    parser.add_argument("--density", type=float, default=0.03, help="kept (default 0.03)")
    parser.add_argument("--rounds", type=int, default=7, help="turns (default 7)")
    parser.add_argument("--sorts", type=int, default=1, help="sorts too (default 1; 0: none)")
    parser.add_argument("--memory", type=float, help="millions of weights to measure memory with")
    parser.add_argument("--one", choices=sorted(_PARTS), help="what --memory measures, here")
    options = parser.parse_args(arguments)
    if options.millions < 0.01 or options.rounds < 1 or not 0 < options.density <= 1:
        parser.error("expected 0.01 million scores, 1 round and a density in (0, 1]")
    if options.memory is None:
        _times(options)
    elif options.one:
        _memory(options.one, options.memory)
    else:
        for name in _PARTS:
            command = [sys.executable, __file__, "--memory", str(options.memory), "--one", name]
            subprocess.run(command, check=True)


def _times(options: argparse.Namespace) -> None:
    rows = max(int(options.millions * 100), 1)
    make = jax.jit(lambda key: jnp.abs(jax.random.normal(key, (rows, 1000))))
    scores = {f"layer_{i}": make(jax.random.key(i)) for i in range(10)}
    count = masks.keep_counts(scores, options.density)
    counts = masks.keep_counts(scores, options.density, scope="layer")
    flat = np.concatenate([np.asarray(leaf).ravel() for leaf in scores.values()])
    place = flat.size - count

    def numpy_mask():
        leaves = [np.asarray(leaf) for leaf in scores.values()]
        joined = np.concatenate([leaf.ravel() for leaf in leaves])
        threshold = np.partition(joined, place)[place]
        return [leaf >= threshold for leaf in leaves]

    candidates: dict[str, Callable[[], Any]] = {
        _BASE: lambda: np.partition(flat, place),
        "numpy argpartition": lambda: np.argpartition(flat, place),
        "numpy mask": numpy_mask,
    }
    temporary = {}
    programs: dict[str, tuple[Any, ...]] = {
        "global masks": (masks.from_counts, scores, count),
        "masks by layer": (masks.from_counts, scores, counts),
    }
    if options.sorts:
        programs["jnp.sort"] = (jnp.sort, jnp.asarray(flat))
    for name, (fn, *inputs) in programs.items():
        compiled = jax.jit(fn).lower(*inputs).compile()
        temporary[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        candidates[name] = functools.partial(blocked, compiled, *inputs)
    spent: dict[str, list[float]] = {name: [] for name in candidates}
    counted = {name: _counting(fn, spent[name]) for name, fn in candidates.items()}
    times = in_turn(counted, options.rounds)
    print(f"\n{flat.size / 1e6:g} million scores, density {options.density:g}")
    print(f"{'':<20}{'median ms':>10}{'CPU ms':>10}{'ratio':>8}{'temp MiB':>10}")
    for name, seconds in times.items():
        print(
            f"{name:<20}{1e3 * statistics.median(seconds):>10.1f}"
            f"{1e3 * statistics.median(spent[name]):>10.1f}{ratio(times, name, _BASE):>8.2f}"
            + (f"{temporary[name]:>10.2f}" if name in temporary else "")
        )


def _counting(fn: Callable[[], Any], spent: list[float]) -> Callable[[], None]:
    """The same, adding the processor time of each call to a list."""

    def call():
        began = time.process_time()
        fn()
        spent.append(time.process_time() - began)

    return call


def _network(millions: float) -> tuple[dict[str, Any], Any]:
    """Sixteen wide layers with so many weights together, and a batch."""
    width = max(int((millions * 1e6 / 16) ** 0.5), 1)
    make = jax.jit(lambda key: jax.random.normal(key, (width, width)) * width**-0.5)
    keys = jax.random.split(jax.random.key(0), 16)
    params = {f"layer_{i:02}": make(key) for i, key in enumerate(keys)}
    return params, jax.random.normal(jax.random.key(1), (32, width))


def _features(params: dict[str, Any], x: Any) -> list[Any]:
    features = []
    for weights in params.values():
        x = jnp.tanh(x @ weights)
        features.append(x)
    return features


def _loss(params: dict[str, Any], x: Any) -> Any:
    return jnp.mean(_features(params, x)[-1] ** 2)


def _masks(params: dict[str, Any], x: Any) -> Any:
    del x
    return masks.from_counts(params, masks.keep_counts(params, 0.03))


def _snip(params: dict[str, Any], x: Any) -> Any:
    return saliency.snip(_loss, params, x)


def _cka_sr(params: dict[str, Any], x: Any) -> Any:
    return jax.value_and_grad(lambda p: cka_sr([_features(p, x)]))(params)


_PARTS = {"masks": _masks, "snip": _snip, "cka_sr": _cka_sr}


def _memory(name: str, millions: float) -> None:
    params, x = jax.block_until_ready(_network(millions))
    size = sum(leaf.nbytes for leaf in params.values())
    fn = jax.jit(_PARTS[name])
    compiled = fn.lower(params, x).compile()
    with open("/proc/self/statm") as pages:
        held = int(pages.read().split()[1]) * resource.getpagesize()
    began = time.perf_counter()
    jax.block_until_ready(compiled(params, x))
    seconds = time.perf_counter() - began
    # In units of 1024 bytes; while programs were compiled it may have been more than now.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    above = max(most - held, 0) / size
    print(
        f"{name:<8}{size / 4e6:>8.1f} million weights of {size / 2**20:.0f} MiB: "
        f"{above:.2f} times that above them, {seconds:.2f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
