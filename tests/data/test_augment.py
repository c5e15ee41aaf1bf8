import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ntt_sparse.data import augment
from ntt_sparse.data.augment import pad_crop_flip

# Compiled, unless a test is about that: operation by operation each one is a program.
change = jax.jit(pad_crop_flip, static_argnames=("pad", "mode", "flip"))


def images(n=6, h=5, w=7, c=3, dtype=np.float32):
    return jnp.asarray(np.arange(1, n * h * w * c + 1).reshape(n, h, w, c).astype(dtype))


def reference(x, offsets, mirrored, pad, mode):
    """Image by image, with np.pad."""
    x, offsets, mirrored, result = *map(np.asarray, (x, offsets, mirrored)), []
    for image, (top, left), mirror in zip(x, offsets, mirrored, strict=True):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode=mode)
        crop = padded[top : top + image.shape[0], left : left + image.shape[1]]
        result.append(crop[:, ::-1] if mirror else crop)
    return np.stack(result)


both_modes = pytest.mark.parametrize("mode", ["reflect", "constant"])


@both_modes
@pytest.mark.parametrize("pad", [0, 1, 2])
def test_every_place_and_side_by_numpy(mode, pad):
    draws = [
        (top, left, mirror)
        for top in range(2 * pad + 1)
        for left in range(2 * pad + 1)
        for mirror in (False, True)
    ]
    offsets = jnp.array([draw[:2] for draw in draws], jnp.int32)
    mirrored = jnp.array([draw[2] for draw in draws])
    x = images(n=len(draws), h=3, w=4)
    actual = augment._select(x, offsets, mirrored, pad, mode)
    np.testing.assert_array_equal(actual, reference(x, offsets, mirrored, pad, mode))


@pytest.mark.parametrize(
    ("h", "w", "pad", "mode"),
    [(1, 1, 0, "reflect"), (6, 5, 4, "reflect"), (2, 3, 5, "constant"), (1, 6, 1, "constant")],
)
def test_images_are_those_of_the_draws(h, w, pad, mode):
    key, x = jax.random.key(7), images(n=64, h=h, w=w, c=2)
    expected = reference(x, *augment._draw(key, 64, pad), pad, mode)
    np.testing.assert_array_equal(change(key, x, pad=pad, mode=mode), expected)


def test_reflection_does_not_repeat_the_edge():
    x = jnp.arange(4.0).reshape(1, 1, 4, 1) + jnp.zeros((1, 4, 1, 1))
    corner, straight = jnp.array([[2, 0]]), jnp.array([False])
    reflected = augment._select(x, corner, straight, 2, "reflect")
    np.testing.assert_array_equal(reflected[0, 0, :, 0], [2, 1, 0, 1])
    zeros = augment._select(x + 1, corner, straight, 2, "constant")
    np.testing.assert_array_equal(zeros[0, 0, :, 0], [0, 0, 1, 2])


# Draws


def test_every_place_and_side_is_drawn_equally_often():
    # 18 outcomes, 18,000 draws: a count leaves 1000 +- 6 * sqrt(1000 * 17 / 18) less than once
    # in ten million keys. Over all examples, and over all keys of one example.
    drawn = jax.jit(lambda key: augment._draw(key, 18_000, 1))(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 18_000)
    first = jax.jit(jax.vmap(lambda key: augment._draw(key, 1, 1)))(keys)
    for offsets, mirrored in (drawn, (first[0][:, 0], first[1][:, 0])):
        outcomes = np.column_stack([offsets, mirrored])
        places, counts = np.unique(outcomes, axis=0, return_counts=True)
        expected = [[t, left, m] for t in range(3) for left in range(3) for m in range(2)]
        np.testing.assert_array_equal(places, expected)
        assert np.abs(counts - 1000).max() < 6 * np.sqrt(1000 * 17 / 18)


def test_the_first_examples_of_a_larger_batch_are_drawn_alike():
    key = jax.random.key(3)
    for small, large in zip(augment._draw(key, 5, 4), augment._draw(key, 64, 4), strict=True):
        np.testing.assert_array_equal(small, large[:5])


def test_draws_are_the_same_in_float64(x64):
    key, x = jax.random.key(3), images(n=32, dtype=np.float32)
    actual = change(key, x)
    with jax.enable_x64(False):
        expected = change(key, x)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


