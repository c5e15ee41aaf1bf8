import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn

from ntt_sparse import models


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conv_4", r"unknown model 'conv_4' \(did you mean 'conv4'\?\): expected one of lenet_300"),
        ("zzz", r"unknown model 'zzz': expected one of lenet_300_100, .*, conv4_dropout"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        models.create(name)


@pytest.mark.parametrize(
    ("name", "keyword", "message"),
    [
        ("conv4", "pading", r"unknown keyword of 'conv4' 'pading' \(did you mean 'padding'\?\)"),
        ("conv4", "hidden", "expected one of num_outputs, padding, dtype, param_dtype"),
        ("lenet_300_100", "padding", "'padding'.*: expected one of num_outputs, dropout, dtype"),
    ],
)
def test_unknown_keywords(name, keyword, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, **{keyword: "SAME"})


def test_init_is_a_plain_tree_that_the_key_decides():
    module = models.create("lenet_300_100")
    params = models.init(module, jax.random.key(0), (3,))
    assert type(params) is dict
    assert set(params) == {"Dense_0", "Dense_1", "Dense_2"}
    assert all(type(layer) is dict for layer in params.values())
    again = models.init(module, jax.random.key(0), (3,))
    other = models.init(module, jax.random.key(1), (3,))
    for a, b, c in zip(*map(jax.tree.leaves, (params, again, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.allclose(a, c)


def test_members_under_vmap():
    module, keys = models.create("lenet_300_100"), jax.random.split(jax.random.key(0), 2)
    members = jax.vmap(lambda key: models.init(module, key, (3,)))(keys)
    x = jax.random.normal(jax.random.key(1), (4, 3))
    outputs = jax.vmap(models.apply_fn(module), in_axes=(0, None))(members, x)
    assert outputs.shape == (2, 4, 10)
    alone = models.apply_fn(module)(models.init(module, keys[1], (3,)), x)
    np.testing.assert_allclose(outputs[1], alone, rtol=1e-5, atol=1e-6)


def test_modules_with_state_are_refused():
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(nn.Dense(2)(x))

    with pytest.raises(ValueError, match=r"Normalised keeps \['batch_stats'\] besides its params"):
        models.init(Normalised(), jax.random.key(0), (3,))


def test_any_module_becomes_a_function():
    module = nn.Dense(2, use_bias=False)
    params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    outputs = models.apply_fn(module)(params, jnp.array([[1.0, 1.0]]))
    np.testing.assert_array_equal(outputs, [[4.0, 6.0]])


def test_functions_of_modules_with_state_are_refused():
    module = nn.BatchNorm(use_running_average=True)
    params = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"^BatchNorm keeps state besides its params: call module"):
        models.apply_fn(module)(params, jnp.ones((1, 2)))


def test_missing_params_are_not_taken_for_state():
    with pytest.raises(errors.ScopeCollectionNotFound, match='collection "params"'):
        models.apply_fn(nn.Dense(2))({}, jnp.ones((1, 2)))
