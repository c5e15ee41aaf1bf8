"""The members of the recommender study: networks, and the ratings that each knows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int

from experiments.study import stack
from ntt_sparse.data import ratings, subgraphs
from ntt_sparse.data.images import split_indices
from ntt_sparse.data.ratings import RatingData, Ratings
from ntt_sparse.data.subgraphs import Graphs, Sizes, Subgraphs
from ntt_sparse.gates.dam import Dam
from ntt_sparse.gates.layer import Kind
from ntt_sparse.models.igmc import Igmc
from ntt_sparse.training.mesh import make_mesh
from ntt_sparse.training.program import make_program
from ntt_sparse.training.state import Member, TrainState, create_member

LABELS = {"none": "IGMC", "dam": "IGMC-DAM"}


class Run(NamedTuple):
    """One network of the study."""

    gate: str
    coefficient: float
    seed: int


class Context(NamedTuple):
    """What else a member knows: its coefficient, and which part of the ratings trains it."""

    coefficient: Float[Array, ""]
    part: Int[Array, ""]


class Examples(NamedTuple):
    """Pairs and their ratings, `n` in each of `parts` ways to split them.

    Attributes:
        values: The ratings.
        subgraphs: Of all parts, one after the other: pair i of part s is `s n + i`.
    """

    values: Float[np.ndarray, "n parts"] | Float[Array, "n parts"]
    subgraphs: Subgraphs


class Sets(NamedTuple):
    """What networks learn from and are measured on."""

    levels: Float32[np.ndarray, " r"]
    train: Examples
    validation: Examples | None
    test: Examples


def runs_of(config: Any, gate: str) -> list[Run]:
    """Every coefficient of a kind of gate with every seed; dropout has none."""
    coefficients = (0.0,) if gate == "none" else config.dam_coefficients
    return [Run(gate, coefficient, seed) for coefficient in coefficients for seed in config.seeds]


def member_names(runs: list[Run]) -> list[str]:
    """Names such as `"none-s1"` or `"dam-c0.1-s1"`, fit for file names."""
    return [
        f"{run.gate}-s{run.seed}"
        if run.gate == "none"
        else f"{run.gate}-c{run.coefficient!r}-s{run.seed}"
        for run in runs
    ]


def kind_of(config: Any, gate: str) -> Kind | None:
    """The gate, with what it starts from; `None` for dropout."""
    return None if gate == "none" else Dam(initial=config.initial)


def network(config: Any, gate: str, num_levels: int) -> Igmc:
    """The network for so many levels of ratings."""
    model = config.model
    return Igmc(
        num_levels, tuple(model.widths), model.bases, model.code, kind_of(config, gate),
        model.dropout, model.edge_dropout,
    )  # fmt: skip


def make_sets(config: Any, data: RatingData) -> Sets:
    """The subgraphs of all pairs, from the ratings that train.

    With a validation part, every seed has its own one, and so its own subgraphs; without, all
    share one set.
    """
    fraction, count = config.data.validation_fraction, len(data.train.values)
    seeds = config.seeds if fraction else (0,)
    levels = ratings.levels(data.train)
    parts: dict[str, list[tuple[Ratings, Subgraphs]]] = {"train": [], "validation": [], "test": []}
    for seed in seeds:
        kept, held = split_indices(count, fraction, seed)
        known = ratings.take(data.train, kept)
        graph = subgraphs.index(known, data.num_users, data.num_items, levels)
        pairs = {"train": known, "validation": ratings.take(data.train, held), "test": data.test}
        for name, chosen in pairs.items():
            found = subgraphs.extract(
                graph, chosen.users, chosen.items, most=config.data.most, seed=seed
            )
            parts[name].append((chosen, found))
    examples = {name: _examples(part) for name, part in parts.items()}
    validation = examples["validation"] if fraction else None
    return Sets(levels, examples["train"], validation, examples["test"])


def make_optimizer(config: Any, steps_per_epoch: int) -> optax.GradientTransformation:
    """Adam of all parameters, gates among them, at a rate that falls every so many epochs."""
    training = config.training
    every = training.decay_epochs * steps_per_epoch
    falls = {
        step: training.decay for step in range(every, training.epochs * steps_per_epoch, every)
    }
    return optax.adam(optax.piecewise_constant_schedule(training.learning_rate, falls))


def start_members(
    config: Any, gate: str, num_levels: int, optimizer: optax.GradientTransformation
) -> Member:
    """The networks of one kind at their start.

    A seed fixes the weights, the order of the data and what is dropped, of both kinds alike.
    """
    runs = runs_of(config, gate)
    module = network(config, gate, num_levels)
    split = config.data.validation_fraction > 0
    context = Context(
        jnp.asarray([run.coefficient for run in runs], float),
        jnp.asarray([list(config.seeds).index(run.seed) if split else 0 for run in runs]),
    )

    def member(key, context):
        params = module.init(key, *blank())["params"]
        masks = jax.tree.map(lambda _: None, params)
        return create_member(params, masks, optimizer, key, context)

    return jax.jit(jax.vmap(member))(stack([jax.random.key(run.seed) for run in runs]), context)


def blank() -> Graphs:
    """The subgraph of a pair of which nothing is known."""
    none = jnp.zeros(0, jnp.int32)
    return Graphs(
        jnp.arange(2), jnp.full(2, 2), jnp.zeros(2, jnp.int32), subgraphs.Edges(none, none, none),
        jnp.asarray([[0, 1]]),
    )  # fmt: skip


def pick(sizes: Sizes, member: Member, data: Examples, indices: Int[Array, " b"]) -> Any:
    """The batch of a member, `(graphs, ratings)`: pairs of its part."""
    part = member.context.part
    pairs = part * data.values.shape[0] + indices
    return subgraphs.join(data.subgraphs, pairs, sizes), data.values[indices, part]


def batch_sizes(config: Any, members: Member, train: Examples, steps: int) -> Sizes:
    """What batches are padded to, so that those of all steps fit.

    The order of the data is known beforehand, and with it the largest batch.

    Args:
        config: The settings.
        members: Of which all others have the seeds.
        train: The training pairs.
        steps: Of the training.
    """
    count, size = len(train.values), config.training.batch_size
    program = make_program(lambda member, batch, step: (member, {}), batch_size=size,
                           mesh=make_mesh())  # fmt: skip
    state = TrainState(jnp.int32(0), members, {}, jnp.zeros(0, jnp.int32), {})
    first = np.asarray(members.context.part)[:, None] * count
    largest = Sizes(0, 0)
    for epoch in range(-(-steps // (count // size))):
        orders = np.asarray(program.permutations(state, jnp.int32(epoch), train.values))
        batches = (first + orders)[:, : count - count % size].reshape(-1, size)
        found = subgraphs.sizes_of(train.subgraphs, batches)
        largest = Sizes(*map(max, largest, found))
    return largest


def _examples(parts: list[tuple[Ratings, Subgraphs]]) -> Examples:
    values = np.stack([chosen.values for chosen, _ in parts], axis=1)
    return Examples(values, subgraphs.concatenate([found for _, found in parts]))
