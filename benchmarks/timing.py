"""Candidates timed in turn, so that what else the machine does falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def in_turn(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; each round begins with another one."""
    for candidate in candidates.values():
        candidate()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for round_ in range(rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            began, calls = time.perf_counter(), 0
            # Short ones several times: a turn is a tenth of a second at least.
            while calls == 0 or time.perf_counter() - began < 0.1:
                candidates[name]()
                calls += 1
            times[name].append((time.perf_counter() - began) / calls)
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of the seconds of one candidate by those of another."""
    return statistics.median(s / b for s, b in zip(times[name], times[base], strict=True))


def blocked(fn: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call, once it is there."""
    return jax.block_until_ready(fn(*arguments))
