"""What a training run carries: everything a step changes, and what it only reads."""

from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Float, Int

from ntt_sparse._types import Masks, Params, PRNGKey


class Member(NamedTuple):
    """One network of a run; in a `TrainState` every leaf has a leading member axis.

    Attributes:
        params: Parameters that the optimiser moves (not yet masked).
        masks: Masks of the structure of `params`.
        opt_state: State of the optimiser.
        key: Key of the member; data order and noise are folded from it, it never changes.
        context: Whatever else the loss terms read: a teacher, coefficients, counts of weights
            to keep. Nothing but the `after_update` of a step changes it.
        model_state: What the network itself carries from step to step besides parameters,
            such as `{"batch_stats": ...}`; the forward pass of a step returns it anew.
    """

    params: Params
    masks: Masks
    opt_state: Any
    key: PRNGKey
    context: Any
    model_state: Any = ()


class TrainState(NamedTuple):
    """A run between two steps: all that a checkpoint has to hold.

    Attributes:
        step: Optimiser steps done, shared by all members.
        members: A `Member` with a leading member axis M on every leaf.
        sums: Sums of the logged scalars since the last record, `(M,)` each.
        since: Steps in `sums`, `(M,)`; fewer of members that have stopped.
        bad_step: For each logged scalar, and for `"params"` and `"model_state"` as a whole,
            the first step at which it was not finite, `(M,)` each, -1 while it has been.
    """

    step: Int[Array, ""]
    members: Member
    sums: dict[str, Float[Array, " m"]]
    since: Int[Array, " m"]
    bad_step: dict[str, Int[Array, " m"]]


def create_member(
    params: Params,
    masks: Masks,
    optimizer: optax.GradientTransformation,
    key: PRNGKey,
    context: Any = (),
    model_state: Any = (),
) -> Member:
    """A member at its start; `jax.vmap` it for a leading member axis."""
    return Member(params, masks, optimizer.init(params), key, context, model_state)


def num_members(members: Member) -> int:
    """The size of the leading member axis."""
    return jax.tree.leaves(members.key)[0].shape[0]
