"""The stand-ins for the kernel distance against the full kernels of both networks."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ntt_sparse.ntk import empirical_ntk
from ntt_sparse.objectives.ntt import ntt_loss, ntt_loss_from_targets, teacher_targets

WEIGHTS = {"kernel_weight": 0.7, "l2_weight": 0.0}


def net(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def problem(n, seed=0):
    rng = np.random.default_rng(seed)

    def params():
        return {
            "in": jnp.asarray(rng.normal(size=(4, 6))),
            "out": jnp.asarray(rng.normal(size=(6, 3))),
        }

    student, teacher = params(), params()
    masks = jax.tree.map(lambda w: jnp.asarray(rng.random(w.shape) < 0.5), student)
    return student, masks, teacher, jnp.asarray(rng.normal(size=(n, 4)))


# Compiled once for all problems of a size.
STATIC = ("kernel_weight", "l2_weight", "distance")
loss_of_net = jax.jit(functools.partial(ntt_loss, net), static_argnames=(*STATIC, "probes"))
loss_from_targets = jax.jit(functools.partial(ntt_loss_from_targets, net), static_argnames=STATIC)
targets_of_net = jax.jit(
    functools.partial(teacher_targets, net), static_argnames=("distance", "probes")
)


@jax.jit
def kernel_difference(student, masks, teacher, x):
    """By explicit Jacobians."""
    halves = x[: len(x) // 2], x[len(x) // 2 :]
    ours = empirical_ntk(net, student, *halves, masks=masks, method="jacobian")
    return ours - empirical_ntk(net, teacher, *halves, method="jacobian")


@pytest.mark.parametrize("n", [2, 5])
def test_trace(x64, n):
    arguments = problem(n)
    _, terms = loss_of_net(*arguments, **WEIGHTS, distance="trace")
    difference = kernel_difference(*arguments)
    traces = np.einsum("ijoo->ij", difference)
    np.testing.assert_allclose(terms.kernel, np.mean(traces**2) / 3 / 9, rtol=1e-12)
    # Never above the full distance.
    assert terms.kernel < np.mean(difference**2)


def test_trace_is_the_full_distance_of_multiples_of_the_identity(x64):
    """A linear network's kernel is |x|^2 times the identity, wherever its mask is a row's."""
    student, _, teacher, x = problem(4)
    rows = jnp.asarray([True, False, True, True])
    masks = {"w": jnp.broadcast_to(rows[:, None], (4, 3))}
    arguments = {"w": student["in"][:, :3]}, masks, {"w": teacher["in"][:, :3]}, x

    @jax.jit
    def distances(*arguments):
        return [
            ntt_loss(lambda p, x: x @ p["w"], *arguments, **WEIGHTS, distance=distance)[1].kernel
            for distance in ("full", "trace")
        ]

    full, trace = distances(*arguments)
    assert full > 0.01
    np.testing.assert_allclose(trace, full, rtol=1e-12)


@pytest.mark.variants(1)
@pytest.mark.parametrize("probes", [1, 3])
def test_sketch_is_unbiased(x64, probes):
    """Value and gradient, within five standard errors of 4,000 draws."""
    student, masks, teacher, x = problem(5)

    def kernel_term(student, key=None, **options):
        return ntt_loss(net, student, masks, teacher, x, **WEIGHTS, key=key, **options)[1].kernel

    draw = jax.value_and_grad(
        lambda student, key: kernel_term(student, key, distance="sketch", probes=probes)
    )
    keys = jax.random.split(jax.random.key(1), 4000)
    draws = jax.jit(jax.vmap(draw, (None, 0)))(student, keys)
    exact = jax.jit(jax.value_and_grad(kernel_term))(student)
    for sample, expected in zip(jax.tree.leaves(draws), jax.tree.leaves(exact), strict=True):
        error = np.std(sample, axis=0) / np.sqrt(len(sample))
        assert np.all(np.abs(np.mean(sample, axis=0) - expected) <= 5 * error + 1e-12)
    if probes == 1:
        # And not by chance: a single draw is off.
        assert np.std(draws[0]) > 0.1 * exact[0]


@pytest.mark.parametrize("probes", [1, 4])
def test_variance_for_one_pair(x64, probes):
    """Against the variance over all signs, within five standard errors of 4,000 draws."""
    arguments = problem(2)
    difference = np.asarray(kernel_difference(*arguments))[0, 0]
    signs = np.array([*itertools.product((-1, 1), repeat=3)])
    # What one pair of probes gives, for each of the 8 x 8 pairs of sign vectors u and v.
    values = (signs @ difference @ signs.T) ** 2 / 9
    # A sketch is the mean over probes^2 pairs. Pairs that share u alone have the variance of
    # the mean over v as their covariance, and so with v; pairs that share nothing have none.
    alone, sharing_u, sharing_v = values.var(), values.mean(1).var(), values.mean(0).var()
    expected = (alone + (probes - 1) * (sharing_u + sharing_v)) / probes**2
    draws = jax.jit(
        jax.vmap(
            lambda key: (
                ntt_loss(net, *arguments, **WEIGHTS, distance="sketch", probes=probes, key=key)[
                    1
                ].kernel
            )
        )
    )(jax.random.split(jax.random.key(2), 4000))
    squares = (np.asarray(draws) - values.mean()) ** 2
    assert abs(squares.mean() - expected) < 5 * squares.std() / np.sqrt(4000)
    # The bound of the docstring, for one probe.
    assert alone <= 8 * (np.sum(difference**2) / 9) ** 2


def test_sketches_of_teacher_and_student_share_their_signs(x64):
    student, masks, teacher, x = problem(6)
    options = {"distance": "sketch", "probes": 2, "key": jax.random.key(3)}
    whole, _ = loss_of_net(student, masks, teacher, x, **WEIGHTS, **options)
    targets = targets_of_net(teacher, x, **options)
    assert targets.kernel.shape == (3, 3, 2, 2)
    parts, _ = loss_from_targets(student, masks, targets, x, **WEIGHTS, distance="sketch")
    np.testing.assert_allclose(parts, whole, rtol=1e-14)
    everywhere = jax.tree.map(jnp.ones_like, masks)
    _, terms = loss_of_net(teacher, everywhere, teacher, x, **WEIGHTS, **options)
    assert terms.kernel < 1e-24


# A sketch is split over devices in the tests of convolutions.
@pytest.mark.parametrize("distance", ["trace", pytest.param("sketch", marks=pytest.mark.slow)])
def test_devices_equal_one_device(x64, distance):
    arguments = problem(12)
    options = {"distance": distance, "probes": 2, "key": jax.random.key(4)}
    expected = jax.jit(
        jax.value_and_grad(lambda p: ntt_loss(net, p, *arguments[1:], **WEIGHTS, **options)[0])
    )(arguments[0])
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(student, masks, teacher, x):
        return jax.value_and_grad(
            lambda p: ntt_loss(net, p, masks, teacher, x, **WEIGHTS, **options, axis_name="data")[0]
        )(student)

    spread = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P(), P("data")), out_specs=P())
    result = jax.jit(spread)(*arguments)
    for ours, theirs in zip(*map(jax.tree.leaves, (result, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "sketch"}, "needs a key"),
        (
            {"distance": "sketch", "key": jax.random.key(0), "probes": 0},
            "probes is 0, expected a whole number of at least 1",
        ),
        (
            {"distance": "sketch", "key": jax.random.key(0), "probes": 1.5},
            r"probes is 1\.5, expected a whole number",
        ),
        ({"distance": "sketch", "key": 0}, "key is 0, expected one typed key, such as"),
        (
            {"distance": "sketch", "key": jax.random.PRNGKey(0)},
            r"key is uint32\(2,\), expected one typed key",
        ),
        (
            {"distance": "sketch", "key": jax.random.split(jax.random.key(0))},
            r"key is key<fry>\(2,\), expected one typed key",
        ),
        ({"distance": "exact"}, "distance is 'exact', expected"),
    ],
)
def test_errors(options, message):
    arguments = jax.tree.map(lambda a: a.astype(jnp.float32), problem(4)[::2])
    masks = jax.tree.map(lambda a: a > 0, arguments[0])
    with pytest.raises(ValueError, match=message) as error:
        inspect.unwrap(ntt_loss)(
            net, arguments[0], masks, arguments[1], jnp.ones((4, 4)), **WEIGHTS, **options
        )
    assert "\n" not in str(error.value)


OPTIONS = {
    "full": {},
    "trace": {"distance": "trace"},
    "sketch": {"distance": "sketch", "key": jax.random.key(5), "probes": 3},
}


@pytest.mark.parametrize("ours", OPTIONS)
@pytest.mark.parametrize("theirs", OPTIONS)
def test_targets_know_their_distance(x64, theirs, ours):
    """Also within and out of compiled programs; three probes of three outputs look like all."""
    student, masks, teacher, x = problem(6)
    targets = targets_of_net(teacher, x, **OPTIONS[theirs])
    assert targets.distance == theirs
    assert len(jax.tree.leaves(targets)) == (3 if theirs == "sketch" else 2)

    def loss(student, targets):
        return loss_from_targets(student, masks, targets, x, **WEIGHTS, distance=ours)[0]

    if ours == theirs:
        whole, _ = loss_of_net(student, masks, teacher, x, **WEIGHTS, **OPTIONS[ours])
        np.testing.assert_allclose(loss(student, targets), whole, rtol=1e-12)
    else:
        message = f"^targets are for distance='{theirs}', the loss for '{ours}': give both"
        with pytest.raises(ValueError, match=message) as error:
            loss(student, targets)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("probes", [1, 2])
def test_a_sketch_is_drawn_as_that_of_its_targets(x64, probes):
    """By the key and the probes that go with them: another key is 5e-14 against a hundred."""
    student, masks, _, x = problem(6)
    masks = jax.tree.map(jnp.ones_like, masks)
    seeds = jnp.arange(3)

    @jax.jit
    def losses(student, seeds):
        """Of a student that is its teacher, and of targets that a scan hands on."""

        def targets_of(seed):
            how = {"distance": "sketch", "key": jax.random.key(seed), "probes": probes}
            return teacher_targets(net, student, x, **how)

        def step(_, targets):
            how = {**WEIGHTS, "distance": "sketch"}
            return None, ntt_loss_from_targets(net, student, masks, targets, x, **how)[0]

        _, scanned = jax.lax.scan(step, None, jax.vmap(targets_of)(seeds))
        return scanned

    np.testing.assert_allclose(losses(student, seeds), np.zeros(3), atol=1e-12)


def test_targets_of_each_device(x64):
    """`pmap` hands them out and takes them back."""
    student, masks, teacher, x = problem(8)
    parts = x.reshape(4, 2, 4)
    options = OPTIONS["sketch"] | {"axis_name": "data"}
    targets = jax.pmap(lambda x: teacher_targets(net, teacher, x, **options), "data")(parts)

    def loss(targets, x):
        how = {"distance": "sketch", "axis_name": "data"}
        return ntt_loss_from_targets(net, student, masks, targets, x, **WEIGHTS, **how)[0]

    whole, _ = loss_of_net(student, masks, teacher, x, **WEIGHTS, **OPTIONS["sketch"])
    values = jax.pmap(loss, "data")(targets, parts)
    np.testing.assert_allclose(values, np.full(4, whole), rtol=1e-10)
