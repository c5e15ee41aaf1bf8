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
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ntt_sparse.ntk import _contract, _program
from ntt_sparse.ntk._varying import varying_as
from ntt_sparse.ntk.jacobian import FlatFn, LeafMasks, Leaves, select, vector_products

# The most numbers in an explicit Jacobian of one leaf over both batches: 256 MiB in float32.
_JACOBIAN_LIMIT = 2**26


class Dense(NamedTuple):
    """The one use of a matrix: a product with a single vector per example."""

    step: int
    side: int
    """Which operand of the product the matrix is."""
    axis: int
    """Which axis of the matrix is summed over."""


class Plan(NamedTuple):
    """How each leaf, by its number, enters the kernel. Unused leaves are in no group."""

    program: _program.Program
    output: jax.ShapeDtypeStruct
    """The outputs of one example, `(k,)`."""
    dense: dict[int, Dense]
    direct: list[int]
    """Leaves that enter through their own small Jacobian."""
    rest: list[int]
    """Leaves left to NTK-vector products."""


class Factors(NamedTuple):
    """What a batch contributes, by leaf number."""

    inputs: dict[int, Float[Array, "n p"]]
    deltas: dict[int, Float[Array, "n k q"]]
    jacobians: dict[int, Float[Array, "n k ..."]]


def plan(
    fn: FlatFn, leaves: Leaves, x1: Shaped[Array, "n1 ..."], x2: Shaped[Array, "n2 ..."]
) -> Plan:
    """Reads the program of `fn` and finds a rule for each leaf."""
    program = _program.read(lambda w, example: fn(w, example[None])[0], leaves, x1[0])
    output = jax.eval_shape(lambda w: fn(w, x1[:1])[0], leaves)
    result = Plan(program, output, {}, [], [])
    for number, leaf in enumerate(leaves):
        steps = _program.uses(program, number)
        site = _dense_site(program, number, steps)
        if site is not None:
            result.dense[number] = site
        elif steps and (len(x1) + len(x2)) * output.size * leaf.size <= _JACOBIAN_LIMIT:
            result.direct.append(number)
        elif steps:
            result.rest.append(number)
    return result


def has_rules(
    fn: FlatFn, leaves: Leaves, x1: Shaped[Array, "n1 ..."], x2: Shaped[Array, "n2 ..."]
) -> bool:
    """Whether no leaf would be left to NTK-vector products."""
    return not plan(fn, leaves, x1, x2).rest


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
    one = _factors(layout, leaves, x1)
    two = one if x2 is x1 else _factors(layout, leaves, x2)
    shape = (len(x1), len(x2), *layout.output.shape * 2)
    kernels = [jnp.zeros(shape, layout.output.dtype)]
    for leaf, site in layout.dense.items():
        mask = masks[leaf]
        mask = mask.T if mask is not None and site.axis == 1 else mask
        factors = (one.inputs[leaf], two.inputs[leaf], one.deltas[leaf], two.deltas[leaf])
        kernels.append(_contract.dense(*factors, mask))
    for leaf in layout.direct:
        jacobian = select(one.jacobians[leaf], masks[leaf])
        kernels.append(_contract.jacobians(jacobian, two.jacobians[leaf]))
    if trace:
        kernels = [jnp.einsum("ijoo->ij", kernel) for kernel in kernels]
    if layout.rest:
        some = layout.rest
        partial = [leaves[leaf] for leaf in some]
        partial_masks = [masks[leaf] for leaf in some]

        def partial_fn(values, x):
            return fn(_replaced(leaves, dict(zip(some, values, strict=True))), x)

        kernels.append(vector_products(partial_fn, partial, partial_masks, x1, x2, trace=trace))
    return sum(kernels)


def _replaced(leaves: Leaves, some: Mapping[int, Array]) -> Leaves:
    return [some.get(number, leaf) for number, leaf in enumerate(leaves)]


def _dense_site(program: _program.Program, leaf: int, steps: list[int | None]) -> Dense | None:
    """The use of a leaf as the matrix of a dense layer, `None` if it is used otherwise."""
    if len(steps) != 1 or steps[0] is None:
        return None
    equation, inputs, _ = program.steps[steps[0]]
    if equation.primitive.name != "dot_general":
        return None
    side = inputs.index(leaf)
    contracted, batched = equation.params["dimension_numbers"]
    matrix, vector = (equation.invars[i].aval.shape for i in (side, 1 - side))
    # One vector per example: whatever is not summed over has size one.
    if len(matrix) != 2 or batched[0] or len(contracted[side]) != 1:
        return None
    (axis,) = contracted[side]
    return Dense(steps[0], side, axis) if math.prod(vector) == matrix[axis] else None


def _factors(layout: Plan, leaves: Leaves, x: Shaped[Array, "n ..."]) -> Factors:
    """Layer inputs, output sensitivities and direct Jacobians of all examples."""
    steps = layout.program.steps
    results = {
        leaf: steps[site.step].equation.outvars[0].aval for leaf, site in layout.dense.items()
    }

    def output(taps, direct, example):
        by_step = {layout.dense[leaf].step: tap for leaf, tap in taps.items()}
        value, recorded = _program.run(layout.program, _replaced(leaves, direct), example, by_step)
        inputs = {
            leaf: recorded[site.step][1 - site.side].reshape(-1)
            for leaf, site in layout.dense.items()
        }
        return value, inputs

    def factors(example):
        taps = {leaf: jnp.zeros(aval.shape, aval.dtype) for leaf, aval in results.items()}
        taps = varying_as(taps, (example, leaves))
        direct = {leaf: leaves[leaf] for leaf in layout.direct}
        value, pull, inputs = jax.vjp(lambda *a: output(*a, example), taps, direct, has_aux=True)
        basis = varying_as(jnp.eye(value.size, dtype=value.dtype), value)
        deltas, jacobians = jax.vmap(pull)(basis)
        deltas = {leaf: delta.reshape(value.size, -1) for leaf, delta in deltas.items()}
        return Factors(inputs, deltas, jacobians)

    return jax.vmap(factors)(x)
