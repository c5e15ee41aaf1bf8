"""The stages of structured pruning: how a network is trained, cut and trained on.

DAM, L1 and hard-concrete gates close channels as they train, in one stage. Network Slimming trains
scales, cuts the channels of the smallest and trains what is left, and so do L1 gates that have a
budget; ChipNet trains a network, then its gates under a budget, cuts those that are lowest and
trains what is left. A stage is there if it has epochs.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from experiments import diverged
from experiments.dam_pruning_members import (
    CUT,
    is_fraction,
    make_kind,
    make_optimizer,
    member_names,
    runs_of,
    start_members,
)
from experiments.sparse_training_stages import all_patterns, stage_patterns
from experiments.stage import fit_stage
from experiments.study import augment_images, make_plan, member_mode
from ntt_sparse.data import images
from ntt_sparse.gates import budget as budgets
from ntt_sparse.gates import channels, chipnet, hard_concrete, layer, slimming
from ntt_sparse.gates import cut as cuts
from ntt_sparse.gates.dam import Dam
from ntt_sparse.gates.network import Network
from ntt_sparse.objectives.cka_sr import cka_sr, every_nth_batch
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.similarity.features import capture, select
from ntt_sparse.training import terms
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.state import Member, create_member
from ntt_sparse.training.step import AfterUpdate, Term, TermInputs, make_step

MAIN = "training"
"""The stage in which gates or scales are trained."""
_STAGES = ("pretrain", MAIN, "finetune")


class Stage(NamedTuple):
    """One stage of a study."""

    name: str
    settings: Any
    plan: Plan


class Setup(NamedTuple):
    """Everything that is known before training starts."""

    module: Any
    network: Network
    data: images.ImageData
    stages: tuple[Stage, ...]


def stages_of(config: Any, n: int) -> tuple[Stage, ...]:
    """The stages that have epochs, in order, for `n` training examples."""
    return tuple(
        Stage(name, config[name], make_plan(config[name], n, config.checkpoint_seconds))
        for name in _STAGES
        if config[name].epochs
    )


def train(config: Any, setup: Setup, workdir: Path) -> Member:
    """Trains every network in one program, stage after stage. Returns its members."""
    data, runs = setup.data, runs_of(config)
    first = setup.stages[0]
    members = start_members(
        config, setup.module, data.input_shape, runs, first.settings, first.plan
    )
    mode = member_mode(members)
    count = config.evaluated or None
    held_out, test = (
        tuple(leaf[:count] for leaf in split) for split in (data.validation, data.test)
    )
    for index, stage in enumerate(setup.stages):
        members = enter(config, setup, index, members)
        apply = terms.without_features(setup.module)
        if compares_layers(config, setup, stage):
            examples = config.cka_sr.samples or None
            apply = capture(setup.module, all_patterns(config.cka_sr), examples=examples)
        step_fn = make_step(
            stage_terms(config, setup, stage),
            make_optimizer(config, stage.settings, stage.plan),
            forward=terms.masked_forward(apply),
            augment=augment_images if config.data.augment else None,
            after_update=after_update(config, setup, stage),
        )
        members = fit_stage(
            config, workdir, stage.name, member_names(runs), members, step_fn, stage.plan,
            tuple(data.train), evaluation(config, setup, stage), (held_out, test), mode,
            batch_size=stage.settings.batch_size, freeze=True,
        )  # fmt: skip
        # An error where this stage and those before have left none.
        gone(config, setup.stages[: index + 1], workdir)
    return members


def gone(config: Any, stages: Sequence[Stage], workdir: Path) -> diverged.Gone:
    """Networks that diverged in any of the stages."""
    names, found = member_names(runs_of(config)), {}
    for stage in stages:
        found = diverged.gone(workdir, stage.name, names, found)
    return found


def enter(config: Any, setup: Setup, index: int, members: Member) -> Member:
    """Members at the start of a stage: cut where the one before asks for it, else as they were.

    The optimiser begins anew, and so does the order of the data.
    """
    stage, before = setup.stages[index], setup.stages[index - 1] if index else None
    network = setup.network

    def one(member: Member) -> Member:
        params, masks, state = member.params, member.masks, member.model_state
        if before is not None and before.name == MAIN:
            masks, state = cut(config, network, member, before)
        elif config.gate == "chipnet" and stage.name == MAIN:
            beta, gamma = (jnp.asarray(value, float) for value in chipnet.START)
            state = {**state, **layer.state(network, beta=beta, gamma=gamma)}
        if not index:
            return member._replace(model_state=state)
        key = jax.random.fold_in(member.key, index)
        optimizer = make_optimizer(config, stage.settings, stage.plan, key=key)
        return create_member(params, masks, optimizer, key, member.context, state)

    return jax.jit(jax.vmap(one))(members)


def compares_layers(config: Any, setup: Setup, stage: Stage) -> bool:
    """Whether similarity of layers is penalised: in the stage that trains initial weights."""
    return any(config.cka_sr.coefficients) and stage == setup.stages[0]


def stage_terms(config: Any, setup: Setup, stage: Stage) -> Mapping[str, Term]:
    """The task loss and, where it is so, the member's penalty of similarity and of gates."""
    found: dict[str, Term] = {"task": terms.task()}
    if compares_layers(config, setup, stage):
        found["similarity"] = _similarity(config.cka_sr)
    if stage.name == MAIN:
        found["gate"] = _gate_term(config, setup, stage)
    return found


