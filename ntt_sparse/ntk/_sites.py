r"""The places of a program where a weight acts as a matrix: dense layers, convolutions, lookups.

At such a site the weight is a matrix W `(p, q)`, or g matrices side by side, and every
example brings vectors $a_t$ at one or more positions t: $z_t = W^\top a_t$. With the
sensitivities $\delta_{ot} = \partial f_o / \partial z_t$, the gradient of an output o
is then $\sum_t a_t \delta_{ot}^\top$.

Arrays at a site are real. What the operands and the result have of lower precision is
widened before it is contracted: integers and half precision are read as they are, and
squared in the dtype of the result. A weight may be cast to another floating dtype on its
way, as in computation in half precision. Its kernel is then that of the cast, but for one
rounding: the gradient that JAX casts back is the product rounded to the narrow dtype, and
here the unrounded product is contracted.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ntt_sparse import _program
from ntt_sparse._program import Program
from ntt_sparse.ntk import _convolution

# Convolutions of fewer channels are one product with patches, and so is their derivative:
# measured on two CPU cores with the networks of `benchmarks/ntk.py`.
_SHALLOW = 32

# Steps that hand on all entries of a weight, in another order or shape.
_REARRANGEMENTS = {"reshape", "transpose", "squeeze", "rev", "copy"}


class Site(NamedTuple):
    """The only use of a weight, and how to see the arrays there as matrices."""

    step: int
    groups: int
    """The number g of matrices, each with vectors of its own."""
    positions: int
    """The number t of vectors per example and matrix."""
    inputs: Callable[[Sequence[Array]], Float[Array, "g t p"]]
    """From the operands of the step."""
    delta: Callable[[Array], Float[Array, "k g t q"]]
    """From sensitivities `(k, ...)` to the result of the step."""
    matrix: Callable[[Array], Shaped[Array, "g p q"]]
    """From an array of the shape of the weight."""
    result: Callable[[Sequence[Array]], Array] | None = None
    """The result of the step from its operands, where there is a faster way than the step."""


def find(program: Program, leaf: int) -> Site | None:
    """The site of a weight; `None` if it is used otherwise, or not exactly once."""
    slot, rearrangements, avals = leaf, [], []
    while True:
        steps = _program.uses(program, slot)
        if len(steps) != 1 or steps[0] is None:
            return None
        equation, slots, outputs = program.steps[steps[0]]
        avals.append(equation.invars[slots.index(slot)].aval)
        if _rearranges(equation):
            rearrangements.append(equation)
        elif not _casts(equation):
            break
        (slot,) = outputs
    rule = {
        "dot_general": _product_site,
        "conv_general_dilated": _convolution_site,
        "gather": _lookup_site,
    }.get(equation.primitive.name)
    result = program.result(steps[0])
    if rule is None or not _promotes(result.dtype):
        return None
    site = rule(steps[0], equation, slots.index(slot))
    if site is None:
        return None
    avals += [result, *(operand.aval for operand in equation.invars)]
    # Of the weight before and after casts, the vectors and the result.
    dtypes = [aval.dtype for aval in avals if _promotes(aval.dtype)]
    dtype = functools.reduce(jnp.promote_types, dtypes)

    def matrix(weight):
        for equation in rearrangements:
            (weight,) = _program.bind(equation, [weight])
        return site.matrix(weight)

    return site._replace(
        matrix=matrix,
        inputs=lambda operands: site.inputs(operands).astype(dtype),
        delta=lambda sensitivities: site.delta(sensitivities).astype(dtype),
    )


def bias_of(program: Program, leaf: int, sites: dict[int, Site]) -> int | None:
    """The dense layer, by its leaf, to whose results a weight is added entry by entry.

    The sensitivities to the weight are then those to the result, and its place in the
    kernel is that of a further input that is always one.
    """
    slot = leaf
    while True:
        steps = _program.uses(program, slot)
        if len(steps) != 1 or steps[0] is None:
            return None
        equation, slots, outputs = program.steps[steps[0]]
        same_size = equation.outvars[0].aval.size == equation.invars[0].aval.size
        reshapes = equation.primitive.name in ("reshape", "broadcast_in_dim") and same_size
        if not reshapes and not _casts(equation):
            break
        (slot,) = outputs
    if equation.primitive.name not in ("add", "add_any") or slots[0] == slots[1]:
        return None
    other = slots[1 - slots.index(slot)]
    for number, site in sites.items():
        produced = program.steps[site.step].outputs == (other,)
        whole = program.result(site.step).shape == equation.invars[slots.index(slot)].aval.shape
        if produced and whole and len(_program.uses(program, other)) == 1:
            return number
    return None


def _promotes(dtype: Any) -> bool:
    """Whether a dtype is floating and not of 8 bits, which promote to nothing."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1


def _casts(equation: Any) -> bool:
    """Whether a step changes one floating dtype into another."""
    return equation.primitive.name == "convert_element_type" and all(
        jnp.issubdtype(var.aval.dtype, jnp.floating)
        for var in (*equation.invars, *equation.outvars)
    )


def _rearranges(equation: Any) -> bool:
    if equation.primitive.name in _REARRANGEMENTS:
        return len(equation.invars) == 1
    # Axes of length one, put where another operand has them.
    return (
        equation.primitive.name == "broadcast_in_dim"
        and len(equation.invars) == 1
        and equation.outvars[0].aval.size == equation.invars[0].aval.size
    )


