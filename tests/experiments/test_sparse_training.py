"""Methods of sparse training: masks at the start and in training, and what is trained with them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cka_sr_problems import member_of, tiny_mlp, tiny_split
from sparse_training_problems import drawn, get_config, kernels, largest, start

from experiments import sparse_training_masks as methods
from experiments import sparse_training_members as sparse_members
from experiments import sparse_training_stages as stages
from experiments import sparse_training_study as study
from ntt_sparse.pruning import densities, masks
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.metrics import MetricsLog
from ntt_sparse.training.terms import NetworkOutputs


def forward(kernel, bias, x):
    for layer in range(3):
        x = jnp.maximum(x @ kernel[f"Dense_{layer}/kernel"] + bias[layer], 0)
    return x @ kernel["Dense_3/kernel"] + bias[3]


@functools.partial(jax.jit, static_argnums=0)
def scores_by_hand(method, kernel, bias, x, y):
    """By the definition of each method; their sizes count, but for GraSP."""

    def entropy(k, temperature=1.0):
        logits = jax.nn.log_softmax(forward(k, bias, x) / temperature)
        return -jnp.mean(logits[jnp.arange(24), y])

    def half_norm(k):
        grads = jax.grad(lambda q: entropy(q, 200.0))(k)
        return 0.5 * sum(jnp.sum(g**2) for g in grads.values())

    positive, shift = jax.tree.map(jnp.abs, (kernel, bias))
    value, at = {
        "magnitude": (lambda k: sum(map(jnp.sum, k.values())), kernel),
        "snip": (entropy, kernel),
        "logit_snip": (lambda k: jnp.sum(forward(k, bias, x) ** 2), kernel),
        "grasp": (half_norm, kernel),
        "synflow": (lambda k: jnp.sum(forward(k, shift, jnp.ones((1, 64)))), positive),
    }[method]
    return jax.tree.map(jnp.multiply, at, jax.grad(value)(at))


@pytest.mark.parametrize("method", ["magnitude", "snip", "logit_snip", "grasp", "synflow"])
def test_masks_of_scores_by_hand(method):
    """One round, global: the largest scores of each definition, as many as asked for."""
    train = tiny_split()
    x, y = jnp.asarray(train.x[:24]).reshape(24, -1), train.y[:24]
    config = get_config(f"mnist_{method}", rounds=1)
    runs, members = start(config)
    for seed in config.seeds:
        params = drawn(tiny_mlp(), seed)
        bias = [params[f"Dense_{layer}"]["bias"] for layer in range(4)]
        kernel = {name: leaf.astype(np.float32) for name, leaf in kernels(params).items()}
        scores = scores_by_hand(method, kernel, bias, x, y)
        scores = {name: np.asarray(leaf, float) for name, leaf in scores.items()}
        if method != "grasp":
            scores = {name: np.abs(leaf) for name, leaf in scores.items()}
        for density in config.density:
            expected = largest(scores, round(density * 1009))
            index = runs.index(sparse_members.Run("none", 0.0, density, seed))
            found = kernels(member_of(members.masks, index))
            for name, mask in expected.items():
                np.testing.assert_array_equal(found[name].astype(bool), mask, err_msg=name)


def test_rounds_and_densities_by_layer():
    """SynFlow in rounds differs from one round; ERK gives each layer its share."""
    one, many = (start(get_config("mnist_synflow", rounds=rounds))[1] for rounds in (1, 20))
    assert any(
        np.any(a != b)
        for a, b in zip(*(jax.tree.leaves(m.masks) for m in (one, many)), strict=True)
    )
    total = np.asarray(sum(leaf.reshape(8, -1).sum(1) for leaf in jax.tree.leaves(many.masks)))
    assert total.tolist() == [303] * 4 + [101] * 4
    _, by_layer = start(get_config("mnist_snip", layer_densities="erk"))
    params = drawn(tiny_mlp(), 1)
    for index, density in ((0, 0.3), (7, 0.1)):
        report = masks.layer_densities(member_of(by_layer.masks, index))
        for name, fraction in densities.erk(params, density).items():
            assert report[name].kept == round(fraction * report[name].total)


@pytest.mark.parametrize(
    "method", ["rigl", *(pytest.param(each, marks=pytest.mark.slow) for each in ("set", "gradual"))]
)
@pytest.mark.usefixtures("narrow", "unrendered")
def test_masks_change_in_training(tmp_path, method):
    """Counts stay (set, rigl) or fall to the ones asked for (gradual), and stay to the end."""
    config = get_config(
        f"mnist_{method}",
        regularisers="l2",
        **{
            "supervised.max_steps": 24, "supervised.record_every": 2, "growth.every": 3,
            "growth.end": 0.75, "gradual.every": 3, "gradual.start": 0.1, "gradual.end": 0.7,
        },
    )  # fmt: skip
    summary = study.run(config, tmp_path)
    log = MetricsLog(tmp_path / "supervised.jsonl", "any")
    steps, kept = log.column("kept")
    steps = list(steps)
    params = drawn(study.prepare(config, None).module, 1)
    counts = methods.layer_counts(config, params)
    for index, run in enumerate(sparse_members.runs_of(config)):
        wanted = counts[run.density]
        history = kept[:, index].astype(int)
        if method == "gradual":
            whole = sum(leaf.size for leaf in kernels(params).values())
            totals = history.sum(1)
            assert totals[0] == whole and totals[-1] == wanted
            assert np.all(np.diff(totals) <= 0)
            # 24 steps: from step 2 to step 17, after steps 3, 6, ..., 15 and at the end, 17.
            assert totals[steps.index(2)] == whole and totals[steps.index(18)] == wanted
            left = 1 - (15 - 2) / 15
            expected = round((run.density + (1 - run.density) * left**3) * whole)
            assert abs(totals[steps.index(16)] - expected) <= 1
        else:
            assert np.all(history == [int(n) for n in jax.tree.leaves(wanted)])
    assert {row["density"] for row in summary["supervised"]} == {0.3, 0.1}
    assert f"Masks: {method}" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["layers"]


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_what_comes_and_goes(method):
    """The smallest weights go; new ones come at random, or by the gradient of all weights."""
    config = get_config(f"mnist_{method}", **{"growth.every": 2, "growth.fraction": 0.5})
    _, members = start(config)
    member = member_of(members, 0)
    gradients = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(3), leaf.shape), member.params
    )
    change = jax.jit(methods.mask_schedule(config, Plan(40, 10, 10)))
    old = kernels(member.masks)
    for step in (1, 3, 30):
        new = kernels(change(member, jnp.int32(step), gradients).masks)
        assert all(np.array_equal(new[name], old[name]) for name in old)
    new = kernels(change(member, jnp.int32(4), gradients).masks)
    again = kernels(change(member, jnp.int32(6), gradients).masks)
    weights, slopes = kernels(member.params), kernels(gradients)
    for name, mask in old.items():
        was, now = mask.astype(bool), new[name].astype(bool)
        fraction = 0.25 * (1 + np.cos(np.pi * 4 / 30))
        count = min(int(fraction * was.sum() + 1e-6), (~was).sum())
        size = np.abs(np.where(was, weights[name], np.inf))
        gone = size <= np.sort(size.ravel())[count - 1] if count else np.zeros_like(was)
        assert now.sum() == was.sum()
        assert np.all(now[was & ~gone])
        came = now & ~(was & ~gone)
        assert came.sum() == count
        if method == "rigl":
            free = ~(was & ~gone)
            threshold = np.sort(np.abs(slopes[name][free]))[-count] if count else 0
            assert np.all(np.abs(slopes[name][came]) >= threshold)
        else:
            # None of those that have just gone, and other ones in another step.
            assert not np.any(came & was)
    if method == "set":
        assert any(np.any(new[name] != again[name]) for name in old)


def test_norms_of_weights_are_regularisers(tmp_path):
    """The loss of each network is its task's and its own norm, without biases."""
    config = get_config(
        "mnist_random", regularisers="l1,l2,cka_sr", coefficients=(0.5,), density=(0.3,),
        seeds=(1,), samples=8, every=1,
    )  # fmt: skip
    runs, members = start(config)
    chosen = stages.training_terms(config)
    assert set(chosen) == {"task", "similarity", "norm"}
    for index, run in enumerate(runs):
        member = member_of(members, index)
        inputs = stages.TermInputs(
            member.params, member.masks, member.context, None, member.key, 0, member.model_state
        )
        weights = np.concatenate([leaf.ravel() for leaf in kernels(member.params).values()])
        expected = {"l1": np.abs(weights).sum(), "l2": (weights**2).sum()}
        value, _ = chosen["norm"](inputs)
        np.testing.assert_allclose(value, 0.5 * expected.get(run.regulariser, 0.0), rtol=1e-5)
    config = get_config("mnist_random", regularisers="l1")
    assert set(stages.training_terms(config)) == {"task", "norm"}