def _similarity(settings: Any) -> Term:
    def total(features):
        stages = select(features, stage_patterns(settings))
        return cka_sr(stages, samples=settings.samples or None)

    def similarity(inputs: TermInputs):
        features, step = inputs.outputs.features, jnp.asarray(inputs.step)
        value = every_nth_batch(total, features, step, settings.every)
        weight = inputs.context["cka_sr"]
        # Whatever it is, it is no part of the loss of those that have none.
        return jnp.where(weight > 0, weight * value, 0), {}

    return similarity


def _gate_term(config: Any, setup: Setup, stage: Stage) -> Term:
    kind, network = make_kind(config), setup.network
    schedule = _schedule(config, stage)

    def gate(inputs: TermInputs):
        params = list(layer.parameters(kind, inputs.params, network).values())
        value = kind.penalty(params)
        return inputs.context["coefficient"] * value, {"penalty": value}

    def expected(inputs: TermInputs):
        chances = {
            path: hard_concrete.probability(gate["log_alpha"])
            for path, gate in layer.parameters(kind, inputs.params, network).items()
        }
        value = channels.soft_fractions(network, chances)["parameters"]
        return inputs.context["coefficient"] * value, {"penalty": value}

    def crisp(inputs: TermInputs):
        variables = {"params": inputs.params, **inputs.model_state}
        values = layer.values(kind, variables, network)
        steep = _steepness(inputs.step, schedule)
        params = list(layer.parameters(kind, inputs.params, network).values())
        crispness = cast(Any, kind).penalty(params, **steep)
        missed = chipnet.budget_loss(
            values,
            lambda soft: channels.soft_fractions(network, soft)[config.budget],
            inputs.context["target"],
            chipnet.budget_steepness(inputs.step * schedule.numerator / schedule.denominator),
        )
        total = config.chipnet.budget * missed + config.chipnet.crispness * crispness
        logs = {"crispness": crispness, "budget": missed}
        return inputs.context["coefficient"] * total, logs

    return {"chipnet": crisp, "hard_concrete": expected}.get(config.gate, gate)


def _schedule(config: Any, stage: Stage) -> Fraction:
    """Epochs of ChipNet's schedules in one step: a short stage may run through more of them."""
    if not config.chipnet.continuation_epochs:
        return Fraction(1, stage.plan.steps_per_epoch)
    return Fraction(config.chipnet.continuation_epochs, stage.plan.total_steps)


def _steepness(step: Any, schedule: Fraction) -> dict[str, Any]:
    epoch = jnp.asarray(step) * schedule.numerator // schedule.denominator
    beta, gamma = chipnet.continuation(epoch)
    return {"beta": beta, "gamma": gamma}


def after_update(config: Any, setup: Setup, stage: Stage) -> AfterUpdate | None:
    """What happens to a member after each step of a stage."""
    if stage.name != MAIN:
        return None
    if config.gate == "chipnet":

        def sharpen(member: Member, step: Any, gradients: Any) -> Member:
            del gradients
            steep = layer.state(setup.network, **_steepness(step, _schedule(config, stage)))
            return member._replace(model_state={**member.model_state, **steep})

        return sharpen
    if config.gate == "hard_concrete":

        def clip(member: Member, step: Any, gradients: Any) -> Member:
            del step, gradients
            held = {
                path: {"log_alpha": hard_concrete.clip(gate["log_alpha"])}
                for path, gate in layer.find(member.params).items()
            }
            return member._replace(params=layer.replace(member.params, held))

        return clip
    return hold_budget(config, setup.network) if config.gate == "dam" else None


