"""The structured kernel: which rule each weight gets, and that no rule gives a wrong number."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ntt_sparse.ntk import empirical_ntk, structured

LEAVES = {
    "first": (6, 5),
    "second": (5, 4),
    "third": (4, 3),
    "wide": (3, 5),
    "row": (1, 4),
    "column": (4, 1),
}


def matrices(seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in LEAVES.items()}


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
    (transposed, ["first"], [], ["wide"]),
    (two_weights_in_one_product, ["first", "row", "column"], [], []),
    (grouped, ["first", "second", "third"], [], []),
    (used_twice, ["first", "third"], [], ["second"]),
    (also_the_square, ["first", "second"], [], ["third"]),
    (positions, ["third"], ["second"], ["first"]),
    (product_of_weights, [], ["first", "second", "third"], []),
    (some_unused, ["first"], [], []),
    (inside_control_flow, ["second", "third"], [], ["first"]),
    (gram_of_weights, ["first"], [], ["second"]),
    (batch_product, ["third"], [], ["first", "second"]),
    (scanned, ["second", "third"], [], ["first"]),
    (constant_output, [], [], []),
]


def masks_like(weights, density=0.5, seed=1):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.random(w.shape) < density) for name, w in weights.items()}


def as_flat(network, names):
    return lambda leaves, x: network(dict(zip(names, leaves, strict=True)), x)


def assert_equals_jacobian_method(network, weights, x1, x2):
    """Value and gradient, half of the weights masked."""
    masks = masks_like(weights)

    def value_and_grad(method):
        def objective(w):
            value = empirical_ntk(network, w, x1, x2, masks=masks, method=method)
            return jnp.sum(jnp.sin(value)), value

        return jax.jit(jax.value_and_grad(objective, has_aux=True))(weights)

    (_, value), grad = value_and_grad("structured")
    (_, expected), expected_grad = value_and_grad("jacobian")
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    for name, leaf in expected_grad.items():
        bound = 1e-11 * np.abs(leaf).max()
        np.testing.assert_allclose(grad[name], leaf, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("jacobians_fit", [True, False])
@pytest.mark.parametrize(
    ("network", "dense", "shared", "other"),
    NETWORKS,
    ids=[network.__name__ for network, *_ in NETWORKS],
)
def test_equals_the_jacobian_method(x64, monkeypatch, network, dense, shared, other, jacobians_fit):
    """Weights without a rule go through their own Jacobian, or NTK-vector products."""
    if not jacobians_fit:
        monkeypatch.setattr(structured, "_JACOBIAN_LIMIT", 0)
        shared, other = [], [name for name in LEAVES if name in shared + other]
    weights = matrices()
    rng = np.random.default_rng(2)
    x1, x2 = (jnp.asarray(rng.normal(size=(n, 6))) for n in (4, 3))
    layout = structured.plan(as_flat(network, LEAVES), [*weights.values()], x1, x2)
    groups = layout.dense, layout.shared, layout.direct if jacobians_fit else layout.rest
    named = [[list(LEAVES)[leaf] for leaf in group] for group in groups]
    assert named == [dense, shared, other]
    assert not (layout.rest if jacobians_fit else layout.direct)
    assert_equals_jacobian_method(network, weights, x1, x2)


CONVOLUTIONS = {
    "same": {"padding": "SAME"},
    "valid": {"padding": "VALID"},
    "strides": {"padding": "SAME", "window_strides": (2, 3)},
    "dilated_window": {"padding": "VALID", "rhs_dilation": (2, 1)},
    "dilated_input": {"padding": ((1, 2), (0, 1)), "lhs_dilation": (2, 3)},
    "cropped": {"padding": ((-1, 0), (2, -2))},
    "channels_first": {"padding": "SAME", "dimension_numbers": ("NCHW", "HWIO", "NHWC")},
    "odd_layout": {"padding": "VALID", "dimension_numbers": ("HNCW", "OHIW", "CWNH")},
    "one_position": {"padding": "VALID", "window_strides": (9, 9)},
    "groups": {"padding": "SAME", "feature_group_count": 2},
    "two_images": {"padding": "VALID", "dimension_numbers": ("CHWN", "HWIO", "NHWC")},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(x64, name):
    options = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    options |= CONVOLUTIONS[name]
    lhs, rhs, _ = options["dimension_numbers"]
    # Images of 6 x 7 with 2 channels (which "two_images" takes for two images).
    sizes = {"N": 1, "H": 6, "W": 7, "C": 2}
    if name == "two_images":
        sizes |= {"N": 2, "C": 1}
    window = {"H": 3, "W": 2, "I": sizes["C"] // options.get("feature_group_count", 1), "O": 4}
    rng = np.random.default_rng(5)
    weights = {"conv": jnp.asarray(rng.normal(size=[window[axis] for axis in rhs]))}
    x1, x2 = (jnp.asarray(rng.normal(size=(n, *(sizes[axis] for axis in lhs)))) for n in (3, 2))

    def network(w, x):
        def one(image):
            result = jnp.tanh(jax.lax.conv_general_dilated(image, w["conv"], **options))
            return result.reshape(-1)[:7:2]

        return one(x[0])[None] if len(x) == 1 else jax.lax.map(one, x)

    layout = structured.plan(as_flat(network, weights), [*weights.values()], x1, x2)
    found = [name for name in ("dense", "shared", "direct", "rest") if getattr(layout, name)]
    expected = {"one_position": "dense", "groups": "direct", "two_images": "direct"}
    assert found == [expected.get(name, "shared")]
    assert_equals_jacobian_method(network, weights, x1, x2)


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

    def spy(name):
        function = getattr(structured, name)
        monkeypatch.setattr(
            structured,
            name,
            lambda *args, **kwargs: taken.append(name) or function(*args, **kwargs),
        )

    spy("evaluate")
    spy("vector_products")

    def kernel_of(network, **options):
        taken.clear()
        empirical_ntk(network, weights, jnp.ones((3, 6)), **options)
        return taken

    assert kernel_of(used_twice) == ["evaluate"]
    assert kernel_of(chain, output="trace") == ["evaluate"]
    monkeypatch.setattr(structured, "_JACOBIAN_LIMIT", 0)
    assert kernel_of(chain) == ["evaluate"]
    # A full kernel that does not fit, and a leaf without a rule.
    assert kernel_of(chain, output="trace") == ["vector_products"]
    assert kernel_of(used_twice) == ["vector_products"]
    assert kernel_of(used_twice, method="structured") == ["evaluate", "vector_products"]
