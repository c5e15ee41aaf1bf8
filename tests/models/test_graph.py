"""Graph autoencoders against NumPy in float64, on graphs that are larger, and cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.gates.dam import Dam
from ntt_sparse.models import graph
from ntt_sparse.models.graph import GCN, GraphAutoencoder, SparseMatrix
from ntt_sparse.training.export import load_network, save_network

N, D = 7, 5
EDGES = np.array([[0, 1], [0, 2], [1, 2], [2, 3], [4, 5]], np.int32)
PAIRS = np.array([[0, 1], [3, 4], [6, 6], [5, 2]], np.int32)
X = np.random.RandomState(0).uniform(size=(N, D)).astype(np.float32)
X[X < 0.4] = 0


def sparse(matrix):
    rows, columns = np.nonzero(matrix)
    return SparseMatrix(*map(jnp.asarray, (rows, columns, matrix[rows, columns])), matrix.shape)


def dense_adjacency(edges, num_nodes):
    """D^-1/2 (A + I) D^-1/2 in float64."""
    a = np.eye(num_nodes)
    for i, j in edges:
        a[i, j] = a[j, i] = 1
    scale = np.diag(a.sum(1) ** -0.5)
    return scale @ a @ scale


def dense(matrix):
    result = np.zeros(matrix.shape)
    np.add.at(result, (np.asarray(matrix.rows), np.asarray(matrix.columns)), matrix.values)
    return result


def randomised(params, seed=1):
    """The params with biases, and gates some of which are closed."""
    random = np.random.RandomState(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            random.normal(size=leaf.shape) if leaf.ndim else -2.1, jnp.float32
        ),
        params,
    )


def layer(params, x, a):
    kernel, bias = (np.asarray(params[name], float) for name in ("kernel", "bias"))
    return a @ (x @ kernel) + bias


def codes_by_hand(params, x, edges, size):
    a = dense_adjacency(edges, len(x))
    hidden = np.maximum(layer(params["encoder"]["layers_0"], np.asarray(x, float), a), 0)
    codes = layer(params["encoder"]["layers_1"], hidden, a)
    if "gate" not in params:
        return codes
    mu = 5 * np.arange(1, size + 1) / size
    return codes * np.maximum(np.tanh(mu + float(params["gate"]["beta"])), 0)


MODULE = GraphAutoencoder((6, 4), kind=Dam())


@functools.cache
def trained():
    arguments = X, graph.adjacency(EDGES, N), PAIRS
    return randomised(start(MODULE, jax.random.key(0), "__call__", *arguments))


@functools.partial(jax.jit, static_argnums=0)
def encode(module, params, x, edges):
    adjacency = graph.adjacency(edges, x.shape[0])
    return module.apply({"params": params}, x, adjacency, method="encode")


@functools.partial(jax.jit, static_argnums=(0, 2))
def start(module, key, method, *arguments):
    return module.init({"params": key, graph.NOISE: key}, *arguments, method=method)["params"]


def test_messages_have_the_weights_of_the_paper():
    found = graph.adjacency(EDGES[::-1, ::-1], N)
    np.testing.assert_allclose(dense(found), dense_adjacency(EDGES, N), rtol=1e-6)
    rows = np.asarray(found.rows)
    assert np.all(np.diff(rows) >= 0) and len(rows) == 2 * 5 + 7
    # A node without edges keeps what it is.
    assert dense(found)[6].tolist() == [0, 0, 0, 0, 0, 0, 1]
    traced = jax.jit(functools.partial(graph.adjacency, num_nodes=N))(EDGES)
    np.testing.assert_array_equal(dense(traced), dense(found))


def test_products_and_their_derivatives():
    matrix = np.float32([[0, 2, 0], [0, 0, 0], [1, 0, 3], [0, 4, 0]])
    right = np.random.RandomState(2).normal(size=(3, 2)).astype(np.float32)
    weights = np.random.RandomState(3).normal(size=(4, 2)).astype(np.float32)
    left = sparse(matrix)

    @jax.jit
    def both(left, right):
        product, pull = jax.vjp(lambda left, right: left @ right, left, right)
        return product, pull(jnp.asarray(weights))[1]

    product, derivative = both(left, right)
    np.testing.assert_allclose(product, matrix @ right, rtol=1e-6)
    np.testing.assert_allclose(derivative, matrix.T @ weights, rtol=1e-6)
    with pytest.raises(ValueError, match="expected 3 rows"):
        left @ jnp.ones((4, 2))


def test_codes_and_logits_by_hand():
    params = trained()
    expected = codes_by_hand(params, X, EDGES, 4)
    # Order numbers 1.25 to 5 less 2.1: the first dimension is closed.
    assert np.all(expected[:, 0] == 0) and np.all(expected[:4, 1:] != 0)
    for x in (sparse(X), X):
        np.testing.assert_allclose(encode(MODULE, params, x, EDGES), expected, rtol=1e-4)
    logits = jax.jit(MODULE.apply)({"params": params}, X, graph.adjacency(EDGES, N), PAIRS)
    by_hand = [expected[i] @ expected[j] for i, j in PAIRS]
    np.testing.assert_allclose(logits, by_hand, rtol=1e-4, atol=1e-5)


def test_the_order_of_nodes_is_of_no_meaning():
    params, order = trained(), np.random.RandomState(4).permutation(N)
    place = np.argsort(order)
    moved = encode(MODULE, params, X[order], place[EDGES])
    np.testing.assert_allclose(moved, encode(MODULE, params, X, EDGES)[order], rtol=1e-4)


def test_starts_as_documented():
    """Glorot, uniform: within sqrt(6 / (in + out)), of variance 2 / (in + out); biases zero."""
    x, adjacency = np.ones((3, 400), np.float32), graph.adjacency(EDGES[:2], 3)
    params = start(GCN((200,)), jax.random.key(1), "__call__", x, adjacency)["layers_0"]
    kernel = np.asarray(params["kernel"])
    assert kernel.shape == (400, 200) and np.abs(kernel).max() <= 0.1
    np.testing.assert_allclose(kernel.var(), 2 / 600, rtol=0.03)
    assert not np.any(params["bias"])
    assert GraphAutoencoder().widths == (32, 16)


def test_a_saved_network_takes_nodes_it_has_not_seen(tmp_path):
    """Three more nodes with edges to old ones and to each other."""
    params = trained()
    save_network(tmp_path / "a.safetensors", params, jax.tree.map(lambda _: None, params))
    loaded, _ = load_network(tmp_path / "a.safetensors")
    more = np.random.RandomState(5).uniform(size=(3, D)).astype(np.float32)
    x = np.concatenate([X, more])
    edges = np.concatenate([EDGES, [[0, 7], [7, 8], [6, 9]]]).astype(np.int32)
    found = encode(MODULE, loaded, x, edges)
    np.testing.assert_allclose(found, codes_by_hand(params, x, edges, 4), rtol=1e-4)
    # Without an edge to them, the old ones stay as they are.
    apart = encode(MODULE, loaded, x, EDGES)
    np.testing.assert_allclose(apart[:N], encode(MODULE, params, X, EDGES), rtol=1e-5)


def test_a_cut_network_gives_the_same_logits(tmp_path):
    params = trained()
    module, small = graph.cut(MODULE, params)
    assert module == GraphAutoencoder((6, 3)) and set(small) == {"encoder"}
    assert small["encoder"]["layers_1"]["kernel"].shape == (6, 3)
    whole, codes = encode(MODULE, params, X, EDGES), encode(module, small, X, EDGES)
    np.testing.assert_allclose(codes, whole[:, 1:], rtol=1e-5)
    np.testing.assert_allclose(
        graph.decode(codes, PAIRS), graph.decode(whole, PAIRS), rtol=1e-4, atol=1e-5
    )
    # Nothing is closed any more.
    again, same = graph.cut(module, small)
    assert again == module
    np.testing.assert_array_equal(
        same["encoder"]["layers_1"]["kernel"], small["encoder"]["layers_1"]["kernel"]
    )
    # The network that is given is left as it was.
    assert params["encoder"]["layers_1"]["kernel"].shape == (6, 4)
    closed = {**params, "gate": {"beta": jnp.float32(-5.0)}}
    with pytest.raises(ValueError, match="all 4 dimensions are closed"):
        graph.cut(MODULE, closed)


def test_variational_codes():
    """Drawn from the posterior of the same hidden layer, and gated afterwards."""
    module = GraphAutoencoder((6, 4), variational=True, kind=Dam())
    adjacency = graph.adjacency(EDGES, N)
    draw = jax.jit(
        lambda params, key: module.apply(
            {"params": params}, X, adjacency, method="draw", rngs={graph.NOISE: key}
        )
    )
    params = randomised(start(module, jax.random.key(0), "draw", X, adjacency))
    assert set(params) == {"encoder", "log_std", "gate"}
    a = dense_adjacency(EDGES, N)
    hidden = np.maximum(layer(params["encoder"]["layers_0"], X, a), 0)
    _, (mean, log_std) = draw(params, jax.random.key(0))
    np.testing.assert_allclose(mean, layer(params["encoder"]["layers_1"], hidden, a), rtol=1e-4)
    np.testing.assert_allclose(log_std, layer(params["log_std"], hidden, a), rtol=1e-4, atol=1e-5)
    draws = np.stack([draw(params, key)[0] for key in jax.random.split(jax.random.key(1), 400)])
    gates = np.maximum(np.tanh(5 * np.arange(1, 5) / 4 - 2.1), 0)
    std = gates * np.exp(log_std)
    np.testing.assert_array_less(np.abs(draws.mean(0) - gates * mean), 5 * std / 20 + 1e-6)
    np.testing.assert_allclose(draws.std(0), std, rtol=0.2)
    # What is used afterwards is the mean.
    np.testing.assert_allclose(encode(module, params, X, EDGES), gates * mean, rtol=1e-4, atol=1e-5)
    large = {**params, "log_std": jax.tree.map(lambda leaf: 0 * leaf + 100, params["log_std"])}
    assert np.all(draw(large, jax.random.key(0))[1][1] == 10)
    cut, small = graph.cut(module, params)
    assert cut == GraphAutoencoder((6, 3)) and set(small) == {"encoder"}


def test_the_loss_by_hand(x64):
    positive, negative = jnp.array([0.3, -2.0, 5.0]), jnp.array([1.5, -0.7])
    linked, other = (1 / (1 + np.exp(-np.asarray(logits))) for logits in (positive, negative))
    expected = -np.mean(np.log(linked)) - np.mean(np.log(1 - other))
    np.testing.assert_allclose(graph.link_loss(positive, negative), expected, rtol=1e-12)


def test_the_loss_of_large_logits():
    """Finite, and with a gradient where the reference, in rounded probabilities, has none."""
    value, gradients = jax.value_and_grad(graph.link_loss, (0, 1))(
        jnp.float32([100, -100]), jnp.float32([100, -100])
    )
    np.testing.assert_allclose(value, 50 + 50)
    np.testing.assert_allclose(gradients[0], [0, -0.5], atol=1e-7)
    np.testing.assert_allclose(gradients[1], [0.5, 0], atol=1e-7)


def test_the_divergence_by_hand(x64):
    random = np.random.RandomState(0)
    mean, log_std = random.normal(size=(2, 5, 3))
    variance = np.exp(log_std) ** 2
    expected = np.mean(np.sum((variance + mean**2 - 1 - np.log(variance)) / 2, axis=1))
    np.testing.assert_allclose(graph.divergence(mean, log_std), expected, rtol=1e-12)
    assert graph.divergence(jnp.zeros((5, 3)), jnp.zeros((5, 3))) == 0


def test_float64(x64):
    module = GraphAutoencoder((6, 4))
    x = X.astype(float)
    adjacency = graph.adjacency(EDGES, N)
    params = start(module, jax.random.key(0), "encode", x, adjacency)
    params = jax.tree.map(lambda leaf: leaf.astype(float), params)
    found = encode(module, params, sparse(x), EDGES)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, codes_by_hand(params, x, EDGES, 4), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: graph.adjacency(np.array([[0, 3]]), 3), "expected 0 to 2"),
        (lambda: graph.adjacency(np.array([[-1, 2]]), 3), "expected 0 to 2"),
        (lambda: graph.adjacency(np.array([[1, 1]]), 3), "a loop or a pair of nodes twice"),
        (lambda: graph.adjacency(np.array([[0, 1], [1, 0]]), 3), "a pair of nodes twice"),
        (lambda: graph.decode(X, np.array([[0, N]])), f"pairs have the nodes 0 to {N}, expected"),
        (lambda: graph.decode(X, np.array([[-1, 0]])), "pairs have the nodes -1 to 0, expected"),
        (lambda: GCN(()), "widths are"),
        (lambda: GCN((3, 0)), "widths are"),
        (
            lambda: MODULE.apply(
                {"params": trained()}, X, graph.adjacency(EDGES, N), method="posterior"
            ),
            "of a variational autoencoder alone",
        ),
        (
            lambda: (
                encode(GraphAutoencoder((6, 4)), trained(), X, EDGES[:0]).shape
                and graph.adjacency(EDGES, N) @ jnp.ones((N + 1, 2))
            ),
            "expected 7 rows",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
