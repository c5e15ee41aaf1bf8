"""Floating-point operations of the structured tangent kernel, counted by hand.

XLA's own count leaves out the bodies of loops. Only matrix products are counted, at two
operations for a multiplication and an addition.
"""

from typing import NamedTuple

import jax
from flax import linen as nn

from ntt_sparse.models import gated


class Layer(NamedTuple):
    """A matrix of p inputs and q outputs, applied at t positions."""

    positions: int
    inputs: int
    outputs: int
    convolution: bool


def layers(module: nn.Module, params: dict, shape: tuple[int, ...]) -> list[Layer]:
    """The layers of a network whose layers are named in order, `Conv_*` then `Dense_*`."""

    def run(params):
        outputs, state = module.apply(
            {"params": params},
            jax.numpy.zeros((1, *shape)),
            capture_intermediates=lambda m, _: isinstance(m, gated.Conv | gated.Dense),
            mutable=["intermediates"],
        )
        return outputs, state["intermediates"]

    _, seen = jax.eval_shape(run, params)
    found = []
    for name in sorted(params, key=lambda n: (not n.startswith("Conv"), int(n.split("_")[1]))):
        kernel, result = params[name]["kernel"].shape, seen[name]["__call__"][0].shape
        positions = 1
        for size in result[1:-1]:
            positions *= size
        matrix = (kernel[0] * kernel[1] * kernel[2], kernel[3]) if len(kernel) == 4 else kernel
        found.append(Layer(positions, *matrix, len(kernel) == 4))
    return found


def count(layers: list[Layer], n: int, k: int, density: float) -> dict[str, float]:
    """Operations for a batch of n, its halves against each other, k outputs.

    The Jacobians of masked convolutions meet in their kept columns alone.

    Returns:
        `"teacher"` for its kernel, `"student"` for that of the masked network,
        and `"gradient"` for what the derivative of the latter adds.
    """
    pairs = (n // 2) * (n - n // 2)
    total = {"teacher": 0.0, "student": 0.0, "gradient": 0.0}

    def add(operations, derivatives, *names):
        for name in names:
            total[name] += operations
        if "student" in names:
            total["gradient"] += operations * derivatives

    for i, (t, p, q, convolution) in enumerate(layers):
        first = i == 0
        weights = 2.0 * n * t * p * q
        add(weights, 1 if first else 2, "teacher", "student")
        if not first:
            add(k * weights, 2, "teacher", "student")
        gram = 2.0 * pairs * k * k * q
        if convolution:
            add(k * weights, 1 if first else 2, "teacher", "student")
            add(gram * p, 2, "teacher")
            add(gram * p * density, 2, "student")
        else:
            add(2.0 * pairs * p + gram, 2, "teacher")
            add(2.0 * pairs * p * q, 0 if first else 1, "student")
            add(gram, 2, "student")
    return total
