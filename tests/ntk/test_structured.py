"""The structured kernel: which rule each weight gets, and that no rule gives a wrong number."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ntt_sparse.ntk import empirical_ntk, kernel, structured

LEAVES = {"first": (6, 5), "second": (5, 4), "third": (4, 3)}


def matrices(seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in LEAVES.items()}


def chain(w, x):
    return jax.nn.relu(jax.nn.relu(x @ w["first"]) @ w["second"]) @ w["third"]


def columns(w, x):
    """Weights on the left and summed over their second axis, through `dot` and `tensordot`."""
    first = jnp.tanh(jnp.dot(w["first"].T, x.T))
    second = jnp.tanh(jax.lax.dot_general(first, w["second"], (((0,), (0,)), ((), ()))))
    return jnp.tensordot(second, w["third"], 1)


def summed_over_last_axis(w, x):
    hidden = jnp.tanh(x @ w["first"])
    transposed = jax.lax.dot_general(hidden, w["second"].T * 1.0, (((1,), (1,)), ((), ())))
    return jax.lax.dot_general(w["third"].T, transposed, (((1,), (1,)), ((), ()))).T


def grouped(w, x):
    """Calls that only group steps, and a step with a rule of its own."""

    @jax.custom_vjp
    def doubled_gradient(x):
        return jnp.sin(x)

    doubled_gradient.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))
    hidden = jax.jit(lambda w, x: doubled_gradient(x @ w))(w["first"], x)
    hidden = jax.checkpoint(lambda w, x: jax.nn.softplus(jax.jit(jnp.dot)(x, w)))(
        w["second"], hidden
    )
    return hidden @ w["third"]


def used_twice(w, x):
    hidden = jnp.tanh(x @ w["first"])
    return jnp.tanh(jnp.tanh(hidden @ w["second"]) @ w["second"].T) @ w["second"] @ w["third"]


def also_the_square(w, x):
    return jnp.tanh(x @ w["first"] @ w["second"]) @ w["third"] + jnp.sum(w["third"] ** 2)


def positions(w, x):
    """Several vectors per example: a token mixer."""
    tokens = jnp.tanh(x.reshape(-1, 2, 3) @ w["first"].reshape(2, 3, 5)[0])
    return jnp.mean(jnp.tanh(tokens @ w["second"]), axis=1) @ w["third"]


def product_of_weights(w, x):
    return x @ (w["first"] @ w["second"] @ w["third"])


def some_unused(w, x):
    return jnp.tanh(x @ w["first"])


def inside_control_flow(w, x):
    hidden = jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ w["first"] @ w["first"].T), x)
    hidden = jax.lax.cond(jnp.sum(w["first"]) > 0, jnp.sin, jnp.cos, hidden @ w["first"])
    return hidden @ w["second"] @ w["third"]


def gram_of_weights(w, x):
    return jnp.tanh(x @ w["first"]) @ (w["second"] @ w["second"].T)


def scanned(w, x):
    def step(h, _):
        return jnp.tanh(h @ w["first"] @ w["first"].T), None

    return jax.lax.scan(step, x, length=2)[0] @ w["first"] @ w["second"] @ w["third"]


def two_weights_in_one_product(w, x):
    """Each is the matrix and the other the vector: both tap the same step."""
    scale = w["third"][:1, :1] + 1.0
    scale = scale * 0 + (w["row"] @ w["column"])
    return jnp.tanh(x @ w["first"]) * scale


def constant_output(w, x):
    return jnp.ones((len(x), 3))


# Network, leaves by rule: one vector per example, several, neither.
NETWORKS = [
    (chain, ["first", "second", "third"], [], []),
    (columns, ["third"], [], ["first", "second"]),
    (left_operands, ["first", "second", "third"], [], []),
    (summed_over_last_axis, ["first"], [], ["second", "third"]),
    (grouped, ["first", "second", "third"], [], []),
    (used_twice, ["first", "third"], [], ["second"]),
    (also_the_square, ["first", "second"], [], ["third"]),
    (positions, ["third"], ["second"], ["first"]),
    (product_of_weights, [], ["first", "second", "third"], []),
    (some_unused, ["first"], [], []),
    (inside_control_flow, ["second", "third"], [], ["first"]),
    (gram_of_weights, ["first"], [], ["second"]),
    (scanned, ["second", "third"], [], ["first"]),
    (constant_output, [], [], []),
]


def masks_like(weights, density=0.5, seed=1):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.random(w.shape) < density) for name, w in weights.items()}


@pytest.mark.parametrize("everything_direct", [True, False])
@pytest.mark.parametrize(
    ("network", "dense"), NETWORKS, ids=lambda value: getattr(value, "__name__", "")
)
def test_equals_the_jacobian_method(x64, monkeypatch, network, dense, everything_direct):
    """Whatever is not a dense layer goes through its own Jacobian, or NTK-vector products."""
    if not everything_direct:
        monkeypatch.setattr(structured, "_JACOBIAN_LIMIT", 0)
    weights = matrices()
    masks = masks_like(weights)
    rng = np.random.default_rng(2)
    x1, x2 = (jnp.asarray(rng.normal(size=(n, 6))) for n in (4, 3))

    layout = structured.plan(
        lambda leaves, x: network(dict(zip(LEAVES, leaves, strict=True)), x),
        [*weights.values()],
        x1,
        x2,
    )
    assert [list(LEAVES)[leaf] for leaf in layout.dense] == dense
    assert not (layout.rest if everything_direct else layout.direct)

    def value_and_grad(method):
        def objective(w):
            value = empirical_ntk(network, w, x1, x2, masks=masks, method=method)
            return jnp.sum(jnp.sin(value)), value

        return jax.jit(jax.value_and_grad(objective, has_aux=True))(weights)

    (_, value), grad = value_and_grad("structured")
    (_, expected), expected_grad = value_and_grad("jacobian")
    scale = np.abs(expected).max()
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12 * scale)
    for name, leaf in expected_grad.items():
        bound = 1e-11 * np.abs(leaf).max()
        np.testing.assert_allclose(grad[name], leaf, rtol=0, atol=bound, err_msg=name)


def test_derivative_rules_are_kept(x64):
    """Half of the maximum's derivative goes to each side of a tie, that of `relu` is zero."""
    weights = {"w": jnp.zeros((2, 3)), "v": jnp.ones((3, 1))}
    x = jnp.ones((1, 2))
    values = [
        empirical_ntk(
            lambda p, x, activation=activation: activation(x @ p["w"]) @ p["v"],
            weights, x, method="structured",
        )
        for activation in (jax.nn.relu, lambda z: jnp.maximum(z, 0.0))
    ]  # fmt: skip
    # Only "w" contributes, the activations being zero: |x|^2 times the sum of slopes squared.
    np.testing.assert_allclose(np.ravel(values), [0.0, 2 * 3 * 0.25], atol=1e-15)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(3, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.remat(nn.Dense)(5)(nn.gelu(x.reshape(len(x), -1)))
        return nn.Dense(2)(nn.LayerNorm()(x))


def test_flax_network(x64):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(3, 6, 6, 1)))
    net = ConvNet()
    params = jax.tree.map(jnp.float64, net.init(jax.random.key(0), x))
    masks = jax.tree.map(
        lambda p: jnp.asarray(rng.random(p.shape) < 0.5) if p.ndim > 1 else None, params
    )
    value, expected = (
        empirical_ntk(net.apply, params, x, masks=masks, method=method)
        for method in ("structured", "jacobian")
    )
    np.testing.assert_allclose(value, expected, rtol=1e-11, atol=1e-12)


