"""One finished smoke run of the study, shared by the tests that compare with it."""

import functools
from typing import NamedTuple

import jax
import pytest

from experiments import sparse_training_study
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.training import mesh as meshes


class SmokeRun(NamedTuple):
    """A finished run and how to repeat it."""

    arguments: tuple
    fields: dict
    workdir: object


@pytest.fixture(scope="session")
def finished_smoke(tmp_path_factory):
    from test_cli import CONFIG, run

    workdir = tmp_path_factory.mktemp("smoke") / "work"
    # Checkpoints after every chunk, so that a kill finds one.
    fields = {
        "methods": "ntt,random",
        "density": (0.05,),
        "probe": 0,
        "checkpoint_seconds": 0.0,
        "transfer.max_steps": 12,
        "transfer.refresh_every": 3,
        "transfer.record_every": 6,
        "transfer.batch_size": 16,
        "supervised.max_steps": 60,
        "supervised.record_every": 20,
    }
    arguments = (
        f"--config={CONFIG}:digits_lenet300,smoke",
        *(f"--config.{field}={value}" for field, value in fields.items()),
    )
    result = run(*arguments, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "summary.json: " in result.stdout and "figures: " in result.stdout
    return SmokeRun(arguments, fields, workdir)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Studies on one of the eight devices: less to compile, and steps as most users run them."""
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "auto_mesh", functools.partial(meshes.auto_mesh, devices=devices))
        yield


@pytest.fixture
def unrendered(monkeypatch):
    """Figures that no test looks at are drawn, but not rendered: half a second for each."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)


@pytest.fixture
def narrow(monkeypatch):
    """Sparse training of LeNet-300-100 with a fifth of its neurons."""
    monkeypatch.setattr(
        sparse_training_study, "make_model", lambda config, n: LeNet(n, hidden=(60, 20))
    )


@pytest.fixture
def eight_devices(monkeypatch, one_device):
    """A study on all of them."""
    assert jax.device_count() == 8
    spread = functools.partial(meshes.auto_mesh, devices=jax.devices())
    monkeypatch.setattr(meshes, "auto_mesh", spread)
