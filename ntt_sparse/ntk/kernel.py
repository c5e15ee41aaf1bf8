"""The empirical neural tangent kernel (NTK) of dense and masked networks."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ntt_sparse._types import ApplyFn, Masks, Params
from ntt_sparse.ntk import neural_tangents
from ntt_sparse.ntk._varying import varying_as
from ntt_sparse.ntk.jacobian import (
    FlatFn,
    LeafMasks,
    Leaves,
    Projections,
    jacobian_contraction,
    kernel_dtype,
    select,
    vector_products,
)
from ntt_sparse.ntk.structured import MEMORY_LIMIT, Kernel, Options, structured

Wrt: TypeAlias = Literal["masked", "all"]
Output: TypeAlias = Literal["full", "trace"]
Method: TypeAlias = Literal[
    "auto", "jacobian", "ntk_vector_products", "structured", "neural_tangents"
]

_NUMBERS = (int, float, np.integer, np.floating)

_WITHOUT_STRUCTURE = {
    "jacobian": jacobian_contraction,
    "ntk_vector_products": vector_products,
    "neural_tangents": neural_tangents.contraction,
}


def empirical_ntk(
    apply_fn: ApplyFn,
    params: Params,
    x1: Shaped[Array, "n1 ..."],
    x2: Shaped[Array, "n2 ..."] | None = None,
    *,
    masks: Masks | None = None,
    wrt: Wrt = "masked",
    output: Output = "full",
    method: Method = "auto",
    projections: Projections | None = None,
    memory_limit: int = MEMORY_LIMIT,
    max_density: float = 1.0,
) -> Float[Array, "n1 n2 k k"] | Float[Array, "n1 n2 r s"] | Float[Array, "n1 n2"]:
    r"""The inner products of parameter Jacobians between two batches.

    $$K_{ijoq} = \sum_p \frac{\partial f_o(x^1_i)}{\partial \theta_p}
                        \frac{\partial f_q(x^2_j)}{\partial \theta_p}$$

    over all entries p of all leaves, biases included. With masks m the network is
    the sparse $g(x, \theta) = f(x, m \odot \theta)$, and two kernels are in use:

    * `wrt="masked"` differentiates g. Only surviving weights contribute, which is
      the kernel that training the sparse network follows.
    * `wrt="all"` differentiates f at the point $m \odot \theta$. Pruned weights
      contribute as well; for a linear model this kernel does not see the mask.

    Leaves whose mask is `None` contribute in full to both. All matrix products are
    made at the highest precision, those of `apply_fn` included. The kernel can be
    differentiated with respect to `params`, and batched or compiled; pruned
    entries then get a gradient of exactly zero. Forward-mode differentiation of the
    kernel needs one of the two general methods, not the structured one.

    Floating-point leaves are differentiated by; leaves of other dtypes (integers, keys)
    are constants. With weights cast to half precision inside `apply_fn`, methods agree up
    to the rounding of that dtype.

    The outputs for an example must be the same in every batch, alone or in company.
    Batch normalisation in training mode breaks this, as does noise drawn for a whole
    batch, and the kernel is then without meaning; use the form for evaluation.

    Args:
        apply_fn: A pure function `apply_fn(params, x) -> (n, k)` for any n.
        params: Its parameters, real; at least one leaf is floating point.
        x1: The first batch, `(n1, ...)`.
        x2: The second batch, `(n2, ...)` with the same example shape and dtype; `x1` if
            `None`. Of two floating dtypes both batches are taken in the wider one.
        masks: Masks of the structure of `params`; `None` for the dense network.
        wrt: Which weights the masked network is differentiated by, as above.
        output: `"full"` for every pair of outputs, `"trace"` for the sum over o of
            $K_{ijoo}$ (the sum, not the mean).
        method: How it is computed; the value is the same to rounding. For P parameters:

            * `"jacobian"` builds the Jacobians of both batches: (n1 + n2) k P numbers,
              2 n1 n2 k^2 P operations.
            * `"ntk_vector_products"` holds k P numbers and needs k times fewer
              operations for the full kernel.
            * `"structured"` reads the program of `apply_fn` and contracts layer inputs
              with output sensitivities, many times faster for dense and
              convolutional layers; other weights are treated one by one as above.
            * `"neural_tangents"` leaves it to the package of that name, by Jacobians too,
              to compare with (`ntt_sparse.ntk.neural_tangents`).
            * `"auto"` takes `"structured"`, but `"ntk_vector_products"` for all weights where
              one that has no rule has Jacobians too large for `memory_limit`.

        projections: Arrays u `(n1, r, k)` and v `(n2, s, k)` that give, instead of the
            full kernel, $\sum_{oq} u_{iao} K_{ijoq} v_{jbq}$. An example then needs r or s
            backward passes and not k, and the full kernel is never made (but by
            `"neural_tangents"`).
        memory_limit: About how many bytes the Jacobians of convolutions and the products
            of pairs may take together, with gradients as without: larger problems are cut
            into blocks of pairs, whose factors are computed again. For the structured method.
        max_density: An upper bound on the density of every mask, in (0, 1]; the kernel is exact
            even if it does not hold. For the structured method with `wrt="masked"` and a bound
            of a quarter or less: Jacobians of convolutions are then made for so many weights
            alone. What a mask keeps beyond is added in a second pass over them all, in small
            blocks, and in a `vmap` over masks that pass is always made.

    Returns:
        The kernel, `(n1, n2, k, k)`, `(n1, n2)` for the trace or `(n1, n2, r, s)` with
        projections, in the dtype to which outputs and floating-point leaves promote.

    Raises:
        ValueError: Batches that are empty or of different example shapes or dtypes, masks
            that do not fit `params`, leaves that are complex or no arrays, or none that is
            floating point, outputs that are not real and `(n, k)`, projections that do not
            fit, `memory_limit` or `max_density` out of range, or an unknown option.
        ImportError: The method `"neural_tangents"` without that package.

    References:
        Jacot et al., "Neural Tangent Kernel", NeurIPS 2018. Liu and Zenke, "Finding
        trainable sparse networks through Neural Tangent Transfer", ICML 2020: the
        masked kernel is that of equation 3 of its appendix.
    """
    result = kernel_and_outputs(
        apply_fn,
        params,
        x1,
        x2,
        masks=masks,
        wrt=wrt,
        output=output,
        method=method,
        projections=projections,
        memory_limit=memory_limit,
        max_density=max_density,
    )
    return result.kernel


def kernel_and_outputs(
    apply_fn: ApplyFn,
    params: Any,
    x1: Shaped[Array, "n1 ..."],
    x2: Shaped[Array, "n2 ..."] | None = None,
    *,
    masks: Any = None,
    wrt: Any = "masked",
    output: Any = "full",
    method: Any = "auto",
    projections: Any = None,
    memory_limit: Any = MEMORY_LIMIT,
    max_density: Any = 1.0,
) -> Kernel:
    """The kernel of `empirical_ntk`, and the outputs for both batches that come with it.

    Checks all its arguments, which may therefore be anything.
    """
    check_options(
        wrt=wrt, output=output, method=method, memory_limit=memory_limit, max_density=max_density
    )
    network = (params, masks, wrt)
    given = prepare(apply_fn, [network], x1, x2, output=output, projections=projections)
    fn, values, value_masks = given.networks[0]
    arguments, trace = (fn, values, value_masks, given.x1, given.x2), output == "trace"
    with jax.default_matmul_precision("highest"):
        if method in _WITHOUT_STRUCTURE:
            contraction = _WITHOUT_STRUCTURE[method]
            kernel = contraction(*arguments, trace=trace, projections=given.projections)
            result = Kernel(kernel, fn(values, given.x1), fn(values, given.x2))
        else:
            options = Options(trace, given.projections, int(memory_limit), max_density)
            result = structured(*arguments, options, mixed=method == "structured")
        dtype = kernel_dtype(fn, values, given.x1)
    return result._replace(kernel=result.kernel.astype(dtype))


class FlatNetwork(NamedTuple):
    """A masked network as a function of its floating-point leaves alone."""

    fn: FlatFn
    leaves: Leaves
    """The weights that take part, zero where a mask says so."""
    masks: LeafMasks
    """Of the entries that the kernel counts."""


class Prepared(NamedTuple):
    """Arguments that were checked, as the methods take them."""

    networks: list[FlatNetwork]
    x1: Any
    x2: Any
    """`x1` itself where there is no second batch."""
    projections: Any


def prepare(
    apply_fn: ApplyFn,
    networks: Sequence[tuple[Any, Any, Any]],
    x1: Any,
    x2: Any = None,
    *,
    output: Any = "full",
    projections: Any = None,
) -> Prepared:
    """Checks what `empirical_ntk` is given, for networks of one function: `(params, masks, wrt)`.

    Raises:
        ValueError: As `empirical_ntk`.
    """
    x1, second = _batches(x1, x1 if x2 is None else x2)
    treedefs, everything = [], []
    for params, masks, wrt in networks:
        leaves, treedef = _leaves(params)
        if not any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
            raise ValueError("params hold no floating-point leaf, expected one to differentiate by")
        leaf_masks = _leaf_masks(params, masks)
        k = _check_outputs(apply_fn, params, x1)
        if projections is not None:
            _check_projections(projections, len(x1), len(second), k, output)
        weights = [select(leaf, mask) for leaf, mask in zip(leaves, leaf_masks, strict=True)]
        counted = leaf_masks if wrt == "masked" else [None] * len(leaf_masks)
        treedefs.append(treedef)
        everything.append((weights, counted))
    operands = (everything, x1, None if second is x1 else second, projections)
    everything, x1, x2, projections = varying_as(operands, operands)
    flat = [
        _flat(apply_fn, treedef, *one) for treedef, one in zip(treedefs, everything, strict=True)
    ]
    return Prepared(flat, x1, x1 if x2 is None else x2, projections)


def _flat(apply_fn: ApplyFn, treedef: Any, weights: list[Any], masks: list[Any]) -> FlatNetwork:
    counted = [i for i, leaf in enumerate(weights) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def fn(values, x):
        given = dict(zip(counted, values, strict=True))
        everything = [given.get(i, weight) for i, weight in enumerate(weights)]
        return apply_fn(jax.tree.unflatten(treedef, everything), x)

    return FlatNetwork(fn, [weights[i] for i in counted], [masks[i] for i in counted])


def check_options(
    *,
    wrt: Any = "masked",
    output: Any = "full",
    method: Any = "auto",
    memory_limit: Any = MEMORY_LIMIT,
    max_density: Any = 1.0,
) -> None:
    """Checks the arguments of `empirical_ntk` that are no arrays.

    Raises:
        ValueError: One is unknown or out of range.
    """
    for name, value, known in (
        ("wrt", wrt, ("masked", "all")),
        ("output", output, ("full", "trace")),
        ("method", method, get_args(Method)),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {known}")
    # The negated forms also refuse NaN.
    if not isinstance(max_density, _NUMBERS) or not 0.0 < max_density <= 1.0:
        raise ValueError(f"max_density is {max_density!r}, expected a fraction in (0, 1]")
    if not isinstance(memory_limit, _NUMBERS) or not memory_limit >= 1:
        raise ValueError(f"memory_limit is {memory_limit!r}, expected a number of bytes")


def _batches(x1: Any, x2: Any) -> tuple[Any, Any]:
    """Both batches in one dtype."""
    for name, x in (("x1", x1), ("x2", x2)):
        if jnp.ndim(x) == 0 or len(x) == 0:
            raise ValueError(f"{name} has shape {jnp.shape(x)}, expected at least one example")
    if jnp.shape(x1)[1:] != jnp.shape(x2)[1:]:
        raise ValueError(
            f"x1 and x2 must hold examples of one shape, got {jnp.shape(x1)} and {jnp.shape(x2)}"
        )
    one, two = jax.typeof(x1).dtype, jax.typeof(x2).dtype
    if one == two:
        return x1, x2
    if not (jnp.issubdtype(one, jnp.floating) and jnp.issubdtype(two, jnp.floating)):
        raise ValueError(f"x1 is {one} and x2 {two}, expected one dtype, or two floating ones")
    dtype = jnp.promote_types(one, two)
    return x1.astype(dtype), x2.astype(dtype)


def _leaves(params: Any) -> tuple[list[Any], Any]:
    """The leaves of `params` as arrays, and their tree."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = []
    for path, leaf in paths:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | complex | float | int):
            kind = type(leaf).__name__
            raise ValueError(f"leaf {_name(path)!r} of params is a {kind}, expected an array")
        leaves.append(leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf))
        if jnp.issubdtype(leaves[-1].dtype, jnp.complexfloating):
            raise ValueError(
                f"leaf {_name(path)!r} of params is {leaves[-1].dtype}, expected real numbers: "
                "hold the real and the imaginary part in leaves of their own"
            )
    return leaves, treedef


