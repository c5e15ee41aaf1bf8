"""Eight devices that share the parameters compute what one does, by every objective."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ntt_sparse.gates import dam
from ntt_sparse.ntk import empirical_ntk
from ntt_sparse.objectives.cka_sr import aug_cka_sr, cka_sr
from ntt_sparse.objectives.ntt import ntt_loss
from ntt_sparse.objectives.tokens import token_distillation_loss
from ntt_sparse.pruning import l0, masks, saliency
from ntt_sparse.pruning.transform import keep_masked
from ntt_sparse.similarity.cka import linear_cka
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import state, step, terms

FEATURES, WIDTH, CLASSES, EXAMPLES = 6, 16, 3, 16
OPTIMIZER = keep_masked(optax.sgd(0.1, momentum=0.9))


def features(params, x):
    first = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"])
    return first, jnp.tanh(first @ params["middle"]["kernel"])


def apply_fn(params, x, **kwargs):
    del kwargs
    return features(params, x)[-1] @ params["out"]["kernel"] + params["out"]["bias"]


def weights(key):
    keys = jax.random.split(key, 3)
    return {
        "in": {"kernel": jax.random.normal(keys[0], (FEATURES, WIDTH)), "bias": jnp.zeros(WIDTH)},
        "middle": {"kernel": jax.random.normal(keys[1], (WIDTH, WIDTH)) / 4},
        "out": {"kernel": jax.random.normal(keys[2], (WIDTH, CLASSES)), "bias": jnp.zeros(CLASSES)},
    }


def member() -> state.Member:
    params = weights(jax.random.key(0))
    kept = masks.from_scores(saliency.magnitude(params), 0.5)
    context = {"teacher": weights(jax.random.key(1))}
    return state.create_member(params, kept, OPTIMIZER, jax.random.key(2), context)


def batch() -> Any:
    keys = jax.random.split(jax.random.key(3))
    x = jax.random.normal(keys[0], (EXAMPLES, FEATURES))
    return x, jax.random.randint(keys[1], (EXAMPLES,), 0, CLASSES)


def maps(inputs):
    return features(masks.apply(inputs.params, inputs.masks), inputs.batch[0])


def ntt(inputs):
    loss, parts = ntt_loss(
        apply_fn, inputs.params, inputs.masks, inputs.context["teacher"], inputs.batch[0],
        kernel_weight=0.1, l2_weight=1e-3,
    )  # fmt: skip
    return loss, parts._asdict()


def gated(inputs):
    """The hidden units fade out with a bias as their boundary."""
    beta = jnp.sum(inputs.params["in"]["bias"]) + 1.0
    hidden = features(inputs.params, inputs.batch[0])[0] * dam.gate(beta, WIDTH)
    return jnp.mean(hidden**2) + dam.penalty({"beta": beta}), {}


def random_gates(inputs):
    sampled = l0.sample(inputs.key, inputs.params, l0.init(inputs.key, inputs.params))
    return jnp.mean(apply_fn(sampled, inputs.batch[0]) ** 2), {}


def distilled(inputs):
    x = inputs.batch[0][:, None] * jnp.arange(1.0, 5)[:, None]
    own, theirs = (features(p, x)[-1] for p in (inputs.params, inputs.context["teacher"]))
    return token_distillation_loss(own, theirs, (x[..., 0] > 0).astype(x.dtype)), {}


SIMILARITIES = {
    "cka_sr": lambda inputs: (cka_sr([maps(inputs)]), {}),
    "aug_cka_sr": lambda inputs: (aug_cka_sr(maps(inputs)), {}),
}
MORE_SIMILARITIES = {
    "of_five": lambda inputs: (cka_sr([maps(inputs)], samples=5), {}),
    "debiased": lambda inputs: (cka_sr([maps(inputs)], debiased=True), {}),
    "cca": lambda inputs: (cka_sr([maps(inputs)], similarity="cca"), {}),
}
OBJECTIVES = {
    "task": {"task": terms.supervised(apply_fn)},
    "ntt": {"ntt": ntt},
    "cka_sr": SIMILARITIES,
    "dam": {"dam": gated},
    "l0": {"l0": random_gates},
    "tokens": {"tokens": distilled},
}


def loss_fn(params, examples):
    return jnp.mean(
        terms.example_losses(apply_fn(params, examples[0]), examples[1], "cross_entropy")
    )


def stepped(objectives: Any, one: state.Member, examples: Any) -> dict[str, Any]:
    """The parameters after a step of each objective."""
    found = {}
    for name, loss in objectives.items():
        after, logs = step.make_step(loss, OPTIMIZER)(one, examples, jnp.int32(0))
        found[name] = after.params, after.opt_state, logs
    return found


def measured(one: state.Member, examples: Any) -> dict[str, Any]:
    """The parameters after a step of each objective, scores, and kernels of the batch."""
    x, _ = examples
    found = stepped(OBJECTIVES, one, examples)
    found["snip"] = saliency.snip(loss_fn, one.params, examples)
    found["logit_snip"] = saliency.logit_snip(apply_fn, one.params, x)
    found["grasp"] = saliency.grasp(loss_fn, one.params, examples)
    found["synflow"] = saliency.synflow(apply_fn, one.params, (FEATURES,))
    found["cka"] = linear_cka(*features(one.params, x))
    found["ntk"] = empirical_ntk(apply_fn, one.params, x, masks=one.masks)
    return found


MORE = functools.partial(stepped, {"similarities": MORE_SIMILARITIES})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("measured", [measured, pytest.param(MORE, marks=pytest.mark.slow)])
def test_eight_devices_step_and_score_as_one(measured):
    """With parameters, masks and optimiser cut over them, and the batch as well."""
    mesh = meshes.make_mesh(data=8)
    one, examples = member(), batch()
    alone = jax.device_get(jax.jit(measured)(one, examples))
    placed = jax.device_put(one, meshes.leaf_shardings(one, mesh))
    found = jax.jit(measured)(placed, jax.device_put(examples, NamedSharding(mesh, P("data"))))
    for name, expected in alone.items():
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(
                a, b, rtol=1e-9, atol=1e-10, err_msg=name
            ),
            expected,
            jax.device_get(found[name]),
        )


def test_each_device_holds_an_eighth_of_what_can_be_cut():
    mesh = meshes.make_mesh(data=8)
    one = member()
    shardings = meshes.leaf_shardings(one, mesh)
    placed = jax.device_put(one, shardings)
    step_fn = step.make_step(OBJECTIVES["task"], OPTIMIZER)
    compiled = jax.jit(step_fn, out_shardings=(shardings, meshes.replicated(mesh)))
    examples = jax.device_put(batch(), NamedSharding(mesh, P("data")))
    after, _ = compiled(placed, examples, jnp.int32(0))
    for tree in (placed, after):
        for part in (tree.params, tree.masks, tree.opt_state):
            for leaf in jax.tree.leaves(part):
                (held,) = {shard.data.size for shard in leaf.addressable_shards}
                divisible = any(size % 8 == 0 for size in leaf.shape)
                assert held * (8 if divisible else 1) == math.prod(leaf.shape)


def test_the_longest_axis_that_the_devices_divide_is_cut():
    mesh = meshes.make_mesh(2, 4)
    shapes = {"a": (8, 12), "b": (30, 4), "c": (3,), "d": ()}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = jax.tree.map(lambda sharding: sharding.spec, meshes.leaf_shardings(tree, mesh))
    assert specs == {"a": P(None, "data"), "b": P(None, "data"), "c": P(), "d": P()}
