r"""Vision transformers: DeiT, and small ones for small images.

Weights of the public DeiT checkpoints are read by `ntt_sparse.models.deit`; tokens are dropped on
the way by `ntt_sparse.models.tokens`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float, Real

from ntt_sparse.models.initializers import torch_bias_init, torch_kernel_init

# Of masked attention, which a row without any token needs.
_EPSILON = 1e-6
_weight_init = nn.initializers.normal(0.02)


def masked_softmax(
    scores: Float[ArrayLike, "n h t t"], policy: Real[ArrayLike, "n t"]
) -> Float[Array, "n h t t"]:
    r"""Attention over the tokens that are kept, and of each token to itself.

    $a_{ij} = e^{s_{ij} - \max_k s_{ik}} (p_j + (1 - p_j) [i = j])$, and of each row
    $(a_{ij} + \epsilon / t) / (\sum_k a_{ik} + \epsilon)$ with $\epsilon = 10^{-6}$. Where all are
    kept that is the softmax, up to $\epsilon$. It is differentiable by the policy.

    Source: Rao et al. 2021, "DynamicViT", https://arxiv.org/abs/2106.02034, Eqs. 11 and 12.

    Args:
        scores: Of every query (third axis) and key.
        policy: One for tokens that are kept, zero for others.
    """
    scores, policy = jnp.asarray(scores), jnp.asarray(policy)
    tokens = scores.shape[-1]
    own = jnp.eye(tokens, dtype=scores.dtype)
    keys = policy.astype(scores.dtype)[:, None, None, :]
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest) * (keys + (1 - keys) * own)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return (weights + _EPSILON / tokens) / (total + _EPSILON)


class Attention(nn.Module):
    """Attention of several heads among tokens.

    Attributes:
        heads: Divides the width of tokens.
        dtype: Of the computation; by default that of inputs and params together. Softmax is
            float32 at least.
        param_dtype: Of the parameters.
    """

    heads: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n t d"], policy: Real[Array, "n t"] | None = None
    ) -> Float[Array, "n t d"]:
        """The outputs `(n, t, d)`; with a policy see `masked_softmax`."""
        n, t, d = x.shape
        fields = {"kernel_init": _weight_init, "dtype": self.dtype, "param_dtype": self.param_dtype}
        joined = nn.Dense(3 * d, name="qkv", **fields)(x)
        query, key, value = jnp.moveaxis(joined.reshape(n, t, 3, self.heads, -1), 2, 0)
        scores = jnp.einsum("nqhd,nkhd->nhqk", query * (d // self.heads) ** -0.5, key)
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        weights = jax.nn.softmax(scores) if policy is None else masked_softmax(scores, policy)
        y = jnp.einsum("nhqk,nkhd->nqhd", weights.astype(value.dtype), value)
        return nn.Dense(d, name="proj", **fields)(y.reshape(n, t, d))


class Block(nn.Module):
    """Attention and two dense layers, each normalised before and added to the stream.

    Attributes:
        heads: Of the attention.
        expansion: Width between the dense layers, in widths of tokens.
        dtype: Of the computation.
        param_dtype: Of the parameters.
    """

    heads: int
    expansion: int = 4
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n t d"], policy: Real[Array, "n t"] | None = None
    ) -> Float[Array, "n t d"]:
        """The stream after the block, `(n, t, d)`."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = layer_norm("norm1", **types)(x)
        x = x + Attention(self.heads, name="attn", **types)(y, policy)
        y = layer_norm("norm2", **types)(x)
        width = x.shape[-1]
        y = nn.Dense(self.expansion * width, kernel_init=_weight_init, name="fc1", **types)(y)
        y = nn.gelu(y, approximate=False)
        return x + nn.Dense(width, kernel_init=_weight_init, name="fc2", **types)(y)


def layer_norm(name: str | None = None, **types: Any) -> nn.LayerNorm:
    """Layer normalisation as DeiT has it."""
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name, **types)


