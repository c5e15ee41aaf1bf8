"""What the papers report, as data with its source, and which settings it is of.

One JSON file for each paper. An item of its `items` is a table, a part of one, or a figure:

- `id`, `label`, `what` it shows, the `source` in the paper, and its `kind`: `numbers`, a `figure`
  whose numbers are not printed, `settings`, or a `drawing`.
- `study` and `configs`: the commands that make ours. `where`: fields of the settings a run of ours
  has to have to stand beside it. `related`: configs of other data or networks about the same
  question. `not_run`: which of `NOT_RUN` explains that there is no run.
- `settings`: fields of what is published where that is known and `configs` have other values.
- `rows`: first the values of `keys`, which name one entry of ours each (`null` where the paper does
  not say it, which agrees with any), then those of `values`, `{quantity of ours: unit}`; `null` is
  not printed, a pair is mean and standard deviation.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

_FOLDER = Path(__file__).parent
_PAPERS = ("ntt", "cka_sr", "neurons", "dam")
NOT_RUN = {
    "accelerator": "needs an accelerator",
    "cpu": "waits for free CPUs",
    "download": "waits for files that are fetched by hand, and for free CPUs",
    "imagenet": "needs ImageNet and an accelerator",
    "tiny_imagenet": "needs TinyImageNet and an accelerator",
}
"""Why an item has no run of ours."""
NUMBERS, FIGURE = "numbers", "figure"


class Paper(NamedTuple):
    """A paper; `arxiv` is empty if it is not there."""

    key: str
    authors: str
    year: int
    title: str
    url: str
    arxiv: str = ""


class Item(NamedTuple):
    """A table, a part of one, or a figure, as the docstring of this module has it."""

    id: str
    label: str
    what: str
    kind: str
    source: str
    study: str = ""
    configs: Sequence[str] = ()
    where: Mapping[str, Any] = {}
    not_run: str = ""
    related: Sequence[str] = ()
    keys: Sequence[str] = ()
    values: Mapping[str, str] = {}
    rows: Sequence[Sequence[Any]] = ()
    settings: Mapping[str, Any] = {}

    def entries(self) -> list[dict[str, Any]]:
        """The rows by names of keys and values."""
        return [dict(zip((*self.keys, *self.values), row, strict=True)) for row in self.rows]


@functools.cache
def papers() -> dict[str, tuple[Paper, tuple[Item, ...]]]:
    """All papers with their items, by the keys of the papers."""
    found = {}
    for key in _PAPERS:
        data = json.loads((_FOLDER / f"{key}.json").read_text(encoding="utf-8"))
        found[key] = Paper(**data["paper"]), tuple(Item(**item) for item in data["items"])
    return found


def item(paper: str, name: str) -> Item:
    """The item of a paper with that id."""
    _, items = papers()[paper]
    return next(item for item in items if item.id == name)


def of_settings(paper: str, settings: Any, kind: str = NUMBERS) -> list[Item]:
    """The items of a paper of that kind that a run with these settings stands beside.

    Args:
        paper: Its key.
        settings: All fields of a study, nested; a config or a dictionary.
        kind: Of the items.
    """
    _, items = papers()[paper]
    return [item for item in items if item.kind == kind and agrees(item.where, settings)]


def agrees(where: Mapping[str, Any], settings: Any) -> bool:
    """Whether settings have the values of some fields, which are named with dots."""
    return all(_plain(path, _get(settings, path)) == value for path, value in where.items())


def _get(settings: Any, path: str) -> Any:
    for field in path.split("."):
        if not hasattr(settings, "keys") or field not in settings:
            return None
        settings = settings[field]
    return settings


def _plain(path: str, value: Any) -> Any:
    """A value as JSON has it; data by the stem of their path, configs without their options."""
    if path == "data.name" and isinstance(value, str):
        return PurePath(value).stem
    if path == "name" and isinstance(value, str):
        return value.split(",")[0]
    return list(value) if isinstance(value, tuple) else value
