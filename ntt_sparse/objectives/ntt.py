"""Neural Tangent Transfer: a sparse student that trains like its dense teacher.

The student is pulled towards the outputs and the tangent kernel of the teacher,
on unlabelled inputs. `ntt_loss` is the whole objective. Its two halves can be
called apart: `teacher_targets` needs no gradient and can be a program of its own,
or be kept when the same batch comes back, and `ntt_loss_from_targets` is the
student's part.
"""

import functools
import numbers
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from ntt_sparse._precision import at_least_single
from ntt_sparse._types import ApplyFn, Masks, Params, PRNGKey, Scalar
from ntt_sparse.ntk.difference import squared_difference
from ntt_sparse.ntk.kernel import Method, Wrt, check_options, kernel_and_outputs
from ntt_sparse.ntk.structured import MEMORY_LIMIT, Projections
from ntt_sparse.objectives._checks import check_same_shapes, check_weight
from ntt_sparse.pruning import masks as pruning_masks

Distance: TypeAlias = Literal["full", "trace", "sketch"]


class NTTTerms(NamedTuple):
    """The parts of the loss, before their weights."""

    kernel: Scalar
    """Mean of the squared kernel difference over all n1 n2 k k entries, or what
    `distance` puts in its place."""
    output: Scalar
    """Mean of the squared output difference over all n k entries."""
    l2: Scalar
    """Sum of the squared surviving weights; leaves that are never pruned are left out."""


@jax.tree_util.register_static
class _Static(str):
    """A word that belongs to the structure of a pytree, so that programs know it."""


class TeacherTargets(NamedTuple):
    """What the student is to match on one batch."""

    outputs: Float[Array, "n k"]
    """The teacher's outputs; under `axis_name`, of the local batch."""
    kernel: Float[Array, "n1 n2 ..."]
    """Its kernel between the halves of the batch, as `distance` needs it; under
    `axis_name`, the local rows."""
    distance: str
    """The distance that the kernel is for; no array, also within a program."""
    key: PRNGKey | None = None
    """What the signs of `distance="sketch"` were drawn with, and are drawn with again; the same
    on every device."""


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
    distance: Distance = "full",
    probes: int = 1,
    key: PRNGKey | None = None,
    axis_name: str | None = None,
    method: Method = "auto",
    memory_limit: int = MEMORY_LIMIT,
    max_density: float = 1.0,
) -> tuple[Scalar, NTTTerms]:
    r"""The Neural Tangent Transfer objective on one batch.

    $$L = \gamma^2\, \overline{(\Theta_s - \Theta_t)^2} + \overline{(f_s - f_t)^2}
          + \frac{\beta}{d} \sum_l \|m_l \odot W_l\|_F^2$$

    where bars are means over entries, s is the student $f(x, m \odot \theta)$ and t the
    teacher $f(x, \theta_t)$ with the kernel of all its weights. The kernels are full
    in the outputs and taken between the first n // 2 examples and the rest; the
    outputs are those of the whole batch. d is the density of `masks`.

    The gradient by `params` passes through the mask: pruned entries get exactly zero.
    No gradient reaches `teacher_params`. Derivatives are by reverse mode alone, but for
    `method="jacobian"` and `"ntk_vector_products"`.

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
        distance: What stands for the squared norm $\|\Delta_{ij}\|_F^2$ of the k x k kernel
            difference of a pair. `"full"` is the published objective; the others are ours:

            * `"trace"` compares traces, $(\mathrm{tr}\,\Delta_{ij})^2 / k$: a lower bound that is
              attained when the difference is a multiple of the identity.
            * `"sketch"` estimates it without bias as the mean of $(u^\top \Delta_{ij} v)^2$
              over all pairs of `probes` random sign vectors u of example i and as many v of
              example j. An example then costs `probes` backward passes and not k. For one
              pair the variance is at most $8 \|\Delta_{ij}\|_F^4$ with one probe; the mean over
              n1 n2 pairs, whose signs are shared along rows and columns, has far less.

        probes: Sign vectors for each example, for `"sketch"`.
        key: For `"sketch"`: draws the signs. Use another key in each step.
        axis_name: The mapped axis over which the batch is split.
        method: How kernels are computed, see `empirical_ntk`.
        memory_limit: About how many bytes it may take to make a kernel, see `empirical_ntk`.
        max_density: An upper bound on the density of every mask, see `empirical_ntk`: it makes
            convolutions cheaper, and the kernel is exact even if it does not hold.

    Returns:
        The loss and its unweighted terms. Of networks in half precision the sums over weights and
        pairs are in float32, and so is the loss.

    Raises:
        ValueError: `masks` or `teacher_params` do not fit `params`, inputs that are not one
            array, fewer than two examples, a weight that is negative or not finite, an
            unknown `distance`, a sketch without a typed `key` or probes, or a fault that
            `empirical_ntk` raises.

    References:
        Liu and Zenke, "Finding trainable sparse networks through Neural Tangent
        Transfer", ICML 2020, equation 14. The normalisation and the decay divided by
        density follow the authors' code.
    """
    common: dict[str, Any] = {
        "distance": distance,
        "probes": probes,
        "key": key,
        "axis_name": axis_name,
        "method": method,
        "memory_limit": memory_limit,
    }
    check_same_shapes(params, teacher_params)
    _check_student(params, masks, kernel_weight, l2_weight)
    _check(x, **common, wrt=wrt, max_density=max_density)
    weights: dict[str, Any] = {"kernel_weight": kernel_weight, "l2_weight": l2_weight}
    student: dict[str, Any] = {"masks": masks, "wrt": wrt, "max_density": max_density}
    return _loss(apply_fn, params, x, teacher_params=teacher_params, **weights, **student, **common)


