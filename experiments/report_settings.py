"""In which settings a run differs from the config of what it stands beside."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.published import Item, agrees
from experiments.report_gather import Run

# They change no result. Seeds are counted beside.
_NO_RESULT = ("seeds", "checkpoint_seconds")
# More values than these are said by the first, the last and their number.
_VALUES = 4


def differing(run: Run, item: Item | None = None) -> str:
    """Settings of a run that differ from its config, such as `"transfer.epochs=5, methods=ntt"`.

    Args:
        run: Of ours.
        item: What it stands beside. Where it is known what was published with, that is what
            settings differ from.
    """
    fields = {name: value for name, value in run.changed.items() if _changes(run, name)}
    if item is not None:
        for name, published in item.settings.items():
            if agrees({name: published}, run.settings):
                fields.pop(name, None)
            else:
                fields[name] = _at(run.settings, name)
        if run.name not in item.configs:
            fields = {"config": run.name, **fields}
    return ", ".join(f"{name}={_text(value)}" for name, value in fields.items())


def _changes(run: Run, name: str) -> bool:
    group, _, field = name.rpartition(".")
    if field == "record_every":
        # Where training stops early, that is after a number of records.
        return bool(_at(run.settings, f"{group}.patience" if group else "patience"))
    return field not in _NO_RESULT


def _at(settings: Mapping[str, Any], name: str) -> Any:
    """A field by its name with dots; `None` if there is none."""
    return functools.reduce(
        lambda value, field: value.get(field) if isinstance(value, Mapping) else None,
        name.split("."),
        settings,
    )


def _text(value: Any) -> str:
    """A value on few characters; commas are between fields, so spaces are within one."""
    if isinstance(value, str):
        value = value.split(",")
    elif not isinstance(value, Sequence):
        value = [value]
    texts = [f"{each:g}" if isinstance(each, float) else str(each) for each in value]
    if len(texts) > _VALUES:
        return f"{texts[0]} ... {texts[-1]} ({len(texts)} values)"
    return " ".join(texts)
