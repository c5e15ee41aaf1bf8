"""What the paper reports of recommenders (Bu et al. 2021, Table 1), beside which ours is put."""

from typing import NamedTuple

from experiments.published import NUMBERS, papers


class Published(NamedTuple):
    """One published method: mean and spread of its error over five runs, and its dimension."""

    rmse: float
    spread: float
    dimension: int


def published(data: str, gate: str) -> Published | None:
    """What Table 1 has of a data set and a method; `None` where it has nothing."""
    _, items = papers()["dam"]
    for item in items:
        if item.kind == NUMBERS and item.study == "dam_recommender":
            for row in item.entries():
                if (row["data"], row["gate"]) == (data, gate):
                    rmse, spread = row["ensemble_rmse"]
                    return Published(rmse, spread, row["dimension"])
    return None
