"""The short form: sizes beside differences, settings that differ, and runs of no table."""

import json
from pathlib import Path

import pytest
from summaries import cells, pruned, table5a, write_summary

from experiments.configs import dam_pruning, neuron_pruning, ntt
from experiments.published import item
from experiments.report import report
from experiments.report_build import answers
from experiments.report_commands import plain
from experiments.report_gather import gather
from experiments.report_others import survivors
from experiments.report_readings import READINGS
from experiments.report_settings import differing
from experiments.report_tables import beside, size_of
from experiments.statistics import spread

RESULTS = Path(__file__).parents[2] / "results"


def one_run(folder):
    (run,) = gather(folder).runs
    return run


def changed(config, **fields):
    config.update_from_flattened_dict({name.replace("__", "."): v for name, v in fields.items()})
    return config


def gated(folder, name, networks):
    return write_summary(folder, dam_pruning.get_config(name), networks=networks)


def test_sizes_stand_beside_differences(tmp_path):
    networks = [
        pruned(0.01, [0.98], [1], parameters=spread([33_600.0])),
        pruned(0.05, [0.98], [1], parameters=spread([26_659.0])),
        pruned(1.0, [0.9], [1], parameters=spread([4243.0])),
    ]
    gated(tmp_path / "a", "table5a", networks)
    report(tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    line = cells(text, "Bu et al. 2021, Table 5a", section="")[0]
    assert line[-1] == "3.81 (1.00 to 6.06) parameters"
    # Beside each row of the long report too.
    assert cells(text, "0.05")[1][-1] == "3.81"
    assert cells(text, "lambda")[0][-1] == "parameters, ours / published"


def test_what_is_pruned_is_compared_by_what_is_kept(tmp_path):
    table2 = item("dam", "table2")
    entry = next(each for each in table2.entries() if each["pruned_parameters"])
    row = pruned(entry["coefficient"], [0.9], [1], order=entry["order"])
    row["pruned_parameters"] = spread([1 - 2 * (1 - entry["pruned_parameters"] / 100)])
    gated(tmp_path / "a", "table2", [row])
    assert size_of(table2, READINGS["dam_pruning"]) == "pruned_parameters"
    (found,) = beside(table2, entry, one_run(tmp_path))
    assert found.size == pytest.approx(2.0)


def test_some_have_no_size(tmp_path):
    # The size is what is compared, or there is none.
    assert size_of(item("dam", "figure3a"), READINGS["dam_representation"]) is None
    assert size_of(item("ntt", "notebook_lenet300"), READINGS["ntt"]) is None
    # Of what keeps nothing there is no ratio.
    table5a(tmp_path / "a", (1,), [0.9])
    table = item("dam", "table5a")
    entry = {"coefficient": 0.1, "test_accuracy": 97.0, "pruned_parameters": None}
    for published in (0.0, None):
        (found,) = beside(table, {**entry, "parameters": published}, one_run(tmp_path))
        assert found.size is None


def test_all_settings_that_differ_are_said(tmp_path):
    fields = {"training.batch_size": 32, "training.learning_rate": 0.02, "training.epochs": 3}
    silent = {"training.record_every": 844, "checkpoint_seconds": 9.0}
    table5a(tmp_path / "a", (1, 2), [0.96, 0.97], **fields, **silent)
    report(tmp_path)
    line = cells((tmp_path / "REPORT.md").read_text(), "Bu et al. 2021, Table 5a", section="")[0]
    # In the order of the config.
    assert set(line[3].split(", ")) == {f"{name}={value}" for name, value in fields.items()}
    # Of a config that the table does not name, and of runs that stand beside none.
    other = one_run(tmp_path)._replace(name="other")
    assert differing(other, item("dam", "table5a")).startswith("config=other, training.")
    assert "config=" not in differing(other)


def test_values_of_settings_are_short(tmp_path):
    fields = {
        "coefficients": (0.0001, 0.1, 1.0, 2.0, 5.0), "targets": (0.5, 1.0), "budget": "",
    }  # fmt: skip
    table5a(tmp_path / "a", (1,), [0.9], **fields)
    assert differing(one_run(tmp_path)) == ("coefficients=0.0001 ... 5 (5 values), targets=0.5 1")


def test_records_count_where_training_stops_early(tmp_path):
    run = one_run_of_neurons(tmp_path, training__record_every=50)
    assert differing(run) == "criteria=cka l1, training.record_every=50"


def one_run_of_neurons(folder, **fields):
    config = changed(neuron_pruning.get_config("convolutions"), criteria="cka,l1", **fields)
    cell = {"test": spread([0.9] * len(plain(config)["seeds"]))}
    groups = [
        {"network": "a", "dropout": 0.5, "rate": 0.2,
         "iterations": [{"iteration": 0, "criteria": {"cka": cell, "l1": cell}}]}
    ]  # fmt: skip
    for name in ("before_training", "agreement", "cumulative_agreement"):
        cell[name] = cell["test"]
    write_summary(folder / "a", config, groups=groups)
    return one_run(folder)


@pytest.mark.parametrize(("wrt", "said"), [("masked", "transfer.wrt=masked"), ("all", "")])
def test_settings_differ_from_what_is_published(tmp_path, wrt, said):
    config = changed(ntt.get_config("mnist_lenet300"), transfer__wrt=wrt)
    row = {"method": "ntt", "density": 0.03, "seeds": [1]}
    for name in ("test_accuracy_last", "test_accuracy_best_validation"):
        row[name] = spread([0.96])
    write_summary(tmp_path / "a", config, supervised=[row])
    assert differing(one_run(tmp_path), item("ntt", "notebook_lenet300")) == said


def compared(folder, *pairs):
    """A run of which each pair is accuracies without and with CKA-SR, at a coefficient."""
    networks = []
    for index, pair in enumerate(pairs):
        for cka_sr, accuracies in zip((0.0, 0.01), pair, strict=True):
            seeds = list(range(1, len(accuracies) + 1))
            networks.append(pruned(0.1 * (index + 1), accuracies, seeds, cka_sr=cka_sr))
    gated(folder, "mnist_slimming_cka_sr", networks)


def test_runs_of_no_table_are_in_the_short_form(tmp_path):
    without = [0.9, 0.901, 0.902, 0.903]
    much = [0.95, 0.9512, 0.9521, 0.9529]
    less = [0.85, 0.8512, 0.8521, 0.8529]
    compared(tmp_path / "a", (without, much), (without, less))
    table5a(tmp_path / "trial", (1,), [0.1], **{"training.max_steps": 7})
    report(tmp_path)
    text = (tmp_path / "REPORT.md").read_text().partition("\n## ")[0]
    (line,) = cells(text, "[a](a)", section="")
    assert line[1:] == [
        "dam_pruning: mnist_slimming_cka_sr", "", "4",
        "accuracy 85.16 to 95.16 %; parameters 100",
        "CKA-SR 0.01 less without CKA-SR: 1 higher, 1 lower of 2",
    ]  # fmt: skip
    # Trials say nothing of accuracy.
    assert not cells(text, "[trial](trial)", section="")


def test_only_what_survives_the_correction_counts(tmp_path):
    without = [0.9, 0.901, 0.902, 0.903]
    # By itself p is 0.034.
    some = [0.901, 0.9028, 0.9045, 0.9037]
    compared(tmp_path / "a", (without, some))
    assert survivors(one_run(tmp_path)).endswith("1 higher, 0 lower of 1")
    compared(tmp_path / "b" / "c", (without, some), (without, without[::-1]))
    # The other has a p-value of 1 and the same family; p doubles.
    assert survivors(one_run(tmp_path / "b")).endswith(": 0 higher, 0 lower of 2")


def test_without_a_test_nothing_survives(tmp_path):
    compared(tmp_path / "a", ([0.9], [0.95]), ([0.5, 0.6], [0.6, 0.7]))
    assert survivors(one_run(tmp_path)).endswith(": 0 higher, 0 lower of 2")
    table5a(tmp_path / "b" / "c", (1,), [0.9])
    assert survivors(one_run(tmp_path / "b")) == ""


def test_the_families_are_those_of_the_studies():
    """What studies wrote of the same differences into their summaries survives just as well."""
    checked = 0
    for run in answers(gather(RESULTS)).others:
        path = RESULTS / run.sources[0].folder / "summary.json"
        summary = json.loads(path.read_text())
        entries = [summary.get("supervised", ()), *summary.get("methods", {}).values()]
        rows = [row for each in entries for row in each]
        tests = [row["less_baseline_last"] for row in rows if row.get("less_baseline_last")]
        if not tests or run.trial:
            continue
        corrected = [test["p_value_holm"] for test in tests]
        kept = [p for p in corrected if p is not None and p <= 0.05]
        text = survivors(run)
        counts = [part.split(": ")[1].split() for part in text.split("; ")]
        assert sum(int(words[0]) + int(words[2]) for words in counts) == len(kept)
        assert sum(int(words[-1]) for words in counts) == len(tests)
        checked += 1
    assert checked
