"""The structured kernel: which rule each weight gets, and that no rule gives a wrong number."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from made_weights import (
    LEAVES,
    as_flat,
    assert_equals_jacobian_method,
    matrices,
)

from ntt_sparse.ntk import empirical_ntk, structured


def chain(w, x):
    return jax.nn.relu(jax.nn.relu(x @ w["first"]) @ w["second"]) @ w["third"]


def columns(w, x):
    """Examples in columns: matrices on the left, summed over either axis."""
    hidden = jnp.tanh(jax.lax.dot_general(w["first"], x, (((0,), (1,)), ((), ()))))
    return jax.lax.dot_general(w["wide"], hidden, (((1,), (0,)), ((), ()))).T


def summed_over_last_axis(w, x):
    return jax.lax.dot_general(jnp.tanh(x @ w["first"]), w["wide"], (((1,), (1,)), ((), ())))


def transposed(w, x):
    return jnp.tanh(x @ w["first"]) @ w["wide"].T


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


def batch_product(w, x):
    """A product with a batch axis, and an elementwise one."""
    hidden = jnp.einsum("ni,io,io->no", x, w["first"], jnp.ones((6, 5)))
    return jnp.einsum("no,oq->noq", jnp.tanh(hidden), w["second"]).sum(1) @ w["third"]


def scanned(w, x):
    def step(h, _):
        return jnp.tanh(h @ w["first"] @ w["first"].T), None

    return jax.lax.scan(step, x, length=2)[0] @ w["first"] @ w["second"] @ w["third"]


def two_weights_in_one_product(w, x):
    """Each is the matrix and the other the vector, so that both tap the same step."""
    return jnp.tanh(x @ w["first"]) * (w["row"] @ w["column"])


def constant_output(w, x):
    return jnp.ones((len(x), 3))


# Network, leaves by rule: one vector per example, several, neither.
NETWORKS = [
    (chain, ["first", "second", "third"], [], []),
    (columns, ["first", "wide"], [], []),
    (summed_over_last_axis, ["first", "wide"], [], []),
    (transposed, ["first", "wide"], [], []),
    (two_weights_in_one_product, ["first", "row", "column"], [], []),
    (grouped, ["first", "second", "third"], [], []),
    (used_twice, ["first", "third"], [], ["second"]),
    (also_the_square, ["first", "second"], [], ["third"]),
    (positions, ["third"], ["second"], ["first"]),
    (product_of_weights, [], ["first", "second", "third"], []),
    (some_unused, ["first"], [], []),
    (inside_control_flow, ["second", "third"], [], ["first"]),
    (gram_of_weights, ["first"], [], ["second"]),
    (batch_product, ["third"], ["first", "second"], []),
    (scanned, ["second", "third"], [], ["first"]),
    (constant_output, [], [], []),
]


def problem():
    """Weights and two batches."""
    rng = np.random.default_rng(2)
    return matrices(), *(jnp.asarray(rng.normal(size=(n, 6))) for n in (4, 3))


@pytest.mark.parametrize(
    ("network", "dense", "shared", "other"),
    [pytest.param(*row, id=row[0].__name__) for row in NETWORKS],
)
def test_rules(x64, network, dense, shared, other):
    """Weights without a rule go through their own Jacobian, or NTK-vector products."""
    weights, x, _ = problem()

    def rules(limit):
        layout = structured.plan(as_flat(network, LEAVES), [*weights.values()], x, limit)
        groups = layout.dense, layout.shared, layout.direct, layout.rest
        return [[list(LEAVES)[leaf] for leaf in group] for group in groups]

    assert rules(structured.MEMORY_LIMIT) == [dense, shared, other, []]
    too_large = [name for name in LEAVES if name in shared + other]
    assert rules(1) == [dense, [], [], too_large]


# Less memory takes leaves that do not have one vector per example by NTK-vector products, and
# pairs one at a time.
LIMITS = {"whole": structured.MEMORY_LIMIT, "little": 1}

# One of each kind: the others have their rules.
USUAL = {
    "whole": (
        summed_over_last_axis, two_weights_in_one_product, grouped, also_the_square,
        product_of_weights, some_unused, gram_of_weights, constant_output,
    ),
    "little": (chain, also_the_square),
}  # fmt: skip


@pytest.mark.parametrize(
    ("network", "memory"),
    [
        pytest.param(row[0], memory, marks=[pytest.mark.slow] * (row[0] not in USUAL[memory]))
        for row in NETWORKS
        for memory in LIMITS
    ],
)
def test_equals_the_jacobian_method(x64, network, memory):
    weights, x1, x2 = problem()
    assert_equals_jacobian_method(network, weights, x1, x2, memory_limits=[LIMITS[memory]])


def biased(w, x):
    """Every way in which something is, or is not, the bias of a dense layer."""
    hidden = jnp.tanh(x @ w["first"] + w["b1"])
    hidden = jnp.tanh(w["b2"].reshape(4) + hidden @ w["second"])
    product = hidden @ w["third"]
    return (product + w["b3"]) * (product + w["b3"][::-1])


def biased_twice(w, x):
    """The second addition is to a sum; the last vector is added along the wrong axis."""
    hidden = jnp.tanh((x @ w["first"] + w["b1"]) + w["b1"] * 2)
    hidden = jnp.tanh(hidden @ w["second"] + w["b2"] + w["b2"])
    return jnp.tanh(hidden @ w["third"] + w["b3"].sum())


@pytest.mark.parametrize(
    ("network", "wrt", "output"),
    [
        (biased, "masked", "full"),
        (biased_twice, "all", "trace"),
        pytest.param(biased, "all", "trace", marks=pytest.mark.slow),
        pytest.param(biased_twice, "masked", "full", marks=pytest.mark.slow),
    ],
)
def test_biases(x64, network, wrt, output):
    """Biases of dense layers are further inputs; the mask covers them as well."""
    found = ["b1", "b2"] if network is biased else []
    rng = np.random.default_rng(6)
    shapes = {name: LEAVES[name] for name in ("first", "second", "third")}
    shapes |= {"b1": (5,), "b2": (4, 1), "b3": (3,)}
    if network is biased_twice:
        shapes["b2"] = (4,)
    weights = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    x1, x2 = (jnp.asarray(rng.normal(size=(n, 6))) for n in (4, 3))
    layout = structured.plan(as_flat(network, shapes), [*weights.values()], x1)
    assert [list(shapes)[leaf] for leaf in layout.biases.values()] == found
    assert_equals_jacobian_method(network, weights, x1, x2, wrt=wrt, output=output)


def test_derivative_rules_are_kept(x64):
    """Half of the maximum's derivative goes to each side of a tie, that of `relu` is zero."""
    weights = {"w": jnp.zeros((2, 3)), "v": jnp.ones((3, 1))}
    x = jnp.ones((1, 2))
    values = [
        jax.jit(
            functools.partial(
                empirical_ntk,
                lambda p, x, activation=activation: activation(x @ p["w"]) @ p["v"],
                method="structured",
            )
        )(weights, x)
        for activation in (jax.nn.relu, lambda z: jnp.maximum(z, 0.0))
    ]
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
    params = jax.tree.map(jnp.float64, jax.jit(net.init)(jax.random.key(0), x))
    masks = jax.tree.map(
        lambda p: jnp.asarray(rng.random(p.shape) < 0.5) if p.ndim > 1 else None, params
    )
    value, expected = (
        jax.jit(lambda p, how=method: empirical_ntk(net.apply, p, x, masks=masks, method=how))(
            params
        )
        for method in ("structured", "jacobian")
    )
    np.testing.assert_allclose(value, expected, rtol=1e-11, atol=1e-12)


