"""The empirical neural tangent kernel (NTK) of dense and masked networks."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ntt_sparse._types import ApplyFn, Masks, Params
from ntt_sparse.ntk._varying import varying_as
from ntt_sparse.ntk.jacobian import jacobian_contraction, select, vector_products
from ntt_sparse.ntk.structured import automatic, structured

Wrt: TypeAlias = Literal["masked", "all"]
Output: TypeAlias = Literal["full", "trace"]
Method: TypeAlias = Literal["auto", "jacobian", "ntk_vector_products", "structured"]

_METHODS = {
    "auto": automatic,
    "jacobian": jacobian_contraction,
    "ntk_vector_products": vector_products,
    "structured": structured,
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
) -> Float[Array, "n1 n2 k k"] | Float[Array, "n1 n2"]:
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
            * `"auto"` takes `"structured"` where it has a rule for every leaf and
              `"ntk_vector_products"` elsewhere.

    Returns:
        The kernel, `(n1, n2, k, k)` or `(n1, n2)`, in the dtype of the outputs.

    Raises:
        ValueError: Batches that are empty or of different example shapes, masks that
            do not fit `params`, outputs that are not `(n, k)`, or an unknown option.

    References:
        Jacot et al., "Neural Tangent Kernel", NeurIPS 2018. Liu and Zenke, "Finding
        trainable sparse networks through Neural Tangent Transfer", ICML 2020: the
        masked kernel is that of equation 3 of its appendix.
    """
    for name, value, known in (
        ("wrt", wrt, ("masked", "all")),
        ("output", output, ("full", "trace")),
        ("method", method, tuple(_METHODS)),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {known}")
    x2 = x1 if x2 is None else x2
    _check_batches(x1, x2)
    leaves, treedef = jax.tree.flatten(params)
    leaf_masks = _leaf_masks(params, masks)
    _check_outputs(apply_fn, params, x1)

    weights = [select(leaf, mask) for leaf, mask in zip(leaves, leaf_masks, strict=True)]
    operands = (weights, leaf_masks, x1, None if x2 is x1 else x2)
    weights, leaf_masks, x1, x2 = varying_as(operands, operands)
    x2 = x1 if x2 is None else x2
    counted = leaf_masks if wrt == "masked" else [None] * len(leaves)

    def fn(leaves, x):
        return apply_fn(jax.tree.unflatten(treedef, leaves), x)

    with jax.default_matmul_precision("highest"):
        return _METHODS[method](fn, weights, counted, x1, x2, trace=output == "trace")


def _check_batches(x1: Any, x2: Any) -> None:
    for name, x in (("x1", x1), ("x2", x2)):
        if jnp.ndim(x) == 0 or len(x) == 0:
            raise ValueError(f"{name} has shape {jnp.shape(x)}, expected at least one example")
    if jnp.shape(x1)[1:] != jnp.shape(x2)[1:]:
        raise ValueError(
            f"x1 and x2 must hold examples of one shape, got {jnp.shape(x1)} and {jnp.shape(x2)}"
        )


def _check_outputs(apply_fn: ApplyFn, params: Params, x: Any) -> None:
    outputs = jax.eval_shape(apply_fn, params, x)
    shape = getattr(outputs, "shape", type(outputs).__name__)
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[0] != len(x):
        raise ValueError(
            f"apply_fn must map a batch of {len(x)} to an array ({len(x)}, k), got {shape}"
        )


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
