"""CKA of minibatches against the definition, other numbers of batches and scales, and mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cka_problems import normal, reference_hsic1

from ntt_sparse.similarity import cka


def test_minibatches_average_hsic_before_the_ratio(x64):
    sizes = (8, 5, 4, 2)
    parts = [[normal(n, p, seed=7 * n + p) for p in (3, 6)] for n in sizes]
    batches = [[jnp.asarray(x) for x in part] for part in parts]
    value = cka.minibatch_cka(batches)
    # The last batch is too small to be unbiased.
    cross = [[sum(reference_hsic1(p[i], p[j]) for p in parts[:3]) for j in (0, 1)] for i in (0, 1)]
    expected = np.array(cross) / np.sqrt(np.outer(np.diag(cross), np.diag(cross)))
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)
    pair = cka.minibatch_cka([[b[0]] for b in batches], [[b[1]] for b in batches])
    np.testing.assert_allclose(pair, expected[:1, 1:], rtol=0, atol=1e-12)
    sums = [jax.jit(cka.hsic_sums)(batch) for batch in batches[:3]]
    total = jax.tree.map(lambda *terms: sum(map(np.asarray, terms)), *sums)
    np.testing.assert_allclose(cka.cka_of_sums(total), expected, rtol=0, atol=1e-12)


def test_one_minibatch_is_the_debiased_value_and_many_approach_it(x64):
    hidden = normal(512, 8)
    x, y = (jnp.asarray(hidden @ normal(8, p, seed=p) + normal(512, p, seed=9)) for p in (6, 12))
    whole = float(cka.linear_cka(x, y, debiased=True))
    assert cka.minibatch_cka([[x, y]])[0, 1] == pytest.approx(whole, rel=1e-12)
    errors = [
        abs(
            cka.minibatch_cka([[x[i : i + b], y[i : i + b]] for i in range(0, 512, b)])[0, 1]
            - whole
        )
        for b in (16, 128)
    ]
    assert errors[1] < errors[0] < 0.1


@pytest.mark.parametrize("scale", [1e-10, 1e8])
def test_minibatches_of_any_scale(scale):
    """Fourth powers of features do not fit float32."""
    batches = [[normal(8, p, seed=p + s) for p in (3, 70)] for s in (0, 100)]
    cross = [[sum(reference_hsic1(b[i], b[j]) for b in batches) for j in (0, 1)] for i in (0, 1)]
    expected = np.array(cross) / np.sqrt(np.outer(np.diag(cross), np.diag(cross)))
    scaled = [[jnp.asarray(scale * x, jnp.float32) for x in batch] for batch in batches]
    np.testing.assert_allclose(cka.minibatch_cka(scaled), expected, atol=1e-5)


def test_constant_layers_are_like_nothing():
    """What rounding leaves of them is not normalised; beside them others keep their values."""
    constant = [
        jnp.full((40, 3), 0.7) * jnp.array([1.0, 2, 3]),
        -0.3 * jnp.ones((40, 5)) * jnp.arange(1, 6),
    ]
    alive = jnp.asarray(normal(40, 4), jnp.float32)
    assert not np.any(cka.minibatch_cka([constant]))
    with_another = cka.minibatch_cka([[*constant, alive]] * 2)
    np.testing.assert_allclose(with_another, np.diag([0.0, 0.0, 1.0]), atol=1e-12)
    # A layer that is constant in one minibatch has the other's value.
    mixed = cka.minibatch_cka([[constant[0], alive], [alive[:, :3], alive]])
    alone = cka.cka_matrix([alive[:, :3], alive], debiased=True)
    assert mixed[0, 1] == pytest.approx(float(alone[0, 1]) / np.sqrt(2), rel=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(cka.hsic_sums([x, alive]).cross))(constant[0])
    assert np.all(np.isfinite(gradient))


def test_minibatches_that_do_not_fit():
    x, y = (jnp.asarray(normal(5, p)) for p in (2, 3))
    with pytest.raises(ValueError, match=r"batches hold \(2, 2\) and \(1, 1\) layers"):
        cka.minibatch_cka([[x, y], [x]])
    with pytest.raises(ValueError, match="a batch of features holds no layer"):
        cka.minibatch_cka([[]])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        cka.minibatch_cka([[x], [x]], [[y]])


def test_minibatches_that_are_too_small():
    small, large = [jnp.ones((3, 2))], [jnp.asarray(normal(4, 2))]
    with pytest.raises(ValueError, match="needs a batch of four examples or more, there is none"):
        cka.minibatch_cka([small])
    with pytest.raises(ValueError, match="fewer than four examples is not the last one"):
        cka.minibatch_cka([large, small, large])
