"""In which order the channels of a layer are closed.

At initialisation channels are alike, and any order will do: that of the index, or a random
one. The channels of a trained network are not (Bu et al. 2021, Section 6, where this is left
to the future): those that matter least should be closed first.
"""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int, Real

from ntt_sparse._precision import at_least_single
from ntt_sparse._types import PRNGKey


def random(key: PRNGKey, n: int) -> Int[Array, " n"]:
    """A random order of `n` channels, as ranks (Bu et al. 2021, Table 2)."""
    return jax.random.permutation(key, n)


def by_score(scores: Real[ArrayLike, "..."]) -> Int[Array, " n"]:
    """Ranks such that channels of low scores are closed first; of equal ones the first.

    Args:
        scores: `(n,)`, one for each channel.

    Returns:
        `(n,)`, a permutation of `0..n-1`.

    Raises:
        ValueError: Not a vector, or a score is NaN (where it is no tracer).
    """
    scores = jnp.asarray(scores)
    if not isinstance(scores, Tracer) and jnp.any(jnp.isnan(scores)):
        raise ValueError(f"scores are {scores}, expected no NaN: it has no place in an order")
    if scores.ndim != 1:
        raise ValueError(f"scores have shape {scores.shape}, expected one per channel, (n,)")
    # A permutation is its own inverse's argsort.
    return jnp.argsort(jnp.argsort(scores, stable=True))


def weight_norms(kernel: Float[ArrayLike, "... n"]) -> Float[Array, " n"]:
    """The Euclidean norm of the weights that make each channel, the last axis of a kernel.

    In float32 at least: in half precision many norms are equal, and their order is lost.
    """
    kernel = at_least_single(kernel)
    return jnp.sqrt(jnp.sum(kernel**2, axis=tuple(range(kernel.ndim - 1))))


def mutual_information(
    activations: Real[ArrayLike, "..."],
    labels: Int[ArrayLike, "..."],
    num_classes: int,
    *,
    bins: int = 10,
) -> Float[Array, " n"]:
    """What the activation of each channel tells about the class of an example, in nats.

    The plug-in estimate with the activations of a channel in `bins` classes by their quantiles
    (equal activations share one), less its bias to first order (Miller 1955), which differs
    between channels that use more or fewer of the classes.

    Args:
        activations: `(examples, n)`, one number per example and channel, such as the mean of
            a feature map over its positions.
        labels: `(examples,)`, in `0..num_classes-1`.
        num_classes: Classes.
        bins: Classes of activations, 2 to `examples`.

    Returns:
        `(n,)`, each up to `log(min(bins, num_classes))`; about 0, also a little below it, for
        noise, 0 for a constant channel, NaN for one with an activation that is NaN.

    Raises:
        ValueError: Shapes do not fit, `bins` makes no sense, or a label, where it is known, is
            out of range.
    """
    activations, labels = jnp.asarray(activations), jnp.asarray(labels)
    if activations.ndim != 2 or labels.shape != activations.shape[:1]:
        raise ValueError(
            f"activations and labels have shapes {activations.shape} and {labels.shape}, "
            "expected (examples, n) and (examples,)"
        )
    examples = len(labels)
    if not 2 <= bins <= examples:
        raise ValueError(f"{bins=}, expected 2 to {examples}, the number of examples")
    if not isinstance(labels, Tracer) and not 0 <= jnp.min(labels) <= jnp.max(labels) < num_classes:
        raise ValueError(
            f"labels are from {jnp.min(labels)} to {jnp.max(labels)}, expected 0 to "
            f"{num_classes - 1}"
        )
    edges = jnp.quantile(activations, jnp.linspace(0, 1, bins + 1)[1:-1], axis=0)
    # Equal activations share a bin, so a channel that is constant tells nothing.
    places = jnp.sum(activations[None] > edges[:, None], axis=0)
    joint = jnp.einsum(
        "ben,ec->nbc", jax.nn.one_hot(places, bins, axis=0), jax.nn.one_hot(labels, num_classes),
        precision="highest",
    ) / examples  # fmt: skip
    independent = jnp.sum(joint, 1, keepdims=True) * jnp.sum(joint, 2, keepdims=True)
    # 0 log 0 is 0.
    ratio = jnp.where(joint > 0, joint / jnp.where(independent > 0, independent, 1), 1)
    value = jnp.sum(joint * jnp.log(ratio), axis=(1, 2))
    used = [jnp.sum(joint > 0, (1, 2)), *(jnp.sum(jnp.sum(joint, i) > 0, 1) for i in (1, 2))]
    bias = (used[0] - used[1] - used[2] + 1) / (2 * examples)
    missing = jnp.any(jnp.isnan(activations), axis=0)
    return jnp.where(missing, jnp.nan, value - bias)
