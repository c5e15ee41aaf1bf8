"""The configs of structured pruning by themselves, by shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dam_pruning_checks as checks
from experiments import dam_pruning_members as members
from experiments import dam_pruning_study as study
from experiments.configs import dam_pruning as configs
from ntt_sparse.data.images import ImageData, Split
from ntt_sparse.gates import channels
from ntt_sparse.gates import network as graph
from ntt_sparse.similarity.features import capture
from ntt_sparse.training.loop import Plan

SHAPES = {"mnist": (28, 28, 1), "digits": (8, 8, 1), "tiny_imagenet.npz": (64, 64, 3)}
# Counting channels of the deep ones takes some ten seconds each.
DEEP = ("preresnet56", "preresnet110", "preresnet164")


def blank(config):
    n, shape = 300, SHAPES.get(config.data.name, (32, 32, 3))
    split = Split(np.zeros((n, *shape), np.float32), np.zeros(n, np.int32))
    return ImageData(split, split, split, 10, "blank", np.zeros(1), np.ones(1))


@pytest.mark.parametrize("name", configs._CONFIGS)
def test_every_config_is_valid(name):
    config = configs.get_config(name)
    checks.check_config(config)
    checks.check_config(configs.get_config(f"{name},smoke"))
    if config.model.name in DEEP:
        return
    data = blank(config)
    module = members.make_model(config, data.num_classes)
    stages = [stage for stage in ("pretrain", "training", "finetune") if config[stage].epochs]
    plans = dict.fromkeys(stages, Plan(10_000, 100, 100))
    checks.check_sizes(config, module, module.network(data.input_shape), data, plans)


@pytest.mark.variants(1)
@pytest.mark.parametrize("name", ["figure6_cifar10", "figure6_slimming", "figure6_chipnet"])
def test_similarity_is_of_what_has_the_gate(name):
    """Of each kind of gates (Table 7), one map for each channel."""
    config = configs.get_config(name)
    module = members.make_model(config, 10)
    network, x = module.network((32, 32, 3)), jnp.zeros((2, 32, 32, 3))
    sizes = channels.sizes(network)
    (gate,) = {config.similarity, f"{config.similarity}/gate"} & sizes.keys()
    node = study.gated_node(network, config.similarity)
    assert graph.shapes(network)[node] == (32, 32, sizes[gate])

    def maps(key):
        return capture(module, [config.similarity])(module.init(key, x), x)[1]

    (shape,) = jax.eval_shape(maps, jax.random.key(0)).values()
    assert shape.shape == (2, 32, 32, sizes[gate])
