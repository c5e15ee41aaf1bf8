"""Methods of sparse training: masks at the start and in training, and what is refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cka_sr_problems import member_of, tiny_mlp, tiny_split
from flax import linen as nn
from PIL import Image
from sparse_training_problems import get_config, kernels, largest, start

from experiments import sparse_training_checks as checks
from experiments import sparse_training_masks as methods
from experiments import sparse_training_members as sparse_members
from experiments import sparse_training_report as report
from experiments import sparse_training_stages as stages
from experiments import sparse_training_study as study
from experiments import sparse_training_transform as transform
from experiments.cli import UserError
from experiments.configs import sparse_training as configs
from ntt_sparse.data.images import ImageData, Split
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.pruning import densities, masks
from ntt_sparse.training.checkpoint import CheckpointError
from ntt_sparse.training.loop import DivergenceError, Plan
from ntt_sparse.training.metrics import MetricsLog
from ntt_sparse.training.terms import NetworkOutputs


@functools.partial(jax.jit, static_argnums=0)
def drawn(module, seed):
    return module.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))["params"]


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


@pytest.mark.parametrize("name", configs._CONFIGS)
def test_every_config_is_valid(name):
    """By itself and in its smoke form, whose 12 steps are enough for each schedule."""
    checks.check_config(configs.get_config(name))
    smoke = configs.get_config(f"{name},smoke")
    checks.check_config(smoke)
    plan = Plan(smoke.supervised.max_steps, 100, 6)
    changes = methods.mask_schedule(smoke, plan) is not None
    assert changes == (smoke.method in ("set", "rigl", "gradual"))
    if smoke.method == "dlth":
        assert transform.plan(smoke, 1000).total_steps < 60


@pytest.mark.parametrize(
    "network",
    [
        # Of the kind of ResNet-32.
        pytest.param(name, marks=[pytest.mark.slow] * (name == "resnet56"))
        for name in configs._SMALL_IMAGES
    ],
)
def test_every_network_has_the_layers_that_are_compared(network):
    """By shapes alone: on images of CIFAR, with more than one map in each stage."""
    blank = Split(np.zeros((300, 32, 32, 3), np.float32), np.zeros(300, np.int32))
    data = ImageData(blank, blank, blank, 10, "blank", np.zeros(3), np.ones(3))
    config = configs.get_config(f"{network}_random")
    module = study.make_model(config, data.num_classes)
    checks.check_sizes(config, module, data, Plan(10, 2, 2))

    def features(key, x):
        _, found = stages.capture(module, stages.all_patterns(config))(module.init(key, x), x)
        return stages.select(found, stages.stage_patterns(config))

    maps = jax.eval_shape(features, jax.random.key(0), blank.x[:2])
    sides = [[leaf.shape[1] for leaf in stage] for stage in maps]
    # The input of a stage is of the stage before, but for the first.
    halved = [side for stage in sides for side in stage[-1:]]
    assert halved == [32 // 2**i for i in range(len(sides))]
    counts = {"vgg19": [2, 2, 4, 4, 4], "resnet18": [3] * 4, "resnet50": [4, 5, 7, 4]}
    blocks = {"cifar10": 4, "resnet32": 6, "resnet56": 10}
    assert [len(s) for s in sides] == (counts.get(network) or [blocks[network]] * 3)


def test_published_numbers_are_of_random_masks_alone():
    for method in configs._METHODS:
        rows = report.published(configs.get_config(f"cifar10_{method}"))
        assert bool(rows) == (method == "random")
    for network, gain in (("resnet18", 0.71), ("resnet50", 1.55)):
        none, cka_sr = report.published(configs.get_config(f"pretraining_{network}"))
        assert none["density"] == cka_sr["density"] == 1.0
        difference = 100 * (cka_sr["test_accuracy"] - none["test_accuracy"])
        assert difference == pytest.approx(gain)


def test_what_scores_masks():
    """The first images, or the first of each class."""
    train = tiny_split()
    x, y = sparse_members.score_batch(get_config("mnist_snip", score_batch_size=7), train)
    np.testing.assert_array_equal(x, train.x[:7])
    np.testing.assert_array_equal(y, train.y[:7])
    x, y = sparse_members.score_batch(get_config("mnist_snip", score_per_class=2), train)
    labels = np.unique(train.y)
    assert np.asarray(y).tolist() == np.repeat(labels, 2).tolist()
    for label in labels:
        first = [index for index, each in enumerate(train.y) if each == label][:2]
        np.testing.assert_array_equal(x[y == label], train.x[first])


def test_scores_that_are_no_numbers_are_refused():
    """Not even under `jit`, in one round or in many, are masks made of them."""

    class Broken(LeNet):
        @nn.compact
        def __call__(self, x, *, train=False):
            return jnp.log(-jnp.ones(())) * nn.Dense(10)(x.reshape(len(x), -1))

    for rounds in (1, 3):
        with pytest.raises(DivergenceError, match="NaN at initialisation"):
            start(get_config("mnist_snip", rounds=rounds), Broken())


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mnist_rigl", {"growth.every": 100}, "connections would never be replaced"),
        ("mnist_set", {"growth.end": 0.0}, "connections would never be replaced"),
        ("mnist_gradual", {"gradual.start": 0.6}, "expected start before end"),
        ("mnist_random", {"density": (5e-5,)}, "less than one weight of"),
        ("mnist_snip", {"density": (1e-7,)}, "keeps none of"),
        ("mnist_snip", {"rounds": 0}, "config.rounds is 0"),
        ("mnist_set", {"rounds": 5}, "rounds are of magnitude, snip"),
        ("mnist_grasp", {"layer_densities": "snip"}, "expected global or uniform or erk"),
        ("mnist_rigl", {"layer_densities": "global"}, "expected erk or uniform or snip or grasp"),
        ("mnist_lth", {"lth.rewind": 1.0}, "config.lth.rewind is 1.0"),
        ("mnist_lth", {"lth.rewind": 0.97}, "which is step 12 of 12"),
        ("mnist_lth", {"lth.rewind": 0.01}, "which is step 0 of 12"),
        ("mnist_lth", {"density": (True, 0.5)}, "config.density holds True"),
        ("mnist_dlth", {"transform.batch_size": 5000}, "config.transform.batch_size is 5000"),
        ("mnist_dlth", {"transform.batch_size": 7}, "config.transform.batch_size, which is 7"),
        ("mnist_l0", {"l0.batch_size": 5000}, "config.l0.batch_size is 5000, there are"),
        ("mnist_l0", {"l0.batch_size": 7}, "config.l0.batch_size, which is 7"),
        ("mnist_l0", {"l0.batch_size": 2, "samples": 0}, "config.l0.batch_size is 2, expected 3"),
        ("mnist_dlth", {"transform.increment": 1e-12}, "config.transform: total_steps is"),
        ("mnist_synflow", {"model.norm": "group"}, "takes out what flows"),
        ("mnist_lth", {"density": (0.1, 0.3)}, "expected falling densities"),
        ("mnist_random", {"method": "lottery"}, "config.method is 'lottery'"),
        ("mnist_snip", {"score_batch_size": 10**6}, "there are"),
        ("mnist_snip", {"score_per_class": 10**6}, "examples of some class"),
    ],
)
def test_bad_settings(tmp_path, name, fields, message):
    config = get_config(name, **fields)
    with pytest.raises(Exception, match=message) as error:
        study.run(config, tmp_path / "w")
    assert type(error.value).__name__ == "UserError" and "\n" not in str(error.value)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_images_of_a_folder(tmp_path):
    """The same study with files that are read when they are needed."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 8)):
        for label in range(3):
            folder = tmp_path / "made" / split / f"n{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 60, (12, 10, 3)) + 90 * np.eye(3, dtype=int)[label]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    fields = {
        "data.name": str(tmp_path / "made"), "data.size": 8, "data.augment": True,
        "score_batch_size": 32, "probe": 8, "evaluated": 12, "density": (0.3,),
        "supervised.batch_size": 16, "supervised.max_steps": 24,
    }  # fmt: skip
    config = get_config("mnist_snip", **fields)
    rows = study.run(config, tmp_path / "run")["supervised"]
    assert all(row["test_accuracy_last"]["mean"] > 0.8 for row in rows)
    assert all(np.sum(row["kept"][0]) == round(0.3 * (192 * 300 + 300 * 100 + 300)) for row in rows)
    with pytest.raises(UserError, match=r"config\.evaluated is 0, expected how many images"):
        study.run(get_config("mnist_snip", **{**fields, "evaluated": 0}), tmp_path / "refused")
    # Other files are other data: their checkpoints are not those.
    (tmp_path / "made" / "train" / "n0" / "0.png").unlink()
    with pytest.raises(CheckpointError):
        study.run(config, tmp_path / "run")


