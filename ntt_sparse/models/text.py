"""A transformer that says what comes next in a text."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float, Shaped

from ntt_sparse.models.attention import Block, check_sizes, layer_norm, weight_init


class TextTransformer(nn.Module):
    """Tokens with their places, causal blocks, and a dense layer for what follows each token.

    The params are `embed`, `position`, `block_0`, ..., `norm`, `head`. Texts of another length need
    another `position`. Other than GPT-2's: there is no dropout, the weights of the last layer are
    its own, all start from the same normal distribution, nonlinearities are exact GELUs, and
    normalisation adds 1e-6.

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
        check_sizes(self, ("num_outputs", "width", "depth", "heads", "expansion"))

    @nn.compact
    def __call__(
        self, x: Shaped[ArrayLike, "n ..."], *, train: bool = False
    ) -> Float[Array, "n t num_outputs"]:
        """The outputs (logits) of what follows each token.

        Args:
            x: Tokens `(n, t)`, integers from 0 to `num_outputs - 1`; with another one all outputs
                of its text are NaN.
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
        # Negative ones would count from the end.
        y = embed(jnp.where(x < 0, self.num_outputs, x))
        y = y + place.astype(y.dtype)
        for index in range(self.depth):
            block = Block(self.heads, self.expansion, causal=True, name=f"block_{index}", **types)
            y = block(y)
        y = layer_norm("norm", **types)(y)
        return nn.Dense(self.num_outputs, kernel_init=weight_init, name="head", **types)(y)