def _check_outputs(apply_fn: ApplyFn, params: Any, x: Any) -> int:
    """Returns k."""
    outputs = jax.eval_shape(apply_fn, params, x)
    shape = getattr(outputs, "shape", type(outputs).__name__)
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[0] != len(x) or shape[1] == 0:
        raise ValueError(
            f"apply_fn must map a batch of {len(x)} to an array ({len(x)}, k), k at least 1, "
            f"got {shape}"
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(f"outputs of apply_fn are {outputs.dtype}, expected real floating point")
    return shape[1]


def _check_projections(projections: Any, n1: int, n2: int, k: int, output: str) -> None:
    if output == "trace":
        raise ValueError('projections go with output="full", got output="trace"')
    if not isinstance(projections, tuple | list) or len(projections) != 2:
        raise ValueError(
            f"projections are two arrays, u ({n1}, r, {k}) and v ({n2}, s, {k}), "
            f"got {len(projections) if isinstance(projections, tuple | list) else 'no tuple'}"
        )
    for name, n, array in zip(("first", "second"), (n1, n2), projections, strict=True):
        shape = getattr(array, "shape", None)
        if shape is None or len(shape) != 3 or (shape[0], shape[2]) != (n, k) or shape[1] == 0:
            raise ValueError(f"the {name} projection has shape {shape}, expected ({n}, r, {k})")
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise ValueError(f"the {name} projection is {array.dtype}, expected real numbers")


def _leaf_masks(params: Any, masks: Any) -> list[Any]:
    """The mask of each leaf of `params`, `None` where there is none."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    if masks is None:
        return [None] * len(paths)
    try:
        leaf_masks = treedef.flatten_up_to(masks)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"masks must have the structure of params, got {jax.tree.structure(masks)} "
            f"for params {treedef}"
        ) from error
    for (path, leaf), mask in zip(paths, leaf_masks, strict=True):
        if mask is None:
            continue
        shape, name = jnp.shape(leaf), _name(path)
        if not isinstance(mask, jax.Array | np.ndarray | np.generic):
            kind = type(mask).__name__
            raise ValueError(f"mask of {name!r} is a {kind}, expected an array bool{shape} or None")
        if mask.shape != shape or mask.dtype != jnp.bool_:
            raise ValueError(
                f"mask of {name!r} is {mask.dtype}{mask.shape}, expected bool{shape} or None"
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            kind = jnp.result_type(leaf)
            raise ValueError(f"mask of {name!r} is for a leaf of {kind}, expected None there")
    return leaf_masks


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
