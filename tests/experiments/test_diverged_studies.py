"""Networks that diverge in any stage of a study: the others go on, and only they are reported."""

import itertools
import json

import diverging
import numpy as np
import pytest
import sparse_training_problems

from experiments import (
    dam_autoencoder_study,
    dam_graph_study,
    dam_pruning_compact,
    dam_pruning_stages,
    dam_pruning_study,
    dam_recommender_study,
    dam_representation_study,
    neuron_pruning_study,
    ntt_study,
    sparse_training_gone,
    sparse_training_study,
    tokens_study,
)
from experiments.configs import dam_autoencoder as autoencoder_configs
from experiments.configs import dam_graph as graph_configs
from experiments.configs import dam_pruning as pruning_configs
from experiments.configs import dam_recommender as recommender_configs
from experiments.configs import dam_representation as representation_configs
from experiments.configs import neuron_pruning as neuron_configs
from experiments.configs import ntt as ntt_configs
from experiments.configs import tokens as tokens_configs
from experiments.dam_pruning_members import member_names, runs_of
from experiments.report_readings import READINGS
from experiments.statistics import paired, spread
from ntt_sparse import models
from ntt_sparse.data import graphs
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.models.vit import VisionTransformer
from ntt_sparse.training.divergence import Divergence, DivergenceError
from ntt_sparse.training.metrics import MetricsLog

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error:No artists:UserWarning")


def settings(configs, name, fields):
    config = configs.get_config(name)
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


@pytest.mark.slow
def test_graphs(tmp_path, monkeypatch):
    """A coefficient of which one seed is left, one of which none is, and a plain network."""
    fields = {
        "seeds": (1, 2, 3), "coefficients": (0.01, 0.1, 0.2), "sizes": (16,),
        "training.max_steps": 2, "training.record_every": 1, "model.hidden": 4,
    }  # fmt: skip
    config = settings(graph_configs, "blocks,smoke", fields)
    graph = graphs.blocks(num_nodes=40, num_blocks=2, num_features=12, degree=6.0)
    monkeypatch.setattr(dam_graph_study, "load_graph", lambda config, data_dir: graph)
    bad = {
        "dam": ["dam-c0.01-s1", *(f"dam-c0.1-s{seed}" for seed in (1, 2, 3))],
        "gae16": ["gae-d16-s3"],
    }
    summary = diverging.run(dam_graph_study, config, tmp_path, bad)
    expected = [(stage, name) for stage, names in bad.items() for name in names]
    text = diverging.check(tmp_path, summary, expected)
    rows = {(row["method"], row["size"], row["coefficient"]): row for row in summary["networks"]}
    assert [key[2] for key in rows] == [0.01, 0.2, 0.0]
    gated, plain = rows["dam", 16, 0.01], rows["gae", 16, 0.0]
    assert gated["seeds"] == [2, 3] and plain["seeds"] == [1, 2]
    aucs = diverging.last(tmp_path, "dam", "test_auc")
    assert gated["test_auc"] == spread(aucs[[1, 2]])
    assert "(n = 2)" in text and "| 0.1 |  |  |  |  |  |" in text
    compared = next(
        row for row in summary["comparisons"]
        if (row["coefficient"], row["quantity"], row["baseline"]) == (0.01, "test_auc", "whole")
    )  # fmt: skip
    theirs = diverging.last(tmp_path, "gae16", "test_auc")
    assert compared["seeds"] == [2]
    assert compared["mean"] == paired(aucs[[1]], theirs[[1]])["mean"]
    left = {f"dam-c{c}-s{s}" for c in (0.01, 0.2) for s in (1, 2, 3)} - {"dam-c0.01-s1"}
    left |= {f"gae-d{d}-s{s}" for d in (16,) for s in (1, 2)}
    assert diverging.networks(tmp_path) == left
    assert {path.stem for path in (tmp_path / "embeddings").iterdir()} == left
    assert np.isnan(aucs[[0, 3, 4, 5]]).all()


