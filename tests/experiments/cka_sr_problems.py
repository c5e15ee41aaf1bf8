"""Configs, data, networks and CKA by definition for the tests of the CKA-SR study."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs import cka_sr as configs
from ntt_sparse.data import images
from ntt_sparse.models.lenet import LeNet


def get_config(name="digits_lenet300,smoke", **fields):
    config = configs.get_config(name)
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def tiny_split(dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 8, 8, 1)).astype(dtype)
    return images.Split(x, rng.integers(0, 10, 40).astype(np.int32))


def tiny_mlp(dtype=jnp.float32):
    return LeNet(hidden=(12, 9, 7), param_dtype=dtype)


def member_of(members, index):
    """One of stacked members, cut out on the host, which compiles nothing, but for keys."""

    def one(leaf):
        typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return leaf[index] if typed else jnp.asarray(np.asarray(leaf)[index])

    return jax.tree.map(one, members)


def hand_cka(a, b, debiased=False):
    """By definition; debiased as in Song et al. 2012, Eq. 5. Of NumPy or JAX arrays."""
    n = len(a)
    first, second = (f.reshape(n, -1) @ f.reshape(n, -1).T for f in (a, b))
    if not debiased:
        h = np.eye(n) - 1 / n
        first, second = h @ first @ h, h @ second @ h
        return (first * second).sum() / ((first**2).sum() * (second**2).sum()) ** 0.5

    def hsic(k, m):
        k, m = k * (1 - np.eye(n)), m * (1 - np.eye(n))
        sums = k.sum() * m.sum() / ((n - 1) * (n - 2))
        return ((k * m).sum() + sums - 2 / (n - 2) * (k @ m).sum()) / (n * (n - 3))

    return hsic(first, second) / (hsic(first, first) * hsic(second, second)) ** 0.5
