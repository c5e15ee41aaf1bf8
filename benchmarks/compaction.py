"""How much faster gated networks are once their closed channels are taken out.

    python benchmarks/compaction.py                          # all networks, all gates
    python benchmarks/compaction.py --network lenet5 --gate dam --keep 0.2

Networks have random weights and statistics: what a network costs does not depend on them. Of
DAM the offsets are such that a fraction of all channels is open, the same of each layer; Network
Slimming and ChipNet cut random scales and gates to that fraction of all channels. Printed are
what is left (channels, parameters, multiply-adds), the constants that stand for the rest, the
largest difference of outputs relative to the largest output, and for each batch the median of
one evaluation before and after, and of their ratio, the calls in turn; and the ratio to the whole
network run as the small one is (`ntt_sparse.models.described`), whose convolutions of few input
channels are faster on a CPU by themselves.
"""

import argparse
import functools
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntt_sparse import models
from ntt_sparse.gates import channels, chipnet, layer, slimming
from ntt_sparse.gates.chipnet import ChipNet
from ntt_sparse.gates.dam import Dam
from ntt_sparse.gates.slimming import Slimming
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.pruning.compact import compact
from ntt_sparse.training import deploy

_SHAPES = {"lenet5": (28, 28, 1), "vgg19": (32, 32, 3), "preresnet20": (32, 32, 3)}
_KINDS = {"dam": Dam, "slimming": Slimming, "chipnet": ChipNet}


def pruned(network: str, gate: str, keep: float) -> tuple[Any, dict[str, Any], tuple[int, ...]]:
    """A module with some of its gates closed, its variables, and the shape of an input."""
    shape, kind = _SHAPES[network], _KINDS[gate]()
    module = models.create(network, kind=kind)
    variables = _variables(module, shape)
    description = module.network(shape)
    sizes = channels.sizes(description)
    if gate == "dam":
        # Between two order numbers.
        closed = {path: n - max(round(keep * n), 1) for path, n in sizes.items()}
        offsets = {path: -5.0 * (closed[path] + 0.5) / n for path, n in sizes.items()}
        gates = {path: {"beta": jnp.float32(beta)} for path, beta in offsets.items()}
        return module, {**variables, "params": layer.replace(variables["params"], gates)}, shape
    params = layer.parameters(kind, variables["params"], description)
    if gate == "slimming":
        scales = {path: each["scale"] for path, each in params.items()}
        open_ = slimming.keep(scales, 1 - keep, at_least=1)
        masks = layer.masks(kind, variables["params"], description, open_)
        return (
            module,
            {**variables, "params": pruning_masks.apply(variables["params"], masks)},
            shape,
        )
    # Some of the channels of each layer are among the highest.
    rng = np.random.default_rng(1)
    values = {
        path: jnp.asarray(rng.permutation(np.linspace(0, 0.9, n))) for path, n in sizes.items()
    }
    return module, {**variables, **layer.state(description, open=chipnet.cut(values, keep))}, shape


def _variables(module: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return jax.tree_util.tree_map_with_path(
        functools.partial(_leaf, np.random.default_rng(0)), dict(shapes)
    )


def _leaf(rng: np.random.Generator, path: Any, like: Any) -> Any:
    noise = rng.standard_normal(like.shape)
    last = path[-1].key
    if last in ("var", "scale"):
        noise = np.exp(0.3 * noise)
    elif last in ("bias", "mean"):
        noise = 0.3 * noise
    else:
        noise = noise / np.sqrt(like.size / like.shape[-1] if like.shape else 1)
    return jnp.asarray(noise, like.dtype)


def measure(
    network: str, gate: str, keep: float, batches: Sequence[int], rounds: int
) -> dict[str, Any]:
    """One row of the table."""
    module, variables, shape = pruned(network, gate, keep)
    small = compact(module, variables, shape)
    bare = models.create(network)
    whole = compact(bare, _variables(bare, shape), shape)
    x = jax.random.normal(jax.random.key(2), (max(batches), *shape))
    before = jax.jit(module.apply)(variables, x)
    after = jax.jit(small.module.apply)(small.variables, x)
    row: dict[str, Any] = {
        "network": network,
        "gate": gate,
        "keep": keep,
        "before": small.before._asdict(),
        "after": small.after._asdict(),
        "constants": small.constants,
        "difference": float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before))),
        "latency": {},
        "backend": jax.default_backend(),
    }
    for batch in batches:
        calls = {
            "before": deploy.compiled(module, variables, x[:batch]),
            "described": deploy.compiled(whole.module, whole.variables, x[:batch]),
            "after": deploy.compiled(small.module, small.variables, x[:batch]),
        }
        times = deploy.latencies(calls, rounds=rounds)
        row["latency"][batch] = {
            **{name: 1e3 * statistics.median(each) for name, each in times.items()},
            "ratio": _ratio(times["before"], times["after"]),
            "described_ratio": _ratio(times["described"], times["after"]),
        }
    return row


def _ratio(times: list[float], base: list[float]) -> float:
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def show(row: dict[str, Any]) -> None:
    """Prints one row."""
    parts = [
        f"{name} {row['after'][name]:,} ({row['after'][name] / row['before'][name]:.1%})"
        for name in row["before"]
    ]
    print(f"\n{row['network']}, {row['gate']}, {row['keep']:g} of channels, {row['backend']}")
    print(f"  {', '.join(parts)}; {row['constants']:,} constants")
    print(f"  outputs differ by {row['difference']:.1e}")
    for batch, times in row["latency"].items():
        print(
            f"  batch {batch}: {times['before']:.2f} ms before, {times['after']:.2f} after, "
            f"{times['ratio']:.2f}x ({times['described_ratio']:.2f}x to the whole as described)",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--network", nargs="+", choices=_SHAPES, default=list(_SHAPES), help="networks")
    add("--gate", nargs="+", choices=_KINDS, default=list(_KINDS), help="kinds of gates")
    add("--keep", type=float, nargs="+", default=[0.5, 0.2], help="fractions of channels")
    add("--batch", type=int, nargs="+", default=[1, 128], help="examples")
    add("--rounds", type=int, default=15, help="turns of each")
    add("--json", type=pathlib.Path, help="file to which the numbers are written")
    options = parser.parse_args(arguments)
    if not all(0 < keep < 1 for keep in options.keep) or min(*options.batch, options.rounds) < 1:
        parser.error("expected fractions between 0 and 1, and 1 or more examples and rounds")
    rows = []
    for network in options.network:
        for gate in options.gate:
            for keep in options.keep:
                rows.append(measure(network, gate, keep, options.batch, options.rounds))
                show(rows[-1])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