class VisionTransformer(nn.Module):
    """Patches of an image as tokens, a token for its class, blocks, a dense layer.

    The params are `patch`, `cls`, `position`, `block_0`, ..., `norm`, `head`. Images of another
    size need another `position`.

    Source: Touvron et al. 2021, "Training data-efficient image transformers",
    https://arxiv.org/abs/2012.12877, Table 1, without distillation.

    Attributes:
        num_outputs: Outputs of the dense layer, 1 or more.
        patch: Height and width of patches.
        width: Of tokens.
        depth: Blocks.
        heads: Of attention; they divide the width.
        expansion: Width inside of blocks, in widths of tokens.
        dtype: Of the computation; by default that of inputs and params together.
        param_dtype: Of the parameters.
    """

    num_outputs: int = 10
    patch: int = 16
    width: int = 192
    depth: int = 12
    heads: int = 3
    expansion: int = 4
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: A field has no meaning.
        """
        super().__post_init__()
        for field in ("num_outputs", "patch", "width", "depth", "heads", "expansion"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected 1 or more")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of {self.heads} heads")

    def setup(self):
        """Names the parts."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.block = [Block(self.heads, self.expansion, **types) for _ in range(self.depth)]
        self.norm = layer_norm(**types)
        self.head = nn.Dense(self.num_outputs, kernel_init=_weight_init, **types)

    def __call__(
        self, x: Float[ArrayLike, "n ..."], *, train: bool = False
    ) -> Float[Array, "n num_outputs"]:
        """The outputs (logits) of a batch.

        Args:
            x: Images `(n, height, width, channels)`.
            train: As other networks have it; nothing here depends on it.

        Raises:
            ValueError: Not images, or their sides are no multiples of a patch.
        """
        del train
        return self.classify(self.encode(x))

    def encode(self, x: Float[ArrayLike, "n ..."]) -> Float[Array, "n t d"]:
        """The normalised tokens after the last block, that of the class first."""
        tokens = self.embed(x)
        for block in self.block:
            tokens = block(tokens)
        return self.norm(tokens)

    @nn.compact
    def embed(self, x: Float[ArrayLike, "n ..."]) -> Float[Array, "n t d"]:
        """The token of the class, then one for each patch, row by row, with their positions.

        Raises:
            ValueError: Not images, or their sides are no multiples of a patch.
        """
        x = jnp.asarray(x)
        check_images(x.shape, self.patch)
        side = (self.patch, self.patch)
        y = nn.Conv(
            self.width, side, side, padding="VALID", name="patch", dtype=self.dtype,
            param_dtype=self.param_dtype, kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(self.patch**2 * x.shape[-1]),
        )(x)  # fmt: skip
        y = y.reshape(len(x), -1, self.width)
        count = y.shape[1] + 1
        cls = self.param("cls", _weight_init, (1, 1, self.width), self.param_dtype)
        place = self.param("position", _weight_init, (1, count, self.width), self.param_dtype)
        first = jnp.broadcast_to(cls.astype(y.dtype), (len(x), 1, self.width))
        return jnp.concatenate([first, y], axis=1) + place.astype(y.dtype)

    def classify(self, tokens: Float[Array, "n t d"]) -> Float[Array, "n num_outputs"]:
        """The outputs by normalised tokens, of which that of the class is read."""
        return self.head(tokens[:, 0])


def check_images(shape: tuple[int, ...], patch: int) -> None:
    """Checks that images can be cut into patches.

    Raises:
        ValueError: They cannot.
    """
    if len(shape) != 4 or not all(shape[1:]):
        raise ValueError(f"input is {shape}, expected images (n, height, width, channels)")
    if shape[1] % patch or shape[2] % patch:
        raise ValueError(
            f"images of {shape[1]}x{shape[2]} cannot be cut into patches of {patch}x{patch}: "
            "expected sides that are multiples"
        )


def multiply_adds(
    module: VisionTransformer, input_shape: tuple[int, int, int], tokens: tuple[int, ...] = ()
) -> int:
    """Multiply-adds of one image: of convolutions, dense layers and both products of attention.

    Args:
        module: The network.
        input_shape: `(height, width, channels)`.
        tokens: Tokens that each block sees, that of the class among them; by default all.

    Raises:
        ValueError: The images do not fit, or there is not a number for each block.
    """
    check_images((1, *input_shape), module.patch)
    height, width, channels = input_shape
    patches = height * width // module.patch**2
    tokens = tokens or (patches + 1,) * module.depth
    if len(tokens) != module.depth:
        raise ValueError(f"tokens are of {len(tokens)} blocks, expected {module.depth}")
    d = module.width
    embedding = patches * module.patch**2 * channels * d
    # qkv and proj are four square products; keys and values one product each with all tokens.
    blocks = sum(t * d * d * (4 + 2 * module.expansion) + 2 * t * t * d for t in tokens)
    return embedding + blocks + d * module.num_outputs
