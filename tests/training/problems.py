"""A small problem that trains in milliseconds, shared by the tests of the engine."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntt_sparse.pruning import masks, saliency
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import program as programs
from ntt_sparse.training import state, step, terms

NUM_EXAMPLES, NUM_FEATURES, NUM_CLASSES = 96, 6, 3
BATCH_SIZE = 16


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels that a linear rule makes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(NUM_EXAMPLES, NUM_FEATURES)).astype(np.float32)
    y = np.argmax(x @ rng.normal(size=(NUM_FEATURES, NUM_CLASSES)), axis=1).astype(np.int32)
    return x, y


def apply_fn(params: Any, x: Any, **kwargs: Any) -> Any:
    """Two dense layers; drops hidden units when called with `train=True`."""
    hidden = jnp.tanh(x @ params["in"] + params["bias"])
    if kwargs.get("train"):
        keep = jax.random.bernoulli(kwargs["rngs"]["dropout"], 0.8, hidden.shape)
        hidden = jnp.where(keep, hidden / 0.8, 0)
    return hidden @ params["out"]


def init(key: Any) -> Any:
    """Initial parameters."""
    keys = jax.random.split(key)
    return {
        "in": 0.5 * jax.random.normal(keys[0], (NUM_FEATURES, 16)),
        "bias": jnp.zeros(16),
        "out": 0.5 * jax.random.normal(keys[1], (16, NUM_CLASSES)),
    }


optimizer = optax.adam(1e-2)


@jax.jit
@jax.vmap
def _member(key):
    params = init(key)
    scores = saliency.random(key, params)
    kept = masks.from_counts(scores, masks.keep_counts(scores, 0.5, scope="layer"))
    return state.create_member(masks.apply(params, kept), kept, optimizer, key)


def members(seeds: tuple[int, ...] = (0, 1, 2, 3)) -> state.Member:
    """Randomly masked members of density 0.5, one per seed."""
    return _member(jnp.stack([jax.random.key(seed) for seed in seeds]))


def step_fn() -> step.StepFn:
    """Cross-entropy and decay, with dropout."""
    loss = {"task": terms.supervised(apply_fn), "decay": terms.weight_decay(1e-4)}
    return step.make_step(loss, optimizer)


def program(
    mesh: Any = None, mode: meshes.MemberMode = "vmap", fn: Any = None, **options: Any
) -> programs.Program:
    """The compiled problem."""
    mesh = meshes.make_mesh() if mesh is None else mesh
    return programs.make_program(
        fn or step_fn(), batch_size=BATCH_SIZE, mesh=mesh, mode=mode, **options
    )
