"""What arrays and compiled functions take of a device, and what is free of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ntt_sparse.training import memory
from ntt_sparse.training import mesh as meshes


def test_a_device_holds_its_part_of_arrays_that_are_cut():
    mesh = meshes.make_mesh(4, 2)
    tree = {
        "whole": np.zeros((3, 5), np.float32),
        "cut": memory.with_sharding(meshes.member_sharding(mesh), jnp.zeros((8, 6), jnp.int8)),
        "both": jax.device_put(
            jnp.zeros((8, 6)), jax.sharding.NamedSharding(mesh, P("member", "data"))
        ),
        "replicated": jax.device_put(jnp.zeros(7), meshes.replicated(mesh)),
        "keys": jax.random.split(jax.random.key(0), 3),
    }
    parts = {"whole": 60, "cut": 12, "both": 24, "replicated": 28, "keys": 24}
    assert {name: memory.local_bytes(leaf) for name, leaf in tree.items()} == parts
    assert memory.local_bytes(tree) == sum(parts.values())


def test_a_function_is_compiled_once_for_its_bytes_and_its_calls():
    traced = []

    def squares(x, y):
        traced.append(x.shape)
        return (x @ x.T) @ y

    jitted = jax.jit(squares)
    mesh = meshes.make_mesh()
    x, y = jax.device_put((jnp.ones((64, 3)), jnp.ones((64, 2))), meshes.replicated(mesh))
    taken = memory.compiled_bytes(jitted, *memory.with_sharding(meshes.replicated(mesh), (x, y)))
    # The square is needed in between, the result at the end.
    assert 64 * 64 * 4 + 64 * 2 * 4 <= taken < 2 * 64 * 64 * 4
    np.testing.assert_allclose(jitted(x, y), np.full((64, 2), 3 * 64))
    assert traced == [(64, 3)]


def test_a_donated_argument_counts_once():
    def grown(x):
        return x + 1

    shape = jax.ShapeDtypeStruct((1000,), jnp.float32)
    assert memory.compiled_bytes(jax.jit(grown), shape) == 4000
    assert memory.compiled_bytes(jax.jit(grown, donate_argnums=0), shape) == 0


def test_what_is_asked_for_is_taken():
    assert memory.device_bytes("1.5") == 3 * 2**19
    found = memory.device_bytes()
    assert found is not None and found > 2**20


@pytest.mark.parametrize("asked", ["all", "0", "-3", "nan", "inf", "1,000"])
def test_what_is_no_memory_is_refused(asked):
    with pytest.raises(ValueError, match=rf"'{asked}' is no memory: expected MiB, a number"):
        memory.device_bytes(asked)


def _group(folder, **files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_tightest_group_around_a_process_counts(tmp_path):
    """Of version 2, in which a job lies in a limit of its own inside of one without."""
    root, own = tmp_path / "cgroup", tmp_path / "own"
    stat = "anon 100\ninactive_file 30"
    _group(root / "job", memory__max="max", memory__current=900, memory__stat=stat)
    _group(root / "job" / "step", memory__max=1000, memory__current=400, memory__stat=stat)
    own.write_text("0::/job/step\n")
    assert memory._allowed(root, own) == [630]
    own.write_text("0::/job\n")
    assert memory._allowed(root, own) == []


def test_groups_of_the_first_version_are_read_too(tmp_path):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    for path, limit in (("memory", 5000), ("memory/box", 700)):
        _group(
            root / path,
            memory__limit_in_bytes=limit,
            memory__usage_in_bytes=800,
            memory__stat="total_inactive_file 50",
        )
    own.write_text("9:cpu:/box\n4:memory:/box\n1:name=systemd:/\n")
    # One that is over its limit has nothing left.
    assert memory._allowed(root, own) == [0, 4250]
    assert memory._allowed(root, tmp_path / "nowhere") == []