def with_all():
    fields = {"supervised.l1": 0.25, "supervised.label_smoothing": 0.2, "model.dropout": True}
    return get_config("mnist_snip", density=(0.3,), seeds=(1,), regularisers="l2", **fields)


@pytest.mark.slow
def test_a_study_with_an_l1_norm_smoothed_labels_and_dropout(tmp_path):
    """All of them are in the loss of every network, and the numbers stay finite."""
    rows = study.run(with_all(), tmp_path)["supervised"]
    assert {row["regulariser"] for row in rows} == {"none", "l2"}
    assert all(0 <= row["test_accuracy_last"]["mean"] <= 1 for row in rows)
    log = MetricsLog(tmp_path / "supervised.jsonl", "any")
    for name in ("train/task", "train/l1"):
        assert np.all(log.column(name)[1] > 0)


def test_what_all_networks_are_trained_with():
    """An L1 norm and smoothed labels for all, the one that is compared with too."""
    config = with_all()
    _, members = start(get_config("mnist_random", density=(0.3,), seeds=(1,)))
    member = member_of(members, 0)
    batch = (None, jnp.array([0, 2, 1]))
    logits = jax.random.normal(jax.random.key(0), (3, 10))
    inputs = stages.TermInputs(
        member.params, member.masks, member.context, batch, member.key, 0, member.model_state,
        NetworkOutputs(logits, {}),
    )  # fmt: skip
    chosen = stages.training_terms(config)
    weights = np.concatenate([leaf.ravel() for leaf in kernels(member.params).values()])
    np.testing.assert_allclose(chosen["l1"](inputs)[0], 0.25 * np.abs(weights).sum(), rtol=1e-5)
    log = np.asarray(jax.nn.log_softmax(logits), float)
    expected = -np.mean([0.8 * log[i, y] + 0.2 * log[i].mean() for i, y in enumerate((0, 2, 1))])
    np.testing.assert_allclose(chosen["task"](inputs)[0], expected, rtol=1e-5)


