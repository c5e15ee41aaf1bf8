"""DAM: gates, counts, penalty, against the formulas and the golden values."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntt_sparse.gates import dam, order
from ntt_sparse.gates.l1 import L1


def gates_by_hand(beta, n, alpha=1.0, k=5.0, first=1):
    return np.array([max(math.tanh(alpha * (k * (j + first) / n + beta)), 0.0) for j in range(n)])


@pytest.mark.parametrize("convention, first", [("paper", 1), ("code", 0)])
@pytest.mark.parametrize("beta", [1.0, 0.0, -2.0, -2.5, -4.9, -7.0])
def test_gates_are_those_of_the_formula(beta, convention, first):
    values = dam.gate(beta, 16, alpha=1.5, k=4.0, convention=convention)
    expected = gates_by_hand(beta, 16, 1.5, 4.0, first)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert (np.asarray(values) == 0).tolist() == (expected <= 1e-12).tolist()


def test_alternate_shapes():
    z = np.array([5 * j / 4 - 3.0 for j in range(1, 5)])
    np.testing.assert_allclose(dam.gate(-3.0, 4, shape="linear"), np.maximum(z, 0), rtol=1e-6)
    clipped = dam.gate(-3.0, 4, shape="piecewise_linear")
    np.testing.assert_allclose(clipped, np.clip(z, 0, 1), rtol=1e-6)
    own = dam.gate(-3.0, 4, shape=lambda z: jax.nn.relu(z) ** 2)
    np.testing.assert_allclose(own, np.maximum(z, 0) ** 2, rtol=1e-5)


# Derived by hand from Eq. 2 and from the published code.
@pytest.mark.parametrize(
    "n, beta, code, paper",
    [(4, -2, 2, 3), (16, -2, 9, 10), (16, -2.5, 7, 8), (16, 0, 15, 16), (64, -2.454, 32, 33)],
)
def test_active_counts(n, beta, code, paper):
    assert int(dam.active(beta, n)) == paper == math.ceil(n * (1 + beta / 5))
    assert int(dam.active(beta, n, convention="code")) == code
    assert np.count_nonzero(dam.gate(beta, n)) == paper


@pytest.mark.parametrize("n", [50, 120, 300])
@pytest.mark.parametrize("ordered", [False, True])
def test_an_offset_of_minus_an_order_number_closes_it_in_compiled_programs(n, ordered):
    """Where the formula may be rounded otherwise than outside of them."""
    ranks = order.random(jax.random.key(n), n) if ordered else jnp.arange(n)
    betas = -dam.order_numbers(n)

    @jax.jit
    def counts(betas, ranks):
        def one(beta):
            return jnp.sum(dam.gate(beta, n, ranks=ranks) > 0), dam.active(beta, n)

        return jax.lax.map(one, betas)

    gates, active = counts(betas, ranks)
    assert gates.tolist() == active.tolist() == list(range(n - 1, -1, -1))


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([2, 7, 16, 64, 300]), st.floats(-8, 8), st.sampled_from([1.0, 0.1, 3.0]))
def test_active_is_what_the_gates_leave_open(n, beta, alpha):
    values = np.asarray(dam.gate(beta, n, alpha=alpha))
    count = int(dam.active(beta, n))
    assert np.count_nonzero(values) == count
    # Exact arithmetic, but for rounding at a jump.
    exact = min(n, max(0, n * (1 + beta / 5)))
    assert math.ceil(exact - 1e-3) <= count <= math.ceil(exact + 1e-3)
    # In the order of the index, but for the rounding of tanh close to 1.
    assert np.all(np.diff(values) >= -1e-6)


def test_a_layer_closes_at_its_last_order_number():
    assert int(dam.active(-5.0, 8)) == 0 and int(dam.active(-4.999, 8)) == 1
    code = -5 * 7 / 8
    assert int(dam.active(code, 8, convention="code")) == 0
    assert int(dam.active(code + 1e-3, 8, convention="code")) == 1


def test_half_precision_offsets_keep_wide_layers_apart():
    """In bfloat16 the order numbers of 512 channels would coincide."""
    beta = jnp.asarray(-2.5, jnp.bfloat16)
    values = dam.gate(beta, 512)
    assert values.dtype == jnp.float32
    assert np.count_nonzero(values) == len(np.unique(values)) - 1 == 256


def test_derivatives():
    """By finite differences; zero for what is closed, also exactly at the edge."""
    with jax.enable_x64():
        beta = jnp.asarray(-2.3)
        derivative = jax.jacobian(lambda b: dam.gate(b, 16, alpha=1.3))(beta)
        step = 1e-6
        numeric = (gates_by_hand(-2.3 + step, 16, 1.3) - gates_by_hand(-2.3 - step, 16, 1.3)) / (
            2 * step
        )
        np.testing.assert_allclose(derivative, numeric, rtol=1e-8, atol=1e-9)
        values = gates_by_hand(-2.3, 16, 1.3)
        np.testing.assert_allclose(derivative, 1.3 * (1 - values**2) * (values > 0), rtol=1e-9)
    edge = jax.jacobian(lambda b: dam.gate(b, 4))(-2.5)
    assert edge[:2].tolist() == [0.0, 0.0] and edge[2] > 0


def test_ranks_permute_the_gates():
    ranks = jnp.array([2, 0, 3, 1])
    values = dam.gate(-2.0, 4, ranks=ranks)
    np.testing.assert_array_equal(values, dam.gate(-2.0, 4)[ranks])
    # Under transformations they are taken as they are.
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(lambda r: dam.gate(-2.0, 4, ranks=r)))(ranks[None])[0], values
    )


def test_the_penalty_and_its_derivative():
    """lambda / L down to a floor and nothing below it, as the derivative of PyTorch's clamp."""
    betas = {"a": {"beta": 1.0}, "b": {"beta": -4.9}, "c": {"beta": -7.0}, "d": {"beta": -5.0}}
    for convention, floor, below in (("code", -5.0, -5.01), ("paper", -5.1, -5.11)):
        of = functools.partial(dam.penalty, convention=convention)
        value, grads = jax.value_and_grad(of)(betas)
        np.testing.assert_allclose(value, (1.0 - 4.9 + floor - 5.0) / 4, rtol=1e-6)
        assert [grads[name]["beta"].item() for name in "abcd"] == [0.25, 0.25, 0.0, 0.25]
        above = below + 0.02
        assert jax.grad(lambda b, of=of: of([b]))(above) == 1
        assert jax.grad(lambda b, of=of: of([b]))(below) == 0
        kind = dam.Dam(convention=convention)
        np.testing.assert_array_equal(
            kind.penalty([{"beta": jnp.float32(-9.0)}]), np.float32(floor)
        )
    assert np.isnan(dam.penalty([jnp.nan, 1.0]))


