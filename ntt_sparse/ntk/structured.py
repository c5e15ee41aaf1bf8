"""Exact tangent kernels from the structure of a network's layers.

The traced program of the network shows how each weight is used. A dense layer
`a @ W` contributes through its input a and the sensitivities delta of the outputs
to its result (`ntt_sparse.ntk._contract`); the Jacobian by W is never built. A
convolution, or a dense layer applied to several positions, contributes through the
Jacobian that its patches and sensitivities give in one matrix product. One batch of
k backward passes serves all layers.

Weights used in another way, or more than once, contribute through their Jacobian
from the same backward passes. Where a Jacobian would be large, NTK-vector products
take that weight's part instead: slower, never wrong.

References:
    Novak et al., "Fast Finite Width Neural Tangent Kernel", ICML 2022, Section 3.3,
    for the structure without masks.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ntt_sparse.ntk import _contract, _program, _sites
from ntt_sparse.ntk._varying import varying_as
from ntt_sparse.ntk.jacobian import FlatFn, LeafMasks, Leaves, select, vector_products

# The most numbers in an explicit Jacobian of one leaf over both batches: 256 MiB in float32.
_JACOBIAN_LIMIT = 2**26


class Plan(NamedTuple):
    """How each leaf, by its number, enters the kernel. Unused leaves are in no group."""

    program: _program.Program
    output: jax.ShapeDtypeStruct
    """The outputs of one example, `(k,)`."""
    dense: dict[int, _sites.Site]
    """Matrices that meet one vector per example."""
    shared: dict[int, _sites.Site]
    """Matrices that meet several vectors per example, with a Jacobian that can be held."""
    direct: list[int]
    """Leaves used otherwise, with a Jacobian that can be held."""
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
    result = Plan(program, output, {}, {}, [], [])
    for number, leaf in enumerate(leaves):
        site = _sites.find(program, number)
        if site is not None and site.positions == 1:
            result.dense[number] = site
        elif not _program.uses(program, number):
            continue
        elif (len(x1) + len(x2)) * output.size * leaf.size > _JACOBIAN_LIMIT:
            result.rest.append(number)
        elif site is not None:
            result.shared[number] = site
        else:
            result.direct.append(number)
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
    return evaluate(plan(fn, leaves, x1, x2), fn, leaves, masks, x1, x2, trace=trace)


def automatic(
    fn: FlatFn,
    leaves: Leaves,
    masks: LeafMasks,
    x1: Shaped[Array, "n1 ..."],
    x2: Shaped[Array, "n2 ..."],
    *,
    trace: bool = False,
) -> Float[Array, "n1 n2 k k"] | Float[Array, "n1 n2"]:
    """The structured kernel where every leaf has a rule, else that of `vector_products`.

    A leaf without a rule costs as much as the whole kernel by NTK-vector products.
    """
    layout = plan(fn, leaves, x1, x2)
    # The structured trace is taken of the full kernel.
    too_large = trace and len(x1) * len(x2) * layout.output.size**2 > _JACOBIAN_LIMIT
    if layout.rest or too_large:
        return vector_products(fn, leaves, masks, x1, x2, trace=trace)
    return evaluate(layout, fn, leaves, masks, x1, x2, trace=trace)


def evaluate(
    layout: Plan,
    fn: FlatFn,
    leaves: Leaves,
    masks: LeafMasks,
    x1: Shaped[Array, "n1 ..."],
    x2: Shaped[Array, "n2 ..."],
    *,
    trace: bool,
) -> Float[Array, "n1 n2 k k"] | Float[Array, "n1 n2"]:
    """The sum of the kernels of all leaves under a plan for these arguments."""
    one = _factors(layout, leaves, x1)
    two = one if x2 is x1 else _factors(layout, leaves, x2)
    # Masks as the matrices that the weights are at their sites.
    sites = layout.dense | layout.shared
    masks_at = [
        sites[leaf].matrix(mask) if leaf in sites and mask is not None else mask
        for leaf, mask in enumerate(masks)
    ]
    shape = (len(x1), len(x2), *layout.output.shape * 2)
    kernels = [jnp.zeros(shape, layout.output.dtype)]
    for leaf in layout.dense:
        factors = (one.inputs[leaf], two.inputs[leaf], one.deltas[leaf], two.deltas[leaf])
        kernels.append(_contract.dense(*factors, masks_at[leaf]))
    for leaf, jacobian in one.jacobians.items():
        kernels.append(_contract.jacobians(select(jacobian, masks_at[leaf]), two.jacobians[leaf]))
    if trace:
        kernels = [jnp.einsum("ijoo->ij", kernel) for kernel in kernels]
    if layout.rest:
        kernels.append(_rest(layout.rest, fn, leaves, masks, x1, x2, trace))
    return functools.reduce(jnp.add, kernels)


def _rest(rest, fn, leaves, masks, x1, x2, trace):
    """The part of some leaves, by NTK-vector products."""

    def partial_fn(values, x):
        return fn(_replaced(leaves, dict(zip(rest, values, strict=True))), x)

    values, partial_masks = ([tree[leaf] for leaf in rest] for tree in (leaves, masks))
    return vector_products(partial_fn, values, partial_masks, x1, x2, trace=trace)


def _replaced(leaves: Leaves, some: Mapping[int, Array]) -> Leaves:
    return [some.get(number, leaf) for number, leaf in enumerate(leaves)]


def _factors(layout: Plan, leaves: Leaves, x: Shaped[Array, "n ..."]) -> Factors:
    """Layer inputs, output sensitivities and Jacobians of all examples."""
    sites = layout.dense | layout.shared
    # By step, as the two operands of one product may both be weights.
    results = {site.step: layout.program.result(site.step) for site in sites.values()}

    def output(taps, direct, example):
        value, operands = _program.run(layout.program, _replaced(leaves, direct), example, taps)
        return value, {leaf: site.inputs(operands[site.step]) for leaf, site in sites.items()}

    def factors(example):
        taps = {step: jnp.zeros(aval.shape, aval.dtype) for step, aval in results.items()}
        taps = varying_as(taps, (example, leaves))
        direct = {leaf: leaves[leaf] for leaf in layout.direct}
        value, pull, inputs = jax.vjp(
            lambda t, d: output(t, d, example), taps, direct, has_aux=True
        )
        basis = varying_as(jnp.eye(value.size, dtype=value.dtype), value)
        pulled, jacobians = jax.vmap(pull)(basis)
        deltas = {leaf: site.delta(pulled[site.step]) for leaf, site in sites.items()}
        for leaf in layout.shared:
            jacobians[leaf] = _contract.position_sum(inputs[leaf], deltas[leaf])
        return Factors(
            {leaf: inputs[leaf][0] for leaf in layout.dense},
            {leaf: deltas[leaf][:, 0] for leaf in layout.dense},
            jacobians,
        )

    return jax.vmap(factors)(x)
