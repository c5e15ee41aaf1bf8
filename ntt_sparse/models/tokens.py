r"""Dynamic tokens: a vision transformer that decides, image by image, which patches to go on with.

At some blocks a small network looks at all tokens that are left and predicts which to keep. In
training decisions are drawn and tokens that are dropped are hidden from the attention of others,
so that shapes stay and gradients flow; in inference as many tokens as asked for are kept and the
rest is gone, which is faster.

Source: Rao et al. 2021, "DynamicViT: Efficient Vision Transformers with Dynamic Token
Sparsification", https://arxiv.org/abs/2106.02034; with similarities in the decision Ni et al.
2023, https://arxiv.org/abs/2307.07389, Eq. 13 and Algorithm 1.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float, Int, Real

from ntt_sparse._precision import at_least_single
from ntt_sparse._types import PRNGKey
from ntt_sparse.models.attention import layer_norm, weight_init
from ntt_sparse.models.redundancy import Redundancy, adjusted, likeness_of, remaining
from ntt_sparse.models.vit import VisionTransformer, check_images, multiply_adds

RNG = "tokens"
"""The RNG that decisions of training are drawn with."""
# Of an average over no token.
_EPSILON = 1e-6


class TokenOutputs(NamedTuple):
    """What a training pass gives.

    Attributes:
        logits: `(n, num_outputs)`.
        decisions: `(s, n, t)`, one for patches that are kept at each of s places, zero for
            others; what is dropped stays so. They carry gradients.
        features: `(n, t, d)`, the normalised tokens of all patches after the last block.
    """

    logits: Float[Array, "n k"]
    decisions: Float[Array, "s n t"]
    features: Float[Array, "n t d"]


def draw_decisions(
    key: PRNGKey,
    log_probs: Float[Array, "n t 2"],
    previous: Real[Array, "n t"],
    *,
    temperature: float = 1.0,
) -> Float[Array, "n t"]:
    """Decisions by a straight-through Gumbel softmax: one to keep a token, zero to drop it.

    Args:
        key: Of the draw.
        log_probs: Of keeping and dropping.
        previous: Earlier decisions; what they dropped stays dropped.
        temperature: Of the softmax that gradients are those of, above 0.

    Raises:
        ValueError: The temperature is not.
    """
    # The negated form also refuses NaN.
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0")
    noisy = (log_probs + jax.random.gumbel(key, log_probs.shape, log_probs.dtype)) / temperature
    soft = jax.nn.softmax(noisy)[..., 0]
    hard = (noisy[..., 0] >= noisy[..., 1]).astype(soft.dtype)
    # In this order the difference is zero, and decisions are exactly zero or one.
    return (hard + (soft - jax.lax.stop_gradient(soft))) * previous


class KeepPredictor(nn.Module):
    """The logarithms of the chances of patches to be kept and to be dropped.

    Half of each token's features meets the other half's mean over the tokens that are left.

    Attributes:
        dtype: Of the computation.
        param_dtype: Of the parameters.
    """

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "n t d"], policy: Real[Array, "n t"]
    ) -> Float[Array, "n t 2"]:
        """Log-probabilities `(n, t, 2)`, kept first; where no token is left the mean is zero."""
        width = tokens.shape[-1]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def dense(features):
            return nn.Dense(features, kernel_init=weight_init, **types)

        x = nn.gelu(dense(width)(layer_norm(**types)(tokens)), approximate=False)
        own, shared = x[..., : width // 2], x[..., width // 2 :]
        policy = policy[..., None].astype(x.dtype)
        mean = jnp.sum(shared * policy, axis=1, keepdims=True)
        mean = mean / (jnp.sum(policy, axis=1, keepdims=True) + _EPSILON)
        x = jnp.concatenate([own, jnp.broadcast_to(mean, shared.shape)], axis=-1)
        x = nn.gelu(dense(width // 2)(x), approximate=False)
        x = nn.gelu(dense(width // 4)(x), approximate=False)
        x = dense(2)(x)
        return jax.nn.log_softmax(at_least_single(x))


class DynamicTransformer(nn.Module):
    """A vision transformer that drops patches on its way.

    The params are those of the transformer in `vit`, and `predictor_0`, ....

    Attributes:
        vit: The transformer.
        keep: Part of the patches that each place keeps of those left before it, in (0, 1].
        places: Blocks before which tokens are dropped, rising.
        redundancy: Whether tokens that are like others are less likely to be kept.
    """

    vit: VisionTransformer
    keep: float = 0.7
    places: tuple[int, ...] = (3, 6, 9)
    redundancy: Redundancy | None = None

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: A field has no meaning.
        """
        super().__post_init__()
        # The negated form also refuses NaN.
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}, expected a part in (0, 1]")
        rising = all(a < b for a, b in zip((0, *self.places), self.places, strict=False))
        if not self.places or not rising or self.places[-1] >= self.vit.depth:
            raise ValueError(
                f"places are {self.places}, expected blocks from 1 to {self.vit.depth - 1}, rising"
            )
        by_heads = self.redundancy is not None and self.redundancy.rows == "heads"
        if by_heads and self.vit.heads < 3:
            raise ValueError("redundancy compares heads of tokens: expected three or more heads")

    def setup(self):
        """Names the predictors."""
        types = {"dtype": self.vit.dtype, "param_dtype": self.vit.param_dtype}
        self.predictor = [KeepPredictor(**types) for _ in self.places]

    def __call__(self, x: Float[ArrayLike, "n ..."]) -> Float[Array, "n num_outputs"]:
        """The outputs (logits) of images, by the tokens that are kept alone.

        Raises:
            ValueError: Not images that fit, or a place would keep no token.
        """
        tokens = self.vit.embed(x)
        n, patches = tokens.shape[0], tokens.shape[1] - 1
        counts = iter(kept_counts(self, patches))
        positions = jnp.broadcast_to(jnp.arange(patches), (n, patches))
        for index, block in enumerate(self.vit.block):
            if index in self.places:
                likeness = self._likeness_of_left(tokens, positions, patches)
                chosen = self._ranked(
                    index, tokens, jnp.ones(positions.shape, tokens.dtype), likeness
                )[:, : next(counts)]
                left = jnp.take_along_axis(tokens[:, 1:], chosen[..., None], axis=1)
                tokens = jnp.concatenate([tokens[:, :1], left], axis=1)
                positions = jnp.take_along_axis(positions, chosen, axis=1)
            tokens = block(tokens)
        return self.vit.classify(self.vit.norm(tokens))

    def hidden(self, x: Float[ArrayLike, "n ..."]) -> Float[Array, "n num_outputs"]:
        """As a call, but tokens that are dropped are hidden from the others and stay.

        What training sees, with the decisions of inference; outputs agree up to rounding.
        """
        tokens = self.vit.embed(x)
        policy = jnp.ones(tokens[:, 1:, 0].shape, tokens.dtype)
        counts = iter(kept_counts(self, policy.shape[1]))
        for index, block in enumerate(self.vit.block):
            if index in self.places:
                likeness = self._likeness(tokens, policy)
                ranks = self._ranked(index, tokens, policy, likeness)[:, : next(counts)]
                policy = jax.vmap(lambda row, to: jnp.zeros_like(row).at[to].set(1))(policy, ranks)
            tokens = block(tokens, _with_class(policy) if index >= self.places[0] else None)
        return self.vit.classify(self.vit.norm(tokens))

    def sample(self, x: Float[ArrayLike, "n ..."]) -> TokenOutputs:
        """A training pass, whose decisions are drawn with the RNG `tokens`.

        Raises:
            ValueError: Not images that fit.
        """
        tokens = self.vit.embed(x)
        policy = jnp.ones(tokens[:, 1:, 0].shape, tokens.dtype)
        decisions = []
        for index, block in enumerate(self.vit.block):
            if index in self.places:
                log_probs = self._predicted(index, tokens, policy)
                likeness = self._likeness(tokens, policy)
                if self.redundancy is not None and likeness is not None:
                    log_probs = adjusted(log_probs, likeness, self.redundancy)
                policy = draw_decisions(self.make_rng(RNG), log_probs, policy)
                decisions.append(policy)
            tokens = block(tokens, _with_class(policy) if decisions else None)
        tokens = self.vit.norm(tokens)
        return TokenOutputs(self.vit.classify(tokens), jnp.stack(decisions), tokens[:, 1:])

    def _predicted(
        self, index: int, tokens: Float[Array, "n t d"], policy: Real[Array, "n p"]
    ) -> Float[Array, "n p 2"]:
        """What is predicted of patches before a block."""
        return self.predictor[self.places.index(index)](tokens[:, 1:], policy)

    def _likeness(
        self, tokens: Float[Array, "n t d"], policy: Real[Array, "n p"]
    ) -> Float[Array, "n p"] | None:
        """How much patches are like others, if that is asked for."""
        if self.redundancy is None:
            return None
        return likeness_of(tokens[:, 1:], policy, self.redundancy, self.vit.heads)

    def _likeness_of_left(
        self, tokens: Float[Array, "n t d"], positions: Int[Array, "n p"], patches: int
    ) -> Float[Array, "n p"] | None:
        """The same where others are gone; positions are those of the patches that are left."""
        shape = positions.shape[0], patches
        if self.redundancy is None or self.redundancy.rows == "heads":
            return self._likeness(tokens, jnp.ones(positions.shape, tokens.dtype))
        # Images have other positions left; the rest is as hidden.
        back = jax.vmap(lambda full, to, values: full.at[to].set(values))
        policy = back(jnp.zeros(shape, tokens.dtype), positions, jnp.ones_like(tokens[:, 1:, 0]))
        full = back(jnp.zeros((*shape, tokens.shape[2]), tokens.dtype), positions, tokens[:, 1:])
        likeness = likeness_of(full, policy, self.redundancy, self.vit.heads)
        return jnp.take_along_axis(likeness, positions, axis=1)

    def _ranked(
        self,
        index: int,
        tokens: Float[Array, "n t d"],
        policy: Real[Array, "n p"],
        likeness: Float[Array, "n p"] | None,
    ) -> Int[Array, "n p"]:
        """Patches from the most to the least likely to be kept, dropped ones last."""
        log_probs = self._predicted(index, tokens, policy)
        chances = log_probs[..., 0]
        if self.redundancy is not None and likeness is not None:
            # Not held, which would make those equal that are much alike.
            chances = remaining(log_probs, likeness, self.redundancy)
        return jnp.argsort(jnp.where(policy > 0, -chances, jnp.inf), axis=1, stable=True)


