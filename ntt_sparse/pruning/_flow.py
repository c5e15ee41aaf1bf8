"""Sums over paths of a network, in numbers whose exponent does not end.

The output of a network of positive weights for a positive input is a sum over its paths of
products of weights, which deep networks take out of the range of floating point. Here a value is
an array of numbers about one and a power of two for all of them, `x * 2**power`, and each
operation of the network works on both. Scaling one layer alone would do for a chain, but change
what a sum of two branches has of each.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ntt_sparse import _program

# The power of zeros: below that of anything else, with room for sums of a few.
_NOTHING = -(2**24)


class Scaled(NamedTuple):
    """Numbers `x * 2**power`; of integers and booleans the power is `None`."""

    x: Any
    power: Any


def logarithm(
    fn: Callable[..., Array], leaves: Sequence[Array], example: Array
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The sum of the outputs of `fn(leaves, example)` as `s * 2**power`, with s about one.

    The derivative of the logarithm of `s` is that of the whole sum's, whose power counts as
    constant. A sum of zero is `(0, ...)`.

    Operations that are not homogeneous, such as tanh, get their numbers as they are, which may
    overflow.
    """
    # Rules of derivatives are opened: what is homogeneous is known of primitives alone.
    program = _program.read(
        lambda given, x: jnp.sum(fn(given, x)), leaves, example, open_rules=True
    )
    values = {
        slot: _scaled(value)
        for slot, value in {**program.constants, **dict(enumerate([*leaves, example]))}.items()
    }
    for equation, inputs, outputs in program.steps:
        results = _step(equation, [values[slot] for slot in inputs])
        values.update(zip(outputs, results, strict=True))
    total = values[program.output]
    return total.x, total.power


def _scaled(x: Any, power: Any = 0) -> Scaled:
    """Numbers of which the largest is at least one and less than two."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return Scaled(x, None)
    if not x.size:
        return Scaled(x, jnp.int32(_NOTHING))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    exponent, bias = _exponent(largest)
    # Zero, what is as small, and what is no number stay as they are.
    shift = jnp.where((exponent == -bias) | (exponent > bias), 0, exponent)
    nothing = jnp.int32(_NOTHING)
    return Scaled(x * _power(-shift, x.dtype), jnp.where(largest == 0, nothing, shift + power))


def _layout(dtype: Any) -> tuple[Any, int, int]:
    """Of a floating-point type: integers of its size, bits of the mantissa, bias of exponents."""
    limits = jnp.finfo(dtype)
    return jnp.dtype(f"int{limits.bits}"), limits.nmant, limits.maxexp - 1


def _exponent(x: Float[Array, ""]) -> tuple[Int[Array, ""], int]:
    """The exponent of a positive number, and the bias: minus that of zero."""
    integer, mantissa, bias = _layout(x.dtype)
    bits = jax.lax.bitcast_convert_type(x, integer)
    return (bits >> mantissa).astype(jnp.int32) - bias, bias


def _power(power: Int[Array, ""], dtype: Any) -> Float[Array, ""]:
    """Two to a power, exactly; zero below the range of normal numbers, the largest above."""
    integer, mantissa, bias = _layout(dtype)
    bits = (jnp.clip(power, -bias, bias) + bias).astype(integer) << mantissa
    return jax.lax.bitcast_convert_type(bits, jnp.dtype(dtype))


def _plain(value: Scaled) -> Any:
    return value.x if value.power is None else value.x * _power(value.power, value.x.dtype)


def _aligned(values: Sequence[Scaled]) -> tuple[list[Any], Any]:
    """The numbers of several values as multiples of the largest power."""
    powers = [value.power for value in values]
    largest = jnp.max(jnp.stack(powers))
    return [
        value.x * _power(power - largest, value.x.dtype)
        for value, power in zip(values, powers, strict=True)
    ], largest


# What each primitive makes of powers. Others see plain numbers.
_KEEP = {
    *("broadcast_in_dim", "copy", "cumsum", "expand_dims", "neg", "abs", "optimization_barrier"),
    *("reduce_max", "reduce_min", "reduce_sum", "reduce_window_max", "reduce_window_sum"),
    *("reshape", "rev", "slice", "squeeze", "stop_gradient", "transpose", "copy_p"),
    # Of the first operand; the others say where.
    *("dynamic_slice", "gather"),
}
_MULTIPLY = {"mul", "dot_general", "conv_general_dilated"}
_ALIGN = {"add", "add_any", "sub", "max", "min", "concatenate", "pad", "clamp"}
_LOOPS = {"scan", "while", "cond"}
_COMPARE = {"eq", "ne", "ge", "gt", "le", "lt"}


def _step(equation: Any, operands: Sequence[Scaled]) -> list[Scaled]:
    """The results of one operation."""
    name = equation.primitive.name
    if name in _LOOPS:
        raise ValueError(
            f"the network holds {name!r}, whose layers cannot be followed one by one: write them "
            "out (a loop of Python, or `nn.scan` replaced by its layers)"
        )
    floats = [value for value in operands if value.power is not None]
    given = [value.x for value in operands]
    if not floats:
        return [_scaled(x) for x in _program.bind(equation, given)]
    first = operands[0].power
    # Only what multiplies or sums many moves numbers far from one.
    result = Scaled
    if name in _KEEP and len(equation.outvars) == 1 and len(floats) == 1 and first is not None:
        power = first
        result = _scaled if name.endswith("sum") else Scaled
    elif name == "convert_element_type" and _is_floating(equation):
        power = first
    elif name in _MULTIPLY and len(floats) == len(operands):
        power, result = operands[0].power + operands[1].power, _scaled
    elif name == "div" and len(floats) == 2:
        power, result = operands[0].power - operands[1].power, _scaled
    elif name == "integer_pow":
        power, result = operands[0].power * equation.params["y"], _scaled
    elif name == "square":
        power, result = operands[0].power * 2, _scaled
    elif name in _ALIGN and len(floats) == len(operands):
        given, power = _aligned(operands)
    elif name == "select_n" and len(floats) == len(operands) - 1:
        # The first one says which.
        cases, power = _aligned(operands[1:])
        given = [given[0], *cases]
    elif name in _COMPARE and len(floats) == len(operands):
        given, power, result = _aligned(operands)[0], 0, _scaled
    else:
        given, power, result = [_plain(value) for value in operands], 0, _scaled
    return [result(x, power) for x in _program.bind(equation, given)]


def _is_floating(equation: Any) -> bool:
    return jnp.issubdtype(equation.params["new_dtype"], jnp.floating)
