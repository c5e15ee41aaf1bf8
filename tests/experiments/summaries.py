"""Summaries that tests write, and cells of the tables made of them."""

import json

from experiments.configs import dam_pruning
from experiments.statistics import spread


def pruned(coefficient, accuracies, seeds, **fields):
    row = {"coefficient": coefficient, "target": 1.0, "order": 0, "seeds": seeds}
    for name, value in {
        "test_accuracy": accuracies, "parameters": [100.0] * len(seeds),
        "pruned_channels": [0.5] * len(seeds), "pruned_parameters": [0.5] * len(seeds),
        "test_accuracy_best_validation": accuracies,
    }.items():  # fmt: skip
        row[name] = spread(value)
    return row | fields


def write_summary(folder, config, **content):
    folder.mkdir(parents=True)
    summary = {"config": json.loads(json.dumps(config.to_dict())), **content}
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


def table5a(folder, seeds, accuracies, **fields):
    config = dam_pruning.get_config("table5a")
    with config.unlocked():
        config.update_from_flattened_dict({"seeds": tuple(seeds), **fields})
    return write_summary(folder, config, networks=[pruned(0.1, accuracies, list(seeds))])


def cells(text, first, section="### Table 5a"):
    """Of lines of the tables of a section that begin with a cell."""
    text = text.partition(f"\n{section}")[2].partition("\n### ")[0] if section else text
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if row[0] == first]