def lenet(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


@pytest.mark.parametrize("density", [0.03, 1.0])
def test_members_of_a_sparse_lenet(x64, density):
    """Second derivatives under `vmap` and `jit`, with members of other weights and masks."""
    rng = np.random.default_rng(4)
    sizes = (40, 30, 20, 10)
    members = 2
    params = [
        {
            "kernel": jnp.asarray(rng.normal(size=(members, p, q)) / np.sqrt(p)),
            "bias": jnp.asarray(rng.normal(size=(members, q))),
        }
        for p, q in itertools.pairwise(sizes)
    ]
    masks = [
        {"kernel": jnp.asarray(rng.random(p["kernel"].shape) < density), "bias": None}
        for p in params
    ]
    x1, x2 = (jnp.asarray(rng.normal(size=(n, 40))) for n in (5, 4))
    target = jnp.asarray(rng.normal(size=(5, 4, 10, 10)))

    def grads(method):
        def objective(p, m):
            value = empirical_ntk(lenet, p, x1, x2, masks=m, method=method)
            return 1e4 * jnp.mean((value - target) ** 2)

        return jax.jit(jax.vmap(jax.grad(objective)))(params, masks)

    for leaf, expected in zip(
        *map(jax.tree.leaves, map(grads, ("structured", "jacobian"))), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_auto_takes_structure_where_all_leaves_have_a_rule(monkeypatch):
    weights = {name: leaf.astype(jnp.float32) for name, leaf in matrices().items()}
    taken = []
    for name, method in kernel._METHODS.items():
        monkeypatch.setitem(
            kernel._METHODS,
            name,
            lambda *args, _name=name, _method=method, **options: (
                taken.append(_name) or _method(*args, **options)
            ),
        )
    empirical_ntk(used_twice, weights, jnp.ones((3, 6)))
    monkeypatch.setattr(structured, "_JACOBIAN_LIMIT", 0)
    empirical_ntk(chain, weights, jnp.ones((3, 6)))
    empirical_ntk(used_twice, weights, jnp.ones((3, 6)))
    assert taken == ["structured", "structured", "ntk_vector_products"]
