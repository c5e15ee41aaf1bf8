"""Neural Tangent Transfer: a sparse student that trains like its dense teacher.

The student is pulled towards the outputs and the tangent kernel of the teacher,
on unlabelled inputs. `ntt_loss` is the whole objective. Its two halves can be
called apart: `teacher_targets` needs no gradient and can be a program of its own,
or be kept when the same batch comes back, and `ntt_loss_from_targets` is the
student's part.
"""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from ntt_sparse._types import ApplyFn, Masks, Params, Scalar
from ntt_sparse.ntk import empirical_ntk
from ntt_sparse.ntk.kernel import Method, Wrt
from ntt_sparse.pruning import masks as pruning_masks


class NTTTerms(NamedTuple):
    """The parts of the loss, before their weights."""

    kernel: Scalar
    """Mean of the squared kernel difference over all n1 n2 k k entries."""
    output: Scalar
    """Mean of the squared output difference over all n k entries."""
    l2: Scalar
    """Sum of the squared surviving weights; leaves that are never pruned are left out."""


class TeacherTargets(NamedTuple):
    """What the student is to match on one batch."""

    outputs: Float[Array, "n k"]
    """The teacher's outputs; under `axis_name`, of the local batch."""
    kernel: Float[Array, "n1 n2 k k"]
    """Its kernel between the halves of the batch; under `axis_name`, the local rows."""


def ntt_loss(
    apply_fn: ApplyFn,
    params: Params,
    masks: Masks,
    teacher_params: Params,
    x: Shaped[Array, "n ..."],
    *,
    kernel_weight: ArrayLike,
    l2_weight: ArrayLike = 0.0,
    wrt: Wrt = "masked",
    axis_name: str | None = None,
    method: Method = "auto",
) -> tuple[Scalar, NTTTerms]:
    r"""The Neural Tangent Transfer objective on one batch.

    $$L = \gamma^2\, \overline{(\Theta_s - \Theta_t)^2} + \overline{(f_s - f_t)^2}
          + \frac{\beta}{d} \sum_l \|m_l \odot W_l\|_F^2$$

    where bars are means over entries, s is the student $f(x, m \odot \theta)$ and t the
    teacher $f(x, \theta_t)$ with the kernel of all its weights. The kernels are full
    in the outputs and taken between the first n // 2 examples and the rest; the
    outputs are those of the whole batch. d is the density of `masks`.

    The gradient by `params` passes through the mask: pruned entries get exactly zero.
    No gradient reaches `teacher_params`.

    With `axis_name`, inside `jax.pmap` or `jax.shard_map`, `x` is the local part of a
    batch split over that axis, and everything else is the same on every device. The
    value is that of the whole batch, its examples in axis order; each device gathers
    the inputs and computes its share of the pairs. The mean over devices is in the
    loss, so gradients are taken like this:

    * `jax.shard_map` (with its default `check_vma=True`) and params that enter
      replicated: `jax.grad` of this loss is complete.
    * `jax.pmap`, or `jax.shard_map` with `check_vma=False`: average the gradients,
      `jax.lax.pmean(grads, axis_name)`.

    Args:
        apply_fn: A pure function `apply_fn(params, x) -> (n, k)`, each output a
            function of its own example.
        params: The student's unmasked parameters.
        masks: Masks of the structure of `params`; `None` for leaves never pruned.
        teacher_params: The teacher's parameters, structure and shapes of `params`.
        x: Inputs, `(n, ...)`, at least two over all devices.
        kernel_weight: $\gamma^2$, at least 0; may be traced.
        l2_weight: $\beta$, at least 0; may be traced.
        wrt: Which weights the student's kernel is made of, see `empirical_ntk`.
            `"masked"` is the published definition, `"all"` that of the original code.
        axis_name: The mapped axis over which the batch is split.
        method: How kernels are computed, see `empirical_ntk`.

    Returns:
        The loss and its unweighted terms.

    Raises:
        ValueError: `masks` or `teacher_params` do not fit `params`, fewer than two
            examples, a weight that is negative or not finite, or a fault that
            `empirical_ntk` raises.

    References:
        Liu and Zenke, "Finding trainable sparse networks through Neural Tangent
        Transfer", ICML 2020, equation 14. The normalisation and the decay divided by
        density follow the authors' code.
    """
    _check_same(params, teacher_params)
    targets = teacher_targets(apply_fn, teacher_params, x, axis_name=axis_name, method=method)
    return ntt_loss_from_targets(
        apply_fn,
        params,
        masks,
        targets,
        x,
        kernel_weight=kernel_weight,
        l2_weight=l2_weight,
        wrt=wrt,
        axis_name=axis_name,
        method=method,
    )


