"""Pre-activation residual networks of bottlenecks for small images, with gated channels."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float

from ntt_sparse.gates import network as graph
from ntt_sparse.gates.layer import Kind
from ntt_sparse.models import gated
from ntt_sparse.models.initializers import he_fan_out, torch_bias_init, torch_kernel_init
from ntt_sparse.models.norm import batch_norm, layer_kind, norm_gate

_EXPANSION = 4
# Of normalised channels at the start.
_SCALE = 0.5


class PreResNet(nn.Module):
    """A 3x3 convolution, stages of bottlenecks, normalisation, pooling, a dense layer.

    With `n` blocks in each of three stages it has `9 n + 2` layers. Every convolution but those
    of shortcuts has a gate on its outputs, before they are normalised or added (Bu et al. 2021,
    their code): 163 gates of 12,112 channels for 164 layers. Gates whose place is the
    normalisation are on as many channels, all that are normalised. The first block of each stage
    but the first halves height and width.

    The params are named `Conv_0`, `stage1_block1`, ..., `BatchNorm_0`, `Dense_0`; running
    statistics are in the collection `batch_stats`, which `train=True` updates with
    `mutable=["batch_stats"]`.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks",
    https://arxiv.org/abs/1603.05027, in the form that Liu et al. 2017, "Learning Efficient
    Convolutional Networks through Network Slimming", prune: a shortcut is a convolution of the
    block's input before normalisation.

    Attributes:
        num_outputs: Outputs of the dense layer, 1 or more.
        blocks_per_stage: 2, 6, 12 or 18 for 20, 56, 110 or 164 layers.
        channels: Channels inside the blocks, by stage; the stream between them has four times
            as many.
        kind: Of the gates; `None` for none.
        dtype: Of the computation; by default that of inputs and params together.
        param_dtype: Of the parameters but the gates.
    """

    num_outputs: int = 10
    blocks_per_stage: int = 2
    channels: tuple[int, ...] = (16, 32, 64)
    kind: Kind | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: A field has no meaning.
        """
        super().__post_init__()
        for field in ("num_outputs", "blocks_per_stage"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected 1 or more")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels are {self.channels}, expected 1 or more for each stage")

    @nn.compact
    def __call__(
        self, x: Float[ArrayLike, "n ..."], *, train: bool = False
    ) -> Float[Array, "n num_outputs"]:
        """The outputs (logits) of a batch.

        Args:
            x: Images `(n, height, width, channels)`.
            train: Whether normalisation uses the statistics of the batch.

        Returns:
            Outputs `(n, num_outputs)`.

        Raises:
            ValueError: Not images, or images without pixels.
        """
        x = jnp.asarray(x)
        if x.ndim != 4 or 0 in x.shape[1:]:
            raise ValueError(f"input is {x.shape}, expected images (n, height, width, channels)")
        fields = {"kind": self.kind, "dtype": self.dtype, "param_dtype": self.param_dtype}
        x = gated.Conv(
            self.channels[0], 3, padding=1, use_bias=False, kernel_init=he_fan_out,
            **{**fields, "kind": layer_kind(self.kind)},
        )(x)  # fmt: skip
        for stage, block, stride in _blocks(self):
            x = Bottleneck(
                self.channels[stage - 1], stride=stride, shortcut=block == 1,
                name=f"stage{stage}_block{block}", **fields,
            )(x, train=train)  # fmt: skip
        x = nn.relu(
            batch_norm(x, train, self.dtype, self.param_dtype, scale=_SCALE, kind=self.kind)
        )
        return nn.Dense(
            self.num_outputs,
            kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(x.shape[-1]),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )(x.mean(axis=(1, 2)))

    def network(self, input_shape: tuple[int, ...]) -> graph.Network:
        """Its description, for images `(height, width, channels)`.

        Raises:
            ValueError: Not the shape of images.
        """
        build = graph.image_builder(input_shape)

        def convolve(y, name, channels, size, stride=1, gated=True):
            gate = self._gate(name) if gated else None
            padding = (size // 2, size // 2)
            return build(graph.Conv(y, channels, size, stride, padding, gate=gate), name)

        def rectified(y, name):
            gate = norm_gate(self.kind, name, int(name[-1]))
            return build(graph.Activation(build(graph.Norm(y, gate=gate), name), "relu"))

        x = convolve("input", "Conv_0", self.channels[0], 3)
        for stage, block, stride in _blocks(self):
            name, n = f"stage{stage}_block{block}", self.channels[stage - 1]
            y = convolve(rectified(x, f"{name}/BatchNorm_0"), f"{name}/Conv_0", n, 1)
            y = convolve(rectified(y, f"{name}/BatchNorm_1"), f"{name}/Conv_1", n, 3, stride)
            wide = _EXPANSION * n
            y = convolve(rectified(y, f"{name}/BatchNorm_2"), f"{name}/Conv_2", wide, 1)
            if block == 1:
                x = convolve(x, f"{name}/shortcut", wide, 1, stride, gated=False)
            x = build(graph.Add((x, y)), name)
        y = build(graph.Mean(rectified(x, "BatchNorm_0")))
        build(graph.Dense(y, self.num_outputs), "Dense_0")
        return build.network()

    def _gate(self, layer: str) -> str | None:
        return f"{layer}/gate" if layer_kind(self.kind) else None


class Bottleneck(nn.Module):
    """Three convolutions, each of normalised and rectified inputs, added to the block's input.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", Figure 1b, with the
    bottleneck of "Deep Residual Learning for Image Recognition", Figure 5.

    Attributes:
        channels: Channels inside; the output has four times as many.
        stride: Of the 3x3 convolution, and of the shortcut.
        shortcut: Whether the input is taken through a convolution of its own.
        kind: Of the gates; `None` for none.
        dtype: Of the computation; by default that of inputs and params together.
        param_dtype: Of the parameters but the gates.
    """

    channels: int
    stride: int = 1
    shortcut: bool = False
    kind: Kind | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], *, train: bool = False
    ) -> Float[Array, "n h2 w2 wide"]:
        """The features of the next block.

        Args:
            x: Features `(n, h, w, c)`.
            train: Whether normalisation uses the statistics of the batch.

        Returns:
            Features `(n, ceil(h / stride), ceil(w / stride), 4 channels)`.
        """
        wide = _EXPANSION * self.channels
        fields = {
            "use_bias": False, "kernel_init": he_fan_out, "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }  # fmt: skip

        def rectified(y):
            y = batch_norm(y, train, self.dtype, self.param_dtype, scale=_SCALE, kind=self.kind)
            return nn.relu(y)

        kind = layer_kind(self.kind)
        y = gated.Conv(self.channels, 1, kind=kind, **fields)(rectified(x))
        y = gated.Conv(self.channels, 3, self.stride, padding=1, kind=kind, **fields)(rectified(y))
        y = gated.Conv(wide, 1, kind=kind, **fields)(rectified(y))
        if self.shortcut:
            x = gated.Conv(wide, 1, self.stride, name="shortcut", **fields)(x)
        return x + y


def _blocks(net: PreResNet) -> Iterator[tuple[int, int, int]]:
    """Stage and number of each block, counted from 1, and its stride."""
    for stage in range(1, len(net.channels) + 1):
        for block in range(1, net.blocks_per_stage + 1):
            yield stage, block, 2 if stage > 1 and block == 1 else 1
