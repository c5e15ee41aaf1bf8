import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from ntt_sparse.pruning import masks, saliency


def init(key):
    first, second, third = jax.random.split(key, 3)
    return {
        "hidden": {"kernel": jax.random.normal(first, (3, 4)), "bias": jnp.full(4, 0.1)},
        "out": {"kernel": jax.random.normal(second, (4, 2)), "bias": jax.random.normal(third, 2)},
    }


def network(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def loss(params, batch):
    x, y = batch
    return jnp.mean((network(params, x) - y) ** 2)


def data(n=16):
    x, y = jax.random.split(jax.random.key(1))
    return jax.random.normal(x, (n, 3)), jax.random.normal(y, (n, 2))


def assert_close(actual, expected, rtol):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol)


# Magnitude and random


def test_magnitude_by_hand():
    scores = saliency.magnitude({"w": jnp.array([[-2.0, 1.0, -0.0]]), "b": jnp.ones(3)})
    np.testing.assert_array_equal(scores["w"], [[2.0, 1.0, 0.0]])


def test_random_draws_each_subset_equally_often():
    # 10 subsets of 2 among 5, 4000 draws: chi-square with 9 degrees of freedom exceeds 33.7
    # once in ten thousand keys.
    def draw(key):
        scores = saliency.random(key, {"w": jnp.zeros((1, 5))})
        return masks.from_counts(scores, {"w": 2})["w"][0]

    drawn = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000))
    assert set(np.asarray(drawn).sum(axis=1)) == {2}
    _, frequencies = np.unique(np.asarray(drawn), axis=0, return_counts=True)
    assert len(frequencies) == 10
    assert np.sum((frequencies - 400) ** 2 / 400) < 33.7


def test_random_leaves_are_independent_of_each_other_and_of_the_predicate():
    params = {"a": jnp.zeros((8, 8)), "b": jnp.zeros(8), "c": jnp.zeros((8, 8))}
    scores = saliency.random(jax.random.key(0), params)
    assert not np.any(np.asarray(scores["a"] == scores["c"]))
    alone = saliency.random(jax.random.key(0), params, prunable=lambda path, leaf: path == "c")
    np.testing.assert_array_equal(alone["c"], scores["c"])
    resized = saliency.random(jax.random.key(0), {**params, "a": jnp.zeros((2, 2))})
    np.testing.assert_array_equal(resized["c"], scores["c"])
    other = saliency.random(jax.random.key(1), params)
    assert not np.any(np.asarray(other["c"] == scores["c"]))


def test_random_scores_of_half_precision_params_hardly_tie():
    # In bfloat16 a uniform draw has 2^7 values, and ties at the cut go to early entries. In
    # float32 it has 2^23: 20,000 draws hold 20,000^2 / 2 / 2^23 = 24 pairs of equals on average.
    params = {"w": jnp.zeros((2, 10_000), jnp.bfloat16)}
    scores = np.asarray(saliency.random(jax.random.key(0), params)["w"])
    assert len(np.unique(scores)) > 20_000 - 24 - 5 * np.sqrt(24)


# SNIP


@pytest.mark.usefixtures("x64")
def test_snip_is_the_derivative_by_gates():
    params, batch = init(jax.random.key(0)), data()
    leaves, treedef = jax.tree.flatten(params)
    scores = saliency.snip(loss, params, batch)
    step = 1e-5
    for i, score in enumerate(jax.tree.leaves(scores, is_leaf=lambda leaf: leaf is None)):
        if score is None:
            continue

        def gated(gates, i=i):
            changed = [gates * leaf if j == i else leaf for j, leaf in enumerate(leaves)]
            return loss(jax.tree.unflatten(treedef, changed), batch)

        # Central differences: truncation of order step^2 = 1e-10, rounding of 1e-16 / step = 1e-11.
        bumps = step * np.eye(score.size).reshape(-1, *score.shape)
        differences = [(gated(1 + b) - gated(1 - b)) / (2 * step) for b in bumps]
        expected = np.abs(np.array(differences)).reshape(score.shape)
        np.testing.assert_allclose(score, expected, rtol=0, atol=1e-9)