def teacher_targets(
    apply_fn: ApplyFn,
    teacher_params: Params,
    x: Shaped[Array, "n ..."],
    *,
    distance: Distance = "full",
    probes: int = 1,
    key: PRNGKey | None = None,
    axis_name: str | None = None,
    method: Method = "auto",
    memory_limit: int = MEMORY_LIMIT,
) -> TeacherTargets:
    """The teacher's outputs and kernel on one batch, without gradient.

    See `ntt_loss` for the arguments. `key` and `probes` of a sketch go with the targets. Under
    `axis_name` every device gets its own part, to be given back to `ntt_loss_from_targets` on
    the same device.

    Raises:
        ValueError: Inputs that are not one array of two examples or more, an unknown `distance`,
            a sketch without a typed `key` or probes, or a fault that `empirical_ntk` raises.
    """
    how = {"method": method, "memory_limit": memory_limit}
    _check(x, distance=distance, probes=probes, key=key, axis_name=axis_name, **how)
    pairs = _pairs(x, axis_name)
    teacher_params = jax.lax.stop_gradient(teacher_params)
    how |= _options(apply_fn, teacher_params, pairs, distance, probes, key)
    result = kernel_and_outputs(apply_fn, teacher_params, pairs.rows, pairs.columns, **how)
    both = jnp.concatenate([result.outputs1, result.outputs2])
    outputs = _outputs(apply_fn, teacher_params, x, both, axis_name)
    key = key if distance == "sketch" else None
    return TeacherTargets(outputs, result.kernel, _Static(distance), key)


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
    distance: Distance = "full",
    axis_name: str | None = None,
    method: Method = "auto",
    memory_limit: int = MEMORY_LIMIT,
    max_density: float = 1.0,
) -> tuple[Scalar, NTTTerms]:
    """The objective of `ntt_loss`, given what `teacher_targets` returned for the same `x`.

    A sketch is drawn with the key and the probes of the targets: others would compare what has
    nothing to do with each other.

    Raises:
        ValueError: As `ntt_loss`; also targets of another distance, batch or output size.
    """
    how: dict[str, Any] = {
        "wrt": wrt,
        "distance": distance,
        # Other kernels have other numbers there, which are not read.
        "probes": targets.kernel.shape[-1],
        "key": targets.key,
        "axis_name": axis_name,
        "method": method,
        "memory_limit": memory_limit,
        "max_density": max_density,
    }
    _check_student(params, masks, kernel_weight, l2_weight)
    if targets.distance != distance:
        raise ValueError(
            f"targets are for distance={str(targets.distance)!r}, the loss for {distance!r}: "
            "give both functions the same"
        )
    _check(x, **how)
    if len(targets.outputs) != len(x):
        raise ValueError(f"targets are of {len(targets.outputs)} examples, x has {len(x)}")
    how |= {"kernel_weight": kernel_weight, "l2_weight": l2_weight, "masks": masks}
    return _loss(apply_fn, params, x, targets=targets, **how)