@pytest.mark.slow
def test_autoencoders(tmp_path):
    """A coefficient of which one seed is left, and one of which none is."""
    fields = {
        "gates": "dam", "dam_coefficients": (0.01, 0.1, 0.2), "seeds": (1, 2),
        "training.max_steps": 2, "training.record_every": 1, "model.hidden": (4,),
        "model.bottleneck": 3, "downstream.examples": 20, "downstream.epochs": 1,
    }  # fmt: skip
    config = settings(autoencoder_configs, "digits,smoke", fields)
    bad = {"dam": ["dam-c0.01-s1", "dam-c0.1-s1", "dam-c0.1-s2"]}
    summary = diverging.run(dam_autoencoder_study, config, tmp_path, bad)
    text = diverging.check(tmp_path, summary, [("dam", name) for name in bad["dam"]])
    one, both = summary["networks"]
    assert (one["coefficient"], one["seeds"]) == (0.01, [2])
    assert (both["coefficient"], both["seeds"]) == (0.2, [1, 2])
    errors = diverging.last(tmp_path, "dam", "reconstruction")
    assert one["reconstruction"] == spread(errors[[1]])
    assert both["reconstruction"] == spread(errors[[4, 5]])
    assert "(n = 1)" in text and "| 0.1 |" not in text
    left = {"dam-c0.01-s2", "dam-c0.2-s1", "dam-c0.2-s2"}
    assert diverging.networks(tmp_path) == left
    assert {path.stem for path in (tmp_path / "downstream").iterdir()} == left


@pytest.mark.slow
def test_representations(tmp_path):
    """A map with an empty cell; the others are what they are without those that diverge."""
    fields = {
        "coefficients": (0.01, 0.1), "learning_rates": (0.01, 0.02), "ranks": (2, 3),
        "training.max_steps": 2, "training.record_every": 1, "dimension": 6, "bottleneck": 4,
        "examples": 10,
    }  # fmt: skip
    config = settings(representation_configs, "linear,smoke", fields)
    names = [f"dam-r{r}-c{c}-l{rate}-b1.0-s{s}" for r, c, rate, s in itertools.product(
        (2, 3), (0.01, 0.1), (0.01, 0.02), (1, 2)
    )]  # fmt: skip
    # Of rank 2 the first setting, and one seed of another.
    bad = [names[0], names[1], names[2]]
    whole = diverging.run(dam_representation_study, config, tmp_path / "whole", {})
    assert "diverged" not in whole
    workdir = tmp_path / "w"
    summary = diverging.run(dam_representation_study, config, workdir, {"dam": bad})
    text = diverging.check(workdir, summary, [("dam", name) for name in bad])
    others = whole["networks"][2:]
    assert len(whole["networks"]) == 8 and summary["networks"][1:] == others
    assert summary["networks"][0]["seeds"] == [2] and "(n = 1)" in text
    assert "of 13 networks" in text
    found = diverging.last(workdir, "dam", "reconstruction")
    expected = diverging.last(tmp_path / "whole", "dam", "reconstruction")
    np.testing.assert_array_equal(found[3:], expected[3:])
    assert np.isnan(found[:3]).all()
    assert diverging.networks(workdir) == set(names) - set(bad)
    for name in names[3:]:
        saved = [
            path / "networks" / f"{name}.safetensors" for path in (workdir, tmp_path / "whole")
        ]
        assert saved[0].read_bytes() == saved[1].read_bytes()
    with pytest.raises(DivergenceError, match="none of the 16 members is left"):
        diverging.run(dam_representation_study, config, tmp_path / "none", {"dam": names})


