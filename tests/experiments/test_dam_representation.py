"""DAM in representation learning: data, objective, results and mistakes."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dam_representation_checks, dam_representation_members
from experiments import dam_representation_study as study
from experiments.cli import UserError
from experiments.configs import dam_representation as configs
from ntt_sparse.gates import dam
from ntt_sparse.training.export import load_network
from ntt_sparse.training.metrics import MetricsLog


def get_config(name="linear,smoke", **fields):
    config = configs.get_config(name)
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def test_less_data_have_the_same_loss(x64):
    """Of a linear network: what is kept of the examples gives all its derivatives."""
    config = get_config(examples=300)
    key = jax.random.key(3)
    x = dam_representation_members.make_data(config, 4, key)
    assert x.shape == (20, 20) and np.linalg.matrix_rank(x) == 4
    factors, weights = jax.random.split(key)
    omega = jax.random.normal(factors, (300, 4))
    decoder = dam_representation_members.decoder("linear", 20)
    whole = decoder.apply(decoder.init(weights, omega[:1]), omega)
    matrix = jax.random.normal(jax.random.key(4), (20, 20))

    def loss(matrix, x):
        return jnp.mean((x @ matrix - x) ** 2)

    for fn in (loss, jax.grad(loss)):
        np.testing.assert_allclose(fn(matrix, x), fn(matrix, whole), rtol=1e-10)


@pytest.mark.parametrize("task", ["quadratic", "neural"])
def test_data_are_made_by_the_decoder(task):
    config = get_config(task=task, examples=64)
    x = dam_representation_members.make_data(config, 3, jax.random.key(0))
    assert x.shape == (64, 20) and np.all(np.isfinite(x))
    other = dam_representation_members.make_data(config, 3, jax.random.key(1))
    assert not np.allclose(x, other)


def test_standard_normal_weights():
    config = get_config(generator="normal", examples=4000, dimension=50)
    x = dam_representation_members.make_data(config, 6, jax.random.key(0))
    # Each entry is a sum of six products of independent standard normal variables.
    np.testing.assert_allclose(jnp.mean(x**2), 6.0, rtol=0.15)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Long enough for the theorem: the bottleneck ends at the rank of the data."""
    config = get_config(**{"training.max_steps": 1500, "training.record_every": 500})
    workdir = tmp_path_factory.mktemp("dam") / "w"
    return config, workdir, study.run(config, workdir)


def test_the_bottleneck_ends_at_the_rank_of_the_data(finished):
    """Theorem 1: k (m/n - 1) >= beta > k ((m-1)/n - 1) and no error."""
    config, workdir, summary = finished
    assert [row["exact"] for row in summary["networks"]] == [2, 2]
    for row in summary["networks"]:
        assert row["relative_error"]["mean"] < 1e-3
    for run in dam_representation_members.runs_of(config):
        (name,) = dam_representation_members.member_names([run])
        params, _ = load_network(workdir / "networks" / f"{name}.safetensors")
        beta, m, n = float(params["gate"]["beta"]), run.rank, config.bottleneck
        assert 5 * ((m - 1) / n - 1) < beta <= 5 * (m / n - 1)


def test_the_summary_follows_from_the_records(finished):
    _, workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    log = MetricsLog(workdir / "dam.jsonl", "dam")
    steps, bottleneck = log.column("bottleneck")
    assert steps.tolist() == [0, 500, 1000, 1500] and bottleneck[0].tolist() == [10] * 4
    found = [value for row in summary["networks"] for value in row["bottleneck"]["values"]]
    assert found == bottleneck[-1].tolist()
    report = (workdir / "report.md").read_text()
    assert "4 of 4 networks end at exactly r" in report
    assert "| DAM | 4 | 0.01 | 0.01 | 1 | 4, 4 | 2/2 |" in report
    assert (workdir / "figures" / "bottleneck_dam.png").stat().st_size > 1000


def test_the_objective_by_hand():
    """Mean squared error and lambda beta, in the terms and what is measured."""
    config = get_config()
    runs = [dam_representation_members.Run("dam", 4, 0.3, 0.01, -1.2, 2)]
    members = dam_representation_members.start_members(config, "dam", runs)
    member = jax.tree.map(lambda leaf: leaf[0], members)
    kind = dam.Dam()
    sets = dam_representation_members.make_sets(config)
    values = study.evaluate(config, kind, member, sets)
    key = jax.random.fold_in(jax.random.key(2), dam_representation_members._DATA_STREAM)
    x = np.asarray(dam_representation_members.make_data(config, 4, key), float)
    encoder, decoder = (
        np.asarray(member.params[name]["Dense_0"]["kernel"], float)
        for name in ("encoder", "decoder")
    )
    gates = np.maximum(np.tanh(5 * np.arange(1, 11) / 10 - 1.2), 0)
    error = np.mean(((x @ encoder * gates) @ decoder - x) ** 2)
    np.testing.assert_allclose(values["reconstruction"], error, rtol=1e-4)
    np.testing.assert_allclose(values["relative_error"], error / np.mean(x**2), rtol=1e-4)
    assert int(values["bottleneck"]) == 8
    batch = study.own_set(member, sets, None)
    inputs = study.TermInputs(member.params, member.masks, member.context, batch, jax.random.key(0))
    contributions = {
        name: float(term(inputs)[0]) for name, term in study.training_terms(config, kind).items()
    }
    np.testing.assert_allclose(contributions["reconstruction"], error, rtol=1e-4)
    np.testing.assert_allclose(contributions["gate"], 0.3 * -1.2, rtol=1e-6)