def lenet(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


# Compiled once for all densities.
@functools.partial(jax.jit, static_argnames="method")
@functools.partial(jax.vmap, in_axes=(0, 0, None, None, None, None))
def gradient_of_lenet(params, masks, x1, x2, target, method):
    def objective(p):
        value = empirical_ntk(lenet, p, x1, x2, masks=masks, method=method)
        return 1e4 * jnp.mean((value - target) ** 2)

    return jax.grad(objective)(params)


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
    ours, theirs = (
        jax.tree.leaves(gradient_of_lenet(params, masks, x1, x2, target, method))
        for method in ("structured", "jacobian")
    )
    for leaf, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_auto_takes_structure_where_all_leaves_have_a_rule(monkeypatch):
    weights = {name: leaf.astype(jnp.float32) for name, leaf in matrices().items()}
    taken = []

    def spy(name):
        function = getattr(structured, name)
        monkeypatch.setattr(
            structured,
            name,
            lambda *args, **kwargs: taken.append(name) or function(*args, **kwargs),
        )

    spy("over_pairs")
    spy("vector_products")

    def kernel_of(network, **options):
        taken.clear()
        jax.eval_shape(lambda w: empirical_ntk(network, w, jnp.ones((3, 6)), **options), weights)
        return taken

    assert kernel_of(used_twice) == ["over_pairs"]
    assert kernel_of(chain, output="trace") == ["over_pairs"]
    assert kernel_of(chain, memory_limit=1) == ["over_pairs"]
    # A leaf without a rule whose Jacobian does not fit.
    assert kernel_of(used_twice, memory_limit=1) == ["vector_products"]
    assert kernel_of(used_twice, method="structured", memory_limit=1) == [
        "over_pairs",
        "vector_products",
    ]
