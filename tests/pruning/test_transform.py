import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ntt_sparse.pruning import masks, transform

OPTIMISERS = {
    "sgd_momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1),
    "clip_adam": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(1e-2, 20)),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
}
every_optimiser = pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS.keys())

X = np.random.default_rng(0).normal(size=(12, 6))
Y = np.random.default_rng(1).normal(size=(12, 5))


def init(seed=0, dtype=None):
    kernel, bias = jax.random.split(jax.random.key(seed))
    return {
        "kernel": jax.random.normal(kernel, (6, 5), dtype),
        "bias": jax.random.normal(bias, (5,), dtype),
    }


def random_masks(seed=0):
    return {"kernel": jax.random.bernoulli(jax.random.key(100 + seed), 0.4, (6, 5)), "bias": None}


def loss(params):
    # Arrays of their own: JAX keeps a constant as it was in the other precision.
    x, y = (leaf.astype(params["kernel"].dtype) for leaf in (X, Y))
    return jnp.mean((jnp.tanh(x @ params["kernel"] + params["bias"]) - y) ** 2)


def train(optimiser, params, tree, steps=20):
    """Params after every step, stacked; gradients are taken at the effective weights."""

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(masks.apply(params, tree))
        updates, state = optimiser.update(grads, state, params, masks=tree)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, optimiser.init(params)), length=steps)[1]


@pytest.mark.variants(4)
@every_optimiser
@pytest.mark.usefixtures("x64")
def test_pruned_weights_are_zero_and_survivors_train_as_if_alone(make):
    params, tree = init(), random_masks()
    keep = np.asarray(tree["kernel"])
    history = jax.jit(lambda params: train(transform.keep_masked(make()), params, tree))(params)
    # The reference: the bare optimiser on a vector of survivors. It knows no pruned weight.
    reference, bias = params["kernel"][keep], params["bias"]
    alone, inner = {"kernel": reference, "bias": bias}, make()
    state = inner.init(alone)

    @jax.jit
    def reference_step(alone, state):
        def alone_loss(p):
            kernel = jnp.zeros((6, 5)).at[np.nonzero(keep)].set(p["kernel"])
            return loss({**p, "kernel": kernel})

        updates, state = inner.update(jax.grad(alone_loss)(alone), state, alone)
        return optax.apply_updates(alone, updates), state

    for i in range(20):
        alone, state = reference_step(alone, state)
        assert np.count_nonzero(history["kernel"][i][~keep]) == 0
        np.testing.assert_allclose(history["kernel"][i][keep], alone["kernel"], rtol=1e-10)
        np.testing.assert_allclose(history["bias"][i], alone["bias"], rtol=1e-10)
    assert np.all(np.abs(history["kernel"][-1][keep] - params["kernel"][keep]) > 1e-4)


@pytest.mark.variants(4)
@every_optimiser
def test_masks_may_change_between_steps(make):
    optimiser, params = transform.keep_masked(make()), init()
    schedule = jnp.stack([random_masks(i)["kernel"] for i in range(20)])

    def step(carry, kernel_mask):
        params, state = carry
        tree = {"kernel": kernel_mask, "bias": None}
        # The dense gradient: it does not vanish where pruned.
        updates, state = optimiser.update(jax.grad(loss)(params), state, params, masks=tree)
        params = optax.apply_updates(params, updates)
        return (params, state), params["kernel"]

    carry = params, optimiser.init(params)
    _, kernels = jax.jit(lambda carry: jax.lax.scan(step, carry, schedule))(carry)
    kernels, schedule = np.asarray(kernels), np.asarray(schedule)
    assert np.count_nonzero(kernels[~schedule]) == 0
    # A weight that returns starts from zero and moves again.
    returned = schedule[1:] & ~schedule[:-1]
    assert np.all(kernels[1:][returned] != 0)


@pytest.mark.usefixtures("x64")
def test_members_train_apart_under_vmap():
    optimiser = transform.keep_masked(optax.adamw(1e-2))
    stack = lambda make: jax.tree.map(lambda *t: jnp.stack(t), *[make(i) for i in range(3)])  # noqa: E731
    together = jax.vmap(lambda p, m: train(optimiser, p, m, 5))(stack(init), stack(random_masks))
    for i in range(3):
        alone = train(optimiser, init(i), random_masks(i), 5)
        for name in alone:
            np.testing.assert_allclose(together[name][i], alone[name], rtol=1e-12)


def test_last_in_a_chain():
    optimiser = optax.chain(optax.clip(0.01), transform.keep_masked(optax.sgd(0.1, momentum=0.9)))
    tree = random_masks()
    history = train(optimiser, init(), tree)
    assert np.count_nonzero(history["kernel"][:, ~np.asarray(tree["kernel"])]) == 0


