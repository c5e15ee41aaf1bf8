"""Which study a summary is of, all of its settings, and the command that repeats it."""

import importlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.report_readings import READINGS

COMPARED = "sparse_training_compare"
# Those whose names are looked up; the configs of two studies have the same fields.
_STUDIES = tuple(name for name in READINGS if name != COMPARED)
# What needs no files: it is made, or ships with a package.
_EMBEDDED = ("digits", "blocks", "made", "pydoc", "")


class Origin(NamedTuple):
    """A study and the settings of one run of it.

    Attributes:
        study: The name of its command.
        settings: All fields, nested; those that were not there yet have their defaults.
        changed: What differs from the config of that name, `{"field.of": value}`.
    """

    study: str
    settings: dict[str, Any]
    changed: dict[str, Any]


def origin_of(config: Mapping[str, Any]) -> Origin:
    """The study that settings are of.

    Args:
        config: As a summary has it.

    Raises:
        ValueError: They are of no study there is.
    """
    name = config["name"]
    if not isinstance(name, str):
        raise ValueError(f"config.name is {name!r}")
    for study in _STUDIES:
        try:
            named = plain(configs_of(study).get_config(name))
        except ValueError:
            # It has no such config.
            continue
        if config.keys() <= named.keys():
            settings, changed = _overlay(named, config)
            return Origin(study, settings, changed)
    raise ValueError(f"config {name!r} with {', '.join(sorted(config))} is of no study there is")


def configs_of(study: str) -> Any:
    """The module of a study's configs."""
    return importlib.import_module(f"experiments.configs.{study}")


def plain(config: Any) -> dict[str, Any]:
    """A config as JSON has it."""
    return {
        name: plain(value) if hasattr(value, "keys") else _listed(value)
        for name, value in config.items()
    }


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, tuple | list) else value


def _overlay(
    named: Mapping[str, Any], config: Mapping[str, Any], prefix: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config with other values, and which they are; fields that it has not are left out."""
    settings, changed = dict(named), {}
    for name, value in named.items():
        if name not in config:
            continue
        if isinstance(value, dict):
            settings[name], inner = _overlay(value, config[name], f"{prefix}{name}.")
            changed |= inner
        elif config[name] != value:
            settings[name] = changed[f"{prefix}{name}"] = config[name]
    return settings, changed


def command(study: str, name: str, changed: Mapping[str, Any], data: str) -> str:
    """The command line of a run, on one line.

    Args:
        study: The name of its command.
        name: Of its config.
        changed: Fields that differ from that.
        data: The name of its data; what has to be prepared gets `--data_dir`.
    """
    words = [
        "python", "-m", f"experiments.{study}",
        f"--config=experiments/configs/{study}.py:{name}",
        *(f"--config.{field}={_flag(value)}" for field, value in changed.items()),
    ]  # fmt: skip
    return on_any_machine(shlex.join(words), data)


def on_any_machine(line: str, data: str) -> str:
    """A command line with `DATA` for the folder of its data, whoever named that.

    What is no command line stays as it is.
    """
    try:
        words = shlex.split(line)
    except ValueError:
        return line
    kept, given = [], iter(words)
    for word in given:
        if re.fullmatch("--?data_dir", word):
            # Its value is the next one.
            next(given, None)
        elif not re.match("--?data_dir=", word):
            kept.append(word)
    made = data in _EMBEDDED or data.endswith((".npz", ".txt"))
    if not made and f"experiments.{COMPARED}" not in kept:
        kept.append("--data_dir=DATA")
    return shlex.join(kept)


def data_of(settings: Mapping[str, Any]) -> str:
    """The name of the data of a run; empty where they are made."""
    data = settings.get("data")
    return str(data.get("name", "")) if isinstance(data, Mapping) else ""


def command_of(study: str, name: str) -> str:
    """The command line of a config as it is."""
    settings = plain(configs_of(study).get_config(name))
    return command(study, name, {}, data_of(settings))


def _flag(value: Any) -> str:
    """As a flag of ml_collections takes it: numbers with commas, texts as Python has them."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return str(value)
    if value and all(isinstance(each, int | float) for each in value):
        return ",".join(map(str, value)) + "," * (len(value) == 1)
    return repr(tuple(value)).replace(" ", "")


def same_study(one: str, other: str) -> bool:
    """Whether two commands run the same study, with other configs."""
    return other in READINGS and READINGS[one].rows is READINGS[other].rows


def shortest(settings: Mapping[str, Any]) -> int:
    """The fewest steps that a stage of a run was cut to; 0 if no stage was."""
    found = [shortest(value) for value in settings.values() if isinstance(value, Mapping)]
    if isinstance(steps := settings.get("max_steps"), int):
        found.append(steps)
    return min((steps for steps in found if steps > 0), default=0)
