"""Many steps of many members as compiled calls."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from ntt_sparse.data.batches import batch_indices, epoch_permutation
from ntt_sparse.training.divergence import WHOLE
from ntt_sparse.training.memory import compiled_bytes, local_bytes, with_sharding
from ntt_sparse.training.mesh import (
    MemberMode,
    map_members,
    member_sharding,
    replicated,
    spread_examples,
)
from ntt_sparse.training.processes import place
from ntt_sparse.training.state import Member, TrainState, num_members
from ntt_sparse.training.step import StepFn

# Folded from a member's key; other streams are those of `step`.
_DATA_STREAM = 0


class Program(NamedTuple):
    """The compiled functions of a run.

    Attributes:
        init: `(members, data, step=0) -> TrainState` at a step.
        shapes: `(members, data) -> TrainState` of the shapes and shardings that `init` returns,
            of arrays or of their shapes.
        permutations: `(state, epoch, data) -> (M, n)` data order of every member.
        chunk: `(state, data, permutations, stop) -> state` runs the steps up to `stop`,
            which must lie in the same epoch; the state may be donated. One compilation
            serves every length.
        working_bytes: `(state, data, permutations) -> bytes` that a chunk takes on each device
            beside these, of arrays or of their shapes. It compiles what `chunk` then runs.
        batch_size: Examples per step and member.
        mesh: Where it runs.
        freeze: Whether members that stop being finite stay as they were before.
    """

    init: Callable[..., TrainState]
    shapes: Callable[..., TrainState]
    permutations: Callable[..., Array]
    chunk: Callable[..., TrainState]
    working_bytes: Callable[..., int]
    batch_size: int
    mesh: Mesh
    freeze: bool = False


class _Carry(NamedTuple):
    """What steps hand on, of one member or with a leading member axis."""

    member: Member
    sums: Any
    bad_step: Any
    permutation: Array


def gather(member: Member, data: Any, indices: Array) -> Any:
    """The batch of these examples, `indices` of the leading axis of every array of `data`."""
    del member
    return jax.tree.map(lambda leaf: leaf[indices], data)


def make_program(
    step_fn: StepFn,
    *,
    batch_size: int,
    mesh: Mesh,
    mode: MemberMode = "vmap",
    pick: Callable[[Member, Any, Array], Any] = gather,
    active: Callable[[Member], Any] | None = None,
    freeze: bool = False,
) -> Program:
    """Compiles a step into chunks over all members.

    The data stays on the devices as a pytree of arrays `(n, ...)`; each step gathers
    its batch there, by a permutation drawn anew every epoch from the member's key.

    Args:
        step_fn: From `make_step`.
        batch_size: Examples per step and member.
        mesh: From `ntt_sparse.training.mesh`.
        mode: How the members of one device ride.
        pick: `(member, data, indices) -> batch`, where members have data of their own.
        active: `member -> bool`, asked at the start of each chunk: whether it takes part. Others
            stay as they are. Where members ride one after another nothing is computed for them;
            on a batched axis it is, and thrown away.
        freeze: A member stays as it was before the first step after which its parameters, its
            model state or what the step logs is not finite, and takes no further part; `fit` goes
            on with the others. (The state of the optimiser is not looked at.) By default `fit`
            raises, for which steps need not look at the parameters.

    Returns:
        The program. Its `init` and `shapes` raise ValueError where arrays of the data do not hold
        as many examples as each other (unless `pick` is yours).
    """
    shardings = state_shardings(mesh)
    advance = _advance(step_fn, batch_size, pick, freeze)
    chunks = _dispatched if mode == "dispatch" and mesh.size == 1 else _compiled

    def logs_of(member, data):
        # Shapes and dtypes alone: the batch is never gathered.
        batch = pick(member, data, jnp.zeros(batch_size, jnp.int32))
        return step_fn(member, batch, jnp.zeros((), jnp.int32))[1]

    @functools.partial(jax.jit, out_shardings=shardings)
    def start(members, data, step):
        if pick is gather:
            _check_lengths(data)
        # A copy: chunks donate the state, and the caller keeps the members.
        members = jax.tree.map(jnp.copy, members)
        logs = jax.eval_shape(jax.vmap(logs_of, (0, None)), members, data)
        sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _sum_dtype(leaf.dtype)), logs)
        never = jnp.full(num_members(members), -1, jnp.int32)
        bad_step = dict.fromkeys([*logs, *WHOLE], never)
        return TrainState(step, members, sums, jnp.zeros_like(never), bad_step)

    def init(members, data, step=0):
        placed = place(members, member_sharding(mesh))
        return start(placed, data, jnp.int32(step))

    def shapes(members, data):
        state = start.eval_shape(members, data, jnp.int32(0))
        return jax.tree.map(with_sharding, state_shardings(mesh), state)

    def permutations(state, epoch, data):
        n = jax.tree.leaves(data)[0].shape[0]
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.members.key, _DATA_STREAM)
        return jax.vmap(epoch_permutation, (0, None, None))(keys, epoch, n)

    chunk, working_bytes = chunks(advance, mesh, mode, active, freeze)
    return Program(
        init=init,
        shapes=shapes,
        permutations=jax.jit(permutations, out_shardings=member_sharding(mesh)),
        chunk=chunk,
        working_bytes=working_bytes,
        batch_size=batch_size,
        mesh=mesh,
        freeze=freeze,
    )


def _advance(
    step_fn: StepFn, batch_size: int, pick: Callable[..., Any], freeze: bool
) -> Callable[[_Carry, Array, Any], _Carry]:
    """One step of one member: `(carry, step, data) -> carry`."""

    def advance(carry, step, data):
        indices = batch_indices(carry.permutation, step, batch_size)
        batch = spread_examples(pick(carry.member, data, indices))
        member, logs = step_fn(carry.member, batch, step)
        bad_step = dict(carry.bad_step)
        for name, value in logs.items():
            bad = bad_step[name]
            bad_step[name] = jnp.where((bad < 0) & ~jnp.isfinite(value), step, bad)
        sums = jax.tree.map(lambda sum_, value: sum_ + value.astype(sum_.dtype), carry.sums, logs)
        if freeze:
            # In the step, as where chunks end depends on the clock.
            was_fine, bad_step = _all_fine(carry.bad_step), _mark(bad_step, member, step)
            bad_step = {
                name: jnp.where(was_fine, steps, carry.bad_step[name])
                for name, steps in bad_step.items()
            }
            fine = _all_fine(bad_step)
            member, sums = jax.tree.map(
                lambda new, old: new if new is old else jnp.where(fine, new, old),
                (member, sums),
                (carry.member, carry.sums),
            )
        return _Carry(member, sums, bad_step, carry.permutation)

    return advance


def _sum_dtype(dtype: Any) -> Any:
    """In which logs are summed: in half precision a sum of many stops growing."""
    return dtype if jnp.issubdtype(dtype, jnp.integer) else jnp.promote_types(dtype, jnp.float32)


def _check_lengths(data: Any) -> None:
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(lengths) != 1 or lengths == {()}:
        shapes = ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(data))
        raise ValueError(
            f"data holds arrays of shapes {shapes or 'none'}, expected the same number of examples "
            "in each, as the first axis"
        )


def _all_fine(bad_step: Any) -> Array:
    """Whether a member has been finite so far; of all members with a leading axis."""
    return jnp.all(jnp.stack([steps < 0 for steps in bad_step.values()]), axis=0)


def _mark(bad_step: Any, member: Member, step: Any) -> dict[str, Any]:
    """The bad steps, where the parts of a member that are not finite are so since this one."""
    bad_step = dict(bad_step)
    for name in WHOLE:
        leaves = jax.tree.leaves(getattr(member, name))
        leaves = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]
        bad = ~jnp.all(jnp.stack(finite)) if finite else False
        bad_step[name] = jnp.where((bad_step[name] < 0) & bad, step, bad_step[name])
    return bad_step


def _finish(carry: _Carry, stop: Array) -> tuple[Member, Any, Any]:
    """Without the permutation; the last update of a chunk is in no loss yet."""
    bad_step = _mark(carry.bad_step, carry.member, stop - 1)
    return carry.member, carry.sums, bad_step


def _carries(state: TrainState, permutations: Array) -> _Carry:
    return _Carry(state.members, state.sums, state.bad_step, permutations)


def _ended(
    state: TrainState,
    finished: tuple[Member, Any, Any],
    stop: Array,
    active: Callable[[Member], Any] | None,
    freeze: bool,
) -> TrainState:
    members, sums, bad_step = finished
    steps = stop - state.step
    if active is not None:
        steps = jnp.where(jax.vmap(active)(state.members), steps, 0)
    if freeze:
        steps = jnp.where(_all_fine(bad_step), steps, 0)
    return TrainState(stop, members, sums, state.since + steps, bad_step)


def _trains(active: Callable[[Member], Any] | None, freeze: bool) -> Callable[[_Carry], Any] | None:
    """Whether a member takes part in a chunk; `None` where all do."""
    if not freeze:
        return None if active is None else lambda carry: active(carry.member)

    def trains(carry):
        fine = _all_fine(carry.bad_step)
        return fine if active is None else fine & active(carry.member)

    return trains


def _compiled(
    advance: Callable[..., _Carry],
    mesh: Mesh,
    mode: MemberMode,
    active: Callable[[Member], Any] | None,
    freeze: bool,
) -> tuple[Callable[..., TrainState], Callable[..., int]]:
    """All steps of a chunk in one program; the chunk and its `working_bytes`."""

    def chunk_one(carry, start, stop, data):
        def steps(carry):
            return jax.lax.fori_loop(start, stop, lambda i, c: advance(c, i, data), carry)

        # On a batched axis there is nothing to save: the steps themselves leave frozen ones alone.
        trains = _trains(active, freeze and mode != "vmap")
        if trains is None:
            carry = steps(carry)
        else:
            carry = jax.lax.cond(trains(carry), steps, lambda carry: carry, carry)
        return _finish(carry, stop)

    mapped = map_members(chunk_one, mesh, num_shared=3, mode=mode)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=state_shardings(mesh))
    def chunk(state, data, permutations, stop):
        finished = mapped(_carries(state, permutations), state.step, stop, data)
        return _ended(state, finished, stop, active, freeze)

    def working_bytes(state, data, permutations):
        return compiled_bytes(chunk, state, data, permutations, np.int32(1))

    return chunk, working_bytes


def _dispatched(
    advance: Callable[..., _Carry],
    mesh: Mesh,
    mode: MemberMode,
    active: Callable[[Member], Any] | None,
    freeze: bool,
) -> tuple[Callable[..., TrainState], Callable[..., int]]:
    """Each step of each member as a call of its own, see `MemberMode`; as `_compiled`."""
    del mode
    trains = _trains(active, freeze)
    everywhere = replicated(mesh)
    pick = jax.jit(
        lambda carries, index: jax.tree.map(lambda leaf: leaf[index], carries),
        out_shardings=everywhere,
    )
    one_step = jax.jit(advance, donate_argnums=0, out_shardings=everywhere)
    finish = jax.jit(_finish)

    def join(state, finished, stop):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *finished)
        return _ended(state, stacked, stop, active, freeze)

    joined = jax.jit(join, out_shardings=state_shardings(mesh))

    def chunk(state, data, permutations, stop):
        carries, finished = _carries(state, permutations), []
        for index in range(num_members(state.members)):
            carry = pick(carries, index)
            takes_part = trains is None or bool(trains(carry))
            for step in range(int(state.step), int(stop) if takes_part else 0):
                carry = one_step(carry, jnp.int32(step), data)
            finished.append(finish(carry, stop))
        return joined(state, finished, stop)

    def working_bytes(state, data, permutations):
        carries = jax.eval_shape(_carries, state, permutations)
        carry = with_sharding(everywhere, pick.eval_shape(carries, 0))
        # What members end with, one by one and joined, beside one on its way.
        copies = 2 * local_bytes(state) + local_bytes(carry)
        return copies + compiled_bytes(one_step, carry, jnp.int32(0), data)

    return chunk, working_bytes


def state_shardings(mesh: Mesh) -> TrainState:
    """Shardings of a `TrainState`, as a prefix: members over the mesh, counters everywhere."""
    by_member: Any = member_sharding(mesh)
    everywhere: Any = replicated(mesh)
    return TrainState(
        step=everywhere, members=by_member, sums=by_member, since=by_member, bad_step=by_member
    )