def test_every_seed_starts_from_the_weights_of_a_file(monkeypatch, tmp_path):
    module = tiny_mlp()
    given = {"params": drawn(module, 7)}
    asked = []

    def load(path, network):
        asked.append((path, network))
        return dict(given)

    monkeypatch.setattr(sparse_members, "load_resnet", load)
    config = get_config("mnist_random", **{"model.weights": "made.safetensors"})
    _, members = start(config, module)
    assert set(asked) == {("made.safetensors", module)}
    kernel, kept = (
        np.asarray(tree["Dense_0"]["kernel"]) for tree in (members.params, members.masks)
    )
    expected = np.asarray(given["params"]["Dense_0"]["kernel"])
    np.testing.assert_array_equal(kernel, np.where(kept, expected, 0))
    assert np.any(kept[0] != kept[-1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist_random", "config.model.weights is given for 'lenet_300_100'"),
        ("resnet18_random", "there is no file .*nowhere.safetensors"),
    ],
)
def test_weights_that_cannot_be_loaded(name, message, tmp_path):
    fields = {"model.weights": str(tmp_path / "nowhere.safetensors"), "data.augment": False}
    with pytest.raises(UserError, match=message):
        study.run(get_config(name, **fields), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_the_learning_rate_rises_at_first():
    config = get_config(
        "mnist_random", **{
            "supervised.optimizer": "sgd", "supervised.learning_rate": 0.8,
            "supervised.warmup": 0.2, "supervised.milestones": (0.5,),
        },
    )  # fmt: skip
    checks.check_config(config)
    whole = stages.decayed_rate(config.supervised, 20)
    rates = [float(stages.warmed_up(whole, 4)(count)) for count in range(20)]
    np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 0.8], rtol=1e-6)
    np.testing.assert_allclose(rates[9:12], [0.8, 0.08, 0.08], rtol=1e-6)
    # The first step of the optimiser goes by it.
    params = {"w": jnp.ones((1, 1))}
    optimizer = stages.make_optimizer(config, total_steps=20)
    updates, _ = optimizer.update(
        params, optimizer.init(params), params, masks={"w": jnp.ones((1, 1), bool)}
    )
    # Nesterov momentum: one and nine tenths of the gradient.
    np.testing.assert_allclose(updates["w"], -0.2 * 1.9, rtol=1e-6)
