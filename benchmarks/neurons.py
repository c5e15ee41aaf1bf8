"""Orders of neurons by CKA against the brute force of the paper, interleaved in one process.

    python benchmarks/neurons.py
    python benchmarks/neurons.py --widths 128 --large 0 --seeds 2

512 examples, a fifth of the neurons removed; activations are rectified, a part of the neurons is
dead or nearly equal to another. The brute force sets a neuron to a constant, computes CKA by
features and restores it, for every candidate of every removal, with PyTorch where it is installed
and JAX elsewhere; it is timed on a sample of candidates and multiplied by their number. The other
one updates the Gram matrix of examples by a rank-one term for each candidate. Times are without
compiling, which takes half a second for each shape and number of neurons.

Orders are compared with the second, in double precision, all of them (`--through`) or the first
few (`--picks`), the first with the first one too; and for every seed with the closed form in long
doubles, whose sums are formed anew in each step.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

from ntt_sparse.pruning.neurons import cka_prune_curve, cka_prune_order

_EXAMPLES, _PART = 512, 0.2


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description="Orders of neurons by CKA against brute force.")
    parser.add_argument("--widths", type=int, nargs="*", default=[128, 512, 1024])
    parser.add_argument("--large", type=int, default=16384, help="timed alone; 0 for none")
    parser.add_argument("--seeds", type=int, default=20, help="orders compared in long doubles")
    parser.add_argument("--picks", type=int, default=5, help="compared at other widths")
    parser.add_argument("--sample", type=int, default=20, help="candidates that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--through", type=int, nargs="*", default=[128, 512],
        help="widths at which the rank-one brute force runs through, for its order",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    whole, name = _brute_force()
    print(f"{_EXAMPLES} examples, {_PART:.0%} removed; brute force with {name}; medians of ms")
    head = ("p", "removed", "candidates", "ours", "rank-one", "paper", "x rank-one", "x paper")
    print("".join(f"{title:>12}" for title in head))
    for p in options.widths:
        _compare(p, whole, options)
    for p in options.widths:
        _compare_orders(p, whole, options)
    if options.large:
        x = activations(options.large, 0)
        for count in (round(_PART * options.large), options.large):
            cka_prune_curve(x, count).order.block_until_ready()
            began = time.perf_counter()
            cka_prune_curve(x, count).order.block_until_ready()
            seconds = time.perf_counter() - began
            print(f"p = {options.large}: {count} neurons in {seconds:.1f} s")


def activations(p: int, seed: int) -> np.ndarray:
    """A layer of rectified features that share directions, some dead, some nearly equal."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(_EXAMPLES, 64))
    x = np.maximum(inputs @ rng.normal(size=(64, p)) + rng.normal(size=p), 0)
    chosen = rng.permutation(p)
    few = p // 16
    dead, twins, others = chosen[:few], chosen[few : 2 * few], chosen[2 * few : 3 * few]
    x[:, dead] = 0
    x[:, twins] = x[:, others] * (1 + 1e-4 * rng.normal(size=(_EXAMPLES, few)))
    return x.astype(np.float32)


def _compare(p: int, whole: Callable[[Any], Callable[[int], float]], options: Any) -> None:
    """Prints one row of times."""
    x, count = activations(p, 0), round(_PART * p)
    candidates = sum(p - done for done in range(count))
    rng = np.random.default_rng(0)
    sample = rng.integers(p, size=options.sample)
    one_whole, one_update = whole(x), _rank_one(x)
    times = timing.in_turn(
        {
            "ours": lambda: cka_prune_order(x, count).block_until_ready(),
            "rank-one": lambda: [one_update(index) for index in sample],
            "paper": lambda: [one_whole(index) for index in sample],
        },
        options.rounds,
    )
    scale = candidates / options.sample
    scaled = {
        name: [each * (1 if name == "ours" else scale) for each in seconds]
        for name, seconds in times.items()
    }
    cells = [p, count, candidates, *(1e3 * statistics.median(each) for each in scaled.values())]
    cells += [timing.ratio(scaled, name, "ours") for name in ("rank-one", "paper")]
    print("".join(f"{cell:>12.4g}" if isinstance(cell, float) else f"{cell:>12}" for cell in cells))


