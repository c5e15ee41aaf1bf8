"""One training step, made from named loss terms; chunks of steps as one compiled call.

A loss is a sum of named terms. A term reads a `TermInputs` and returns its
(weighted) contribution to the loss and a dictionary of scalars worth logging. Terms that
look at the same forward pass of the network share it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ntt_sparse._types import Masks, Params, PRNGKey, Scalar
from ntt_sparse.data.batches import batch_indices, epoch_permutation
from ntt_sparse.training.mesh import (
    MemberMode,
    map_members,
    member_sharding,
    replicated,
    spread_examples,
)
from ntt_sparse.training.state import Member, TrainState, num_members

# Independent streams folded from a member's key.
_DATA_STREAM, _NOISE_STREAM, _AUGMENT_STREAM, _FORWARD_STREAM = 0, 1, 2, 3


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

StepFn: TypeAlias = Callable[[Member, Any, Int[Array, ""]], tuple[Member, dict[str, Scalar]]]
"""`(member, batch, step) -> (member, logs)`, pure."""


def make_step(
    terms: Mapping[str, Term],
    optimizer: optax.GradientTransformation,
    *,
    forward: Forward | None = None,
    augment: Augment | None = None,
    after_update: Callable[[Member, Int[Array, ""]], Member] | None = None,
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
        after_update: Called as `after_update(member, step)` after the parameters have
            moved, with `step` counted from 1: mask schedules live here.

    Returns:
        The step. Its logs hold `"loss"`, one entry per term and `"term/name"` for
        what each term logs.

    Raises:
        ValueError: There are no terms, or a name would hide another entry of the logs.
    """
    if not terms:
        raise ValueError("a loss needs at least one term, none were given")
    for name in terms:
        if name in ("loss", "params") or "/" in name:
            raise ValueError(
                f"a term cannot be named {name!r}: 'loss' is the sum of the terms, 'params' their "
                "parameters, and 'term/name' what a term logs"
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
                logs[name], details = term(inputs._replace(key=jax.random.fold_in(key, index)))
                logs |= {f"{name}/{detail}": value for detail, value in details.items()}
            loss = sum(logs[name] for name in terms)
            return loss, ({"loss": loss, **logs}, model_state)

        grads, (logs, model_state) = jax.grad(loss_fn, has_aux=True)(member.params)
        updates, opt_state = optimizer.update(
            grads, member.opt_state, member.params, masks=member.masks
        )
        params = optax.apply_updates(member.params, updates)
        member = member._replace(params=params, opt_state=opt_state, model_state=model_state)
        if after_update is not None:
            member = after_update(member, step + 1)
        return member, logs

    return step_fn


class Program(NamedTuple):
    """The compiled functions of a run.

    Attributes:
        init: `(members, data) -> TrainState` at step 0.
        permutations: `(state, epoch, data) -> (M, n)` data order of every member.
        chunk: `(state, data, permutations, stop) -> state` runs the steps up to `stop`,
            which must lie in the same epoch; the state may be donated. One compilation
            serves every length.
    """

    init: Callable[..., TrainState]
    permutations: Callable[..., Array]
    chunk: Callable[..., TrainState]


def make_program(
    step_fn: StepFn, *, batch_size: int, mesh: Mesh, mode: MemberMode = "vmap"
) -> Program:
    """Compiles a step into chunks over all members.

    The data stays on the devices as a pytree of arrays `(n, ...)`; each step gathers
    its batch there, by a permutation drawn anew every epoch from the member's key.

    Args:
        step_fn: From `make_step`.
        batch_size: Examples per step and member.
        mesh: From `ntt_sparse.training.mesh`.
        mode: How the members of one device ride.
    """

    def gather(data, permutation, step):
        indices = batch_indices(permutation, step, batch_size)
        return spread_examples(jax.tree.map(lambda leaf: leaf[indices], data))

    def one_step(carry, step, data):
        member, sums, bad_step, permutation = carry
        member, logs = step_fn(member, gather(data, permutation, step), step)
        sums = jax.tree.map(jnp.add, sums, logs)
        bad_step = dict(bad_step)
        for name, value in logs.items():
            bad = bad_step[name]
            bad_step[name] = jnp.where((bad < 0) & ~jnp.isfinite(value), step, bad)
        return member, sums, bad_step, permutation

    def end(carry, stop):
        """Without the permutation; the last update of a chunk is in no loss yet."""
        member, sums, bad_step, _ = carry
        leaves = jax.tree.leaves((member.params, member.model_state))
        leaves = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
        bad = bad_step["params"]
        return member, sums, bad_step | {"params": jnp.where((bad < 0) & ~finite, stop - 1, bad)}

    def chunk_one(carry, start, stop, data):
        carry = jax.lax.fori_loop(start, stop, lambda i, c: one_step(c, i, data), carry)
        return end(carry, stop)

    shardings = state_shardings(mesh)
    mapped_chunk = map_members(chunk_one, mesh, num_shared=3, mode=mode)

    def chunk(state, data, permutations, stop):
        carry = (state.members, state.sums, state.bad_step, permutations)
        members, sums, bad_step = mapped_chunk(carry, state.step, stop, data)
        return TrainState(stop, members, sums, state.since + stop - state.step, bad_step)

    dispatched_step = jax.jit(one_step, donate_argnums=0)
    pick = jax.jit(lambda carries, index: jax.tree.map(lambda leaf: leaf[index], carries))

    def join(state, ended, stop):
        members, sums, bad_step = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ended)
        return TrainState(stop, members, sums, state.since + stop - state.step, bad_step)

    join = jax.jit(join, out_shardings=shardings)
    dispatched_end = jax.jit(end)

    def dispatched_chunk(state, data, permutations, stop):
        carries = (state.members, state.sums, state.bad_step, permutations)
        ended = []
        for index in range(num_members(state.members)):
            carry = pick(carries, index)
            for step in range(int(state.step), int(stop)):
                carry = dispatched_step(carry, jnp.int32(step), data)
            ended.append(dispatched_end(carry, stop))
        return join(state, ended, stop)

    def init(members, data):
        def logs_of(member):
            # Shapes and dtypes alone: the batch is never gathered.
            batch = jax.tree.map(lambda leaf: leaf[:batch_size], data)
            return step_fn(member, batch, jnp.zeros((), jnp.int32))[1]

        shapes = jax.eval_shape(jax.vmap(logs_of), members)
        sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        never = jnp.full(num_members(members), -1, jnp.int32)
        bad_step = dict.fromkeys([*shapes, "params"], never)
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(zero, members, sums, zero, bad_step)
        # A copy: chunks donate the state, and the caller keeps the members.
        return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)(state)

    def permutations(state, epoch, data):
        n = jax.tree.leaves(data)[0].shape[0]
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.members.key, _DATA_STREAM)
        return jax.vmap(epoch_permutation, (0, None, None))(keys, epoch, n)

    return Program(
        init=init,
        permutations=jax.jit(permutations, out_shardings=member_sharding(mesh)),
        chunk=dispatched_chunk
        if mode == "dispatch" and mesh.size == 1
        else jax.jit(chunk, donate_argnums=0, out_shardings=shardings),
    )


def state_shardings(mesh: Mesh) -> TrainState:
    """Shardings of a `TrainState`, as a prefix: members over the mesh, counters everywhere."""
    by_member: Any = member_sharding(mesh)
    everywhere: Any = replicated(mesh)
    return TrainState(
        step=everywhere, members=by_member, sums=by_member, since=everywhere, bad_step=by_member
    )
