"""What the paper reports of recommenders (Bu et al. 2021, Table 1), beside which ours is put."""

from typing import NamedTuple


class Published(NamedTuple):
    """One published method: mean and spread of its error over five runs, and its dimension."""

    rmse: float
    spread: float
    dimension: int


_TABLE1 = {
    ("flixster", "none"): Published(0.8715, 0.0005, 128),
    ("flixster", "dam"): Published(0.8706, 0.0003, 32),
    ("douban", "none"): Published(0.7189, 0.0002, 128),
    ("douban", "dam"): Published(0.7183, 0.0004, 17),
    ("yahoo_music", "none"): Published(19.2488, 0.0123, 128),
    ("yahoo_music", "dam"): Published(19.0166, 0.0444, 83),
}


def published(data: str, gate: str) -> Published | None:
    """What Table 1 has of a data set and a method; `None` where it has nothing."""
    return _TABLE1.get((data, gate))
