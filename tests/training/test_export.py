"""Networks as files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.training.export import load_model_state, load_network, save_network


def test_a_network_comes_back(tmp_path):
    params = {
        "Dense_0": {"kernel": jnp.array([[1.5, -2.0]]), "bias": jnp.array([0.5, 0.1])},
        "out": jnp.ones((2, 1)),
    }
    masks = {
        "Dense_0": {"kernel": jnp.array([[True, False]]), "bias": None},
        "out": jnp.zeros((2, 1), bool),
    }
    save_network(tmp_path / "n.npz", params, masks)
    loaded, loaded_masks = load_network(tmp_path / "n.npz")
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert jax.tree.structure(loaded_masks) == jax.tree.structure(masks)
    np.testing.assert_array_equal(loaded["Dense_0"]["kernel"], [[1.5, 0.0]])
    np.testing.assert_array_equal(loaded["Dense_0"]["bias"], params["Dense_0"]["bias"])
    np.testing.assert_array_equal(loaded_masks["Dense_0"]["kernel"], [[True, False]])
    assert not np.any(loaded["out"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x80\x04pickle"])
def test_what_is_no_network_is_refused(tmp_path, content):
    path = tmp_path / "n.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no network file, or damaged"):
        load_network(path)


def test_other_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "n.npz", weights=np.ones(3))
    with pytest.raises(ValueError, match="holds no parameters"):
        load_network(tmp_path / "n.npz")


def test_model_state_comes_back_beside_the_network(tmp_path):
    params, masks = {"w": jnp.array([[1.0, 2.0]])}, {"w": jnp.array([[True, False]])}
    state = {
        "batch_stats": {"stage1_block1": {"BatchNorm_0": {"mean": jnp.array([0.5, -2.0])}}},
        "count": jnp.int32(7),
    }
    save_network(tmp_path / "n.npz", params, masks, state)
    loaded = load_model_state(tmp_path / "n.npz")
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    loaded_params, loaded_masks = load_network(tmp_path / "n.npz")
    assert set(loaded_params) == set(loaded_masks) == {"w"}
    np.testing.assert_array_equal(loaded_params["w"], [[1.0, 0.0]])


@pytest.mark.parametrize("state", [None, (), {}])
def test_a_network_without_state_has_an_empty_one(tmp_path, state):
    save_network(tmp_path / "n.npz", {"w": jnp.ones((2, 1))}, {"w": None}, state)
    assert load_model_state(tmp_path / "n.npz") == {}


def test_the_state_of_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "n.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="no network file, or damaged"):
        load_model_state(tmp_path / "n.npz")
