"""Exact tangent kernels from the structure of a network's layers.

The traced program of the network shows how each weight is used. A dense layer
`a @ W` contributes through its input a and the sensitivities delta of the outputs
to its result (`ntt_sparse.ntk._contract`); the Jacobian by W is never built. One
batch of k backward passes serves all layers. Weights used in another way, or more
than once, contribute through their own Jacobian out of the same backward passes
while that is small, and otherwise by NTK-vector products: slower, never wrong.

References:
    Novak et al., "Fast Finite Width Neural Tangent Kernel", ICML 2022, Section 3.3,
    for the structure without masks.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ntt_sparse.ntk import _contract, _program
from ntt_sparse.ntk._varying import varying_as
from ntt_sparse.ntk.jacobian import FlatFn, LeafMasks, Leaves, select, vector_products

# The most numbers in an explicit Jacobian of one leaf over both batches: 256 MiB in float32.
_JACOBIAN_LIMIT = 2**26


class Plan(NamedTuple):
    """How each leaf (by index) enters the kernel; unused leaves are in no group."""

    program: _program.Program
    dense: dict[int, int]
    """Leaves of dense layers, with the step that uses them."""
    direct: list[int]
    """Leaves that enter through their own small Jacobian."""
    rest: list[int]
    """Leaves left to NTK-vector products."""


def plan(
    fn: FlatFn, leaves: Leaves, x1: Shaped[Array, "n1 ..."], x2: Shaped[Array, "n2 ..."]
) -> Plan:
    """Reads the program of `fn` and finds a rule for each leaf."""
    program = _program.read(lambda w, example: fn(w, example[None])[0], leaves, x1[0])
    k = math.prod(jax.eval_shape(fn, leaves, x1).shape[1:])
    result = Plan(program, {}, [], [])
    for leaf, value in enumerate(leaves):
        steps = _program.uses(program, leaf)
        if len(steps) == 1 and _is_dense(program, steps[0], leaf):
            result.dense[leaf] = steps[0]
        elif steps and (len(x1) + len(x2)) * k * value.size <= _JACOBIAN_LIMIT:
            result.direct.append(leaf)
        elif steps:
            result.rest.append(leaf)
    return result


def structured(
    fn: FlatFn,
    leaves: Leaves,
    masks: LeafMasks,
    x1: Shaped[Array, "n1 ..."],
    x2: Shaped[Array, "n2 ..."],
    *,
    trace: bool = False,
) -> Float[Array, "n1 n2 k k"] | Float[Array, "n1 n2"]:
    """The kernel by the rule of each leaf, see the module; the interface of `vector_products`."""
    layout = plan(fn, leaves, x1, x2)
    inputs1, gradients1 = _factors(layout, leaves, x1)
    inputs2, gradients2 = (inputs1, gradients1) if x2 is x1 else _factors(layout, leaves, x2)
    kernels = []
    for leaf, step in layout.dense.items():
        mask, weight_is_right, contracted = masks[leaf], *_operands(layout.program, step, leaf)
        a1, a2 = inputs1[step], inputs2[step]
        if mask is not None and contracted == 1:
            mask = mask.T
        ...
    return sum(kernels)
