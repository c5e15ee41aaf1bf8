"""DAM in graph autoencoders: data, objective, report, networks afterwards and mistakes."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from experiments import dam_graph_checks, dam_graph_members
from experiments import dam_graph_report as report
from experiments import dam_graph_study as study
from experiments.cli import UserError
from experiments.configs import dam_graph as configs
from ntt_sparse.data import graphs, links
from ntt_sparse.gates.dam import Dam
from ntt_sparse.models.graph import GraphAutoencoder, SparseMatrix, adjacency, cut, decode
from ntt_sparse.training.export import load_network
from ntt_sparse.training.metrics import MetricsLog
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import TermInputs

ROOT = Path(__file__).parents[2]


def get_config(name="blocks,smoke", **fields):
    config = configs.get_config(name)
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def dense_adjacency(edges, n):
    a = np.eye(n)
    a[edges[:, 0], edges[:, 1]] = a[edges[:, 1], edges[:, 0]] = 1
    scale = a.sum(1) ** -0.5
    return scale[:, None] * a * scale


def hidden_and_layer(params, x, a):
    """By hand in float64: what the last layers read, and how one of them is applied."""

    def layer(tree, x):
        return a @ (x @ np.asarray(tree["kernel"], float)) + np.asarray(tree["bias"], float)

    return np.maximum(layer(params["encoder"]["layers_0"], x), 0), layer


def measured(codes, parts, name):
    """AUC and average precision of scikit-learn."""
    linked, others = getattr(parts, name), getattr(parts, f"{name}_negatives")
    pairs = np.concatenate([linked, others])
    labels = np.r_[np.ones(len(linked)), np.zeros(len(others))]
    scores = np.sum(codes[pairs[:, 0]] * codes[pairs[:, 1]], axis=1)
    return roc_auc_score(labels, scores), average_precision_score(labels, scores)


class Problem(NamedTuple):
    config: Any
    graph: graphs.Graph
    data: dam_graph_members.Data
    runs: list
    module: GraphAutoencoder
    members: Member


@functools.cache
def problem(variational=False):
    """Two coefficients and two seeds on a small graph."""
    config = get_config(seeds=(3, 8), **{"model.variational": variational})
    graph = graphs.blocks(num_nodes=40, num_blocks=2, num_features=12, degree=6.0)
    data = dam_graph_members.make_data(config, graph)
    runs = dam_graph_members.gated_runs(config)
    module = dam_graph_members.autoencoder(config, True, 16)
    members = dam_graph_members.start_members(config, module, runs, data)
    return Problem(config, graph, data, runs, module, members)


def test_members_differ_by_seed_and_coefficient_alone():
    config, _, _, runs, _, members = problem()
    assert dam_graph_members.member_names(True, runs) == [
        "dam-c0.01-s3", "dam-c0.01-s8", "dam-c0.1-s3", "dam-c0.1-s8"
    ]  # fmt: skip
    np.testing.assert_allclose(members.context["coefficient"], [0.01, 0.01, 0.1, 0.1])
    assert members.context["set"].tolist() == [0, 1, 0, 1]
    np.testing.assert_array_equal(members.params["gate"]["beta"], np.ones(4))
    for name, width in (("layers_0", 32), ("layers_1", 16)):
        kernel = np.asarray(members.params["encoder"][name]["kernel"])
        assert kernel.shape[2] == width
        np.testing.assert_array_equal(kernel[:2], kernel[2:])
        assert not np.allclose(kernel[0], kernel[1])
    assert dam_graph_members.member_names(False, dam_graph_members.plain_runs(config, 4)) == [
        "gae-d4-s3", "gae-d4-s8"
    ]  # fmt: skip


def test_every_seed_has_links_of_its_own():
    _, graph, data, *_ = problem()
    np.testing.assert_allclose(
        np.bincount(np.asarray(data.features.rows), data.features.values), 1.0, rtol=1e-6
    )
    for index, seed in enumerate((3, 8)):
        held = jax.tree.map(lambda leaf, i=index: np.asarray(leaf[i]), data.links)
        parts = links.split(graph.edges, 40, seed=seed)
        for found, expected in zip(held.parts, parts, strict=True):
            np.testing.assert_array_equal(found, expected)
        # Messages are passed along links to train on, and along no other.
        a = np.zeros((40, 40))
        a[held.adjacency.rows, held.adjacency.columns] = held.adjacency.values
        np.testing.assert_allclose(a, dense_adjacency(parts.train, 40), rtol=1e-6)
        assert held.excluded.tolist() == links.pair_numbers(parts.train, 40).tolist()


def test_codes_are_written_without_what_is_closed(tmp_path):
    _, _, data, _, module, members = problem()
    params = {**members.params, "gate": {"beta": jnp.array([-2.5, -5.0, 1.0, 0.0])}}
    members = members._replace(params=params)
    # Order numbers 5 / 16 to 5 less 2.5 are positive from the ninth on.
    assert study.save_codes(tmp_path / "c", list("abcd"), module, members, data) == [8, 0, 16, 16]
    params = jax.tree.map(lambda leaf: leaf[0], params)
    own = jax.tree.map(lambda leaf: leaf[0], data.links)
    codes = module.apply({"params": params}, data.features, own.adjacency, method="encode")
    with np.load(tmp_path / "c" / "a.npz") as first, np.load(tmp_path / "c" / "b.npz") as second:
        np.testing.assert_allclose(first["codes"], codes[:, 8:], rtol=1e-4, atol=1e-6)
        assert second["codes"].shape == (40, 0) and not np.any(codes[:, :8])


def test_sizes_of_plain_autoencoders():
    config = get_config()
    assert dam_graph_members.plain_sizes(config, [3, 0, 7, 3]) == [3, 7, 16]
    assert dam_graph_members.plain_sizes(get_config(sizes=(8, 2)), [3.0]) == [2, 8]


@pytest.mark.parametrize("variational", [False, True])
def test_the_objective_by_hand(variational):
    """The cross-entropy, the divergence by the number of nodes, the penalty; what is measured."""
    _, graph, data, _, module, members = problem(variational)
    member = jax.tree.map(lambda leaf: leaf[-1], members)
    # Weights of which logits are of some size, and a gate with five dimensions closed.
    params = jax.tree.map(lambda leaf: 2 * leaf, member.params)
    params["gate"] = {"beta": jnp.float32(-1.7)}
    member = member._replace(params=params)
    terms, key = study.training_terms(module), jax.random.key(5)

    @jax.jit
    def measure(member, key, data):
        batch = study.own_links(member, data, None)
        inputs = TermInputs(member.params, member.masks, member.context, batch, key)
        return {name: term(inputs) for name, term in terms.items()}, study.evaluate(
            module, member, data
        )

    found, values = measure(member, key, data)
    parts = links.split(graph.edges, 40, seed=8)
    x = graph.x.dense().astype(float)
    x /= x.sum(1, keepdims=True)
    hidden, layer = hidden_and_layer(params, x, dense_adjacency(parts.train, 40))
    mean = layer(params["encoder"]["layers_1"], hidden)
    gates = np.maximum(np.tanh(5 * np.arange(1, 17) / 16 - 1.7), 0)
    assert int(values["dimensions"]) == np.sum(gates > 0) == 11
    pairs, noise = jax.random.split(key)
    codes, kl = mean * gates, 0.0
    if variational:
        log_std = layer(params["log_std"], hidden)
        rng = study.NOISE
        drawn = module.apply(
            {"params": params}, data.features, adjacency(parts.train, 40), method="draw",
            rngs={rng: noise},
        )[0]  # fmt: skip
        codes = np.asarray(drawn, float)
        kl = np.mean(np.sum(np.exp(2 * log_std) + mean**2 - 1 - 2 * log_std, axis=1)) / 2
        np.testing.assert_allclose(found["links"][1]["divergence"], kl, rtol=1e-4)
    excluded = links.pair_numbers(parts.train, 40)
    negatives = np.asarray(links.sample_unlinked(pairs, excluded, 40, len(excluded)))
    assert len(negatives) == 2 * len(parts.train) + 40
    logits = [np.sum(codes[p[:, 0]] * codes[p[:, 1]], axis=1) for p in (parts.train, negatives)]
    expected = np.mean(np.log1p(np.exp(-logits[0]))) + np.mean(np.log1p(np.exp(logits[1])))
    np.testing.assert_allclose(found["links"][0], expected + kl / 40, rtol=1e-4)
    np.testing.assert_allclose(found["gate"][0], 0.1 * -1.7, rtol=1e-6)
    for name in ("validation", "test"):
        auc, precision = measured(mean * gates, parts, name)
        np.testing.assert_allclose(values[f"{name}_auc"], auc, rtol=1e-5)
        np.testing.assert_allclose(values[f"{name}_ap"], precision, rtol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that was stopped in its second stage, and then went on."""
    config = get_config(sizes=(3,))
    workdir = tmp_path_factory.mktemp("graph") / "w"
    write = MetricsLog.write

    def stopping(log, step, values, **kwargs):
        record = write(log, step, values, **kwargs)
        if log.stage == "gae3" and step == 10:
            raise KeyboardInterrupt
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            study.run(config, workdir)
        assert not (workdir / "summary.json").exists()
    return config, workdir, study.run(config, workdir)


