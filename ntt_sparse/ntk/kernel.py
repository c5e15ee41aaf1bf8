"""The empirical neural tangent kernel (NTK) of dense and masked networks."""

from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ntt_sparse._types import ApplyFn, Masks, Params
from ntt_sparse.ntk import neural_tangents
from ntt_sparse.ntk._varying import varying_as
from ntt_sparse.ntk.jacobian import jacobian_contraction, select, vector_products
from ntt_sparse.ntk.structured import (
    MEMORY_LIMIT,
    Kernel,
    Projections,
    automatic,
    structured,
    without_structure,
)

Wrt: TypeAlias = Literal["masked", "all"]
Output: TypeAlias = Literal["full", "trace"]
Method: TypeAlias = Literal[
    "auto", "jacobian", "ntk_vector_products", "structured", "neural_tangents"
]

_BY_STRUCTURE = {"auto": automatic, "structured": structured}
_WITHOUT = {
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

    The outputs for an example must be the same in every batch, alone or in company.
    Batch normalisation in training mode breaks this, as does noise drawn for a whole
    batch, and the kernel is then without meaning; use the form for evaluation.

    Args:
        apply_fn: A pure function `apply_fn(params, x) -> (n, k)` for any n.
        params: Its parameters, floating point.
        x1: The first batch, `(n1, ...)`.
        x2: The second batch, `(n2, ...)` with the same example shape; `x1` if `None`.
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
            * `"auto"` takes `"structured"` where it has a rule for every leaf and
              `"ntk_vector_products"` elsewhere.

        projections: Arrays u `(n1, r, k)` and v `(n2, s, k)` that give, instead of the
            full kernel, $\sum_{oq} u_{iao} K_{ijoq} v_{jbq}$. The structured method then
            needs r and s backward passes for an example and not k.
        memory_limit: About how many bytes the Jacobians of convolutions and the products
            of pairs may take together, with gradients as without: larger problems are cut
            into blocks of pairs, whose factors are computed again. For the structured method.
        max_density: A density that no mask of a convolution is known to exceed, in (0, 1], for the
            structured method with `wrt="masked"`: its Jacobians then meet in their kept
            columns alone. The kernel is exact in any case: a mask that keeps more than this
            costs as much as without the promise.

    Returns:
        The kernel, `(n1, n2, k, k)`, `(n1, n2)` for the trace or `(n1, n2, r, s)` with
        projections, in the dtype of the outputs.

    Raises:
        ValueError: Batches that are empty or of different example shapes, masks that
            do not fit `params`, outputs that are not `(n, k)`, projections that do not
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
    params: Params,
    x1: Shaped[Array, "n1 ..."],
    x2: Shaped[Array, "n2 ..."] | None = None,
    *,
    masks: Masks | None = None,
    wrt: str = "masked",
    output: str = "full",
    method: str = "auto",
    projections: Projections | None = None,
    memory_limit: int = MEMORY_LIMIT,
    max_density: float = 1.0,
) -> Kernel:
    """The kernel of `empirical_ntk`, and the outputs for both batches that come with it."""
    for name, value, known in (
        ("wrt", wrt, ("masked", "all")),
        ("output", output, ("full", "trace")),
        ("method", method, get_args(Method)),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {known}")
    if not 0.0 < max_density <= 1.0:
        raise ValueError(f"max_density is {max_density}, expected a fraction in (0, 1]")
    if memory_limit < 1:
        raise ValueError(f"memory_limit is {memory_limit}, expected a number of bytes")
    x2 = x1 if x2 is None else x2
    _check_batches(x1, x2)
    leaves, treedef = jax.tree.flatten(params)
    leaf_masks = _leaf_masks(params, masks)
    k = _check_outputs(apply_fn, params, x1)
    if projections is not None:
        _check_projections(projections, len(x1), len(x2), k, output)

    weights = [select(leaf, mask) for leaf, mask in zip(leaves, leaf_masks, strict=True)]
    operands = (weights, leaf_masks, x1, None if x2 is x1 else x2, projections)
    weights, leaf_masks, x1, x2, projections = varying_as(operands, operands)
    x2 = x1 if x2 is None else x2
    counted = leaf_masks if wrt == "masked" else [None] * len(leaves)

    def fn(leaves, x):
        return apply_fn(jax.tree.unflatten(treedef, leaves), x)

    arguments = (fn, weights, counted, x1, x2)
    with jax.default_matmul_precision("highest"):
        if method in _BY_STRUCTURE:
            return _BY_STRUCTURE[method](
                *arguments,
                trace=output == "trace",
                projections=projections,
                memory_limit=memory_limit,
                max_density=max_density,
            )
        return without_structure(
            _WITHOUT[method], *arguments, trace=output == "trace", projections=projections
        )


def _check_batches(x1: Any, x2: Any) -> None:
    for name, x in (("x1", x1), ("x2", x2)):
        if jnp.ndim(x) == 0 or len(x) == 0:
            raise ValueError(f"{name} has shape {jnp.shape(x)}, expected at least one example")
    if jnp.shape(x1)[1:] != jnp.shape(x2)[1:]:
        raise ValueError(
            f"x1 and x2 must hold examples of one shape, got {jnp.shape(x1)} and {jnp.shape(x2)}"
        )


def _check_outputs(apply_fn: ApplyFn, params: Params, x: Any) -> int:
    """Returns k."""
    outputs = jax.eval_shape(apply_fn, params, x)
    shape = getattr(outputs, "shape", type(outputs).__name__)
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[0] != len(x):
        raise ValueError(
            f"apply_fn must map a batch of {len(x)} to an array ({len(x)}, k), got {shape}"
        )
    return shape[1]


def _check_projections(projections: Any, n1: int, n2: int, k: int, output: str) -> None:
    if output == "trace":
        raise ValueError('projections go with output="full", got output="trace"')
    for name, n, array in zip(("first", "second"), (n1, n2), projections, strict=True):
        shape = jnp.shape(array)
        if len(shape) != 3 or shape[0] != n or shape[1] == 0 or shape[2] != k:
            raise ValueError(f"the {name} projection has shape {shape}, expected ({n}, r, {k})")


def _leaf_masks(params: Params, masks: Masks | None) -> list[Any]:
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
        shape, dtype = getattr(mask, "shape", None), getattr(mask, "dtype", type(mask).__name__)
        if mask is not None and (shape != jnp.shape(leaf) or dtype != jnp.bool_):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"mask of {name!r} is {dtype}{shape}, expected bool{jnp.shape(leaf)} or None"
            )
    return leaf_masks
