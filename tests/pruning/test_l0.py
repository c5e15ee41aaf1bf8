"""L0 regularisation of weights, against NumPy and against what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.gates import hard_concrete
from ntt_sparse.pruning import l0, masks


def network():
    rng = np.random.default_rng(0)
    return {
        "a": {"kernel": jnp.asarray(rng.normal(size=(40, 50)), jnp.float32), "bias": jnp.ones(50)},
        "b": {"kernel": jnp.asarray(rng.normal(size=(50, 20)), jnp.float32)},
    }


def flat(tree):
    return {path: np.asarray(leaf, float) for path, leaf in masks.named_leaves(tree).items()}


def test_gates_start_where_the_chance_says():
    gates = l0.init(jax.random.key(0), network(), drop=0.2)
    assert [*flat(gates)] == ["a/kernel", "b/kernel"] and gates["a"]["bias"] is None
    first, second = flat(gates).values()
    for leaf in (first, second):
        assert abs(leaf.mean() - np.log(4)) < 2e-3
        assert 0.009 < leaf.std() < 0.011
    # Leaves are drawn apart.
    assert np.any(first.ravel()[:1000] != second.ravel())


def test_weights_of_training_and_evaluation_by_hand():
    params, key = network(), jax.random.key(3)
    gates = jax.tree.map(lambda leaf: 100 * (leaf - np.log(7 / 3)), l0.init(key, params))
    weights, alphas = flat(params), flat(gates)
    fixed, drawn = flat(l0.deterministic(params, gates)), flat(l0.sample(key, params, gates))
    for name, alpha in alphas.items():
        gate = np.clip(1.2 / (1 + np.exp(-alpha)) - 0.1, 0, 1)
        np.testing.assert_allclose(fixed[name], weights[name] * gate, atol=2e-6)
        kept = flat(l0.open_masks(gates))[name]
        np.testing.assert_array_equal(kept.astype(bool), fixed[name] != 0)
        ratio = drawn[name] / weights[name]
        chance = 1 / (1 + np.exp(-(alpha + 2 / 3 * np.log(11))))
        deviation = np.sqrt(np.sum(chance * (1 - chance)))
        assert abs(np.sum(ratio > 0) - np.sum(chance)) < 4 * deviation
        assert ratio.min() == 0 and abs(ratio.max() - 1) < 1e-6
    np.testing.assert_array_equal(drawn["a/bias"], weights["a/bias"])
    expected = sum(np.sum(1 / (1 + np.exp(-(a + 2 / 3 * np.log(11))))) for a in alphas.values())
    np.testing.assert_allclose(l0.expected_count(gates), expected, rtol=1e-5)
    for name, score in flat(l0.scores(params, gates)).items():
        chance = 1 / (1 + np.exp(-(alphas[name] + 2 / 3 * np.log(11))))
        np.testing.assert_allclose(score, chance * np.abs(weights[name]), rtol=1e-4)


def test_another_key_draws_other_gates_and_every_gate_for_itself():
    params = network()
    gates = l0.init(jax.random.key(0), params)
    one, other = (flat(l0.sample(jax.random.key(k), params, gates))["a/kernel"] for k in (1, 2))
    again = flat(jax.jit(l0.sample)(jax.random.key(1), params, gates))["a/kernel"]
    np.testing.assert_allclose(one, again, atol=1e-6)
    assert np.mean(one != other) > 0.4
    assert len(np.unique(np.round(one / flat(params)["a/kernel"], 5))) > 900


def test_the_penalty_closes_gates_that_nothing_needs():
    """A least-squares problem in which three of twelve inputs matter."""
    x = jax.random.normal(jax.random.key(0), (256, 12))
    y = x[:, :3] @ jnp.array([[2.0], [-1.5], [1.0]])
    params = {"kernel": jnp.ones((12, 1))}
    gates = l0.init(jax.random.key(1), params, drop=0.5)

    def loss(both, key):
        weights = l0.sample(key, *both)
        return jnp.mean((x @ weights["kernel"] - y) ** 2) + 0.02 * l0.expected_count(both[1])

    @jax.jit
    def run(both):
        def step(i, both):
            grads = jax.grad(loss)(both, jax.random.fold_in(jax.random.key(2), i))
            weights, gates = jax.tree.map(lambda leaf, g: leaf - 0.1 * g, both, grads)
            # Gates learn faster.
            gates = jax.tree.map(lambda leaf, g: leaf - 0.9 * g, gates, grads[1])
            return weights, l0.clip(gates)

        return jax.lax.fori_loop(0, 2000, step, both)

    weights, gates = run((params, gates))
    alpha = flat(gates)["kernel"]
    assert np.all((alpha >= np.log(0.01) - 1e-6) & (alpha <= np.log(100) + 1e-6))
    assert flat(l0.open_masks(gates))["kernel"].ravel().tolist() == [1] * 3 + [0] * 9
    found = flat(l0.deterministic(weights, gates))["kernel"].ravel()
    np.testing.assert_allclose(found[:3], [2.0, -1.5, 1.0], atol=0.15)
    kept = masks.from_scores(l0.scores(weights, gates), 0.25)
    assert flat(kept)["kernel"].ravel().tolist() == [1] * 3 + [0] * 9


def test_gradients_are_those_of_finite_differences(x64):
    params = {"kernel": jnp.asarray(np.random.default_rng(2).normal(size=(3, 4)))}
    gates = jax.tree.map(lambda leaf: leaf.astype(float), l0.init(jax.random.key(0), params))

    def total(alpha):
        weights = l0.sample(jax.random.key(1), params, {"kernel": alpha})
        return jnp.sum(jnp.sin(weights["kernel"])) + l0.expected_count({"kernel": alpha})

    alpha = gates["kernel"]
    gradient = jax.grad(total)(alpha)
    for place in np.ndindex(3, 4):
        step = jnp.zeros((3, 4)).at[place].set(1e-6)
        slope = (total(alpha + step) - total(alpha - step)) / 2e-6
        np.testing.assert_allclose(gradient[place], slope, rtol=1e-6, atol=1e-8)


def test_bad_input():
    params = network()
    gates = l0.init(jax.random.key(0), params)
    for wrong in (
        {**gates, "b": {"kernel": jnp.zeros((2, 2))}},
        {"a": gates["a"]},
        {"a": {"kernel": gates["a"]["kernel"]}, "b": gates["b"]},
    ):
        for function in (l0.deterministic, l0.scores):
            with pytest.raises(ValueError, match="expected gates as `init` makes them"):
                function(params, wrong)
    with pytest.raises(ValueError, match="there are no gates"):
        l0.expected_count({"a": None})
    with pytest.raises(ValueError, match=r"drop is 0\.95"):
        l0.init(jax.random.key(0), params, drop=0.95)
    with pytest.raises(ValueError, match="no leaf is prunable"):
        l0.init(jax.random.key(0), {"bias": jnp.ones(3)})
    assert hard_concrete.LIMITS[0] < np.log(1 / 11)
