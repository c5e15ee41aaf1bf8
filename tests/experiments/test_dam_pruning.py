"""The structured pruning study: what is trained, what is counted, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import dam_pruning_members as members
from experiments import dam_pruning_study as study
from experiments.cli import UserError
from experiments.configs import dam_pruning as configs
from experiments.dam_pruning_published import published
from ntt_sparse import models
from ntt_sparse.gates import channels, dam, layer
from ntt_sparse.models.preresnet import PreResNet
from ntt_sparse.training.loop import Plan


def small(**settings):
    """A study of seconds on the digits."""
    config = configs.get_config("digits_lenet5,smoke")
    config.model.gated = 3
    with config.unlocked():
        for path, value in {"seeds": (1,), **settings}.items():
            *parents, field = path.split(".")
            node = config
            for parent in parents:
                node = node[parent]
            node[field] = value
    return config


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    """A finished study of two orders and two coefficients, similarity measured."""
    workdir = tmp_path_factory.mktemp("orders")
    config = small(
        coefficients=(0.0, 30.0), orders=(0, 3), similarity="Conv_1", seeds=(1, 2),
        **{"training.learning_rate": 0.02, "training.batch_size": 16, "evaluated": 32},
    )  # fmt: skip
    return config, workdir, study.run(config, workdir)


def test_gates_are_those_of_the_settings():
    kind = members.make_kind(
        small(alpha=2.0, k=4.0, shape="linear", convention="code", initial=1.5)
    )
    assert kind == dam.Dam(initial=1.5, alpha=2.0, k=4.0, convention="code", shape="linear")


def test_the_report_holds_what_the_networks_are(orders):
    config, workdir, summary = orders
    assert summary == json.loads((workdir / "summary.json").read_text())
    assert summary["whole"] == {"channels": 142, "parameters": 61_706, "multiply_adds": 416_520}
    runs = members.runs_of(config)
    assert len(summary["networks"]) * 2 == len(runs) == 8
    for row in summary["networks"]:
        for index, seed in enumerate(row["seeds"]):
            name = f"c{row['coefficient']!r}-t1.0-o{row['order']}-s{seed}"
            params = load_file(workdir / "networks" / f"{name}.safetensors")
            betas = [params[key] for key in sorted(params) if key.endswith("gate/beta")]
            kernels = {key: leaf.shape for key, leaf in params.items() if key.endswith("kernel")}
            # By hand: 6, 16 and 120 gated channels, of which the highest are open.
            a, b, c = widths = [
                sum(5 * (j + 1) / n + float(beta) > 0 for j in range(n))
                for n, beta in zip((6, 16, 120), betas, strict=True)
            ]
            assert len(kernels) == 5 and row["widths"][index] == widths
            count = 26 * a + (25 * a + 1) * b + (25 * b + 1) * c + (c + 1) * 84 + 850
            assert row["parameters"]["values"][index] == count
            assert row["channels"]["values"][index] == sum(widths)
    pruned = [row["pruned_channels"]["mean"] for row in summary["networks"]]
    assert pruned[0] == pruned[1] == 0.0 and min(pruned[2:]) > 0.1


def test_similarity_is_of_open_channels(orders):
    _, workdir, summary = orders
    with np.load(workdir / "similarities.npz", allow_pickle=False) as file:
        cka, used = file["cka"], file["used"]
    assert cka.shape == (8, 16, 16)
    last = summary["networks"][-1]
    assert [int(x.sum()) for x in used[6:]] == [w[1] for w in last["widths"]]
    for row, index in ((summary["networks"][0], 0), (last, 6)):
        values = []
        for member in (index, index + 1):
            places = np.flatnonzero(used[member])
            values.append(np.mean([cka[member][i, j] for i in places for j in places if i != j]))
        np.testing.assert_allclose(row["channel_similarity"]["mean"]["values"], values, rtol=1e-6)


def test_files(orders):
    _, workdir, _ = orders
    report = (workdir / "report.md").read_text()
    assert "| 30 |  | 3 |" in report and "142 gated channels" in report
    drawn = ("accuracy_against_parameters", "channels_over_training", "layer_widths")
    for name in (*drawn, "channel_similarity"):
        assert (workdir / "figures" / f"{name}.png").stat().st_size > 1000


def test_a_random_order_closes_other_channels():
    config = small(orders=(0, 2))
    sizes = {"Conv_0/gate": 6, "Dense_0/gate": 120}
    plain, drawn = (members.orders(config, sizes, number)["gates"] for number in (0, 2))
    np.testing.assert_array_equal(plain["Conv_0"]["gate"]["ranks"], np.arange(6))
    ranks = drawn["Dense_0"]["gate"]["ranks"]
    assert sorted(ranks.tolist()) == list(range(120)) and np.any(ranks != np.arange(120))
    again = members.orders(config, sizes, 2)["gates"]
    jax.tree.map(np.testing.assert_array_equal, drawn, again)
    assert members.orders(small(), sizes, 0) == {}


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["parameters", "layers"])
@pytest.mark.usefixtures("unrendered")
def test_budgets_are_met_to_within_a_channel(tmp_path, budget):
    """Whatever the kind, without its last channel the network would still be too large."""
    config = small(
        coefficients=(50.0,), budget=budget, targets=(0.7, 0.4), **{
            "training.max_steps": 20, "training.learning_rate": 0.05, "evaluated": 16,
            "training.record_every": 20, "training.batch_size": 8,
        },
    )  # fmt: skip
    rows = study.run(config, tmp_path)["networks"]
    network = study.prepare(config, None).network
    whole = channels.whole(network)._asdict()
    for row in rows:
        target, (widths,) = row["target"], row["widths"]
        if budget == "layers":
            assert widths == [round(target * n) for n in (6, 16, 120)]
            continue
        limit = target * whole[budget]
        assert row[budget]["values"][0] <= limit
        wider = [[n + (place == index) for index, n in enumerate(widths)] for place in range(3)]
        costs = [
            channels.count(
                network,
                {
                    path: jnp.arange(n) >= n - width
                    for (path, n), width in zip(channels.sizes(network).items(), each, strict=True)
                },
            )._asdict()[budget]
            for each in wider
        ]
        assert max(costs) > limit


def test_the_penalty_moves_offsets_as_the_equilibrium_says():
    """Without a task, SGD with coupled decay ends at -coefficient / (layers * decay)."""
    config = small(
        **{"training.learning_rate": 0.1, "training.weight_decay": 0.5, "training.milestones": ()}
    )
    transform = members.make_optimizer(config, config.training, Plan(2000, 10, 10))
    params = {f"l{i}": {"gate": {"beta": jnp.float32(1.0)}} for i in range(4)}

    def loss(p):
        return 0.8 * dam.penalty([gate["beta"] for gate in layer.find(p).values()])

    def step(_, carry):
        params, state = carry
        updates, state = transform.update(jax.grad(loss)(params), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params, _ = jax.lax.fori_loop(0, 400, step, (params, transform.init(params)))
    for gate in layer.find(params).values():
        np.testing.assert_allclose(gate["beta"], -0.8 / (4 * 0.5), rtol=1e-4)


@pytest.mark.parametrize("decays", [True, False])
def test_gates_decay_if_asked(decays):
    config = small(**{
        "training.decay_gates": decays, "training.weight_decay": 0.1, "training.momentum": 0.0,
        "training.learning_rate": 1.0,
    })  # fmt: skip
    params = {"a": {"kernel": jnp.ones(2), "gate": {"beta": jnp.float32(1.0)}}}
    transform = members.make_optimizer(config, config.training, Plan(10, 10, 10))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(zeros, transform.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.1)
    np.testing.assert_allclose(updates["a"]["gate"]["beta"], -0.1 if decays else 0.0)


def test_targets_are_integers_of_the_fractions_as_written():
    config = small(budget="channels", targets=(0.65,))
    network = models.create("preresnet20", kind=dam.Dam()).network((32, 32, 3))
    # In float32 0.65 * 1360 is less than 884.
    assert members.target_of(config, network, 0.65) == 884
    config.budget = "layers"
    assert members.target_of(config, network, 0.65)["Conv_0/gate"] == 10


@pytest.mark.usefixtures("unrendered")
def test_a_target_that_is_missed_is_told(tmp_path, caplog):
    settings = {"training.max_steps": 2, "training.record_every": 2, "training.batch_size": 4}
    config = small(coefficients=(1e-6,), budget="channels", targets=(0.5,), evaluated=8, **settings)
    with caplog.at_level("WARNING", logger=study.__name__):
        (row,) = study.run(config, tmp_path)["networks"]
    assert row["reached"] == 0 and "did not reach its target" in caplog.text
    assert "| 0.5, 0/1 |" in (tmp_path / "report.md").read_text()


def test_the_optimiser_of_a_study():
    """Cold start in epochs, coupled decay, momentum and milestones, against SGD written out."""
    config = small(**{
        "training.cold_start": 0.5, "training.learning_rate": 0.1, "training.weight_decay": 0.01,
        "training.momentum": 0.9, "training.milestones": (0.5,), "training.milestone_factor": 0.5,
    })  # fmt: skip
    transform = members.make_optimizer(config, config.training, Plan(8, 4, 4))
    params = {"a": {"kernel": jnp.ones(1), "gate": {"beta": jnp.float32(1.0)}}}
    state, values, buffers = transform.init(params), [1.0, 1.0], [0.0, 0.0]
    for step in range(8):
        grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.2), params)
        updates, state = transform.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for index in range(2):
            if index == 0 or step >= 2:
                buffers[index] = 0.9 * buffers[index] + 0.2 + 0.01 * values[index]
                values[index] -= (0.1 if step < 4 else 0.05) * buffers[index]
        found = params["a"]["kernel"][0], params["a"]["gate"]["beta"]
        np.testing.assert_allclose(found, values, rtol=1e-5)


@pytest.mark.usefixtures("unrendered")
def test_every_part_at_once(tmp_path, monkeypatch):
    """Batch statistics, augmentation, noise, AdaBelief and L1 gates, on a small PreResNet."""
    monkeypatch.setattr(
        study, "make_model", lambda config, n: PreResNet(n, 1, (2,), members.make_kind(config))
    )
    config = configs.get_config("cifar10_preresnet20,smoke")
    config.data.name, config.gate, config.gradient_noise = "digits", "l1", 0.05
    config.seeds, config.coefficients, config.evaluated = (1,), (0.1,), 8
    config.similarity, config.training.optimizer = "", "adabelief"
    config.training.batch_size, config.training.max_steps = 4, 2
    config.training.record_every, config.checkpoint_seconds = 1, 0.0
    (row,) = study.run(config, tmp_path / "run")["networks"]
    # Stem; norm, 1x1, norm, 3x3, norm, 1x1, shortcut; norm, dense.
    count = 18 + (4 + 4 + 4 + 36 + 4 + 16 + 16) + 16 + 90
    assert row["parameters"]["values"] == [count] and row["widths"] == [[2, 2, 2, 8]]


def test_published_numbers():
    rows = published(configs.get_config("table5a"))
    assert len(rows) == 10
    assert rows[3] == (0.05, 98.16, 7000.0, None, 88.41)
    assert [row.accuracy for row in published(configs.get_config("table5b"))][-1] == 90.16
    assert published(configs.get_config("table5c"))[-1] == (0.6, 95.49, 600.0, None, 98.95)
    assert len(published(configs.get_config("table2"))) == 5
    assert published(configs.get_config("table6_vgg19"))[1] == (0.5, 90.92, 264000, 89.17, 98.68)
    assert published(configs.get_config("table8"))[-1].pruned_channels == 68.52
    for name in ("digits_lenet5", "mnist_budget", "cifar10_budget"):
        assert published(configs.get_config(name)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": "sigmoid"}, "config.gate is 'sigmoid'"),
        ({"shape": "tanh"}, "config.shape is 'tanh', expected one of 'relu_tanh'"),
        ({"alpha": 0.0}, "config.alpha is 0.0, expected a number from 0.001"),
        ({"initial": -5.0}, "config.initial is -5.0: initial is -5.0, which closes all 6"),
        ({"budget": "channels", "targets": (0.0,)}, "a budget of nothing cannot be met"),
        ({"budget": "channels", "targets": (1.0,)}, "one of everything prunes nothing"),
        ({"budget": "channels", "targets": (1.5,)}, "config.targets holds 1.5"),
        ({"targets": (0.5,)}, "without a budget"),
        ({"budget": "weights", "targets": (0.5,)}, "config.budget is 'weights'"),
        (
            {"budget": "channels", "targets": (0.01,), "coefficients": (1.0,)},
            "which is 1 of channels: expected 3 or more",
        ),
        (
            {"budget": "layers", "targets": (0.9,), "initial": -2.0, "coefficients": (1.0,)},
            "that config.initial opens",
        ),
        ({"budget": "channels", "targets": (0.5,), "coefficients": (0.0,)}, "what closes channels"),
        ({"gate": "l1", "initial": -1.0}, "config.initial is -1.0: initial is -1.0, expected"),
        ({"gate": "l1", "orders": (1,)}, "expected 'dam'"),
        (
            {"gate": "l1", "budget": "layers", "targets": (0.5,), "coefficients": (1.0,)},
            "with gate 'l1', expected channels, parameters, multiply_adds",
        ),
        (
            {"gate": "slimming", "budget": "volume", "targets": (0.5,), "coefficients": (1.0,)},
            "config.budget is 'volume' with gate 'slimming', expected channels, parameters",
        ),
        (
            {
                "gate": "slimming",
                "budget": "channels",
                "targets": (0.001,),
                "slimming.keep": 0,
                "coefficients": (1.0,),
                "finetune.epochs": 1,
                "training.cold_start": 0.0,
            },
            "config.targets holds 0.001, which is none of 142 channels",
        ),
        (
            {
                "gate": "chipnet",
                "budget": "parameters",
                "targets": (1e-5,),
                "coefficients": (1.0,),
                "pretrain.epochs": 1,
                "finetune.epochs": 1,
                "training.cold_start": 0.0,
            },
            "config.targets holds 1e-05, which is none of 61,706 parameters",
        ),
        ({"gate": "slimming"}, "cuts networks to a budget and trains them on: expected"),
        (
            {"gate": "chipnet", "budget": "volume", "targets": (0.5,), "coefficients": (1.0,)},
            "config.finetune.epochs above 0",
        ),
        (
            {
                "gate": "slimming",
                "budget": "parameters",
                "targets": (0.1,),
                "coefficients": (1.0,),
                "finetune.epochs": 1,
                "slimming.keep": 500,
            },
            "500 of each gated layer, and less than",
        ),
        ({"chipnet.continuation_epochs": 20}, "gate 'dam' has no such schedule"),
        ({"finetune.epochs": 3}, "config.finetune.epochs is 3, expected 0: gate 'dam' has no"),
        ({"pretrain.batch_size": 1}, "config.pretrain.batch_size is 1"),
        ({"finetune.milestones": (2.0,)}, "config.finetune.milestones"),
        ({"coefficients": (float("nan"),)}, "config.coefficients holds nan"),
        ({"coefficients": (-0.1,)}, "config.coefficients holds -0.1"),
        ({"orders": (0.5,)}, "expected integers"),
        ({"model.gated": 9}, "gated is 9"),
        ({"model.name": "vgg19", "model.gated": 3}, "are of 'lenet5'"),
        ({"training.milestones": (0.5, 0.5)}, "config.training.milestones is"),
        ({"training.milestone_factor": 2.0}, "config.training.milestone_factor is 2.0, expected"),
        ({"training.cold_start": 900.0}, "the gates would never move"),
        ({"similarity": "Dense_2"}, "config.similarity is 'Dense_2', expected a gated layer: Conv"),
        ({"similarity": "Conv_0", "probe": 10**6}, "config.probe is 1000000, there are"),
        ({"model.name": "vgg19", "model.activation": "", "model.gated": 0}, "16 x 16 pixels"),
        ({"gradient_noise": -1.0}, "config.gradient_noise is -1.0"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, settings, message):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=message) as error:
        study.run(small(**settings), workdir)
    assert "\n" not in str(error.value) and not workdir.exists()
