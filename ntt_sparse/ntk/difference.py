r"""The squared difference of two tangent kernels, as a sum over pairs of examples.

Kernels of k outputs take n1 n2 k k numbers, their squared difference takes one. Small
kernels are made whole, one network after the other. Of large ones no more than a few rows
are ever held: these meet the same rows of the other kernel, and are gone. That takes kernels
made by structure: those of other methods, of leaves left to NTK-vector products, and under a
promised density, where Jacobians are what takes memory, are whole.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ntt_sparse._types import ApplyFn, Scalar
from ntt_sparse.ntk import structured
from ntt_sparse.ntk._blocks import sum_blocks
from ntt_sparse.ntk.jacobian import kernel_dtype
from ntt_sparse.ntk.kernel import check_options, kernel_and_outputs, prepare
from ntt_sparse.ntk.structured import MEMORY_LIMIT, Options

# Kernels of more bytes are not held whole, but so many of their rows as have about so many.
_WHOLE = 2**24


class Difference(NamedTuple):
    """The squared difference, with the outputs that come with it."""

    squares: Scalar
    outputs: Float[Array, "n k"]
    """Of the first network, for both batches, one after the other."""
    other_outputs: Float[Array, "n k"] | None
    """Of the other network, if its kernel was not given."""


def squared_difference(
    apply_fn: ApplyFn,
    params: Any,
    x1: Any,
    x2: Any,
    counted: Any,
    *,
    masks: Any = None,
    wrt: Any = "masked",
    other_params: Any = None,
    other_kernel: Any = None,
    output: Any = "full",
    method: Any = "auto",
    projections: Any = None,
    memory_limit: Any = MEMORY_LIMIT,
    max_density: Any = 1.0,
) -> Difference:
    r"""The sum of squared differences between a kernel and that of another network.

    $$\sum_{ij} c_i \|K_{ij} - K'_{ij}\|_F^2$$

    No gradient reaches the other network's parameters.

    Args:
        apply_fn: As for `empirical_ntk`, as are all arguments that are not named here.
        params: Parameters of the first network.
        x1: The first batch, `(n1, ...)`.
        x2: The second batch, `(n2, ...)`.
        counted: The $c_i$, `(n1,)`.
        other_params: Parameters of the other network, which has no masks, or
        other_kernel: its kernel, of the shape of ours.

    Raises:
        ValueError: As `empirical_ntk`; not one of the last two, or a kernel of another shape.
    """
    if (other_params is None) == (other_kernel is None):
        raise ValueError("give either other_params or other_kernel")
    how = {"output": output, "method": method, "memory_limit": memory_limit}
    how |= {"projections": projections}
    check_options(
        wrt=wrt, max_density=max_density, output=output, method=method, memory_limit=memory_limit
    )
    other_params = jax.lax.stop_gradient(other_params)
    if output == "full" and projections is None and method in ("auto", "structured"):
        options = Options(memory_limit=int(memory_limit), max_density=max_density)
        networks = [(params, masks, wrt)]
        networks += [] if other_params is None else [(other_params, None, wrt)]
        with jax.default_matmul_precision("highest"):
            result = _by_rows(apply_fn, networks, x1, x2, counted, other_kernel, options)
        if result is not None:
            return result
    other_outputs = None
    if other_kernel is None:
        other = kernel_and_outputs(apply_fn, other_params, x1, x2, **how)
        other_kernel, other_outputs = other.kernel, jnp.concatenate(other[1:])
        # Not before the other is done, so that not both are held.
        x1, x2, other_kernel = jax.lax.optimization_barrier((x1, x2, other_kernel))
    ours = kernel_and_outputs(
        apply_fn, params, x1, x2, masks=masks, wrt=wrt, max_density=max_density, **how
    )
    _check_shape(other_kernel, ours.kernel.shape)
    squares = _squares(ours.kernel, other_kernel, counted)
    return Difference(squares, jnp.concatenate(ours[1:]), other_outputs)


def _check_shape(other: Any, expected: tuple[int, ...]) -> None:
    if other.shape != expected:
        raise ValueError(f"targets.kernel has shape {other.shape}, the student's {expected}")


def _squares(ours: Array, other: Array, counted: Array) -> Scalar:
    squares = jnp.square(ours - other)
    return jnp.sum(jnp.sum(squares, axis=tuple(range(1, squares.ndim))) * counted)


def _by_rows(
    apply_fn: ApplyFn,
    networks: list[Any],
    x1: Any,
    x2: Any,
    counted: Any,
    other_kernel: Any,
    options: Options,
) -> Difference | None:
    """Without whole kernels; `None` where these are small, or made in another way."""
    given = prepare(apply_fn, networks, x1, x2)
    x1, x2 = given.x1, given.x2
    fn, leaves, _ = given.networks[0]
    k = jax.eval_shape(fn, leaves, x1).shape[1]
    dtype = kernel_dtype(fn, leaves, x1)
    row_bytes = dtype.itemsize * len(x2) * k**2
    if len(x1) * row_bytes <= _WHOLE:
        return None
    if other_kernel is not None:
        _check_shape(other_kernel, (len(x1), len(x2), k, k))
    made = [structured.network_of(*one, x1, options) for one in given.networks]
    promised = structured.split(made[0], options)[1] is not None
    if promised or any(net.layout.rest for net in made):
        return None

    def kernel_of(which, masks, one, two):
        network = made[which]._replace(masks=masks[which])
        return structured.contract(network, one, two).astype(dtype)

    def squares(ones, twos, counted, masks):
        ours = kernel_of(0, masks, ones[0], twos[0])
        theirs = ones[1] if other_kernel is not None else kernel_of(1, masks, ones[1], twos[1])
        return _squares(ours, theirs, counted)

    def block(ones, twos, counted, theirs):
        columns = len(twos[0].outputs)
        size = max(1, min(len(counted), _WHOLE * len(x2) // (row_bytes * columns)))
        rows = ones if theirs is None else [*ones, theirs]
        total = sum_blocks(squares, size, rows, twos, counted, [net.masks for net in made])
        return total.reshape(1, 1)

    sums, outputs1, outputs2 = structured.over_pairs(
        made, x1, x2, options, block, counted, other_kernel
    )
    total = jnp.sum(sums).astype(jnp.result_type(dtype, counted))
    both = [jnp.concatenate(pair) for pair in zip(outputs1, outputs2, strict=True)]
    return Difference(total, both[0], both[1] if len(both) > 1 else None)