@pytest.mark.parametrize("convention", ["paper", "code"])
def test_a_layer_that_the_penalty_closed_stays_closed(convention):
    """Decay lifts its offset to where the penalty begins again, and no channel opens there."""
    n, layers, rate, momentum, decay = 64, 163, 0.05, 0.9, 1e-3
    others = [jnp.zeros(())] * (layers - 1)
    objective = jax.grad(lambda b: dam.penalty([b, *others], convention=convention))

    def step(state, _):
        beta, velocity = state
        velocity = momentum * velocity + objective(beta) + decay * beta
        beta = beta - rate * velocity
        return (beta, velocity), dam.active(beta, n, convention=convention)

    _, active = jax.lax.scan(step, (jnp.float32(-4.9), jnp.float32(0.0)), length=20_000)
    (closed,) = np.nonzero(active == 0)
    assert active[0] > 0 and len(closed) and not np.any(active[closed[0] :])


def test_weight_decay_and_penalty_balance():
    """Without a task, SGD ends at -lambda / (L decay), which is inside the range."""
    coefficient, layers, decay, rate = 0.4, 163, 1e-3, 0.05
    beta = jnp.ones(layers)
    objective = jax.grad(lambda b: coefficient * dam.penalty(list(b)))

    def step(_, b):
        return b - rate * (objective(b) + decay * b)

    beta = jax.jit(lambda b: jax.lax.fori_loop(0, 200_000, step, b))(beta)
    # Golden: -2.45.
    np.testing.assert_allclose(beta, -coefficient / (layers * decay), rtol=1e-2)


