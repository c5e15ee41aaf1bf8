"""A training step of a graph autoencoder, beside PyTorch Geometric and PyTorch, in one process.

    python benchmarks/graphs.py                                  # 600 nodes of a made graph
    python benchmarks/graphs.py --graph cora --data_dir $HOME/data

A step looks at the whole graph: negative pairs are drawn, as many as there are links in both
directions and nodes, and Adam moves the weights. The candidates run in turn; printed are medians,
the median of the ratios to ours, and (of JAX) temporary memory. PyTorch Geometric, whose example
the autoencoder of the paper is, and PyTorch with sparse matrices take part where they are
installed. Their threads wait for each other: where something else runs on the cores, they are
several times as fast with `--threads 1`.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import blocked, in_turn, ratio

from ntt_sparse.data import graphs, links, planetoid
from ntt_sparse.data.graphs import Entries
from ntt_sparse.data.links import LinkSplit
from ntt_sparse.gates.dam import Dam
from ntt_sparse.models import graph as models

OURS = "GAE (ours)"
_RATE, _PENALTY = 0.01, 0.1


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison that the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graph", default="blocks", help="blocks (default), cora or citeseer")
    parser.add_argument("--data_dir", help="folder of the files ind.GRAPH.*")
    parser.add_argument("--rounds", type=int, default=9, help="turns (default 9)")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: what it takes)")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or (options.threads is not None and options.threads < 1):
        parser.error("expected at least 1 round and 1 thread")
    try:
        made = options.graph == "blocks"
        graph = graphs.blocks() if made else planetoid.load(options.graph, options.data_dir)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    x = graphs.normalise_rows(graph.x)
    parts = links.split(graph.edges, graph.num_nodes, seed=0)
    found, temporary = _in_jax(x, parts)
    found |= _in_torch(x, parts, options.threads)
    times = in_turn(found, options.rounds)
    print(f"\na training step on {options.graph}: {x.shape[0]} nodes, {len(parts.train)} links")
    print(f"{'':<32}{'median ms':>10}{'ratio':>8}{'temp MiB':>10}")
    for name, seconds in times.items():
        memory = f"{temporary[name]:>10.1f}" if name in temporary else ""
        print(
            f"{name:<32}{1e3 * statistics.median(seconds):>10.2f}"
            f"{ratio(times, name, OURS):>8.2f}{memory}"
        )


def _in_jax(x: Entries, parts: LinkSplit) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """A compiled step of each network, and its temporary memory in MiB."""
    num_nodes = x.shape[0]
    sparse = models.SparseMatrix(*map(jnp.asarray, x[:3]), shape=x.shape)
    adjacency = models.adjacency(parts.train, num_nodes)
    excluded = jnp.asarray(links.pair_numbers(parts.train, num_nodes))
    optimizer = optax.adam(_RATE)

    def step(module, params, opt_state, features, key):
        def loss(params):
            codes = module.apply({"params": params}, features, adjacency, method="encode")
            others = links.sample_unlinked(key, excluded, num_nodes, len(excluded))
            loss = models.link_loss(models.decode(codes, parts.train), models.decode(codes, others))
            gates = [params["gate"]] if module.kind else []
            return loss + _PENALTY * sum(module.kind.penalty([gate]) for gate in gates)

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    plain, gated = models.GraphAutoencoder(), models.GraphAutoencoder(kind=Dam())
    candidates, temporary = {}, {}
    for name, module, features in (
        (OURS, plain, sparse),
        ("GAE-DAM (ours)", gated, sparse),
        ("GAE (ours), dense features", plain, jnp.asarray(x.dense())),
    ):
        start = jax.jit(functools.partial(module.init, method="encode"))
        params = start(jax.random.key(0), features, adjacency)["params"]
        inputs = (params, optimizer.init(params), features, jax.random.key(1))
        compiled = jax.jit(functools.partial(step, module)).lower(*inputs).compile()
        temporary[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        candidates[name] = functools.partial(blocked, compiled, *inputs)
    return candidates, temporary


def _in_torch(x: Entries, parts: LinkSplit, threads: int | None) -> dict[str, Callable[[], Any]]:
    try:
        import graphs_torch
    except ImportError:
        return {}
    both = np.concatenate([parts.train, parts.train[:, ::-1]])
    return graphs_torch.steps(x, both, _RATE, threads)


if __name__ == "__main__":
    main()