# What it brings is seen in `test_masks_change_in_training`.
@pytest.mark.slow
@pytest.mark.usefixtures("narrow", "unrendered")
def test_rigl_sees_the_gradient_of_weights_that_are_not_there(tmp_path, monkeypatch):
    """In the study itself: pruned weights get gradients, and are zero after each step."""
    seen = []
    real = study.make_step

    def make_step(terms, optimizer, **kwargs):
        change = kwargs["after_update"]

        def after_update(member, step, gradients):
            jax.debug.callback(
                lambda params, masks, gradients: seen.append((params, masks, gradients)),
                kernels_of(member.params), member.masks, gradients,
            )  # fmt: skip
            return change(member, step, gradients)

        return real(terms, optimizer, **{**kwargs, "after_update": after_update})

    def kernels_of(params):
        return masks.map_prunable(lambda _, leaf: leaf, params)

    monkeypatch.setattr(study, "make_step", make_step)
    config = get_config(
        "mnist_rigl", density=(0.1,), seeds=(1,), regularisers="l2",
        **{"growth.every": 2, "supervised.max_steps": 6, "supervised.record_every": 6},
    )  # fmt: skip
    study.run(config, tmp_path)
    jax.effects_barrier()
    assert seen
    for params, kept, gradients in seen:
        for name, mask in kernels(kept).items():
            pruned = ~mask.astype(bool)
            assert np.all(kernels(params)[name][pruned] == 0)
            assert np.mean(kernels(gradients)[name][pruned] != 0) > 0.1