def costs(config: Any, network: Network) -> Callable[..., Any]:
    """What the budget of a study counts."""
    return {
        "channels": budgets.channels,
        "parameters": channels.parameters(network),
        "multiply_adds": channels.multiply_adds(network),
    }[config.budget]


def hold_budget(config: Any, network: Network) -> AfterUpdate | None:
    """What stops the offsets of a member when its target is reached, after each step."""
    if not config.budget:
        return None
    kind, sizes = cast(Dam, make_kind(config)), channels.sizes(network)

    def hold(member: Member, step: Any, gradients: Any) -> Member:
        del step, gradients
        context, gates = member.context, layer.find(member.params)
        moved = {path: gate["beta"] for path, gate in gates.items()}
        if config.budget == "layers":
            budget = budgets.hold_layers(
                context["budget"], moved, sizes, context["target"], kind=kind
            )
        else:
            ranks = _ranks(member, sizes) if any(config.orders) else None
            budget = budgets.hold(
                context["budget"], moved, sizes, context["target"],
                cost=costs(config, network), kind=kind, ranks=ranks,
            )  # fmt: skip
        params = layer.replace(
            member.params, {path: {"beta": beta} for path, beta in budget.offsets.items()}
        )
        return member._replace(params=params, context={**context, "budget": budget})

    return hold


def _ranks(member: Member, paths: Any) -> dict[str, Any]:
    found = {}
    for path in paths:
        node = member.model_state[layer.STATE]
        for part in path.split("/"):
            node = node[part]
        found[path] = node["ranks"]
    return found


def open_channels(
    config: Any, network: Network, member: Member, stage: Stage
) -> dict[str, jax.Array]:
    """Which channels of each gate are open, or would be if the network were cut now."""
    kind = make_kind(config)
    variables = variables_of(member)
    values = layer.values(kind, variables, network)
    cutting = stage.name == MAIN and config.gate in CUT and config.budget
    if not cutting:
        return {path: value != 0 for path, value in values.items()}
    target = member.context["target"]
    if config.gate == "chipnet":
        return chipnet.cut(
            values, target, lambda crisp: channels.soft_fractions(network, crisp)[config.budget]
        )
    scales = {
        path: jnp.abs(gate["scale"]) if config.gate == "slimming" else values[path]
        for path, gate in layer.parameters(kind, member.params, network).items()
    }
    if is_fraction(config):
        return slimming.keep(scales, 1 - target, at_least=config.slimming.keep)
    kept = cuts.within(scales, target, costs(config, network), at_least=config.slimming.keep)
    # What has closed before is not opened again.
    return {path: mask & (values[path] != 0) for path, mask in kept.items()}


def variables_of(member: Member) -> dict[str, Any]:
    """The variables of a member's network, masked."""
    return {"params": pruning_masks.apply(member.params, member.masks), **member.model_state}


def cut(config: Any, network: Network, member: Member, stage: Stage) -> tuple[Any, Any]:
    """Masks and model state of a member as if it were cut now, where its kind is cut."""
    if stage.name != MAIN or config.gate not in CUT or not config.budget:
        return member.masks, member.model_state
    open_ = open_channels(config, network, member, stage)
    if config.gate == "chipnet":
        return member.masks, {**member.model_state, **layer.state(network, open=open_)}
    masks = layer.masks(make_kind(config), member.params, network, open_)
    return masks, member.model_state


def evaluation(config: Any, setup: Setup, stage: Stage) -> Callable[..., dict[str, Any]]:
    """Accuracy on held-out and test data, and the size of the network, for one member.

    Where gates are cut after training, the network is measured as if it were cut at the record.
    Test numbers are measured for the report; nothing is chosen by them.
    """

    def evaluate(member: Member, validation: Any, test: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        masks, state = cut(config, setup.network, member, stage)
        for name, data in (("validation", validation), ("test", test)):
            values = terms.evaluate_supervised(
                lambda params, x: setup.module.apply({"params": params, **state}, x),
                member.params,
                masks,
                data,
            )
            result |= {f"{name}/{key}": value for key, value in values.items()}
        open_ = open_channels(config, setup.network, member, stage)
        result |= channels.count(setup.network, open_)._asdict()
        if config.gate == "dam" and config.budget:
            reached = jnp.stack(list(member.context["budget"].reached.values()))
            result["reached"] = jnp.all(reached).astype(jnp.int32)
        result["widths"] = jnp.stack([jnp.sum(mask, dtype=jnp.int32) for mask in open_.values()])
        return result

    return evaluate
