"""The structured pruning study: prepare, train all networks as one program, measure, report."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import dam_pruning_compact, dam_pruning_report
from experiments.cli import claim_workdir, user_errors
from experiments.dam_pruning_checks import check_config, check_sizes
from experiments.dam_pruning_members import make_model, member_names, runs_of, target_of
from experiments.dam_pruning_stages import (
    Setup,
    gone,
    open_channels,
    stages_of,
    train,
    variables_of,
)
from experiments.study import hold_out, save_networks
from ntt_sparse.data import images
from ntt_sparse.gates import channels
from ntt_sparse.gates import network as graph
from ntt_sparse.gates.network import Network
from ntt_sparse.similarity.cka import cka_matrix
from ntt_sparse.similarity.features import capture
from ntt_sparse.training.files import write_npz
from ntt_sparse.training.state import Member

_logger = logging.getLogger(__name__)


def run(config: Any, workdir: str | Path, *, data_dir: str | None = None) -> dict[str, Any]:
    """Runs the study, or goes on with it.

    Args:
        config: From `experiments.configs.dam_pruning.get_config`.
        workdir: Where everything is written; an earlier run of the same config there is
            continued, and a finished one only draws its report again.
        data_dir: Where prepared TensorFlow Datasets are; by default as TFDS decides.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        UserError: The config, the data or the work directory does not permit the study;
            nothing was changed.
    """
    with user_errors():
        check_config(config)
        setup = prepare(config, data_dir)
    with claim_workdir(workdir, config.to_dict()) as claimed:
        members = train(config, setup, claimed)
        out = gone(config, setup.stages, claimed)
        _warn_of_missed_targets(config, members, out)
        save_networks(claimed / "networks", member_names(runs_of(config)), members, out)
        if config.similarity:
            save_similarities(claimed / "similarities.npz", config, setup, members, out)
        if config.compact:
            dam_pruning_compact.write(config, setup, members, claimed, out)
        whole = channels.whole(setup.network)
        summary = dam_pruning_report.write(config, claimed, whole, setup.stages)
        _warn_of_networks(config, setup, summary["networks"])
        return summary


def _warn_of_networks(config: Any, setup: Setup, rows: list[dict[str, Any]]) -> None:
    """Says which networks are constants, and which cost more than was asked for."""
    counted = config.budget in channels.Counts._fields
    for row in rows:
        setting = f"lambda {row['coefficient']:g}, target {row['target']:g}"
        limit = target_of(config, setup.network, row["target"]) if counted else None
        for index, seed in enumerate(row["seeds"]):
            if not row["multiply_adds"]["values"][index]:
                _logger.warning(
                    "%s, seed %s: layers have closed whole, and the network is a constant",
                    setting, seed,
                )  # fmt: skip
            elif limit is not None and (cost := row[config.budget]["values"][index]) > limit:
                _logger.warning(
                    "%s, seed %s: the network has %d %s, above its target of %d",
                    setting, seed, cost, config.budget, limit,
                )  # fmt: skip


def _warn_of_missed_targets(config: Any, members: Member, out: Collection[int]) -> None:
    if config.gate != "dam" or not config.budget:
        return
    reached = np.stack([np.asarray(each) for each in members.context["budget"].reached.values()])
    names = member_names(runs_of(config))
    for index, (name, there) in enumerate(zip(names, reached.all(0), strict=True)):
        if not there and index not in out:
            _logger.warning(
                "%s did not reach its target: train longer, or with a larger coefficient", name
            )


def prepare(config: Any, data_dir: str | None) -> Setup:
    """Loads data and model and plans the training, before anything is trained or written."""
    whole = images.load(
        config.data.name, data_dir=data_dir, validation_fraction=0.0, seed=config.data.split_seed
    )
    data = hold_out(whole, config.training.validation_fraction, config.data.split_seed)
    module = make_model(config, data.num_classes)
    stages = stages_of(config, len(data.train.y))
    network = module.network(data.input_shape)
    check_sizes(config, module, network, data, {stage.name: stage.plan for stage in stages})
    return Setup(module, network, data, stages)


def gated_node(network: Network, place: str) -> str:
    """The node whose gate is at a place: a gated layer, or a gate of its own."""
    gates = (place, f"{place}/gate")
    return next(name for name, node in network.nodes.items() if graph.gate(node) in gates)


def save_similarities(
    path: Path, config: Any, setup: Setup, members: Member, out: Collection[int] = ()
) -> None:
    """Writes how alike the channels of one layer are after the last step (Table 7).

    `cka` `(M, C, C)` is the linear CKA between the maps of single channels, `(images, pixels)`
    each, on held-out images; `used` `(M, C)` says which channels are open and count.
    Of networks that are out there is NaN.
    """
    apply = capture(setup.module, [config.similarity])
    probe = jnp.asarray(setup.data.validation.x[: config.probe])

    def measure(member: Member):
        _, features = apply(variables_of(member), probe)
        (maps,) = features.values()
        maps = jnp.moveaxis(maps.reshape(len(probe), -1, maps.shape[-1]), -1, 0)
        open_ = open_channels(config, setup.network, member, setup.stages[-1])
        used = channels.used(setup.network, open_)
        return cka_matrix(list(maps)), used[gated_node(setup.network, config.similarity)]

    cka, used = jax.jit(lambda members: jax.lax.map(measure, members))(members)
    cka = np.array(cka)
    cka[list(out)] = np.nan
    write_npz(path, {"cka": cka, "used": np.asarray(used)})
