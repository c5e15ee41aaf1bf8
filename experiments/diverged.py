"""Members of a stage that diverged: which are left, and what reports say of the others."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from ntt_sparse.training.metrics import MetricsLog

_Group = TypeVar("_Group")


def rows(log: MetricsLog, names: Sequence[str]) -> list[dict[str, Any]]:
    """An entry for each member of a stage that diverged: stage, member, step and term.

    Args:
        log: Records of the stage.
        names: One for each member.
    """
    return [
        {"stage": log.stage, "member": names[member], **found._asdict()}
        for member, found in sorted(log.diverged().items())
    ]


def left(groups: Mapping[_Group, Sequence[int]], gone: Collection[int]) -> dict[_Group, list[int]]:
    """The indices of each group without those that are gone; no group that is empty then."""
    kept = {
        group: [member for member in members if member not in gone]
        for group, members in groups.items()
    }
    return {group: members for group, members in kept.items() if members}


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of reports: which members diverged; nothing where none did."""
    if not found:
        return []
    return [
        "",
        "Diverged, and in no number here; means, intervals and tests are over the seeds that are "
        "left:",
        "",
        *(
            f"- {row['member']}: {row['term']!r} was not finite at step {row['step']} of stage "
            f"{row['stage']!r}"
            for row in found
        ),
    ]


def of_seeds(value: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """What a cell adds to a spread over fewer than all seeds: their number."""
    count = len(value["values"])
    return "" if count == len(seeds) else f" (n = {count})"
