"""ChipNet against the values of its formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse import models
from ntt_sparse.gates import channels, chipnet, layer
from ntt_sparse.gates.chipnet import ChipNet
from ntt_sparse.models.preresnet import PreResNet
from ntt_sparse.models.vgg import Vgg
from ntt_sparse.pruning.compact import compact


@pytest.mark.parametrize(
    ("zeta", "soft", "gate"),
    [(0, 0.5, 0.6998), (1, 0.7311, 0.8672), (-5, 0.0067, 0.0142), (5, 0.9933, 0.9973)],
)
def test_golden_values(zeta, soft, gate):
    got = chipnet.logistic(float(zeta), 1.0)
    np.testing.assert_allclose(got, soft, atol=5e-5)
    np.testing.assert_allclose(chipnet.heaviside(got, 2.0), gate, atol=5e-5)
    values = ChipNet().values({"zeta": jnp.full(3, float(zeta))}, 3)
    np.testing.assert_allclose(values, gate, atol=5e-5)


def test_the_schedule():
    """1.4 after 20 epochs; 256 after 14; as adding and doubling epoch by epoch."""
    beta, gamma = 1.0, 2.0
    for epoch in range(60):
        got = chipnet.continuation(epoch)
        np.testing.assert_allclose(got, (beta, gamma), rtol=1e-6)
        beta, gamma = min(6.0, beta + 0.1 / 5), min(256.0, gamma * 2 ** (1 / 2))
    np.testing.assert_allclose(chipnet.continuation(20)[0], 1.4, rtol=1e-6)
    assert chipnet.continuation(13)[1] < 256 == chipnet.continuation(14)[1]
    assert chipnet.continuation(1000) == (6.0, 256.0)
    assert [float(chipnet.budget_steepness(e)) for e in (0, 1, 2.5, 99)] == [10, 15, 22.5, 60]


def test_crisp_gates_cost_nothing():
    kind = ChipNet()
    assert kind.penalty([{"zeta": jnp.array([-200.0, 200.0])}]) < 1e-12
    soft = [{"zeta": jnp.array([0.3, -1.0])}, {"zeta": jnp.array([0.0])}]
    s = 1 / (1 + np.exp(-1.2 * np.array([0.3, -1.0, 0.0])))
    z = 1 - np.exp(-3.0 * s) + s * np.exp(-3.0)
    np.testing.assert_allclose(
        kind.penalty(soft, beta=1.2, gamma=3.0), np.mean((z - s) ** 2), rtol=1e-5
    )


@pytest.mark.parametrize("cost", ["channels", "volume", "parameters", "multiply_adds"])
def test_the_budget_loss_and_its_derivative(cost):
    network = Vgg(3, ((3, 4), (5,)), ChipNet()).network((8, 8, 3))
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        gates = {
            path: jnp.asarray(rng.uniform(0, 1, n)) for path, n in channels.sizes(network).items()
        }
        loss = functools.partial(
            chipnet.budget_loss,
            cost=lambda soft: channels.soft_fractions(network, soft)[cost],
            target=0.2,
            steepness=10.0,
        )
        grads = jax.grad(loss)(gates)
        for path, value in gates.items():
            step = np.zeros(len(value))
            step[1] = 1e-6
            up, down = (loss({**gates, path: value + sign * step}) for sign in (1, -1))
            np.testing.assert_allclose(grads[path][1], (up - down) / 2e-6, rtol=1e-5)
        if cost == "channels":
            pooled = np.concatenate(list(gates.values()))
            fraction = np.mean(1 / (1 + np.exp(-10 * (pooled - 0.5))))
            np.testing.assert_allclose(loss(gates), (fraction - 0.2) ** 2, rtol=1e-6)
            np.testing.assert_allclose(chipnet.channel_fraction(gates), pooled.mean(), rtol=1e-6)


def test_no_more_than_the_budget_asks_for_stays():
    """As lowering a threshold by 1e-4 from 0.9 until the budget is there."""
    rng = np.random.default_rng(0)
    gates = {"a": rng.uniform(0, 1, 7).astype(np.float32), "b": rng.uniform(0, 1, 12) ** 2}
    gates["b"] = gates["b"].astype(np.float32)
    pooled = np.concatenate(list(gates.values()))
    for target in (0.05, 0.2, 0.5, 0.6, 1.0):
        threshold = 0.9
        while np.mean(pooled > threshold) < target:
            threshold -= 1e-4
        kept = chipnet.cut(gates, target)
        for path, value in gates.items():
            np.testing.assert_array_equal(kept[path], value > threshold)
        again = jax.jit(chipnet.cut)(gates, jnp.float32(target))
        jax.tree.map(np.testing.assert_array_equal, again, kept)


@pytest.mark.parametrize("cost", ["parameters", "multiply_adds", "volume"])
def test_budgets_of_other_kinds(cost):
    network = Vgg(3, ((3, 4), (5,)), ChipNet()).network((8, 8, 3))
    rng = np.random.default_rng(1)
    gates = {
        path: jnp.asarray(rng.uniform(0, 0.9, n)) for path, n in channels.sizes(network).items()
    }

    def left(open_):
        crisp = {path: jnp.asarray(mask, float) for path, mask in open_.items()}
        return channels.soft_fractions(network, crisp)[cost]

    kept = chipnet.cut(gates, 0.4, left)
    assert left(kept) >= 0.4
    path, index = min(
        ((path, i) for path, mask in kept.items() for i in range(len(mask)) if mask[i]),
        key=lambda place: float(gates[place[0]][place[1]]),
    )
    fewer = {**kept, path: kept[path].at[index].set(False)}
    assert left(fewer) < 0.4


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Vgg(3, ((6, 5), (8,)), ChipNet()), (8, 8, 3)),
        (PreResNet(3, 1, (4, 6), ChipNet()), (8, 8, 3)),
        (models.create("lenet5", kind=ChipNet()), (28, 28, 1)),
    ],
)
def test_in_networks(module, shape):
    """Gates follow normalisation; what is cut is closed, the rest one, and can be taken out."""
    x = jax.random.normal(jax.random.key(0), (6, *shape))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    network = module.network(shape)
    soft = layer.values(module.kind, variables, network)
    np.testing.assert_allclose(next(iter(soft.values())), 0.7015, atol=1e-3)
    steep = layer.state(network, beta=jnp.float32(3.0), gamma=jnp.float32(40.0))
    moved = layer.values(module.kind, {**variables, **steep}, network)
    s = 1 / (1 + np.exp(-3 * 0.005))
    expected = 1 - np.exp(-40 * s) + s * np.exp(-40.0)
    np.testing.assert_allclose(next(iter(moved.values())), expected, rtol=1e-4)
    rng = np.random.default_rng(0)
    kept = {}
    for path, n in channels.sizes(network).items():
        kept[path] = jax.device_put(np.append(True, rng.random(n - 1) < 0.5))
    cut = {**variables, **layer.state(network, open=kept)}
    values = layer.values(module.kind, cut, network)
    for path, mask in kept.items():
        np.testing.assert_array_equal(values[path], mask.astype(float))
    assert (
        np.max(np.abs(jax.jit(module.apply)(cut, x) - jax.jit(module.apply)(variables, x))) > 1e-3
    )
    small = compact(module, cut, shape)
    np.testing.assert_allclose(
        jax.jit(small.module.apply)(small.variables, x), jax.jit(module.apply)(cut, x), atol=1e-5
    )
    assert small.after == channels.count(network, jax.tree.map(np.asarray, kept))


def test_bad_input():
    with pytest.raises(ValueError, match="expected numbers of epochs above 0"):
        chipnet.continuation(0, gamma_every=0.0)
    with pytest.raises(ValueError, match=r"open has shape \(5,\), expected \(3,\)"):
        ChipNet().values({"zeta": jnp.zeros(3)}, 3, open=jnp.ones(5, bool))
    with pytest.raises(ValueError, match="initial is nan"):
        ChipNet(float("nan"))
    with pytest.raises(ValueError, match="there are no gates"):
        ChipNet().penalty([])
    for target in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected a fraction above 0, at most 1"):
            chipnet.cut({"a": jnp.ones(3)}, target)
        with pytest.raises(ValueError, match="expected a fraction above 0, at most 1"):
            chipnet.budget_loss({"a": jnp.ones(3)}, chipnet.channel_fraction, target, 10.0)
    with pytest.raises(ValueError, match="there are no gates"):
        chipnet.channel_fraction({})
    with pytest.raises(ValueError, match="there are no channels"):
        chipnet.cut({}, 0.5)
    with pytest.raises(ValueError, match=r"zeta has shape \(2,\), expected \(3,\)"):
        ChipNet().values({"zeta": jnp.ones(2)}, 3)
