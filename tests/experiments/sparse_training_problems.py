"""Small studies of sparse training, and what their tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from cka_sr_problems import tiny_mlp, tiny_split

from experiments import sparse_training_checks as checks
from experiments import sparse_training_members as sparse_members
from experiments import sparse_training_stages as stages
from experiments import sparse_training_study as study
from experiments.configs import sparse_training as configs
from ntt_sparse.pruning import masks
from ntt_sparse.training.export import load_network

SMALL = {
    "data.name": "digits", "density": (0.3, 0.1), "seeds": (1, 2), "coefficients": (0.1,),
    "probe": 16, "evaluated": 64, "score_batch_size": 24,
}  # fmt: skip


def get_config(name, **fields):
    config = configs.get_config(f"{name},smoke")
    with config.unlocked():
        config.update_from_flattened_dict({**SMALL, **fields})
    return config


def start(config, module=None):
    module, train = module or tiny_mlp(), tiny_split()
    checks.check_config(config)
    optimizer = stages.make_optimizer(config, total_steps=10)
    runs = sparse_members.runs_of(config)
    return runs, sparse_members.start_members(config, module, train, optimizer, runs)


def kernels(tree):
    return {name: np.asarray(leaf, float) for name, leaf in masks.named_leaves(tree).items()
            if name.endswith("kernel")}  # fmt: skip


def networks(workdir):
    return {path.stem: load_network(path) for path in sorted((workdir / "networks").iterdir())}


@functools.partial(jax.jit, static_argnums=0)
def drawn(module, seed):
    return module.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))["params"]


def tiny_init(config, seed):
    return drawn(study.prepare(config, None).module, seed)


def largest(scores, count):
    flat = np.concatenate([leaf.ravel() for leaf in scores.values()])
    threshold = np.sort(flat)[-count]
    return {name: leaf >= threshold for name, leaf in scores.items()}
