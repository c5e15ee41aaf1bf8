"""VGG-19 for small images, with gated channels."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float

from ntt_sparse.gates import network as graph
from ntt_sparse.gates.layer import Kind
from ntt_sparse.models import gated
from ntt_sparse.models.initializers import he_fan_out
from ntt_sparse.models.lenet import max_pool
from ntt_sparse.models.norm import batch_norm, layer_kind, norm_gate

# Of normalised channels at the start.
_SCALE = 0.5


class Vgg(nn.Module):
    """Stages of 3x3 convolutions with max pooling between them, pooling, a dense layer.

    Each convolution is gated, normalised and rectified; the place of the gate is that of its
    kind. The mean over positions after the last
    stage stands for the average pooling of 2 x 2 pixels that 32 x 32 images end at. The params
    are named `Conv_0`, `BatchNorm_0`, ..., `Dense_0`; running statistics are in the collection
    `batch_stats`, which `train=True` updates with `mutable=["batch_stats"]`.

    Source: Simonyan & Zisserman 2015, https://arxiv.org/abs/1409.1556, configuration E, in the
    form for CIFAR of Liu et al. 2017, "Learning Efficient Convolutional Networks through
    Network Slimming".

    Attributes:
        num_outputs: Outputs of the dense layer, 1 or more.
        stages: Channels of the convolutions, by stage.
        kind: Of the gates; `None` for none.
        dtype: Of the computation; by default that of inputs and params together.
        param_dtype: Of the parameters but the gates.
    """

    num_outputs: int = 10
    stages: tuple[tuple[int, ...], ...] = (
        (64, 64),
        (128, 128),
        (256,) * 4,
        (512,) * 4,
        (512,) * 4,
    )
    kind: Kind | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: A field has no meaning.
        """
        super().__post_init__()
        if self.num_outputs < 1:
            raise ValueError(f"num_outputs is {self.num_outputs}, expected 1 or more")
        if not self.stages or min(min(stage, default=0) for stage in self.stages) < 1:
            raise ValueError(f"stages are {self.stages}, expected channels of each convolution")

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
            ValueError: Not images, or images too small for the stages.
        """
        x = jnp.asarray(x)
        self._check_images(x.shape[1:])
        for stage, widths in enumerate(self.stages):
            x = max_pool(x) if stage else x
            for width in widths:
                x = gated.Conv(
                    width, 3, padding=1, use_bias=False, kind=layer_kind(self.kind),
                    kernel_init=he_fan_out, dtype=self.dtype, param_dtype=self.param_dtype,
                )(x)  # fmt: skip
                x = nn.relu(
                    batch_norm(x, train, self.dtype, self.param_dtype, scale=_SCALE, kind=self.kind)
                )
        return nn.Dense(
            self.num_outputs,
            kernel_init=nn.initializers.normal(0.01),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )(x.mean(axis=(1, 2)))

    def network(self, input_shape: tuple[int, ...]) -> graph.Network:
        """Its description, for images `(height, width, channels)`.

        Raises:
            ValueError: Images are too small for the stages.
        """
        self._check_images(input_shape)
        build, y, index = graph.Builder(input_shape), "input", 0
        for stage, widths in enumerate(self.stages):
            y = build(graph.Pool(y)) if stage else y
            for n in widths:
                name = f"Conv_{index}"
                gate = f"{name}/gate" if layer_kind(self.kind) else None
                y = build(graph.Conv(y, n, 3, 1, (1, 1), gate=gate), name)
                norm = f"BatchNorm_{index}"
                y = build(graph.Norm(y, gate=norm_gate(self.kind, norm, index)), norm)
                y = build(graph.Activation(y, "relu"))
                index += 1
        build(graph.Dense(build(graph.Mean(y)), self.num_outputs), "Dense_0")
        return build.network()

    def _check_images(self, shape: tuple[int, ...]) -> None:
        least = 2 ** (len(self.stages) - 1)
        if len(shape) != 3 or min(shape[:2]) < least or shape[2] < 1:
            raise ValueError(
                f"images have shape {shape}, expected (height, width, channels) of {least} x "
                f"{least} pixels or more: they are halved {len(self.stages) - 1} times"
            )
