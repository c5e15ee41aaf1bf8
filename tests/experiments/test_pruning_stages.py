"""Network Slimming and ChipNet in stages: what is cut, stays cut, is counted and made small."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dam_pruning_compact
from experiments import dam_pruning_members as members
from experiments import dam_pruning_stages as stages
from experiments import dam_pruning_study as study
from experiments.cli import UserError
from experiments.configs import dam_pruning as configs
from ntt_sparse.gates import channels, layer
from ntt_sparse.models.preresnet import PreResNet
from ntt_sparse.training import deploy
from ntt_sparse.training.export import load_model_state, load_network
from ntt_sparse.training.metrics import MetricsLog
from ntt_sparse.training.step import TermInputs
from ntt_sparse.training.terms import NetworkOutputs


def small(name, **settings):
    """A study of seconds on the digits."""
    config = configs.get_config(f"{name},smoke")
    with config.unlocked():
        for path, value in {
            "data.name": "digits", "seeds": (1, 2), "targets": (0.6, 0.3), "evaluated": 32,
            **settings,
        }.items():  # fmt: skip
            *parents, field = path.split(".")
            node = config
            for parent in parents:
                node = node[parent]
            node[field] = value
    return config


@pytest.fixture(scope="module", autouse=True)
def quick_latencies():
    """One batch and few rounds: numbers here tell nothing of speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dam_pruning_compact, "_BATCHES", (1,))
        patch.setattr(dam_pruning_compact, "_ROUNDS", 2)
        yield


@pytest.fixture(
    scope="module",
    params=[pytest.param("mnist_slimming", marks=pytest.mark.slow), "mnist_chipnet"],
)
def finished(request, tmp_path_factory):
    """A finished study of two targets, budgets of channels as published."""
    workdir = tmp_path_factory.mktemp(request.param)
    # The schedule of ChipNet in 12 steps would leave all gates above 0.9, where they stay.
    config = small(
        request.param, budget="channels", seeds=(1,), **{"chipnet.continuation_epochs": 0}
    )
    return config, workdir, study.run(config, workdir)


def test_networks_are_cut_to_their_targets(finished):
    config, workdir, summary = finished
    names = [stage["name"] for stage in summary["stages"]]
    chip = config.gate == "chipnet"
    assert names == (["pretrain"] if chip else []) + ["training", "finetune"]
    assert (workdir / "finetune.jsonl").exists() and len(summary["networks"]) == 2
    assert all(stage["seconds"] > 0 for stage in summary["stages"])
    setup = study.prepare(config, None)
    sizes = channels.sizes(setup.network)
    for row in summary["networks"]:
        for seed, widths in zip(row["seeds"], row["widths"], strict=True):
            name = f"c{row['coefficient']!r}-t{row['target']!r}-o0-s{seed}"
            params, _ = load_network(workdir / "networks" / f"{name}.safetensors")
            variables = {
                "params": params, **load_model_state(workdir / "networks" / f"{name}.safetensors")
            }  # fmt: skip
            open_ = {
                path: value != 0
                for path, value in layer.values(
                    members.make_kind(config), variables, setup.network
                ).items()
            }
            assert [int(open_[path].sum()) for path in sizes] == widths
            # Network Slimming cuts one more than asked, ChipNet leaves no less than asked.
            kept = sum(widths)
            if chip:
                assert kept == np.ceil(row["target"] * 142)
            else:
                assert kept == 142 - int(np.round((1 - row["target"]) * 142, 3)) - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist_slimming", "mnist_l1", "mnist_dam", "mnist_chipnet"])
@pytest.mark.usefixtures("unrendered")
def test_networks_of_one_size(tmp_path, name):
    """Every kind meets a budget of parameters to within one channel, and keeps it to the end."""
    config = small(
        name, targets=(0.5, 0.3), seeds=(1,), coefficients=(3.0,), compact=False,
        **{"chipnet.continuation_epochs": 0},
    )  # fmt: skip
    if name == "mnist_dam":
        with config.unlocked():
            # So that offsets get there.
            config.update({"training": {"max_steps": 150, "record_every": 75, "batch_size": 32}})
    summary = study.run(config, tmp_path)
    network = study.prepare(config, None).network
    whole = channels.whole(network).parameters
    # The most that one channel of the first three layers has: a map of the second.
    largest = 150 + 1 + 25 * 120
    for row in summary["networks"]:
        count = row["parameters"]["mean"]
        limit = row["target"] * whole
        low, high = (0, largest) if name == "mnist_chipnet" else (-largest, 0)
        assert low <= count - limit <= high
        log = MetricsLog(tmp_path / f"{summary['stages'][-1]['name']}.jsonl", "any")
        assert np.ptp(log.column("parameters")[1], axis=0).max() == 0 or name == "mnist_dam"


