"""What gates add to a training step, beside gates on features and a PyTorch layer, in one process.

    python benchmarks/gates.py                        # PreResNet-20, batch 128
    python benchmarks/gates.py --network lenet5

The candidates run in turn; printed are medians, the median of the ratios to the same network
without gates (PyTorch's to its own), and (of JAX) temporary memory. A step is SGD with momentum
and coupled decay. PyTorch takes part if it is installed, with the layer of the published code
written anew: it multiplies features.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from timing import blocked, in_turn, ratio

from ntt_sparse import models
from ntt_sparse.gates import channels, dam, layer
from ntt_sparse.models import gated
from ntt_sparse.training import terms

_SHAPES = {"preresnet20": (32, 32, 3), "lenet5": (28, 28, 1)}
_PENALTY = 0.1


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison that the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=_SHAPES, default="preresnet20")
    parser.add_argument("--batch", type=int, default=128, help="examples (default 128)")
    parser.add_argument("--rounds", type=int, default=9, help="turns (default 9)")
    options = parser.parse_args(arguments)
    if min(options.batch, options.rounds) < 1:
        parser.error("expected at least 1 example and 1 round")
    rng = np.random.default_rng(0)
    shape = _SHAPES[options.network]
    x = rng.normal(size=(options.batch, *shape)).astype(np.float32)
    y = rng.integers(0, 10, options.batch)
    found, temporary = _in_jax(options.network, x, y)
    found |= _in_torch(options.network, x, y)
    times = in_turn(found, options.rounds)
    print(f"\na training step of {options.network}, batch {options.batch}")
    print(f"{'':<26}{'median ms':>10}{'ratio':>8}{'temp MiB':>10}")
    for name, seconds in times.items():
        base = "torch, no gates" if name.startswith("torch") else "no gates"
        memory = f"{temporary[name]:>10.1f}" if name in temporary else ""
        print(
            f"{name:<26}{1e3 * statistics.median(seconds):>10.1f}"
            f"{ratio(times, name, base):>8.3f}{memory}"
        )


def _in_jax(network: str, x: Any, y: Any) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """A compiled step of each kind, and its temporary memory in MiB."""
    shape = x.shape[1:]
    bare, gated_one = models.create(network), models.create(network, kind=dam.Dam())
    variables = dict(gated_one.init(jax.random.key(0), jnp.zeros((1, *shape))))
    params = variables.pop("params")
    plain = dict(bare.init(jax.random.key(0), jnp.zeros((1, *shape))))["params"]
    sizes = channels.sizes(gated_one.network(shape))
    offsets = {path: gate["beta"] for path, gate in layer.find(params).items()}
    optimizer = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.05, momentum=0.9))

    def task(apply, state):
        outputs, state = apply(state)
        return jnp.mean(terms.example_losses(outputs, jnp.asarray(y), "cross_entropy")), state

    def run(module, params, state):
        return module.apply({"params": params, **state}, x, train=True, mutable=list(state))

    def without(params, state):
        return task(functools.partial(run, bare, params), state)

    def folded(params, state):
        loss, state = task(functools.partial(run, gated_one, params), state)
        betas = [gate["beta"] for gate in layer.find(params).values()]
        return loss + _PENALTY * dam.penalty(betas), state

    def on_features(both, state):
        params, betas = both

        def multiply(call, args, kwargs, context):
            result = call(*args, **kwargs)
            path = "/".join((*context.module.path, "gate"))
            if not isinstance(context.module, gated.Conv | gated.Dense) or path not in sizes:
                return result
            return result * dam.gate(betas[path], sizes[path])

        with nn.intercept_methods(multiply):
            loss, state = task(functools.partial(run, bare, params), state)
        return loss + _PENALTY * dam.penalty(betas), state

    candidates, temporary = {}, {}
    for name, objective, start in (
        ("no gates", without, plain),
        ("gates on weights (ours)", folded, params),
        ("gates on features", on_features, (plain, offsets)),
    ):

        def step(params, opt_state, state, objective=objective):
            (_, state), grads = jax.value_and_grad(objective, has_aux=True)(params, state)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, dict(state)

        inputs = (start, optimizer.init(start), variables)
        compiled = jax.jit(step).lower(*inputs).compile()
        temporary[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        candidates[name] = functools.partial(blocked, compiled, *inputs)
    return candidates, temporary


def _in_torch(network: str, x: Any, y: Any) -> dict[str, Callable[[], Any]]:
    try:
        import gates_torch
    except ImportError:
        return {}
    return {
        f"torch, {'gates on features' if gates else 'no gates'}": gates_torch.step(
            network, x, y, gates=gates, penalty=_PENALTY
        )
        for gates in (False, True)
    }


if __name__ == "__main__":
    main()
