"""LeNet and its kin: plain stacks of convolutions, pooling and dense layers."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float

from ntt_sparse.gates import network as graph
from ntt_sparse.gates.layer import Kind
from ntt_sparse.models import gated
from ntt_sparse.models.activations import ACTIVATIONS, check_activation
from ntt_sparse.models.dropout import Dropout
from ntt_sparse.models.initializers import torch_bias_init, torch_kernel_init

_PADDINGS = ("VALID", "SAME")
_ACTIVATIONS = ("relu", "tanh", "sine")
_INITS = ("glorot", "torch")


class LeNet(nn.Module):
    """Stages of convolutions, each closed by 2x2 max pooling, then dense layers.

    The params are named in order: `Conv_0`, ..., `Dense_0`, ..., each with a `kernel`, a `bias`
    and, where channels are gated, a `gate`, which is before the activation.

    Attributes:
        num_outputs: Outputs of the last dense layer, 1 or more.
        stages: Channels of the convolutions, by stage; none for a multilayer perceptron.
        kernel_size: Height and width of all kernels.
        hidden: Widths of the hidden dense layers.
        padding: "VALID" (the default, as in published code) or "SAME".
        field: Smaller images are centred on zeros, up to this height and width.
        dropout: With `train=True`, drops 0.25 after each pooling and 0.5 between each
            hidden dense layer and its activation; takes `rngs={"dropout": key}`. Other rates,
            and names of neurons, are variables of `Dropout_0`, ..., see
            `ntt_sparse.models.dropout`.
        initializer: "glorot": kernels from `glorot_normal`, biases from `normal(stddev=1e-2)`;
            "torch": both uniform, up to the square root of one over the fan in.
        activation: "relu", "tanh" or "sine".
        kind: Of the gates; `None` for none.
        gated: Hidden layers that are gated, counted from the input; `None` for all.
        dtype: Of the computation; by default that of inputs and params together.
        param_dtype: Of the parameters.
    """

    num_outputs: int = 10
    stages: tuple[tuple[int, ...], ...] = ()
    kernel_size: int = 5
    hidden: tuple[int, ...] = ()
    padding: str = "VALID"
    field: int = 0
    dropout: bool = False
    initializer: str = "glorot"
    activation: str = "relu"
    kind: Kind | None = None
    gated: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: A field has no meaning.
        """
        super().__post_init__()
        check_activation("activation", self.activation, _ACTIVATIONS)
        depth = sum(map(len, self.stages)) + len(self.hidden)
        if self.gated is not None and not (self.kind and 1 <= self.gated <= depth):
            raise ValueError(
                f"gated is {self.gated}, expected None, or with a kind of gate 1 to {depth}, the "
                "number of hidden layers"
            )
        if self.padding not in _PADDINGS:
            raise ValueError(f"padding is {self.padding!r}, expected one of {', '.join(_PADDINGS)}")
        if self.initializer not in _INITS:
            raise ValueError(
                f"initializer is {self.initializer!r}, expected one of {', '.join(_INITS)}"
            )
        if self.num_outputs < 1:
            raise ValueError(f"num_outputs is {self.num_outputs}, expected 1 or more")

    @nn.compact
    def __call__(
        self, x: Float[ArrayLike, "n ..."], *, train: bool = False
    ) -> Float[Array, "n num_outputs"]:
        """The outputs (logits) of a batch.

        Args:
            x: Images `(n, height, width, channels)`; any shape `(n, ...)` without stages.
            train: Whether dropout drops.

        Returns:
            Outputs `(n, num_outputs)`.

        Raises:
            ValueError: Not images, or images too small for the stages.
        """
        y: Any = jnp.asarray(x)
        kinds, places = self._kinds(), itertools.count()
        activate = ACTIVATIONS[self.activation]

        def layer(fan_in):
            torch = self.initializer == "torch"
            return {
                "kernel_init": torch_kernel_init if torch else nn.initializers.glorot_normal(),
                "bias_init": torch_bias_init(fan_in) if torch else nn.initializers.normal(1e-2),
                "dtype": self.dtype,
                "param_dtype": self.param_dtype,
            }

        def drop(x, rate):
            if not self.dropout:
                return x
            return Dropout(rate, name=f"Dropout_{next(places)}")(x, deterministic=not train)

        if self.stages:
            self._check_images(y.shape)
            y = pad_to_field(y, self.field)
        for stage in self.stages:
            for channels in stage:
                fields = layer(self.kernel_size**2 * y.shape[-1])
                y = gated.Conv(
                    channels, self.kernel_size, padding=self.padding, kind=next(kinds), **fields
                )(y)
                y = activate(y)
            y = drop(max_pool(y), 0.25)
        y = y.reshape(y.shape[0], -1)
        for width in self.hidden:
            fields = layer(y.shape[-1])
            y = activate(drop(gated.Dense(width, kind=next(kinds), **fields)(y), 0.5))
        return gated.Dense(self.num_outputs, **layer(y.shape[-1]))(y)

    def network(self, input_shape: tuple[int, ...]) -> graph.Network:
        """Its description, for inputs of a shape, such as `(height, width, channels)`.

        Raises:
            ValueError: Not images, or images too small for the stages.
        """
        build, kinds, y = graph.Builder(input_shape), self._kinds(), "input"

        def gate(name):
            return f"{name}/gate" if next(kinds, None) else None

        def drop(y, rate):
            return build(graph.Dropout(y, rate)) if self.dropout else y

        if self.stages:
            self._check_images((1, *input_shape))
            y = build(graph.Field(y, self.field)) if self.field else y
        around = self.kernel_size - 1 if self.padding == "SAME" else 0
        convolutions = 0
        for stage in self.stages:
            for n in stage:
                name, padding = f"Conv_{convolutions}", (around // 2, around - around // 2)
                convolutions += 1
                y = build(
                    graph.Conv(y, n, self.kernel_size, 1, padding, bias=True, gate=gate(name)), name
                )
                y = build(graph.Activation(y, self.activation))
            y = drop(build(graph.Pool(y)), 0.25)
        for index, n in enumerate(self.hidden):
            name = f"Dense_{index}"
            y = drop(build(graph.Dense(y, n, gate=gate(name)), name), 0.5)
            y = build(graph.Activation(y, self.activation))
        build(graph.Dense(y, self.num_outputs), f"Dense_{len(self.hidden)}")
        return build.network()

    def _kinds(self) -> Iterator[Kind | None]:
        """The gate of each hidden layer, in order."""
        depth = sum(map(len, self.stages)) + len(self.hidden)
        count = depth if self.gated is None else self.gated
        return iter([self.kind] * count + [None] * (depth - count))

    def _check_images(self, shape: tuple[int, ...]) -> None:
        """Follows the image size through the stages, before any of it is computed."""
        if len(shape) != 4:
            raise ValueError(f"input is {shape}, expected images (n, height, width, channels)")
        shrink = self.kernel_size - 1 if self.padding == "VALID" else 0
        size = max(min(shape[1:3]), self.field)
        for stage in self.stages:
            for _ in stage:
                size -= shrink
            size //= 2
            if size < 1:
                hint = 'a larger image or padding="SAME"' if shrink else "a larger image"
                raise ValueError(
                    f"images of {shape[1]}x{shape[2]} vanish in {len(self.stages)} stages of "
                    f"{self.padding} {self.kernel_size}x{self.kernel_size} convolutions and "
                    f"2x2 pooling: use {hint}"
                )


def max_pool(
    x: Float[Array, "n h w c"], size: int = 2, stride: int = 2, padding: tuple[int, int] = (0, 0)
) -> Float[Array, "n h2 w2 c"]:
    """Max pooling; an odd last row or column of 2x2 windows is left out.

    2x2 windows with stride 2 are reshape and maximum instead of `nn.max_pool`: the same values,
    but its second derivatives, which kernel objectives take, are plain elementwise code and not a
    windowed reduction that is slow on CPU. Tied maxima share the gradient equally there, where
    `nn.max_pool` gives it to the first. Ties are all but confined to windows of
    zeros after a ReLU, whose own gradient there is zero.

    Args:
        x: Images `(n, h, w, c)` with h and w of a window or more.
        size: Height and width of the windows.
        stride: Of their positions.
        padding: Rows and columns before and after the image that windows reach.

    Returns:
        Images `(n, h2, w2, c)`; by default `(n, h // 2, w // 2, c)`.
    """
    if (size, stride, padding) != (2, 2, (0, 0)):
        around: Any = [padding, padding]
        return nn.max_pool(x, (size, size), (stride, stride), around)
    n, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    windows = x[:, : 2 * rows, : 2 * columns].reshape(n, rows, 2, columns, 2, channels)
    return windows.max(axis=(2, 4))


def pad_to_field(x: Float[Array, "n h w c"], field: int) -> Float[Array, "n h2 w2 c"]:
    """Centres images smaller than `field` x `field` on zeros; larger ones pass through."""
    missing = [max(0, field - size) for size in x.shape[1:3]]
    return jnp.pad(x, [(0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)])
