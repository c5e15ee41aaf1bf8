"""Masked training steps of ResNet-50 and DeiT-Small on images of 224 x 224.

    python benchmarks/large.py
    python benchmarks/large.py --models=resnet50 --batch=64 --steps=20

For each network, in a process of its own: the weights and how many its masks keep, seconds to
compile a step of SGD with momentum, seconds of a step, the loss before and after, and the most
memory that the process (on a CPU) has held.
"""

import argparse
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntt_sparse import models
from ntt_sparse.pruning import masks, saliency
from ntt_sparse.pruning.transform import keep_masked
from ntt_sparse.training import state, step, terms

_SHAPE, _CLASSES = (224, 224, 3), 1000
_OPTIONS: dict[str, dict[str, Any]] = {"resnet50": {"stem": "imagenet"}, "deit_small": {}}


def measure(name: str, batch_size: int, steps: int, density: float) -> str:
    """One network: a line of what was measured."""
    module = models.create(name, num_outputs=_CLASSES, **_OPTIONS[name])
    x = jax.random.normal(jax.random.key(0), (batch_size, *_SHAPE))
    batch = x, jnp.arange(batch_size) % _CLASSES
    variables = dict(jax.jit(module.init)(jax.random.key(1), x))
    params = variables.pop("params")
    kept = masks.from_scores(saliency.magnitude(params), density, scope="layer")
    optimizer = keep_masked(optax.sgd(1e-3, momentum=0.9))
    step_fn = step.make_step(
        {"task": terms.task()},
        optimizer,
        forward=terms.masked_forward(terms.without_features(module)),
    )
    member = state.create_member(
        masks.apply(params, kept), kept, optimizer, jax.random.key(2), model_state=variables
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    began = time.perf_counter()
    compiled = jax.jit(step_fn, donate_argnums=0).lower(member, batch, jnp.int32(0)).compile()
    compiling = time.perf_counter() - began
    losses, seconds = [], []
    for index in range(steps):
        began = time.perf_counter()
        member, logs = compiled(member, batch, jnp.int32(index))
        losses.append(float(logs["loss"]))
        seconds.append(time.perf_counter() - began)
    pruned = jax.tree.map(
        lambda leaf, mask: None if mask is None else jnp.any(jnp.where(mask, 0, leaf)),
        member.params,
        member.masks,
    )
    if not np.all(np.isfinite(losses)) or any(map(bool, jax.tree.leaves(pruned))):
        raise SystemExit(f"{name}: a loss is not finite, or a pruned weight came back: {losses}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return (
        f"{name}: {count / 1e6:.1f} million weights, density {masks.density(member.masks):.3f}, "
        f"batch {batch_size}: compiled in {compiling:.1f} s, {np.median(seconds):.2f} s a step, "
        f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {peak:.2f} GiB at most"
    )


def main() -> None:
    """Measures each network that the flags name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*_OPTIONS], default=[*_OPTIONS])
    parser.add_argument("--batch", type=int, default=2, help="examples (default 2)")
    parser.add_argument("--steps", type=int, default=3, help="steps (default 3)")
    parser.add_argument("--density", type=float, default=0.1, help="kept (default 0.1)")
    options = parser.parse_args()
    if options.batch < 1 or options.steps < 1 or not 0 < options.density <= 1:
        parser.error("expected one example and step or more, and a density in (0, 1]")
    if len(options.models) == 1:
        print(measure(options.models[0], options.batch, options.steps, options.density))
        return
    for name in options.models:
        flags = [f"--{key}={getattr(options, key)}" for key in ("batch", "steps", "density")]
        subprocess.run([sys.executable, __file__, *flags, f"--models={name}"], check=True)


if __name__ == "__main__":
    main()
