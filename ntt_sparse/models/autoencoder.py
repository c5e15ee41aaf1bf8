"""Autoencoders with a gated bottleneck."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float

from ntt_sparse.gates import network as graph
from ntt_sparse.gates.dam import Dam
from ntt_sparse.gates.layer import Gate, Kind
from ntt_sparse.models.activations import ACTIVATIONS, check_activation
from ntt_sparse.models.initializers import torch_bias_init, torch_kernel_init

_ACTIVATIONS = ("none", "relu", "leaky_relu", "elu", "tanh")


class QRes(nn.Module):
    """A quadratic residual layer: `(U x) * (V x) + U x + b`.

    Source: Bu & Karpatne 2021, "Quadratic residual networks", https://arxiv.org/abs/2101.08366,
    without an activation.

    Attributes:
        features: Outputs.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "n d"]) -> Float[Array, "n features"]:
        """The outputs `(n, features)`."""
        x = jnp.asarray(x)
        linear = nn.Dense(
            self.features, use_bias=False, kernel_init=torch_kernel_init, name="linear"
        )(x)
        factor = nn.Dense(
            self.features, use_bias=False, kernel_init=torch_kernel_init, name="factor"
        )(x)
        bias = self.param("bias", torch_bias_init(x.shape[-1]), (self.features,))
        return linear * factor + linear + bias


class Perceptron(nn.Module):
    """Dense layers, an activation between them; the last may be a `QRes` layer.

    Attributes:
        widths: Outputs of each layer.
        activation: Between layers: "none", "relu", "leaky_relu", "elu" or "tanh".
        last: Activation after the last layer.
        quadratic: Whether the last layer is quadratic.
        use_bias: Whether dense layers have one.
    """

    widths: tuple[int, ...]
    activation: str = "relu"
    last: str = "none"
    quadratic: bool = False
    use_bias: bool = True

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: An activation is unknown, or a width is not positive.
        """
        super().__post_init__()
        for field in ("activation", "last"):
            check_activation(field, getattr(self, field), _ACTIVATIONS)
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths are {self.widths}, expected 1 or more for each layer")

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "n d"]) -> Float[Array, "n features"]:
        """The outputs `(n, widths[-1])`."""
        y: Any = jnp.asarray(x)
        for index, width in enumerate(self.widths):
            if index:
                y = ACTIVATIONS[self.activation](y)
            if self.quadratic and index == len(self.widths) - 1:
                y = QRes(width)(y)
            else:
                bias_init = torch_bias_init(y.shape[-1])
                y = nn.Dense(
                    width,
                    use_bias=self.use_bias,
                    kernel_init=torch_kernel_init,
                    bias_init=bias_init,
                )(y)
        return ACTIVATIONS[self.last](y)

    def extend(self, build: graph.Builder, x: str, prefix: str, gate: str | None = None) -> str:
        """Adds its nodes to a description.

        Args:
            build: What collects them.
            x: The node it reads.
            prefix: Of the paths of its parameters.
            gate: Path of the gate on its outputs; the last layer is dense then, with nothing
                after it.

        Returns:
            The name of its last node.

        Raises:
            ValueError: A gate is on outputs that are not those of a dense layer.
        """
        y = x
        for index, width in enumerate(self.widths):
            if index:
                y = build(graph.Activation(y, self.activation))
            final = index == len(self.widths) - 1
            if self.quadratic and final:
                # (U x) * (V x) + (U x + b), the bias a constant of its own.
                layer = f"{prefix}/QRes_0"
                linear = build(graph.Dense(y, width, bias=False), f"{layer}/linear")
                factor = build(graph.Dense(y, width, bias=False), f"{layer}/factor")
                product = build(graph.Multiply((linear, factor)))
                y = build(graph.Add((product, linear)))
                y = build(graph.Shift(y), layer)
            else:
                on = gate if final else None
                y = build(graph.Dense(y, width, self.use_bias, on), f"{prefix}/Dense_{index}")
        if gate and (self.quadratic or self.last != "none"):
            raise ValueError(
                f"{prefix} ends in {'a quadratic layer' if self.quadratic else self.last!r}: a "
                "description has gates on dense layers, expected one at the end"
            )
        return y if self.last == "none" else build(graph.Activation(y, self.last))


class Autoencoder(nn.Module):
    """An encoder, a gate on its outputs, a decoder.

    The params are `encoder`, `gate`, `decoder`.

    Source: Bu et al. 2021, https://arxiv.org/abs/2110.01684, Eq. 5 and Section 4.4.

    Attributes:
        encoder: Its last width is that of the bottleneck, 2 or more.
        decoder: Its last width is that of the inputs.
        kind: Of the gate.
    """

    encoder: Perceptron
    decoder: Perceptron
    kind: Kind = Dam()

    def setup(self):
        """Names the gate."""
        self.gate = Gate(self.kind)

    def __call__(self, x: Float[ArrayLike, "n ..."]) -> Float[Array, "n ..."]:
        """The reconstruction, of the shape of `x`.

        Raises:
            ValueError: The decoder gives another size.
        """
        x = jnp.asarray(x)
        result = self.decoder(self.encode(x))
        if result.shape[-1] != x[0].size:
            raise ValueError(
                f"the decoder gives {result.shape[-1]} numbers, an input has {x[0].size}"
            )
        return result.reshape(x.shape)

    def encode(self, x: Float[ArrayLike, "n ..."]) -> Float[Array, "n bottleneck"]:
        """The gated outputs of the encoder, `(n, bottleneck)`."""
        x = jnp.asarray(x)
        return self.gate(self.encoder(x.reshape(len(x), -1)))

    def network(self, input_shape: tuple[int, ...]) -> graph.Network:
        """Its description, for inputs of a shape.

        Raises:
            ValueError: The encoder does not end in a dense layer.
        """
        build = graph.Builder(input_shape)
        code = self.encoder.extend(build, "input", "encoder", "gate")
        result = self.decoder.extend(build, code, "decoder")
        if len(input_shape) > 1:
            build(graph.Reshape(result, tuple(input_shape)))
        return build.network()
