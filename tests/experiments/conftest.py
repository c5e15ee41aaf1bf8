"""One finished smoke run of the study, shared by the tests that compare with it."""

from typing import NamedTuple

import pytest


class SmokeRun(NamedTuple):
    """A finished run and how to repeat it."""

    arguments: tuple
    workdir: object
    cache: object


@pytest.fixture(scope="session")
def finished_smoke(tmp_path_factory):
    from test_cli import CONFIG, run

    cache = tmp_path_factory.mktemp("compiled")
    workdir = tmp_path_factory.mktemp("smoke") / "work"
    arguments = (
        f"--config={CONFIG}:digits_lenet300,smoke",
        "--config.methods=ntt,dense,random",
        "--config.density=0.05",
        # Long enough to be interrupted in.
        "--config.supervised.max_steps=600",
        "--config.supervised.record_every=50",
    )
    result = run(cache, *arguments, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr[-2000:]
    return SmokeRun(arguments, workdir, cache)