def test_the_report_follows_from_the_records(finished):
    _, workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    rows = summary["networks"]
    assert [(row["method"], row["size"], row["coefficient"]) for row in rows] == [
        ("dam", 16, 0.01), ("dam", 16, 0.1), ("gae", 3, 0.0)
    ]  # fmt: skip
    text = (workdir / "report.md").read_text()
    assert "after 20 steps" in text and "of 16 at the start" in text
    for index, (row, stage) in enumerate(zip(rows, ("dam", "dam", "gae3"), strict=True)):
        records = [json.loads(line) for line in (workdir / f"{stage}.jsonl").open()]
        assert [record["step"] for record in records] == [0, 10, 20]
        members = slice(2 * (index % 2), 2 * (index % 2) + 2)
        aucs = records[-1]["test_auc"][members]
        assert row["test_auc"]["values"] == aucs and row["seeds"] == [1, 2]
        size = "16, 16" if stage == "dam" else "3, 3"
        mean, std = 50 * sum(aucs), 100 * abs(aucs[0] - aucs[1]) / 2**0.5
        assert f"| {size} | {mean:.2f} ± {std:.2f} |" in text
    for name in ("link_prediction", "dimensions"):
        for suffix in ("png", "pdf"):
            assert (workdir / "figures" / f"{name}.{suffix}").stat().st_size > 1000


