"""Statistics over seeds: spreads, paired comparisons and their correction.

Every result is made of Python numbers, lists and `None`, ready for JSON.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Real

# Of float32, with some room for sums.
_ROUNDING = 1e-6


def spread(values: Real[np.ndarray, "n"] | Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (n - 1 in the divisor) and every value.

    Args:
        values: `(n,)`, one value per seed.

    Returns:
        `{"mean", "std", "values"}`; `std` is `None` for one value.
    """
    values = np.asarray(values, float)
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "values": values.tolist()}


def interval(
    values: Real[np.ndarray, "n"] | Sequence[float], confidence: float = 0.95
) -> tuple[float, float] | None:
    """Where the mean of what the values are draws of lies, by Student's t distribution.

    Args:
        values: `(n,)`, one value per seed.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        Its ends; `None` of one value, or of values that are all equal, which tell nothing of
        their spread.
    """
    values = np.asarray(values, float)
    if len(values) < 2 or np.ptp(values) <= _ROUNDING * np.max(np.abs(values)):
        return None
    margin = _margin(float(np.std(values, ddof=1)) / len(values) ** 0.5, len(values), confidence)
    mean = float(np.mean(values))
    return mean - margin, mean + margin


def _margin(error: float, n: int, confidence: float) -> float:
    from scipy import stats

    return float(stats.t.ppf((1.0 + confidence) / 2.0, n - 1)) * error


def paired(
    values: Real[np.ndarray, "n"] | Sequence[float],
    baseline: Real[np.ndarray, "n"] | Sequence[float],
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Compares two methods run with the same seeds: the mean of `values - baseline`.

    The interval and the two-sided p-value are those of Student's paired t-test, which
    takes the differences for draws of a normal distribution.

    Args:
        values: `(n,)`, one value per seed.
        baseline: `(n,)`, the values of the other method, seeds in the same order.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        `mean` and `std` of the differences (n - 1 in the divisor), the interval of the
        mean from `low` to `high`, `p_value` and `n`. One pair, or differences that are all
        equal, tell nothing of their spread, and there is no test: `low`, `high` and
        `p_value` are `None`, and so is the `std` of one pair. Equal are differences within
        a millionth of the values, which may have been rounded to float32.

    Raises:
        ValueError: The lengths differ, there is no value, a value is not finite, or
            `confidence` is outside (0, 1).

    References:
        Student: The probable error of a mean, Biometrika 6, 1908.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"{confidence=}, expected a fraction in (0, 1), such as 0.95")
    values, baseline = np.asarray(values, float), np.asarray(baseline, float)
    if values.ndim != 1 or values.shape != baseline.shape:
        raise ValueError(
            f"values and baseline have shapes {values.shape} and {baseline.shape}, expected (n,) "
            "twice: one value per seed, the same seeds in both"
        )
    if not values.size:
        raise ValueError("values and baseline are empty, expected one value per seed, at least one")
    for name, array in (("values", values), ("baseline", baseline)):
        if not np.all(np.isfinite(array)):
            raise ValueError(
                f"{name} are {array.tolist()}, expected finite numbers: "
                "leave out the seeds that diverged, in both"
            )
    differences = values - baseline
    mean, n = float(np.mean(differences)), len(differences)
    rounding = _ROUNDING * max(np.max(np.abs(values)), np.max(np.abs(baseline)))
    if n == 1 or np.ptp(differences) <= rounding:
        std = None if n == 1 else 0.0
        return {"mean": mean, "std": std, "low": None, "high": None, "p_value": None, "n": n}
    std = float(np.std(differences, ddof=1))

    from scipy import stats

    error = std / n**0.5
    margin = _margin(error, n, confidence)
    return {
        "mean": mean,
        "std": std,
        "low": mean - margin,
        "high": mean + margin,
        "p_value": float(2.0 * stats.t.sf(abs(mean) / error, n - 1)),
        "n": n,
    }


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The Holm correction of the p-values of a family of comparisons.

    Rejecting every hypothesis whose corrected value is at most alpha keeps the chance of
    any false rejection at alpha or less, whatever the dependence between the tests. The
    i-th smallest of m values is multiplied by `m + 1 - i`, and no value ends below a
    smaller one.

    Args:
        p_values: In [0, 1], in any order; `None`, where no test could be made, belongs
            to no family and stays.

    Returns:
        The corrected values, at most 1, in the order given.

    Raises:
        ValueError: A value is outside [0, 1].

    References:
        Holm: A simple sequentially rejective multiple test procedure, Scandinavian
        Journal of Statistics 6, 1979.
    """
    present = {index: p for index, p in enumerate(p_values) if p is not None}
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (index, p) in enumerate(sorted(present.items(), key=lambda item: item[1])):
        # The negated form also refuses NaN.
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p-value {index} is {p}, expected a probability in [0, 1] or None")
        largest = max(largest, min(1.0, (len(present) - rank) * float(p)))
        corrected[index] = largest
    return corrected


def correct(comparisons: Sequence[dict[str, Any]]) -> None:
    """Adds `"p_value_holm"` to the results of `paired`, which are one family of comparisons."""
    corrected = holm([comparison["p_value"] for comparison in comparisons])
    for comparison, p_value in zip(comparisons, corrected, strict=True):
        comparison["p_value_holm"] = p_value
