"""Orders of neurons against brute force, exact fractions and long doubles."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jaxtyping import TypeCheckError

from ntt_sparse.pruning import _neuron_curve
from ntt_sparse.pruning.neurons import (
    cka_prune_curve,
    cka_prune_order,
    counts_at_rate,
    counts_at_threshold,
    counts_of_total,
    l1_prune_order,
    prune_layers,
    prune_sequentially,
    random_prune_order,
    similarity_along,
)


def cka(x, y):
    """Linear CKA of features, by Gram matrices in double precision."""
    one, two = (_centred_gram(np.asarray(z, np.float64).reshape(len(z), -1)) for z in (x, y))
    return np.sum(one * two) / np.sqrt(np.sum(one * one) * np.sum(two * two))


def _centred_gram(x):
    h = np.eye(len(x)) - 1 / len(x)
    return h @ x @ x.T @ h


def brute_force(x, count, mode, reference=None):
    """The text of the paper: set a neuron to a constant, compare, restore."""
    reference = x if reference is None else reference
    p, gone, values = x.shape[-1], [], []
    alone = [cka(reference, _without(x, [j])) for j in range(p)]
    for _ in range(count):
        left = [j for j in range(p) if j not in gone]
        if mode == "oneshot":
            best = max(left, key=lambda j: alone[j])
        elif len(left) == 1:
            best = left[0]
        else:
            best = max(left, key=lambda j: cka(reference, _without(x, [*gone, j])))
        gone.append(best)
        values.append(cka(reference, _without(x, gone)) if len(gone) < p else 0.0)
    return gone, values


def _without(x, columns):
    x = np.array(x, np.float64)
    # The bias of a neuron without weights.
    x[..., columns] = 0.25
    return x


def activations(n=40, p=16, *, seed=0, shape=()):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, *shape, p)) @ rng.normal(size=(p, p)) * rng.uniform(0.2, 2, p)
    return np.maximum(mixed + rng.normal(size=p), 0).astype(np.float32)


@pytest.mark.parametrize("mode", ["greedy", "oneshot"])
@pytest.mark.parametrize("seed", [0, 1])
def test_order_and_curve_are_those_of_brute_force_to_the_last_neuron(mode, seed):
    x = activations(seed=seed)
    order, similarity = cka_prune_curve(x, mode=mode)
    expected, values = brute_force(x, 16, mode)
    assert order.tolist() == expected
    np.testing.assert_allclose(similarity, values, rtol=2e-6, atol=1e-6)
    assert order.dtype == jnp.int32
    assert similarity.dtype == jnp.float32
    assert cka_prune_order(x, 5, mode=mode).tolist() == expected[:5]


@pytest.mark.parametrize("mode", ["greedy", "oneshot"])
def test_channels_are_compared_by_their_flattened_maps(mode):
    x = activations(20, 7, shape=(3, 2))
    order, similarity = cka_prune_curve(x, mode=mode)
    expected, values = brute_force(x, 7, mode)
    assert order.tolist() == expected
    np.testing.assert_allclose(similarity, values, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (2,)])
def test_what_the_layer_has_to_stay_like_can_be_another(shape):
    x = activations(30, 9, shape=shape)
    noise = np.random.default_rng(3).normal(size=x.shape)
    reference = np.concatenate([x + 0.3 * noise, noise[..., :2]], -1).astype(np.float32)
    order, similarity = cka_prune_curve(x, reference=reference)
    expected, values = brute_force(x, 9, "greedy", reference)
    assert order.tolist() == expected
    np.testing.assert_allclose(similarity, values, rtol=2e-6, atol=1e-6)


def exact_order(x, mode):
    """In fractions, of integers: the square of CKA, ties by index."""
    n, p = x.shape
    y = [[int(n * x[i, j]) - int(x[:, j].sum()) for i in range(n)] for j in range(p)]
    c = [[sum(a * b for a, b in zip(u, v, strict=True)) for v in y] for u in y]
    q = [[value**2 for value in row] for row in c]
    r = [sum(row) for row in q]

    def score(left):
        own = sum(q[i][j] for i in left for j in left)
        return Fraction(sum(r[j] for j in left) ** 2, own) if own else Fraction(0)

    left, order = list(range(p)), []
    while left:
        if mode == "oneshot":
            best = max(left, key=lambda j: (score([i for i in range(p) if i != j]), -j))
        else:
            best = max(left, key=lambda j: (score([i for i in left if i != j]), -j))
        left.remove(best)
        order.append(best)
    return order


@pytest.mark.parametrize("mode", ["greedy", "oneshot"])
@settings(max_examples=60, deadline=None)
@given(x=hnp.arrays(np.int64, (6, 6), elements=st.integers(0, 2)))
def test_ties_of_equal_and_dead_neurons_go_by_index(mode, x):
    assert cka_prune_order(x.astype(np.float32), 6, mode=mode).tolist() == exact_order(x, mode)


def long_double_order(x):
    """The closed form in long doubles, each sum anew in each step."""
    x = np.asarray(x, np.longdouble)
    x = x - x.mean(0)
    q = (x.T @ x) ** 2
    r, left, order = q.sum(1), np.ones(x.shape[1], bool), []
    for _ in range(x.shape[1]):
        whole, square, row = r[left].sum(), q[np.ix_(left, left)].sum(), q[:, left].sum(1)
        with np.errstate(all="ignore"):
            value = (whole - r) ** 2 / (square - 2 * row + np.diagonal(q))
        value[~left] = -1
        best = int(np.argmax(value)) if left.sum() > 1 else int(np.argmax(left))
        left[best] = False
        order.append(best)
    return order


def test_many_nearly_equal_neurons_keep_their_order_to_the_last():
    rng = np.random.default_rng(0)
    digits = load_digits()
    hidden = np.maximum(digits @ rng.normal(size=(64, 60)) / 8, 0)
    # Twins that differ in the fifth digit, and some that never fire.
    twins = hidden[:, :30] * (1 + 1e-5 * rng.normal(size=(len(hidden), 30)))
    x = np.concatenate([hidden, twins, np.zeros((len(hidden), 10))], 1).astype(np.float32)
    expected = long_double_order(x)
    # The reference breaks ties between dead neurons by rounding.
    dead = np.flatnonzero(np.ptp(x, axis=0) == 0).tolist()
    assert len(dead) > 10
    assert sorted(expected[: len(dead)]) == dead
    expected[: len(dead)] = dead
    assert cka_prune_order(x, 100).tolist() == expected


def test_the_last_neurons_are_as_certain_as_the_first():
    """Where next to nothing is left of the whole layer, and about as little without each."""
    for seed in range(8, 12):
        x = np.maximum(np.random.default_rng(seed).normal(size=(50, 256)), 0).astype(np.float32)
        assert cka_prune_order(x, 256).tolist() == long_double_order(x)


def load_digits():
    from sklearn.datasets import load_digits

    return load_digits().data[:512] / 16


def test_no_neuron_or_constant_ones():
    order, similarity = cka_prune_curve(np.full((5, 3), 0.1, np.float32))
    assert order.tolist() == [0, 1, 2]
    assert similarity.tolist() == [0, 0, 0]
    order, similarity = cka_prune_curve(activations(), 0)
    assert order.shape == similarity.shape == (0,)
    assert cka_prune_order(np.ones((1, 2), np.float32), 2).tolist() == [0, 1]


def test_order_does_not_depend_on_scale_or_examples_order_and_follows_the_neurons():
    x = activations()
    expected = np.asarray(cka_prune_order(x, 16))
    rng = np.random.default_rng(1)
    assert np.array_equal(cka_prune_order(1e30 * x, 16), expected)
    assert np.array_equal(cka_prune_order(1e-30 * x, 16), expected)
    assert np.array_equal(cka_prune_order(x[rng.permutation(len(x))], 16), expected)
    places = rng.permutation(16)
    assert np.array_equal(places[np.asarray(cka_prune_order(x[:, places], 16))], expected)


def test_neurons_that_are_not_there_are_neither_compared_nor_removed():
    x = activations()
    kept = np.arange(16) % 3 > 0
    order, similarity = cka_prune_curve(x, kept=kept)
    alone, values = cka_prune_curve(x[:, kept])
    assert order.tolist() == np.flatnonzero(kept)[np.asarray(alone)].tolist()
    np.testing.assert_allclose(similarity, values, rtol=1e-6)
    # Where the number cannot be known there are no more indices.
    padded = jax.jit(lambda kept: cka_prune_curve(x, 16, kept=kept))(kept)
    assert padded.order.tolist() == [*order.tolist(), *[-1] * 6]
    assert padded.similarity.tolist() == [*similarity.tolist(), *[0.0] * 6]


def test_the_same_inside_of_jit_and_vmap_and_in_rows():
    both = np.stack([activations(seed=seed) for seed in (0, 1)])
    expected = [cka_prune_order(x, 10).tolist() for x in both]
    inside = jax.jit(jax.vmap(lambda x: cka_prune_order(x, 10)))(both)
    assert inside.tolist() == expected
    assert inside.dtype == jnp.int32


def test_large_layers_need_no_square_of_their_size(monkeypatch):
    x = activations(seed=2)
    expected = cka_prune_curve(x)
    monkeypatch.setattr(_neuron_curve, "_MOST_PRODUCTS", 0)
    jax.clear_caches()
    order, similarity = cka_prune_curve(x)
    jax.clear_caches()
    assert order.tolist() == expected.order.tolist()
    np.testing.assert_allclose(similarity, expected.similarity, rtol=1e-6)


def test_double_precision_keeps_its_digits(x64):
    x = activations().astype(np.float64)
    order, similarity = cka_prune_curve(x)
    expected, values = brute_force(x, 16, "greedy")
    assert order.tolist() == expected
    assert similarity.dtype == jnp.float64
    np.testing.assert_allclose(similarity, values, rtol=1e-12, atol=1e-12)


def test_activations_in_double_precision_are_not_rounded():
    x = activations(60, 6).astype(np.float64)
    # Single precision cannot tell these from each other.
    x[:, 1] = x[:, 0] + 1e-9 * x[:, 2]
    x[:, 4] = x[:, 0] - 2e-9 * x[:, 3]
    assert cka_prune_order(x, 6).tolist() == long_double_order(x)


def test_similarity_along_any_order():
    x = activations(seed=4)
    order = np.random.default_rng(0).permutation(16)[:12]
    expected = [cka(x, _without(x, order[: count + 1])) for count in range(12)]
    np.testing.assert_allclose(similarity_along(x, order), expected, rtol=2e-6)
    curve = cka_prune_curve(x)
    np.testing.assert_allclose(similarity_along(x, curve.order), curve.similarity, rtol=1e-6)


def test_l1_order_of_dense_layers_and_convolutions():
    kernel = np.array([[1.0, -3.0, 0.5, 0.5], [-1.0, 0.0, 0.5, 0.5]])
    assert l1_prune_order(kernel, 4).tolist() == [2, 3, 0, 1]
    kept = np.array([True, True, False, True])
    assert l1_prune_order(kernel, 2, kept=kept).tolist() == [3, 0]
    convolution = np.random.default_rng(0).normal(size=(3, 3, 2, 5))
    expected = np.argsort(np.abs(convolution).sum((0, 1, 2)))
    assert l1_prune_order(convolution, 3).tolist() == expected[:3].tolist()


def test_random_orders_are_permutations_and_follow_the_key():
    orders = [random_prune_order(jax.random.key(seed), 20, 20).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == list(range(20))
    kept = np.arange(20) < 5
    assert sorted(random_prune_order(jax.random.key(0), 20, 5, kept=kept).tolist()) == [*range(5)]
    first = [random_prune_order(jax.random.key(s), 3, 1)[0] for s in range(300)]
    assert np.all(np.abs(np.bincount(np.array(first), minlength=3) - 100) < 40)


def test_all_layers_in_one_call():
    maps = {"a": activations(seed=0), "b": activations(20, 6, shape=(2, 2))}
    curves = prune_layers(maps, {"a": 4, "b": 3}, mode="oneshot")
    assert curves["a"].order.tolist() == cka_prune_order(maps["a"], 4, mode="oneshot").tolist()
    assert curves["b"].order.tolist() == cka_prune_order(maps["b"], 3, mode="oneshot").tolist()
    with pytest.raises(ValueError, match="no activations of 'c', only of"):
        prune_layers(maps, {"c": 1})


def test_a_later_layer_sees_the_pruning_of_the_earlier_one():
    rng = np.random.default_rng(0)
    x, first, second = rng.normal(size=(50, 8)), rng.normal(size=(8, 12)), rng.normal(size=(12, 9))

    def activations_of(kept):
        hidden = x @ first * kept.get("first", np.ones(12, bool))
        return {"first": hidden, "second": np.maximum(hidden, 0) @ second}

    curves = prune_sequentially(activations_of, {"first": 7, "second": 4})
    whole = activations_of({})
    gone, _ = brute_force(whole["first"], 7, "greedy")
    assert curves["first"].order.tolist() == gone
    now = activations_of({"first": np.isin(np.arange(12), gone, invert=True)})
    expected, values = brute_force(now["second"], 4, "greedy", whole["second"])
    assert curves["second"].order.tolist() == expected
    np.testing.assert_allclose(curves["second"].similarity, values, rtol=1e-6)
    # Otherwise nothing would be tested.
    assert expected != brute_force(whole["second"], 4, "greedy")[0]


def test_numbers_of_neurons_at_a_rate_are_those_of_the_published_runs():
    width, found = 512, [512]
    for _ in range(14):
        width -= counts_at_rate({"layer": width}, 0.2)["layer"]
        found.append(width)
    assert found == [512, 410, 328, 262, 210, 168, 134, 107, 86, 69, 55, 44, 35, 28, 22]
    assert counts_at_rate({"a": 1, "b": 3}, 0.9) == {"a": 0, "b": 2}


def test_numbers_of_neurons_at_thresholds():
    curves = {"a": np.array([0.99, 0.9, 0.95, 0.5]), "b": np.array([0.8, 0.7])}
    # Once below, a layer stays so.
    assert counts_at_threshold(curves, 0.92) == {"a": 1, "b": 0}
    assert counts_at_threshold(curves, 0.8) == {"a": 3, "b": 1}
    assert counts_of_total(curves, 0) == ({"a": 0, "b": 0}, 1.0)
    assert counts_of_total(curves, 4) == ({"a": 3, "b": 1}, 0.8)
    assert counts_of_total(curves, 6) == ({"a": 4, "b": 2}, 0.5)
    for total in range(7):
        counts, lowest = counts_of_total(curves, total)
        assert sum(counts.values()) == total
        if total:
            again = counts_at_threshold(curves, lowest)
            assert all(again[name] >= counts[name] for name in curves)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: cka_prune_order(x, 17), r"count=17, expected 0 to 16"),
        (lambda x: cka_prune_order(x, -1), r"count=-1, expected 0 to 16"),
        (lambda x: cka_prune_curve(x, kept=np.ones(3, bool)), r"kept has shape \(3,\)"),
        (lambda x: cka_prune_order(x, 2, mode="best"), "mode='best' is unknown"),
        (lambda x: cka_prune_order(x[0], 2), "expected two axes or more"),
        (lambda x: cka_prune_order(x / 0, 2), "not finite"),
        (lambda x: cka_prune_order(x, 2, reference=x[:5]), "reference has 5 examples"),
        (lambda x: similarity_along(x, np.array([1, 1])), "expected different numbers"),
        (lambda x: similarity_along(x, np.array([16])), "from 0 to 15"),
        (lambda x: l1_prune_order(x, 17), "count=17"),
        (lambda x: counts_at_rate({"a": 3}, 1.0), "rate=1.0"),
        (lambda x: counts_at_threshold({"a": x[0]}, 0.0), "threshold=0.0"),
        (lambda x: counts_of_total({"a": x[0]}, 17), "total=17, expected 0 to 16"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*encountered in divide")
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(activations())


def direct_order(x, reference):
    """Brute force in long doubles, for layers that one neuron rules."""
    x, y = (np.asarray(z, np.longdouble) - np.asarray(z, np.longdouble).mean(0)
            for z in (x, reference))  # fmt: skip
    k, left, order, values = y @ y.T, list(range(x.shape[1])), [], []

    def similarity(chosen):
        other = x[:, chosen] @ x[:, chosen].T
        norm = np.sqrt(np.sum(k * k) * np.sum(other * other))
        return np.sum(k * other) / norm if norm else 0

    while left:
        each = [similarity([i for i in left if i != j]) for j in left]
        values.append(float(max(each)))
        order.append(left.pop(int(np.argmax(each))))
    return order, values


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e6, 1e12])
def test_a_neuron_that_rules_the_layer_takes_no_digits_from_the_others(scale):
    rng = np.random.default_rng(1)
    z = rng.normal(size=(60, 8))
    x = np.concatenate([scale * rng.normal(size=(60, 1)), z], 1)
    order, similarity = cka_prune_curve(x, reference=z)
    expected, values = direct_order(x, z)
    assert order.tolist() == expected
    np.testing.assert_allclose(similarity, values, rtol=1e-5)
    # Along an order that begins with it.
    along = similarity_along(x, np.arange(9))
    truth = [cka(x, x[:, count:]) for count in range(1, 9)]
    np.testing.assert_allclose(along[:8], truth, rtol=1e-4, atol=1e-12)
    assert along[8] == 0


def test_activations_that_are_not_finite_are_no_similarity_inside_of_jit():
    x = jnp.asarray(activations()).at[3, 2].set(jnp.nan)
    order, similarity = jax.jit(lambda x: cka_prune_curve(x, 4))(x)
    assert order.tolist() == [-1] * 4
    assert np.all(np.isnan(similarity))


@pytest.mark.parametrize(
    "kernel",
    [
        np.full((3, 2), [3e38, 2e38], np.float32),
        np.full((3000, 2), [31, 30], np.float16),
        np.array([[1 + 1e-10, 1.0]]),
    ],
)
def test_l1_norms_neither_overflow_nor_round(kernel):
    assert l1_prune_order(kernel, 2).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: cka_prune_order(x, 2, kept=np.arange(16)), "kept is int.*, expected booleans"),
        (lambda x: similarity_along(x, np.array([0.5, 1.7])), r"expected indices \(count,\)"),
        (lambda x: similarity_along(x, np.array([[1]])), r"expected indices \(count,\)"),
        (lambda x: similarity_along(x, np.array([-1])), "expected different numbers"),
        (lambda x: cka_prune_order(x, 2.5), "count=2.5, expected a whole number"),
        (lambda x: cka_prune_order(np.zeros((3, 0, 4)), 1), "none empty"),
        (lambda x: cka_prune_order(x * 1j, 1), "complex.*, expected real numbers"),
        (lambda x: counts_at_rate({"a": 0}, 0.5), "layers without any neuron: a"),
        (lambda x: counts_of_total({"a": x[0] * np.nan}, 1), "similarities of a"),
        (lambda x: counts_at_threshold({"a": x[0] * np.nan}, 0.5), "similarities of a"),
    ],
)
def test_what_is_refused_or_a_wrong_type(call, message):
    # Type checks of the tests are before the function's own.
    with pytest.raises((ValueError, TypeCheckError), match=f"{message}|Type-check error"):
        call(activations())
