"""What the CKA-SR study measures, and its report."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cka_sr_problems import get_config, hand_cka, tiny_split

from experiments import (
    figures,
    sparse_training_members,
    sparse_training_report,
    sparse_training_stages,
    sparse_training_study,
    study,
)
from experiments.sparse_training_members import Run
from ntt_sparse.data import images
from ntt_sparse.models.resnet import ResNet
from ntt_sparse.pruning import masks
from ntt_sparse.training.export import load_model_state, load_network
from ntt_sparse.training.metrics import MetricsLog
from ntt_sparse.training.state import create_member

# What is measured


def relu_network(params, x):
    """Features before the ReLU, in float64."""
    hidden, maps = np.asarray(x, np.float64).reshape(len(x), -1), []
    for layer in range(len(params)):
        dense = params[f"Dense_{layer}"]
        maps.append(hidden @ np.asarray(dense["kernel"], float) + np.asarray(dense["bias"], float))
        hidden = np.maximum(maps[-1], 0)
    return maps


def test_evaluation_and_files_hold_running_statistics(tmp_path):
    module, train = ResNet(blocks_per_stage=1, channels=(4,)), tiny_split()
    config = get_config(stages=("Conv_0,stage1_block1",))
    variables = jax.jit(module.init)(jax.random.key(0), train.x[:1])
    rng = np.random.default_rng(3)
    stats = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.2, 2, leaf.shape), leaf.dtype),
        variables["batch_stats"],
    )
    params = variables["params"]
    member = create_member(
        params, masks.full(params), sparse_training_stages.make_optimizer(config, total_steps=2),
        jax.random.key(0), (), {"batch_stats": stats},
    )  # fmt: skip
    values = jax.jit(sparse_training_stages.evaluation(config, module))(
        member, tuple(train), (train.x[:9], train.y[:9]), train.x[:12]
    )
    logits, found = jax.jit(lambda variables: module.apply(
        variables, train.x, capture_intermediates=True
    ))({"params": params, "batch_stats": stats})  # fmt: skip
    logits = np.asarray(logits, float)
    accuracy = np.mean(logits.argmax(1) == train.y)
    np.testing.assert_allclose(values["validation/accuracy"], accuracy, rtol=1e-6)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(40), train.y]
    np.testing.assert_allclose(values["validation/loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(values["test/loss"], losses[:9].mean(), rtol=1e-5)
    maps = [
        np.asarray(found["intermediates"][name]["__call__"][0], float)[:12]
        for name in ("Conv_0", "stage1_block1")
    ]
    for name, debiased in (("cka", False), ("cka_debiased", True)):
        expected = hand_cka(*maps, debiased)
        np.testing.assert_allclose(values[f"similarity/{name}"], expected, atol=1e-5)
    # With statistics of the batch it would be another number.
    batch_logits, _ = jax.jit(lambda variables: module.apply(
        variables, train.x, train=True, mutable="batch_stats"
    ))({"params": params, "batch_stats": stats})  # fmt: skip
    assert np.max(np.abs(batch_logits - logits)) > 0.1

    other = member._replace(model_state={"batch_stats": variables["batch_stats"]})
    members = study.stack([member, other])
    study.save_networks(tmp_path / "networks", ["one", "two"], members)
    for name, expected in (("one", stats), ("two", variables["batch_stats"])):
        loaded = load_model_state(tmp_path / "networks" / f"{name}.safetensors")["batch_stats"]
        assert jax.tree.structure(loaded) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)


# A finished study, and its report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cka_sr") / "w"
    config = get_config(regularisers="aug_cka_sr_debiased", density=(0.1,), coefficients=(0.5,))
    return config, workdir, sparse_training_study.run(config, workdir)


def test_measurements_are_those_of_the_saved_networks(finished):
    config, workdir, _ = finished
    measured = np.load(workdir / "measurements.npz")
    names = sparse_training_members.member_names(sparse_training_members.runs_of(config))
    assert len(names) == 4 and measured["cka"].shape == (4, 2, 2)
    probe = images.load("digits", validation_fraction=0.1, seed=9).validation.x[:16]
    networks = [load_network(workdir / "networks" / f"{name}.safetensors") for name in names]
    log = MetricsLog(workdir / "supervised.jsonl", "supervised")
    assert log.column("similarity/cka")[0].tolist() == [0, 6, 12]
    last = log.records[-1]
    everything = []
    for index, (params, kept) in enumerate(networks):
        maps = relu_network(params, probe)[:2]
        for name, debiased in (("cka", False), ("cka_debiased", True)):
            expected = hand_cka(*maps, debiased)
            matrix = measured[name][index]
            np.testing.assert_allclose(matrix, [[1, expected], [expected, 1]], atol=1e-5)
            np.testing.assert_allclose(last[f"similarity/{name}"][index], expected, atol=1e-5)
        weights = np.concatenate([
            np.asarray(params[layer]["kernel"])[np.asarray(kept[layer]["kernel"])]
            for layer in params
        ])  # fmt: skip
        everything.append(weights)
        for epsilon in (1e-3, 1e-2):
            value = last[f"epsilon_sparsity/{epsilon!r}"][index]
            np.testing.assert_allclose(value, np.mean(np.abs(weights) < epsilon), rtol=1e-6)
    largest = max(np.max(np.abs(weights)) for weights in everything)
    np.testing.assert_allclose(measured["edges"], np.linspace(-largest, largest, 202), rtol=1e-6)
    for counts, weights in zip(measured["counts"], everything, strict=True):
        assert counts.sum() == len(weights)
        assert counts.tolist() == np.histogram(weights, measured["edges"])[0].tolist()


def paired_by_hand(differences):
    """Student's t with one or two degrees of freedom, in closed form."""
    d = np.asarray(differences, float)
    mean, error = d.mean(), d.std(ddof=1) / math.sqrt(len(d))
    t = abs(mean) / error
    critical = {2: 12.706204736432095, 3: 4.302652729911275}[len(d)]
    p = 1 - 2 / math.pi * math.atan(t) if len(d) == 2 else 1 - t / math.sqrt(2 + t * t)
    return {"mean": mean, "low": mean - critical * error, "high": mean + critical * error,
            "p_value": p}  # fmt: skip


