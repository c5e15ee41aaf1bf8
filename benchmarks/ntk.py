"""The transfer objective with our tangent kernel and with those of others, in one process.

    python benchmarks/ntk.py --network lenet_300_100 --density 0.03
    python benchmarks/ntk.py --network lenet5_caffe --rounds 3
    python benchmarks/ntk.py --network conv4 --batch 16 --rounds 2

Every candidate computes the loss of Neural Tangent Transfer on the same batch, in float32,
with the same network; kernels are full, between the halves of the batch, by the masked
weights. Ours is `ntt_loss` as it is, with teacher and student in one program. Candidates take
turns of a fifth of a second or one call, beginning with another one in each round; a turn counts
with its median. Printed are medians over rounds, of times and of ratios to ours, the range of
these ratios, XLA's temporary memory, and the largest relative difference of the gradient to ours
at a kernel weight of 1e4, where the kernel decides the gradient. neural-tangents and PyTorch take
part where they are installed.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ntk_operations
import ntk_peers
import numpy as np
import optax

from ntt_sparse import models
from ntt_sparse.objectives import ntt
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.pruning import saliency

_SHAPES = {
    "lenet_300_100": ((28, 28, 1), ""),
    "lenet5_caffe": ((28, 28, 1), "pp"),
    "conv4": ((32, 32, 3), "-p-p"),
}
_KERNEL_WEIGHT = 1e4


class Candidate:
    """Something to time: a call without arguments, and its memory where XLA tells it."""

    def __init__(self, call: Callable[[], Any], mebibytes: float | None = None):
        """Takes the call."""
        self.call = call
        self.mebibytes = mebibytes
        self.seconds: list[float] = []
        self.slow = False
        """Whether a call took over a second: such need no more than that to warm up."""

    def first(self) -> Any:
        """The result of a first call."""
        began = time.perf_counter()
        result = jax.block_until_ready(self.call())
        self.slow = time.perf_counter() - began > 1.0
        return result

    def time(self) -> None:
        """Takes its turn: calls for at least a fifth of a second, of which the median counts."""
        calls: list[float] = []
        while sum(calls) < 0.2:
            began = time.perf_counter()
            jax.block_until_ready(self.call())
            calls.append(time.perf_counter() - began)
        self.seconds.append(statistics.median(calls))


def compiled(fn: Callable[..., Any], *arguments: Any) -> Candidate:
    """A candidate compiled ahead, so that constants do not fold and no call traces."""
    program = jax.jit(fn).lower(*arguments).compile()
    return Candidate(
        lambda: program(*arguments), program.memory_analysis().temp_size_in_bytes / 2**20
    )


def candidates(options: argparse.Namespace, density: float, gradient: bool) -> dict[str, Candidate]:
    """Everyone who takes part, ours first."""
    shape, pooling = _SHAPES[options.network]
    module = models.create(options.network)
    f = models.apply_fn(module)
    params = models.init(module, jax.random.key(0), shape)
    teacher = models.init(module, jax.random.key(1), shape)
    masks = pruning_masks.from_scores(saliency.magnitude(params), density, scope="layer")
    x = jax.random.normal(jax.random.key(2), (options.batch, *shape))
    half = len(x) // 2
    weight = {"kernel_weight": _KERNEL_WEIGHT, "max_density": density}

    def of(loss):
        return jax.value_and_grad(loss) if gradient else loss

    def student(p, m, targets, x, **how):
        return of(lambda p: ntt.ntt_loss_from_targets(f, p, m, targets, x, **weight, **how)[0])(p)

    def split(**how):
        first = jax.jit(lambda t, x: ntt.teacher_targets(f, t, x, **how))
        first = first.lower(teacher, x).compile()
        targets = first(teacher, x)
        # What else there is of a sketch goes with its targets.
        distance = {"distance": targets.distance}
        second = jax.jit(lambda *a: student(*a, **distance))
        second = second.lower(params, masks, targets, x).compile()
        memory = [p.memory_analysis().temp_size_in_bytes / 2**20 for p in (first, second)]
        both = Candidate(lambda: second(params, masks, first(teacher, x), x), max(memory))
        return both, Candidate(lambda: second(params, masks, targets, x), memory[1])

    whole = compiled(
        lambda p, m, t, x: of(lambda p: ntt.ntt_loss(f, p, m, t, x, **weight)[0])(p),
        params, masks, teacher, x,
    )  # fmt: skip
    both, cached = split()
    found = {"ours": whole, "ours, two programs": both, "ours, teacher cached": cached}
    found["ours, trace (not the same loss)"] = split(distance="trace")[0]
    sketch = {"distance": "sketch", "key": jax.random.key(3)}
    for probes in (1, 4):
        found[f"ours, {probes} sketch (an estimate)"] = split(probes=probes, **sketch)[0]

    def objective(kernel, p, m, t, x):
        ours, theirs = kernel(f, p, m, x[:half], x[half:]), kernel(f, t, None, x[:half], x[half:])
        difference = f(pruning_masks.apply(p, m), x) - f(t, x)
        return _KERNEL_WEIGHT * jnp.mean((ours - theirs) ** 2) + jnp.mean(difference**2)

    for name, kernel in ntk_peers.kernels().items():
        if name not in options.peers:
            continue
        found[name] = compiled(
            lambda p, m, t, x, kernel=kernel: of(lambda p: objective(kernel, p, m, t, x))(p),
            params, masks, teacher, x,
        )  # fmt: skip
    if "torch.func jacrev" in options.peers:
        calls = ntk_peers.torch_objective(params, masks, teacher, x, pooling, _KERNEL_WEIGHT)
        found["torch.func jacrev"] = Candidate(calls[gradient])

    labels = jnp.zeros(len(x), jnp.int32)

    def training(p, m, x):
        outputs = f(pruning_masks.apply(p, m), x)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    found["a training step's " + ("gradient" if gradient else "loss")] = compiled(
        lambda p, m, x: jax.value_and_grad(training)(p, m, x) if gradient else training(p, m, x),
        params, masks, x,
    )  # fmt: skip
    return found


def agreement(found: dict[str, Candidate]) -> dict[str, float]:
    """The relative difference of each exact candidate to ours, of loss or gradient."""
    ours = jax.tree.leaves(found["ours"].first())
    result = {}
    for name, candidate in found.items():
        if name.startswith(("a training", "ours, trace")) or "sketch" in name or "torch" in name:
            continue
        theirs = jax.tree.leaves(candidate.first())
        result[name] = max(
            float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
            for a, b in zip(theirs, ours, strict=True)
        )
    return result


def matrix_rate() -> float:
    """Operations per second of a large matrix product, the best of five."""
    a = jnp.ones((2048, 2048))
    product = compiled(lambda a: jnp.matmul(a, a, precision="highest"), a)
    for _ in range(6):
        product.time()
    return 2 * 2048**3 / min(product.seconds[1:])


def report(options: argparse.Namespace, density: float, gradient: bool) -> dict[str, Any]:
    """Runs one comparison and prints it."""
    module = models.create(options.network)
    shape = _SHAPES[options.network][0]
    params = models.init(module, jax.random.key(0), shape)
    work = ntk_operations.count(
        ntk_operations.layers(module, params, shape), options.batch, 10, density
    )
    total = sum(work.values()) if gradient else work["teacher"] + work["student"]
    found = candidates(options, density, gradient)
    differences = agreement(found)
    for candidate in found.values():
        if not candidate.slow:
            candidate.time()  # a round that does not count
            candidate.seconds.clear()
    names = list(found)
    for round_ in range(options.rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            found[name].time()
    rate = matrix_rate()

    what = "loss with gradient" if gradient else "loss"
    ours = found["ours"].seconds
    print(
        f"\n{options.network}, batch {options.batch}, density {density}, {what}, "
        f"{options.rounds} rounds, {jax.default_backend()}"
    )
    bound = total / rate
    print(
        f"{total / 1e9:.2f} G operations counted by hand, {rate / 1e9:.0f} G/s in a matrix product:"
        f" bound {bound * 1e3:.2f} ms, ours {statistics.median(ours) / bound:.1f} times it"
    )
    print(f"{'':<34}{'median ms':>10}{'ratio':>8}  {'range':<16}{'MiB':>7}  difference")
    rows = {}
    for name, candidate in found.items():
        ratios = [s / base for s, base in zip(candidate.seconds, ours, strict=True)]
        row = {
            "median_ms": statistics.median(candidate.seconds) * 1e3,
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "temporary_mebibytes": candidate.mebibytes,
            "difference": differences.get(name),
        }
        rows[name] = row
        memory = "" if candidate.mebibytes is None else f"{candidate.mebibytes:.1f}"
        difference = "" if name not in differences else f"{differences[name]:.1e}"
        span = "..".join(f"{ratio:.2f}" for ratio in row["ratio_range"])
        print(
            f"{name:<34}{row['median_ms']:>10.2f}{row['ratio']:>8.2f}  {span:<16}"
            f"{memory:>7}  {difference}",
            flush=True,
        )
    return {
        "network": options.network,
        "batch": options.batch,
        "density": density,
        "gradient": gradient,
        "rounds": options.rounds,
        "backend": jax.default_backend(),
        "operations": total,
        "matrix_product_operations_per_second": rate,
        "candidates": rows,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags; `peers` are full names."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"peers installed: {', '.join(ntk_peers.names())}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--network", choices=_SHAPES, default="lenet_300_100", help="whose kernel")
    add("--batch", type=int, default=64, help="examples, of which the halves meet")
    add("--density", type=float, nargs="+", default=[0.03], help="of the masks, one run each")
    add("--rounds", type=int, default=7, help="turns of every candidate")
    add("--mode", choices=("gradient", "loss", "both"), default="gradient", help="what to time")
    add("--peers", default="", help="parts of names, with commas; all if empty")
    add("--json", type=pathlib.Path, help="file to which the numbers are added")
    options = parser.parse_args(arguments)
    for name, least in (("batch", 2), ("rounds", 1)):
        value = getattr(options, name)
        if value < least:
            raise SystemExit(f"--{name} is {value}, expected {least} or more")
    for density in options.density:
        if not 0 < density <= 1:
            raise SystemExit(f"--density is {density}, expected fractions in (0, 1]")
    parts, known = options.peers.split(","), ntk_peers.names()
    for part in parts:
        if not any(part in name for name in known):
            raise SystemExit(f"--peers has {part!r}, expected parts of: {', '.join(known)}")
    options.peers = [name for name in known if any(part in name for part in parts)]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparisons that the flags name."""
    options = parse(arguments)
    modes = {"gradient": [True], "loss": [False], "both": [True, False]}[options.mode]
    results = [
        report(options, density, gradient) for gradient in modes for density in options.density
    ]
    if options.json:
        before = json.loads(options.json.read_text()) if options.json.exists() else []
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([*before, *results], indent=1) + "\n")


if __name__ == "__main__":
    main()
