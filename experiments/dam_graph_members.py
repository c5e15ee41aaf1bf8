"""The members of the DAM graph study: their graph, their links and how each starts."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.study import stack
from ntt_sparse.data import graphs, links, planetoid
from ntt_sparse.data.graphs import Graph
from ntt_sparse.gates.dam import Dam
from ntt_sparse.models import graph as models
from ntt_sparse.models.graph import GraphAutoencoder, SparseMatrix
from ntt_sparse.training.state import Member, create_member


class Run(NamedTuple):
    """One network of the study.

    Attributes:
        size: Embedding size, of a plain autoencoder; of one with gates, at the start.
        coefficient: Of the gates; 0 of a plain one.
        seed: Of weights, links and what is drawn.
    """

    size: int
    coefficient: float
    seed: int


class Links(NamedTuple):
    """What a network is trained on and measured with, of one seed or with a leading axis."""

    adjacency: SparseMatrix
    """Of the links to train on."""
    excluded: Any
    """What negative pairs are not drawn from, see `sample_unlinked`."""
    parts: links.LinkSplit


class Data(NamedTuple):
    """The data of all members."""

    links: Links
    """With a leading axis, of seeds."""
    features: SparseMatrix


def load_graph(config: Any, data_dir: str | None) -> Graph:
    """The graph of the settings, its features as they are stored.

    Raises:
        FileNotFoundError: Its files are not there.
        ValueError: They are damaged.
        OSError: They cannot be fetched.
    """
    name = config.data.name
    if name == "blocks":
        return graphs.blocks()
    if config.data.download and data_dir is not None:
        planetoid.download(name, f"{data_dir}/planetoid")
    return planetoid.load(name, data_dir)


def make_data(config: Any, graph: Graph) -> Data:
    """Features of rows that sum to one, and the links of every seed in parts."""
    x = graphs.normalise_rows(graph.x)
    features = SparseMatrix(*(jnp.asarray(array) for array in x[:3]), shape=x.shape)
    return Data(stack([_links_of(config, graph, seed) for seed in config.seeds]), features)


def _links_of(config: Any, graph: Graph, seed: int) -> Links:
    parts = links.split(
        graph.edges, graph.num_nodes, validation_fraction=config.data.validation_fraction,
        test_fraction=config.data.test_fraction, seed=seed,
    )  # fmt: skip
    return Links(
        models.adjacency(parts.train, graph.num_nodes),
        links.pair_numbers(parts.train, graph.num_nodes),
        parts,
    )


def gated_runs(config: Any) -> list[Run]:
    """Every coefficient with every seed."""
    return [
        Run(config.model.bottleneck, coefficient, seed)
        for coefficient in config.coefficients
        for seed in config.seeds
    ]


def plain_runs(config: Any, size: int) -> list[Run]:
    """Plain autoencoders of an embedding size, one for each seed."""
    return [Run(size, 0.0, seed) for seed in config.seeds]


def plain_sizes(config: Any, found: Iterable[float]) -> list[int]:
    """The embedding sizes of plain autoencoders: those asked for, or those that gates ended with.

    Args:
        config: The settings.
        found: Open dimensions of the networks with gates.
    """
    ended = {int(size) for size in found if size > 0}
    return sorted(config.sizes or ended | {config.model.bottleneck})


def member_names(gated: bool, runs: list[Run]) -> list[str]:
    """Names such as `"dam-c0.5-s1"` and `"gae-d4-s1"`, fit for file names."""
    return [
        f"dam-c{run.coefficient!r}-s{run.seed}" if gated else f"gae-d{run.size}-s{run.seed}"
        for run in runs
    ]


def autoencoder(config: Any, gated: bool, size: int) -> GraphAutoencoder:
    """The network of an embedding size."""
    kind = Dam(initial=config.initial) if gated else None
    return GraphAutoencoder((config.model.hidden, size), config.model.variational, kind)


def label(config: Any, gated: bool) -> str:
    """What reports call a network: `"GAE"`, `"GAE-DAM"`, or the same with a V."""
    return f"{'V' if config.model.variational else ''}GAE{'-DAM' if gated else ''}"


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """Adam, of all parameters, the offset among them."""
    return optax.adam(config.training.learning_rate)


def start_members(config: Any, module: GraphAutoencoder, runs: list[Run], data: Data) -> Member:
    """The networks at their start.

    A seed fixes weights and links. The context of each is its `coefficient` and `set`, the index
    of its links.
    """
    adjacency = jax.tree.map(lambda leaf: leaf[0], data.links.adjacency)

    def member(key, index, coefficient):
        method = "draw" if config.model.variational else "encode"
        rngs = {"params": key, models.NOISE: key}
        params = module.init(rngs, data.features, adjacency, method=method)["params"]
        masks = jax.tree.map(lambda _: None, params)
        context = {"coefficient": coefficient, "set": index}
        return create_member(params, masks, make_optimizer(config), key, context)

    return jax.jit(jax.vmap(member))(
        stack([jax.random.key(run.seed) for run in runs]),
        jnp.asarray([config.seeds.index(run.seed) for run in runs]),
        jnp.asarray([run.coefficient for run in runs], float),
    )
