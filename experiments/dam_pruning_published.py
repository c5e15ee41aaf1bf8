"""What the paper reports of structured pruning (Bu et al. 2021), beside which ours is put."""

from typing import Any, NamedTuple


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


def _lenet(coefficients: str, thousands: str, pruned: str, accuracies: str) -> list[Published]:
    columns = [map(float, text.split()) for text in (coefficients, thousands, pruned, accuracies)]
    return [Published(c, a, 1000 * k, None, p) for c, k, p, a in zip(*columns, strict=True)]


_COEFFICIENTS = "0 .01 .02 .05 .1 .2 .3 .4 .5 "
# By activation and gradient noise. Ten settings of five runs each; the spread is not said.
_TABLE5 = {
    ("tanh", 0.0): _lenet(
        _COEFFICIENTS + "1.0",
        "60.0 33.6 18.7 7.0 3.9 1.9 1.4 1.3 1.0 0.7",
        "0.00 44.15 68.82 88.41 93.59 96.78 97.71 97.85 98.31 98.90",
        "98.85 98.61 98.47 98.16 97.49 96.54 95.47 94.79 93.70 90.12",
    ),
    ("tanh", 0.05): _lenet(
        _COEFFICIENTS + "1.0",
        "60.0 35.0 18.8 5.9 3.9 1.8 1.4 1.3 1.0 0.6",
        "0.00 41.71 68.70 90.19 93.53 96.97 97.67 97.85 98.31 99.00",
        "98.78 98.57 98.69 98.03 97.69 96.61 95.64 94.78 94.16 90.16",
    ),
    ("sine", 0.0): _lenet(
        _COEFFICIENTS + "0.6",
        "60.0 21.5 9.2 3.4 1.9 1.5 1.1 1.2 0.8 0.6",
        "0.00 64.24 84.64 94.27 96.84 97.44 98.12 98.05 98.59 98.95",
        "98.93 99.00 98.85 98.53 98.38 97.12 96.12 96.63 94.91 95.49",
    ),
}
# By model and data: coefficient, accuracy, thousands of parameters, pruned channels, parameters.
_TABLE6 = {
    ("vgg19", "cifar10"): ((0.1, 93.39, 1627, 71.28, 91.88), (0.5, 90.92, 264, 89.17, 98.68)),
    ("vgg19", "cifar100"): ((0.1, 73.40, 6190, 41.30, 69.17), (0.5, 67.17, 664, 79.81, 96.69)),
    ("preresnet20", "cifar100"): (
        (0.1, 67.33, 228, 2.72, 5.88),
        (0.2, 66.53, 217, 5.37, 10.50),
        (0.3, 66.46, 206, 7.72, 15.13),
        (0.4, 65.83, 191, 11.25, 21.18),
        (0.5, 66.17, 183, 14.12, 24.67),
        (1.0, 63.15, 121, 31.84, 50.05),
        (2.0, 54.79, 47, 62.35, 80.45),
    ),
    ("preresnet56", "cifar100"): (
        (0.1, 72.74, 573, 3.33, 6.60),
        (0.2, 72.64, 526, 7.93, 14.35),
        (0.3, 72.49, 493, 10.72, 19.67),
        (0.4, 72.28, 466, 14.62, 24.14),
        (0.5, 71.73, 419, 19.17, 31.73),
        (1.0, 69.94, 314, 33.60, 48.77),
        (2.0, 64.31, 153, 62.94, 75.05),
    ),
    ("preresnet110", "cifar10"): (
        (0.1, 94.51, 975, 9.72, 15.01),
        (0.2, 93.73, 808, 20.71, 29.54),
        (0.3, 93.28, 646, 31.10, 43.65),
        (0.4, 93.35, 560, 37.08, 51.18),
        (0.5, 92.97, 482, 46.55, 58.00),
        (1.0, 91.61, 208, 72.51, 81.85),
        (2.0, 88.90, 89, 84.99, 92.21),
    ),
    ("preresnet110", "cifar100"): (
        (0.1, 75.55, 1110, 4.20, 5.15),
        (0.2, 74.73, 1010, 10.24, 13.70),
        (0.3, 75.08, 940, 14.54, 19.63),
        (0.4, 73.93, 873, 18.37, 25.41),
        (0.5, 73.44, 817, 21.87, 30.17),
        (1.0, 71.63, 547, 39.68, 53.21),
        (2.0, 68.32, 261, 66.45, 77.72),
    ),
}
# Five random orders: accuracy, pruned channels and parameters.
_TABLE2 = (
    *((94.11, 43.31, 64.01), (93.86, 43.14, 63.40), (93.71, 43.31, 63.97)),
    *((93.93, 43.14, 63.64), (93.52, 43.02, 63.37)),
)
# Mean, standard deviation, maximum.
TABLE7 = (
    "unpruned .273, .018, .840; DAM .229, .013, .740; Network Slimming .328, .021, .893; ChipNet "
    ".295, .020, .964; lambda, data and images are not said"
)
_TABLE8 = (
    *((0.0, 52.72, 0.0), (0.1, 52.75, 6.03), (0.3, 52.51, 20.05), (0.5, 52.99, 30.91)),
    *((0.7, 52.11, 38.71), (1.0, 52.89, 45.94), (2.0, 53.17, 68.52)),
)


def published(config: Any) -> list[Published]:
    """What the paper has for the network and data of a study, at its coefficients.

    It has no budgets, nor these networks with an L1 norm.
    """
    if config.budget or config.gate != "dam":
        return []
    model, data = config.model.name, config.data.name
    rows: list[Published] = []
    if model == "lenet5" and data == "mnist" and config.model.gated == 3:
        rows = _TABLE5.get((config.model.activation, config.gradient_noise), [])
    elif (model, data) == ("preresnet164", "cifar10"):
        rows = [Published(0.4, a, None, c, p) for a, c, p in _TABLE2]
    elif model == "preresnet164" and "tiny_imagenet" in data:
        rows = [Published(coefficient, a, None, c) for coefficient, a, c in _TABLE8]
    else:
        for coefficient, accuracy, thousands, *pruned in _TABLE6.get((model, data), ()):
            rows.append(Published(coefficient, accuracy, 1000 * thousands, *pruned))
    return [row for row in rows if row.coefficient in config.coefficients]
