"""Reading a network's traced program: where each weight is used, and taps on those places.

A program is a list of primitive steps for one example, with the calls that only
group steps (`jit`, `remat`) opened up. Functions with their own derivative rule
(`custom_jvp`, `custom_vjp`) stay whole, so that their rule is kept, unless asked for.
A convolution that is written otherwise for some platforms is read as the convolution.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jaxtyping import Array

# A call of one of these runs its inner program and does nothing else.
_TRANSPARENT = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}
_RULES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


class Step(NamedTuple):
    """One primitive operation; inputs and outputs are slots of the program."""

    equation: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Program(NamedTuple):
    """A function `(leaves, example) -> output` as a list of steps.

    Slots number the values: first the leaves, then the example, then the rest.
    """

    steps: tuple[Step, ...]
    constants: Mapping[int, Any]
    output: int

    def result(self, step: int) -> Any:
        """Shape and dtype of the (only) result of a step."""
        return self.steps[step].equation.outvars[0].aval


def read(
    fn: Callable[..., Any], leaves: Sequence[Array], example: Array, *, open_rules: bool = False
) -> Program:
    """Traces `fn(leaves, example)`, a function with one array as its output.

    With `open_rules` functions with their own derivative rule are opened up too.
    """
    opened = _TRANSPARENT | _RULES if open_rules else _TRANSPARENT
    closed = jax.make_jaxpr(fn)(leaves, example)
    steps: list[Step] = []
    constants: dict[int, Any] = {}
    fresh = iter(range(len(leaves) + 1, 1 << 62))

    def flatten(jaxpr, consts, arguments):
        """Appends the steps of a jaxpr and returns the slots of its outputs."""
        slots = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            slots[var] = next(fresh)
            constants[slots[var]] = value

        def slot(atom):
            if not isinstance(atom, core.Literal):
                return slots[atom]
            number = next(fresh)
            constants[number] = atom.val
            return number

        for equation in jaxpr.eqns:
            inputs = tuple(map(slot, equation.invars))
            inner = _inner(equation) if equation.primitive.name in opened else None
            if inner is None and (inner := _convolution(equation)):
                # The first input says which platform it is.
                outputs = flatten(*inner, inputs[1:])
            elif inner is None:
                outputs = tuple(next(fresh) for _ in equation.outvars)
                steps.append(Step(equation, inputs, outputs))
            else:
                outputs = flatten(*inner, inputs)
            slots.update(zip(equation.outvars, outputs, strict=True))
        return tuple(map(slot, jaxpr.outvars))

    (output,) = flatten(closed.jaxpr, closed.consts, range(len(leaves) + 1))
    return Program(tuple(steps), constants, output)


def _inner(equation: Any) -> tuple[Any, Sequence[Any]]:
    """The inner jaxpr and constants of a call."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    inner = next(equation.params[name] for name in names if name in equation.params)
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


def _convolution(equation: Any) -> tuple[Any, Sequence[Any]] | None:
    """What `jax.lax.platform_dependent` does by default, if that is a convolution."""
    platforms = equation.params.get("branches_platforms") or ()
    if equation.primitive.name != "cond" or None not in platforms:
        return None
    default = equation.params["branches"][platforms.index(None)]
    names = [inner.primitive.name for inner in default.jaxpr.eqns]
    return (default.jaxpr, default.consts) if names == ["conv_general_dilated"] else None


def uses(program: Program, leaf: int) -> list[int | None]:
    """The steps that read a leaf, once for each reading; `None` if it is the output."""
    found: list[int | None] = [
        i for i, step in enumerate(program.steps) for slot in step.inputs if slot == leaf
    ]
    return [*found, None] if program.output == leaf else found


def run(
    program: Program,
    leaves: Sequence[Array],
    example: Array,
    taps: Mapping[int, Array],
    evaluate: Mapping[int, Callable[..., Array]] | None = None,
) -> tuple[Array, dict[int, tuple[Array, ...]]]:
    """Evaluates a program with a value added to the result of some of its steps.

    Args:
        program: The program.
        leaves: The weights.
        example: One example.
        taps: By step, what to add to its (only) result.
        evaluate: By step, a function of the operands to take in place of the primitive.

    Returns:
        The output, and the operands of each tapped step.
    """
    values = {**program.constants, **dict(enumerate([*leaves, example]))}
    recorded = {}
    for i, (equation, inputs, outputs) in enumerate(program.steps):
        operands = tuple(values[slot] for slot in inputs)
        if evaluate and i in evaluate:
            results = [evaluate[i](operands)]
        else:
            results = bind(equation, operands)
        if i in taps:
            recorded[i] = operands
            results = [results[0] + taps[i]]
        values.update(zip(outputs, results, strict=True))
    return values[program.output], recorded


def bind(equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """Applies the primitive of an equation."""
    bound = equation.primitive.get_bind_params(equation.params)
    # JAX before 0.12 returns functions to bind beside the parameters.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    results = equation.primitive.bind(*functions, *operands, **params)
    return results if equation.primitive.multiple_results else [results]