def _product_site(step: int, equation: Any, side: int) -> Site:
    """A product of a matrix, or of one for each index of batch axes, with vectors."""
    contracted, batched = equation.params["dimension_numbers"]
    weight, vectors = (equation.invars[i].aval for i in (side, 1 - side))
    free, vector_free = (
        [axis for axis in range(aval.ndim) if axis not in (*contracted[i], *batched[i])]
        for i, aval in ((side, weight), (1 - side, vectors))
    )
    g = math.prod(weight.shape[axis] for axis in batched[side])
    p = math.prod(weight.shape[axis] for axis in contracted[side])
    q = math.prod(weight.shape[axis] for axis in free)
    t = math.prod(vectors.shape[axis] for axis in vector_free)

    def inputs(operands):
        order = (*batched[1 - side], *vector_free, *contracted[1 - side])
        return operands[1 - side].transpose(order).reshape(g, t, p)

    def delta(sensitivities):
        # Batch axes come first in the result, then the free axes of the left operand.
        last = sensitivities.reshape(len(sensitivities), g, *((t, q) if side == 1 else (q, t)))
        return last if side == 1 else last.swapaxes(2, 3)

    def matrix(weight):
        order = (*batched[side], *contracted[side], *free)
        return weight.transpose(order).reshape(g, p, q)

    return Site(step, g, t, inputs, delta, matrix)


def _lookup_site(step: int, equation: Any, side: int) -> Site | None:
    """An embedding: rows of a table, which are its product with one-hot vectors."""
    table, indices = (operand.aval for operand in equation.invars)
    rank = equation.outvars[0].aval.ndim
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(rank - table.ndim + 1, rank)),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
    )
    whole_rows = equation.params["slice_sizes"] == (1, *table.shape[1:])
    if side != 0 or not whole_rows or equation.params["dimension_numbers"] != numbers:
        return None
    p, q, t = table.shape[0], math.prod(table.shape[1:]), math.prod(indices.shape[:-1])
    clip = equation.params["mode"] == jax.lax.GatherScatterMode.CLIP

    def inputs(operands):
        rows = operands[1].reshape(1, t)
        # Small integers may not hold the number of rows.
        rows = rows.astype(jnp.int32) if rows.dtype.itemsize < 4 else rows
        # An index that is out of range reads no row, unless it is clipped.
        return jax.nn.one_hot(jnp.clip(rows, 0, p - 1) if clip else rows, p, dtype=table.dtype)

    return Site(
        step,
        groups=1,
        positions=t,
        inputs=inputs,
        delta=lambda sensitivities: sensitivities.reshape(len(sensitivities), 1, t, q),
        matrix=lambda weight: weight.reshape(1, p, q),
    )


def _convolution_site(step: int, equation: Any, side: int) -> Site | None:
    """A convolution of one image, as a product with the patches of it."""
    params = equation.params
    if side != 1 or params["batch_group_count"] != 1:
        return None
    lhs, rhs, out = params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    aval = equation.outvars[0].aval
    if aval.shape[out[0]] != 1:
        return None
    g, q = params["feature_group_count"], kernel[rhs[0]] // params["feature_group_count"]
    c = kernel[rhs[1]]
    geometry = _convolution.Geometry(
        image=tuple(equation.invars[0].aval.shape[i] for i in (*lhs[2:], lhs[1])),
        window=tuple(kernel[i] for i in rhs[2:]),
        positions=tuple(aval.shape[i] for i in out[2:]),
        strides=tuple(params["window_strides"]),
        padding=tuple(map(tuple, params["padding"])),
        image_dilation=tuple(params["lhs_dilation"]),
        window_dilation=tuple(params["rhs_dilation"]),
    )
    t, offsets = math.prod(geometry.positions), math.prod(geometry.window)
    p = offsets * c
    precise = jnp.promote_types(equation.invars[1].aval.dtype, aval.dtype)

    def image(operands):
        return operands[0].transpose(lhs[0], *lhs[2:], lhs[1])[0]

    def inputs(operands):
        patches = _convolution.patches(geometry, image(operands)).reshape(t, offsets, g, c)
        return patches.transpose(2, 0, 1, 3).reshape(g, t, p)

    def delta(sensitivities):
        channels_last = (0, *(i + 1 for i in (out[0], *out[2:], out[1])))
        k = len(sensitivities)
        return jnp.moveaxis(sensitivities.transpose(channels_last).reshape(k, t, g, q), 2, 1)

    def matrix(weight):
        order = (*rhs[2:], rhs[1], rhs[0])
        return weight.transpose(order).reshape(p, g, q).transpose(1, 0, 2)

    def result(operands):
        operands = [operand.astype(precise) for operand in operands]
        matrices = matrix(operands[1])
        if g > 1:
            values = jnp.matmul(inputs(operands), matrices, precision="highest").swapaxes(0, 1)
        elif c < _SHALLOW:
            # Without a batch axis of length one, which keeps products from being merged.
            values = jnp.matmul(inputs(operands)[0], matrices[0], precision="highest")
        else:
            values = _convolution.convolve(geometry, image(operands), matrices[0])
        channels_last = values.reshape(1, *geometry.positions, g * q).astype(aval.dtype)
        position = [0] * aval.ndim
        for i, axis in enumerate((out[0], *out[2:], out[1])):
            position[axis] = i
        return channels_last.transpose(position)

    return Site(step, g, t, inputs, delta, matrix, result)