def _loss(
    apply_fn: ApplyFn,
    params: Params,
    x: Array,
    *,
    teacher_params: Params | None = None,
    targets: TeacherTargets | None = None,
    masks: Masks,
    kernel_weight: ArrayLike,
    l2_weight: ArrayLike,
    distance: Distance,
    probes: int,
    key: PRNGKey | None,
    axis_name: str | None,
    **how: Any,
) -> tuple[Scalar, NTTTerms]:
    """The objective against a teacher, or against what is known of it."""
    kept, total = _kept(masks)
    pairs = _pairs(x, axis_name)
    how |= _options(apply_fn, params, pairs, distance, probes, key)
    difference = squared_difference(
        apply_fn,
        params,
        pairs.rows,
        pairs.columns,
        pairs.valid,
        masks=masks,
        other_params=teacher_params,
        other_kernel=None if targets is None else targets.kernel,
        **how,
    )
    weights = pruning_masks.apply(params, masks)
    outputs = _outputs(apply_fn, weights, x, difference.outputs, axis_name)
    if targets is not None:
        theirs = targets.outputs
    else:
        theirs = _outputs(
            apply_fn, jax.lax.stop_gradient(teacher_params), x, difference.other_outputs, axis_name
        )
    if outputs.shape != theirs.shape:
        raise ValueError(f"targets.outputs has shape {theirs.shape}, the student {outputs.shape}")
    # The squared norm of a pair's k x k difference is k times a bound, or probes^2 times
    # an estimate.
    scale = {"full": 1, "trace": outputs.shape[1], "sketch": probes**2}[distance]
    count = pairs.total * len(pairs.columns) * outputs.shape[1] ** 2
    kernel_term = at_least_single(difference.squares) / (scale * count)
    output_term = jnp.mean(jnp.square(outputs - theirs))
    if axis_name is not None:
        kernel_term = jax.lax.psum(kernel_term, axis_name)
        output_term = jax.lax.pmean(output_term, axis_name)
    l2 = _sum_of_squares(weights, masks)
    terms = NTTTerms(kernel_term, output_term, l2)
    # A network without any weight has l2 = 0: count one weight, not 0 / 0.
    inverse_density = total / jnp.maximum(kept, 1).astype(l2.dtype)
    loss = kernel_weight * kernel_term + output_term + l2_weight * inverse_density * l2
    return jnp.asarray(loss), terms


class _Pairs(NamedTuple):
    """The examples whose pairs this device computes."""

    rows: Array
    """A contiguous part of the first half of the batch."""
    columns: Array
    """The whole second half."""
    positions: Array
    """Of the rows in the batch."""
    valid: Array
    """1 for rows to count and 0 for padding."""
    total: int
    """The number of rows over all devices."""