def teacher_targets(
    apply_fn: ApplyFn,
    teacher_params: Params,
    x: Shaped[Array, "n ..."],
    *,
    axis_name: str | None = None,
    method: Method = "auto",
) -> TeacherTargets:
    """The teacher's outputs and kernel on one batch, without gradient.

    See `ntt_loss` for the arguments. Under `axis_name` every device gets its own
    part, to be given back to `ntt_loss_from_targets` on the same device.

    Raises:
        ValueError: Fewer than two examples, or a fault that `empirical_ntk` raises.
    """
    rows, columns, _, _ = _pairs(x, axis_name)
    teacher_params = jax.lax.stop_gradient(teacher_params)
    kernel = empirical_ntk(apply_fn, teacher_params, rows, columns, method=method)
    return TeacherTargets(apply_fn(teacher_params, x), kernel)


def ntt_loss_from_targets(
    apply_fn: ApplyFn,
    params: Params,
    masks: Masks,
    targets: TeacherTargets,
    x: Shaped[Array, "n ..."],
    *,
    kernel_weight: ArrayLike,
    l2_weight: ArrayLike = 0.0,
    wrt: Wrt = "masked",
    axis_name: str | None = None,
    method: Method = "auto",
) -> tuple[Scalar, NTTTerms]:
    """The objective of `ntt_loss`, given what `teacher_targets` returned for the same `x`.

    Raises:
        ValueError: As `ntt_loss`; also targets of another batch size or output size.
    """
    _check_weight("kernel_weight", kernel_weight)
    _check_weight("l2_weight", l2_weight)
    pruning_masks.check(params, masks)
    kept, total = _kept(masks)
    rows, columns, valid, count = _pairs(x, axis_name)
    kernel = empirical_ntk(apply_fn, params, rows, columns, masks=masks, wrt=wrt, method=method)
    weights = pruning_masks.apply(params, masks)
    outputs = apply_fn(weights, x)
    for name, ours, theirs in zip(targets._fields, (outputs, kernel), targets, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"targets.{name} has shape {theirs.shape}, the student {ours.shape}")

    squares = jnp.square(kernel - targets.kernel) * valid[:, None, None, None]
    kernel_term = jnp.sum(squares) / (count * len(columns) * kernel.shape[2] ** 2)
    output_term = jnp.mean(jnp.square(outputs - targets.outputs))
    if axis_name is not None:
        kernel_term = jax.lax.psum(kernel_term, axis_name)
        output_term = jax.lax.pmean(output_term, axis_name)
    l2 = _sum_of_squares(weights, masks)
    terms = NTTTerms(kernel_term, output_term, l2)
    # A network without any weight has l2 = 0: count one weight, not 0 / 0.
    inverse_density = total / jnp.maximum(kept, 1).astype(l2.dtype)
    loss = kernel_weight * kernel_term + output_term + l2_weight * inverse_density * l2
    return jnp.asarray(loss), terms


def _pairs(x: Any, axis_name: str | None) -> tuple[Array, Array, Array, int]:
    """The examples whose pairs this device computes.

    Returns:
        The rows, a contiguous part of the first half of the batch; the columns, the
        whole second half; 1 for rows to count and 0 for padding; the number of rows
        over all devices.
    """
    if jnp.ndim(x) == 0:
        raise ValueError("x is a scalar, expected a batch of inputs")
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    size = len(x) * devices
    if size < 2:
        raise ValueError(f"a batch of {size} holds no pair for the kernel: give two or more inputs")
    count = size // 2
    if axis_name is None:
        return x[:count], x[count:], jnp.ones(count, bool), count
    x = jax.lax.all_gather(x, axis_name, tiled=True)
    share = -(-count // devices)
    positions = jax.lax.axis_index(axis_name) * share + jnp.arange(share)
    # Devices beyond the end repeat the last row, which then does not count.
    return x[jnp.minimum(positions, count - 1)], x[count:], positions < count, count


def _kept(masks: Masks) -> tuple[Any, int]:
    """The number of surviving and of all prunable weights."""
    leaves = jax.tree.leaves(masks)
    if not leaves:
        raise ValueError("masks hold no array: every leaf is None, so no density is defined")
    return sum(jnp.sum(m, dtype=jnp.int32) for m in leaves), sum(m.size for m in leaves)


def _sum_of_squares(weights: Params, masks: Masks) -> Scalar:
    squares = jax.tree.map(lambda w, m: None if m is None else jnp.sum(w * w), weights, masks)
    return functools.reduce(jnp.add, jax.tree.leaves(squares))


def _check_same(params: Params, teacher_params: Params) -> None:
    ours, theirs = jax.tree.structure(params), jax.tree.structure(teacher_params)
    if ours != theirs:
        raise ValueError(f"teacher_params have structure {theirs}, params have {ours}")
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(teacher_params), strict=True
    ):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"teacher's {pruning_masks.path_name(path)!r} has shape {jnp.shape(other)}, "
                f"the student's {jnp.shape(leaf)}"
            )


def _check_weight(name: str, value: ArrayLike) -> None:
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} has shape {jnp.shape(value)}, expected a scalar")
    # The negated form also refuses NaN.
    if not isinstance(value, Tracer) and not 0.0 <= float(cast(float, value)) < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number of at least 0")
