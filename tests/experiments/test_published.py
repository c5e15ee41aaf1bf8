"""Published numbers: they are whole, say what they are of, and name what there is."""

import pytest

from experiments.published import FIGURE, NOT_RUN, NUMBERS, agrees, item, of_settings, papers
from experiments.report_commands import configs_of, plain
from experiments.report_readings import READINGS

ITEMS = [
    pytest.param(one, id=f"{key}-{one.id}") for key, (_, items) in papers().items() for one in items
]


@pytest.mark.parametrize("one", ITEMS)
def test_items_name_what_there_is(one):
    assert one.label and one.what and one.source
    settings = [plain(configs_of(one.study).get_config(name)) for name in one.configs]
    for row in one.rows:
        assert len(row) == len(one.keys) + len(one.values)
    if one.kind not in (NUMBERS, FIGURE):
        assert one.kind in ("settings", "drawing") and not one.rows
        return
    assert bool(one.rows) == (one.kind == NUMBERS)
    assert settings and one.not_run in NOT_RUN and one.values
    # What its configs make stands beside it.
    assert all(agrees(one.where, each) for each in settings[:1])
    # What is published with other settings than those of the configs.
    for name, value in one.settings.items():
        group, field = name.split(".")
        assert all(field in each[group] for each in settings)
        assert not any(agrees({name: value}, each) for each in settings)
    reading = READINGS[one.study]
    assert set(one.keys) <= set(reading.keys)
    for name, unit in one.values.items():
        assert reading.columns()[name].unit == unit
    module = configs_of(one.study)
    assert all(name in module._CONFIGS for name in one.related)


def test_names_are_different():
    for _, items in papers().values():
        assert len({one.id for one in items}) == len({one.label for one in items}) == len(items)


def test_some_numbers():
    """Read in the papers."""
    table = item("dam", "table6_preresnet110_cifar100").entries()
    assert table[-1] == {
        "coefficient": 2.0, "test_accuracy": 68.32, "parameters": 261_000,
        "pruned_channels": 66.45, "pruned_parameters": 77.72,
    }  # fmt: skip
    table = {
        (row["density"], row["regulariser"]): row for row in item("cka_sr", "table5").entries()
    }
    assert len(table) == 18
    assert table[0.05, "aug_cka_sr"]["test_accuracy_last"] == 48.39
    assert item("dam", "table1_douban").entries()[1]["ensemble_rmse"] == [0.7183, 0.0004]
    found = item("cka_sr", "table2_sample4_batch5").entries()
    assert [row["test_accuracy_last"] for row in found if row["coefficient"] == 0.01] == [76.08]
    assert item("ntt", "notebook_lenet300").entries()[0]["loss_before"] == 7.737


def test_what_settings_are_of():
    configs = configs_of("dam_pruning")
    named = {"table5a": {"table5a"}, "table2": {"table2"}, "mnist_budget": set()}
    for name, expected in named.items():
        assert {one.id for one in of_settings("dam", configs.get_config(name))} == expected
    config = configs.get_config("table8")
    config.data.name = "/somewhere/tiny_imagenet.npz"
    assert {one.id for one in of_settings("dam", config)} == {"table8"}
    assert not agrees({"model.name": "lenet5"}, {"model": "lenet5"})
    assert agrees({"name": "mnist"}, {"name": "mnist,smoke"})