def test_keys_and_examples_draw_apart():
    x = jnp.tile(images(n=1, h=32, w=32), (64, 1, 1, 1))
    first, second = (np.asarray(change(jax.random.key(i), x)) for i in (0, 1))
    # 162 outcomes: about 53 of them among 64 examples, and one example in 162 drawn alike.
    assert len(np.unique(first, axis=0)) > 40
    assert np.sum(np.all(first == second, axis=(1, 2, 3))) < 6


def test_without_flip_the_places_stay():
    key, x = jax.random.key(0), images(n=16)
    offsets, mirrored = augment._draw(key, 16, 2)
    assert 0 < np.sum(mirrored) < 16
    expected = reference(x, offsets, np.zeros(16, bool), 2, "reflect")
    np.testing.assert_array_equal(change(key, x, pad=2, flip=False), expected)


# Transformations and dtypes


@both_modes
def test_nothing_to_do_is_the_identity(mode):
    x = images()
    same = change(jax.random.key(0), x, pad=0, mode=mode, flip=False)
    np.testing.assert_array_equal(same, x)
    mirrored = np.asarray(change(jax.random.key(0), x, pad=0, mode=mode))
    sides = [np.array_equal(m, i[:, ::-1]) for m, i in zip(mirrored, np.asarray(x), strict=True)]
    assert 0 < sum(sides) < len(sides)


@both_modes
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint8, jnp.int32, jnp.bool_])
def test_dtype_and_values_are_kept(mode, dtype):
    key, x = jax.random.key(0), images().astype(dtype)
    actual = change(key, x, pad=2, mode=mode)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, reference(x, *augment._draw(key, 6, 2), 2, mode))


@both_modes
def test_infinities_and_nan_stay_where_they_are(mode):
    key, x = jax.random.key(0), images().at[:, 2, 3].set(jnp.array([jnp.inf, -jnp.inf, jnp.nan]))
    expected = reference(x, *augment._draw(key, 6, 2), 2, mode)
    np.testing.assert_array_equal(change(key, x, pad=2, mode=mode), expected)


@both_modes
def test_jit_and_members_equal_eager(mode):
    keys = jax.random.split(jax.random.key(0), 3)
    x = images(n=12).reshape(3, 4, 5, 7, 3)

    def fn(key, x):
        return pad_crop_flip(key, x, pad=2, mode=mode)

    alone = np.stack([fn(key, member) for key, member in zip(keys, x, strict=True)])
    np.testing.assert_array_equal(jax.vmap(fn)(keys, x), alone)
    np.testing.assert_array_equal(jax.jit(jax.vmap(fn))(keys, x), alone)
    shared = jax.jit(jax.vmap(fn, in_axes=(0, None)))(keys, x[0])
    np.testing.assert_array_equal(shared[1], fn(keys[1], x[0]))
    assert not np.array_equal(shared[0], shared[1])


def test_a_batch_spread_over_devices_is_changed_alike():
    key, x = jax.random.key(0), images(n=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    result = change(key, spread)
    np.testing.assert_array_equal(result, change(key, x))


def test_an_empty_batch_stays_empty():
    assert change(jax.random.key(0), jnp.zeros((0, 8, 8, 3))).shape == (0, 8, 8, 3)


# Errors


@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 3, 8, 8, 3), ()])
def test_other_than_a_batch_of_images_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected a batch of images \(n, h, w, c\)"):
        pad_crop_flip(jax.random.key(0), jnp.zeros(shape))


@both_modes
def test_negative_padding_is_refused(mode):
    with pytest.raises(ValueError, match="pad=-1, expected a number of pixels"):
        pad_crop_flip(jax.random.key(0), images(), pad=-1, mode=mode)


def test_more_reflection_than_image_is_refused():
    for x in (images(h=4, w=9), images(h=9, w=4)):
        assert pad_crop_flip(jax.random.key(0), x, pad=3).shape == x.shape
        assert pad_crop_flip(jax.random.key(0), x, pad=4, mode="constant").shape == x.shape
        with pytest.raises(ValueError, match="pad=4 pixels cannot be reflected into images of"):
            pad_crop_flip(jax.random.key(0), x, pad=4)


def test_an_unknown_mode_is_refused():
    # Asked of the check itself: with annotations executed, the function refuses it earlier.
    with pytest.raises(ValueError, match="mode='wrap' is unknown: expected 'reflect'"):
        augment._check((2, 8, 8, 3), 1, "wrap")