def test_members_share_data():
    """A member holds the index of its data, and no data, which checkpoints would repeat."""
    config = get_config(coefficients=(0.1, 0.2), ranks=(2, 5), seeds=(3, 8))
    runs = dam_representation_members.runs_of(config)
    context = dam_representation_members.start_members(config, "dam", runs).context
    assert {leaf.shape for leaf in jax.tree.leaves(context)} == {(8,)}
    # By rank, coefficient and seed.
    assert context["set"].tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    sets = np.asarray(dam_representation_members.make_sets(config))
    assert sets.shape == (4, 20, 20)
    assert [np.linalg.matrix_rank(x, tol=1e-4) for x in sets] == [2, 2, 5, 5]
    assert not np.allclose(sets[0], sets[1])


def test_every_setting_has_a_member_of_its_own(tmp_path):
    """Learning rates and first values ride with members, and both gates are run."""
    config = get_config(
        gates="dam,l1", ranks=(2,), seeds=(1,), learning_rates=(1e-4, 1e-2), initials=(0.5, 2.0)
    )
    summary = study.run(config, tmp_path / "w")
    assert [(r["gate"], r["learning_rate"], r["initial"]) for r in summary["networks"]] == [
        (gate, rate, initial)
        for gate in ("dam", "l1")
        for rate in (1e-4, 1e-2)
        for initial in (0.5, 2.0)
    ]
    for gate in ("dam", "l1"):
        _, penalty = MetricsLog(tmp_path / "w" / f"{gate}.jsonl", gate).column("penalty")
        np.testing.assert_allclose(penalty[0], [0.5, 2.0, 0.5, 2.0])
        # Adam moves by at most its rate in each of 20 steps.
        moved = np.abs(penalty[-1] - penalty[0])
        assert np.all(moved[:2] < 1.01 * 20 * 1e-4) and np.all(moved[2:] > 10 * 20 * 1e-4)
    assert (tmp_path / "w" / "figures" / "bottleneck_l1_r2_learning_rate_initial.png").exists()


def test_published_settings():
    """Table 3."""
    found = {
        name: (
            c.learning_rates, c.training.weight_decay, c.training.epochs, c.coefficients, c.initials
        )
        for name in ("linear", "quadratic", "neural")
        for c in [configs.get_config(name)]
    }  # fmt: skip
    assert found == {
        "linear": ((0.01,), 1e-6, 2000, (0.01,), (1.0,)),
        "quadratic": ((0.01,), 1e-6, 5000, (0.01,), (5.0,)),
        "neural": ((0.001,), 0.0, 10_000, (0.1,), (1.0,)),
    }
    for name in configs._CONFIGS:
        dam_representation_checks.check_config(configs.get_config(name))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "cubic"}, "config.task is 'cubic'"),
        ({"generator": "zero"}, "config.generator is 'zero'"),
        ({"gates": "dam,slimming"}, "config.gates is 'dam,slimming'"),
        ({"ranks": (2, 11)}, "config.ranks holds 11"),
        ({"ranks": (0,)}, "config.ranks holds 0"),
        ({"ranks": (2.5,)}, "config.ranks"),
        ({"ranks": ()}, "config.ranks is ()"),
        ({"coefficients": (-1.0,)}, "config.coefficients holds -1.0"),
        ({"coefficients": (math.nan,)}, "config.coefficients holds nan"),
        ({"learning_rates": ("abc",)}, "config.learning_rates holds abc"),
        ({"initials": (-5.0,)}, "config.initials holds -5.0 for dam: initial is -5.0, which"),
        ({"initials": (0.0,), "gates": "l1"}, "config.initials holds 0.0 for l1"),
        ({"bottleneck": 1, "ranks": (1,)}, "config.bottleneck is 1"),
        ({"examples": 1}, "config.examples is 1"),
        ({"seeds": (1, 1)}, "config.seeds"),
        ({"training.epochs": 0}, "config.training.epochs is 0"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_any_work(tmp_path, fields, message):
    with pytest.raises(UserError) as raised:
        study.run(get_config(**fields), tmp_path / "w")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "w").exists()


def test_another_machine_goes_on(tmp_path, monkeypatch):
    """One on which the last digits of the data that are made come out otherwise."""
    config = get_config(checkpoint_seconds=0.0)
    write, steps = MetricsLog.write, []

    def stopping(log, step, values, **kwargs):
        record = write(log, step, values, **kwargs)
        steps.append(step)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return record

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", stopping)
        study.run(config, tmp_path)
    made = study.make_sets
    monkeypatch.setattr(study, "make_sets", lambda config: made(config) * (1 + 1e-6))
    summary = study.run(config, tmp_path)
    records = (tmp_path / "dam.jsonl").read_text().splitlines()
    # It was not begun anew: what the first machine recorded is there, once.
    assert [json.loads(line)["step"] for line in records] == [0, 10, 20]
    assert len(summary["networks"]) == 2
