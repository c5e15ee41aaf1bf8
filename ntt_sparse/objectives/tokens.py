r"""What dynamic tokens are trained by, besides their task.

Source: Rao et al. 2021, "DynamicViT", https://arxiv.org/abs/2106.02034, Section 3.3, and its
published code. A loss is `task + 2 ratio + 0.5 distillation + 0.5 token distillation` there.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Real

from ntt_sparse._precision import at_least_single
from ntt_sparse._types import Scalar


def keep_ratio_loss(decisions: Float[Array, "s n t"], ratios: Sequence[float]) -> Scalar:
    r"""How far each image is from the part of its tokens that it should keep (Eq. 16).

    $\frac{1}{S} \sum_s \frac{1}{n} \sum_i (\rho_s - \frac{1}{t} \sum_j D_{sij})^2$

    Args:
        decisions: One for tokens that are kept at each of s places.
        ratios: $\rho_s$, in [0, 1].

    Raises:
        ValueError: There is not a ratio for each place, or one is no fraction.
    """
    if any(not isinstance(ratio, Tracer) and not 0 <= ratio <= 1 for ratio in ratios):
        raise ValueError(f"ratios are {ratios}, expected fractions in [0, 1]")
    if len(ratios) != len(decisions):
        raise ValueError(f"{len(ratios)} ratios for {len(decisions)} places, expected one for each")
    kept = jnp.mean(decisions, axis=2)
    return jnp.mean((kept - jnp.asarray(ratios, kept.dtype)[:, None]) ** 2)


def distillation_loss(
    logits: Float[ArrayLike, "..."], teacher_logits: Float[ArrayLike, "..."]
) -> Scalar:
    r"""The mean over images of $\mathrm{KL}(\text{teacher} \| \text{student})$ (Eq. 15).

    The teacher has no derivative. Half precision is computed in float32. A class that the teacher
    excludes (a logit of `-inf`) adds nothing.

    Args:
        logits: Of the student, `(n, k)`.
        teacher_logits: Likewise.

    Raises:
        ValueError: The logits are not of one shape `(n, k)`.
    """
    _check_same("logits", logits, teacher_logits, 2)
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(at_least_single(teacher_logits)))
    student = jax.nn.log_softmax(at_least_single(logits))
    chance = jnp.exp(teacher)
    # Of a class that the teacher excludes nothing is left, not 0 times infinity. NaN stays.
    difference = jnp.where(chance == 0, 0.0, teacher - student)
    return jnp.mean(jnp.sum(chance * difference, axis=1))


def token_distillation_loss(
    features: Float[ArrayLike, "..."],
    teacher_features: Float[ArrayLike, "..."],
    kept: Real[ArrayLike, "..."],
) -> Scalar:
    """The mean squared difference of the tokens that are kept at the end (Eq. 14).

    Over all tokens of the batch that are kept and all features; zero where none is. Neither the
    teacher nor the decisions have a derivative. Half precision is computed in float32.

    Args:
        features: Of the student's tokens, `(n, t, d)`.
        teacher_features: Likewise.
        kept: Above 0 for tokens that are kept, `(n, t)`.

    Raises:
        ValueError: The features are not of one shape `(n, t, d)`, or `kept` is not `(n, t)`.
    """
    _check_same("features", features, teacher_features, 3)
    if jnp.shape(kept) != jnp.shape(features)[:2]:
        raise ValueError(
            f"kept has shape {jnp.shape(kept)}, expected {jnp.shape(features)[:2]}: one for each "
            "token"
        )
    kept = jax.lax.stop_gradient(jnp.asarray(kept))
    difference = at_least_single(features) - jax.lax.stop_gradient(
        at_least_single(teacher_features)
    )
    each = jnp.mean(difference**2, axis=2)
    return jnp.sum(jnp.where(kept > 0, each, 0)) / jnp.maximum(jnp.sum(kept > 0), 1)


def _check_same(name: str, ours: ArrayLike, teachers: ArrayLike, ndim: int) -> None:
    # Others would broadcast, to another loss.
    if jnp.shape(ours) != jnp.shape(teachers) or jnp.ndim(ours) != ndim:
        raise ValueError(
            f"{name} have shape {jnp.shape(ours)} and the teacher's {jnp.shape(teachers)}, "
            f"expected the same, of {ndim} axes"
        )
