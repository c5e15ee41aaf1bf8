"""Members that diverged: which are left, and what reports say of the others."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from ntt_sparse.training.divergence import none_left
from ntt_sparse.training.metrics import MetricsLog

_Group = TypeVar("_Group")

Gone: TypeAlias = Mapping[int, dict[str, Any]]
"""Members that are in no number of a report, by index: an entry of each, see `gone`."""


def gone(
    workdir: Path, stage: str, names: Sequence[str], before: Mapping[int, dict[str, Any]] = {}
) -> Gone:
    """Members that diverged in a stage that freezes them, or were gone before it.

    The entry of each is its stage, member, step and term, of where it diverged first.

    Args:
        workdir: Of the study.
        stage: Name of the stage, which has ended.
        names: One for each member.
        before: Those that were gone; the stage has trained them with the others, whose batches
            and programs are as they would be without them, and what it found is nothing.

    Raises:
        DivergenceError: None is left.
    """
    found = MetricsLog(workdir / f"{stage}.jsonl", stage).diverged()
    new = {index: where for index, where in found.items() if index not in before}
    entries = dict(before) | {
        index: {"stage": stage, "member": names[index], **where._asdict()}
        for index, where in new.items()
    }
    if new and len(entries) == len(names):
        raise none_left(stage, names, new)
    return dict(sorted(entries.items()))


def heirs(names: Sequence[str], sources: Sequence[int | None], before: Gone) -> Gone:
    """Members that are gone as those are from which they start; the entry says of which.

    Where both have one name the entry is the same.

    Args:
        names: One for each member.
        sources: The index of what it starts from; `None` where that is nothing trained.
        before: Those of the sources that are gone.
    """
    entries = {}
    for index, (name, source) in enumerate(zip(names, sources, strict=True)):
        if source is not None and source in before:
            found = before[source]
            origin = found.get("of", found["member"])
            entries[index] = found | {"member": name} | ({} if origin == name else {"of": origin})
    return entries


def rows(*found: Gone) -> list[dict[str, Any]]:
    """The entries of several stages, each once."""
    entries = [entry for each in found for entry in each.values()]
    return [entry for index, entry in enumerate(entries) if entry not in entries[:index]]


def left(groups: Mapping[_Group, Sequence[int]], gone: Collection[int]) -> dict[_Group, list[int]]:
    """The indices of each group without those that are gone; no group that is empty then."""
    kept = {
        group: [member for member in members if member not in gone]
        for group, members in groups.items()
    }
    return {group: members for group, members in kept.items() if members}


def pairs(
    row: Mapping[str, Any], baseline: Mapping[str, Any], name: str
) -> tuple[list[float], list[float]]:
    """The values of a quantity in two entries of reports, of the seeds that both have.

    Args:
        row: With its `seeds`, and the spread over them of each quantity.
        baseline: The same of what it is compared with.
        name: Of the quantity.
    """
    ours, theirs = (
        dict(zip(each["seeds"], each[name]["values"], strict=True)) for each in (row, baseline)
    )
    common = [seed for seed in ours if seed in theirs]
    return [ours[seed] for seed in common], [theirs[seed] for seed in common]


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of reports: which members diverged; nothing where none did."""
    if not found:
        return []
    return [
        "",
        "Diverged, and from then on in no number here; means, intervals and tests are over the "
        "seeds that are left:",
        "",
        *(f"- {row['member']}: {_why(row)}" for row in found),
    ]


def _why(row: Mapping[str, Any]) -> str:
    if "of" in row:
        return f"starts from {row['of']}, which diverged"
    return f"{row['term']!r} was not finite at step {row['step']} of stage {row['stage']!r}"


def of_seeds(value: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """What a cell adds to a spread over fewer than all seeds: their number."""
    count = len(value["values"])
    return "" if count == len(seeds) else f" (n = {count})"
