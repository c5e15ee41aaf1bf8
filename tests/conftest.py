"""Test environment: eight host devices, CPU only, set before JAX is imported.

`NPROC` sizes XLA's CPU thread pool: with more forced devices than threads a
collective waits for participants that never get a thread, and XLA aborts.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import pytest


@pytest.fixture
def x64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield
