"""Networks as files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ntt_sparse.gates import network as graph
from ntt_sparse.gates.l1 import L1
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.pruning.compact import compact
from ntt_sparse.training.export import (
    load_gates,
    load_masks,
    load_model_state,
    load_network,
    save_gates,
    save_network,
)
from ntt_sparse.training.files import write_safetensors

FORMAT = {"format": "ntt_sparse trained network 1"}


def test_a_network_comes_back(tmp_path):
    params = {
        "Dense_0": {"kernel": jnp.array([[1.5, -2.0]]), "bias": jnp.array([0.5, 0.1])},
        "out": jnp.ones((2, 1)),
    }
    masks = {
        "Dense_0": {"kernel": jnp.array([[True, False]]), "bias": None},
        "out": jnp.zeros((2, 1), bool),
    }
    save_network(tmp_path / "n.safetensors", params, masks)
    loaded, loaded_masks = load_network(tmp_path / "n.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert jax.tree.structure(loaded_masks) == jax.tree.structure(masks)
    np.testing.assert_array_equal(loaded["Dense_0"]["kernel"], [[1.5, 0.0]])
    np.testing.assert_array_equal(loaded["Dense_0"]["bias"], params["Dense_0"]["bias"])
    np.testing.assert_array_equal(loaded_masks["Dense_0"]["kernel"], [[True, False]])
    assert not np.any(loaded["out"])


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs)])


STATE = nnx.state(Model(nnx.Rngs(0)), nnx.Param)


@pytest.mark.parametrize(
    "params",
    [
        {"mlp/~/linear_0": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}},
        ({"w": jnp.ones((2, 2))}, [jnp.ones((1, 2)), jnp.ones(3)], None),
        nnx.to_pure_dict(STATE),
        STATE,
    ],
)
def test_masks_come_back_in_any_pytree(tmp_path, params):
    path, masks = tmp_path / "n.safetensors", pruning_masks.full(params)
    save_network(path, params, masks)
    again = load_masks(path, params)
    pruning_masks.check(params, again)
    assert jax.tree.structure(again) == jax.tree.structure(masks)
    jax.tree.map(np.testing.assert_array_equal, again, masks)
    # Nested dictionaries instead, with all leaves under their paths.
    loaded, _ = load_network(path)
    expected = pruning_masks.named_leaves(params)
    assert {k: v.tolist() for k, v in pruning_masks.named_leaves(loaded).items()} == {
        name: leaf.tolist() for name, leaf in expected.items()
    }


def test_leaves_of_one_path_are_not_saved(tmp_path):
    leaf, path = jnp.ones((2, 2)), tmp_path / "n.safetensors"
    for tree, message in (
        ({"a/b": leaf, "a": {"b": leaf}}, "two leaves are named 'a/b'"),
        ({"a/b": leaf, "a": leaf}, "'a' is an array, and others are inside it"),
    ):
        none = jax.tree.map(lambda _: None, tree)
        with pytest.raises(ValueError, match=message):
            save_network(path, tree, none)
        with pytest.raises(ValueError, match=message):
            save_network(path, {"w": leaf}, {"w": None}, tree)
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x80\x04pickle"])
def test_what_is_no_network_is_refused(tmp_path, content):
    path = tmp_path / "n.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no network file, or damaged"):
        load_network(path)


def test_other_arrays_are_refused(tmp_path):
    path = tmp_path / "n.safetensors"
    write_safetensors(path, {"weights": jnp.ones(3)}, FORMAT)
    with pytest.raises(ValueError, match="holds no parameters"):
        load_network(path)
    write_safetensors(path, {"params/w": jnp.ones(3)}, {"format": "ntt_sparse trained network 0"})
    with pytest.raises(ValueError, match="has format 'ntt_sparse trained network 0', expected"):
        load_network(path)
    with pytest.raises(FileNotFoundError, match="there is no network at"):
        load_network(tmp_path / "absent.safetensors")


def test_a_network_that_does_not_fit_itself_is_refused(tmp_path):
    path, w = tmp_path / "n.safetensors", jnp.ones((2, 1))
    for arrays, message in (
        ({"params/w": w, "masks/w": jnp.ones((1, 2), bool)}, r"is bool\[1, 2\], expected bool\[2"),
        ({"params/w": w, "masks/v": jnp.ones((2, 1), bool)}, "has a mask of 'v', the network has"),
        ({"params/w": w, "params/w/b": w}, "'w' is an array, and others are inside it"),
        ({"params/w": w * jnp.nan}, "'params/w' holds numbers that are not finite"),
    ):
        write_safetensors(path, arrays, FORMAT)
        with pytest.raises(ValueError, match=message):
            load_network(path)


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    params, masks = {"w": jnp.array([[1.0, jnp.nan]])}, {"w": jnp.array([[True, False]])}
    save_network(tmp_path / "n.safetensors", params, masks)
    with pytest.raises(ValueError, match="'params/w' holds numbers that are not finite"):
        save_network(tmp_path / "m.safetensors", params, {"w": None})
    assert [path.name for path in tmp_path.iterdir()] == ["n.safetensors"]


def test_a_network_of_half_precision_comes_back(tmp_path):
    params = {"w": jnp.array([[0.1, 2.0]], jnp.bfloat16)}
    save_network(tmp_path / "n.safetensors", params, {"w": None})
    loaded, _ = load_network(tmp_path / "n.safetensors")
    assert loaded["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded["w"], params["w"])


def test_model_state_comes_back_beside_the_network(tmp_path):
    params, masks = {"w": jnp.array([[1.0, 2.0]])}, {"w": jnp.array([[True, False]])}
    state = {
        "batch_stats": {"stage1_block1": {"BatchNorm_0": {"mean": jnp.array([0.5, -2.0])}}},
        "count": jnp.int32(7),
    }
    save_network(tmp_path / "n.safetensors", params, masks, state)
    loaded = load_model_state(tmp_path / "n.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    loaded_params, loaded_masks = load_network(tmp_path / "n.safetensors")
    assert set(loaded_params) == set(loaded_masks) == {"w"}
    np.testing.assert_array_equal(loaded_params["w"], [[1.0, 0.0]])


@pytest.mark.parametrize("state", [None, (), {}])
def test_a_network_without_state_has_an_empty_one(tmp_path, state):
    save_network(tmp_path / "n.safetensors", {"w": jnp.ones((2, 1))}, {"w": None}, state)
    assert load_model_state(tmp_path / "n.safetensors") == {}


def test_the_state_of_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "n.safetensors").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="no network file, or damaged"):
        load_model_state(tmp_path / "n.safetensors")


def test_masks_and_gates_of_a_file_are_checked_against_the_network(tmp_path):
    module = LeNet(2, (), 5, (4, 3), kind=L1(), gated=2)
    params = module.init(jax.random.key(0), jnp.ones((1, 5)))["params"]
    network = module.network((5,))
    masks = jax.tree.map(lambda leaf: leaf > 0 if leaf.ndim == 2 else None, params)
    save_network(tmp_path / "n.safetensors", params, masks)
    again = load_masks(tmp_path / "n.safetensors", params)
    jax.tree.map(np.testing.assert_array_equal, again, masks)
    for name, mask, message in (
        ("Dense_9/kernel", np.ones((5, 4), bool), "has a mask of 'Dense_9/kernel', the network"),
        ("Dense_0/kernel", np.ones((4, 5), bool), r"is bool\[4, 5\], expected bool\[5, 4\]"),
        ("Dense_0/kernel", np.ones((5, 4)), r"is float32\[5, 4\], expected bool"),
    ):
        arrays = {f"masks/{name}": jnp.asarray(mask)}
        write_safetensors(tmp_path / "m.safetensors", arrays, FORMAT)
        with pytest.raises(ValueError, match=message):
            load_masks(tmp_path / "m.safetensors", params)
    write_safetensors(tmp_path / "m.safetensors", {"other": jnp.ones(2)}, FORMAT)
    with pytest.raises(ValueError, match="holds no masks"):
        load_masks(tmp_path / "m.safetensors", params)

    gates = {"Dense_0/gate": np.array([True, False, True, True]), "Dense_1/gate": np.ones(3) / 2}
    save_gates(tmp_path / "g.safetensors", gates)
    loaded = load_gates(tmp_path / "g.safetensors", network)
    assert {path: value.tolist() for path, value in loaded.items()} == {
        "Dense_0/gate": [1, 0, 1, 1], "Dense_1/gate": [0.5] * 3
    }  # fmt: skip
    small = compact(module, {"params": params}, (5,), gates=loaded)
    np.testing.assert_array_equal(small.kept["Dense_0"], [0, 2, 3])
    for wrong, message in (
        ({"Dense_0/gate": gates["Dense_0/gate"]}, "has gates .*, the network has"),
        ({**gates, "Dense_1/gate": np.ones(4)}, r"shape \(4,\), expected \(3,\)"),
        ({**gates, "Dense_1/gate": np.full(3, np.nan)}, "are not finite"),
    ):
        save_gates(tmp_path / "g.safetensors", wrong)
        with pytest.raises(ValueError, match=message):
            load_gates(tmp_path / "g.safetensors", network)
    assert graph.gated_channels(network) == {"Dense_0/gate": 4, "Dense_1/gate": 3}
