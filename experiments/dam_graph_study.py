"""The DAM graph study: prepare, train, report."""

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import dam_graph_report, diverged
from experiments.cli import claim_workdir, user_errors
from experiments.dam_graph_checks import check_config
from experiments.dam_graph_members import (
    Data,
    Links,
    Run,
    autoencoder,
    gated_runs,
    load_graph,
    make_data,
    make_optimizer,
    member_names,
    plain_runs,
    plain_sizes,
    start_members,
)
from experiments.stage import fit_stage
from experiments.study import save_networks
from ntt_sparse.data.links import sample_unlinked
from ntt_sparse.models.graph import (
    NOISE,
    GraphAutoencoder,
    decode,
    divergence,
    gates,
    link_loss,
)
from ntt_sparse.training.files import write_npz
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.ranking import average_precision, roc_auc
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import Term, TermInputs, make_step


def run(config: Any, workdir: str | Path, *, data_dir: str | None = None) -> dict[str, Any]:
    """Runs the study, or goes on with it.

    Args:
        config: From `experiments.configs.dam_graph.get_config`.
        workdir: Where everything is written; an earlier run of the same config there is
            continued, and a finished one only draws its report again.
        data_dir: The folder of the graph's files, or the one that has a folder `planetoid`.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        UserError: The config, the graph or the work directory does not permit the study; nothing
            was changed.
    """
    with user_errors():
        check_config(config)
        data = make_data(config, load_graph(config, data_dir))
    with claim_workdir(workdir, config.to_dict()) as claimed:
        found = train(config, data, "dam", gated_runs(config), claimed)
        for size in plain_sizes(config, found):
            train(config, data, f"gae{size}", plain_runs(config, size), claimed)
        return dam_graph_report.write(config, claimed)


def train(config: Any, data: Data, stage: str, runs: list[Run], workdir: Path) -> list[int]:
    """Trains networks of one kind and size as one program, and writes them and their codes.

    Returns:
        How many dimensions are open, of each that has not diverged.
    """
    gated = stage == "dam"
    module = autoencoder(config, gated, runs[0].size)
    names = member_names(gated, runs)
    steps = config.training.max_steps or config.training.epochs
    plan = Plan(steps, steps, config.training.record_every, config.checkpoint_seconds)
    step_fn = make_step(training_terms(module), make_optimizer(config))
    # One after another: sums over segments take several times as long on a batched axis.
    members = fit_stage(
        config, workdir, stage, names, start_members(config, module, runs, data), step_fn, plan,
        data, functools.partial(evaluate, module), (data,), "loop", batch_size=1, pick=own_links,
        freeze=True,
    )  # fmt: skip
    gone = diverged.gone(workdir, stage, names)
    save_networks(workdir / "networks", names, members, gone)
    return save_codes(workdir / "embeddings", names, module, members, data, gone)


def save_codes(
    directory: Path,
    names: list[str],
    module: GraphAutoencoder,
    members: Member,
    data: Data,
    gone: Collection[int] = (),
) -> list[int]:
    """Writes what is open of the codes of all nodes, `codes` of `(n, d)`, under each name.

    Returns:
        The d of each; those that are gone have none.
    """
    directory.mkdir(exist_ok=True)

    @jax.jit
    def encode(members, data, index):
        member = jax.tree.map(lambda leaf: leaf[index], members)
        return _encode(module, member, own_links(member, data, None)), gates(module, member.params)

    sizes = []
    for index, name in enumerate(names):
        if index in gone:
            continue
        codes, open_ = jax.device_get(encode(members, data, index))
        codes = codes[:, np.flatnonzero(open_)]
        write_npz(directory / f"{name}.npz", {"codes": codes})
        sizes.append(codes.shape[1])
    return sizes


def own_links(member: Member, data: Data, indices: Any) -> Data:
    """The batch of every step: the whole graph, with the links of the member's seed."""
    del indices
    index = member.context["set"]
    return data._replace(links=jax.tree.map(lambda leaf: leaf[index], data.links))


def training_terms(module: GraphAutoencoder) -> dict[str, Term]:
    """The cross-entropy of links and other pairs, and what the network has besides it.

    That is the divergence of variational codes, divided by the number of nodes, and the penalty
    of gates.
    """
    kind = module.kind

    def link(inputs: TermInputs):
        held: Links = inputs.batch.links
        pairs, noise = jax.random.split(inputs.key)
        codes, details = _codes(module, inputs, noise)
        num_nodes, count = len(codes), len(held.excluded)
        negatives = sample_unlinked(pairs, held.excluded, num_nodes, count)
        loss = link_loss(decode(codes, held.parts.train), decode(codes, negatives))
        return loss + details.get("divergence", 0.0) / num_nodes, details

    if kind is None:
        return {"links": link}

    def gate(inputs: TermInputs):
        value = kind.penalty([inputs.params["gate"]])
        return inputs.context["coefficient"] * value, {"penalty": value}

    return {"links": link, "gate": gate}


def _codes(module: GraphAutoencoder, inputs: TermInputs, key: Any) -> tuple[Any, dict[str, Any]]:
    """Codes as in training, and what there is to log of them."""
    arguments = inputs.batch.features, inputs.batch.links.adjacency
    variables = {"params": inputs.params}
    if not module.variational:
        return module.apply(variables, *arguments, method="encode"), {}
    drawn: Any = module.apply(variables, *arguments, method="draw", rngs={NOISE: key})
    codes, posterior = drawn
    return codes, {"divergence": divergence(*posterior)}


def evaluate(module: GraphAutoencoder, member: Member, data: Data) -> dict[str, Array]:
    """Open dimensions, and how well held-out links are told from other pairs."""
    own = own_links(member, data, None)
    parts = own.links.parts
    codes = _encode(module, member, own)
    values = {"dimensions": jnp.sum(gates(module, member.params) > 0, dtype=codes.dtype)}
    for name, linked, others in (
        ("validation", parts.validation, parts.validation_negatives),
        ("test", parts.test, parts.test_negatives),
    ):
        # Of logits: probabilities of large ones are equal after rounding.
        scores = decode(codes, linked), decode(codes, others)
        values |= {f"{name}_auc": roc_auc(*scores), f"{name}_ap": average_precision(*scores)}
    return values


def _encode(module: GraphAutoencoder, member: Member, own: Data) -> Any:
    """Codes as they are used after training."""
    arguments = own.features, own.links.adjacency
    return module.apply({"params": member.params}, *arguments, method="encode")
