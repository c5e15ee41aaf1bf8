"""The members of the CKA-SR study: what they share, and the masks they start with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cka_sr_problems import get_config, member_of, tiny_mlp, tiny_split

from experiments import sparse_training_members, sparse_training_stages
from experiments.sparse_training_members import Run
from ntt_sparse.models.resnet import ResNet
from ntt_sparse.pruning import masks


def kept_by_layer(member):
    return {name: row.kept for name, row in masks.layer_densities(member.masks).items()}


def start(config, module, train):
    optimizer = sparse_training_stages.make_optimizer(config, total_steps=10)
    runs = sparse_training_members.runs_of(config)
    return runs, sparse_training_members.start_members(config, module, train, optimizer, runs)


# Of the 768, 108, 63 and 70 weights of layers 64-12-9-7-10, by sums of shapes and by sizes.
COUNTS = {
    # (76, 21, 16, 17) * 1009 * density / 130, rounded.
    "erk": {0.1: (59, 16, 12, 13), 0.02: (12, 3, 2, 3)},
    "uniform": {0.1: (77, 11, 6, 7), 0.02: (15, 2, 1, 1)},
}


@pytest.mark.parametrize("layer_densities", COUNTS)
def test_members_of_a_seed_and_density_differ_in_coefficients_alone(layer_densities):
    config = get_config(
        layer_densities=layer_densities, density=(0.1, 0.02), seeds=(4, 2),
        regularisers="cka_sr,cca_sr", coefficients=(0.5, 2.0),
    )  # fmt: skip
    runs, members = start(config, tiny_mlp(), tiny_split())
    names = sparse_training_members.member_names(runs)
    assert len(runs) == 20 and len(set(names)) == 20
    assert names[0] == "none-c0.0-d0.1-s4" and names[2] == "cka_sr-c0.5-d0.1-s4"
    members = members._replace(key=jax.random.key_data(members.key))
    members = jax.tree.map(np.asarray, members)
    by_run = {run: member_of(members, index) for index, run in enumerate(runs)}
    init = jax.jit(tiny_mlp().init)
    kernels = {
        seed: init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))["params"]["Dense_1"]["kernel"]
        for seed in config.seeds
    }
    for run, member in by_run.items():
        kept = [int(np.sum(leaf)) for leaf in masks.named_leaves(member.masks).values()]
        assert tuple(kept) == COUNTS[layer_densities][run.density]
        reference = by_run[Run("none", 0.0, run.density, run.seed)]
        for field in ("params", "masks", "key", "opt_state"):
            for a, b in zip(
                jax.tree.leaves(getattr(member, field)),
                jax.tree.leaves(getattr(reference, field)),
                strict=True,
            ):
                np.testing.assert_array_equal(a, b, err_msg=f"{run} {field}")
        context = {
            name: run.coefficient * (run.regulariser == name) for name in ("cka_sr", "cca_sr")
        }
        assert {name: float(value) for name, value in member.context.items()} == context
        # The weights are those of Flax from the seed, zero where they are pruned.
        kernel, mask = kernels[run.seed], member.masks["Dense_1"]["kernel"]
        np.testing.assert_allclose(
            member.params["Dense_1"]["kernel"], np.where(mask, kernel, 0), rtol=1e-6
        )
    first, second = (by_run[Run("none", 0.0, 0.1, seed)] for seed in (4, 2))
    differing = first.masks["Dense_0"]["kernel"] != second.masks["Dense_0"]["kernel"]
    assert np.mean(differing) > 0.05


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_layers_have_the_counts_of_a_scored_mask_and_random_places(method):
    """With batch statistics, and scores written by hand; reverse over reverse for H g."""
    module = ResNet(blocks_per_stage=1, channels=(4,))
    train = tiny_split()
    config = get_config(
        layer_densities=method, density=(0.3,), seeds=(1,), score_batch_size=24,
        regularisers="cka_sr", coefficients=(0.5,),
    )  # fmt: skip
    _, members = start(config, module, train)
    x, y = jnp.asarray(train.x[:24]), train.y[:24]
    variables = jax.jit(module.init)(jax.random.key(1), x[:1])

    def network_loss(kernels):
        params = jax.tree.map(
            lambda kernel, leaf: leaf if kernel is None else kernel, kernels, variables["params"],
            is_leaf=lambda leaf: leaf is None,
        )  # fmt: skip
        logits, _ = module.apply(
            {**variables, "params": params}, x, train=True, mutable="batch_stats"
        )
        logits = logits / (200.0 if method == "grasp" else 1.0)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(24), y])

    kernels = jax.tree.map(lambda leaf: leaf if leaf.ndim > 1 else None, variables["params"])
    if method == "snip":
        gradients = jax.jit(jax.grad(network_loss))(kernels)
        scores = jax.tree.map(lambda w, g: np.abs(np.multiply(w, g)), kernels, gradients)
    else:

        def half_norm(kernels):
            grads = jax.tree.leaves(jax.grad(network_loss)(kernels))
            return 0.5 * sum(jnp.sum(g**2) for g in grads)

        scores = jax.tree.map(np.multiply, kernels, jax.jit(jax.grad(half_norm))(kernels))
    scores = {name: np.asarray(leaf) for name, leaf in masks.named_leaves(scores).items()}
    everything = np.sort(np.concatenate([leaf.ravel() for leaf in scores.values()]))
    keep = round(0.3 * everything.size)
    threshold = everything[-keep]
    expected = {name: int(np.sum(leaf >= threshold)) for name, leaf in scores.items()}
    assert len(set(np.array(list(expected.values())) / [s.size for s in scores.values()])) > 1
    for index in range(2):
        member = member_of(members, index)
        assert kept_by_layer(member) == expected and sum(expected.values()) == keep
        mask = masks.named_leaves(member.masks)["stage1_block1/Conv_0/kernel"]
        assert np.any(np.asarray(mask) != (scores["stage1_block1/Conv_0/kernel"] >= threshold))
