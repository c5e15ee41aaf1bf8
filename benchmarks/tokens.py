"""Inference of a vision transformer that drops tokens, beside the whole one, in one process.

    python benchmarks/tokens.py                        # DeiT-Tiny, 64 images of 224 x 224
    python benchmarks/tokens.py --network vit_patch4 --size 32

The candidates run in turn; printed are medians, images in a second, the median of the ratios of
throughput to the whole network, multiply-adds, and temporary memory. Weights are random: what a
network costs does not depend on them.
"""

import argparse
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from timing import blocked, in_turn, ratio

from ntt_sparse import models
from ntt_sparse.models.redundancy import Redundancy
from ntt_sparse.models.tokens import DynamicTransformer, dynamic_multiply_adds
from ntt_sparse.models.vit import VisionTransformer, multiply_adds

_WHOLE = "all tokens"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison that the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="deit_tiny", help="a vision transformer")
    parser.add_argument("--size", type=int, default=224, help="of images (default 224)")
    parser.add_argument("--batch", type=int, default=64, help="images (default 64)")
    parser.add_argument("--rounds", type=int, default=9, help="turns (default 9)")
    options = parser.parse_args(arguments)
    if min(options.size, options.batch, options.rounds) < 1:
        parser.error("expected at least 1 pixel, 1 image and 1 round")
    try:
        module = models.create(options.network, num_outputs=1000)
    except ValueError as error:
        parser.error(str(error))
    if not isinstance(module, VisionTransformer):
        parser.error(f"--network is {options.network!r}, expected a vision transformer")
    shape = (options.size, options.size, 3)
    x = jax.random.normal(jax.random.key(0), (options.batch, *shape))
    places = tuple(module.depth * quarter // 4 for quarter in (1, 2, 3))
    networks: dict[str, Any] = {_WHOLE: module}
    for keep in (0.9, 0.7):
        networks[f"keep {keep}"] = DynamicTransformer(module, keep, places)
    networks["keep 0.7, with CKA"] = DynamicTransformer(module, 0.7, places, Redundancy())
    candidates, costs, temporary = {}, {}, {}
    for name, network in networks.items():
        whole = isinstance(network, VisionTransformer)
        costs[name] = (multiply_adds if whole else dynamic_multiply_adds)(network, shape)
        variables = jax.jit(network.init)(jax.random.key(1), jnp.zeros((1, *shape)))
        compiled = jax.jit(network.apply).lower(variables, x).compile()
        temporary[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        candidates[name] = functools.partial(blocked, compiled, variables, x)
    times = in_turn(candidates, options.rounds)
    print(f"\n{options.network}, {options.batch} images of {options.size} x {options.size}")
    print(f"{'':<20}{'median ms':>10}{'images/s':>10}{'ratio':>8}{'GMAC':>8}{'temp MiB':>10}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(
            f"{name:<20}{1e3 * median:>10.1f}{options.batch / median:>10.1f}"
            f"{1 / ratio(times, name, _WHOLE):>8.2f}{costs[name] / 1e9:>8.3f}"
            f"{temporary[name]:>10.1f}"
        )


if __name__ == "__main__":
    main()