def test_snip_ranking_does_not_depend_on_the_scale_of_the_loss():
    params, batch = init(jax.random.key(0)), data()

    def summed(params, batch):  # A sum over 16 x 2 residuals is 32 times the mean, exactly.
        return jnp.sum((network(params, batch[0]) - batch[1]) ** 2)

    for density in (0.1, 0.35, 0.8):
        by_mean = masks.from_scores(saliency.snip(loss, params, batch), density)
        by_sum = masks.from_scores(saliency.snip(summed, params, batch), density)
        for a, b in zip(jax.tree.leaves(by_mean), jax.tree.leaves(by_sum), strict=True):
            np.testing.assert_array_equal(a, b)


def test_snip_leaves_other_leaves_alone():
    # A leaf of integers cannot be differentiated, and does not have to be.
    def loss_fn(params, batch):
        return jnp.sum(params["w"][params["index"]] * batch)

    params = {"w": jnp.array([[1.0], [2.0], [-3.0]]), "index": jnp.array([2, 0])}
    scores = saliency.snip(loss_fn, params, jnp.array([[10.0], [100.0]]))
    assert scores["index"] is None
    np.testing.assert_array_equal(scores["w"], [[100.0], [0.0], [30.0]])


# Logit-SNIP


@pytest.mark.usefixtures("x64")
def test_logit_snip_of_a_linear_network():
    # Z = ||x W||^2 has W * dZ/dW = 2 W * (x^T x W), whose entries sum to 2 Z.
    x, w = (
        np.random.default_rng(0).normal(size=(7, 4)),
        np.array([[1.0, -2], [3, 4], [-5, 6], [7, 8]]),
    )
    params = {"w": jnp.asarray(w)}
    scores = saliency.logit_snip(lambda p, x: x @ p["w"], params, jnp.asarray(x))
    signed = 2 * w * (x.T @ x @ w)
    np.testing.assert_allclose(signed.sum(), 2 * np.sum((x @ w) ** 2), rtol=1e-12)
    np.testing.assert_allclose(scores["w"], np.abs(signed), rtol=1e-12)
    # Without negative numbers no sign is lost, and the scores themselves sum to 2 Z.
    x, params = np.abs(x), {"w": jnp.asarray(np.abs(w))}
    scores = saliency.logit_snip(lambda p, x: x @ p["w"], params, jnp.asarray(x))
    np.testing.assert_allclose(scores["w"].sum(), 2 * np.sum((x @ np.abs(w)) ** 2), rtol=1e-12)


def test_logit_snip_is_snip_of_the_squared_norm():
    params, (x, _) = init(jax.random.key(0)), data()
    expected = saliency.snip(lambda p, x: jnp.sum(network(p, x) ** 2), params, x)
    assert_close(saliency.logit_snip(network, params, x), expected, rtol=1e-6)


# GraSP


def half(x):
    return jnp.sum(x**2) / 2


@pytest.mark.usefixtures("x64")
def test_grasp_of_a_quadratic():
    # L = theta^T A theta / 2 has g = A theta and H g = A^2 theta.
    root = np.random.default_rng(0).normal(size=(6, 6))
    matrix, theta = root + root.T, np.random.default_rng(1).normal(size=(3, 2))

    def quadratic(params, matrix):
        flat = params["w"].reshape(-1)
        return flat @ matrix @ flat / 2

    scores = saliency.grasp(quadratic, {"w": jnp.asarray(theta)}, jnp.asarray(matrix))
    expected = theta * (matrix @ matrix @ theta.reshape(-1)).reshape(3, 2)
    np.testing.assert_allclose(scores["w"], expected, rtol=1e-12, atol=1e-13)
    assert np.any(expected < -0.1) and np.any(expected > 0.1)


