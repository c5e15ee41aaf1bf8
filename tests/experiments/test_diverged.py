"""Studies in which members diverge: what is left is reported, with its number."""

import json

import numpy as np
import pytest
from sparse_training_problems import get_config

from experiments import diverged, ntt_report, sparse_training_report
from experiments import sparse_training_study as study
from experiments.configs import ntt as ntt_configs
from experiments.sparse_training_members import member_names, runs_of
from experiments.statistics import paired, spread
from ntt_sparse.training.divergence import Divergence
from ntt_sparse.training.metrics import MetricsLog


def test_groups_without_those_that_are_gone():
    groups = {"a": [0, 1], "b": [2, 3], "c": [4]}
    assert diverged.left(groups, {1, 4}) == {"a": [0], "b": [2, 3]}
    assert diverged.left(groups, {}) == groups
    assert diverged.lines([]) == []


def test_a_report_of_ntt_leaves_out_who_diverged(tmp_path):
    config = ntt_configs.get_config("digits_lenet300")
    with config.unlocked():
        config.methods, config.density, config.seeds = "random,dense", (0.1,), (1, 2, 3)
    log = MetricsLog(tmp_path / "supervised.jsonl", "supervised")
    runs = ntt_report.supervised_runs(config)
    names = ntt_report.member_names(runs)
    gone = next(i for i, run in enumerate(runs) if run.method == "random" and run.seed == 2)
    rng = np.random.default_rng(0)
    values = {}
    columns = ("validation/accuracy", "test/accuracy", "train/task/accuracy")
    for step in range(3):
        values = {name: rng.uniform(size=len(runs)) for name in columns}
        if step:
            for column in values.values():
                column[gone] = np.nan
        found = [Divergence(5, "task") if member == gone else None for member in range(len(runs))]
        log.write(step, values, diverged=found if step else ())
    summary = ntt_report.write(config, tmp_path)
    rows = {row["method"]: row for row in summary["supervised"]}
    assert rows["random"]["seeds"] == [1, 3] and rows["dense"]["seeds"] == [1, 2, 3]
    others = [i for i, run in enumerate(runs) if run.method == "random" and run.seed != 2]
    assert rows["random"]["test_accuracy_last"] == spread(values["test/accuracy"][others])
    expected = {"stage": "supervised", "member": names[gone], "step": 5, "term": "task"}
    assert summary["diverged"] == [expected]
    text = (tmp_path / "report.md").read_text()
    assert f"- {names[gone]}: 'task' was not finite at step 5 of stage 'supervised'" in text
    assert text.count("(n = 2)") == 2 and "nan" not in text.lower()


@pytest.mark.usefixtures("narrow", "unrendered")
def test_a_study_goes_on_without_the_coefficient_that_diverges(tmp_path, caplog):
    """An L2 norm times 1e30 overflows in two steps of SGD; others are compared by common seeds."""
    config = get_config(
        "mnist_snip", regularisers="l2", coefficients=(1e-4, 1e30), density=(0.3,), seeds=(1, 2, 3),
        **{"supervised.optimizer": "sgd", "supervised.max_steps": 8, "supervised.record_every": 4},
    )  # fmt: skip
    summary = study.run(config, tmp_path)
    runs = runs_of(config)
    names = member_names(runs)
    gone = {names[i] for i, run in enumerate(runs) if run.coefficient == 1e30}
    assert {row["member"] for row in summary["diverged"]} == gone and len(gone) == 3
    assert [row["coefficient"] for row in summary["supervised"]] == [0.0, 1e-4]
    assert {path.stem for path in (tmp_path / "networks").iterdir()} == set(names) - gone
    assert caplog.text.count("it stays as it was before, the others go on") == 3
    with np.load(tmp_path / "measurements.npz") as file:
        for index, name in enumerate(names):
            assert np.isnan(file["cka"][index]).all() == (name in gone)
            assert (file["counts"][index].sum() == 0) == (name in gone)

    log = MetricsLog(tmp_path / "supervised.jsonl", "supervised")
    _, test = log.column("test/accuracy")
    seed = {run.coefficient: {} for run in runs}
    for index, run in enumerate(runs):
        seed[run.coefficient][run.seed] = index
    lost = seed[0.0][2]
    for record in log.records:
        for value in record.values():
            if isinstance(value, list):
                # As the loop writes it: null in the shape of the value.
                value[lost] = [None] * len(value[0]) if isinstance(value[0], list) else None
        record["diverged"] = record.get("diverged", [None] * len(runs))
        record["diverged"][lost] = {"step": 1, "term": "task"}
    log.truncate(len(log.records))
    summary = sparse_training_report.write(config, tmp_path, summary["layers"])
    none, l2 = summary["supervised"]
    assert none["seeds"] == [1, 3] and l2["seeds"] == [1, 2, 3]
    ours, theirs = ([test[-1, seed[c][s]] for s in (1, 3)] for c in (1e-4, 0.0))
    expected = paired(ours, theirs)
    assert l2["less_baseline_last"] == {**expected, "p_value_holm": expected["p_value"]}
    assert expected["n"] == 2
    text = (tmp_path / "report.md").read_text()
    assert "nan" not in text.lower() and "(n = 2)" in text
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
