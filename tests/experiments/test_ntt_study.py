"""The study's own parts: configs, members, mask schedule, summary."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ntt_checks, ntt_members, ntt_report, ntt_stages, ntt_study
from experiments.configs import ntt as configs
from ntt_sparse import models
from ntt_sparse.data import images
from ntt_sparse.objectives.ntt import ntt_loss
from ntt_sparse.pruning import masks
from ntt_sparse.training.metrics import MetricsLog
from ntt_sparse.training.state import create_member
from ntt_sparse.training.step import TermInputs


@pytest.mark.parametrize("name", configs._CONFIGS)
@pytest.mark.parametrize("option", ["", ",smoke", ",global,smoke"])
def test_every_config_is_valid(name, option):
    ntt_checks.check_config(configs.get_config(name + option))


def test_published_settings():
    """Table 2 of the paper, and B.3."""
    mnist, caffe = configs.get_config("mnist_lenet300"), configs.get_config("mnist_lenet5_caffe")
    conv4 = configs.get_config("cifar10_conv4")
    for config, batch, l2 in ((mnist, 64, 1e-4), (caffe, 64, 1e-5), (conv4, 32, 1e-8)):
        settings = config.transfer
        assert (settings.epochs, settings.learning_rate, settings.refresh_every) == (20, 5e-4, 100)
        assert (settings.batch_size, settings.kernel_weight) == (batch, 1e-3)
        assert settings.l2_weight == l2
        assert config.supervised.learning_rate == 1e-3
    assert (mnist.supervised.epochs, conv4.supervised.epochs) == (50, 600)
    # C.2: global pruning starts from Logit-SNIP.
    glob = configs.get_config("mnist_lenet300,global")
    assert (glob.scope, glob.transfer.initial_mask) == ("global", "logit_snip")
    assert (mnist.scope, mnist.transfer.initial_mask) == ("layer", "magnitude")
    assert conv4.snip_batch_size == 128 and mnist.snip_batch_size == 100


@pytest.mark.parametrize(
    ("distance", "drawn"), [("full", False), ("trace", False), ("sketch", True)]
)
def test_held_out_losses_are_those_of_the_full_kernel(distance, drawn):
    """Whatever is trained with: a stand-in that is drawn is drawn anew in each step."""
    config = configs.get_config()
    config.transfer.distance = distance
    weights = [jax.random.normal(jax.random.key(i), (6, 3)) for i in range(2)]
    kept = {"w": weights[0] > 0}
    x = jax.random.normal(jax.random.key(2), (8, 6))

    def network(params, x):
        return jnp.tanh(x @ params["w"])

    optimizer = ntt_stages.make_optimizer(config.transfer)
    context = {"teacher": {"w": weights[1]}}
    member = create_member({"w": weights[0]}, kept, optimizer, jax.random.key(0), context)
    term = ntt_stages.transfer_terms(config, network)["ntt"]
    values = [
        term(TermInputs(member.params, kept, context, x, jax.random.key(i)))[1]["kernel"]
        for i in range(2)
    ]
    assert (values[0] != values[1]) == drawn
    held_out = ntt_stages.transfer_evaluation(config, network)(member, x)
    expected = ntt_loss(
        network, member.params, kept, context["teacher"], x,
        kernel_weight=config.transfer.kernel_weight, l2_weight=config.transfer.l2_weight,
    )  # fmt: skip
    np.testing.assert_allclose(held_out["validation/kernel"], expected[1].kernel, rtol=1e-6)
    np.testing.assert_allclose(held_out["validation/loss"], expected[0], rtol=1e-6)


def test_resnets_need_a_normalisation_by_example():
    config = configs.get_config("cifar10_resnet20")
    assert config.transfer.distance == "sketch"
    for name, norm in (("resnet20", ""), ("lenet_300_100", "group")):
        config.model.name, config.model.norm = name, norm
        with pytest.raises(ValueError, match="ResNets need 'group' or 'none'"):
            ntt_checks.check_config(config)


@pytest.mark.parametrize(
    ("total", "every", "last", "count"),
    [(18_720, 100, 18_600, 186), (200, 100, None, 0), (100, 10**9, None, 0)],
)
def test_refresh_schedule(total, every, last, count):
    """Golden: 186 refreshes in the published MNIST run, none when two periods are all."""
    params = {"w": jnp.array([[3.0, 2.0, 1.0]])}
    member = create_member(
        params,
        {"w": jnp.array([[False, False, True]])},
        ntt_stages.make_optimizer(configs.get_config().transfer),
        jax.random.key(0),
        {"counts": {"w": 1}},
    )
    after_update = jax.jit(ntt_stages.refresh_masks(every, total))

    def refreshed(step):
        mask = after_update(member, jnp.int32(step), None).masks["w"][0].tolist()
        assert mask in ([False, False, True], [True, False, False])
        return mask == [True, False, False]

    steps = [step for step in range(every, total + 1, every) if refreshed(step)]
    assert len(steps) == count
    assert (steps[-1] if steps else None) == last
    assert not refreshed(min(every, total) + 1)


def test_the_initial_mask_can_stay():
    after_update = ntt_stages.refresh_masks(0, 10)
    assert after_update("member", 4, None) == "member"


def test_an_empty_layer_of_any_method_is_a_warning(study, caplog):
    config, setup = study
    runs = [ntt_members.Run("ntt", 0.0003, 1)]
    students = ntt_members.transfer_members(
        config, setup.module, setup.input_shape, setup.transfer.train.x, runs
    )
    ntt_members.log_densities(runs, students)
    assert "ntt-d0.0003-s1: layers without any weight: Dense_2/kernel" in caplog.text


@pytest.fixture(scope="module")
def study():
    config = configs.get_config("digits_lenet300,smoke")
    return config, ntt_study.prepare(config, None)


def test_members_of_a_seed_start_from_the_same_draw(study):
    config, setup = study
    runs = ntt_members.transfer_runs(config)
    students = ntt_members.transfer_members(
        config, setup.module, setup.input_shape, setup.transfer.train.x, runs
    )
    runs = ntt_members.supervised_runs(config)
    members = ntt_members.supervised_members(
        config, setup.module, setup.input_shape, setup.supervised.train, runs, students
    )
    members = members._replace(key=jax.random.key_data(members.key))
    members = jax.tree.map(np.asarray, members)
    by_run = {run: jax.tree.map(lambda leaf, i=i: leaf[i], members) for i, run in enumerate(runs)}
    init = jax.jit(lambda key: models.init(setup.module, key, setup.input_shape))
    dense_of = {seed: init(jax.random.key(seed)) for seed in config.seeds}
    for run, member in by_run.items():
        dense = dense_of[run.seed]
        density = masks.density(member.masks)
        layers = masks.layer_densities(member.masks)
        total = sum(row.total for row in layers.values())
        layerwise = {name: round(run.density * row.total) for name, row in layers.items()}
        expected_kept = (
            round(run.density * total)
            if run.method in ("snip", "logit_snip")
            else sum(layerwise.values())
        )
        assert round(density * total) == expected_kept, run
        if run.method not in ("dense", "snip", "logit_snip"):
            assert {name: row.kept for name, row in layers.items()} == layerwise
        scale = {name: 1.0 for name in layers}
        if run.method == "random_scaled":
            scale = {name: np.sqrt(row.total / row.kept) for name, row in layers.items()}
        for name, leaf in masks.named_leaves(member.params).items():
            start = np.asarray(masks.named_leaves(dense)[name])
            if name in layers:
                mask = np.asarray(masks.named_leaves(member.masks)[name])
                start = np.where(mask, start * scale[name], 0)
            np.testing.assert_allclose(leaf, start, rtol=1e-6)


def test_random_masks_differ_between_seeds_and_agree_between_methods(study):
    config, setup = study
    runs = [
        ntt_members.Run(method, 0.05, seed)
        for method in ("random", "random_scaled")
        for seed in (1, 2)
    ]
    members = ntt_members.supervised_members(
        config, setup.module, setup.input_shape, setup.supervised.train, runs, None
    )
    first, second, scaled, _ = members.masks["Dense_0"]["kernel"]
    np.testing.assert_array_equal(first, scaled)
    assert np.mean(np.asarray(first) != np.asarray(second)) > 0.05


def test_test_data_never_chooses(tmp_path):
    """The best step is that of validation accuracy, even where test accuracy disagrees."""
    config = configs.get_config("digits_lenet300")
    with config.unlocked():
        config.methods, config.density, config.seeds = "random", (0.1,), (1, 2)
    log = MetricsLog(tmp_path / "supervised.jsonl", "supervised")
    validation = [[0.1, 0.1], [0.9, 0.5], [0.2, 0.8]]
    test = [[0.99, 0.99], [0.3, 0.4], [0.6, 0.5]]
    for step, (v, t) in enumerate(zip(validation, test, strict=True)):
        values = {"validation/accuracy": np.array(v), "test/accuracy": np.array(t)}
        log.write(step, values | {"train/task/accuracy": np.zeros(2)})
    summary = ntt_report.write(config, tmp_path)
    (row,) = summary["supervised"]
    assert row["test_accuracy_best_validation"]["values"] == [0.3, 0.5]
    assert row["best_validation_step"] == [1, 2]
    assert row["test_accuracy_last"]["mean"] == pytest.approx(0.55)
    assert row["test_accuracy_last"]["std"] == pytest.approx(np.std([0.6, 0.5], ddof=1))
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    for name in ("accuracy_against_density", "accuracy_over_training_d0.1"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 1000
        assert (tmp_path / "figures" / f"{name}.pdf").stat().st_size > 1000


def test_early_stop_waits_for_every_member():
    def stops(*accuracies):
        records = [
            {"step": step, "validation/accuracy": list(a)} for step, a in enumerate(accuracies)
        ]
        return ntt_study.early_stopping(2).all_stopped(records)

    start, rising, stuck = (0, 0), (0.1, 0.5), (0.1, 0.4)
    assert ntt_study.early_stopping(0) is None
    assert not ntt_study.early_stopping(2).alone
    assert not stops(start, stuck, stuck)
    assert stops(start, rising, stuck, stuck)
    assert not stops(start, stuck, stuck, rising)


def test_two_classes_of_the_output_study():
    config = configs.get_config("outputs_digits_lenet300")
    setup = ntt_study.prepare(config, None)
    assert len(setup.transfer.train.y) == 200 and setup.transfer.num_classes == 2
    assert np.bincount(setup.transfer.train.y).tolist() == [100, 100]
    assert setup.transfer.validation is setup.transfer.train
    assert setup.transfer_plan.steps_per_epoch == 1
    whole = images.load("digits", validation_fraction=0.0)
    zeros = whole.train.x[whole.train.y == 0][:100]
    found = setup.transfer.train.x[setup.transfer.train.y == 0]
    assert {image.tobytes() for image in found} == {image.tobytes() for image in zeros}