def test_measures_are_those_of_saved_networks(finished):
    """From the files, with the library alone, and cut to what is open."""
    _, workdir, summary = finished
    graph = graphs.blocks()
    x = graphs.normalise_rows(graph.x)
    features = SparseMatrix(*x[:3], shape=x.shape)
    parts = links.split(graph.edges, 600, seed=2)
    messages = adjacency(parts.train, 600)
    for row, name, module in (
        (1, "dam-c0.1-s2", GraphAutoencoder(kind=Dam())),
        (2, "gae-d3-s2", GraphAutoencoder((32, 3))),
    ):
        params, _ = load_network(workdir / "networks" / f"{name}.safetensors")
        small, weights = cut(module, params)
        codes = small.apply({"params": weights}, features, messages, method="encode")
        whole = module.apply({"params": params}, features, messages, method="encode")
        np.testing.assert_allclose(
            decode(codes, parts.test), decode(whole, parts.test), rtol=1e-3, atol=1e-6
        )
        with np.load(workdir / "embeddings" / f"{name}.npz") as file:
            np.testing.assert_allclose(file["codes"], codes, rtol=1e-3, atol=1e-6)
        auc, precision = measured(np.asarray(codes), parts, "test")
        found = summary["networks"][row]
        # Scores differ by rounding, which may move a pair past another.
        np.testing.assert_allclose(found["test_auc"]["values"][1], auc, atol=1e-3)
        np.testing.assert_allclose(found["test_ap"]["values"][1], precision, atol=1e-3)


def row(method, size, coefficient, dimensions, aucs):
    spreads = {name: report.spread(aucs) for name in report._QUANTITIES}
    spreads["dimensions"] = report.spread(dimensions)
    return {
        "method": method, "size": size, "coefficient": coefficient, "seeds": [1, 2, 3], **spreads
    }  # fmt: skip


