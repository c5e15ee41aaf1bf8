"""Exact tangent kernels from the structure of a network's layers.

The traced program of the network shows how each weight is used. A dense layer
`a @ W` contributes through its input a and the sensitivities delta of the outputs
to its result (`ntt_sparse.ntk._contract`); the Jacobian by W is never built, and the
bias that follows is a further input. A convolution, or a dense layer applied to several
positions, contributes through the Jacobian that its patches and sensitivities give in
one matrix product. One batch of k backward passes serves all layers.

A scale, or the bias of a convolution or of a normalisation, contributes through the sums
over positions of sensitivities, times what it scales: its Jacobian, which the same backward
passes give as they are. So do weights used in any other way, or more than once. Where the
Jacobian of a single pair would be too large, NTK-vector products take that weight's part
instead: slower, never wrong.

References:
    Novak et al., "Fast Finite Width Neural Tangent Kernel", ICML 2022, Section 3.3,
    for the structure without masks.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from ntt_sparse import _program
from ntt_sparse.ntk import _contract, _sites
from ntt_sparse.ntk._blocks import map_blocks
from ntt_sparse.ntk._varying import varying_as
from ntt_sparse.ntk.jacobian import (
    FlatFn,
    LeafMasks,
    Leaves,
    Projections,
    kernel_dtype,
    vector_products,
)

MEMORY_LIMIT = 2**30
"""Bytes that the Jacobians and pairs of one block may take, unless the caller says otherwise."""

# `_SPARSE` and `_CACHE` were measured on two CPU cores, with the networks of `benchmarks/ntk.py`.

# Up to this density, Jacobians of the kept weights alone are worth the gathering.
_SPARSE = 0.25

# Bytes for what a promised density leaves out, which is nothing where the promise holds.
_BEYOND = 2**24

# On CPU, examples go one by one if their sensitivities together exceed so many bytes: those
# of one example then stay in the cache, which measured up to twice as fast as a batch.
_CACHE = 2**23


class Options(NamedTuple):
    """What to compute, and how: see `empirical_ntk`."""

    trace: bool = False
    projections: Projections | None = None
    memory_limit: int = MEMORY_LIMIT
    max_density: float = 1.0


class Plan(NamedTuple):
    """How each leaf, by its number, enters the kernel. Unused leaves are in no group."""

    program: _program.Program
    output: jax.ShapeDtypeStruct
    """The outputs of one example, `(k,)`."""
    dtype: Any
    """Of the kernel."""
    dense: dict[int, _sites.Site]
    """Matrices that meet one vector per example."""
    biases: dict[int, int]
    """By dense leaf, the leaf that is its bias."""
    shared: dict[int, _sites.Site]
    """Matrices that meet several vectors per example."""
    direct: list[int]
    """Leaves used otherwise."""
    rest: list[int]
    """Leaves left to NTK-vector products."""


class Factors(NamedTuple):
    """What a batch contributes, by leaf number."""

    outputs: Float[Array, "n k"]
    probes: Float[Array, "n r k"]
    """The combinations of outputs that sensitivities and Jacobians are of."""
    inputs: dict[int, Float[Array, "n p"]]
    deltas: dict[int, Float[Array, "n r q"]]
    jacobians: dict[int, Float[Array, "n r ..."]]


class Network(NamedTuple):
    """A masked network and how its kernel is made."""

    layout: Plan
    fn: FlatFn
    leaves: Leaves
    masks: list[Any]
    """By leaf, in the shape that the weight has in `Factors`; `None` for all entries."""
    columns: dict[int, Int[Array, " c"]]
    """By leaf, the entries that its Jacobians are made of, where that is not all."""


class Kernel(NamedTuple):
    """A tangent kernel, with the outputs that come with it."""

    kernel: Float[Array, "n1 n2 ..."]
    outputs1: Float[Array, "n1 k"]
    outputs2: Float[Array, "n2 k"]


def plan(
    fn: FlatFn,
    leaves: Leaves,
    x: Shaped[Array, "n ..."],
    memory_limit: int = MEMORY_LIMIT,
    passes: int | None = None,
) -> Plan:
    """Reads the program of `fn` and finds a rule for each leaf.

    `passes` is how many gradients a pair of examples needs, 2 k without projections.
    """
    program = _program.read(lambda w, example: fn(w, example[None])[0], leaves, x[0])
    output = jax.eval_shape(lambda w: fn(w, x[:1])[0], leaves)
    dtype = kernel_dtype(fn, leaves, x[:1])
    result = Plan(program, output, dtype, {}, {}, {}, [], [])
    gradients = dtype.itemsize * (2 * output.size if passes is None else passes)
    others = []
    for number, leaf in enumerate(leaves):
        site = _sites.find(program, number)
        if site is not None and site.positions == site.groups == 1:
            result.dense[number] = site
        elif not _program.uses(program, number):
            continue
        elif gradients * leaf.size > memory_limit:
            others.append((number, result.rest))
        elif site is not None:
            result.shared[number] = site
        else:
            others.append((number, result.direct))
    for number, group in others:
        layer = _sites.bias_of(program, number, result.dense)
        if layer is None or layer in result.biases:
            group.append(number)
        else:
            result.biases[layer] = number
    return result


def structured(
    fn: FlatFn,
    leaves: Leaves,
    masks: LeafMasks,
    x1: Shaped[Array, "n1 ..."],
    x2: Shaped[Array, "n2 ..."],
    options: Options,
    *,
    mixed: bool = True,
) -> Kernel:
    """The kernel by the rule of each leaf, see the module.

    A leaf without a rule costs as much as the whole kernel by NTK-vector products: if
    there is one and not `mixed`, these take all leaves.
    """
    trace, projections = options.trace, options.projections
    arguments = (fn, leaves, masks, x1, x2)
    network = network_of(fn, leaves, masks, x1, options)
    rest = network.layout.rest
    if rest and not mixed:
        kernel = vector_products(*arguments, trace=trace, projections=projections)
        return Kernel(kernel, fn(leaves, x1), fn(leaves, x2))

    def kernel_of(network, options):
        def contracted(ones, twos, rows, pairs):
            return contract(network, ones[0], twos[0], trace=trace)

        return over_pairs([network], x1, x2, options, contracted)

    few, beyond = split(network, options)
    kernel, (outputs1,), (outputs2,) = kernel_of(few, options)
    if beyond is not None:
        small = options._replace(memory_limit=min(options.memory_limit, _BEYOND))
        # Kept for the derivative, this would take memory also where nothing is left out.
        left_out = jax.checkpoint(lambda: kernel_of(beyond, small)[0])
        missed = [jnp.any(beyond.masks[leaf]) for leaf in beyond.layout.shared]
        nothing = functools.partial(jnp.zeros_like, kernel)
        kernel += jax.lax.cond(jnp.any(jnp.stack(missed)), left_out, nothing)
    if rest:
        kernel = kernel + _rest(rest, fn, leaves, masks, x1, x2, options)
    return Kernel(kernel, outputs1, outputs2)


def network_of(
    fn: FlatFn, leaves: Leaves, masks: LeafMasks, x: Shaped[Array, "n ..."], options: Options
) -> Network:
    """A network with its plan under these options."""
    sides = options.projections
    passes = None if sides is None else sum(side.shape[1] for side in sides)
    layout = plan(fn, leaves, x, options.memory_limit, passes)
    return Network(layout, fn, leaves, _masks_at(layout, masks), {})


def split(network: Network, options: Options) -> tuple[Network, Network | None]:
    """Of the convolutions, so many kept weights as `max_density` promises, and those beyond."""
    layout = network.layout
    sparse = {leaf: site for leaf, site in layout.shared.items() if network.masks[leaf] is not None}
    if options.max_density > _SPARSE or not sparse:
        return network, None
    columns, masks = {}, list(network.masks)
    for leaf in sparse:
        kept = network.masks[leaf].reshape(-1)
        capacity = math.ceil(options.max_density * kept.size)
        columns[leaf] = _contract.kept_columns(kept, capacity)
        masks[leaf] = (kept & (jnp.cumsum(kept) > capacity)).reshape(network.masks[leaf].shape)
    alone = layout._replace(dense={}, biases={}, shared=sparse, direct=[])
    return network._replace(columns=columns), network._replace(layout=alone, masks=masks)


def over_pairs(
    networks: Sequence[Network],
    x1: Shaped[Array, "n1 ..."],
    x2: Shaped[Array, "n2 ..."],
    options: Options,
    reduce: Callable[..., Array],
    rows: Any = None,
    pairs: Array | None = None,
) -> tuple[Array, list[Array], list[Array]]:
    """A function of the factors of networks, over all pairs of examples, in blocks that fit.

    Args:
        networks: Whose factors; leaves that `layout.rest` lists are not among them.
        x1: The first batch.
        x2: The second batch.
        options: Of the kernels.
        reduce: `(ones, twos, rows, pairs) -> array`, given lists of `Factors`, one for each
            network, of a block of either batch. Its first two axes are put together: `(b1, b2)`
            for something of each pair, `(1, 1)` for something of the block.
        rows: A pytree of arrays `(n1, ...)` of which it gets the block.
        pairs: An array `(n1, n2, ...)`, likewise.

    Returns:
        The array, and the outputs of each network for either batch.
    """
    factors = [
        functools.partial(
            _factors, net.layout, net.leaves, net.columns, memory_limit=options.memory_limit
        )
        for net in networks
    ]
    u, v = (None, None) if options.projections is None else options.projections
    block_rows, block_columns = _block(networks, len(x1), len(x2), options)
    if (block_rows, block_columns) == (len(x1), len(x2)):
        ones = [make(x1, u) for make in factors]
        same = x2 is x1 and u is None
        twos = ones if same else [make(x2, v) for make in factors]
        result = reduce(ones, twos, rows, pairs)
        return result, [one.outputs for one in ones], [two.outputs for two in twos]

    def row_block(x1, u, rows, pairs):
        ones = [make(x1, u) for make in factors]

        # The derivative makes the factors of a block again instead of keeping all.
        @jax.checkpoint
        def column_block(x2, v, pairs):
            twos = [make(x2, v) for make in factors]
            return reduce(ones, twos, rows, _swapped(pairs)).swapaxes(0, 1)

        columns = map_blocks(column_block, block_columns, x2, v, _swapped(pairs))
        return columns.swapaxes(0, 1), [one.outputs for one in ones]

    result, outputs = map_blocks(jax.checkpoint(row_block), block_rows, x1, u, rows, pairs)
    return result, outputs, [net.fn(net.leaves, x2) for net in networks]


def _swapped(pairs: Array | None) -> Array | None:
    return None if pairs is None else pairs.swapaxes(0, 1)


def contract(
    network: Network, one: Factors, two: Factors, *, trace: bool = False
) -> Float[Array, "n1 n2 r s"] | Float[Array, "n1 n2"]:
    """The kernel of two batches from their factors, but for the leaves of `layout.rest`."""
    layout, masks = network.layout, network.masks
    sides = () if trace else (one.probes.shape[1], two.probes.shape[1])
    shape = (len(one.outputs), len(two.outputs), *sides)
    kernels = [jnp.zeros(shape, layout.dtype)]
    for leaf in layout.dense:
        at_layer = (one.inputs[leaf], two.inputs[leaf], one.deltas[leaf], two.deltas[leaf])
        bias = _bias_at(layout, masks, leaf)
        kernels.append(_contract.dense(*at_layer, masks[leaf], bias, trace=trace))
    for leaf, jacobian in one.jacobians.items():
        mask = None if leaf in network.columns else masks[leaf]
        product = _contract.jacobians(jacobian, two.jacobians[leaf], mask, trace=trace)
        kernels.append(product)
    return functools.reduce(jnp.add, kernels)


def _masks_at(layout: Plan, masks: LeafMasks) -> list[Any]:
    """The masks in the shapes that the leaves have in `Factors`."""
    result = list(masks)
    for leaf, site in (layout.dense | layout.shared).items():
        mask = masks[leaf]
        if mask is not None:
            matrix = site.matrix(mask)
            result[leaf] = matrix[0] if leaf in layout.dense else matrix.swapaxes(1, 2)
    return result


def _bias_at(layout: Plan, masks: list[Any], leaf: int) -> Any:
    """Of a dense leaf: the mask of its bias, `True` if that has none, `None` without a bias."""
    bias = layout.biases.get(leaf)
    if bias is None:
        return None
    return True if masks[bias] is None else masks[bias].reshape(-1)


def _rest(rest, fn, leaves, masks, x1, x2, options):
    """The part of some leaves, by NTK-vector products."""

    def partial_fn(values, x):
        return fn(_replaced(leaves, dict(zip(rest, values, strict=True))), x)

    values, partial_masks = ([tree[leaf] for leaf in rest] for tree in (leaves, masks))
    arguments = (partial_fn, values, partial_masks, x1, x2)
    return vector_products(*arguments, trace=options.trace, projections=options.projections)


def _replaced(leaves: Leaves, some: Mapping[int, Array]) -> Leaves:
    return [some.get(number, leaf) for number, leaf in enumerate(leaves)]


def _block(networks: Sequence[Network], n1: int, n2: int, options: Options) -> tuple[int, int]:
    """How many examples of each batch may meet at once."""
    k = networks[0].layout.output.size
    r, s = (k, k) if options.projections is None else (u.shape[1] for u in options.projections)
    size = pair = 0
    for layout, _, leaves, masks, columns in networks:
        sizes = {leaf: leaves[leaf].size for leaf in (*layout.shared, *layout.direct)}
        size += sum((sizes | {leaf: made.size for leaf, made in columns.items()}).values())
        # Masked dense layers hold a product of inputs and an entry per unit for each pair.
        masked = [
            jax.eval_shape(site.matrix, leaves[leaf]).shape[1:]
            for leaf, site in layout.dense.items()
            if masks[leaf] is not None
        ]
        pair += r * s + max((p for p, _ in masked), default=0) + sum(q for _, q in masked)
    itemsize, limit = networks[0].layout.dtype.itemsize, options.memory_limit
    while n1 * n2 > 1 and itemsize * ((n1 * r + n2 * s) * size + n1 * n2 * pair) > limit:
        n1, n2 = (-(-n1 // 2), n2) if n1 > n2 else (n1, -(-n2 // 2))
    return n1, n2


def _factors(
    layout: Plan,
    leaves: Leaves,
    columns: Mapping[int, Int[Array, " c"]],
    x: Shaped[Array, "n ..."],
    probes: Float[Array, "n r k"] | None,
    *,
    memory_limit: int,
) -> Factors:
    """Layer inputs, and sensitivities and Jacobians of all outputs or of projections of them."""
    sites = layout.dense | layout.shared
    on_cpu = jax.default_backend() == "cpu"
    # By step, as the two operands of one product may both be weights.
    results = {site.step: layout.program.result(site.step) for site in sites.values()}

    faster = {
        site.step: site.result for site in sites.values() if on_cpu and site.result is not None
    }

    def output(taps, direct, example):
        weights = _replaced(leaves, direct)
        value, operands = _program.run(layout.program, weights, example, taps, faster)
        return value, (value, operands)

    def factors(example, probes):
        taps = {step: jnp.zeros(aval.shape, aval.dtype) for step, aval in results.items()}
        taps = varying_as(taps, (example, leaves))
        direct = {leaf: leaves[leaf] for leaf in layout.direct}
        _, pull, (value, operands) = jax.vjp(
            lambda t, d: output(t, d, example), taps, direct, has_aux=True
        )
        if probes is None:
            probes = varying_as(jnp.eye(value.size, dtype=value.dtype), value)
        pulled, jacobians = jax.vmap(pull)(probes.astype(value.dtype))
        jacobians = {leaf: array.astype(layout.dtype) for leaf, array in jacobians.items()}
        for leaf, site in layout.shared.items():
            # The derivative makes the patches again instead of keeping those of all examples.
            @jax.checkpoint
            def jacobian(operands, pulled, columns, site=site):
                whole = _contract.position_sum(site.inputs(operands), site.delta(pulled))
                if columns is None:
                    return whole
                return _contract.take_columns(whole.reshape(len(whole), -1), columns)

            at_site = (operands[site.step], pulled[site.step])
            jacobians[leaf] = jacobian(*at_site, columns.get(leaf))
        dense = layout.dense.items()
        return Factors(
            value,
            probes,
            {leaf: site.inputs(operands[site.step])[0, 0] for leaf, site in dense},
            {leaf: site.delta(pulled[site.step])[:, 0, 0] for leaf, site in dense},
            jacobians,
        )

    size = max((math.prod(r.shape) for r in results.values()), default=1)
    passes = layout.output.size if probes is None else probes.shape[1]
    # Jacobians are made whole before their columns are taken: these too are to be few at a time.
    size += sum(leaves[leaf].size for leaf in columns)
    example_bytes = passes * size * layout.output.dtype.itemsize
    if on_cpu:
        together = len(x) if len(x) * example_bytes <= _CACHE else 1
    else:
        together = min(len(x), max(1, memory_limit // (4 * example_bytes)))
    return map_blocks(jax.vmap(factors), together, x, probes)