@pytest.mark.slow
def test_recommenders(tmp_path):
    """Gone in the first part of the training is gone in the second; also after a kill."""
    fields = {
        "dam_coefficients": (0.1, 0.5), "seeds": (1, 2, 3), "training.max_steps": 4,
        "training.batch_size": 300, "training.record_every": 2, "model.widths": (3,),
        "model.bases": 1, "model.code": 2,
    }  # fmt: skip
    config = settings(recommender_configs, "made,smoke", fields)
    bad = {
        "none-2": ["none-s3"],
        "dam-2": ["dam-c0.1-s1"],
        "dam-4": [f"dam-c0.5-s{seed}" for seed in (1, 2, 3)],
    }
    summary = diverging.run(
        dam_recommender_study, config, tmp_path, bad, killed_at=("dam-4", 2)
    )  # fmt: skip
    expected = [(stage, name) for stage, names in bad.items() for name in names]
    text = diverging.check(tmp_path, summary, expected)
    assert {row["step"] for row in summary["diverged"][2:]} == {2}
    plain, gated = summary["networks"]
    assert (plain["seeds"], gated["coefficient"], gated["seeds"]) == ([1, 2], 0.1, [2, 3])
    errors = {
        gate: json.loads((tmp_path / f"test_{gate}.json").read_text())["rmse"]
        for gate in ("none", "dam")
    }
    assert errors["dam"][0] is None and errors["dam"][3:] == [None] * 3
    assert gated["rmse"] == spread(errors["dam"][1:3])
    # Of the seeds that both have.
    difference = paired([errors["dam"][1]], [errors["none"][1]])
    assert gated["rmse_difference"]["mean"] == difference["mean"]
    assert gated["rmse_difference"]["n"] == 1
    assert "(n = 2)" in text
    left = {"none-s1", "none-s2", "dam-c0.1-s2", "dam-c0.1-s3"}
    assert diverging.networks(tmp_path) == left


@pytest.mark.slow
def test_tokens(tmp_path, monkeypatch):
    """A network is gone with the whole one it starts from; a variant of which all are, too."""
    module = VisionTransformer(10, patch=4, width=6, depth=2, heads=3)
    monkeypatch.setattr(models, "create", lambda name, num_outputs: module)
    fields = {
        "model.places": (1,), "keep": (0.75,), "seeds": (1, 2, 3), "cka": "no,training,both",
        "pretrain.max_steps": 2, "pretrain.record_every": 1, "dynamic.max_steps": 2,
        "dynamic.record_every": 1, "evaluated": 16,
    }  # fmt: skip
    config = settings(tokens_configs, "digits,smoke", fields)
    training = [f"whole_training-s{seed}" for seed in (1, 2, 3)]
    bad = {"pretrain": ["whole-s1", *training], "keep_0.75": ["keep_0.75-s3"]}
    summary = diverging.run(tokens_study, config, tmp_path, bad)
    expected = [
        *(("pretrain", name) for name in bad["pretrain"]),
        ("pretrain", "keep_0.75-s1"), ("keep_0.75", "keep_0.75-s3"),
        *(("pretrain", f"keep_0.75_{cka}-s{s}") for cka in ("training", "both") for s in (1, 2, 3)),
    ]  # fmt: skip
    text = diverging.check(tmp_path, summary, expected)
    assert [row.get("of") for row in summary["diverged"]] == [
        *[None] * 4, "whole-s1", None, *training, *training
    ]  # fmt: skip
    whole, kept = summary["networks"]
    assert (whole["seeds"], kept["seeds"]) == ([2, 3], [2])
    ours = diverging.last(tmp_path, "keep_0.75", "test/accuracy")
    theirs = diverging.last(tmp_path, "pretrain", "test/accuracy")
    assert kept["test_accuracy"] == spread(ours[[1]])
    assert kept["less_whole"]["mean"] == paired(ours[[1]], theirs[[1]])["mean"]
    assert "(n = 2)" in text and "| 0.75 | both |" not in text
    assert diverging.networks(tmp_path) == {"whole-s2", "whole-s3", "keep_0.75-s2"}
    assert not (tmp_path / "keep_0.75_both.jsonl").exists()


