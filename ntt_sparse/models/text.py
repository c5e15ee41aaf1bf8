"""A transformer that says what comes next in a text."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float, Shaped

from ntt_sparse.models.attention import Block, layer_norm, weight_init


class TextTransformer(nn.Module):
    """Tokens with their places, causal blocks, and a dense layer for what follows each token.

    The params are `embed`, `position`, `block_0`, ..., `norm`, `head`. Texts of another length need
    another `position`. There is no dropout, weights of the last layer are its own, and all start
    from the same normal distribution.

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners" (GPT-2),
    Section 2.3.

    Attributes:
        num_outputs: Tokens there are, 1 or more, and so many outputs at each place.
        width: Of tokens.
        depth: Blocks.
        heads: Of attention; they divide the width.
        expansion: Width inside of blocks, in widths of tokens.
        dtype: Of the computation; by default that of the params.
        param_dtype: Of the parameters.
    """

    num_outputs: int = 256
    width: int = 128
    depth: int = 4
    heads: int = 4
    expansion: int = 4
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: A field has no meaning.
        """
        super().__post_init__()
        for field in ("num_outputs", "width", "depth", "heads", "expansion"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected 1 or more")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of {self.heads} heads")

    @nn.compact
    def __call__(
        self, x: Shaped[ArrayLike, "n ..."], *, train: bool = False
    ) -> Float[Array, "n t num_outputs"]:
        """The outputs (logits) of what follows each token.

        Args:
            x: Tokens `(n, t)`, integers from 0 to `num_outputs - 1`; the outputs of others are NaN.
            train: As other networks have it; nothing here depends on it.

        Raises:
            ValueError: Not tokens.
        """
        del train
        x = jnp.asarray(x)
        if x.ndim != 2 or not x.size or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"input is {x.dtype}{x.shape}, expected tokens, integers (n, t)")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = nn.Embed(
            self.num_outputs, self.width, embedding_init=weight_init, name="embed", **types
        )
        place = self.param("position", weight_init, (1, x.shape[1], self.width), self.param_dtype)
        y = embed(x)
        y = y + place.astype(y.dtype)
        for index in range(self.depth):
            block = Block(self.heads, self.expansion, causal=True, name=f"block_{index}", **types)
            y = block(y)
        y = layer_norm("norm", **types)(y)
        return nn.Dense(self.num_outputs, kernel_init=weight_init, name="head", **types)(y)
