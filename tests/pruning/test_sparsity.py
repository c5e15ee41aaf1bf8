"""Epsilon-sparsity by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.pruning.sparsity import epsilon_sparsity

PARAMS = {
    "kernel": jnp.array([[0.0, -0.05, 0.1], [0.2, -0.3, 0.1]]),
    "bias": jnp.zeros(3),
    "out": jnp.array([[-0.1], [5.0]]),
}
MASKS = {
    "kernel": jnp.array([[False, True, True], [True, False, False]]),
    "bias": None,
    "out": jnp.array(
        [
            [
                True,
            ],
            [False],
        ]
    ),
}


@pytest.mark.parametrize(
    ("epsilon", "all_weights", "kept"),
    # Eight weights without the bias; those kept are -0.05, 0.1, 0.2 and -0.1.
    [(1e-3, 1, 0), (0.06, 2, 1), (0.15, 5, 3), (0.25, 6, 4), (9.0, 8, 4)],
)
def test_by_hand(epsilon, all_weights, kept):
    assert epsilon_sparsity(PARAMS, epsilon) == all_weights / 8
    assert epsilon_sparsity(PARAMS, epsilon, masks=MASKS) == kept / 4


def test_a_weight_of_epsilon_is_not_below_it():
    params = {"w": jnp.array([[0.5, -0.5, 0.25, -0.75]])}
    assert epsilon_sparsity(params, 0.5) == 0.25


def test_the_predicate_chooses_what_counts():
    value = epsilon_sparsity(PARAMS, 0.06, prunable=lambda path, leaf: path != "out")
    assert value == np.float32(5 / 9)


def test_masks_choose_what_counts_where_they_are_given():
    """A mask on a bias makes it count, and none on a kernel leaves that out."""
    masks = {"kernel": None, "bias": jnp.array([True, True, False]), "out": MASKS["out"]}
    assert epsilon_sparsity(PARAMS, 0.06, masks=masks) == np.float32(2 / 3)


def test_of_zeros_it_is_the_sparsity():
    """Theorem 1: for every epsilon below the smallest weight that is not zero."""
    weights = np.random.default_rng(0).uniform(0.01, 1, (40, 30)) * np.sign(
        np.random.default_rng(1).normal(size=(40, 30))
    )
    pruned = np.random.default_rng(2).random((40, 30)) < 0.83
    params = {"w": jnp.asarray(np.where(pruned, 0, weights), jnp.float32)}
    for epsilon in (1e-30, 1e-3, 0.0099):
        assert epsilon_sparsity(params, epsilon) == np.float32(pruned.mean())


def test_where_nothing_counts_it_is_nan():
    nothing = jax.tree.map(jnp.zeros_like, MASKS)
    assert np.isnan(epsilon_sparsity(PARAMS, 0.1, masks=nothing))


def test_members_and_traced_epsilons():
    epsilons = jnp.array([1e-3, 0.06, 0.15])
    together = jax.jit(jax.vmap(lambda e: epsilon_sparsity(PARAMS, e, masks=MASKS)))(epsilons)
    np.testing.assert_array_equal(together, [0, 0.25, 0.75])
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, 10 * leaf]), (PARAMS, MASKS["kernel"]))
    params, kernel_masks = members[0], jnp.stack([MASKS["kernel"], ~MASKS["kernel"]])
    values = jax.jit(
        jax.vmap(
            lambda params, mask: epsilon_sparsity(params, 0.15, masks={**MASKS, "kernel": mask})
        )
    )(params, kernel_masks)
    # The second member keeps 0, -3, 1 and -1 in their places.
    np.testing.assert_array_equal(values, [0.75, 0.25])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_the_result_is_float32(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    value = epsilon_sparsity(params, 0.15)
    assert value.dtype == jnp.float32 and value == 0.625


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_an_epsilon_below_half_precision_finds_zeros(dtype):
    params = {"w": jnp.array([[0.0, 1e-3, 0.0, 1.0]], dtype)}
    assert epsilon_sparsity(params, 1e-8) == 0.5
    # Just below the weight, which is where both round to one number.
    weight = float(params["w"][0, 1])
    assert epsilon_sparsity(params, 0.9999 * weight) == 0.5
    assert epsilon_sparsity(params, 1.0001 * weight) == 0.75


def test_what_does_not_fit_raises():
    with pytest.raises(ValueError, match="no leaf is prunable"):
        epsilon_sparsity({"bias": jnp.zeros(3)}, 0.1)
    with pytest.raises(ValueError, match="mask of 'kernel' is"):
        epsilon_sparsity(PARAMS, 0.1, masks={**MASKS, "kernel": jnp.ones((3, 2), bool)})
    for epsilon in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a positive number"):
            epsilon_sparsity(PARAMS, epsilon)
    with pytest.raises(ValueError, match="no leaf has a mask"):
        epsilon_sparsity(PARAMS, 0.1, masks=jax.tree.map(lambda _: None, PARAMS))
    with pytest.raises(ValueError, match="structure of params"):
        epsilon_sparsity(PARAMS, 0.1, masks={"kernel": MASKS["kernel"]})