def _compare_orders(p: int, whole: Callable[[Any], Callable[[int], float]], options: Any) -> None:
    """Prints how many orders are those of the references."""
    count = round(_PART * p)
    equal = sum(
        cka_prune_order(x, p).tolist() == long_double_order(x, p)
        for x in (activations(p, seed) for seed in range(options.seeds))
    )
    print(f"p = {p}: all {p} neurons as in long doubles for {equal} of {options.seeds} seeds")
    x, picks = activations(p, 0), count if p in options.through else min(options.picks, count)
    dead = np.flatnonzero(np.ptp(x, 0) == 0).tolist()
    # Brute force breaks ties of dead neurons by rounding.
    x = np.delete(x, dead, 1)
    ours = cka_prune_order(x, picks).tolist()
    began = time.perf_counter()
    same = ours == rank_one_order(x, picks)
    seconds = time.perf_counter() - began
    first = whole(np.float64(x))
    same_first = not picks or ours[0] == int(np.argmax([first(i) for i in range(x.shape[1])]))
    print(
        f"p = {p}: {picks} of {count} as by rank-one brute force: {same} ({seconds:.0f} s); "
        f"the first as by the paper's: {same_first}"
    )


def long_double_order(x: np.ndarray, count: int) -> list[int]:
    """The closed form in long doubles, its sums anew in each step."""
    x = np.asarray(x, np.longdouble)
    x = x - x.mean(0)
    q = (x.T @ x) ** 2
    r, diagonal = q.sum(1), np.diagonal(q).copy()
    left, order = np.arange(len(q)), []
    for _ in range(count):
        rows = q[np.ix_(left, left)].sum(1)
        rest = rows.sum() - 2 * rows + diagonal[left]
        value = (r[left].sum() - r[left]) ** 2 / np.where(rest > 0, rest, 1)
        best = int(np.argmax(value))
        order.append(int(left[best]))
        left = np.delete(left, best)
    return order


def _rank_one(x: np.ndarray) -> Callable[[int], float]:
    """CKA without one more neuron, from the Gram matrix of those that are left."""
    x = np.asarray(x, np.float64)
    x = x - x.mean(0)
    gram = x @ x.T
    norm = np.linalg.norm(gram)

    def similarity(index: int) -> float:
        less = gram - np.outer(x[:, index], x[:, index])
        return float(np.vdot(gram, less) / (norm * np.linalg.norm(less)))

    return similarity


def rank_one_order(x: np.ndarray, count: int) -> list[int]:
    """The brute force run through, with rank-one updates in double precision."""
    x = np.asarray(x, np.float64)
    x = x - x.mean(0)
    whole = x @ x.T
    norm, now, left, order = np.linalg.norm(whole), whole.copy(), list(range(x.shape[1])), []
    for _ in range(count):
        values = []
        for index in left:
            less = now - np.outer(x[:, index], x[:, index])
            values.append(np.vdot(whole, less) / (norm * np.linalg.norm(less)))
        best = left[int(np.argmax(values))]
        now = now - np.outer(x[:, best], x[:, best])
        left.remove(best)
        order.append(best)
    return order


def _brute_force() -> tuple[Callable[[Any], Callable[[int], float]], str]:
    """`x -> (index -> CKA)` in the dtype of x, and with what."""
    try:
        import torch
    except ImportError:
        return _brute_force_jax, "JAX"

    def brute_force(x):
        x = torch.as_tensor(x)

        def centred(features):
            return features - features.mean(0, keepdim=True)

        def similarity(index):
            changed = x.clone()
            changed[:, index] = 0.0
            a, b = centred(x), centred(changed)
            cross = torch.linalg.norm(a.T @ b) ** 2
            return float(cross / (torch.linalg.norm(a.T @ a) * torch.linalg.norm(b.T @ b)))

        return similarity

    return brute_force, "PyTorch"


def _brute_force_jax(x: Any) -> Callable[[int], float]:
    with jax.enable_x64(x.dtype == np.float64):
        placed = jnp.asarray(x)

    # An argument, so that nothing of it is computed when this is compiled.
    @jax.jit
    def value(x, index):
        changed = x.at[:, index].set(0.0)
        a, b = x - x.mean(0), changed - changed.mean(0)
        cross = jnp.sum((a.T @ b) ** 2)
        return cross / (jnp.linalg.norm(a.T @ a) * jnp.linalg.norm(b.T @ b))

    def similarity(index):
        with jax.enable_x64(x.dtype == np.float64):
            return float(value(placed, index))

    return similarity


if __name__ == "__main__":
    main()
