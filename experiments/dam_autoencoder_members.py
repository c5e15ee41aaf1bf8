"""The members of the DAM autoencoder study: which networks there are, and how each starts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from experiments.dam_representation_members import KINDS
from experiments.study import stack, unit_pixels
from ntt_sparse.data.images import ImageData
from ntt_sparse.gates.layer import Kind
from ntt_sparse.models.autoencoder import Autoencoder, Perceptron
from ntt_sparse.training.state import Member, create_member


class Run(NamedTuple):
    """One network of the study."""

    gate: str
    coefficient: float
    seed: int


def runs_of(config: Any, gate: str) -> list[Run]:
    """Every coefficient of a kind of gate with every seed."""
    return [
        Run(gate, coefficient, seed)
        for coefficient in config[f"{gate}_coefficients"]
        for seed in config.seeds
    ]


def member_names(runs: list[Run]) -> list[str]:
    """Names such as `"dam-c0.5-s1"`, fit for file names."""
    return [f"{run.gate}-c{run.coefficient!r}-s{run.seed}" for run in runs]


def kind_of(config: Any, gate: str) -> Kind:
    """A kind of gate, with what it starts from."""
    return KINDS[gate](initial=config.initial)


def autoencoder(config: Any, kind: Kind, dimension: int) -> Autoencoder:
    """The network for inputs of so many numbers, the decoder mirroring the encoder."""
    hidden = tuple(config.model.hidden)
    return Autoencoder(
        Perceptron((*hidden, config.model.bottleneck)),
        Perceptron((*reversed(hidden), dimension), last="tanh"),
        kind,
    )


def pixels(data: ImageData) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
    """Training and test images as rows, as the published code scales them.

    Pixels go from -1 to 1, the darkest and the brightest of the training images.
    """
    unit = unit_pixels(data)
    train, test = ((2 * np.asarray(x) - 1).reshape(len(x), -1) for x in (unit.train.x, unit.test.x))
    return train, test


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """Adam, of all parameters, gates among them."""
    return optax.adam(config.training.learning_rate)


def start_members(config: Any, gate: str, dimension: int) -> Member:
    """The networks of one kind of gate at their start.

    A seed fixes the weights, also between kinds, and the order of the data. The context of each
    member is its coefficient.
    """
    runs = runs_of(config, gate)
    module = autoencoder(config, kind_of(config, gate), dimension)

    def member(key, coefficient):
        params = module.init(key, jnp.zeros((1, dimension)))["params"]
        masks = jax.tree.map(lambda _: None, params)
        return create_member(params, masks, make_optimizer(config), key, coefficient)

    return jax.jit(jax.vmap(member))(
        stack([jax.random.key(run.seed) for run in runs]),
        jnp.asarray([run.coefficient for run in runs], float),
    )
