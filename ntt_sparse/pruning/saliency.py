"""Saliency: how much a weight is worth before training.

Each function returns a tree of scores with the structure of its params: an
array where a leaf is prunable, `None` elsewhere; the larger score is kept.
`masks.from_scores` turns scores into masks, and its `scope` completes the name
of a published method:

==================  ============  =====================
scores              scope         method
==================  ============  =====================
`snip`              `"global"`    SNIP
`snip`              `"layer"`     Layerwise-SNIP
`logit_snip`        `"global"`    Logit-SNIP
`logit_snip`        `"layer"`     Layerwise-Logit-SNIP
`grasp`             `"global"`    GraSP
`synflow`           `"global"`    SynFlow, in rounds
`magnitude`         either        magnitude pruning
`random`            `"layer"`     random pruning
==================  ============  =====================

(`ntt_sparse.pruning.rounds` is for those that score and prune in many rounds.)

All are pure functions of the params they are given. Some published code scores
a freshly initialised copy of the network instead of the weights it goes on to
train: that is a matter of passing the params of the copy.

All run under `jit` and `vmap`. With `axis_name`, inside `jax.pmap`,
`jax.shard_map` or a named `vmap`, the gradient scores are those of the global
batch on every device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ntt_sparse._precision import at_least_single
from ntt_sparse._types import Params, PRNGKey, Scalar, Scores
from ntt_sparse.pruning._flow import logarithm
from ntt_sparse.pruning.masks import Prunable, map_prunable, matrices, named_leaves


def magnitude(params: Params, *, prunable: Prunable = matrices) -> Scores:
    """The absolute value of each weight.

    Args:
        params: Parameters.
        prunable: Predicate `(path, leaf) -> bool`: which leaves get scores.

    Returns:
        Scores of the shapes and dtypes of the weights, at least 0.

    Raises:
        ValueError: No leaf is prunable.
    """
    return map_prunable(lambda _, leaf: jnp.abs(leaf), params, prunable)


def random(key: PRNGKey, params: Params, *, prunable: Prunable = matrices) -> Scores:
    """Independent uniform draws: their largest entries are a uniformly random subset.

    With `scope="layer"` (or densities per layer) this draws masks with an exact
    count in each layer, each set of places equally likely; with
    `scope="global"` the count is exact over the network only.

    Each leaf draws with the key folded with its index among all leaves, so the
    draw of a leaf depends neither on other shapes nor on the predicate.

    Args:
        key: A typed key.
        params: Parameters; only shapes and dtypes are read.
        prunable: Predicate `(path, leaf) -> bool`: which leaves get scores.

    Returns:
        Scores in [0, 1) of the shapes of the weights. The dtype is that of the
        weights, but at least float32: the few values of half precision would tie,
        and ties favour early entries.

    Raises:
        ValueError: No leaf is prunable.
    """
    index = {name: i for i, name in enumerate(named_leaves(params))}

    def draw(name, leaf):
        dtype = jnp.result_type(jnp.float32, leaf)
        return jax.random.uniform(jax.random.fold_in(key, index[name]), leaf.shape, dtype)

    return map_prunable(draw, params, prunable)


def snip(
    loss_fn: Callable[[Any, Any], Any],
    params: Params,
    batch: Any,
    *,
    prunable: Prunable = matrices,
    axis_name: str | None = None,
) -> Scores:
    """Connection sensitivity: the effect on the loss of a gate on each weight.

    With gates c on the weights, `L(c * theta)`, the score is `|dL/dc|` at c = 1,
    which is `|theta * dL/dtheta|`. A factor on the loss, such as sum or mean over
    the batch, does not change the ranking.

    Args:
        loss_fn: `(params, batch) -> scalar`, the loss without any collective inside.
        params: Parameters to score; leaves that are not prunable get no gradient
            and may have any dtype.
        batch: What `loss_fn` takes; with `axis_name`, this device's part of it.
        prunable: Predicate `(path, leaf) -> bool`: which leaves get scores.
        axis_name: Name of the mapped axis that the batch is split over, in equal
            parts. The loss of the global batch is the mean over that axis.

    Returns:
        Scores of the shapes of the weights, at least 0. The dtype is that of the weights,
        but at least float32: in half precision small products are zero, and tie.

    Raises:
        ValueError: No leaf is prunable.

    References:
        Lee, Ajanthan, Torr: SNIP: Single-shot network pruning based on connection
        sensitivity, ICLR 2019, equations 5 and 6 (without their normalisation).
    """
    return _sensitivity(lambda p: loss_fn(p, batch), params, prunable, jax.lax.pmean, axis_name)


def logit_snip(
    apply_fn: Callable[[Any, Any], Any],
    params: Params,
    x: Any,
    *,
    prunable: Prunable = matrices,
    axis_name: str | None = None,
) -> Scores:
    """Connection sensitivity of the squared norm of the outputs: SNIP without labels.

    The loss of SNIP is replaced by `Z = sum_i ||f(x_i)||^2`. Before the absolute
    value, the scores of a bias-free network that is linear in its weights sum to 2 Z.

    Args:
        apply_fn: The network, `(params, x) -> outputs (n, k)`.
        params: Parameters to score.
        x: Inputs `(n, ...)`; with `axis_name`, this device's part of them.
        prunable: Predicate `(path, leaf) -> bool`: which leaves get scores.
        axis_name: Name of the mapped axis that the inputs are split over; Z is
            summed over it.

    Returns:
        Scores of the shapes of the weights, at least 0. The dtype is that of the weights,
        but at least float32: in half precision small products are zero, and tie.

    Raises:
        ValueError: No leaf is prunable.

    References:
        Liu, Zenke: Finding trainable sparse networks through Neural Tangent
        Transfer, ICML 2020, appendix B.4.
    """

    def squared_norm(p):
        return jnp.sum(jnp.square(apply_fn(p, x)))

    return _sensitivity(squared_norm, params, prunable, jax.lax.psum, axis_name)


def grasp(
    loss_fn: Callable[[Any, Any], Any],
    params: Params,
    batch: Any,
    *,
    prunable: Prunable = matrices,
    axis_name: str | None = None,
) -> Scores:
    """Gradient flow: how much of the squared norm of the gradient rests on each weight.

    The score is `theta * (H g)`, with the gradient g and the Hessian H of the loss in
    the prunable weights. To first order, removing one weight changes `||g||^2` by minus
    twice its score: the weights go first whose removal raises the norm most. The paper
    writes the score with the opposite sign and removes the largest. Scores are signed,
    so a weight of exactly zero, with a score of zero, can rank above others.

    Temperature belongs to the loss: the published one is the cross-entropy of
    `logits / 200`. It changes the ranking; a factor on the loss does not.

    Args:
        loss_fn: `(params, batch) -> scalar`, the loss without any collective inside,
            twice differentiable.
        params: Parameters to score; leaves that are not prunable get no gradient
            and may have any dtype.
        batch: What `loss_fn` takes; with `axis_name`, this device's part of it.
        prunable: Predicate `(path, leaf) -> bool`: which leaves get scores, and which
            weights the norm of the gradient runs over.
        axis_name: Name of the mapped axis that the batch is split over, in equal
            parts. The loss of the global batch is the mean over that axis, and g and
            H are both of that loss.

    Returns:
        Scores of the shapes of the weights, of either sign, of dtypes as those of `snip`.

    Raises:
        ValueError: No leaf is prunable.

    References:
        Wang, Zhang, Grosse: Picking winning tickets before training by preserving
        gradient flow, ICLR 2020, equation 8 (with the opposite sign).
    """
    weights = map_prunable(lambda _, leaf: leaf, params, prunable)
    gradient_fn = _gradient(lambda p: loss_fn(p, batch), params)
    if axis_name is None:
        _, products = jax.jvp(gradient_fn, (weights,), (gradient_fn(weights),))
    else:
        # Reduced before the product: the mean of the devices' own H g is another number.
        local = _varying(weights, axis_name)
        gradients = _varying(jax.lax.pmean(gradient_fn(local), axis_name), axis_name)
        _, products = jax.jvp(gradient_fn, (local,), (gradients,))
        products = jax.lax.pmean(products, axis_name)
    return jax.tree.map(_product, weights, products)


def synflow(
    apply_fn: Callable[[Any, Any], Any],
    params: Params,
    input_shape: tuple[int, ...],
    *,
    prunable: Prunable = matrices,
) -> Scores:
    r"""Synaptic flow: how much of the sum over all paths goes through each weight. No data.

    With all parameters in absolute value and an input of ones, the outputs sum to R, and the
    score is `|theta * dR/dtheta|`. In a chain of layers without biases the scores of each layer
    sum to R.

    R grows with each layer and leaves the range of float32 in deep networks; then gradients are
    infinite or, at low densities, zero. Here numbers carry a power of two of their own through
    the network, so that scores are right up to their common factor: R, but at least 2^-60 and at
    most 2^60 (2^-8 and 2^8 in half precision).

    The published method scores and prunes in 100 rounds (`rounds.prune`); in one round whole
    layers are lost.

    Args:
        apply_fn: The network, `(params, x) -> outputs (1, ...)`, positively homogeneous in what
            flows through it, such as with ReLU, without loops. Normalisation is that of
            evaluation; by groups it takes out what flows.
        params: Parameters to score, floating-point arrays.
        input_shape: Of one example, without a batch.
        prunable: Predicate `(path, leaf) -> bool`: which leaves get scores.

    Returns:
        Scores of the shapes and dtypes of the weights, at least 0. All are 0 if nothing flows.

    Raises:
        ValueError: No leaf is prunable, or the network holds a loop (`scan`, `while`, `cond`).

    References:
        Tanaka, Kunin, Yamins, Ganguli: Pruning neural networks without any data by iteratively
        conserving synaptic flow, NeurIPS 2020, equation 3 and algorithm 1.
    """
    positive = jax.tree.map(jnp.abs, params)
    weights, treedef = jax.tree.flatten(map_prunable(lambda _, leaf: leaf, positive, prunable))
    dtype = jnp.result_type(*weights)

    def flow(leaves: Any, x: Any) -> Any:
        scored = jax.tree.unflatten(treedef, leaves)
        return apply_fn(
            jax.tree.map(lambda p, leaf: p if leaf is None else leaf, positive, scored), x
        )

    def log_flow(leaves: Any) -> Any:
        total, power = logarithm(flow, leaves, jnp.ones((1, *input_shape), dtype))
        # Without a flow its logarithm has no derivative, and the scores are zero.
        return jnp.log(jnp.where(total == 0, 1, jnp.abs(total))), (total, power)

    gradients, (total, power) = jax.grad(log_flow, has_aux=True)(weights)
    # With room for what they are multiplied by.
    most = min(60, jnp.finfo(dtype).maxexp // 2)
    factor = jnp.abs(total) * jnp.exp2(jnp.clip(power, -most, most).astype(dtype))
    scores = [
        (weight * jnp.abs(gradient) * factor).astype(weight.dtype)
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    return jax.tree.unflatten(treedef, scores)


def _sensitivity(
    loss: Callable[[Any], Scalar],
    params: Params,
    prunable: Prunable,
    reduce: Callable[[Any, str], Any],
    axis_name: str | None,
) -> Scores:
    """`|theta * dL/dtheta|`, the gradient reduced over an axis."""
    weights = map_prunable(lambda _, leaf: leaf, params, prunable)
    local = weights if axis_name is None else _varying(weights, axis_name)
    gradients = _gradient(loss, params)(local)
    if axis_name is not None:
        gradients = reduce(gradients, axis_name)
    return jax.tree.map(lambda w, gradient: jnp.abs(_product(w, gradient)), weights, gradients)


def _product(weight: Any, gradient: Any) -> Any:
    """Of two numbers of half precision it is exact in float32, where it does not underflow."""
    return at_least_single(weight) * at_least_single(gradient)


def _gradient(loss: Callable[[Any], Scalar], params: Params) -> Callable[[Any], Any]:
    """The gradient of a loss as a function of the prunable weights, `None` elsewhere."""
    return jax.grad(
        lambda w: loss(jax.tree.map(lambda p, leaf: p if leaf is None else leaf, params, w))
    )


def _varying(tree: Any, axis_name: str) -> Any:
    """The same values, of a type that may differ between devices.

    `shard_map` sums the gradient with respect to a replicated value over devices by
    itself, `pmap` and `vmap` do not. With a varying value none of them does, and the
    caller reduces once. The select does this in all three; `jax.lax.pcast` refuses
    both `vmap` and values that vary already.
    """
    always = jax.lax.axis_index(axis_name) >= 0
    return jax.tree.map(lambda leaf: jnp.where(always, leaf, leaf), tree)
