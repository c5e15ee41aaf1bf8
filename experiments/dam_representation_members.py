"""The members of the DAM representation study: networks and the data of each."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from experiments.study import stack
from ntt_sparse._types import PRNGKey
from ntt_sparse.gates.dam import Dam
from ntt_sparse.gates.l1 import L1
from ntt_sparse.gates.layer import Kind
from ntt_sparse.models.autoencoder import Autoencoder, Perceptron
from ntt_sparse.training.state import Member, create_member

KINDS: dict[str, type[Dam] | type[L1]] = {"dam": Dam, "l1": L1}
LABELS = {"dam": "DAM", "l1": "L1"}

# Independent of the streams that training folds from a member's key.
_DATA_STREAM = 1000


class Run(NamedTuple):
    """One network of the study."""

    gate: str
    rank: int
    coefficient: float
    learning_rate: float
    initial: float
    seed: int


def runs_of(config: Any) -> list[Run]:
    """Every combination of the settings."""
    fields = (
        config.gates.split(","), config.ranks, config.coefficients, config.learning_rates,
        config.initials, config.seeds,
    )  # fmt: skip
    return [Run(*values) for values in itertools.product(*fields)]


def member_names(runs: list[Run]) -> list[str]:
    """Names such as `"dam-r5-c0.01-l0.01-b1.0-s1"`, fit for file names."""
    return [
        f"{r.gate}-r{r.rank}-c{r.coefficient!r}-l{r.learning_rate!r}-b{r.initial!r}-s{r.seed}"
        for r in runs
    ]


def decoder(task: str, width: int) -> Perceptron:
    """What makes the data, and what is learned to make them."""
    if task == "neural":
        return Perceptron((128, width), activation="elu")
    return Perceptron((width,), quadratic=task == "quadratic", use_bias=False)


def autoencoder(config: Any, kind: Kind) -> Autoencoder:
    """The network of a task."""
    n = config.bottleneck
    encoders = {
        "linear": Perceptron((n,), use_bias=False),
        "quadratic": Perceptron((256, 256, n), activation="leaky_relu"),
        "neural": Perceptron((256, 256, n), activation="elu"),
    }
    return Autoencoder(encoders[config.task], decoder(config.task, config.dimension), kind)


def make_data(config: Any, rank: int, key: PRNGKey) -> Float[Array, "n d"]:
    r"""Examples `(examples, dimension)` that `rank` independent normal factors make.

    Of the linear task only what its loss depends on is kept, at most `dimension` examples: with
    $X = QR$, the mean squared error of a linear network is the same on $X$ and on
    $\sqrt{n / N}\,R$ for the n rows of R, and so are all its derivatives.
    """
    factors, weights = jax.random.split(key)
    omega = jax.random.normal(factors, (config.examples, rank))
    module = decoder(config.task, config.dimension)
    params = module.init(weights, omega[:1])["params"]
    if config.generator == "normal":
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(weights, len(leaves))
        drawn = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
        params = jax.tree.unflatten(structure, drawn)
    x: Any = module.apply({"params": params}, omega)
    if config.task != "linear":
        return x
    root = jnp.linalg.qr(x, mode="r")
    return root * (len(root) / len(x)) ** 0.5


def make_optimizer(config: Any, learning_rate: Any = 0.0) -> optax.GradientTransformation:
    """Adam; the learning rate is part of a member's state."""
    # Coupled, on all parameters, gates among them, as in the published code.
    decay = config.training.weight_decay
    return optax.inject_hyperparams(
        lambda learning_rate: optax.chain(
            optax.add_decayed_weights(decay), optax.adam(learning_rate)
        )
    )(learning_rate=learning_rate)


def make_sets(config: Any) -> Float[Array, "sets n d"]:
    """The data of every rank and seed, each once, see `set_of`."""
    data_of = jax.jit(
        lambda rank, key: make_data(config, rank, jax.random.fold_in(key, _DATA_STREAM)),
        static_argnums=0,
    )
    pairs = itertools.product(config.ranks, config.seeds)
    return jnp.stack([data_of(rank, jax.random.key(seed)) for rank, seed in pairs])


def set_of(config: Any, run: Run) -> int:
    """The index among `make_sets` of the data that a network is trained on."""
    return list(itertools.product(config.ranks, config.seeds)).index((run.rank, run.seed))


def start_members(config: Any, gate: str, runs: list[Run]) -> Member:
    """The networks of one gate at their start.

    A seed and a rank fix data and weights. The context of each is its `coefficient` and `set`,
    the index of its data.
    """

    def member(key, index, coefficient, learning_rate, initial):
        module = autoencoder(config, KINDS[gate]())
        params = module.init(key, jnp.zeros((1, config.dimension)))["params"]
        params = {**params, "gate": jax.tree.map(lambda leaf: 0 * leaf + initial, params["gate"])}
        masks = jax.tree.map(lambda _: None, params)
        context = {"coefficient": coefficient, "set": index}
        return create_member(params, masks, make_optimizer(config, learning_rate), key, context)

    return jax.jit(jax.vmap(member))(
        stack([jax.random.key(run.seed) for run in runs]),
        jnp.asarray([set_of(config, run) for run in runs]),
        *(
            jnp.asarray([getattr(run, name) for run in runs], float)
            for name in ("coefficient", "learning_rate", "initial")
        ),
    )
