import contextlib

import jax
import pytest


@pytest.fixture
def compilations():
    """A context manager that yields a list with one entry for each program XLA compiles."""

    @contextlib.contextmanager
    def count():
        events = []

        def listener(event, duration, **kwargs):
            if event == "/jax/core/compile/backend_compile_duration":
                events.append(duration)

        jax.monitoring.register_event_duration_secs_listener(listener)
        try:
            yield events
        finally:
            jax.monitoring.unregister_event_duration_listener(listener)

    return count
