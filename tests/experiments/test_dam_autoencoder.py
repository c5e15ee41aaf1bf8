"""DAM against an L1 norm on images: networks, objective, classifiers, report and mistakes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import f1_score
from sklearn.neural_network import MLPClassifier

from experiments import dam_autoencoder_checks, dam_autoencoder_downstream, dam_autoencoder_members
from experiments import dam_autoencoder_study as study
from experiments.cli import UserError
from experiments.configs import dam_autoencoder as configs
from experiments.dam_autoencoder_downstream import Examples, evenly, macro_f1, score_codes
from ntt_sparse.data import images
from ntt_sparse.training.export import load_network

ROOT = Path(__file__).parents[2]


def get_config(name="digits,smoke", **fields):
    config = configs.get_config(name)
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def reconstruct(params, gates, x):
    """The network by hand in float64: gated codes and reconstructions."""

    def dense(tree, x):
        return x @ np.asarray(tree["kernel"], float) + np.asarray(tree["bias"], float)

    def layers(tree, x):
        for index in range(len(tree)):
            x = dense(tree[f"Dense_{index}"], np.maximum(x, 0) if index else x)
        return x

    codes = layers(params["encoder"], np.asarray(x, float)) * gates
    return codes, np.tanh(layers(params["decoder"], codes))


def gates_by_hand(params, n=20):
    """Eq. 2 of the paper, or those of the L1 norm."""
    if "beta" in params["gate"]:
        mu = 5 * np.arange(1, n + 1) / n
        return np.maximum(np.tanh(mu + float(params["gate"]["beta"])), 0)
    return np.maximum(np.asarray(params["gate"]["scale"], float), 0)


def test_members_differ_by_seed_and_coefficient_alone():
    config = get_config()
    dam, l1 = (dam_autoencoder_members.start_members(config, gate, 64) for gate in ("dam", "l1"))
    np.testing.assert_allclose(dam.context, [0.01, 0.01, 0.05, 0.05])
    np.testing.assert_allclose(l1.context, [0.01, 0.01, 0.1, 0.1])
    assert dam_autoencoder_members.member_names(dam_autoencoder_members.runs_of(config, "dam")) == [
        "dam-c0.01-s1", "dam-c0.01-s2", "dam-c0.05-s1", "dam-c0.05-s2"
    ]  # fmt: skip
    for name in ("encoder", "decoder"):
        for layer, leaf in dam.params[name].items():
            kernel = np.asarray(leaf["kernel"])
            np.testing.assert_array_equal(kernel[:2], kernel[2:])
            np.testing.assert_array_equal(kernel, l1.params[name][layer]["kernel"])
            assert not np.allclose(kernel[0], kernel[1])
    widths = [
        dam.params[name][f"Dense_{i}"]["kernel"].shape[1:]
        for name in ("encoder", "decoder")
        for i in range(3)
    ]
    assert widths == [(64, 48), (48, 32), (32, 20), (20, 32), (32, 48), (48, 64)]
    np.testing.assert_array_equal(dam.params["gate"]["beta"], np.ones(4))
    np.testing.assert_array_equal(l1.params["gate"]["scale"], np.ones((4, 20)))


def test_pixels_are_those_of_the_published_code():
    """(x - 0.5) / 0.5 of pixels in [0, 1], whatever they were standardised with."""
    raw = np.random.default_rng(0).integers(0, 256, (30, 4, 5, 1)).astype(np.float32)
    raw[0, 0, 0, 0], raw[1, 0, 0, 0] = 0, 255
    mean, std = np.array([33.3]), np.array([78.6])
    x, y = ((raw - mean) / std).astype(np.float32), np.zeros(30, np.int32)
    data = images.ImageData(
        images.Split(x[:20], y[:20]), images.Split(x[:0], y[:0]), images.Split(x[20:], y[20:]),
        10, "made", mean, std,
    )  # fmt: skip
    train, test = dam_autoencoder_members.pixels(data)
    expected = ((raw / 255 - 0.5) / 0.5).reshape(30, 20)
    np.testing.assert_allclose(train, expected[:20], atol=1e-6)
    np.testing.assert_allclose(test, expected[20:], atol=1e-6)


@pytest.mark.parametrize(
    ("gate", "params", "coefficient", "penalty", "opened"),
    [
        ("dam", {"beta": -1.2}, 0.05, -1.2, 16),
        ("l1", {"scale": np.linspace(-0.5, 1.4, 20)}, 0.1, np.linspace(0, 1.4, 15).sum() / 20, 14),
    ],
)
def test_the_objective_by_hand(monkeypatch, gate, params, coefficient, penalty, opened):
    """Mean squared error plus the coefficient times the penalty, and what is measured."""
    # Seven images in chunks of three: one is left over.
    monkeypatch.setattr(study, "_CHUNK", 3)
    config = get_config()
    start = dam_autoencoder_members.start_members(config, gate, 64)
    member = jax.tree.map(lambda leaf: leaf[-1], start)
    gates = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    member = member._replace(params={**member.params, "gate": gates})
    x = np.random.default_rng(1).uniform(-1, 1, (7, 64)).astype(np.float32)
    _, made = reconstruct(member.params, gates_by_hand(member.params), x)
    error = np.mean((made - x) ** 2)
    terms = study.training_terms(config, gate, 64)

    @jax.jit
    def measure(member, x):
        key = jax.random.key(0)
        inputs = study.TermInputs(member.params, member.masks, member.context, x, key)
        contributions = {name: term(inputs)[0] for name, term in terms.items()}
        return contributions, study.evaluate(config, gate, member, x)

    found, values = measure(member, x)
    np.testing.assert_allclose(found["reconstruction"], error, rtol=1e-5)
    np.testing.assert_allclose(found["gate"], coefficient * penalty, rtol=1e-5)
    np.testing.assert_allclose(values["reconstruction"], error, rtol=1e-5)
    np.testing.assert_allclose(values["penalty"], penalty, rtol=1e-5)
    assert int(values["bottleneck"]) == opened


def clusters(n=60):
    """Examples of three classes, far apart."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 3
    x = 10 * np.eye(3)[y] + rng.normal(size=(n, 3))
    return Examples(x.astype(np.float32), y.astype(np.int32))