def test_a_figure_of_codes_that_are_all_closed(tmp_path):
    rows = [row("dam", 16, 5.0, [0] * 3, [0.5] * 3), row("gae", 16, 0.0, [16] * 3, [0.9] * 3)]
    report._draw(tmp_path / "figure", get_config(seeds=(1, 2, 3)), rows)
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_networks_are_compared_with_those_of_their_own_sizes():
    """Seed by seed, whatever sizes the seeds ended with; a closed code has nothing to compare."""
    config = get_config(seeds=(1, 2, 3))
    rows = [
        row("dam", 16, 0.1, [2, 4, 0], [0.9, 0.8, 0.5]),
        row("gae", 2, 0.0, [2, 2, 2], [0.7, 0.1, 0.2]),
        row("gae", 4, 0.0, [4, 4, 4], [0.3, 0.5, 0.4]),
    ]
    found = report._comparisons(config, rows)
    assert [(one["quantity"], one["baseline"]) for one in found] == [
        ("test_auc", "equal"), ("test_ap", "equal")
    ]  # fmt: skip
    for one in found:
        np.testing.assert_allclose(one["mean"], ((0.9 - 0.7) + (0.8 - 0.5)) / 2)
        assert one["seeds"] == [1, 2] and one["n"] == 2
        assert one["p_value_holm"] == one["p_value"]
    rows.append(row("gae", 16, 0.0, [16] * 3, [0.6, 0.6, 0.6]))
    whole = [one for one in report._comparisons(config, rows) if one["baseline"] == "whole"]
    np.testing.assert_allclose([one["mean"] for one in whole], (0.3 + 0.2 - 0.1) / 3)
    text = report._markdown(config, rows, report._comparisons(config, rows), 20)
    (line,) = [line for line in text.splitlines() if line.startswith("| 0.1 | 2 | +25.00")]
    assert line.count("|") == 7
    assert "| GAE-DAM | 0.1 | 2.0 ± 2.0 | 2, 4, 0 |" in text and "| GAE |  | 16.0" in text
    variational = get_config("blocks,variational,smoke", seeds=(1, 2, 3))
    assert "| VGAE-DAM | 0.1 |" in report._markdown(variational, rows, [], 20)


def test_published_settings():
    """Table 3 and Appendix D.1, and the published example."""
    for name in ("cora", "citeseer", "pubmed"):
        config = configs.get_config(name)
        assert (config.training.epochs, config.training.learning_rate) == (1000, 0.01)
        assert (config.initial, len(config.seeds), config.data.name) == (1.0, 5, name)
        assert (config.coefficients[0], config.coefficients[-1]) == (0.01, 5.0)
        assert (config.model.hidden, config.model.bottleneck) == (32, 16)
        assert (config.data.validation_fraction, config.data.test_fraction) == (0.05, 0.1)
        assert configs.get_config(f"{name},variational").model.variational
    for name in configs._CONFIGS:
        dam_graph_checks.check_config(configs.get_config(name))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coefficients": (-1.0,)}, "config.coefficients holds -1.0"),
        ({"coefficients": (math.nan,)}, "config.coefficients holds nan"),
        ({"seeds": (1, 1)}, "config.seeds"),
        ({"sizes": (17,)}, "config.sizes holds 17"),
        ({"sizes": (2.5,)}, "config.sizes is (2.5,)"),
        ({"initial": -5.0}, "config.initial is -5.0"),
        ({"model.bottleneck": 1}, "config.model.bottleneck is 1"),
        ({"model.hidden": 0}, "config.model.hidden is 0"),
        ({"training.epochs": 0}, "config.training.epochs is 0"),
        ({"training.learning_rate": math.nan}, "config.training.learning_rate is nan"),
        ({"data.validation_fraction": 0.0}, "validation_fraction=0.0"),
        ({"data.test_fraction": 0.99}, "leave links to train on"),
        ({"data.name": "cora"}, "there is no folder for the graph 'cora'"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_before_any_work(tmp_path, fields, message):
    with pytest.raises(UserError) as raised:
        study.run(get_config(**fields), tmp_path / "w")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "w").exists()


def test_files_are_fetched_only_when_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        dam_graph_members.planetoid, "download", lambda *arguments: asked.append(arguments)
    )
    for download in (False, True):
        config = get_config(**{"data.name": "cora", "data.download": download})
        with pytest.raises(UserError, match=r"no files ind\.cora"):
            study.run(config, tmp_path / "w", data_dir=str(tmp_path))
    assert asked == [("cora", f"{tmp_path}/planetoid")]


def test_real_links():
    """Cora: the sizes of the published split."""
    folder = os.environ.get("PLANETOID_DIR")
    if not folder:
        pytest.skip("the real graphs are read where PLANETOID_DIR names their folder")
    config = get_config("cora,smoke")
    graph = dam_graph_members.load_graph(config, folder)
    parts = dam_graph_members.make_data(config, graph).links.parts
    assert [part.shape[1] for part in parts] == [4488, 263, 263, 527, 527]


def test_help_explains_itself():
    result = subprocess.run(
        [sys.executable, "-m", "experiments.dam_graph", "--help"],
        cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert "which links are predicted" in result.stdout and "citeseer" in result.stdout