def check_summary(config, workdir, summary):
    """Every comparison of the summary, recomputed from the records."""
    runs = sparse_training_members.runs_of(config)
    records = [json.loads(line) for line in (workdir / "supervised.jsonl").read_text().splitlines()]
    validation = np.array([record["validation/accuracy"] for record in records])
    test = np.array([record["test/accuracy"] for record in records])
    at_best = test[validation.argmax(0), np.arange(len(runs))]
    assert summary["supervised"] == json.loads((workdir / "summary.json").read_text())["supervised"]
    p_values = {"last": [], "best_validation": []}
    for row in summary["supervised"]:

        def of(values, name, coefficient, row=row):
            chosen = [
                i for seed in config.seeds for i, run in enumerate(runs)
                if run == Run(name, coefficient, row["density"], seed)
            ]  # fmt: skip
            return values[chosen]

        own = (row["regulariser"], row["coefficient"])
        last = of(test[-1], *own)
        assert row["test_accuracy_last"]["values"] == last.tolist()
        np.testing.assert_allclose(row["test_accuracy_last"]["mean"], last.mean())
        np.testing.assert_allclose(row["test_accuracy_last"]["std"], last.std(ddof=1), atol=1e-12)
        assert row["test_accuracy_best_validation"]["values"] == of(at_best, *own).tolist()
        similarity = of(np.array(records[-1]["similarity/cka"]), *own)
        np.testing.assert_allclose(row["similarity/cka"]["mean"], similarity.mean())
        assert ("less_baseline_last" in row) == (row["regulariser"] != "none")
        if row["regulariser"] == "none":
            continue
        for name, values in (("last", test[-1]), ("best_validation", at_best)):
            comparison = row[f"less_baseline_{name}"]
            differences = of(values, *own) - of(values, "none", 0.0)
            if comparison["p_value"] is not None:
                p_values[name].append((comparison["p_value"], comparison["p_value_holm"]))
            np.testing.assert_allclose(comparison["mean"], differences.mean(), atol=1e-12)
            # Of accuracies, which differ by an image or not at all.
            assert (comparison["p_value"] is not None) == (np.ptp(differences) > 1e-5)
            if comparison["p_value"] is not None:
                for key, value in paired_by_hand(differences).items():
                    np.testing.assert_allclose(comparison[key], value, rtol=1e-6, atol=1e-9)
    for pairs in filter(None, p_values.values()):
        plain, corrected = np.array(pairs).T
        # Holm: the largest of (m - j) p_j over all p_j that are not larger, at most 1.
        order = np.argsort(plain, kind="stable")
        steps = np.minimum((len(plain) - np.arange(len(plain))) * plain[order], 1)
        np.testing.assert_allclose(corrected[order], np.maximum.accumulate(steps), rtol=1e-12)


def test_the_summary_follows_from_the_records(finished):
    config, workdir, summary = finished
    check_summary(config, workdir, summary)
    assert len(summary["supervised"]) == 2 and summary["published"] == []
    assert json.loads((workdir / "summary.json").read_text()) == summary
    names = ["less_baseline_against_density", "accuracy_against_density"] + [
        f"{kind}_d{density!r}_s1"
        for kind in ("cka", "cka_debiased", "weights")
        for density in config.density
    ]
    for name in names:
        for suffix in ("png", "pdf"):
            assert (workdir / "figures" / f"{name}.{suffix}").stat().st_size > 1000
    report = (workdir / "report.md").read_text()
    assert report.count("\n| 0.1 |") == 2 and "AugCKA-SR, debiased, 0.5" in report


