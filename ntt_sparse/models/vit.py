r"""Vision transformers: DeiT, and small ones for small images.

Weights of the public DeiT checkpoints are read by `ntt_sparse.models.deit`; tokens are dropped on
the way by `ntt_sparse.models.tokens`.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float

from ntt_sparse.models.attention import Block, check_sizes, layer_norm, weight_init
from ntt_sparse.models.initializers import torch_bias_init, torch_kernel_init


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
        check_sizes(self, ("num_outputs", "patch", "width", "depth", "heads", "expansion"))

    def setup(self):
        """Names the parts."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.block = [Block(self.heads, self.expansion, **types) for _ in range(self.depth)]
        self.norm = layer_norm(**types)
        self.head = nn.Dense(self.num_outputs, kernel_init=weight_init, **types)

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
        cls = self.param("cls", weight_init, (1, 1, self.width), self.param_dtype)
        place = self.param("position", weight_init, (1, count, self.width), self.param_dtype)
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
    if len(shape) != 4 or not all(shape):
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
