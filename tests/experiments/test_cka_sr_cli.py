"""Configs of the CKA-SR study, and mistakes in them: one line, before any work."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cka_sr_problems import get_config

from experiments import sparse_training_checks, sparse_training_study
from experiments.cli import UserError
from experiments.configs import cka_sr as configs
from ntt_sparse.data import images


def made_data(shape, num_classes, n=2600):
    """As many images as the probes of all configs need."""
    x = np.zeros((n, *shape), np.float32)
    split = images.Split(x, (np.arange(n) % num_classes).astype(np.int32))
    return images.ImageData(
        split, images.Split(x[:0], split.y[:0]), split, num_classes, "made", np.zeros(1), np.ones(1)
    )


SHAPES = {
    "mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "digits": ((8, 8, 1), 10),
}


@pytest.mark.parametrize("name", configs._CONFIGS)
@pytest.mark.parametrize("option", ["", ",smoke"])
def test_every_config_is_valid(name, option):
    sparse_training_checks.check_config(configs.get_config(name + option))


@pytest.mark.parametrize(
    "name", ["mnist_lenet300", "mnist_lenet5_caffe", "table3", "table5", "figure1"]
)
def test_configs_fit_images_of_their_sets(name, monkeypatch):
    """Patterns, stages and sizes, by shapes; one config of each model and number of classes."""
    monkeypatch.setattr(images, "load", lambda name, **options: made_data(*SHAPES[name]))
    setup = sparse_training_study.prepare(configs.get_config(name), None)
    assert setup.module.num_outputs == setup.data.num_classes
    assert len(setup.data.validation.y) == 260


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("mnist_lenet300", 60_000),
        pytest.param("cifar10_resnet20", 50_000, marks=pytest.mark.slow),
    ],
)
def test_configs_fit_real_images(name, n, monkeypatch):
    config = configs.get_config(name)
    try:
        whole = images.load(config.data.name, validation_fraction=0.0)
    except FileNotFoundError as error:
        pytest.skip(f"{config.data.name} is not prepared: {error}")
    assert len(whole.train.y) == n and whole.input_shape == SHAPES[config.data.name][0]
    monkeypatch.setattr(images, "load", lambda name, **options: whole)
    setup = sparse_training_study.prepare(config, None)
    assert (len(setup.data.train.y), len(setup.data.validation.y)) == (0.9 * n, 0.1 * n)
    # total_steps counts a last batch that is not full in each epoch.
    per_epoch = math.ceil(0.9 * n / config.supervised.batch_size)
    assert setup.plan.total_steps == config.supervised.epochs * per_epoch


def test_published_settings():
    table2 = {name: configs.get_config(name) for name in configs._CONFIGS if "table2" in name}
    compared = {(c.samples, c.every) for c in table2.values()}
    assert compared == {(0, 1), (16, 5), (8, 5), (4, 5), (8, 10)}
    for config in table2.values():
        assert len(config.coefficients) == 12 and config.density == (0.05,)
        assert (min(config.coefficients), max(config.coefficients)) == (1e-5, 1e-2)
    sparsities = [1 - density for density in configs.get_config("table5").density]
    np.testing.assert_allclose(sparsities, [0.7, 0.85, 0.9, 0.95, 0.98, 0.998], rtol=1e-12)
    # A sum over pairs of layers beside their mean: one coefficient cannot be right for both.
    assert configs.get_config("table5").coefficients == (1e-4, 1e-3, 1e-2)
    settings = configs.get_config("table5").supervised
    assert (settings.optimizer, settings.learning_rate, settings.epochs) == ("sgd", 0.1, 160)
    assert (settings.weight_decay, settings.batch_size) == (5e-4, 128)
    assert settings.milestones == (0.5, 0.75)


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match="did you mean 'table5'"):
        configs.get_config("tabel5")
    with pytest.raises(ValueError, match="'table5' has no option global: there are smoke"):
        configs.get_config("table5,global")


MISTAKES = [
    ({"regularisers": "cka_sr,cka"}, "config.regularisers is 'cka_sr,cka'"),
    ({"regularisers": "cka_sr,cka_sr"}, "expected different names"),
    ({"coefficients": (1e-3, math.nan)}, "config.coefficients holds nan"),
    ({"coefficients": (-1e-3,)}, "config.coefficients holds -0.001"),
    ({"coefficients": (0.0,)}, "config.coefficients holds 0.0"),
    ({"coefficients": (math.inf,)}, "config.coefficients holds inf"),
    ({"coefficients": (0.1, 0.1)}, "expected different values"),
    ({"coefficients": ()}, "config.coefficients is ()"),
    ({"coefficients": ("abc",)}, "config.coefficients holds 'abc'"),
    ({"density": (1.5,)}, "expected a fraction in (0, 1]"),
    ({"density": (1e-9,)}, "keeps none of"),
    ({"density": (1e-9,), "layer_densities": "snip"}, "keeps none of"),
    ({"seeds": (1, 1)}, "config.seeds"),
    ({"layer_densities": "magnitude"}, "config.layer_densities is 'magnitude'"),
    ({"samples": 65}, "config.samples is 65"),
    ({"samples": 2, "regularisers": "cka_sr"}, "config.samples is 2"),
    ({"samples": 0, "supervised.batch_size": 3}, "config.supervised.batch_size is 3"),
    ({"coefficients": (1e-60,)}, "config.coefficients holds 1e-60"),
    ({"coefficients": (True,)}, "config.coefficients holds True"),
    ({"supervised.milestones": (0.5, 0.5)}, "expected different fractions"),
    ({"stages": ("Dense_0,",)}, "expected patterns of layers"),
    ({"stages": ("Dense_0:input,Dense_1:input",)}, "inputs alone"),
    ({"evaluated": -1}, "config.evaluated is -1"),
    ({"samples": 3}, "config.samples is 3"),
    ({"every": 0}, "config.every is 0"),
    ({"probe": 3}, "config.probe is 3"),
    ({"probe": 145}, "config.probe is 145, there are 144 examples"),
    ({"score_batch_size": 1294, "layer_densities": "grasp"}, "config.score_batch_size is 1294"),
    ({"supervised.milestones": (0.5, 1.0)}, "config.supervised.milestones holds 1.0"),
    ({"supervised.milestones": (0.0,)}, "config.supervised.milestones holds 0.0"),
    ({"supervised.milestones": (math.nan,)}, "config.supervised.milestones holds nan"),
    ({"supervised.milestones": ("abc",)}, "config.supervised.milestones holds abc"),
    ({"supervised.optimizer": "lion"}, "config.supervised.optimizer is 'lion'"),
    ({"supervised.batch_size": 5000}, "batch_size is 5000, there are 1293 examples"),
    ({"stages": ()}, "config.stages is empty"),
    ({"stages": (1,)}, "config.stages"),
    ({"stages": ("Dense_0",)}, "config.stages holds 'Dense_0', which is 1 feature map"),
    ({"stages": ("Dense_0",), "regularisers": "aug_cka_sr"}, "config.stages match 1 layer"),
    ({"stages": ("Dense_0,Conv_0",)}, "pattern 'Conv_0' matches no"),
    ({"model.name": "lenet_300"}, "unknown model 'lenet_300'"),
    ({"model.norm": "batch"}, "unknown keyword of 'lenet_300_100' 'norm'"),
    ({"data.name": "no_such_set"}, "not prepared"),
    ({"supervised.validation_fraction": 0.0001}, "validation"),
]


@pytest.mark.parametrize(("fields", "message"), MISTAKES, ids=lambda v: str(v)[:60])
def test_mistakes_are_one_line_before_any_work(tmp_path, fields, message):
    with pytest.raises(UserError) as raised:
        sparse_training_study.run(get_config(**fields), tmp_path / "w", data_dir="/nowhere")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "w").exists()


def test_images_too_small_to_be_augmented_are_found_before_any_work(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 255, (n, 4, 4)) if name[0] == "x" else np.arange(n) % 10
        for part, n in (("train", 300), ("test", 20))
        for name in (f"x_{part}", f"y_{part}")
    }
    np.savez(tmp_path / "made.npz", **arrays)
    fields = {"data.name": str(tmp_path / "made.npz"), "data.augment": True}
    with pytest.raises(UserError, match=r"config\.data\.augment"):
        sparse_training_study.run(get_config(**fields), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_the_command_line_refuses_what_is_no_number(tmp_path):
    workdir = tmp_path / "w"
    result = subprocess.run(
        [sys.executable, "-m", "experiments.cka_sr", f"--workdir={workdir}",
         "--config.coefficients=abc"],
        cwd=Path(__file__).parents[2], env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert lines[0].startswith("error: config.coefficients holds 'abc'")
    assert not workdir.exists()
