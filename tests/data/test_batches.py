import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntt_sparse.data import batches


def test_step_counts_of_the_published_run():
    # 59,880 = 935 * 64 + 40: 935 full batches in a pass, counted as 936.
    assert batches.steps_per_epoch(59_880, 64) == 935
    assert batches.total_steps(59_880, 64, 20) == 18_720
    assert batches.total_steps(128, 64, 3) == 6
    assert batches.total_steps(500, 500, 5000) == 5000
    assert batches.total_steps(10, 64, 2) == 2
    assert batches.total_steps(10, 4, 0) == 0


def test_a_batch_larger_than_the_set_is_refused():
    assert batches.steps_per_epoch(64, 64) == 1
    with pytest.raises(ValueError, match="batch_size=65 is larger than the 64 examples"):
        batches.steps_per_epoch(64, 65)
    with pytest.raises(ValueError, match="larger than the 3 examples"):
        batches.batch_indices(jnp.arange(3), 0, 4)


@pytest.mark.parametrize("n, batch_size", [(0, 1), (10, 0), (-1, 4), (10, -4)])
def test_sizes_must_be_positive(n, batch_size):
    with pytest.raises(ValueError, match="must be positive"):
        batches.steps_per_epoch(n, batch_size)
    with pytest.raises(ValueError, match="must be positive"):
        batches.total_steps(n, batch_size, 1)


def test_negative_epochs_are_refused():
    with pytest.raises(ValueError, match="epochs=-1"):
        batches.total_steps(10, 5, -1)


def test_permutation_is_a_function_of_key_and_epoch():
    key = jax.random.key(3)
    first, second = (batches.epoch_permutation(key, epoch, 100) for epoch in (0, 1))
    assert first.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(first), np.arange(100))
    np.testing.assert_array_equal(np.sort(second), np.arange(100))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, batches.epoch_permutation(jax.random.key(4), 0, 100))
    np.testing.assert_array_equal(first, batches.epoch_permutation(key, 0, 100))
    # The definition that checkpoints and other programs rely on.
    expected = jax.random.permutation(jax.random.fold_in(key, 1), 100)
    np.testing.assert_array_equal(second, expected)


def test_permutation_is_int32_in_x64_too(x64):
    assert batches.epoch_permutation(jax.random.key(0), 0, 10).dtype == jnp.int32


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 40), epoch=st.integers(0, 3))
def test_batches_of_a_pass_tile_its_permutation(n, batch_size, epoch):
    batch_size = min(n, batch_size)
    permutation = jnp.asarray(np.random.RandomState(n).permutation(n), jnp.int32)
    steps = batches.steps_per_epoch(n, batch_size)
    seen = [
        np.asarray(batches.batch_indices(permutation, epoch * steps + i, batch_size))
        for i in range(steps)
    ]
    np.testing.assert_array_equal(np.concatenate(seen), permutation[: steps * batch_size])


def test_traced_steps_and_members_see_what_python_sees():
    n, batch_size, count = 23, 5, 9
    steps = batches.steps_per_epoch(n, batch_size)
    traces = []

    @jax.jit
    @jax.vmap
    def indices(key, step):
        traces.append(step)
        permutation = batches.epoch_permutation(key, step // steps, n)
        return batches.batch_indices(permutation, step, batch_size)

    keys = jax.random.split(jax.random.key(0), 3)
    for step in range(count):
        rows = indices(keys, jnp.full(3, step))
        for key, row in zip(keys, rows, strict=True):
            permutation = np.asarray(batches.epoch_permutation(key, step // 4, n))
            start = (step % 4) * 5
            np.testing.assert_array_equal(row, permutation[start : start + 5])
    assert len(traces) == 1
