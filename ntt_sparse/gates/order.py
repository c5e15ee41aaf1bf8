"""In which order the channels of a layer are closed.

At initialisation channels are alike, and any order will do: that of the index, or a random
one. The channels of a trained network are not (Bu et al. 2021, Section 6, where this is left
to the future): those that matter least should be closed first.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Real

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
        ValueError: Not a vector.
    """
    scores = jnp.asarray(scores)
    if scores.ndim != 1:
        raise ValueError(f"scores have shape {scores.shape}, expected one per channel, (n,)")
    # A permutation is its own inverse's argsort.
    return jnp.argsort(jnp.argsort(scores, stable=True))


def weight_norms(kernel: Float[ArrayLike, "... n"]) -> Float[Array, " n"]:
    """The Euclidean norm of the weights that make each channel, the last axis of a kernel."""
    kernel = jnp.asarray(kernel)
    return jnp.sqrt(jnp.sum(kernel**2, axis=tuple(range(kernel.ndim - 1))))


def mutual_information(
    activations: Real[ArrayLike, "..."],
    labels: Int[ArrayLike, "..."],
    num_classes: int,
    *,
    bins: int = 10,
) -> Float[Array, " n"]:
    """What the activation of each channel tells about the class of an example, in nats.

    The plug-in estimate with the activations of a channel in `bins` classes of equal counts.
    It is biased upwards by about `(bins - 1) (num_classes - 1) / (2 examples)`, by the same
    amount for all channels, so their order is not affected.

    Args:
        activations: `(examples, n)`, one number per example and channel, such as the mean of
            a feature map over its positions.
        labels: `(examples,)`, in `0..num_classes-1`.
        num_classes: Classes.
        bins: Classes of activations, 2 to `examples`.

    Returns:
        `(n,)`, each from 0 to `log(min(bins, num_classes))`; 0 for a constant channel.

    Raises:
        ValueError: Shapes do not fit, or `bins` makes no sense.
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
    edges = jnp.quantile(activations, jnp.linspace(0, 1, bins + 1)[1:-1], axis=0)
    # Equal activations share a bin, so a channel that is constant tells nothing.
    places = jnp.sum(activations[None] > edges[:, None], axis=0)
    one_hot = jax.nn.one_hot(places, bins, axis=0) / examples
    joint = jnp.einsum("ben,ec->nbc", one_hot, jax.nn.one_hot(labels, num_classes))
    independent = jnp.sum(joint, 1, keepdims=True) * jnp.sum(joint, 2, keepdims=True)
    # 0 log 0 is 0.
    ratio = jnp.where(joint > 0, joint / jnp.where(independent > 0, independent, 1), 1)
    # Never below zero but by rounding.
    return jnp.maximum(jnp.sum(joint * jnp.log(ratio), axis=(1, 2)), 0)
