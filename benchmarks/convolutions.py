"""Training steps with each way to compute convolutions, and with PyTorch, in one process.

    python benchmarks/convolutions.py                        # all networks, batch 32
    python benchmarks/convolutions.py --network preresnet20 --batch 128

The candidates run in turn; printed are medians and minima, the median of the ratios to our way
(more than one is slower), and (of JAX) temporary memory. They are `ours`
(`ntt_sparse.models.convolution`), `XLA`, whose convolutions are all XLA's, `4-D products`, whose
convolutions of one pixel are products of images, not of matrices, and `im2col`, which puts the
patches of all other convolutions side by side for one product. A step is SGD with momentum and
coupled decay. PyTorch takes part if it is installed, with as many threads as `NPROC` says.
"""

import argparse
import functools
import json
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import blocked, in_turn, ratio

from ntt_sparse import models
from ntt_sparse.models import gated
from ntt_sparse.models.convolution import convolve
from ntt_sparse.training import terms

_SHAPES = {
    "preresnet20": (32, 32, 3), "resnet20": (32, 32, 3), "vgg19": (32, 32, 3),
    "lenet5": (28, 28, 1), "lenet5_caffe": (28, 28, 1),
}  # fmt: skip


def _xla(x: Any, kernel: Any, stride: int, padding: Any) -> Any:
    padding = padding if isinstance(padding, str) else [padding] * 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _products_4d(x: Any, kernel: Any, stride: int, padding: Any) -> Any:
    if len(kernel) > 1:
        return _xla(x, kernel, stride, padding)
    return x[:, ::stride, ::stride] @ kernel[0, 0]


def _im2col(x: Any, kernel: Any, stride: int, padding: Any) -> Any:
    size = len(kernel)
    if size == 1:
        return convolve(x, kernel, stride, padding)
    sizes = (size, size), (stride, stride)
    given = (padding,) * 2
    if isinstance(padding, str):
        given = jax.lax.padtype_to_pads(x.shape[1:3], *sizes, padding)
    x = jnp.pad(x, [(0, 0), *given, (0, 0)])
    height, width = (length - size + 1 for length in x.shape[1:3])
    views = [
        x[:, row : row + height : stride, column : column + width : stride]
        for row in range(size)
        for column in range(size)
    ]
    patches = jnp.concatenate(views, axis=-1)
    y = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(*patches.shape[:-1], -1)


_WAYS = {"ours": convolve, "XLA": _xla, "4-D products": _products_4d, "im2col": _im2col}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison that the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", nargs="+", choices=_SHAPES, default=list(_SHAPES))
    add("--way", nargs="+", choices=_WAYS, default=list(_WAYS), help="beside ours")
    add("--batch", type=int, default=32, help="examples (default 32)")
    add("--rounds", type=int, default=9, help="turns (default 9)")
    add("--json", type=pathlib.Path, help="file to which the numbers are written")
    options = parser.parse_args(arguments)
    if min(options.batch, options.rounds) < 1:
        parser.error("expected at least 1 example and 1 round")
    print(f"JAX {jax.__version__}, {jax.default_backend()}")
    rows = [
        measure(network, options.batch, ["ours", *options.way], options.rounds)
        for network in options.network
    ]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(network: str, batch: int, ways: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measures and prints the steps of one network."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, *_SHAPES[network])).astype(np.float32)
    y = rng.integers(0, 10, batch)
    candidates, temporary = {}, {}
    for way in dict.fromkeys(ways):
        with mock.patch.object(gated, "convolve", _WAYS[way]):
            candidates[way], temporary[way] = _step(network, x, y)
    times = in_turn(candidates | _torch_step(network, x, y), rounds)
    print(f"\na training step of {network}, batch {batch}")
    print(f"{'':<16}{'median ms':>10}{'least ms':>10}{'to ours':>9}{'temp MiB':>10}")
    row: dict[str, Any] = {"network": network, "batch": batch}
    for name, seconds in times.items():
        median, least = (1e3 * each(seconds) for each in (statistics.median, min))
        row[name] = {"median": median, "least": least, "ratio": ratio(times, name, "ours")}
        memory = f"{temporary[name]:>10.1f}" if name in temporary else ""
        print(
            f"{name:<16}{median:>10.1f}{least:>10.1f}{row[name]['ratio']:>9.2f}{memory}", flush=True
        )
    return row


def _step(network: str, x: Any, y: Any) -> tuple[Callable[[], Any], float]:
    """A compiled step, and its temporary memory in MiB."""
    module = models.create(network)
    shapes = dict(jax.eval_shape(module.init, jax.random.key(0), x[:1]))
    variables = jax.tree.map(functools.partial(_drawn, np.random.default_rng(1)), shapes)
    params = variables.pop("params")
    optimizer = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.05, momentum=0.9))

    def objective(params, state, x, y):
        outputs, state = module.apply(
            {"params": params, **state}, x, train=True, mutable=list(state)
        )
        return jnp.mean(terms.example_losses(outputs, y, "cross_entropy")), state

    def step(params, opt_state, state, x, y):
        (_, state), grads = jax.value_and_grad(objective, has_aux=True)(params, state, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, dict(state)

    inputs = jax.device_put((params, optimizer.init(params), variables, x, jnp.asarray(y)))
    compiled: Any = jax.jit(step).lower(*inputs).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return functools.partial(blocked, compiled, *inputs), temporary


def _drawn(rng: Any, leaf: Any) -> Any:
    """Numbers of about the size of weights: what a step costs does not depend on them."""
    if leaf.ndim == 1:
        # Scales and variances are positive.
        return jnp.ones(leaf.shape, leaf.dtype)
    fan_in = leaf.size // leaf.shape[-1]
    return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), leaf.dtype)


def _torch_step(network: str, x: Any, y: Any) -> dict[str, Callable[[], Any]]:
    try:
        import convolutions_torch
    except ImportError:
        return {}
    return {"torch": convolutions_torch.step(network, x, y)}


if __name__ == "__main__":
    main()