@pytest.mark.slow
def test_neurons(tmp_path):
    """Of a whole network that diverges nothing is pruned; one that does so later ends there."""
    fields = {
        "networks": "6-5", "seeds": (1, 2, 3), "criteria": "cka,l1", "iterations": 3,
        "training.max_steps": 2, "training.record_every": 1, "data.name": "digits", "samples": 8,
        "dropouts": (0.0,),
    }  # fmt: skip
    config = settings(neuron_configs, "iterative,smoke", fields)
    stages = ("6-5-whole", "6-5-r0.4-i01", "6-5-r0.4-i02")
    bad = {
        stages[0]: ["dense-p0.0-s1"], stages[1]: ["l1-p0.0-s2"],
        stages[2]: ["cka-p0.0-s2", "cka-p0.0-s3"],
    }  # fmt: skip
    summary = diverging.run(neuron_pruning_study, config, tmp_path, bad)
    expected = [
        (stages[0], "dense-p0.0-s1"), (stages[0], "cka-p0.0-s1"), (stages[0], "l1-p0.0-s1"),
        (stages[1], "l1-p0.0-s2"), (stages[2], "cka-p0.0-s2"), (stages[2], "cka-p0.0-s3"),
    ]  # fmt: skip
    text = diverging.check(tmp_path, summary, expected)
    (group,) = summary["groups"]
    seeds = [
        {name: cell["seeds"] for name, cell in row["criteria"].items()}
        for row in group["iterations"]
    ]
    assert seeds == [{"cka": [2, 3], "l1": [2, 3]}, {"cka": [2, 3], "l1": [3]}, {"l1": [3]}]
    found = json.loads((tmp_path / f"{stages[1]}.json").read_text())["networks"]
    ours, theirs = (
        next(row["test"] for row in found if (row["criterion"], row["seed"]) == (name, 3))
        for name in ("cka", "l1")
    )
    cell = group["iterations"][1]["criteria"]["cka"]
    assert cell["difference"]["n"] == len(cell["agreement"]["values"]) == 1
    assert cell["difference"]["mean"] == ours - theirs
    assert "(n = 1)" in text and "| 2 | 2, 2 | - |" in text
    assert diverging.networks(tmp_path) == {"dense-p0.0-s2", "dense-p0.0-s3", "l1-p0.0-s3"}
    read = READINGS["neuron_pruning"].rows(summary, config.to_dict())
    assert [row.seeds for row in read][2:] == [(2, 3), (3,), (3,)]


@pytest.mark.slow
def test_transfer(tmp_path, monkeypatch):
    """A network whose student diverged is in no row, as one that does so itself."""
    monkeypatch.setattr(models, "create", lambda name, num_outputs: LeNet(num_outputs, hidden=(5,)))
    fields = {
        "methods": "ntt,random", "seeds": (1, 2, 3), "density": (0.5, 0.7), "probe": 0,
        **{f"{stage}.{name}": value for stage in ("transfer", "supervised") for name, value in (
            ("max_steps", 2), ("record_every", 1), ("batch_size", 8)
        )},
    }  # fmt: skip
    config = settings(ntt_configs, "digits_lenet300,smoke", fields)
    bad = {
        "transfer": ["ntt-d0.5-s2", *(f"ntt-d0.7-s{seed}" for seed in (1, 2, 3))],
        "supervised": ["ntt-d0.5-s3", "random-d0.5-s1"],
    }
    summary = diverging.run(ntt_study, config, tmp_path, bad)
    expected = [(stage, name) for stage, names in bad.items() for name in names]
    text = diverging.check(tmp_path, summary, expected)
    seeds = {(row["method"], row["density"]): row["seeds"] for row in summary["supervised"]}
    assert seeds == {("ntt", 0.5): [1], ("random", 0.5): [2, 3], ("random", 0.7): [1, 2, 3]}
    (transfer,) = summary["transfer"]
    losses = diverging.last(tmp_path, "transfer", "validation/loss")
    assert transfer["seeds"] == [1, 3] and transfer["loss_after"] == spread(losses[[0, 2]])
    accuracies = diverging.last(tmp_path, "supervised", "test/accuracy")
    assert summary["supervised"][0]["test_accuracy_last"] == spread(accuracies[[0]])
    assert text.count("(n = 2)") == 3 and text.count("(n = 1)") == 2
    left = {"ntt-d0.5-s1", *(f"random-d0.5-s{s}" for s in (2, 3))}
    assert diverging.networks(tmp_path) == left | {f"random-d0.7-s{s}" for s in (1, 2, 3)}
    row = READINGS["ntt"].rows(summary, config.to_dict())[0]
    assert row.seeds == (1,) and row.values["loss_after"] == (losses[0],)


