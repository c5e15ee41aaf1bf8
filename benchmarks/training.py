"""Images per second in training, beside a loop written by hand and PyTorch, in one process.

    python benchmarks/training.py                         # all networks, batch 64
    python benchmarks/training.py --network resnet20 --batch 128

The candidates run epochs of some batches in turn; printed are images per second (from the median of
seconds), and the median over turns of the speed relative to the loop by hand. `ours` are the
compiled chunks of `ntt_sparse.training.program` with named terms, sums of logs and checks of finite
numbers. `by hand` is what one writes without: a jitted step with donated arguments, called from a
loop in Python. Both train the same masked network, a tenth of whose weights are there, with SGD and
momentum, on images that stay on the device and come in a new order each epoch. PyTorch, if it is
installed, trains the whole network on one batch, as it has no masks, with as many threads as
`NPROC` says.
"""

import argparse
import functools
import json
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import in_turn, ratio

from ntt_sparse import models
from ntt_sparse.pruning import masks, saliency
from ntt_sparse.pruning.transform import keep_masked
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import terms
from ntt_sparse.training.program import make_program
from ntt_sparse.training.state import create_member
from ntt_sparse.training.step import make_step

SHAPES = {
    "lenet_300_100": (28, 28, 1), "lenet5_caffe": (28, 28, 1), "resnet20": (32, 32, 3),
    "preresnet20": (32, 32, 3), "vit_nano_patch4": (28, 28, 1),
}  # fmt: skip
_DENSITY = 0.1


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison that the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--batch", type=int, default=64, help="examples (default 64)")
    add("--steps", type=int, default=16, help="batches of an epoch (default 16)")
    add("--rounds", type=int, default=9, help="turns (default 9)")
    add("--json", type=pathlib.Path, help="file to which the numbers are written")
    options = parser.parse_args(arguments)
    if min(options.batch, options.steps, options.rounds) < 1:
        parser.error("expected at least 1 example, 1 batch and 1 round")
    print(f"JAX {jax.__version__}, {jax.default_backend()}, batch {options.batch}")
    rows = [
        measure(network, options.batch, options.steps, options.rounds)
        for network in options.network
    ]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(network: str, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Measures and prints the training of one network."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch * steps, *SHAPES[network])).astype(np.float32)
    y = rng.integers(0, 10, batch * steps).astype(np.int32)
    candidates = {
        "ours": ours(network, x, y, batch, steps),
        "by hand": _by_hand(network, x, y, batch, steps),
        **_torch(network, x[:batch], y[:batch].astype(np.int64), steps),
    }
    times = in_turn(candidates, rounds)
    print(f"\n{network}\n{'':<10}{'images/s':>10}{'to by hand':>12}")
    row: dict[str, Any] = {"network": network, "batch": batch, "steps": steps}
    for name, seconds in times.items():
        speed = len(x) / statistics.median(seconds)
        row[name] = {"images_per_second": speed, "ratio": ratio(times, "by hand", name)}
        print(f"{name:<10}{speed:>10.0f}{row[name]['ratio']:>12.2f}", flush=True)
    return row


def start(network: str, shape: tuple[int, ...]) -> tuple[Any, Any, Any, Any]:
    """The network, its parameters and masks, and what else it carries from step to step."""
    module = models.create(network)
    state = dict(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *shape))))
    params = state.pop("params")
    scores = saliency.random(jax.random.key(1), params, prunable=masks.kernels)
    drawn = masks.from_scores(scores, _DENSITY, scope="layer")
    return module, masks.apply(params, drawn), drawn, state


def ours(
    network: str,
    x: Any,
    y: Any,
    batch: int,
    steps: int,
    *,
    members: int = 1,
    mode: meshes.MemberMode | None = None,
) -> Callable[[], Any]:
    """Trains an epoch with each call and returns the state; members differ in their order."""
    module, params, drawn, model_state = start(network, x.shape[1:])
    optimizer = keep_masked(optax.sgd(0.05, momentum=0.9))
    step = make_step(
        {"task": terms.task()},
        optimizer,
        forward=terms.masked_forward(terms.without_features(module)),
    )
    keys = jax.random.split(jax.random.key(2), members)
    together = jax.vmap(lambda key: create_member(params, drawn, optimizer, key, (), model_state))
    mode = mode or meshes.default_member_mode(params)
    mesh = meshes.make_mesh()
    program = make_program(step, batch_size=batch, mesh=mesh, mode=mode)
    data = jax.device_put((x, y), meshes.replicated(mesh))
    state = program.init(together(keys), data)

    def epoch() -> Any:
        nonlocal state
        begun = int(state.step)
        order = program.permutations(state, begun // steps, data)
        state = jax.block_until_ready(program.chunk(state, data, order, jnp.int32(begun + steps)))
        return state

    return epoch


def _by_hand(network: str, x: Any, y: Any, batch: int, steps: int) -> Callable[[], Any]:
    module, params, drawn, model_state = start(network, x.shape[1:])
    optimizer = optax.sgd(0.05, momentum=0.9)

    def masked(params: Any) -> Any:
        return jax.tree.map(
            lambda mask, leaf: leaf if mask is None else leaf * mask, drawn, params,
            is_leaf=lambda leaf: leaf is None,
        )  # fmt: skip

    def loss(params, state, x, y):
        outputs, state = module.apply(
            {"params": masked(params), **state}, x, train=True, mutable=list(state)
        )
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, y)), state

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, opt_state, state, images, labels, indices):
        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(
            params, state, images[indices], labels[indices]
        )
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return masked(optax.apply_updates(params, updates)), opt_state, dict(state), value

    images, labels = jax.device_put((x, y))
    carried = (params, optimizer.init(params), model_state)
    rng = np.random.default_rng(2)

    def epoch() -> Any:
        nonlocal carried
        order = jnp.asarray(rng.permutation(len(x)).reshape(steps, batch))
        value = None
        for indices in order:
            *carried, value = step(*carried, images, labels, indices)
        return jax.block_until_ready((carried, value))

    return epoch


def _torch(network: str, x: Any, y: Any, steps: int) -> dict[str, Callable[[], Any]]:
    try:
        import convolutions_torch
    except ImportError:
        return {}
    if network not in convolutions_torch.NETWORKS:
        return {}
    step = convolutions_torch.step(network, x, y)
    return {"torch": lambda: [step() for _ in range(steps)]}


if __name__ == "__main__":
    main()
