"""One training step, made from named loss terms.

A loss is a sum of named terms. A term reads a `TermInputs` and returns its
(weighted) contribution to the loss and a dictionary of scalars worth logging. Terms that
look at the same forward pass of the network share it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from ntt_sparse._types import Masks, Params, PRNGKey, Scalar
from ntt_sparse.training.state import Member

# Independent streams folded from a member's key; 0 is the order of the data, in `program`.
_NOISE_STREAM, _AUGMENT_STREAM, _FORWARD_STREAM = 1, 2, 3


class TermInputs(NamedTuple):
    """What a loss term may read of one member at one step.

    Attributes:
        params: Parameters, not masked; the loss is differentiated with respect to them.
        masks: Masks of the structure of `params`.
        context: The member's `context`.
        batch: The minibatch, a pytree of arrays with a leading example axis.
        key: A key for this term at this step.
        step: The step, counted from 0, the same for all members.
        model_state: The member's `model_state`, before this step.
        outputs: What the shared forward pass of this step gave; `None` without one.
    """

    params: Params
    masks: Masks
    context: Any
    batch: Any
    key: PRNGKey
    step: Int[Array, ""] | int = 0
    model_state: Any = ()
    outputs: Any = None


Term: TypeAlias = Callable[[TermInputs], tuple[Scalar, Mapping[str, Scalar]]]
"""A named part of the loss: `(contribution, {name: scalar to log})`."""

Forward: TypeAlias = Callable[[TermInputs], tuple[Any, Any]]
"""The forward pass that terms share: `(outputs, model_state after it)`."""

Augment: TypeAlias = Callable[[PRNGKey, Any], Any]
"""`(key, batch) -> batch` of the same shapes, drawn anew in each step."""

AfterUpdate: TypeAlias = Callable[[Member, Int[Array, ""], Params], Member]
"""`(member, step, gradients) -> member`, see `make_step`."""

StepFn: TypeAlias = Callable[[Member, Any, Int[Array, ""]], tuple[Member, dict[str, Scalar]]]
"""`(member, batch, step) -> (member, logs)`, pure."""


def make_step(
    terms: Mapping[str, Term],
    optimizer: optax.GradientTransformation,
    *,
    forward: Forward | None = None,
    augment: Augment | None = None,
    after_update: AfterUpdate | None = None,
) -> StepFn:
    """Builds the pure step of one member.

    Args:
        terms: The loss, as named terms; their contributions are summed.
        optimizer: Any Optax transformation. It gets the masks as the extra argument
            `masks`, which `ntt_sparse.pruning.transform.keep_masked` reads.
        forward: Computed once in each step, before the terms, which find its outputs in
            their inputs; it is differentiated along with them. The model state that it
            returns is the member's from then on. Without it that state stays.
        augment: Changes each batch before anything else sees it.
        after_update: Called as `after_update(member, step, gradients)` after the parameters
            have moved, with `step` counted from 1 and the gradients of the loss before: mask
            schedules live here. (Gradients are zero where weights are pruned, unless the forward
            pass lets them through, see `ntt_sparse.pruning.masks.straight_through`.)

    Returns:
        The step. Its logs hold `"loss"`, one entry per term and `"term/name"` for
        what each term logs.

    Raises:
        ValueError: There are no terms, or a name would hide another entry of the logs. The step
            raises it where a term gives something else than a scalar and scalars to log.
    """
    if not terms:
        raise ValueError("a loss needs at least one term, none were given")
    for name in terms:
        if name in ("loss", "params", "model_state") or "/" in name:
            raise ValueError(
                f"a term cannot be named {name!r}: 'loss' is the sum of the terms, 'params' and "
                "'model_state' are parts of a member, and 'term/name' is what a term logs"
            )
    optimizer = optax.with_extra_args_support(optimizer)

    def step_fn(member, batch, step):
        def stream(number):
            return jax.random.fold_in(jax.random.fold_in(member.key, number), step)

        key = stream(_NOISE_STREAM)
        if augment is not None:
            batch = augment(stream(_AUGMENT_STREAM), batch)

        def loss_fn(params):
            inputs = TermInputs(
                params, member.masks, member.context, batch, key, step, member.model_state
            )
            model_state = member.model_state
            if forward is not None:
                outputs, model_state = forward(inputs._replace(key=stream(_FORWARD_STREAM)))
                inputs = inputs._replace(outputs=outputs)
            logs = {}
            for index, (name, term) in enumerate(terms.items()):
                found = term(inputs._replace(key=jax.random.fold_in(key, index)))
                logs |= _named(name, found)
            loss = sum(logs[name] for name in terms)
            return loss, ({"loss": loss, **logs}, model_state)

        grads, (logs, model_state) = jax.grad(loss_fn, has_aux=True)(member.params)
        updates, opt_state = optimizer.update(
            grads, member.opt_state, member.params, masks=member.masks
        )
        params = optax.apply_updates(member.params, updates)
        member = member._replace(params=params, opt_state=opt_state, model_state=model_state)
        if after_update is not None:
            member = after_update(member, step + 1, grads)
        return member, logs

    return step_fn


def _named(name: str, found: Any) -> dict[str, Scalar]:
    """What a term gave, by the names that logs have for it."""
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Mapping):
        raise ValueError(
            f"term {name!r} returned {type(found).__name__}, expected "
            "(contribution, {name: scalar to log})"
        )
    contribution, details = found
    named = {name: contribution, **{f"{name}/{key}": value for key, value in details.items()}}
    for key, value in named.items():
        if jnp.shape(value):
            raise ValueError(f"{key!r} of the loss has shape {jnp.shape(value)}, expected a scalar")
    return {key: jnp.asarray(value) for key, value in named.items()}