def test_f1_of_known_codes():
    codes = clusters()
    assert macro_f1(codes, codes, 100) == 1.0
    # Learned from the training codes alone: against labels moved by one nothing is right.
    assert macro_f1(codes, codes._replace(y=(codes.y + 1) % 3), 100) == 0.0


def test_f1_without_channels():
    """Always 2, the most frequent: precision 1/2 and recall 1 there, nothing elsewhere."""
    train = Examples(np.zeros((5, 0), np.float32), np.array([0, 2, 2, 1, 2], np.int32))
    test = Examples(np.zeros((4, 0), np.float32), np.array([2, 0, 2, 1], np.int32))
    np.testing.assert_allclose(macro_f1(train, test, 10), (2 / 3) / 3)


def test_scores_are_kept_while_codes_are_the_same(tmp_path, monkeypatch):
    codes, path = clusters(), tmp_path / "a.json"
    made = []
    monkeypatch.setattr(
        dam_autoencoder_downstream, "macro_f1", lambda *arguments: made.append(arguments) or 0.5
    )
    for _ in range(2):
        score_codes(path, codes, codes, 5)
    assert len(made) == 1 and dam_autoencoder_downstream.read_score(path) == 0.5
    moved = codes._replace(x=codes.x + np.float32(1e-3))
    score_codes(path, moved, codes, 5)
    score_codes(path, moved, codes, 6)
    path.write_text("{")
    score_codes(path, moved, codes, 6)
    assert len(made) == 4


