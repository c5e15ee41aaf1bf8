"""Devices: a mesh with axes `member` and `data`, and functions mapped over members.

A run is a batch of members (seeds, densities, coefficients) on a leading axis.
Members are spread over the `member` axis and the examples of a batch over the
`data` axis; one device is the mesh of shape (1, 1), not a special case.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MemberMode: TypeAlias = Literal["vmap", "loop", "dispatch"]
"""How the members of one device ride: as a batched axis, one after another inside the program,
or, on a single device, one after another with each step a call of its own."""


def make_mesh(member: int = 1, data: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `member * data` devices.

    Args:
        member: Devices over which members are spread.
        data: Devices over which the examples of each batch are spread.
        devices: Devices to use, the first `member * data` of all by default.

    Returns:
        A mesh with axes `("member", "data")`, both of type `Auto`.

    Raises:
        ValueError: There are fewer devices than asked for.
    """
    devices = jax.devices() if devices is None else list(devices)
    if member < 1 or data < 1 or member * data > len(devices):
        raise ValueError(
            f"a mesh of {member=} x {data=} needs {member * data} devices (at least one), "
            f"{len(devices)} are there"
        )
    return jax.make_mesh(
        (member, data),
        ("member", "data"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[: member * data],
    )


def auto_mesh(num_members: int, batch_size: int, *, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that spreads members first, then batches, without a remainder.

    Raises:
        ValueError: A process would have no device in it.
    """
    devices = jax.devices() if devices is None else list(devices)
    member = math.gcd(num_members, len(devices))
    data = math.gcd(batch_size, len(devices) // member)
    idle = {d.process_index for d in devices} - {d.process_index for d in devices[: member * data]}
    if idle:
        raise ValueError(
            f"{num_members} members and batches of {batch_size} use {member * data} of "
            f"{len(devices)} devices, and none of process {min(idle)}: choose numbers that the "
            "devices divide, or fewer processes"
        )
    return make_mesh(member, data, devices=devices)


def member_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays with a leading member axis."""
    return NamedSharding(mesh, P("member"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def leaf_shardings(tree: Any, mesh: Mesh, *, axis: str = "data") -> Any:
    """Shardings that cut each array over the devices of an axis, for networks of one member.

    Parameters, masks and the state of the optimiser are cut alike. A step of `make_step` under
    `jax.jit(..., out_shardings=)` with these and a batch over the same axis is then what is called
    FSDP: XLA gathers a layer's weights where it needs them and scatters its gradients; a step
    computes what it does on one device. A loop of many members does not use it: `make_program`
    keeps each member whole on the devices of its batches, and joining both is planned.

    Args:
        tree: Pytree of arrays, their shapes or keys.
        mesh: From `make_mesh`.
        axis: Of the mesh.

    Returns:
        A tree of shardings: of each array the longest axis that the devices divide is cut. One
        without such an axis, such as the bias of the classes, is whole on all of them.
    """
    parts = mesh.shape[axis]

    def sharding(leaf: Any) -> NamedSharding:
        divisible = [i for i, size in enumerate(leaf.shape) if size and size % parts == 0]
        if not divisible:
            return replicated(mesh)
        cut = max(divisible, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, P(*[axis if i == cut else None for i in range(cut + 1)]))

    return jax.tree.map(sharding, tree)


def spread_examples(batch: Any) -> Any:
    """Spreads the leading axis of a batch over the `data` axis, inside `map_members`."""
    mesh = jax.sharding.get_abstract_mesh()
    if "data" not in mesh.axis_names or mesh.shape["data"] == 1:
        return batch
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, P("data")))


def map_members(
    fn: Callable[..., Any], mesh: Mesh, *, num_shared: int, mode: MemberMode = "vmap"
) -> Callable[..., Any]:
    """Maps a one-member function over the leading member axis.

    Args:
        fn: `fn(member, *shared) -> result`, all pytrees, no member axis.
        mesh: From `make_mesh`; the number of members must be divisible by its
            `member` axis.
        num_shared: How many shared arguments (the same for every member) there are.
        mode: `"vmap"` runs the members of a device as one batched axis, `"loop"` one
            after another, and so does `"dispatch"`. Batched kernels make convolutions slow
            on CPU.

    Returns:
        `mapped(members, *shared) -> results` with a leading member axis on every leaf
        of `members` and `results`; to be called under `jax.jit`.

    Raises:
        ValueError: `mode` is unknown.
    """
    if mode not in ("vmap", "loop", "dispatch"):
        raise ValueError(f"{mode=} is unknown: expected 'vmap', 'loop' or 'dispatch'")

    def local(members, *shared):
        if mode == "vmap":
            return jax.vmap(fn, in_axes=(0,) + (None,) * num_shared)(members, *shared)
        return jax.lax.map(lambda member: fn(member, *shared), members)

    # Manual over members, automatic over data: each device runs its own members and
    # XLA partitions their batches. Nothing communicates over members, so the
    # replication check, which refuses loops with constant initial carries, is off.
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("member"),) + (P(),) * num_shared,
        out_specs=P("member"),
        axis_names={"member"},
        check_vma=False,
    )


def default_member_mode(params: Any) -> MemberMode:
    """Step by step for convolutions on CPU, else batched.

    XLA's CPU compiler makes convolutions with batched kernels slow, and derivatives of
    convolutions inside loops (jax-ml/jax#12868): a step of LeNet-5-Caffe takes eleven times
    as long there.

    Args:
        params: Parameters of one member, or their shapes; a leaf with more than two
            dimensions counts as a convolution kernel.
    """
    convolutional = any(len(leaf.shape) > 2 for leaf in jax.tree.leaves(params))
    return "dispatch" if convolutional and jax.default_backend() == "cpu" else "vmap"