def test_grasp_keeps_the_weights_the_gradient_rests_on():
    # With A = diag(3, 1) and theta = (1, 2), ||g||^2 = 9 + 4: without the first weight 4 are
    # left, without the second 9. The second is the larger weight.
    params, curvature = {"w": jnp.array([[1.0, 2.0]])}, jnp.array([[3.0, 1.0]])
    scores = saliency.grasp(lambda p, a: jnp.sum(a * p["w"] ** 2) / 2, params, curvature)
    np.testing.assert_array_equal(scores["w"], [[9.0, 4.0]])
    np.testing.assert_array_equal(masks.from_scores(scores, 0.5)["w"], [[True, False]])


@pytest.mark.usefixtures("x64")
def test_grasp_is_the_change_of_the_gradient_norm():
    params, batch = init(jax.random.key(0)), data()
    # Its biases are not pruned, so the norm of the gradient leaves them out.
    kernels = {name: layer["kernel"] for name, layer in params.items()}

    @jax.jit
    def half_squared_norm(kernels):
        def of(kernels):
            filled = {n: {**params[n], "kernel": kernel} for n, kernel in kernels.items()}
            return loss(filled, batch)

        return sum(half(leaf) for leaf in jax.tree.leaves(jax.grad(of)(kernels)))

    scores, step = saliency.grasp(loss, params, batch), 1e-5
    for name, kernel in kernels.items():
        differences = []
        for place in np.eye(kernel.size).reshape(-1, *kernel.shape):
            # Shrinking a weight by a factor removes it little by little.
            up, down = (
                half_squared_norm({**kernels, name: kernel * (1 + bump * place)})
                for bump in (step, -step)
            )
            differences.append((up - down) / (2 * step))
        expected = np.array(differences).reshape(kernel.shape)
        np.testing.assert_allclose(scores[name]["kernel"], expected, rtol=0, atol=1e-8)
        assert np.abs(expected).max() > 0.1
        assert scores[name]["bias"] is None


@pytest.mark.usefixtures("x64")
def test_grasp_ranking_depends_on_the_temperature_not_on_a_factor():
    params, (x, y) = init(jax.random.key(0)), data()

    def entropy(params, temperature):
        logits = network(params, x) / temperature
        return -jnp.mean(jnp.sum(jax.nn.softmax(y) * jax.nn.log_softmax(logits), axis=1))

    def kept(loss_fn, temperature):
        scores = saliency.grasp(loss_fn, params, temperature)
        return jax.tree.leaves(masks.from_scores(scores, 0.5))

    reference = kept(entropy, 1.0)
    scaled = kept(lambda p, temperature: 1000 * entropy(p, temperature), 1.0)
    for a, b in zip(reference, scaled, strict=True):
        np.testing.assert_array_equal(a, b)
    tempered = kept(entropy, 200.0)
    assert any(np.any(a != b) for a, b in zip(reference, tempered, strict=True))