@pytest.mark.parametrize("params_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("grads_dtype", [jnp.float32, jnp.bfloat16])
def test_zero_is_exact_in_mixed_precision(params_dtype, grads_dtype):
    # 0.1 in float32 has no equal in bfloat16: -param must not be rounded to the update's dtype.
    params = {"w": jnp.full((1, 2), 0.1, params_dtype)}
    grads, tree = {"w": jnp.ones((1, 2), grads_dtype)}, {"w": jnp.array([[True, False]])}
    optimiser = transform.keep_masked(optax.sgd(1.0))
    updates, _ = optimiser.update(grads, optimiser.init(params), params, masks=tree)
    stepped = optax.apply_updates(params, updates)["w"]
    assert stepped.dtype == params_dtype
    assert stepped[0, 1] == 0
    assert stepped[0, 0] != 0


def test_the_inner_optimiser_sees_neither_pruned_gradients_nor_pruned_weights():
    seen = {}

    def update(updates, state, params=None, *, temperature):
        seen.update(updates=updates, params=params, temperature=temperature)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    params = {"w": jnp.array([[1.0, 2.0]])}
    transform.keep_masked(inner).update(
        {"w": jnp.array([[3.0, jnp.nan]])},
        (),
        params,
        masks={"w": jnp.array([[True, False]])},
        temperature=7,
    )
    np.testing.assert_array_equal(seen["updates"]["w"], [[3.0, 0.0]])
    np.testing.assert_array_equal(seen["params"]["w"], [[1.0, 0.0]])
    assert seen["temperature"] == 7


def test_new_masks_do_not_recompile(compilations):
    optimiser, params = transform.keep_masked(optax.adam(1e-2)), init()
    step = jax.jit(lambda state, tree: optimiser.update(params, state, params, masks=tree))
    state = optimiser.init(params)
    first, second = random_masks(0), random_masks(1)
    step(state, first)
    with compilations() as events:
        step(state, second)
    assert events == []


def test_the_state_is_that_of_the_inner_optimiser():
    params, inner = init(), optax.adam(1e-2)
    state = transform.keep_masked(inner).init(params)
    assert jax.tree.structure(state) == jax.tree.structure(inner.init(params))


def test_missing_or_foreign_arguments_raise():
    optimiser, params, tree = transform.keep_masked(optax.sgd(0.1)), init(), random_masks()
    state = optimiser.init(params)
    with pytest.raises(ValueError, match="keep_masked needs params: call update"):
        optimiser.update(params, state, masks=tree)
    with pytest.raises(ValueError, match="keep_masked needs masks: call update"):
        optimiser.update(params, state, params)
    with pytest.raises(ValueError, match="masks must have the structure of params"):
        optimiser.update(params, state, params, masks={"kernel": tree["kernel"]})


def test_the_example_of_the_docstring():
    results = doctest.testmod(transform)
    assert results.attempted > 0
    assert results.failed == 0


# Growing decay


def test_the_coefficient_grows_to_one_increment_above_its_ceiling():
    """As the loop of the published code: add while the sum is not above the ceiling."""
    reg, expected = 0.0, []
    for step in range(60):
        if step % 5 == 0 and reg <= 0.05:
            reg += 0.01
        expected.append(reg)
    got = [float(transform.growing_coefficient(t, increment=0.01, ceiling=0.05)) for t in range(60)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(got[-1], 0.06, rtol=1e-6)
    cubed = jax.jit(lambda t: transform.growing_coefficient(t, every=1, power=3))(9)
    np.testing.assert_allclose(cubed, (10 * 1e-4) ** 3, rtol=1e-5)
    np.testing.assert_allclose(transform.growing_coefficient(10**6), 1.0001, rtol=1e-6)


def test_growing_decay_draws_the_doomed_to_zero_and_leaves_the_rest():
    """Through momentum, step by step; a leaf without a mask is left alone."""
    params = {"w": jnp.array([[1.0, -2.0, 3.0]]), "b": jnp.ones(3)}
    masks = {"w": jnp.array([[True, False, False]]), "b": None}
    optimizer = optax.chain(
        transform.growing_decay(lambda count: 0.1 * (count + 1)), optax.sgd(0.2, momentum=0.5)
    )
    state = optimizer.init(params)
    w, momentum = np.array([1.0, -2.0, 3.0]), np.zeros(3)
    for step in range(25):
        grads = {"w": jnp.array([[0.1, 0.0, 0.3]]), "b": jnp.zeros(3)}
        updates, state = jax.jit(optimizer.update)(grads, state, params, masks=masks)
        params = optax.apply_updates(params, updates)
        g = np.array([0.1, 0.0, 0.3]) + 0.1 * (step + 1) * w * np.array([0, 1, 1])
        momentum = 0.5 * momentum + g
        w = w - 0.2 * momentum
        np.testing.assert_allclose(params["w"][0], w, rtol=1e-4, atol=1e-6)
    assert abs(w[1]) < 1e-3
    np.testing.assert_array_equal(params["b"], 1)


@pytest.mark.parametrize("coefficient", [0.5, jnp.float32(0.5), optax.constant_schedule(0.5)])
def test_growing_decay_takes_a_number_or_a_schedule(coefficient):
    optimizer = transform.growing_decay(coefficient)
    params, masks = {"w": jnp.array([[1.0, -2.0]])}, {"w": jnp.array([[True, False]])}
    updates, _ = optimizer.update(params, optimizer.init(params), params, masks=masks)
    np.testing.assert_array_equal(updates["w"], [[1.0, -3.0]])


def test_growing_decay_needs_params_and_masks():
    optimizer = transform.growing_decay(optax.constant_schedule(1.0))
    params, state = {"w": jnp.ones((1, 2))}, optimizer.init({"w": jnp.ones((1, 2))})
    with pytest.raises(ValueError, match="growing_decay needs masks"):
        optimizer.update(params, state, params)
    with pytest.raises(ValueError, match="masks must have the structure of params"):
        optimizer.update(params, state, params, masks={"v": jnp.ones((1, 2), bool)})
    for wrong in (
        {"every": 0}, {"increment": 0.0}, {"increment": float("inf")}, {"ceiling": float("nan")},
        {"power": 0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            transform.growing_coefficient(1, **wrong)
