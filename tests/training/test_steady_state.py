"""What a run does not do once it is under way: compile, and move data from the host."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import terms
from ntt_sparse.training.checkpoint import Checkpoints
from ntt_sparse.training.loop import Plan, fit
from ntt_sparse.training.metrics import MetricsLog


@pytest.fixture
def compiled(compilations):
    """A list that grows by one with each program that is compiled."""
    with compilations() as names:
        yield names


def data_on(mesh):
    return jax.device_put(problems.data(), meshes.replicated(mesh))


@pytest.mark.variants(2)
@pytest.mark.parametrize("mode", ["vmap", "loop", "dispatch"])
def test_nothing_is_compiled_after_the_first_record(tmp_path, compiled, mode):
    """Over epochs, records, checkpoints and chunks of several lengths."""
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    data = data_on(mesh)
    evaluated = jax.jit(
        jax.vmap(lambda m: terms.evaluate_supervised(problems.apply_fn, m.params, m.masks, data))
    )
    counts = []

    def evaluate(members):
        result = evaluated(members)
        counts.append(len(compiled))
        return result

    # Six steps are an epoch.
    plan = Plan(total_steps=40, steps_per_epoch=6, record_every=5, checkpoint_seconds=0.0)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        fit(
            problems.program(mesh, mode),
            problems.members(),
            data,
            plan,
            log=MetricsLog(tmp_path / "metrics.jsonl", "made"),
            checkpoints=checkpoints,
            member_names=["a", "b", "c", "d"],
            evaluate=evaluate,
        )
    # Records are at the start, after the first chunks, and so on; those of 5 steps are two chunks
    # at least, so that the second record has seen all there is.
    assert len(counts) == 9 and counts[1] > counts[0] > 0
    assert counts[2:] == [counts[2]] * 7, compiled[counts[2] :]


@pytest.mark.variants(2)
@pytest.mark.parametrize("mode", ["vmap", "loop"])
@pytest.mark.parametrize("devices", [1, 8])
def test_no_chunk_asks_the_host(mode, devices):
    mesh = meshes.make_mesh(
        4 if devices == 8 else 1, 2 if devices == 8 else 1, devices=jax.devices()[:devices]
    )
    program, data = problems.program(mesh, mode), data_on(mesh)
    state = program.init(problems.members(), data, 0)
    permutations = program.permutations(state, jnp.int32(0), data)
    ends = jax.device_put([np.int32(2), np.int32(5)], meshes.replicated(mesh))
    # Compiled with the first, as constants are moved then.
    state = program.chunk(state, data, permutations, ends[0])
    with jax.transfer_guard("disallow"):
        state = jax.block_until_ready(program.chunk(state, data, permutations, ends[1]))
    assert int(state.step) == 5
    # And the guard would have said so.
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed"):
        program.chunk(state, data, permutations, np.int32(6))