def _with_class(policy: Real[Array, "n p"]) -> Real[Array, "n t"]:
    """The policy of all tokens: that of the class always stays."""
    return jnp.concatenate([jnp.ones_like(policy[:, :1]), policy], axis=1)


def keep_ratios(module: DynamicTransformer) -> tuple[float, ...]:
    """The part of all patches that is left after each place: powers of `keep`."""
    return tuple(module.keep ** (place + 1) for place in range(len(module.places)))


def kept_counts(module: DynamicTransformer, patches: int) -> tuple[int, ...]:
    """How many patches are left after each place, in inference.

    Raises:
        ValueError: None would be.
    """
    # Products that should be integers may come out a rounding below.
    counts = tuple(int(patches * ratio + 1e-9) for ratio in keep_ratios(module))
    if min(counts) < 1:
        raise ValueError(
            f"keep={module.keep} leaves {counts} of {patches} patches, expected one or more"
        )
    return counts


def dynamic_multiply_adds(module: DynamicTransformer, input_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of one image in inference, see `ntt_sparse.models.vit.multiply_adds`.

    Raises:
        ValueError: The images do not fit, or a place would keep no token.
    """
    check_images((1, *input_shape), module.vit.patch)
    patches = input_shape[0] * input_shape[1] // module.vit.patch**2
    left = [patches, *kept_counts(module, patches)]
    seen = [left[stage] + 1 for stage in _stages(module)]
    d = module.vit.width
    each = d * d + d * (d // 2) + (d // 2) * (d // 4) + 2 * (d // 4)
    return multiply_adds(module.vit, input_shape, tuple(seen)) + each * sum(left[:-1])


def _stages(module: DynamicTransformer) -> Iterator[int]:
    """How many places each block comes after."""
    return (sum(place <= block for place in module.places) for block in range(module.vit.depth))