@pytest.mark.parametrize("kind", [dam.Dam(), dam.Dam(initial=0.5, convention="code"), L1(0.7)])
def test_kinds_have_one_interface(kind):
    params = kind.init(6)
    values = kind.values(params, 6)
    assert values.shape == (6,) and np.all(np.asarray(values) >= 0)
    assert kind.penalty([params, params]).shape == ()
    np.testing.assert_allclose(kind.penalty([params, params]), kind.penalty([params]), rtol=1e-6)


def test_l1_gates():
    scale = jnp.array([0.5, -0.3, 0.0, 2.0])
    np.testing.assert_array_equal(L1().values({"scale": scale}, 4), jnp.array([0.5, 0, 0, 2.0]))
    value, grad = jax.value_and_grad(lambda s: L1().penalty([{"scale": s}]))(scale)
    np.testing.assert_allclose(value, 2.5 / 4)
    assert grad.tolist() == [0.25, 0.0, 0.0, 0.25]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dam.gate(0.0, 1), "on 1 channel"),
        (lambda: dam.gate(0.0, 4, alpha=0.0), "alpha is 0.0"),
        (lambda: dam.gate(0.0, 4, k=float("nan")), "k is nan"),
        (lambda: dam.gate(jnp.zeros(2), 4), r"beta has shape \(2,\)"),
        (lambda: dam.gate(0.0, 4, convention="papers"), "convention='papers'"),
        (lambda: dam.gate(0.0, 4, shape="sigmoid"), "a sigmoid is never exactly zero"),
        (lambda: dam.gate(0.0, 4, shape="relu"), "expected one of relu_tanh, linear"),
        (lambda: dam.gate(0.0, 4, shape=jax.nn.sigmoid), "expected exactly 0 there"),
        (lambda: dam.gate(0.0, 4, shape=jax.nn.leaky_relu), "expected exactly 0 there"),
        (lambda: dam.gate(0.0, 4, shape=lambda z: jnp.zeros_like(z)), "expected positive"),
        (lambda: dam.gate(0.0, 4, ranks=jnp.array([0, 1, 2])), r"ranks have shape \(3,\)"),
        (lambda: dam.gate(0.0, 4, ranks=jnp.array([0, 1, 2, 2])), "a permutation of 0..3"),
        (lambda: jax.jit(lambda b: dam.gate(b, 2, ranks=np.array([0, 0])))(0.0), "a permutation"),
        (lambda: dam.penalty({}), "no offsets"),
        (lambda: dam.penalty([jnp.zeros(3)]), "expected scalars"),
        (lambda: dam.penalty([0.0], k=-5.0), "k is -5"),
        (lambda: dam.penalty([0.0], convention="other"), "expected 'paper' or 'code'"),
        (lambda: dam.Dam(initial=-5.0).init(8), "closes all 8 channels from the start"),
        (lambda: dam.Dam(initial=-4.5, convention="code").init(8), "expected more than -4.375"),
        (lambda: dam.Dam(initial=float("nan")), "initial is nan"),
        (lambda: dam.Dam(shape="sigmoid"), "never exactly zero"),
        (lambda: L1(initial=0.0), "stays closed"),
        (lambda: L1().penalty([]), "no gates"),
        (lambda: L1().values({"scale": jnp.ones(3)}, 6), r"shape \(3,\), expected \(6,\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
