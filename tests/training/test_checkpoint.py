"""Checkpoints: what goes in comes out bit for bit, and nothing else does."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ntt_sparse.training import checkpoint, state


def make_state(seed=0):
    params = {
        "w": jax.random.normal(jax.random.key(seed), (2, 3, 4)),
        "b": jnp.array([[-0.0], [jnp.float32(1e-45)]]),
    }
    members = state.Member(
        params=params,
        masks={"w": params["w"] > 0, "b": None},
        opt_state=jax.vmap(optax.adam(1e-3).init)(params),
        key=jax.random.split(jax.random.key(seed + 1), 2),
        context={"counts": jnp.arange(2), "nothing": ()},
    )
    return state.TrainState(jnp.int32(5), members, {"loss": jnp.ones(2)}, jnp.int32(1), {})


def bits(tree):
    leaves = []
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        leaves.append(np.asarray(leaf).tobytes())
    return leaves


def test_a_state_comes_back_bit_for_bit(tmp_path):
    saved = make_state()
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(5, saved, records=7)
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        restored, records = checkpoints.restore(make_state(seed=9))
    assert records == 7
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert bits(restored) == bits(saved)
    # The key draws what the saved one would have drawn.
    draws = [jax.random.uniform(s.members.key[1], (3,)) for s in (saved, restored)]
    np.testing.assert_array_equal(*draws)


def test_arrays_of_numpy_come_back_and_other_things_are_refused(tmp_path):
    saved = {"a": np.arange(3.0, dtype=np.float32), "b": jnp.ones(2)}
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(TypeError, match=r"\['c'\] of the state is 3, expected an array"):
            checkpoints.save(1, {**saved, "c": 3}, records=0)
        checkpoints.save(1, saved, records=0)
        restored, _ = checkpoints.restore(jax.tree.map(np.zeros_like, saved))
    assert bits(restored) == bits(saved)


def test_only_the_newest_are_kept_and_the_newest_is_restored(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), records=step)
        assert checkpoints.steps() == [2, 3]
        restored, records = checkpoints.restore(make_state())
    assert records == 3
    assert bits(restored) == bits(make_state(3))


def test_no_checkpoint_is_none(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(make_state()) is None


def data_file(directory):
    """The file that holds the arrays."""
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def empty(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_damage_is_found_and_the_one_before_is_used(tmp_path, damage, caplog):
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, make_state(1), records=1)
        checkpoints.save(2, make_state(2), records=2)
    damage(data_file(tmp_path / "c" / "2"))
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        restored, records = checkpoints.restore(make_state())
        assert records == 1
        assert bits(restored) == bits(make_state(1))
        assert "step 2 is cut short or changed" in caplog.text
        # Its place is free again, and what was there is not lost.
        checkpoints.save(2, make_state(2), records=2)
        assert checkpoints.restore(make_state())[1] == 2
    assert (tmp_path / "c-damaged" / "2").is_dir()


def test_damage_everywhere_is_an_error_that_leaves_everything(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, make_state(1), records=1)
    cut(data_file(tmp_path / "c" / "1"))
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(checkpoint.CheckpointError, match="Delete or move that directory"):
            checkpoints.restore(make_state())
    assert (tmp_path / "c" / "1").is_dir()


@pytest.mark.parametrize(
    "time", [str(10**40), '"yesterday"', "[" * 100_000], ids=["late", "text", "nested"]
)
@pytest.mark.parametrize("damaged", [1, 2])
def test_damage_that_keeps_orbax_from_opening_says_which_to_move(tmp_path, damaged, time):
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, make_state(1), records=1)
        checkpoints.save(2, make_state(2), records=2)
    described = tmp_path / "c" / str(damaged) / "_CHECKPOINT_METADATA"
    content = json.loads(described.read_text()) | {"commit_timestamp_nsecs": "here"}
    described.write_text(json.dumps(content).replace('"here"', time))
    message = rf"c is damaged \({damaged}: .*move it elsewhere"
    with pytest.raises(checkpoint.CheckpointError, match=message) as raised:
        checkpoint.Checkpoints(tmp_path / "c")
    assert "\n" not in str(raised.value)
    (tmp_path / "c" / str(damaged)).rename(tmp_path / "elsewhere")
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(make_state())[1] == 3 - damaged


def test_a_checkpoint_of_another_network_is_an_error(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, make_state(), records=1)
        other = make_state()
        other.members.params["w"] = jnp.zeros((2, 5, 4))
        with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in"):
            checkpoints.restore(other)


def test_a_checkpoint_of_another_run_is_refused_and_left(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c", identity="density 0.03") as checkpoints:
        checkpoints.save(1, make_state(), records=1)
    with checkpoint.Checkpoints(tmp_path / "c", identity="density 0.1") as checkpoints:
        with pytest.raises(checkpoint.CheckpointError, match="other settings or data"):
            checkpoints.restore(make_state())
        assert checkpoints.steps() == [1]


def test_digest_sees_every_bit():
    base = {"a": jnp.zeros(3), "b": None}
    assert np.array_equal(
        checkpoint.digest(base), checkpoint.digest({"a": np.zeros(3, np.float32)})
    )
    others = [
        {"a": jnp.array([0.0, -0.0, 0.0])},
        {"a": jnp.zeros(3, jnp.int32)},
        {"a": jnp.zeros((3, 1))},
        {"c": jnp.zeros(3)},
    ]
    for other in others:
        assert not np.array_equal(checkpoint.digest(base), checkpoint.digest(other))


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        checkpoint.Checkpoints(tmp_path, keep=0)


def with_key(saved, key):
    return saved._replace(members=saved.members._replace(key=key))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda saved: saved._replace(sums={"loss": jnp.ones(2), "x": jnp.ones(2)}),
            r"sums.x is not there, not float32\[2\]",
        ),
        (lambda saved: saved._replace(sums={}), r"sums.loss is float32\[2\], not there"),
        (
            lambda saved: saved._replace(sums={"loss": jnp.ones(2, jnp.float16)}),
            r"sums.loss is float32\[2\], not float16\[2\]",
        ),
        (
            lambda saved: with_key(saved, jax.random.split(jax.random.key(0, impl="rbg"), 2)),
            r"members.key is uint32\[2, 2\], not uint32\[2, 4\]",
        ),
    ],
)
def test_a_checkpoint_of_another_version_says_what_differs(tmp_path, change, message):
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, make_state(), records=1)
        with pytest.raises(checkpoint.CheckpointError, match=message) as raised:
            checkpoints.restore(change(make_state()))
        assert "\n" not in str(raised.value)
        # Nothing is lost: what it is of goes on from it.
        assert checkpoints.steps() == [1] and checkpoints.restore(make_state()) is not None


def test_a_checkpoint_of_another_orbax_is_an_error_that_leaves_it(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, make_state(), records=1)
    path = tmp_path / "c" / "1" / "state" / "_METADATA"
    known = path.read_text()
    path.write_text(known.replace("tree_metadata", "tree_metadata_of_later"))
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(checkpoint.CheckpointError, match="of another network or version"):
            checkpoints.restore(make_state())
    path.write_text(known)
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(make_state())[1] == 1


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_one_before_stays(
    tmp_path, monkeypatch
):
    # As Orbax and TensorStore said it on a full tmpfs.
    full = (
        'RESOURCE_EXHAUSTED: Error writing "meta.records/c" in OCDBT database at local file '
        '"/x/": Failed writing: "/x/manifest.ocdbt.__lock": Failed to write 235 bytes to file '
        "21: No space left on device [os_error_code='28']"
    )
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, make_state(1), records=1)
        for error in (ValueError(full), OSError(28, "No space left on device")):

            def save(*arguments, error=error):
                raise error

            with monkeypatch.context() as patched:
                patched.setattr(checkpoints._checkpointer, "save", save)
                with pytest.raises(checkpoint.CheckpointError) as raised:
                    checkpoints.save(2, make_state(2), records=2)
            assert "step 2 cannot be written" in str(raised.value)
            assert "(No space left on device): when that is mended" in str(raised.value)
        assert checkpoints.restore(make_state())[1] == 1
        checkpoints.save(2, make_state(2), records=2)
        assert checkpoints.restore(make_state())[1] == 2


def test_what_goes_wrong_is_not_hidden_by_closing(tmp_path, monkeypatch):
    checkpoints = checkpoint.Checkpoints(tmp_path / "c")

    def close():
        raise ValueError("the same again")

    monkeypatch.setattr(checkpoints, "close", close)
    with pytest.raises(checkpoint.CheckpointError, match="first"), checkpoints:
        raise checkpoint.CheckpointError("first")
    with pytest.raises(ValueError, match="the same again"), checkpoints:
        pass


def test_a_clock_that_jumps_while_orbax_waits_costs_nothing(tmp_path, monkeypatch):
    """It waits by the time of day: a jump of years ahead in a save is a timeout."""
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, make_state(1), records=1)
        first = checkpoints._checkpointer

        def save(*arguments):
            raise TimeoutError(
                "ChainedFuture completed 0/3 futures but timed out after 0.00 seconds."
            )

        monkeypatch.setattr(first, "save", save)
        checkpoints.save(2, make_state(2), records=2)
        assert checkpoints._checkpointer is not first
        assert checkpoints.restore(make_state())[1] == 2
        # Not without end: what goes on is an error.
        monkeypatch.setattr(checkpoints._checkpointer, "save", save)
        monkeypatch.setattr(checkpoints, "_open", lambda: checkpoints._checkpointer)
        with pytest.raises(checkpoint.CheckpointError, match="step 3 cannot be written"):
            checkpoints.save(3, make_state(3), records=3)
