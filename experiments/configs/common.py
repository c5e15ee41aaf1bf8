"""Settings by name: how every study's configs are put together."""

import difflib
from collections.abc import Mapping
from typing import Any

import ml_collections

# Fields that span the members of a study.
_CUT = (
    "density", "coefficients", "dam_coefficients", "l1_coefficients", "learning_rates", "initials",
)  # fmt: skip


def build(
    name: str,
    base: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Mapping[str, Any]],
) -> ml_collections.ConfigDict:
    """The settings of a name such as `"mnist_lenet300"` or `"mnist_lenet300,global,smoke"`.

    Args:
        name: A name of `configs`, and after commas names of `options`.
        base: All fields with their defaults, nested.
        configs: By name, `{"field.of.base": value}`.
        options: Likewise; later ones win. `smoke` also cuts the grid of members to two values
            of each field.

    Raises:
        ValueError: The name or an option is unknown.
    """
    config_name, *chosen = name.split(",")
    if config_name not in configs:
        close = difflib.get_close_matches(config_name, configs, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"unknown config {config_name!r}{hint}: expected one of {', '.join(configs)}"
        )
    unknown = [option for option in chosen if option not in options]
    if unknown:
        raise ValueError(
            f"config {config_name!r} has no option {', '.join(unknown)}: "
            f"there are {' and '.join(options)}"
        )
    config = ml_collections.ConfigDict(base)
    settings = {**configs[config_name], "name": name}
    for option in options:
        if option in chosen:
            settings |= options[option]
    if "smoke" in chosen:
        settings |= {
            field: tuple(settings.get(field, base[field]))[:2] for field in _CUT if field in base
        }
    for path, value in settings.items():
        *parents, field = path.split(".")
        node: Any = config
        for parent in parents:
            node = node[parent]
        node[field] = value
    return config
