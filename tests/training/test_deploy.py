"""Small networks in files and as programs, read by a fresh process."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ntt_sparse.gates import channels, layer
from ntt_sparse.gates.l1 import L1
from ntt_sparse.models.preresnet import PreResNet
from ntt_sparse.pruning.compact import compact
from ntt_sparse.training import deploy

_READ = """
import sys
import numpy as np
from ntt_sparse.training import deploy
folder, names = sys.argv[1], sys.argv[2:]
x = np.load(f"{folder}/x.npy")
for name in names:
    module, variables = deploy.load(f"{folder}/{name}")
    np.save(f"{folder}/{name}.npy", module.apply(variables, x))
"""
# Without this package.
_RUN = """
import sys
import jax.export
import numpy as np
folder = sys.argv[1]
program = jax.export.deserialize(bytearray(open(f"{folder}/program", "rb").read()))
np.save(f"{folder}/program.npy", program.call(np.load(f"{folder}/x.npy")))
assert not any(name.startswith(("ntt_sparse", "flax")) for name in sys.modules)
"""


@pytest.fixture(scope="module")
def small():
    module, shape = PreResNet(3, 1, (4, 6), L1()), (9, 9, 2)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, *shape)))
    rng = np.random.default_rng(0)
    gates = {
        path: {"scale": jnp.asarray(rng.random(n) * (np.arange(n) % 3 > 0), jnp.float32)}
        for path, n in channels.sizes(module.network(shape)).items()
    }
    params = layer.replace(variables["params"], gates)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * (leaf == 0) * (leaf.ndim == 1), params)
    params = layer.replace(params, gates)
    return compact(module, {**variables, "params": params}, shape)


def run(script, *arguments):
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True, timeout=300)


def test_a_fresh_process_gets_equal_outputs(small, tmp_path):
    x = np.random.default_rng(1).standard_normal((3, 9, 9, 2)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    expected = np.asarray(small.module.apply(small.variables, x))
    assert small.constants > 0
    for name in ("net.safetensors", "orbax"):
        deploy.save(tmp_path / name, small.module, small.variables)
    (tmp_path / "program").write_bytes(deploy.export(small.module, small.variables, (9, 9, 2)))
    run(_READ, tmp_path, "net.safetensors", "orbax")
    run(_RUN, tmp_path)
    for name in ("net.safetensors", "orbax"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), expected)
    # Compiled whole, where the others run operation by operation.
    np.testing.assert_allclose(np.load(tmp_path / "program.npy"), expected, atol=1e-6)


def test_half_precision_comes_back(small, tmp_path):
    half = small.module.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small.variables)
    deploy.save(tmp_path / "h.safetensors", half, variables)
    module, loaded = deploy.load(tmp_path / "h.safetensors")
    assert (module.dtype, module.param_dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert module.network == half.network
    for old, new in zip(jax.tree.leaves(variables), jax.tree.leaves(loaded), strict=True):
        assert new.dtype == jnp.bfloat16
        np.testing.assert_array_equal(new, old)


def test_a_batch_of_a_fixed_size(small):
    data = deploy.export(small.module, small.variables, (9, 9, 2), batch=2)
    program = jax.export.deserialize(bytearray(data))
    assert program.call(jnp.ones((2, 9, 9, 2))).shape == (2, 3)
    with pytest.raises(ValueError, match="hape"):
        program.call(jnp.ones((3, 9, 9, 2)))


def test_bad_files(small, tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(FileNotFoundError, match="there is no network at"):
        deploy.load(tmp_path / "none.safetensors")
    for content in (b"", b"\x80\x04pickle", b"PK\x03\x04"):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="is no network file, or damaged"):
            deploy.load(tmp_path / "bad.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is no network file, or damaged"):
        deploy.load(tmp_path / "empty")
    save_file({"w": np.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has format None"):
        deploy.load(tmp_path / "other.safetensors")
    deploy.save(tmp_path / "net.safetensors", small.module, small.variables)
    whole = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="is no network file, or damaged"):
        deploy.load(tmp_path / "cut.safetensors")
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    save_file({"params/w": np.ones(2)}, tmp_path / "less.safetensors", header)
    with pytest.raises(ValueError, match="do not fit the network"):
        deploy.load(tmp_path / "less.safetensors")
    save_file({}, tmp_path / "text.safetensors", {**header, "network": "{}"})
    with pytest.raises(ValueError, match="describes no network"):
        deploy.load(tmp_path / "text.safetensors")
    deploy.save(tmp_path / "orbax", small.module, small.variables)
    with pytest.raises(ValueError, match="exists: expected a new directory"):
        deploy.save(tmp_path / "orbax", small.module, small.variables)
    with pytest.raises(ValueError, match=r"variables do not fit .*has shape none, expected \("):
        deploy.save(tmp_path / "n.safetensors", small.module, {"params": {}})
    # The type hook of the tests refuses it first.
    with pytest.raises(TypeError, match=r"Described"):
        deploy.save(tmp_path / "n.safetensors", nn.Dense(2), {})
    with pytest.raises(ValueError, match=r"does not take examples of shape \(9, 9, 5\)"):
        deploy.export(small.module, small.variables, (9, 9, 5))
