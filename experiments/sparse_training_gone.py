"""Networks of sparse training that diverged, in the last stage or in one before it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import diverged
from experiments import sparse_training_l0 as l0
from experiments import sparse_training_lottery as lottery
from experiments import sparse_training_transform as transform
from experiments.sparse_training_members import Run, member_names, runs_of, whole_runs
from experiments.study import asked_densities


def gone(config: Any, workdir: Path) -> tuple[diverged.Gone, list[dict[str, Any]]]:
    """Networks of `runs_of` that are in no number, and all entries for the report.

    A network that starts from one that diverged is gone as well. Stages that have not begun have
    no part in it.

    Raises:
        DivergenceError: A stage has left none.
    """
    if config.method == lottery.METHOD:
        return _of_levels(config, workdir)
    runs, before, found = runs_of(config), {}, []
    for stage, started in _stages(config):
        sources = [started.index(_source(run, started)) for run in runs]
        before = diverged.gone(workdir, stage, member_names(started), before)
        found.append(before)
        before = diverged.heirs(member_names(runs), sources, before)
    last = diverged.gone(workdir, "supervised", member_names(runs), before)
    return last, diverged.rows(*found, last)


def _stages(config: Any) -> Iterator[tuple[str, list[Run]]]:
    """The stages before the last one, with what they train."""
    if config.method == l0.METHOD:
        yield l0.STAGE, whole_runs(config)
    if config.method == transform.METHOD:
        for cycle in range(1, config.transform.cycles + 1):
            yield transform.stage_of(cycle), runs_of(config)


def _source(run: Run, started: list[Run]) -> Run:
    """Whole networks are those of all densities."""
    return run if run in started else run._replace(density=1.0)


def _of_levels(config: Any, workdir: Path) -> tuple[diverged.Gone, list[dict[str, Any]]]:
    """As `gone`, of lottery tickets, where each level starts from the one before."""
    runs, before, found = whole_runs(config), {}, {}
    stages = [(lottery.stage_of(density), density) for density in lottery.levels(config)]
    if config.lth.rewind:
        stages.insert(0, (lottery.REWIND, 1.0))
    listed: list[diverged.Gone] = []
    for stage, density in stages:
        names = member_names([run._replace(density=density) for run in runs])
        before = diverged.heirs(names, range(len(runs)), before)
        before = diverged.gone(workdir, stage, names, before)
        found[density] = before
        # Of levels in between those alone that diverged there.
        asked = density in asked_densities(config)
        listed.append({i: row for i, row in before.items() if asked or "of" not in row})
    members = {
        place * len(runs) + index: row
        for place, density in enumerate(asked_densities(config))
        for index, row in found[density].items()
    }
    return members, diverged.rows(*listed)