def _pairs(x: Any, axis_name: str | None) -> _Pairs:
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    count = len(x) * devices // 2
    if axis_name is None:
        return _Pairs(x[:count], x[count:], jnp.arange(count), jnp.ones(count, bool), count)
    x = jax.lax.all_gather(x, axis_name, tiled=True)
    share = -(-count // devices)
    positions = jax.lax.axis_index(axis_name) * share + jnp.arange(share)
    valid = positions < count
    # Devices beyond the end repeat the last row, which then does not count.
    positions = jnp.minimum(positions, count - 1)
    return _Pairs(x[positions], x[count:], positions, valid, count)


def _options(
    apply_fn: ApplyFn,
    params: Params,
    pairs: _Pairs,
    distance: Distance,
    probes: int,
    key: PRNGKey | None,
) -> dict[str, Any]:
    """The arguments of `empirical_ntk` for a distance."""
    if distance != "sketch":
        return {"output": distance}
    outputs = jax.eval_shape(apply_fn, params, pairs.columns)
    shape, dtype = (probes, outputs.shape[-1]), outputs.dtype
    row_key, column_key = jax.random.split(cast(PRNGKey, key))
    u = jax.random.rademacher(row_key, (pairs.total, *shape), dtype)[pairs.positions]
    projections: Projections = (
        u,
        jax.random.rademacher(column_key, (len(pairs.columns), *shape), dtype),
    )
    return {"projections": projections}


def _outputs(
    apply_fn: ApplyFn, params: Params, x: Array, of_pairs: Array | None, axis_name: str | None
) -> Float[Array, "n k"]:
    """The outputs for the local batch: those that the kernel was made with, where it has them."""
    if axis_name is not None or of_pairs is None:
        return apply_fn(params, x)
    return of_pairs


def _kept(masks: Masks) -> tuple[Any, int]:
    """The number of surviving and of all prunable weights."""
    leaves = jax.tree.leaves(masks)
    if not leaves:
        raise ValueError("masks hold no array: every leaf is None, so no density is defined")
    return sum(jnp.sum(m, dtype=jnp.int32) for m in leaves), sum(m.size for m in leaves)


def _sum_of_squares(weights: Params, masks: Masks) -> Scalar:
    def of_leaf(weight, mask):
        if mask is None:
            return None
        weight = at_least_single(weight)
        return jnp.sum(weight * weight)

    squares = jax.tree.map(of_leaf, weights, masks)
    return functools.reduce(jnp.add, jax.tree.leaves(squares))


def _check_student(params: Params, masks: Masks, kernel_weight: Any, l2_weight: Any) -> None:
    """Checks what concerns the student alone."""
    for name, weight in (("kernel_weight", kernel_weight), ("l2_weight", l2_weight)):
        if isinstance(weight, str) or weight is None:
            raise ValueError(f"{name} is {weight!r}, expected a finite number of at least 0")
        check_weight(name, weight)
    pruning_masks.check(params, masks)
    _kept(masks)


def _check(
    x: Any,
    *,
    distance: str,
    probes: Any,
    key: Any,
    axis_name: str | None,
    **options: Any,
) -> None:
    """Checks what concerns both networks, before any work; `options` are the kernel's."""
    check_options(**options)
    if distance not in ("full", "trace", "sketch"):
        raise ValueError(f"distance is {distance!r}, expected 'full', 'trace' or 'sketch'")
    if distance == "sketch":
        if not isinstance(probes, numbers.Integral) or probes < 1:
            raise ValueError(f"probes is {probes!r}, expected a whole number of at least 1")
        if key is None:
            raise ValueError("distance='sketch' needs a key, such as jax.random.key(0)")
        typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if not typed or key.shape != ():
            got = f"{key.dtype}{key.shape}" if isinstance(key, jax.Array) else repr(key)
            raise ValueError(f"key is {got}, expected one typed key, such as jax.random.key(0)")
    if not isinstance(x, jax.Array | np.ndarray):
        raise ValueError(f"x is of type {type(x).__name__}, expected one array of inputs (n, ...)")
    if x.ndim == 0:
        raise ValueError("x is a scalar, expected a batch of inputs")
    size = len(x) * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    if size < 2:
        raise ValueError(f"a batch of {size} holds no pair for the kernel: give two or more inputs")
