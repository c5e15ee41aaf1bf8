"""Settings of sparse training: configs, images and weights of files, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cka_sr_problems import tiny_mlp, tiny_split
from flax import linen as nn
from PIL import Image
from sparse_training_problems import drawn, get_config, start

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
from ntt_sparse.training.checkpoint import CheckpointError
from ntt_sparse.training.loop import DivergenceError, Plan


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