def test_examples_are_spread_over_the_set():
    assert evenly(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly(5, 0).tolist() == evenly(5, 5).tolist() == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that was stopped at the fourth classifier, and then went on."""
    config = get_config(**{"downstream.epochs": 3})
    workdir = tmp_path_factory.mktemp("dam") / "w"
    trained = []

    def stopping(*arguments):
        if len(trained) == 3:
            trained.append(None)
            raise KeyboardInterrupt
        trained.append(macro_f1(*arguments))
        return trained[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dam_autoencoder_downstream, "macro_f1", stopping)
        with pytest.raises(KeyboardInterrupt):
            study.run(config, workdir)
        first = {path.name: path.read_text() for path in (workdir / "downstream").iterdir()}
        assert not (workdir / "summary.json").exists()
        summary = study.run(config, workdir)
    return workdir, summary, trained, first


def test_a_study_stopped_between_classifiers_goes_on(finished):
    workdir, _, trained, first = finished
    assert sorted(first) == ["dam-c0.01-s1.json", "dam-c0.01-s2.json", "dam-c0.05-s1.json"]
    for name, text in first.items():
        assert (workdir / "downstream" / name).read_text() == text
    # One that was stopped, and eight networks.
    assert trained[3] is None and len(trained) == 1 + 8


def test_the_report_follows_from_the_records(finished):
    workdir, summary, _, _ = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert [(row["gate"], row["coefficient"]) for row in summary["networks"]] == [
        ("dam", 0.01), ("dam", 0.05), ("l1", 0.01), ("l1", 0.1)
    ]  # fmt: skip
    report = (workdir / "report.md").read_text()
    assert "after 20 steps of 128 images" in report and "codes of 200 training" in report
    for index, row in enumerate(summary["networks"]):
        last = json.loads((workdir / f"{row['gate']}.jsonl").read_text().splitlines()[-1])
        assert last["step"] == 20
        members = slice(2 * (index % 2), 2 * (index % 2) + 2)
        errors = last["reconstruction"][members]
        assert row["seeds"] == [1, 2] and row["reconstruction"]["values"] == errors
        assert row["bottleneck"]["values"] == last["bottleneck"][members] == [20, 20]
        mean, std = sum(errors) / 2, abs(errors[0] - errors[1]) / 2**0.5
        label = "DAM" if row["gate"] == "dam" else "L1"
        assert (
            f"| {label} | {row['coefficient']:g} | 20.0 ± 0.0 | 20, 20 | {mean:.4f} ± {std:.4f} | "
            in report
        )
    for name in ("gates_compared", "bottleneck_dam", "bottleneck_l1"):
        for suffix in ("png", "pdf"):
            assert (workdir / "figures" / f"{name}.{suffix}").stat().st_size > 1000


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_scores_are_those_of_saved_networks(finished):
    """From the files of a network, by hand and scikit-learn."""
    workdir, summary, _, _ = finished
    data = images.load("digits", validation_fraction=0.0)
    x_train, x_test = dam_autoencoder_members.pixels(data)
    chosen = np.round(np.linspace(0, 1436, 200)).astype(int)
    for row, name in ((0, "dam-c0.01-s2"), (3, "l1-c0.1-s2")):
        params, _ = load_network(workdir / "networks" / f"{name}.safetensors")
        gates = gates_by_hand(params)
        (train, _), (test, made) = (reconstruct(params, gates, x) for x in (x_train, x_test))
        found = summary["networks"][row]
        np.testing.assert_allclose(
            found["reconstruction"]["values"][1], np.mean((made - x_test) ** 2), rtol=1e-4
        )
        classifier = MLPClassifier((50, 50), random_state=1, max_iter=3)
        classifier.fit(train[chosen].astype(np.float32), data.train.y[chosen])
        expected = f1_score(
            data.test.y, classifier.predict(test.astype(np.float32)), average="macro"
        )
        # Codes differ by rounding, which may move an image over a border.
        np.testing.assert_allclose(found["macro_f1"]["values"][1], expected, atol=0.02)


def test_published_settings():
    """Table 3, Appendix D.1 and the published code."""
    for name, hidden in (("mnist", (128, 64, 32)), ("mnist_paper", (64, 32))):
        config = configs.get_config(name)
        training = config.training
        assert (training.epochs, training.batch_size, training.learning_rate) == (100, 512, 1e-3)
        assert (tuple(config.model.hidden), config.model.bottleneck) == (hidden, 50)
        assert config.initial == 1.0 and len(config.seeds) == 5
        assert config.dam_coefficients[:5] == (0.01, 0.05, 0.1, 0.5, 1.0)
        assert config.dam_coefficients[-3:] == (8.5, 9.0, 9.5)
        assert max(config.l1_coefficients) == 25.0
    for name in configs._CONFIGS:
        dam_autoencoder_checks.check_config(configs.get_config(name))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gates": "dam,chip"}, "config.gates is 'dam,chip'"),
        ({"dam_coefficients": (-1.0,)}, "config.dam_coefficients holds -1.0"),
        ({"l1_coefficients": (math.nan,)}, "config.l1_coefficients holds nan"),
        ({"l1_coefficients": ()}, "config.l1_coefficients is ()"),
        ({"dam_coefficients": ("abc",)}, "config.dam_coefficients holds abc"),
        ({"seeds": (1, 1)}, "config.seeds"),
        ({"initial": 0.0}, "config.initial is 0.0 for l1"),
        ({"initial": -5.0, "gates": "dam"}, "config.initial is -5.0 for dam"),
        ({"model.hidden": ()}, "config.model.hidden is ()"),
        ({"model.hidden": (8, 0)}, "config.model.hidden is (8, 0)"),
        ({"model.bottleneck": 1}, "config.model.bottleneck is 1"),
        ({"training.epochs": 0}, "config.training.epochs is 0"),
        ({"training.learning_rate": math.nan}, "config.training.learning_rate is nan"),
        ({"training.batch_size": 1438}, "is 1438, there are 1437 training images"),
        ({"downstream.examples": 2000}, "is 2000, there are 1437 training images"),
        ({"downstream.epochs": 0}, "config.downstream.epochs is 0"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_before_any_work(tmp_path, fields, message):
    with pytest.raises(UserError) as raised:
        study.run(get_config(**fields), tmp_path / "w")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "w").exists()


def test_help_explains_itself():
    result = subprocess.run(
        [sys.executable, "-m", "experiments.dam_autoencoder", "--help"],
        cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert "needs fewer channels" in result.stdout and "mnist_paper" in result.stdout
