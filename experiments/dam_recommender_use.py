"""Trained recommenders in use: loaded, cut to their open channels, applied to any pairs.

A network knows nothing of single users and items: it rates pairs, by the ratings around them, of
users and items it never saw as well.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int64, Integer

from experiments.dam_recommender_members import network
from ntt_sparse._types import Params
from ntt_sparse.data import subgraphs
from ntt_sparse.data.ratings import Ratings
from ntt_sparse.data.subgraphs import Sizes, Subgraphs
from ntt_sparse.models.igmc import Igmc
from ntt_sparse.training.export import load_network
from ntt_sparse.training.files import write_text

_LEVELS = "levels.json"


class Recommender(NamedTuple):
    """A trained network.

    Attributes:
        module: The network.
        params: Its parameters.
        levels: The values that ratings around a pair may have, ascending.
        most: Other users, and other items, that it looks at.
    """

    module: Igmc
    params: Params
    levels: Float32[np.ndarray, " r"]
    most: int


def load(workdir: str | Path, name: str) -> Recommender:
    """A network that the study has trained.

    Args:
        workdir: Of the study.
        name: Of the network, such as `"dam-c0.1-s1"`.

    Raises:
        FileNotFoundError: There is no such network.
        ValueError: A file is damaged.
    """
    workdir = Path(workdir)
    params, _ = load_network(workdir / "networks" / f"{name}.safetensors")
    config: Any = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    levels = np.asarray(json.loads((workdir / _LEVELS).read_text()), np.float32)
    module = network(config, name.split("-")[0], len(levels))
    return Recommender(module, params, levels, config.data.most)


def cut(recommender: Recommender) -> Recommender:
    """The same function with a code of its open channels alone, see `Igmc.cut`."""
    module, params = recommender.module.cut(recommender.params)
    return recommender._replace(module=module, params=params)


def predict(
    recommender: Recommender,
    known: Ratings,
    users: Integer[np.ndarray, " p"],
    items: Integer[np.ndarray, " p"],
    *,
    num_users: int,
    num_items: int,
    batch_size: int = 50,
) -> Float32[np.ndarray, " p"]:
    """The ratings of pairs, by what is known around them.

    Args:
        recommender: From `load`.
        known: Ratings, of any users and items; those of the pairs themselves are not looked at.
        users: The user of each pair.
        items: The item of each pair.
        num_users: Users, counted from 0.
        num_items: Items.
        batch_size: Pairs at a time.

    Raises:
        ValueError: A user or an item is out of range, a rating is none of the levels, or
            `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"{batch_size=} pairs at a time, expected 1 or more")
    graph = subgraphs.index(known, num_users, num_items, recommender.levels)
    found = subgraphs.extract(graph, users, items, most=recommender.most)
    if not len(users):
        return np.zeros(0, np.float32)
    rows = chunks(len(users), batch_size)
    sizes = subgraphs.sizes_of(found, rows)
    apply = jax.jit(
        lambda params, found, rows: predictions(recommender.module, params, found, rows, sizes)
    )
    placed = jax.tree.map(jnp.asarray, (recommender.params, found, rows))
    return np.asarray(apply(*placed))[: len(users)]


def predictions(
    module: Igmc,
    params: Any,
    found: Subgraphs,
    rows: Int[Array, "chunks b"],
    sizes: Sizes,
) -> Float[Array, " p"]:
    """The ratings of pairs in chunks, one chunk after the other, in a compiled program.

    Args:
        module: The network.
        params: Its parameters.
        found: Subgraphs, as JAX arrays.
        rows: The pairs of each chunk.
        sizes: That the chunks fit in.
    """

    def chunk(pairs):
        return module.apply({"params": params}, *subgraphs.join(found, pairs, sizes))

    return jnp.asarray(jax.lax.map(chunk, rows)).reshape(-1)


def chunks(count: int, batch_size: int) -> Int64[np.ndarray, "chunks b"]:
    """Pairs in chunks, the last filled up with the last pair."""
    rows = np.arange(-(-count // batch_size) * batch_size).clip(max=count - 1)
    return rows.reshape(-1, batch_size)


def save_levels(workdir: Path, levels: Float32[np.ndarray, " r"]) -> None:
    """Writes the values that ratings have, which `load` reads."""
    write_text(workdir / _LEVELS, json.dumps(levels.tolist()) + "\n")
