"""ResNet-18, ResNet-50 and their kin: four stages, for small images or for those of ImageNet."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float

from ntt_sparse.gates import network as graph
from ntt_sparse.gates.layer import Kind
from ntt_sparse.models import gated
from ntt_sparse.models.initializers import he_fan_out, torch_bias_init, torch_kernel_init
from ntt_sparse.models.lenet import max_pool
from ntt_sparse.models.norm import batch_norm, layer_kind, norm_gate

_STEMS = ("cifar", "imagenet")
_EXPANSION = 4


class DeepResNet(nn.Module):
    """A stem, stages of residual blocks, global average pooling, a dense layer.

    The first block of each stage but the first halves height and width. Where a block changes
    the shape, its input goes through a normalised 1x1 convolution. Bottlenecks stride in their
    3x3 convolution, as in the weights that torchvision has published. Gates are on the
    convolutions inside of blocks, not on what is added to the stream.

    The params are named `Conv_0`, `BatchNorm_0`, `stage1_block1`, ..., `Dense_0`; running
    statistics are in the collection `batch_stats`, which `train=True` updates with
    `mutable=["batch_stats"]`.

    ============  =====================================================================
    `cifar`       the stem is a 3x3 convolution
    `imagenet`    a 7x7 convolution of stride 2 and 3x3 max pooling of stride 2
    ============  =====================================================================

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", Table 1.

    Attributes:
        num_outputs: Outputs of the dense layer, 1 or more.
        blocks: Residual blocks of each stage.
        channels: Channels inside of the blocks, by stage.
        bottleneck: Whether blocks are three convolutions, the last to four times the channels,
            in place of two.
        stem: "cifar" or "imagenet", see above.
        kind: Of the gates; `None` for none.
        dtype: Of the computation; by default that of inputs and params together.
        param_dtype: Of the parameters but the gates.
    """

    num_outputs: int = 10
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = False
    stem: str = "cifar"
    kind: Kind | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: A field has no meaning.
        """
        super().__post_init__()
        if self.stem not in _STEMS:
            raise ValueError(f"stem is {self.stem!r}, expected one of {', '.join(_STEMS)}")
        if self.num_outputs < 1:
            raise ValueError(f"num_outputs is {self.num_outputs}, expected 1 or more")
        for field in ("blocks", "channels"):
            if not getattr(self, field) or min(getattr(self, field)) < 1:
                raise ValueError(
                    f"{field} are {getattr(self, field)}, expected 1 or more for each stage"
                )
        if len(self.blocks) != len(self.channels):
            raise ValueError(
                f"blocks are of {len(self.blocks)} stages, channels of {len(self.channels)}: "
                "expected as many"
            )

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
        y: Any = jnp.asarray(x)
        if y.ndim != 4 or 0 in y.shape[1:]:
            raise ValueError(f"input is {y.shape}, expected images (n, height, width, channels)")
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        y = gated.Conv(
            self.channels[0], size, stride, padding=size // 2, use_bias=False,
            kernel_init=he_fan_out, dtype=self.dtype, param_dtype=self.param_dtype,
        )(y)  # fmt: skip
        y = nn.relu(batch_norm(y, train, self.dtype, self.param_dtype))
        if self.stem == "imagenet":
            y = max_pool(y, 3, 2, (1, 1))
        for name, channels, stride in _blocks(self):
            y = DeepBlock(
                channels, stride, self.bottleneck, kind=self.kind, dtype=self.dtype,
                param_dtype=self.param_dtype, name=name,
            )(y, train=train)  # fmt: skip
        return nn.Dense(
            self.num_outputs,
            kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(y.shape[-1]),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )(y.mean(axis=(1, 2)))

    def network(self, input_shape: tuple[int, ...]) -> graph.Network:
        """Its description, for images `(height, width, channels)`.

        Raises:
            ValueError: Not the shape of images.
        """
        build = graph.image_builder(input_shape)

        def convolve(y, place, index, channels, size, stride=1, gated=True):
            name, norm = f"{place}Conv_{index}", f"{place}BatchNorm_{index}"
            kind = self.kind if gated else None
            gate = f"{name}/gate" if layer_kind(kind) else None
            padding = (size // 2, size // 2)
            y = build(graph.Conv(y, channels, size, stride, padding, gate=gate), name)
            return build(graph.Norm(y, gate=norm_gate(kind, norm, index)), norm)

        def rectified(y, name=""):
            return build(graph.Activation(y, "relu"), name)

        imagenet = self.stem == "imagenet"
        size, stride = (7, 2) if imagenet else (3, 1)
        x = convolve("input", "", 0, self.channels[0], size, stride, gated=False)
        x = rectified(x)
        x = build(graph.Pool(x, 3, 2, (1, 1))) if imagenet else x
        width = self.channels[0]
        for name, channels, stride in _blocks(self):
            steps = _steps(channels, stride, self.bottleneck)
            y = x
            for index, (out, size, step) in enumerate(steps):
                last = index == len(steps) - 1
                y = convolve(y, f"{name}/", index, out, size, step, gated=not last)
                y = y if last else rectified(y)
            out = steps[-1][0]
            if stride > 1 or width != out:
                x = convolve(x, f"{name}/", len(steps), out, 1, stride, gated=False)
            x, width = rectified(build(graph.Add((x, y))), name), out
        build(graph.Dense(build(graph.Mean(x)), self.num_outputs), "Dense_0")
        return build.network()


class DeepBlock(nn.Module):
    """Two 3x3 convolutions or a bottleneck, added to their input before the last ReLU.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", Figure 5.

    Attributes:
        channels: Channels inside.
        stride: Of the (first) 3x3 convolution, and of the shortcut.
        bottleneck: Whether there are 1x1 convolutions before and after one of 3x3, the last to
            four times the channels.
        kind: Of the gates; `None` for none.
        dtype: Of the computation; by default that of inputs and params together.
        param_dtype: Of the parameters but the gates.
    """

    channels: int
    stride: int = 1
    bottleneck: bool = False
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
            Features `(n, ceil(h / stride), ceil(w / stride), channels)`, of a bottleneck four
            times the channels.
        """

        def convolve(y, channels, size, stride, kind):
            y = gated.Conv(
                channels, size, stride, padding=size // 2, use_bias=False, kernel_init=he_fan_out,
                kind=layer_kind(kind), dtype=self.dtype, param_dtype=self.param_dtype,
            )(y)  # fmt: skip
            return batch_norm(y, train, self.dtype, self.param_dtype, kind=kind)

        *inner, (wide, size, stride) = _steps(self.channels, self.stride, self.bottleneck)
        y = x
        for step in inner:
            y = nn.relu(convolve(y, *step, self.kind))
        y = convolve(y, wide, size, stride, None)
        if self.stride > 1 or x.shape[-1] != wide:
            x = convolve(x, wide, 1, self.stride, None)
        return nn.relu(x + y)


def _steps(channels: int, stride: int, bottleneck: bool) -> list[tuple[int, int, int]]:
    """Channels, size and stride of the convolutions of a block."""
    if bottleneck:
        return [(channels, 1, 1), (channels, 3, stride), (_EXPANSION * channels, 1, 1)]
    return [(channels, 3, stride), (channels, 3, 1)]


def _blocks(net: DeepResNet) -> Iterator[tuple[str, int, int]]:
    """The name of each block, its channels and its stride."""
    for stage, (count, channels) in enumerate(zip(net.blocks, net.channels, strict=True), start=1):
        for block in range(1, count + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            yield f"stage{stage}_block{block}", channels, stride
