"""Residual networks for small images: ResNet-20, -32, -56 and their kin."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float

from ntt_sparse.gates import network as graph
from ntt_sparse.models import gated
from ntt_sparse.models.norm import STABLE, batch_norm

_SHORTCUTS = ("A", "B")
_NORMS = ("batch", "group", "none")
_GROUP_SIZE = 16


class ResNet(nn.Module):
    """A 3x3 convolution, stages of residual blocks, global average pooling, a dense layer.

    With `n` blocks in each of three stages it has `6 n + 2` layers. The first block of each
    stage but the first halves height and width, rounding up; images may have any size.
    Kernels start from `he_normal`, biases from zero.

    The params are named `Conv_0`, `BatchNorm_0` or `GroupNorm_0`, `stage1_block1`,
    `stage1_block2`, ..., `Dense_0`. To get the outputs of the blocks as well, call
    `module.apply` with
    `capture_intermediates=lambda module, _: isinstance(module, ResidualBlock)`.

    ========  ==========================================================================
    `batch`   Batch normalisation, as in the paper. Running statistics with momentum 0.9
              are in the collection `batch_stats`; `train=True` normalises by the batch
              and, with `mutable=["batch_stats"]`, updates them.
    `group`   Group normalisation in groups of 16 channels, or one group where 16 does
              not divide them: no state, and the outputs of an example do not depend on
              the others, which is what tangent kernels need.
    `none`    A bias on each convolution. The scale of the features grows with depth.
    ========  ==========================================================================

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", Section 4.2.
    Group size: Wu & He 2018, "Group Normalization", Table 3.

    Attributes:
        num_outputs: Outputs of the dense layer, 1 or more.
        blocks_per_stage: Residual blocks of each stage: 3, 5, 9 for ResNet-20, -32, -56.
        channels: Channels by stage, as many stages as entries.
        shortcut: Where a block changes the shape, "A": `subsample_and_pad`, free of
            parameters, as in the paper; "B": a 1x1 convolution, normalised like the others.
        norm: "batch", "group" or "none", see above.
        dtype: Of the computation; by default that of inputs and params together.
        param_dtype: Of the parameters.
    """

    num_outputs: int = 10
    blocks_per_stage: int = 3
    channels: tuple[int, ...] = (16, 32, 64)
    shortcut: str = "A"
    norm: str = "batch"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: A field has no meaning, or shortcut "A" would have to drop channels.
        """
        super().__post_init__()
        for field, known in (("shortcut", _SHORTCUTS), ("norm", _NORMS)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}, expected one of {', '.join(known)}"
                )
        for field in ("num_outputs", "blocks_per_stage"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected 1 or more")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels are {self.channels}, expected 1 or more for each stage")
        if self.shortcut == "A" and list(self.channels) != sorted(self.channels):
            raise ValueError(
                f"channels are {self.channels}, but shortcut 'A' only adds channels: "
                "let them grow or use shortcut='B'"
            )

    @nn.compact
    def __call__(
        self, x: Float[ArrayLike, "n ..."], *, train: bool = False
    ) -> Float[Array, "n num_outputs"]:
        """The outputs (logits) of a batch.

        Args:
            x: Images `(n, height, width, channels)`.
            train: Whether batch normalisation uses the statistics of the batch.

        Returns:
            Outputs `(n, num_outputs)`.

        Raises:
            ValueError: Not images, or images without pixels.
        """
        x = jnp.asarray(x)
        if x.ndim != 4 or 0 in x.shape[1:]:
            raise ValueError(f"input is {x.shape}, expected images (n, height, width, channels)")
        fields = {"norm": self.norm, "dtype": self.dtype, "param_dtype": self.param_dtype}
        convolve, normalise = _layers(**fields, train=train)
        x = nn.relu(normalise(convolve(x, self.channels[0], 3)))
        for stage, channels in enumerate(self.channels, start=1):
            for block in range(1, self.blocks_per_stage + 1):
                x = ResidualBlock(
                    channels,
                    stride=2 if stage > 1 and block == 1 else 1,
                    shortcut=self.shortcut,
                    name=f"stage{stage}_block{block}",
                    **fields,
                )(x, train=train)
        return nn.Dense(
            self.num_outputs,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )(x.mean(axis=(1, 2)))

    def network(self, input_shape: tuple[int, ...]) -> graph.Network:
        """Its description, for images `(height, width, channels)`.

        Raises:
            ValueError: Not the shape of images.
        """
        build = graph.image_builder(input_shape)

        def convolve(y, place, index, channels, size, stride=1):
            padding, bias = (size // 2, size // 2), self.norm == "none"
            node = graph.Conv(y, channels, size, stride, padding, bias)
            y = build(node, f"{place}Conv_{index}")
            if self.norm == "none":
                return y
            groups = _groups(channels) if self.norm == "group" else 0
            return build(graph.Norm(y, groups), f"{place}{self.norm.title()}Norm_{index}")

        x = build(graph.Activation(convolve("input", "", 0, self.channels[0], 3), "relu"))
        before = self.channels[0]
        for stage, channels in enumerate(self.channels, start=1):
            for block in range(1, self.blocks_per_stage + 1):
                name, stride = f"stage{stage}_block{block}", 2 if stage > 1 and block == 1 else 1
                y = convolve(x, f"{name}/", 0, channels, 3, stride)
                y = convolve(build(graph.Activation(y, "relu")), f"{name}/", 1, channels, 3)
                if stride > 1 or before != channels:
                    if self.shortcut == "A":
                        x = build(graph.Subsample(x, channels, stride))
                    else:
                        x = convolve(x, f"{name}/", 2, channels, 1, stride)
                x = build(graph.Activation(build(graph.Add((x, y))), "relu"), name)
                before = channels
        build(graph.Dense(build(graph.Mean(x)), self.num_outputs), "Dense_0")
        return build.network()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, added to their input before the last ReLU.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", Figure 2 and
    Section 3.2.

    Attributes:
        channels: Channels of the output.
        stride: Of the first convolution, and of the shortcut.
        shortcut: "A" or "B", where the block changes the shape; see `ResNet`.
        norm: "batch", "group" or "none"; see `ResNet`.
        dtype: Of the computation; by default that of inputs and params together.
        param_dtype: Of the parameters.
    """

    channels: int
    stride: int = 1
    shortcut: str = "A"
    norm: str = "batch"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], *, train: bool = False
    ) -> Float[Array, "n h2 w2 channels"]:
        """The features of the next block.

        Args:
            x: Features `(n, h, w, c)`.
            train: Whether batch normalisation uses the statistics of the batch.

        Returns:
            Features `(n, ceil(h / stride), ceil(w / stride), channels)`.
        """
        convolve, normalise = _layers(self.norm, self.dtype, self.param_dtype, train)
        y = nn.relu(normalise(convolve(x, self.channels, 3, self.stride)))
        y = normalise(convolve(y, self.channels, 3))
        if self.stride > 1 or x.shape[-1] != self.channels:
            if self.shortcut == "A":
                x = subsample_and_pad(x, self.channels, self.stride)
            else:
                x = normalise(convolve(x, self.channels, 1, self.stride))
        return nn.relu(x + y)


def subsample_and_pad(
    x: Float[Array, "n h w c"], channels: int, stride: int
) -> Float[Array, "n h2 w2 channels"]:
    """The identity where shapes differ: every `stride`-th pixel, then channels of zeros.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", Section 3.3,
    option (A). The zeros come after the channels of `x`.

    Args:
        x: Features `(n, h, w, c)`.
        channels: Channels of the result, `c` or more.
        stride: Distance of the pixels taken; the first row and column are.

    Returns:
        Features `(n, ceil(h / stride), ceil(w / stride), channels)`.

    Raises:
        ValueError: `channels` is less than `c`.
    """
    missing = channels - x.shape[-1]
    if missing < 0:
        raise ValueError(f"{x.shape[-1]} channels cannot be padded to {channels}")
    return jnp.pad(x[:, ::stride, ::stride], [(0, 0), (0, 0), (0, 0), (0, missing)])


def _groups(channels: int) -> int:
    groups, rest = divmod(channels, _GROUP_SIZE)
    return 1 if rest else groups


def _layers(
    norm: str, dtype: Any, param_dtype: Any, train: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The convolution and the normalisation of a network, for use in `nn.compact` methods."""
    shared = {"dtype": dtype, "param_dtype": param_dtype}

    def convolve(x, channels, size, stride=1):
        # Symmetric, so that a strided kernel is centred on the pixels that the shortcut
        # takes; "SAME" has the same shape, but is one pixel off at even sizes.
        return gated.Conv(
            channels,
            size,
            stride,
            padding=size // 2,
            use_bias=norm == "none",
            kernel_init=nn.initializers.he_normal(),
            **shared,
        )(x)

    def normalise(x):
        if norm == "batch":
            return batch_norm(x, train, dtype, param_dtype)
        if norm == "group":
            return nn.GroupNorm(_groups(x.shape[-1]), **STABLE, **shared)(x)
        return x

    return convolve, normalise