@pytest.mark.usefixtures("unrendered")
def test_hard_concrete_gates_close_by_themselves(tmp_path):
    """Drawn in training, held within their limits, counted and made small as in evaluation."""
    config = small(
        "mnist_l0", targets=(1.0,), seeds=(1,), coefficients=(0.0, 100.0),
        **{
            "training.max_steps": 60, "training.record_every": 30, "training.learning_rate": 0.1,
            "training.batch_size": 8,
        },
    )  # fmt: skip
    summary = study.run(config, tmp_path)
    whole = summary["whole"]["parameters"]
    free, pushed = (row["parameters"]["mean"] for row in summary["networks"])
    assert pushed < 0.5 * whole < free <= whole
    measured = json.loads((tmp_path / "compact.json").read_text())
    assert all(found["difference"] < 1e-5 for found in measured.values())
    params, _ = load_network(tmp_path / "networks" / "c100.0-t1.0-o0-s1.safetensors")
    low, high = np.log(0.01), np.log(100)
    for gate in layer.find(params).values():
        assert np.all((gate["log_alpha"] >= low - 1e-6) & (gate["log_alpha"] <= high + 1e-6))


def test_gates_that_closed_before_stay_closed():
    """L1 gates at zero are not opened to fill a budget."""
    config = small("mnist_l1", targets=(0.9,), seeds=(1,))
    setup = study.prepare(config, None)
    stage = setup.stages[0]
    member = members.start_members(
        config, setup.module, setup.data.input_shape, members.runs_of(config), stage.settings,
        stage.plan,
    )  # fmt: skip
    member = jax.tree.map(lambda leaf: leaf[0], member)
    gates = {
        path: {"scale": gate["scale"].at[1:].set(-0.1)}
        for path, gate in layer.find(member.params).items()
    }
    member = member._replace(params=layer.replace(member.params, gates))
    kept = stages.open_channels(config, setup.network, member, stage)
    assert [int(mask.sum()) for mask in kept.values()] == [1, 1, 1]


def test_the_schedule_of_a_short_stage():
    """ChipNet's 20 epochs of growing steepness in as many parts of the stage."""
    config = small("mnist_chipnet", **{"training.max_steps": 40})
    setup = study.prepare(config, None)
    sharpen = stages.after_update(config, setup, setup.stages[1])
    stage = setup.stages[1]
    member = members.start_members(
        config, setup.module, setup.data.input_shape, members.runs_of(config), stage.settings,
        stage.plan,
    )  # fmt: skip
    member = stages.enter(config, setup, 1, member)
    member = jax.tree.map(lambda leaf: leaf[0], member)
    for step, epoch in ((0, 0), (1, 0), (2, 1), (39, 19)):
        gates = layer.find(sharpen(member, jnp.int32(step), None).model_state[layer.STATE])
        for gate in gates.values():
            np.testing.assert_allclose(gate["gamma"], min(256, 2 * 2 ** (epoch / 2)), rtol=1e-5)


def test_small_networks_are_written_and_measured(finished):
    config, workdir, summary = finished
    measured = json.loads((workdir / "compact.json").read_text())
    assert set(measured) == set(members.member_names(members.runs_of(config)))
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    setup = study.prepare(config, None)
    for row in summary["networks"]:
        for index, seed in enumerate(row["seeds"]):
            name = f"c{row['coefficient']!r}-t{row['target']!r}-o0-s{seed}"
            found = measured[name]
            assert found["parameters"] == row["parameters"]["values"][index]
            assert found["difference"] < 1e-5
            module, variables = deploy.load(workdir / "compact" / f"{name}.safetensors")
            count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
            assert count == found["parameters"] + found["constants"]
            params, _ = load_network(workdir / "networks" / f"{name}.safetensors")
            state = load_model_state(workdir / "networks" / f"{name}.safetensors")
            expected = setup.module.apply({"params": params, **state}, x)
            np.testing.assert_allclose(module.apply(variables, x), expected, atol=1e-5)
    assert "| 0.6 |" in (workdir / "report.md").read_text()
    assert (workdir / "figures" / "stages.png").stat().st_size > 1000


