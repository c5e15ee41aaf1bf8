r"""Tokens that say what others say already: similarities in the decision which tokens to keep.

Source: Ni et al. 2023, https://arxiv.org/abs/2307.07389, appendix, Eq. 13 and Algorithm 1.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from ntt_sparse._precision import at_least_single
from ntt_sparse.similarity.grams import unit_gram

# Of a token that is much like others. The derivative of its logarithm is the inverse, and has to be
# moderate.
_LEAST_CHANCE = 0.01
CHOICES = {
    "reduce": ("sum", "mean", "relative"),
    "rows": ("heads", "batch"),
    "scale": ("probability", "logarithm"),
}
"""What the fields of `Redundancy` may be."""


@dataclasses.dataclass(frozen=True)
class Redundancy:
    r"""How much a token's likeness to others lowers its chance to be kept (Eq. 13).

    $\pi'_i = \pi_i - w \sum_{j \ne i} \mathrm{CKA}(X_i, X_j)$ over the tokens that are left, with
    the sum, its mean, or what a token's mean is above that of all. The paper leaves open what the
    rows of $X_i$ are, for one token is one vector, whether $\pi$ is a probability or its logarithm,
    and whether similarities are differentiated.

    Attributes:
        weight: w, 0 or more.
        reduce: "mean" over the others, or "sum", as the equation is written: up to 195 numbers
            near one against a probability. Where so much is taken off that no chance is left,
            training drops nearly every token at first. "relative" is
            ours: the mean, less that of the tokens of the image, which says what goes and leaves
            to the prediction how much does.
        rows: "heads" of a token, so that an image is judged by itself; of two heads all
            similarities are one. Or the "batch": the token at a position in all images that still
            have it, so that positions are judged, and an image alone has no similarities.
        scale: What similarities are taken off: the "probability", which is then held between 0.01
            and 0.99, or its "logarithm", after which those of keeping and dropping are normalised.
        differentiate: Whether similarities have a derivative, so that training makes tokens unlike
            that it wants to keep.
    """

    weight: float = 0.5
    reduce: str = "relative"
    rows: str = "heads"
    scale: str = "probability"
    differentiate: bool = False

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: The weight is negative or not finite, or a choice is unknown.
        """
        # The negated form also refuses NaN.
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight is {self.weight}, expected a finite number, 0 or more")
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}, expected one of {', '.join(choices)}"
                )


def head_similarities(tokens: Float[Array, "n t d"], heads: int) -> Float[Array, "n t t"]:
    """Linear CKA of all pairs of tokens of an image, whose heads are the examples.

    Args:
        tokens: `(n, t, d)`.
        heads: They divide d; of one or of heads that are all equal similarities are 0, of two
            otherwise 1.

    Returns:
        `(n, t, t)`, in [0, 1], float32 at least.
    """
    n, t, d = tokens.shape
    rows = at_least_single(tokens).reshape(n * t, heads, d // heads)
    units = jax.vmap(unit_gram)(rows).reshape(n, t, heads * heads)
    return jnp.einsum("nip,njp->nij", units, units, precision="highest")


def batch_similarities(
    tokens: Float[Array, "n t d"], policy: Real[Array, "n t"]
) -> Float[Array, "t t"]:
    """Linear CKA of all pairs of positions, with the images of a batch as the examples.

    Args:
        tokens: `(n, t, d)`.
        policy: One for tokens that are left. Others are at the mean of those at their position:
            they say nothing.

    Returns:
        `(t, t)`, in [0, 1], float32 at least; 0 for positions that are left in fewer than two
        images.
    """
    tokens, kept = at_least_single(tokens), policy[..., None]
    mean = jnp.sum(tokens * kept, axis=0) / jnp.maximum(jnp.sum(kept, axis=0), 1)
    rows = jnp.moveaxis((tokens - mean) * kept, 1, 0)
    units = jax.vmap(unit_gram)(rows).reshape(tokens.shape[1], -1)
    return jnp.einsum("ip,jp->ij", units, units, precision="highest")


def adjusted(
    log_probs: Float[Array, "n t 2"], likeness: Float[Array, "n t"], redundancy: Redundancy
) -> Float[Array, "n t 2"]:
    """Logarithms of the chances to be kept and dropped, less what others say already.

    Where likeness is taken off a probability it is held between 0.01 and 0.99, with the derivative
    of one that is not, so that tokens without a chance can come back.

    Args:
        log_probs: Of the prediction, kept first.
        likeness: Of each token to others.
        redundancy: How it is taken off.
    """
    score = remaining(log_probs, likeness, redundancy)
    if redundancy.scale == "logarithm":
        return jnp.stack([jax.nn.log_sigmoid(score), jax.nn.log_sigmoid(-score)], axis=-1)
    held = jax.lax.stop_gradient(jnp.clip(score, _LEAST_CHANCE, 1 - _LEAST_CHANCE))
    # In this order the difference is zero, however large the score.
    chance = held + (score - jax.lax.stop_gradient(score))
    return jnp.log(jnp.stack([chance, 1 - chance], axis=-1))


def remaining(
    log_probs: Float[Array, "n t 2"], likeness: Float[Array, "n t"], redundancy: Redundancy
) -> Float[Array, "n t"]:
    """By which tokens are ranked: what is left of their chances, or of their odds' logarithms.

    Chances are below zero where tokens are much alike.
    """
    kept, dropped = log_probs[..., 0], log_probs[..., 1]
    before = kept - dropped if redundancy.scale == "logarithm" else jnp.exp(kept)
    return before - redundancy.weight * likeness


def likeness_of(
    tokens: Float[Array, "n t d"],
    policy: Real[Array, "n t"],
    redundancy: Redundancy,
    heads: int,
) -> Float[Array, "n t"]:
    """How much each token is like the others that are left, see `Redundancy`.

    Args:
        tokens: Of the patches.
        policy: One for tokens that are left. It has no derivative here.
        redundancy: What is compared and how it is summed.
        heads: See `head_similarities`.
    """
    policy = jax.lax.stop_gradient(policy)
    if not redundancy.differentiate:
        tokens = jax.lax.stop_gradient(tokens)
    alike = (
        head_similarities(tokens, heads)
        if redundancy.rows == "heads"
        else batch_similarities(tokens, policy)
    )
    others = policy[:, None, :] * (1 - jnp.eye(tokens.shape[1], dtype=alike.dtype))
    total = jnp.sum(alike * others, axis=-1)
    if redundancy.reduce != "sum":
        total = total / jnp.maximum(jnp.sum(others, axis=-1), 1)
    if redundancy.reduce == "relative":
        left = jnp.maximum(jnp.sum(policy, axis=-1, keepdims=True), 1)
        total = total - jnp.sum(total * policy, axis=-1, keepdims=True) / left
    return total