def test_grasp_leaves_other_leaves_alone():
    # A leaf of integers cannot be differentiated, and does not have to be. Over the weights at
    # 2 and 0 the loss is their sum of squares times the batch, with H = diag(2 batch).
    def loss_fn(params, batch):
        return jnp.sum(params["w"][params["index"]] ** 2 * batch)

    params = {"w": jnp.array([[1.0], [2.0], [-3.0]]), "index": jnp.array([2, 0])}
    scores = saliency.grasp(loss_fn, params, jnp.array([[10.0], [100.0]]))
    assert scores["index"] is None
    np.testing.assert_array_equal(scores["w"], [[40_000.0], [0.0], [9 * 400.0]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_grasp_is_float32_and_runs_under_jit(dtype):
    params, batch = jax.tree.map(lambda leaf: leaf.astype(dtype), (init(jax.random.key(0)), data()))
    scores = saliency.grasp(loss, params, batch)
    jitted = jax.jit(lambda p, b: saliency.grasp(loss, p, b))(params, batch)
    assert jax.tree.structure(jitted) == jax.tree.structure(scores)
    for name in params:
        assert scores[name]["kernel"].dtype == jitted[name]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("score", [saliency.snip, saliency.grasp])
def test_small_products_of_half_precision_are_not_zero(score):
    """Weights of 1e-3 and gradients of 1e-5, whose product is below float16."""
    params = {"w": jnp.array([[1e-3, 2e-3, 3e-3]], jnp.float16)}
    slope = jnp.array([[1e-5, 2e-5, 3e-5]], jnp.float16)

    def loss_fn(p, batch):
        # The Hessian of the square is 1: both scores are of the size of weight * gradient.
        return jnp.sum(batch * p["w"] + (p["w"] - jax.lax.stop_gradient(p["w"])) ** 2 / 2)

    scores = score(loss_fn, params, slope)["w"]
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, [[1e-8, 4e-8, 9e-8]], rtol=0.01)


def test_grasp_asks_the_predicate():
    params, batch = init(jax.random.key(0)), data()
    scores = saliency.grasp(loss, params, batch, prunable=lambda path, leaf: "bias" in path)
    assert jax.tree.map(jnp.shape, scores) == {
        "hidden": {"kernel": None, "bias": (4,)},
        "out": {"kernel": None, "bias": (2,)},
    }
    with pytest.raises(ValueError, match="no leaf is prunable among"):
        saliency.grasp(loss, params, batch, prunable=lambda path, leaf: False)


# The global batch on eight devices


def device_mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def scores_of(kind, params, batch, axis_name=None):
    if kind == "snip":
        return saliency.snip(loss, params, batch, axis_name=axis_name)
    if kind == "grasp":
        return saliency.grasp(loss, params, batch, axis_name=axis_name)
    return saliency.logit_snip(network, params, batch[0], axis_name=axis_name)


each = pytest.mark.parametrize("kind", ["snip", "logit_snip", "grasp"])


@pytest.mark.variants(3)
@each
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_scores_the_global_batch(kind, check_vma):
    params, batch = init(jax.random.key(0)), data()
    spread = jax.shard_map(
        lambda params, batch: scores_of(kind, params, batch, "data"),
        mesh=device_mesh(data=8),
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    assert_close(jax.jit(spread)(params, batch), scores_of(kind, params, batch), rtol=1e-11)


@pytest.mark.variants(3)
@each
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("transform", [jax.pmap, jax.vmap])
def test_pmap_and_vmap_score_the_global_batch(kind, transform):
    params, batch = init(jax.random.key(0)), data()
    shards = jax.tree.map(lambda leaf: leaf.reshape(8, 2, *leaf.shape[1:]), batch)
    spread = transform(
        lambda params, batch: scores_of(kind, params, batch, "data"),
        axis_name="data",
        in_axes=(None, 0),
    )(params, shards)
    expected = scores_of(kind, params, batch)
    for device in range(8):
        assert_close(jax.tree.map(lambda leaf, d=device: leaf[d], spread), expected, rtol=1e-11)


@each
@pytest.mark.usefixtures("x64")
def test_members_and_data_on_one_mesh(kind):
    members, batch = jax.vmap(init)(jax.random.split(jax.random.key(0), 2)), data()

    def body(members, batch):
        return jax.vmap(lambda params: scores_of(kind, params, batch, "data"))(members)

    spread = jax.shard_map(
        body,
        mesh=device_mesh(member=2, data=4),
        in_specs=(PartitionSpec("member"), PartitionSpec("data")),
        out_specs=PartitionSpec("member"),
    )
    expected = jax.vmap(lambda params: scores_of(kind, params, batch))(members)
    assert_close(jax.jit(spread)(members, batch), expected, rtol=1e-11)