def test_a_finished_study_only_draws_its_report(finished):
    config, workdir, summary = finished
    times = (workdir / "compact.json").stat().st_mtime_ns
    again = study.run(config, workdir)
    assert (workdir / "compact.json").stat().st_mtime_ns == times
    assert again == summary


def test_training_on_keeps_what_is_cut_and_trains_the_rest(finished):
    """The stage after the cut starts from the weights that were there."""
    config, _, _ = finished
    setup = study.prepare(config, None)
    runs = members.runs_of(config)
    first = setup.stages[0]
    whole = members.start_members(
        config, setup.module, setup.data.input_shape, runs, first.settings, first.plan
    )
    main = next(i for i, stage in enumerate(setup.stages) if stage.name == stages.MAIN)
    whole = stages.enter(config, setup, main, whole) if main else whole
    cut = stages.enter(config, setup, main + 1, whole)
    jax.tree.map(np.testing.assert_array_equal, cut.params, whole.params)
    kept = jax.vmap(
        lambda member: stages.open_channels(
            config, setup.network, member, setup.stages[-1]
        )
    )(cut)  # fmt: skip
    for path, mask in kept.items():
        counts = np.asarray(mask).sum(-1)
        assert len(counts) == 2 and counts[1] <= counts[0], path
    assert np.any(cut.key != whole.key)


