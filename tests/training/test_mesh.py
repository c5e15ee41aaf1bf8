"""Meshes are divided without a remainder, and asked for in vain in one line."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from ntt_sparse.training import mesh as meshes


@pytest.mark.parametrize(
    ("members", "batch_size", "shape"),
    [(1, 64, (1, 8)), (8, 64, (8, 1)), (16, 5, (8, 1)), (6, 64, (2, 4)), (3, 3, (1, 1))],
)
def test_auto_mesh_spreads_members_then_batches(members, batch_size, shape):
    mesh = meshes.auto_mesh(members, batch_size)
    assert (mesh.shape["member"], mesh.shape["data"]) == shape
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


@pytest.mark.parametrize("shape", [(9, 1), (3, 3), (0, 1)])
def test_more_devices_than_there_are_raises(shape):
    with pytest.raises(ValueError, match="8 are there"):
        meshes.make_mesh(*shape)


def test_unknown_mode_raises():
    # The type hook of the tests refuses it first.
    with pytest.raises((ValueError, TypeError), match="'vmap'"):
        meshes.map_members(lambda member: member, meshes.make_mesh(), num_shared=0, mode="pmap")


def test_convolutions_run_one_after_another_on_cpu():
    dense, conv = {"k": jnp.zeros((2, 3))}, {"k": jax.ShapeDtypeStruct((3, 3, 1, 2), jnp.float32)}
    assert meshes.default_member_mode(dense) == "vmap"
    assert meshes.default_member_mode(conv) == "dispatch"


def test_spreading_outside_a_mesh_changes_nothing():
    batch = {"x": jnp.ones((4, 2))}
    assert meshes.spread_examples(batch) is batch


def test_a_process_without_a_device_in_the_mesh_raises():
    devices = [SimpleNamespace(process_index=index // 2) for index in range(4)]
    with pytest.raises(ValueError, match=r"2 of 4 devices, and none of process 1"):
        meshes.auto_mesh(2, 5, devices=devices)