@pytest.mark.slow
def test_lottery_tickets(tmp_path, monkeypatch):
    """A ticket is gone from the level on at which it diverges."""
    monkeypatch.setattr(
        sparse_training_study, "make_model", lambda config, outputs: LeNet(outputs, hidden=(6, 5))
    )
    config = sparse_training_problems.get_config(
        "mnist_lth", regularisers="l2", coefficients=(1e-4,), density=(0.5, 0.2), seeds=(1, 2, 3),
        **{"supervised.max_steps": 2, "supervised.record_every": 1},
    )  # fmt: skip
    none, l2 = "none-c0.0-d{}-s{}".format, "l2-c0.0001-d{}-s{}".format
    bad = {
        "level_1.0": [none(1.0, 1)], "level_0.5": [none(0.5, 2)], "level_0.2": [l2(0.2, 3)],
    }  # fmt: skip
    summary = diverging.run(sparse_training_study, config, tmp_path, bad)
    expected = [
        ("level_1.0", none(1.0, 1)), ("level_1.0", none(0.5, 1)), ("level_0.5", none(0.5, 2)),
        ("level_1.0", none(0.2, 1)), ("level_0.5", none(0.2, 2)), ("level_0.2", l2(0.2, 3)),
    ]  # fmt: skip
    text = diverging.check(tmp_path, summary, expected)
    assert [row.get("of") for row in summary["diverged"]] == [
        None, none(1.0, 1), None, none(1.0, 1), none(0.5, 2), None
    ]  # fmt: skip
    rows = {(row["density"], row["regulariser"]): row for row in summary["supervised"]}
    assert [row["seeds"] for row in rows.values()] == [[3], [1, 2, 3], [3], [1, 2]]
    assert rows[0.5, "l2"]["less_baseline_last"]["n"] == 1
    # Of no seed there are both.
    assert "less_baseline_last" not in rows[0.2, "l2"]
    accuracies = diverging.last(tmp_path, "level_0.2", "test/accuracy")
    assert rows[0.2, "l2"]["test_accuracy_last"] == spread(accuracies[[3, 4]])
    assert "(n = 2)" in text
    left = {none(0.5, 3), none(0.2, 3), *(l2(0.5, s) for s in (1, 2, 3)), l2(0.2, 1), l2(0.2, 2)}
    assert diverging.networks(tmp_path) == left


@pytest.mark.parametrize(
    ("name", "stage", "member", "heirs"),
    [
        ("mnist_l0", "gates", "none-c0.0-d1.0-s2", [1, 3]),
        ("mnist_dlth", "transform_1", "none-c0.0-d0.1-s2", [3]),
    ],
)
def test_networks_that_start_from_one_that_diverged(tmp_path, name, stage, member, heirs):
    """Gates are those of all densities; what is transformed is of one."""
    config = sparse_training_problems.get_config(name, regularisers="none", coefficients=())
    names = {
        "gates": ["none-c0.0-d1.0-s1", "none-c0.0-d1.0-s2"],
        "transform_1": [f"none-c0.0-d{d}-s{s}" for d in (0.3, 0.1) for s in (1, 2)],
    }[stage]
    assert sparse_training_gone.gone(config, tmp_path) == ({}, [])

    def diverge(stage, count, *members):
        log = MetricsLog(tmp_path / f"{stage}.jsonl", stage)
        log.write(
            0,
            {"x": np.ones(count)},
            diverged=[Divergence(4, "task") if m in members else None for m in range(count)],
        )

    diverge(stage, len(names), names.index(member))
    # That it diverges again is no news.
    diverge("supervised", 4, 0, heirs[0])
    gone, rows = sparse_training_gone.gone(config, tmp_path)
    assert sorted(gone) == [0, *heirs]
    first, *_, last = rows
    assert first == {"stage": stage, "member": member, "step": 4, "term": "task"}
    assert {row["stage"] for row in gone.values()} == {stage, "supervised"}
    assert ("of" in last) == (stage == "gates")
    # The others diverge too: none is left.
    diverge("supervised", 4, 0, 1, 2, 3)
    with pytest.raises(DivergenceError, match="stage 'supervised': 'task' of member"):
        sparse_training_gone.gone(config, tmp_path)


