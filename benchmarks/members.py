"""Members of one run: ten together beside ten times one, in each way that they can ride.

    python benchmarks/members.py                                    # the two LeNets
    python benchmarks/members.py --network resnet20 --members 1 5 --steps 2

Every way (a batched axis, one after another inside the program, each step a call of its own) trains
the same masked network with some numbers of members, all in turn in one process. Printed are the
median time of a step of all members, absolute and relative to as many runs of one member in the way
that is the default, and how many programs of steps were compiled, with the seconds that took (or
that finding them took, where JAX keeps what it compiles). The last line of a network says which way
is the fastest.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import numpy as np
import training
from timing import in_turn

from ntt_sparse.training import mesh as meshes

_COMPILED = "/jax/core/compile/backend_compile_duration"
# What holds the steps: a chunk, or where each is a call, one of a member.
_STEPS = ("jit(chunk)", "jit(advance)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison that the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", nargs="+", choices=training.SHAPES, default=["lenet_300_100", "lenet5_caffe"])
    add("--members", nargs="+", type=int, default=[1, 5, 10], help="numbers (default 1 5 10)")
    add("--batch", type=int, default=64, help="examples (default 64)")
    add("--steps", type=int, default=8, help="batches of an epoch (default 8)")
    add("--rounds", type=int, default=7, help="turns (default 7)")
    add("--json", type=pathlib.Path, help="file to which the numbers are written")
    options = parser.parse_args(arguments)
    if min(options.batch, options.steps, options.rounds, *options.members) < 1:
        parser.error("expected at least 1 example, 1 batch, 1 round and 1 member")
    counts = sorted({1, *options.members})
    print(f"JAX {jax.__version__}, {jax.default_backend()}, batch {options.batch}")
    rows = []
    for network in options.network:
        rows += measure(network, counts, options.batch, options.steps, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(
    network: str, counts: Sequence[int], batch: int, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """Measures and prints the ways of one network."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch * steps, *training.SHAPES[network])).astype(np.float32)
    y = rng.integers(0, 10, batch * steps).astype(np.int32)
    default = meshes.default_member_mode(training.start(network, x.shape[1:])[1])
    candidates: dict[str, Callable[[], Any]] = {}
    rows = {}
    for mode in get_args(meshes.MemberMode):
        for count in counts:
            epoch = training.ours(network, x, y, batch, steps, members=count, mode=mode)
            rows[f"{mode} {count}"] = {
                "network": network, "mode": mode, "members": count, "default": mode == default,
                **_first_call(epoch),
            }  # fmt: skip
            candidates[f"{mode} {count}"] = epoch
    times = in_turn(candidates, rounds)
    one = times[f"{default} 1"]
    print(
        f"\n{network}, by default {default}\n{'':<14}{'ms/step':>9}{'to runs':>9}{'compiled':>10}"
    )
    for name, row in rows.items():
        row["seconds"] = statistics.median(times[name]) / steps
        # Of each turn, so that what slows the machine down slows both.
        row["ratio"] = statistics.median(
            mine / (row["members"] * alone) for mine, alone in zip(times[name], one, strict=True)
        )
        print(
            f"{name:<14}{1e3 * row['seconds']:>9.2f}{row['ratio']:>9.2f}{row['programs']:>4}"
            f"{row['compiling']:>5.1f}s",
            flush=True,
        )
    most = [row for row in rows.values() if row["members"] == counts[-1]]
    best = min(most, key=lambda row: row["seconds"])["mode"]
    print(f"fastest with {counts[-1]} members: {best}")
    return list(rows.values())


def _first_call(epoch: Callable[[], Any]) -> dict[str, Any]:
    """Programs of steps that the first call compiled, and the seconds that took."""
    durations = []

    def listen(event: str, duration: float, **kwargs: Any) -> None:
        if event == _COMPILED and kwargs.get("fun_name") in _STEPS:
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        began = time.perf_counter()
        epoch()
        took = time.perf_counter() - began
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return {"programs": len(durations), "compiling": sum(durations), "first_call": took}


if __name__ == "__main__":
    main()
