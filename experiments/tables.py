"""Cells of the tables of reports."""

from typing import Any


def percent(value: dict[str, Any]) -> str:
    """A spread of fractions over seeds as percent, such as `"97.31 ± 0.12"`."""
    deviation = "" if value["std"] is None else f" ± {100 * value['std']:.2f}"
    return f"{100 * value['mean']:.2f}{deviation}"


def difference(value: dict[str, Any] | None) -> str:
    """A paired comparison in points, with interval, p-value and the corrected one.

    Args:
        value: Of `paired`, through `correct`; `None` is an empty cell.
    """
    if value is None:
        return ""
    text = f"{100 * value['mean']:+.2f}"
    if value["low"] is None:
        return text
    return (
        f"{text} [{100 * value['low']:+.2f}, {100 * value['high']:+.2f}], "
        f"p = {value['p_value']:.2g} ({value['p_value_holm']:.2g})"
    )
