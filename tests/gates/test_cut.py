"""Cuts against trying every number of channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntt_sparse import models
from ntt_sparse.gates import budget, channels, cut
from ntt_sparse.gates.l1 import L1

_SIZES = {"a": 4, "b": 7, "c": 1}


def drawn(seed, ties):
    """Scores of three layers, rounded to few values where ties are asked for."""
    rng = np.random.default_rng(seed)
    scores = {path: rng.uniform(-1, 1, n).astype(np.float32) for path, n in _SIZES.items()}
    return {path: np.round(value, 1) for path, value in scores.items()} if ties else scores


def by_hand(scores, at_least):
    """Every cut from the largest to the smallest, by removing one channel after the other."""
    open_ = {path: np.ones(len(value), bool) for path, value in scores.items()}
    yield {path: mask.copy() for path, mask in open_.items()}
    while True:
        candidates = [
            (float(scores[path][i]), -layer, -i, path)
            for layer, path in enumerate(scores)
            for i in range(len(scores[path]))
            if open_[path][i] and open_[path].sum() > at_least
        ]
        if not candidates:
            return
        _, _, place, path = min(candidates)
        open_[path][-place] = False
        yield {path: mask.copy() for path, mask in open_.items()}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.booleans(), st.integers(0, 3), st.integers(-1, 60))
def test_as_many_as_fit_stay(seed, ties, at_least, target):
    """Weights of the channels make the cost; the first cut that fits is the one."""
    scores = drawn(seed, ties)
    weights = {path: np.arange(1, n + 1) for path, n in _SIZES.items()}

    def cost(open_):
        return sum(jnp.sum(jnp.where(open_[path], w, 0)) for path, w in weights.items())

    cuts = list(by_hand(scores, at_least))
    expected = next((each for each in cuts if cost(each) <= target), cuts[-1])
    got = cut.within(scores, target, cost, at_least=at_least)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_parameters_of_members_of_one_program():
    """Under `jit` and `vmap`, with targets as data: within the budget, and one more is over it."""
    module = models.create("lenet5", kind=L1(), activation="tanh", gated=3)
    network = module.network((28, 28, 1))
    cost = channels.parameters(network)
    rng = np.random.default_rng(0)
    scores = {
        path: rng.uniform(0, 1, (3, n)).astype(np.float32)
        for path, n in channels.sizes(network).items()
    }
    targets = jnp.array([12_000, 6_000, 3_000])
    got = jax.jit(jax.vmap(lambda s, t: cut.within(s, t, cost, at_least=1)))(scores, targets)
    for index, target in enumerate(targets):
        kept = {path: mask[index] for path, mask in got.items()}
        count = int(channels.count(network, kept).parameters)
        values = {path: value[index] for path, value in scores.items()}
        closed = [
            (values[path][i], path, i)
            for path, mask in kept.items()
            for i in np.flatnonzero(~np.asarray(mask))
        ]
        _, path, i = max(closed)
        more = {**kept, path: kept[path].at[i].set(True)}
        assert count <= target < int(channels.count(network, more).parameters)


def test_everything_may_fit_and_nothing_may():
    scores = drawn(0, ties=False)
    whole = cut.within(scores, 12, budget.channels)
    assert all(mask.all() for mask in whole.values())
    none = cut.within(scores, 0, budget.channels)
    assert not any(mask.any() for mask in none.values())
    one = cut.within(scores, 0, budget.channels, at_least=1)
    assert {path: int(mask.argmax()) for path, mask in one.items()} == {
        path: int(np.argmax(value)) for path, value in scores.items()
    }
    assert all(mask.sum() == 1 for mask in one.values())


def test_bad_scores():
    with pytest.raises(ValueError, match="there are no channels"):
        cut.within({}, 1, budget.channels)
    with pytest.raises(ValueError, match="scores of 'a' are not finite"):
        cut.within({"a": np.array([1.0, np.nan])}, 1, budget.channels)
    with pytest.raises(ValueError, match="target is nan"):
        cut.within({"a": np.ones(2)}, np.nan, budget.channels)
    with pytest.raises(ValueError, match="at_least is -1"):
        cut.within({"a": np.ones(2)}, 1, budget.channels, at_least=-1)
