"""A cold start of gates, against the updates of PyTorch written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ntt_sparse.gates import optimizer
from ntt_sparse.pruning.transform import keep_masked

PARAMS = {
    "Conv_0": {"kernel": jnp.array([1.0, -2.0]), "gate": {"beta": jnp.array(1.0)}},
    "Dense_0": {"kernel": jnp.array([0.5])},
}


def run(transform, grads, steps):
    """The params after each step on constant gradients."""
    params, state, seen = PARAMS, transform.init(PARAMS), []
    for _ in range(steps):
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def test_gates_wait_and_then_start_afresh():
    """SGD with coupled decay and momentum, whose buffer a frozen parameter does not have."""
    rate, momentum, decay, cold = 0.1, 0.9, 0.01, 3
    sgd = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum))
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.3), PARAMS)
    seen = run(optimizer.cold_start(sgd, cold), grads, 8)
    beta, kernel = 1.0, np.array([1.0, -2.0])
    buffers = {"beta": 0.0, "kernel": np.zeros(2)}
    for step, params in enumerate(seen):
        buffers["kernel"] = momentum * buffers["kernel"] + 0.3 + decay * kernel
        kernel = kernel - rate * buffers["kernel"]
        if step >= cold:
            buffers["beta"] = momentum * buffers["beta"] + 0.3 + decay * beta
            beta -= rate * buffers["beta"]
        np.testing.assert_allclose(params["Conv_0"]["gate"]["beta"], beta, rtol=1e-6)
        np.testing.assert_allclose(params["Conv_0"]["kernel"], kernel, rtol=1e-6)


def test_the_first_step_of_adam_has_its_full_size_for_gates():
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), PARAMS)
    seen = run(optimizer.cold_start(optax.adam(0.01), 5), grads, 6)
    offsets = [float(params["Conv_0"]["gate"]["beta"]) for params in seen]
    assert offsets[:5] == [1.0] * 5
    np.testing.assert_allclose(offsets[5], 0.99, rtol=1e-4)


def test_a_schedule_after_the_wrapper_is_that_of_the_run():
    rate = optax.piecewise_constant_schedule(1.0, {2: 0.1})
    transform = optax.chain(
        optimizer.cold_start(optax.identity(), 2), optax.scale_by_learning_rate(rate)
    )
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    seen = run(transform, grads, 4)
    offsets = [float(params["Conv_0"]["gate"]["beta"]) for params in seen]
    # Its first step is the third of the run, at a tenth of the rate.
    np.testing.assert_allclose(offsets, [1.0, 1.0, 0.9, 0.8], rtol=1e-6)


def test_no_cold_start_is_the_optimiser_itself():
    grads = jax.tree.map(lambda leaf: jnp.sin(leaf + 1), PARAMS)
    ours, plain = (
        run(transform, grads, 3)
        for transform in (optimizer.cold_start(optax.adam(0.1), 0), optax.adam(0.1))
    )
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_refusals():
    with pytest.raises(ValueError, match="cold start of -1 steps"):
        optimizer.cold_start(optax.sgd(0.1), -1)
    with pytest.raises(ValueError, match="hold no gate"):
        optimizer.cold_start(optax.sgd(0.1), 1).init({"Dense_0": {"kernel": jnp.ones(2)}})


def test_pruned_weights_stay_zero_around_a_cold_start():
    masks = {
        "Conv_0": {"kernel": jnp.array([True, False]), "gate": {"beta": None}},
        "Dense_0": {"kernel": None},
    }
    transform = keep_masked(optimizer.cold_start(optax.sgd(0.1, 0.9), 1))
    params, state = PARAMS, transform.init(PARAMS)
    for _ in range(3):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = transform.update(grads, state, params, masks=masks)
        params = optax.apply_updates(params, updates)
    assert float(params["Conv_0"]["kernel"][1]) == 0.0
    np.testing.assert_allclose(params["Conv_0"]["gate"]["beta"], 1 - 0.1 - 0.19, rtol=1e-6)


def test_a_parameter_of_that_name_is_no_gate():
    params = {"glu": {"gate": jnp.ones(2)}, "gate": {"beta": jnp.ones(())}}
    assert optimizer.labels(params) == {"glu": {"gate": "network"}, "gate": {"beta": "gate"}}


def test_a_layer_named_gate_is_no_gate():
    """Of a gated linear unit: a cold start would freeze it without a word."""
    glu = {"gate": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "up": {"kernel": jnp.ones(2)}}
    params = {"glu": glu, "blocks": [{"gate": {"beta": jnp.ones(())}}, (jnp.ones(2),)]}
    expected = jax.tree.map(lambda _: "network", params)
    expected["blocks"][0]["gate"]["beta"] = "gate"
    assert optimizer.labels(params) == expected
    with pytest.raises(ValueError, match="hold no gate"):
        optimizer.labels(glu)


def test_labels():
    assert optimizer.labels(PARAMS) == {
        "Conv_0": {"kernel": "network", "gate": {"beta": "gate"}},
        "Dense_0": {"kernel": "network"},
    }
