"""Hard-concrete gates against their formulas and against what is drawn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse import models
from ntt_sparse.gates import channels, hard_concrete, layer
from ntt_sparse.gates.hard_concrete import HardConcrete
from ntt_sparse.pruning.compact import compact


@pytest.mark.parametrize(
    ("log_alpha", "chance", "gate"),
    [
        (-5.0, 0.0323, 0.0),
        (-2.0, 0.4010, 0.0430),
        (0.0, 0.8318, 0.5),
        (2.0, 0.9734, 0.9570),
        (math.log(0.7 / 0.3), 0.9203, 0.74),
    ],
)
def test_golden_values(log_alpha, chance, gate):
    np.testing.assert_allclose(hard_concrete.probability(log_alpha), chance, atol=5e-5)
    np.testing.assert_allclose(hard_concrete.deterministic(log_alpha), gate, atol=5e-5)


def test_where_gates_are_closed_and_open():
    end = math.log(11)
    assert hard_concrete.deterministic(-end - 1e-3) == 0 < hard_concrete.deterministic(-end + 1e-3)
    assert hard_concrete.deterministic(end + 1e-3) == 1 > hard_concrete.deterministic(end - 1e-3)


def test_samples_by_hand():
    u, log_alpha = np.array([0.01, 0.3, 0.5, 0.7, 0.99]), np.array([0.0, -1.0, 0.5, 2.0, 1.0])
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + log_alpha) / (2 / 3)))
    expected = np.clip(1.2 * s - 0.1, 0, 1)
    np.testing.assert_allclose(hard_concrete.sample(log_alpha, u), expected, atol=1e-6)
    assert expected[0] == 0 and expected[-1] == 1


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_the_probability_is_that_of_what_is_drawn(log_alpha):
    """Of 40,000 draws the part above zero is within four standard deviations."""
    noise = hard_concrete.uniform(jax.random.key(0), (40_000,))
    assert 0 < noise.min() < 1e-4 and 1 - 1e-4 < noise.max() < 1
    drawn = np.asarray(hard_concrete.sample(jnp.full(40_000, log_alpha), noise))
    chance = float(hard_concrete.probability(log_alpha))
    deviation = math.sqrt(chance * (1 - chance) / 40_000)
    assert abs((drawn > 0).mean() - chance) < 4 * deviation
    # Both ends have weight, as the paper's Figure 2.
    assert (drawn == 1).any() and (drawn == 0).any()


def test_gradients_are_finite_everywhere():
    log_alpha = jnp.array([-200.0, -5.0, 0.0, 5.0, 200.0])
    noise = jnp.array([1e-6, 0.5, 1 - 1e-6, 0.3, 0.2])
    for function in (
        hard_concrete.deterministic, hard_concrete.probability,
        lambda x: hard_concrete.sample(x, noise),
    ):  # fmt: skip
        gradient = jax.grad(lambda x, function=function: jnp.sum(function(x)))(log_alpha)
        assert np.all(np.isfinite(gradient))
    with jax.enable_x64(True):
        x = jnp.array([-1.0, 0.3, 1.2])
        for function in (hard_concrete.probability, hard_concrete.deterministic):
            slope = (function(x + 1e-6) - function(x - 1e-6)) / 2e-6
            gradient = jax.grad(lambda x, function=function: jnp.sum(function(x)))(x)
            np.testing.assert_allclose(gradient, slope, rtol=1e-7)


def test_parameters_are_held():
    held = hard_concrete.clip(jnp.array([-50.0, 0.3, 50.0]))
    np.testing.assert_allclose(held, [math.log(0.01), 0.3, math.log(100)], rtol=1e-6)


def test_in_networks():
    """Drawn with an RNG, fixed without one; what is closed then can be taken out."""
    shape = (8, 8, 1)
    module = models.create("lenet5", kind=HardConcrete())
    x = jax.random.normal(jax.random.key(0), (4, *shape))
    variables = dict(jax.jit(module.init)(jax.random.key(1), x))
    network = module.network(shape)
    start = layer.values(module.kind, variables, network)
    for value in start.values():
        np.testing.assert_allclose(value, 0.74, atol=5e-5)

    def drawn(seed):
        return module.apply(variables, x, train=True, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert np.max(np.abs(drawn(0) - drawn(1))) > 1e-3
    np.testing.assert_array_equal(module.apply(variables, x), module.apply(variables, x))
    rng = np.random.default_rng(0)
    gates = {
        path: {"log_alpha": jnp.asarray(rng.choice([-3.0, 0.0, 3.0], n), jnp.float32)}
        for path, n in channels.sizes(network).items()
    }
    closed = {**variables, "params": layer.replace(variables["params"], gates)}
    open_ = {path: gate["log_alpha"] > -1 for path, gate in gates.items()}
    small = compact(module, closed, shape)
    assert small.after == channels.count(network, open_)
    np.testing.assert_allclose(
        jax.jit(small.module.apply)(small.variables, x), jax.jit(module.apply)(closed, x), atol=1e-5
    )


def test_the_expected_cost_is_that_of_drawn_networks():
    """Expected channels and parameters against 4,000 draws of which channels are open."""
    shape = (8, 8, 1)
    module = models.create("lenet5", kind=HardConcrete(), gated=2)
    network = module.network(shape)
    rng = np.random.default_rng(1)
    gates = {
        path: {"log_alpha": jnp.asarray(rng.normal(1, 1, n), jnp.float32)}
        for path, n in channels.sizes(network).items()
    }
    chances = {path: hard_concrete.probability(gate["log_alpha"]) for path, gate in gates.items()}

    def draw(key):
        open_ = {
            path: jax.random.uniform(jax.random.fold_in(key, i), chance.shape) < chance
            for i, (path, chance) in enumerate(chances.items())
        }
        count = channels.count(network, open_)
        return count.channels, count.parameters

    counts, parameters = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(2), 4000))
    expected = module.kind.penalty(list(gates.values()))
    np.testing.assert_allclose(np.mean(counts), expected, rtol=0.01)
    fraction = channels.soft_fractions(network, chances)["parameters"]
    whole = channels.whole(network).parameters
    np.testing.assert_allclose(np.mean(parameters), fraction * whole, rtol=0.01)


def test_bad_input():
    with pytest.raises(ValueError, match=r"noise has shape \(1,\), expected \(3,\)"):
        HardConcrete().values({"log_alpha": jnp.zeros(3)}, 3, noise=jnp.full(1, 0.5))
    for drop in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a number between 0 and 1"):
            HardConcrete(drop)
    with pytest.raises(ValueError, match=r"expected at least 0\.0099"):
        HardConcrete(1e-3)
    with pytest.raises(ValueError, match=r"drop is 0\.95, expected less than 0\.9167"):
        HardConcrete(0.95)
    with pytest.raises(ValueError, match="there are no gates"):
        HardConcrete().penalty([])
    with pytest.raises(ValueError, match=r"log_alpha has shape \(2,\), expected \(3,\)"):
        HardConcrete().values({"log_alpha": jnp.ones(2)}, 3)
