"""The structured pruning study: prepare, train all networks as one program, measure, report."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments import dam_pruning_report
from experiments.cli import claim_workdir, user_errors
from experiments.dam_pruning_checks import check_config, check_sizes
from experiments.dam_pruning_members import (
    make_kind,
    make_model,
    make_optimizer,
    member_names,
    runs_of,
    start_members,
)
from experiments.study import augment_images, fit_stage, hold_out, make_plan, save_networks
from ntt_sparse.data import images
from ntt_sparse.gates import budget as budgets
from ntt_sparse.gates import channels, layer
from ntt_sparse.gates.channels import Network
from ntt_sparse.gates.dam import Dam
from ntt_sparse.similarity.cka import cka_matrix
from ntt_sparse.similarity.features import capture
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import terms
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import Term, TermInputs, make_step

_logger = logging.getLogger(__name__)


class Setup(NamedTuple):
    """Everything that is known before training starts."""

    module: Any
    network: Network
    data: images.ImageData
    plan: Plan


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
        _warn_of_missed_targets(config, members)
        save_networks(claimed / "networks", member_names(runs_of(config)), members)
        if config.similarity:
            save_similarities(claimed / "similarities.npz", config, setup, members)
        return dam_pruning_report.write(config, claimed, channels.whole(setup.network))


def _warn_of_missed_targets(config: Any, members: Member) -> None:
    if not config.budget:
        return
    reached = np.stack([np.asarray(each) for each in members.context["budget"].reached.values()])
    for name, there in zip(member_names(runs_of(config)), reached.all(0), strict=True):
        if not there:
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
    plan = make_plan(config.training, len(data.train.y), config.checkpoint_seconds)
    network = channels.check(module.network(data.input_shape))
    check_sizes(config, network, data, plan)
    return Setup(module, network, data, plan)


def train(config: Any, setup: Setup, workdir: Path) -> Member:
    """Trains every network in one program. Returns its members."""
    runs, data, plan = runs_of(config), setup.data, setup.plan
    members = start_members(config, setup.module, data.input_shape, runs, plan)
    step_fn = make_step(
        training_terms(config),
        make_optimizer(config, plan),
        forward=terms.masked_forward(terms.without_features(setup.module)),
        augment=augment_images if config.data.augment else None,
        after_update=hold_budget(config, setup.network),
    )
    mode = meshes.default_member_mode(jax.tree.map(lambda leaf: leaf[0], members.params))
    count = config.evaluated or None
    held_out, test = (
        tuple(leaf[:count] for leaf in split) for split in (data.validation, data.test)
    )
    return fit_stage(
        config, workdir, "training", member_names(runs), members, step_fn, plan,
        tuple(data.train), evaluation(config, setup), (held_out, test), mode,
        batch_size=config.training.batch_size,
    )  # fmt: skip


def training_terms(config: Any) -> Mapping[str, Term]:
    """The task loss, and the member's penalty (Eq. 4)."""
    kind = make_kind(config)

    def gate(inputs: TermInputs):
        value = kind.penalty(list(layer.find(inputs.params).values()))
        return inputs.context["coefficient"] * value, {"penalty": value}

    return {"task": terms.task(), "gate": gate}


def costs(config: Any, network: Network) -> Callable[..., Any]:
    """What the budget of a study counts."""
    return {
        "channels": budgets.channels,
        "parameters": channels.parameters(network),
        "multiply_adds": channels.multiply_adds(network),
    }[config.budget]


def hold_budget(config: Any, network: Network) -> Callable[..., Member] | None:
    """What stops the offsets of a member when its target is reached, after each step."""
    if not config.budget:
        return None
    kind, sizes = cast(Dam, make_kind(config)), channels.sizes(network)

    def hold(member: Member, step: Any) -> Member:
        del step
        context, gates = member.context, layer.find(member.params)
        moved = {path: gate["beta"] for path, gate in gates.items()}
        if config.budget == "layers":
            budget = budgets.hold_layers(
                context["budget"], moved, sizes, context["target"], kind=kind
            )
        else:
            ranks = {path: _ranks(member, path) for path in sizes} if any(config.orders) else None
            budget = budgets.hold(
                context["budget"], moved, sizes, context["target"],
                cost=costs(config, network), kind=kind, ranks=ranks,
            )  # fmt: skip
        params = layer.replace(
            member.params, {path: {"beta": beta} for path, beta in budget.offsets.items()}
        )
        return member._replace(params=params, context={**context, "budget": budget})

    return hold


def _ranks(member: Member, path: str) -> Any:
    node = member.model_state[layer.ORDER]
    for part in path.split("/"):
        node = node[part]
    return node["ranks"]


def open_channels(config: Any, network: Network, member: Member) -> dict[str, jax.Array]:
    """Which channels of each gate are open."""
    kind, gates = make_kind(config), layer.find(member.params)
    return {
        path: kind.values(
            gates[path], n, ranks=_ranks(member, path) if any(config.orders) else None
        )
        > 0
        for path, n in channels.sizes(network).items()
    }


def evaluation(config: Any, setup: Setup) -> Callable[..., dict[str, Any]]:
    """Accuracy on held-out and test data, and the size of the network, for one member.

    Test numbers are measured for the report; nothing is chosen by them.
    """

    def evaluate(member: Member, validation: Any, test: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, data in (("validation", validation), ("test", test)):
            values = terms.evaluate_supervised(
                lambda params, x: setup.module.apply({"params": params, **member.model_state}, x),
                member.params,
                member.masks,
                data,
            )
            result |= {f"{name}/{key}": value for key, value in values.items()}
        open_ = open_channels(config, setup.network, member)
        result |= channels.count(setup.network, open_)._asdict()
        if config.budget:
            reached = jnp.stack(list(member.context["budget"].reached.values()))
            result["reached"] = jnp.all(reached).astype(jnp.int32)
        result["widths"] = jnp.stack([jnp.sum(mask, dtype=jnp.int32) for mask in open_.values()])
        return result

    return evaluate


def save_similarities(path: Path, config: Any, setup: Setup, members: Member) -> None:
    """Writes how alike the channels of one layer are after the last step (Table 7).

    `cka` `(M, C, C)` is the linear CKA between the maps of single channels, `(images, pixels)`
    each, on held-out images; `used` `(M, C)` says which channels are open and count.
    """
    apply = capture(setup.module, [config.similarity])
    probe = jnp.asarray(setup.data.validation.x[: config.probe])

    def measure(member: Member):
        variables = {"params": member.params, **member.model_state}
        _, features = apply(variables, probe)
        (maps,) = features.values()
        maps = jnp.moveaxis(maps.reshape(len(probe), -1, maps.shape[-1]), -1, 0)
        used = channels.used(setup.network, open_channels(config, setup.network, member))
        return cka_matrix(list(maps)), used[config.similarity]

    cka, used = jax.jit(lambda members: jax.lax.map(measure, members))(members)
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, cka=np.asarray(cka), used=np.asarray(used))
