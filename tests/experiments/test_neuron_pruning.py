"""Neuron pruning: networks that get smaller, criteria, stopping, report and mistakes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import neuron_pruning_members as members_of
from experiments import neuron_pruning_report as report
from experiments import neuron_pruning_study as study
from experiments.cli import UserError
from experiments.configs import neuron_pruning as configs
from experiments.neuron_pruning_checks import check_config
from experiments.neuron_pruning_members import Run
from experiments.neuron_pruning_orders import CRITERIA, decide, silenced
from experiments.neuron_pruning_thresholds import without_each
from ntt_sparse.pruning import neurons
from ntt_sparse.training.export import load_network

DIGITS = {"data.name": "digits", "data.validation_fraction": 0.2}


def get_config(name="iterative,smoke", **fields):
    config = configs.get_config(name)
    with config.unlocked():
        config.update_from_flattened_dict({**DIGITS, **fields})
    return config


def outputs(config, network, x, kept=None):
    module = study.own_module(network, 10)
    return module.apply({"params": silenced(network.params, kept or {})}, x)


def whole_network(config, name, input_shape):
    return members_of.start(config, name, 10, input_shape)[0]


# Networks that get smaller


@pytest.mark.variants(1)
@pytest.mark.parametrize(("name", "shape"), [("9-7-5", (3, 3, 1)), ("lenet5_caffe", (16, 16, 1))])
def test_without_neurons_a_network_is_the_one_whose_neurons_are_silent(name, shape):
    config = get_config(networks=name, seeds=(1,))
    network = whole_network(config, name, shape)
    rng = np.random.default_rng(0)
    removed = {
        layer: rng.permutation(len(units))[: len(units) // 3]
        for layer, units in network.units.items()
    }
    small = members_of.without(config, network, removed, 10, shape)
    kept = {
        layer: jnp.asarray(~np.isin(units, removed[layer]))
        for layer, units in network.units.items()
    }
    x = jnp.asarray(rng.normal(size=(6, *shape)), jnp.float32)
    expected = outputs(config, network, x, kept)
    np.testing.assert_allclose(outputs(config, small, x), expected, rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(expected - outputs(config, network, x))) > 1e-3
    for layer, units in small.units.items():
        assert units.tolist() == np.flatnonzero(kept[layer]).tolist()
    # Among zeros in their places, or at the front of a wider network, they are the same.
    run = [Run("l1", 0.5, 1)]
    for compact in (True, False):
        placed = get_config(networks=name, seeds=(1,), compact=compact)
        wide = small if compact else network
        members, widths = members_of.make_members(placed, name, [small, wide][:1], run, 1)
        assert list(widths.values()) == [len(units) for units in wide.units.values()]
        (again,) = members_of.networks_of(members)
        for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(small), strict=True):
            np.testing.assert_array_equal(one, two)
        embedded = jax.tree.map(lambda leaf: leaf[0], members.params)
        module = members_of.make_module(widths, 10, dropout=False)
        np.testing.assert_allclose(
            module.apply({"params": embedded}, x), expected, rtol=1e-5, atol=1e-5
        )


def test_neurons_that_nothing_reads_go_as_well():
    config = get_config(networks="9-7", seeds=(1,))
    network = whole_network(config, "9-7", (2, 2, 1))
    params = jax.tree.map(jnp.asarray, network.params)
    params["Dense_1"]["kernel"] = params["Dense_1"]["kernel"].at[4].set(0)
    small = members_of.without(
        config, network._replace(params=params), {"Dense_0": np.array([2])}, 10, (2, 2, 1)
    )
    assert small.units["Dense_0"].tolist() == [0, 1, 3, 5, 6, 7, 8]
    assert small.params["Dense_0"]["kernel"].shape == (4, 7)


def test_channels_of_convolutions_are_chosen_by_their_maps():
    config = get_config(networks="lenet5_caffe", seeds=(1,))
    network = whole_network(config, "lenet5_caffe", (16, 16, 1))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(12, 16, 16, 1)), jnp.float32)
    module = study.own_module(network, 10)
    decision = decide(config, module, network, Run("cka", 0.5, 1), 0.2, x, 1)
    assert {name: len(places) for name, places in decision.removed.items()} == {
        "Conv_0": 4, "Conv_1": 10, "Dense_0": 100
    }  # fmt: skip
    kernel, bias = network.params["Conv_0"]["kernel"], network.params["Conv_0"]["bias"]
    maps = (
        jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        + bias
    )
    order, similarity = neurons.cka_prune_curve(maps, 4)
    assert decision.removed["Conv_0"].tolist() == order.tolist()
    assert decision.similarity["Conv_0"] == pytest.approx(float(similarity[-1]), rel=1e-5)


def test_networks_of_different_widths_are_members_of_the_widest():
    config = get_config(networks="9-7", seeds=(1, 2))
    one, two = (
        members_of.without(config, network, removed, 10, (2, 2, 1))
        for network, removed in zip(
            members_of.start(config, "9-7", 10, (2, 2, 1)),
            (
                {"Dense_0": np.array([1, 4]), "Dense_1": np.array([0])},
                {"Dense_0": np.array([3]), "Dense_1": np.array([2, 3, 5])},
            ),
            strict=True,
        )
    )
    runs = [Run("l1", 0.5, 1), Run("l1", 0.5, 2)]
    members, widths = members_of.make_members(config, "9-7", [one, two], runs, 1)
    assert widths == {"Dense_0": 8, "Dense_1": 6}
    assert members.context["units"]["Dense_1"].tolist() == [
        [1, 2, 3, 4, 5, 6], [0, 1, 4, 6, -1, -1]
    ]  # fmt: skip
    for network, again in zip((one, two), members_of.networks_of(members), strict=True):
        for a, b in zip(jax.tree.leaves(network), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(a, b)
    kept = np.asarray(members.masks["Dense_1"]["kernel"][1])
    assert kept.sum() == 8 * 4


# Whole studies


# All but one, which is in a study below: each compiles programs of its own for each width.
STUDIED = [name for name in CRITERIA if name != "cka_oneshot"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("neurons") / "work"
    config = get_config(criteria=",".join(STUDIED), **{"training.patience": 1})
    return config, workdir, study.run(config, workdir)


def test_every_criterion_prunes_the_same_number_and_measures_the_rest(finished):
    _, workdir, summary = finished
    (group,) = summary["groups"]
    assert [row["criteria"]["cka"]["left"] for row in group["iterations"]] == [
        {"Dense_0": 16, "Dense_1": 12}, {"Dense_0": 10, "Dense_1": 7}, {"Dense_0": 6, "Dense_1": 4}
    ]  # fmt: skip
    last = group["iterations"][-1]["criteria"]
    assert list(last) == STUDIED
    # What CKA keeps is at least what others do, where all prune the same networks.
    first = group["iterations"][1]["criteria"]
    for name in ("l1", "random"):
        for layer, value in first[name]["similarity"].items():
            assert value <= first["cka"]["similarity"][layer] + 1e-3
    assert first["cka_sequential"]["similarity"]["Dense_0"] == pytest.approx(
        first["cka"]["similarity"]["Dense_0"]
    )
    for name in STUDIED:
        params, *_ = load_network(
            workdir / "networks" / "16-12-r0.4-i02" / f"{name}-p0.5-s2.safetensors"
        )
        assert params["Dense_1"]["kernel"].shape == (6, 4)
    assert (workdir / "figures" / "accuracy_16-12_p0.5_r0.4.png").exists()


def test_neurons_that_went_are_those_that_the_criterion_names(finished):
    config, workdir, _ = finished
    whole = json.loads((workdir / "16-12-whole.json").read_text())["networks"]
    found = json.loads((workdir / "16-12-r0.4-i01.json").read_text())["networks"]
    params, *_ = load_network(workdir / "networks" / "16-12-whole" / "dense-p0.5-s1.safetensors")
    assert len(whole) == 2
    setup = study.prepare(config, None)
    images = study.sample(config, setup, 1, 1)
    assert images.shape == (64, 8, 8, 1)
    hidden = np.asarray(images).reshape(64, -1) @ params["Dense_0"]["kernel"]
    hidden = hidden + params["Dense_0"]["bias"]
    by_name = {(each["criterion"], each["seed"]): each["removed"] for each in found}
    assert by_name["cka", 1]["Dense_0"] == neurons.cka_prune_order(hidden, 6).tolist()
    norms = np.abs(params["Dense_1"]["kernel"]).sum(0)
    assert by_name["l1", 1]["Dense_1"] == np.argsort(norms)[:5].tolist()
    # A later iteration names neurons by their places in the whole network.
    later = json.loads((workdir / "16-12-r0.4-i02.json").read_text())["networks"]
    for before, after in zip(found, later, strict=True):
        for layer in ("Dense_0", "Dense_1"):
            assert not set(before["removed"][layer]) & set(after["removed"][layer])


def test_agreement_is_counted_per_neuron(finished):
    _, workdir, summary = finished
    sets = {"cka": [set(), set()], "l1": [set(), set()]}
    for index in (1, 2):
        found = json.loads((workdir / f"16-12-r0.4-i0{index}.json").read_text())["networks"]
        now = {}
        for each in found:
            if each["criterion"] in sets:
                units = {(layer, u) for layer, all_ in each["removed"].items() for u in all_}
                now[each["criterion"], each["seed"]] = units
                sets[each["criterion"]][each["seed"] - 1] |= units
        cell = summary["groups"][0]["iterations"][index]["criteria"]["cka"]
        for field, one, two in (
            ("agreement", [now["cka", s] for s in (1, 2)], [now["l1", s] for s in (1, 2)]),
            ("cumulative_agreement", sets["cka"], sets["l1"]),
        ):
            shares = [len(a & b) / len(a) for a, b in zip(one, two, strict=True)]
            assert cell[field]["values"] == pytest.approx(shares)


def test_a_run_goes_on_and_a_finished_one_only_reports_again(finished, tmp_path):
    config, workdir, summary = finished
    (workdir / "16-12-r0.4-i02.json").unlink()
    (workdir / "summary.json").unlink()
    assert study.run(config, workdir) == summary


@pytest.mark.slow
@pytest.mark.usefixtures("unrendered")
def test_zeros_in_place_of_neurons_give_the_same_networks(finished, tmp_path):
    _, workdir, summary = finished
    zeros = get_config(criteria="cka_sequential,l1", compact=False, **{"training.patience": 1})
    other = study.run(zeros, tmp_path / "work")
    for index in (1, 2):
        one, two = (
            json.loads((path / f"16-12-r0.4-i0{index}.json").read_text())["networks"]
            for path in (workdir, tmp_path / "work")
        )
        one = [each for each in one if each["criterion"] in zeros.criteria.split(",")]
        for a, b in zip(one, two, strict=True):
            assert a["removed"] == b["removed"]
            assert a["widths"] == b["widths"]
            assert a["test"] == pytest.approx(b["test"], abs=2 / 360)
    assert len(other["groups"]) == len(summary["groups"])


@pytest.mark.slow
@pytest.mark.parametrize("amount", ["total", "threshold"])
@pytest.mark.usefixtures("unrendered")
def test_studies_of_layers_that_share_a_similarity(amount, tmp_path):
    names = ["cka" if amount == "threshold" else "cka_oneshot", "l1"]
    config = get_config(
        amount=amount,
        threshold=0.97,
        iterations=2,
        activations="after",
        seeds=(1,),
        criteria=",".join(names),
    )
    summary = study.run(config, tmp_path / "work")
    (group,) = summary["groups"]
    for name in names:
        cell = group["iterations"][1]["criteria"][name]
        left = sum(cell["left"].values())
        if amount == "total":
            assert left == 28 - round(0.4 * 28)
        else:
            assert min(cell["similarity"].values()) >= 0.97
            assert 2 <= left < 28


@pytest.mark.parametrize("amount", ["total", "threshold"])
def test_layers_can_share_a_similarity(amount):
    """As many neurons as asked for go of both layers together, or all that are alike enough."""
    config = get_config(networks="16-12", seeds=(1,), amount=amount, threshold=0.97)
    network = whole_network(config, "16-12", (8, 8, 1))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8, 8, 1)), jnp.float32)
    module = study.own_module(network, 10)
    for name in ("cka_oneshot", "l1"):
        decision = decide(config, module, network, Run(name, 0.5, 1), 0.4, x, 0)
        gone = {layer: len(units) for layer, units in decision.removed.items()}
        if amount == "total":
            assert sum(gone.values()) == round(0.4 * 28)
        else:
            assert min(decision.similarity.values()) >= 0.97
        assert 0 < min(gone.values()) and gone["Dense_0"] < 16 and gone["Dense_1"] < 12


def test_sequential_pruning_differs_in_later_layers_alone():
    config = get_config(networks="16-12-8", seeds=(1,))
    network = whole_network(config, "16-12-8", (8, 8, 1))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8, 8, 1)), jnp.float32)
    module = study.own_module(network, 10)
    one, two = (
        decide(config, module, network, Run(name, 0.5, 1), 0.4, x, 1).removed
        for name in ("cka", "cka_sequential")
    )
    assert one["Dense_0"].tolist() == two["Dense_0"].tolist()
    assert any(one[name].tolist() != two[name].tolist() for name in ("Dense_1", "Dense_2"))


def test_similarity_without_each_neuron_alone():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(30, 6)), jnp.float32)
    values = without_each(x, jnp.array([4, 0]))
    for value, index in zip(values, (4, 0), strict=True):
        assert value == pytest.approx(float(neurons.similarity_along(x, np.array([index]))[0]))


def test_pixels_go_from_zero_to_one():
    setup = study.prepare(get_config(), None)
    assert float(np.min(setup.data.train.x)) == 0
    assert float(np.max(setup.data.train.x)) == 1
    assert np.ptp(setup.data.test.x) <= 1.0001
    standardised = study.prepare(get_config(**{"data.pixels": "standardised"}), None)
    assert abs(float(np.mean(standardised.data.train.x))) < 0.05


def test_published_numbers_stand_beside_the_setting_they_are_of():
    config, group = configs.get_config(), {"network": "512-512", "dropout": 0.5, "rate": 0.2}
    found = report._published(config, group)
    assert found[0] == "98.32, 98.33" and found[14] == "89.58, 88.23, 0.008"
    assert len(found) == 15
    assert not report._published(config, group | {"rate": 0.4})
    config.training.epochs = 1
    assert not report._published(config, group)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"networks": "512-0"}, "config.networks is '512-0'"),
        ({"networks": "8,8"}, "expected different widths"),
        ({"criteria": "cka,l2"}, "config.criteria is 'cka,l2'"),
        ({"dropouts": (1.0,)}, "config.dropouts holds 1.0"),
        ({"rates": (0.0,)}, "config.rates holds 0.0"),
        ({"threshold": 0.0}, "config.threshold is 0.0"),
        ({"data.validation_fraction": 0.0}, "config.data.validation_fraction is 0.0"),
        ({"amount": "total", "criteria": "cka_sequential"}, "no meaning for 'cka_sequential'"),
        ({"amount": "threshold", "rates": (0.1, 0.2)}, "expected one"),
        ({"iterations": 0}, "config.iterations is 0"),
        ({"samples": 300}, "config.samples is 300, there are 287 validation images"),
        ({"training.batch_size": 5000}, "there are 1150 training images"),
        ({"networks": "lenet5_caffe"}, "needs 16 x 16 or more"),
    ],
)
def test_what_is_refused_before_anything_is_written(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        study.run(get_config(**fields), tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", list(configs._CONFIGS))
def test_every_config_passes_its_checks_and_names_its_networks(name):
    config = configs.get_config(name)
    check_config(config)
    runs = members_of.runs_of(config)
    assert len(set(members_of.member_names(runs))) == len(runs)
    for network in config.networks.split(","):
        assert all(width > 0 for width in members_of.whole_widths(network).values())
