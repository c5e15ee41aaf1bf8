"""Blocks of transformers: attention among tokens, and two dense layers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float, Real

from ntt_sparse._precision import at_least_single

weight_init = nn.initializers.normal(0.02)
"""How weights of transformers start."""


def masked_softmax(
    scores: Float[ArrayLike, "n h t t"], policy: Real[ArrayLike, "n t"]
) -> Float[Array, "n h t t"]:
    r"""Attention over the tokens that are kept, and of each token to itself.

    $a_{ij} = e^{s_{ij}} (p_j + (1 - p_j) [i = j])$ over the sum of its row. Where all are kept that
    is the softmax; it is differentiable by the policy. Numbers are held in range by the largest
    score of a token that is seen. The published code takes the largest of all and adds 1e-6 to
    each row: where a dropped token has a score that is larger by 14, all tokens are seen alike.

    Source: Rao et al. 2021, "DynamicViT", https://arxiv.org/abs/2106.02034, Eqs. 11 and 12.

    Args:
        scores: Of every query (third axis) and key.
        policy: One for tokens that are kept, zero for others.
    """
    scores, policy = jnp.asarray(scores), jnp.asarray(policy)
    tokens = scores.shape[-1]
    own = jnp.eye(tokens, dtype=scores.dtype)
    keys = policy.astype(scores.dtype)[:, None, None, :]
    seen = keys + (1 - keys) * own
    largest = jnp.max(jnp.where(seen > 0, scores, -jnp.inf), axis=-1, keepdims=True)
    # Larger ones are not seen, but the policy has a derivative by them, which has to be finite.
    weights = jnp.exp(jnp.minimum(scores - jax.lax.stop_gradient(largest), 0)) * seen
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def check_sizes(module: Any, fields: Sequence[str]) -> None:
    """Checks the sizes of a transformer.

    Args:
        module: With the fields, and `width` and `heads`.
        fields: Which are sizes.

    Raises:
        ValueError: One is less than 1, or heads do not divide the width.
    """
    for field in fields:
        if getattr(module, field) < 1:
            raise ValueError(f"{field} is {getattr(module, field)}, expected 1 or more")
    if module.width % module.heads:
        raise ValueError(f"width is {module.width}, expected a multiple of {module.heads} heads")


class Attention(nn.Module):
    """Attention of several heads among tokens.

    Attributes:
        heads: Divides the width of tokens.
        causal: Whether a token sees only itself and those before it.
        dtype: Of the computation; by default that of inputs and params together. Softmax is
            float32 at least.
        param_dtype: Of the parameters.
    """

    heads: int
    causal: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n t d"], policy: Real[Array, "n t"] | None = None
    ) -> Float[Array, "n t d"]:
        """The outputs `(n, t, d)`; with a policy see `masked_softmax`.

        Raises:
            ValueError: A policy is given to causal attention.
        """
        if self.causal and policy is not None:
            raise ValueError("policy is given to causal attention, expected None")
        n, t, d = x.shape
        fields = {"kernel_init": weight_init, "dtype": self.dtype, "param_dtype": self.param_dtype}
        joined = nn.Dense(3 * d, name="qkv", **fields)(x)
        query, key, value = jnp.moveaxis(joined.reshape(n, t, 3, self.heads, -1), 2, 0)
        scores = jnp.einsum("nqhd,nkhd->nhqk", query * (d // self.heads) ** -0.5, key)
        scores = at_least_single(scores)
        if self.causal:
            scores = jnp.where(jnp.tri(t, dtype=bool), scores, -jnp.inf)
        weights = jax.nn.softmax(scores) if policy is None else masked_softmax(scores, policy)
        y = jnp.einsum("nhqk,nkhd->nqhd", weights.astype(value.dtype), value)
        return nn.Dense(d, name="proj", **fields)(y.reshape(n, t, d))


class Block(nn.Module):
    """Attention and two dense layers, each normalised before and added to the stream.

    Attributes:
        heads: Of the attention.
        expansion: Width between the dense layers, in widths of tokens.
        causal: Whether a token sees only itself and those before it.
        dtype: Of the computation.
        param_dtype: Of the parameters.
    """

    heads: int
    expansion: int = 4
    causal: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n t d"], policy: Real[Array, "n t"] | None = None
    ) -> Float[Array, "n t d"]:
        """The stream after the block, `(n, t, d)`."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = layer_norm("norm1", **types)(x)
        x = _once(x + Attention(self.heads, self.causal, name="attn", **types)(y, policy))
        y = layer_norm("norm2", **types)(x)
        width = x.shape[-1]
        y = nn.Dense(self.expansion * width, kernel_init=weight_init, name="fc1", **types)(y)
        y = nn.gelu(y, approximate=False)
        return _once(x + nn.Dense(width, kernel_init=weight_init, name="fc2", **types)(y))


def _once(x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
    """The stream, on CPU as a value of its own.

    XLA's compiler else puts the sums of all later blocks, and of their derivatives, into whatever
    reads it, and a training step costs the square of the depth.
    """
    return jax.lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


def layer_norm(name: str | None = None, **types: Any) -> nn.LayerNorm:
    """Layer normalisation as DeiT has it."""
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name, **types)
