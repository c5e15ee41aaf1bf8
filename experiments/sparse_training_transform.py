"""Random sparse network transformation (DLTH): what is going to be pruned is drawn to zero first.

The places that stay are picked at random before anything is trained. Then the network is trained
whole, with a decay that grows of the weights that are going to be pruned, so that the others take
over what they knew; then these are cut, and what is left is trained as any sparse network. In
several cycles more and more places are picked, each time among those that are left. What is
measured of validation and test data in between is of the network as if it were cut then.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.study import asked_densities
from ntt_sparse.data.batches import steps_per_epoch
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.pruning.transform import growing_coefficient, growing_decay, growth_steps
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import TermInputs

METHOD = "dlth"
# Independent of the streams that training folds from a member's key; one for each cycle.
_CYCLE_STREAM = 2000

Fit = Callable[..., Member]
"""Called with `stage`, `members` and `plan`: trains members whole through a stage."""


def plan(config: Any, n: int) -> Plan:
    """The plan of one cycle, for `n` training examples: growth until the ceiling, then a hold.

    Raises:
        ValueError: Batches are larger than the data, or there are too many steps.
    """
    settings = config.transform
    per_epoch = steps_per_epoch(n, settings.batch_size)
    growth = growth_steps(settings.every, settings.increment, settings.ceiling)
    try:
        return Plan(growth + settings.hold, per_epoch, per_epoch, config.checkpoint_seconds)
    except ValueError as error:
        raise ValueError(f"config.transform: {error}") from error


def stage_of(cycle: int) -> str:
    """The name of the stage of a cycle, counted from 1."""
    return f"transform_{cycle}"


def cycle_densities(config: Any, cycle: int) -> dict[float, float]:
    """By the density asked for, that of a cycle: each prunes the same part of what is left."""
    part = cycle / config.transform.cycles
    return {density: density**part if part < 1 else density for density in asked_densities(config)}


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """SGD with momentum, decay of all weights, and more and more of those that go."""
    settings = config.transform
    growth = functools.partial(
        growing_coefficient,
        every=settings.every,
        increment=settings.increment,
        ceiling=settings.ceiling,
        power=settings.power,
    )
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay),
        # After the gradient of the loss and before momentum, as in the published code.
        growing_decay(growth),
        optax.sgd(settings.learning_rate, momentum=settings.momentum),
    )


def whole_network(fn: Callable[[TermInputs], Any]) -> Callable[[TermInputs], Any]:
    """A forward pass, or a term of the loss, that knows of no masks."""

    def unmasked(inputs: TermInputs) -> Any:
        everything = jax.tree.map(jnp.ones_like, inputs.masks)
        return fn(inputs._replace(masks=everything))

    return unmasked


def train(
    config: Any,
    fit: Fit,
    members: Member,
    masks_of: Callable[[dict[float, float]], Any],
    cycle_plan: Plan,
    optimizer: optax.GradientTransformation,
) -> Member:
    """Transforms networks in all cycles. Returns members at the start of sparse training.

    Args:
        config: The settings.
        fit: Trains members.
        members: At their start, not masked.
        masks_of: Masks of all members at densities that stand for those asked for.
        cycle_plan: Of one cycle.
        optimizer: Of sparse training.
    """
    inner = make_optimizer(config)
    begin = jax.jit(jax.vmap(inner.init))
    keys = members.key
    for cycle in range(1, config.transform.cycles + 1):
        masks = masks_of(cycle_densities(config, cycle))
        # The decay begins anew in each cycle, the order of the data is another one.
        members = members._replace(
            masks=masks,
            opt_state=begin(members.params),
            key=jax.vmap(jax.random.fold_in, (0, None))(keys, _CYCLE_STREAM + cycle),
        )
        members = fit(stage=stage_of(cycle), members=members, plan=cycle_plan)

    def cut(member: Member) -> Member:
        params = pruning_masks.apply(member.params, member.masks)
        return member._replace(params=params, opt_state=optimizer.init(params))

    return jax.jit(jax.vmap(cut))(members._replace(key=keys))