def test_tickets_are_gone_from_the_level_on_at_which_they_diverged(tmp_path):
    config = sparse_training_problems.get_config(
        "mnist_lth", regularisers="none", coefficients=(), density=(0.5, 0.2), seeds=(1, 2, 3)
    )
    for member, stage in enumerate(("level_1.0", "level_0.5", "level_0.2")):
        found = [Divergence(1, "task") if index == member else None for index in range(3)]
        MetricsLog(tmp_path / f"{stage}.jsonl", stage).write(0, {"x": np.ones(3)}, diverged=found)
    name = "none-c0.0-d{}-s{}".format
    with pytest.raises(DivergenceError, match=r"level_0\.2"):
        sparse_training_gone.gone(config, tmp_path)
    (tmp_path / "level_0.2.jsonl").unlink()
    gone, rows = sparse_training_gone.gone(config, tmp_path)
    assert sorted(gone) == [0, 1, 3, 4]
    assert [(row["stage"], row["member"], row.get("of")) for row in rows] == [
        ("level_1.0", name(1.0, 1), None), ("level_1.0", name(0.5, 1), name(1.0, 1)),
        ("level_0.5", name(0.5, 2), None), ("level_1.0", name(0.2, 1), name(1.0, 1)),
        ("level_0.5", name(0.2, 2), name(0.5, 2)),
    ]  # fmt: skip


@pytest.mark.slow
def test_pruning(tmp_path, monkeypatch):
    """Gone while gates are trained is gone when what is cut trains on."""
    monkeypatch.setattr(dam_pruning_compact, "_BATCHES", (1,))
    monkeypatch.setattr(dam_pruning_compact, "_ROUNDS", 2)
    fields = {
        "data.name": "digits", "seeds": (1, 2, 3), "targets": (0.6, 0.3), "evaluated": 16,
        "pretrain.epochs": 0, "training.max_steps": 2, "finetune.max_steps": 2,
        "training.record_every": 1, "finetune.record_every": 1, "finetune.epochs": 1,
        "budget": "channels",
    }  # fmt: skip
    config = settings(pruning_configs, "mnist_slimming,smoke", fields)
    names = member_names(runs_of(config))
    bad = {"training": [names[0]], "finetune": names[3:]}
    summary = diverging.run(
        dam_pruning_stages, config, tmp_path, bad, entry=dam_pruning_study.run
    )  # fmt: skip
    expected = [(stage, name) for stage, some in bad.items() for name in some]
    text = diverging.check(tmp_path, summary, expected)
    (row,) = summary["networks"]
    assert (row["target"], row["seeds"]) == (0.6, [2, 3])
    accuracies = diverging.last(tmp_path, "finetune", "test/accuracy")
    assert row["test_accuracy"] == spread(accuracies[[1, 2]])
    assert "(n = 2)" in text and "| 0.3 |" not in text
    left = set(names[1:3])
    assert diverging.networks(tmp_path) == left
    small = json.loads((tmp_path / "compact.json").read_text())
    assert set(small) == left and "latency" in small[names[1]]
