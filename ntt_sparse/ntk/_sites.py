r"""The places of a program where a weight acts as a matrix: dense layers and convolutions.

At such a site the weight is a matrix W `(p, q)` and every example brings vectors
$a_t$ at one or more positions t: $z_t = W^\top a_t$. With the sensitivities
$\delta_{ot} = \partial f_o / \partial z_t$, the gradient of an output o is then
$\sum_t a_t \delta_{ot}^\top$.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ntt_sparse.ntk._program import Program, uses


class Site(NamedTuple):
    """The only use of a weight, and how to see the arrays there as matrices."""

    step: int
    positions: int
    """The number t of vectors per example."""
    inputs: Callable[[Sequence[Array]], Float[Array, "t p"]]
    """From the operands of the step."""
    delta: Callable[[Array], Float[Array, "k t q"]]
    """From sensitivities `(k, ...)` to the result of the step."""
    matrix: Callable[[Array], Shaped[Array, "p q"]]
    """From an array of the shape of the weight."""


def find(program: Program, leaf: int) -> Site | None:
    """The site of a weight; `None` if it is used otherwise, or not exactly once."""
    steps = uses(program, leaf)
    if len(steps) != 1 or steps[0] is None:
        return None
    equation, slots, _ = program.steps[steps[0]]
    rule = {"dot_general": _product, "conv_general_dilated": _convolution}
    find_rule = rule.get(equation.primitive.name)
    return find_rule and find_rule(steps[0], equation, slots.index(leaf))


def _product(step: int, equation: Any, side: int) -> Site | None:
    """A product of a matrix with vectors: no batch axes, one axis summed over."""
    contracted, batched = equation.params["dimension_numbers"]
    matrix, vectors = (equation.invars[i].aval for i in (side, 1 - side))
    if matrix.ndim != 2 or batched[side] or len(contracted[side]) != 1:
        return None
    (axis,), (vector_axis,) = contracted[side], contracted[1 - side]
    p, q = matrix.shape[axis], matrix.shape[1 - axis]

    def inputs(operands):
        return jnp.moveaxis(operands[1 - side], vector_axis, -1).reshape(-1, p)

    def delta(sensitivities):
        # The free axes of the left operand come first in the result.
        last = sensitivities if side == 1 else jnp.moveaxis(sensitivities, 1, -1)
        return last.reshape(len(last), -1, q)

    return Site(step, vectors.size // p, inputs, delta, lambda w: w if axis == 0 else w.T)


def _convolution(step: int, equation: Any, side: int) -> Site | None:
    """A convolution of one image without groups, as a product with the patches of it."""
    params = equation.params
    if side != 1 or params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    lhs, rhs, out = params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    result = equation.outvars[0].aval.shape
    if result[out[0]] != 1:
        return None
    window, spatial = [kernel[i] for i in rhs[2:]], [result[i] for i in out[2:]]

    def inputs(operands):
        patches = _patches(operands[0].transpose(lhs), window, spatial, params)
        return patches.reshape(-1, math.prod(spatial)).T

    def delta(sensitivities):
        channels_last = (0, *(i + 1 for i in (out[0], *out[2:], out[1])))
        k, q = len(sensitivities), result[out[1]]
        return sensitivities.transpose(channels_last).reshape(k, -1, q)

    def matrix(weight):
        return weight.transpose(*rhs[2:], rhs[1], rhs[0]).reshape(-1, kernel[rhs[0]])

    return Site(step, math.prod(spatial), inputs, delta, matrix)


def _patches(
    x: Float[Array, "1 c ..."], window: Sequence[int], spatial: Sequence[int], params: Any
) -> Float[Array, "offsets c ..."]:
    """The input values under each offset of the window: strided slices of the padded input."""
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    spread = [
        (low, high, step - 1)
        for (low, high), step in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    padded = jax.lax.pad(x[0], jnp.zeros((), x.dtype), [(0, 0, 0), *spread])

    def under(offset):
        starts = [o * d for o, d in zip(offset, dilation, strict=True)]
        limits = [
            start + (size - 1) * stride + 1
            for start, size, stride in zip(starts, spatial, strides, strict=True)
        ]
        return jax.lax.slice(padded, (0, *starts), (len(padded), *limits), (1, *strides))

    return jnp.stack([under(offset) for offset in itertools.product(*map(range, window))])