def test_the_report_of_made_records(tmp_path, monkeypatch):
    """Test accuracy never chooses, p-values are corrected, published numbers stand beside."""
    drawn = []
    monkeypatch.setattr(figures, "heat_maps", lambda path, maps: drawn.append((path.name, maps)))
    monkeypatch.setattr(figures, "histograms", lambda path, *rest: drawn.append((path.name, *rest)))
    config = get_config("table3", seeds=(1, 2, 3), coefficients=(8e-4, 1e-2))
    runs = sparse_training_members.runs_of(config)
    rng = np.random.default_rng(5)
    log = MetricsLog(tmp_path / "supervised.jsonl", "supervised")
    names = ("validation/accuracy", "test/accuracy", "similarity/cka", "similarity/cka_debiased",
             "epsilon_sparsity/0.001", "epsilon_sparsity/0.01")  # fmt: skip
    records = {step: {name: rng.random(len(runs)) for name in names} for step in (0, 5, 10)}
    # Of CKA-SR, 0.01 validates best and tests worst; its best validation is before its end.
    chosen = [i for i, run in enumerate(runs) if run[:2] == ("cka_sr", 1e-2)]
    for step, (validation, test) in {0: (0.1, 0.9), 5: (0.999, 0.3), 10: (0.99, 0.2)}.items():
        records[step]["validation/accuracy"][chosen] = validation
        records[step]["test/accuracy"][chosen] = test + np.array([0.01, 0.02, 0.04])
    kept = np.full((len(runs), 2), 7)
    kept[chosen[:2], 1] = 0
    for step, values in records.items():
        log.write(step, {**values, "kept": kept})
    matrices = rng.random((len(runs), 2, 2))
    counts = np.arange(len(runs))[:, None] * np.ones(3, int)
    np.savez(
        tmp_path / "measurements.npz",
        cka=matrices, cka_debiased=-matrices, counts=counts, edges=np.arange(4.0),
    )  # fmt: skip
    summary = sparse_training_report.write(config, tmp_path, {"first": 20, "second": 10})
    check_summary(config, tmp_path, summary)
    choice = {row["regulariser"]: row["coefficient"] for row in summary["chosen_by_validation"]}
    assert choice["cka_sr"] == 1e-2 and choice["none"] == 0.0
    row = summary["supervised"][[r["coefficient"] for r in summary["supervised"]].index(1e-2)]
    # A layer that collapsed is said, with the number of seeds.
    assert row["empty_layers"] == {"second": 2} and row["kept"] == [[7, 0], [7, 0], [7, 7]]
    assert "- density 0.05, CKA-SR, 0.01: second (2)" in (tmp_path / "report.md").read_text()
    assert row["best_validation_step"] == [5, 5, 5]
    np.testing.assert_allclose(
        row["test_accuracy_best_validation"]["values"], [0.31, 0.32, 0.34], rtol=1e-12
    )
    # Ni et al. 2023, appendix, Table 3.
    published = {
        (row["regulariser"], row["coefficient"]): row["test_accuracy"]
        for row in summary["published"]
    }
    assert published["cca_sr", None] == 0.8458 and published["none", 0.0] == 0.8416
    # Table 2, "Original", whose best is quoted in Table 3.
    assert published["cka_sr", 8e-4] == 0.8503 and len(published) == 14
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    report = (tmp_path / "report.md").read_text()
    assert "- density 0.05: CKA-SR, 0.0008: 85.03\n" in report
    assert "- density 0.05: CCA, not said: 84.58\n" in report
    assert "- density 0.05: CKA-SR, 0.01\n" in report
    # Each figure shows the first seed of every regulariser and coefficient.
    assert [name for name, *_ in drawn] == [
        "cka_d0.05_s1",
        "cka_debiased_d0.05_s1",
        "weights_d0.05_s1",
    ]
    labels = ["none", "CKA-SR, 0.0008", "CKA-SR, 0.01", "CCA, 0.0008", "CCA, 0.01"]
    for (_, *_, shown), array in zip(drawn, (matrices, -matrices, None), strict=True):
        assert list(shown) == labels
        for index, values in zip((0, 3, 6, 9, 12), shown.values(), strict=True):
            expected = [index] * 3 if array is None else array[index]
            np.testing.assert_array_equal(values, expected)


def test_published_numbers_are_those_of_the_settings():
    """Table 2 has a row for each way to save work; Table 5 is of CIFAR-100."""

    def of(name, **fields):
        return {
            (row["density"], row["regulariser"], row["coefficient"]): row["test_accuracy"]
            for row in sparse_training_report.published(get_config(name, **fields))
        }

    best = {
        "table2_sample16_batch5": (8e-5, 0.8490),
        "table2_sample8_batch5": (1e-4, 0.8497),
        "table2_sample4_batch5": (8e-4, 0.8492),
        "table2_sample8_batch10": (5e-5, 0.8462),
    }
    for name, (coefficient, value) in best.items():
        found = of(name)
        assert found[0.05, "cka_sr", coefficient] == value and len(found) == 13
    table5 = of("table5")
    assert table5[0.02, "aug_cka_sr", None] == 0.346 and len(table5) == 18
    assert of("table5", density=(0.05,))[0.05, "none", 0.0] == 0.4727
    assert of("table3", layer_densities="uniform") == {} == of("mnist_lenet300")