def test_the_loss_of_chipnet():
    """Task, budget and crispness with their weights, against the formulas."""
    config = small(
        "mnist_chipnet", budget="channels", coefficients=(0.5,), targets=(0.3,), seeds=(1,),
        **{"chipnet.continuation_epochs": 0},
    )  # fmt: skip
    setup = study.prepare(config, None)
    runs = members.runs_of(config)
    stage = setup.stages[1]
    start = members.start_members(
        config, setup.module, setup.data.input_shape, runs, stage.settings, stage.plan
    )
    member = jax.tree.map(lambda leaf: leaf[0], stages.enter(config, setup, 1, start))
    # Steepness is that of the step's epoch, in the network and in the loss.
    step = 3 * stage.plan.steps_per_epoch
    sharpen = stages.after_update(config, setup, stage)
    member = sharpen(member, jnp.int32(step), None)
    term = stages.stage_terms(config, setup, stage)["gate"]
    inputs = stages.TermInputs(
        member.params, member.masks, member.context, None, member.key, step, member.model_state
    )
    value, _ = term(inputs)
    beta, gamma = 1.0 + 0.1 * 3 / 5, 2 * 2**1.5
    zeta = np.concatenate(
        [np.asarray(gate["zeta"], float) for gate in layer.find(member.params).values()]
    )
    assert 0 <= zeta.min() < zeta.max() <= 0.01
    soft = 1 / (1 + np.exp(-beta * zeta))
    z = 1 - np.exp(-gamma * soft) + soft * np.exp(-gamma)
    fraction = np.mean(1 / (1 + np.exp(-25 * (z - 0.5))))
    expected = 0.5 * (30 * (fraction - 0.3) ** 2 + 10 * np.mean((z - soft) ** 2))
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    values = layer.values(members.make_kind(config), stages.variables_of(member), setup.network)
    np.testing.assert_allclose(
        np.sort(np.concatenate(list(values.values()))), np.sort(z), rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10_preresnet20_slimming", "cifar10_preresnet20_chipnet"])
@pytest.mark.usefixtures("unrendered")
def test_with_normalisation(tmp_path, monkeypatch, name):
    monkeypatch.setattr(
        study, "make_model", lambda config, n: PreResNet(n, 1, (4,), members.make_kind(config))
    )
    config = small(
        name, targets=(0.5,), seeds=(1,), **{
            "training.max_steps": 2, "training.batch_size": 8, "pretrain.max_steps": 1,
            "finetune.max_steps": 2, "pretrain.batch_size": 8, "finetune.batch_size": 8,
            "training.record_every": 1, "compact": True,
        },
    )  # fmt: skip
    (row,) = study.run(config, tmp_path)["networks"]
    # Normalised: 4 of the stem, 4 and 4 inside, 16 at the end.
    (widths,) = row["widths"]
    assert all(n <= full for n, full in zip(widths, (4, 4, 4, 16), strict=True))
    if "slimming" in name:
        assert sum(widths) <= 14
    (found,) = json.loads((tmp_path / "compact.json").read_text()).values()
    assert found["parameters"] == row["parameters"]["values"][0]


@pytest.mark.slow
@pytest.mark.usefixtures("unrendered")
def test_of_a_layer_without_open_channels_the_constant_is_left(tmp_path):
    """Nothing holds Network Slimming from emptying a layer; it cuts one more than asked."""
    config = small(
        "mnist_slimming", budget="channels", targets=(0.03,), seeds=(1,),
        **{"slimming.keep": 0},
    )  # fmt: skip
    (row,) = study.run(config, tmp_path)["networks"]
    (found,) = json.loads((tmp_path / "compact.json").read_text()).values()
    assert min(row["widths"][0]) == 0 and found["removed"]
    assert sum(row["widths"][0]) == 142 - int(0.97 * 142) - 1
    assert found["difference"] < 1e-5


def centred_cka(x, y):
    x, y = (np.asarray(each, float).reshape(len(each), -1) for each in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return np.linalg.norm(x.T @ y) ** 2 / norms


def penalised():
    settings = {"targets": (0.6,), "seeds": (1, 2), "cka_sr.every": 2, "training.max_steps": 6}
    return small("mnist_slimming_cka_sr", **settings, **{"cka_sr.coefficients": (0.0, 3.0)})


def test_similarity_is_penalised_where_initial_weights_are_trained():
    """In the first stage and no other, by each network's own coefficient, as it is defined."""
    config = penalised()
    setup = study.prepare(config, None)
    runs, stage = members.runs_of(config), setup.stages[0]
    started = members.start_members(
        config, setup.module, setup.data.input_shape, runs, stage.settings, stage.plan
    )
    term = stages.stage_terms(config, setup, stage)["similarity"]
    x = jnp.asarray(setup.data.train.x[:20])
    capture = stages.capture(setup.module, ["Conv_*", "Dense_0", "Dense_1"], examples=8)

    @jax.jit
    def measure(index, step):
        member = jax.tree.map(lambda leaf: leaf[index], started)
        _, features = capture({"params": member.params, **member.model_state}, x)
        inputs = TermInputs(
            member.params, member.masks, member.context, None, member.key, step,
            member.model_state, NetworkOutputs(None, features),
        )  # fmt: skip
        return term(inputs)[0], features

    for index, run in enumerate(runs):
        for step in (0, 1):
            value, features = measure(index, step)
            pairs = (("Conv_0", "Conv_1"), ("Dense_0", "Dense_1"))
            total = sum(2 * centred_cka(*(features[name] for name in pair)) for pair in pairs)
            np.testing.assert_allclose(value, run.cka_sr * total * (step % 2 == 0), rtol=1e-4)
    assert "similarity" not in stages.stage_terms(config, setup, setup.stages[1])


@pytest.mark.slow
def test_a_study_with_and_without_similarity_penalised(tmp_path):
    config = penalised()
    runs = members.runs_of(config)
    summary = study.run(config, tmp_path / "with")
    logged = MetricsLog(tmp_path / "with" / "training.jsonl", "training")
    _, similarity = logged.column("train/similarity")
    with_it = [run.cka_sr > 0 for run in runs]
    assert np.all(similarity[:, with_it] > 0) and not np.any(similarity[:, ~np.array(with_it)])
    assert "train/similarity" not in (tmp_path / "with" / "finetune.jsonl").read_text()
    rows = {row["cka_sr"]: row for row in summary["networks"]}
    difference = np.subtract(*(rows[k]["test_accuracy"]["values"] for k in (3.0, 0.0)))
    assert rows[3.0]["less_baseline_last"]["mean"] == pytest.approx(difference.mean())
    assert "less_baseline_last" not in rows[0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cka_sr.stages": ()}, "config.cka_sr.stages is empty"),
        ({"cka_sr.stages": ("Conv_0",)}, "'Conv_0', which is 1 feature map"),
        ({"cka_sr.stages": ("Conv_7,Conv_8",)}, "Conv_7"),
        ({"cka_sr.samples": 129}, "config.cka_sr.samples is 129, expected 0"),
        ({"cka_sr.samples": 2}, "config.cka_sr.samples is 2, expected 0"),
        ({"training.batch_size": 2, "cka_sr.samples": 0}, r"all of a batch of 3 or more\)"),
        ({"cka_sr.every": 0}, "config.cka_sr.every is 0"),
        ({"cka_sr.coefficients": (-1.0,)}, "config.cka_sr.coefficients holds -1.0"),
        ({"cka_sr.coefficients": ()}, "config.cka_sr.coefficients is"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        study.run(small("mnist_slimming_cka_sr", **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
