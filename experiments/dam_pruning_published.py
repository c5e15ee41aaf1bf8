"""What the paper reports of structured pruning (Bu et al. 2021), beside which ours is put."""

from typing import Any, NamedTuple

from experiments.published import item, of_settings


class Published(NamedTuple):
    """One published network; what is not said is `None`.

    Attributes:
        coefficient: Of the penalty.
        accuracy: Top-1 on the test set, in percent.
        parameters: Left.
        pruned_channels: In percent.
        pruned_parameters: In percent.
    """

    coefficient: float
    accuracy: float
    parameters: float | None = None
    pruned_channels: float | None = None
    pruned_parameters: float | None = None


def published(config: Any) -> list[Published]:
    """What the paper has for the network and data of a study, at its coefficients.

    It has no budgets, nor these networks with an L1 norm.
    """
    rows = [
        Published(
            row["coefficient"],
            row["test_accuracy"],
            *(row.get(name) for name in ("parameters", "pruned_channels", "pruned_parameters")),
        )
        for found in of_settings("dam", config)
        if "test_accuracy" in found.values
        for row in found.entries()
    ]
    return [row for row in rows if row.coefficient in config.coefficients]


def similarities() -> str:
    """Table 7 in one line: mean, standard deviation and maximum of each network."""
    labels = {"dam": "DAM", "slimming": "Network Slimming", "chipnet": "ChipNet"}
    parts = []
    for row in item("dam", "table7").entries():
        name = "unpruned" if row["coefficient"] == 0 else labels[row["gate"]]
        numbers = (f"{row[f'similarity_{each}']:.3f}" for each in ("mean", "std", "max"))
        parts.append(f"{name} {', '.join(numbers)}")
    return f"{'; '.join(parts)}; lambda, data and images are not said"
