"""Budgets: pruning stops at exactly the target."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntt_sparse.gates import budget, dam, layer, order

SIZES = {"a": 8, "b": 5, "c": 16}
DAM = dam.Dam()
# XLA flushes subnormal numbers.
OFFSETS = st.floats(-7, 1, width=32, allow_subnormal=False)


def open_channels(offsets, sizes=SIZES, ranks=None):
    ranks = ranks or {}
    return {
        name: np.asarray(dam.gate(offsets[name], n, ranks=ranks.get(name))) > 0
        for name, n in sizes.items()
    }


def count(offsets, sizes=SIZES):
    return sum(int(np.sum(layer)) for layer in open_channels(offsets, sizes).values())


def weights(open_):
    """A chain of dense layers, from 10 inputs to 3 outputs."""
    a, b, c = (jnp.sum(open_[name], dtype=jnp.int32) for name in "abc")
    return 10 * a + a * b + b * c + 3 * c


# One program for all examples.
hold = jax.jit(
    lambda state, moved, target: budget.hold(state, moved, SIZES, target, keep=0, kind=DAM)
)


def starting(value=1.0):
    return budget.start(dict.fromkeys(SIZES, jnp.float32(value)))


def moved(*values):
    return dict(zip(SIZES, map(jnp.float32, values), strict=True))


def test_until_the_target_offsets_move_freely():
    held = budget.hold(starting(), moved(0.5, -1.0, -2.0), SIZES, 10, kind=DAM)
    assert held.offsets == moved(0.5, -1.0, -2.0)
    assert not any(map(bool, held.reached.values()))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(OFFSETS, min_size=3, max_size=3),
    st.lists(OFFSETS, min_size=3, max_size=3),
    st.integers(1, 28),
)
def test_one_step_never_overshoots(first, second, target):
    """Whatever the step: at the target, not below it, and each offset between its ends."""
    state = hold(starting(), moved(*first), target)
    for values in (second, [-6.0] * 3):
        before, goal = state, moved(*values)
        state = hold(before, goal, target)
        if count(before.offsets) > target:
            reached = count(goal) <= target
            assert all(bool(value) == reached for value in state.reached.values())
            assert count(state.offsets) == (target if reached else count(goal))
        for name in SIZES:
            low, high = sorted([float(before.offsets[name]), float(goal[name])])
            assert low <= float(state.offsets[name]) <= high
    assert count(state.offsets) == target


@pytest.mark.parametrize("keep", [1, 2])
def test_some_channels_of_each_layer_stay(keep):
    """Whatever the offsets do: those of the highest order, until the target and after it."""
    state = starting()
    for goal in ((-9.0, 0.5, 0.5), (-9.0, -7.0, 0.0), (-9.0, -9.0, -9.0)):
        state = budget.hold(state, moved(*goal), SIZES, 3 * keep, keep=keep, kind=DAM)
        left = open_channels(state.offsets)
        assert all(np.all(open_[-keep:]) for open_ in left.values())
        assert int(np.sum(left["a"])) == keep
    assert count(state.offsets) == 3 * keep and all(map(bool, state.reached.values()))


def test_what_is_kept_costs_what_its_order_says():
    """Channels of unequal cost: with the order turned round the cheap ones are kept."""
    ranks = {"a": jnp.arange(SIZES["a"])[::-1]}

    def cost(open_):
        return jnp.sum(open_["a"] * jnp.arange(1, 9)) + jnp.sum(open_["b"]) + jnp.sum(open_["c"])

    state = budget.hold(starting(), moved(-9, -9, -9), SIZES, 3, cost=cost, ranks=ranks, kind=DAM)
    assert all(map(bool, state.reached.values()))
    with pytest.raises(ValueError, match=r"is 9, .* 10 or more"):
        budget.hold(starting(), moved(-9, -9, -9), SIZES, 9, cost=cost, kind=DAM)


def test_an_offset_that_starts_beyond_its_target_stays():
    state = budget.start(dict.fromkeys(SIZES, jnp.float32(-4.0)))
    state = budget.hold_layers(
        state, moved(-4.1, -4.1, -4.1), SIZES, {"a": 7, "b": 4, "c": 15}, kind=DAM
    )
    assert all(float(beta) == -4.0 for beta in state.offsets.values())


def test_what_is_kept_depends_on_the_order():
    ranks = {"a": jnp.arange(SIZES["a"])[::-1]}
    state = budget.hold(starting(), moved(-9, -9, -9), SIZES, 4, keep=1, ranks=ranks, kind=DAM)
    values = dam.Dam().values({"beta": state.offsets["a"]}, SIZES["a"], ranks=ranks["a"])
    assert values[0] > 0


def test_layers_that_move_alike_are_cut_one_by_one():
    """Ties: many channels close at the same instant."""
    sizes = {f"l{i}": 4 for i in range(5)}
    state = budget.start(dict.fromkeys(sizes, jnp.float32(1)))
    state = budget.hold(state, dict.fromkeys(sizes, jnp.float32(-2.6)), sizes, 13, kind=DAM)
    assert count(state.offsets, sizes) == 13
    assert sorted(int(np.sum(v)) for v in open_channels(state.offsets, sizes).values()) == [
        2, 2, 3, 3, 3,
    ]  # fmt: skip


@pytest.mark.parametrize("target", [20, 77, 150, 200])
def test_other_costs_end_within_a_channel(target):
    """Without the last channel that was closed it would still be too much."""
    state = budget.hold(starting(), moved(-4.4, -4.2, -4.7), SIZES, target, cost=weights, kind=DAM)
    open_ = open_channels(state.offsets)
    assert weights(open_) <= target and all(map(bool, state.reached.values()))
    more = []
    for name, channels in open_.items():
        closed = np.flatnonzero(~channels)
        if len(closed):
            again = channels.copy()
            again[closed[-1]] = True
            more.append(int(weights({**open_, name: again})))
    assert max(more) > target


def test_after_the_target_nothing_moves():
    state = budget.hold(starting(), moved(-3.0, -3.0, -3.0), SIZES, 20, kind=DAM)
    later = budget.hold(state, moved(-4.0, 2.0, -5.0), SIZES, 20, kind=DAM)
    assert later.offsets == state.offsets and all(map(bool, later.reached.values()))


def test_orders_are_honoured():
    ranks = {"a": order.random(jax.random.key(0), 8)}
    state = budget.hold(starting(), moved(-3.0, 1.0, 1.0), SIZES, 26, ranks=ranks, kind=DAM)
    open_ = open_channels(state.offsets, ranks=ranks)
    assert np.flatnonzero(~open_["a"]).tolist() == np.flatnonzero(ranks["a"] < 3).tolist()


@pytest.mark.parametrize("n", [50, 120, 300])
def test_a_compiled_network_has_exactly_the_target(n):
    """The gates of a compiled layer, with an order among its variables, after a compiled step."""
    ranks = order.random(jax.random.key(1), n)
    gate = layer.Gate()

    @jax.jit
    def width(target):
        state = budget.start({"gate": jnp.float32(1)})
        state = budget.hold(state, {"gate": jnp.float32(-6)}, {"gate": n}, target, ranks={
            "gate": ranks
        }, kind=DAM)  # fmt: skip
        return state.offsets["gate"], state.reached["gate"]

    @jax.jit
    def open_gates(beta, ranks):
        variables = {"params": {"beta": beta}, layer.STATE: {"ranks": ranks}}
        return jnp.sum(gate.apply(variables, n=n) > 0)

    targets = list(range(1, n, 7))
    for target in targets:
        beta, reached = width(target)
        assert reached and open_gates(beta, ranks) == target


def test_ties_are_broken_by_the_order_of_channels():
    """Offsets that jump: the lowest channel first, wherever it is."""
    sizes, ranks = {"a": 4, "b": 4}, {"a": jnp.array([3, 2, 1, 0])}
    state = budget.start(dict.fromkeys(sizes, jnp.float32(1)))
    goal = {"a": jnp.float32(-1e30), "b": jnp.float32(1)}
    state = budget.hold(state, goal, sizes, 6, ranks=ranks, kind=DAM)
    assert open_channels(state.offsets, sizes, ranks)["a"].tolist() == [True, True, False, False]


def test_what_is_not_finite_is_left_to_be_seen():
    state = budget.hold(starting(), moved(float("nan"), -3.0, -3.0), SIZES, 20, kind=DAM)
    assert np.isnan(state.offsets["a"]) and not any(map(bool, state.reached.values()))


def test_a_budget_can_be_carried_by_a_loop(x64):
    """In the dtype of the offsets, also where others are wider."""

    def step(state, _):
        goal = {name: beta - 0.3 for name, beta in state.offsets.items()}
        state = budget.hold(state, goal, SIZES, 12, kind=DAM)
        return budget.hold_layers(
            state, state.offsets, SIZES, {"a": 1, "b": 1, "c": 1}, kind=DAM
        ), None

    state, _ = jax.lax.scan(step, starting(), None, length=20)
    assert state.offsets["a"].dtype == jnp.float32
    assert count(state.offsets) == 12


def test_members_of_one_program():
    """Traced offsets and targets, each member its own."""
    goals = jnp.array([[-3.0, -3.0, -3.0], [0.5, 0.5, 0.5]], jnp.float32)
    targets = jnp.array([15, 15])

    def one(goal, target):
        return budget.hold(starting(), dict(zip(SIZES, goal, strict=True)), SIZES, target, kind=DAM)

    states = jax.jit(jax.vmap(one))(goals, targets)
    assert states.reached["a"].tolist() == [True, False]
    for index in range(2):
        alone = budget.hold(starting(), moved(*goals[index].tolist()), SIZES, 15, kind=DAM)
        for name in SIZES:
            np.testing.assert_array_equal(states.offsets[name][index], alone.offsets[name])


@pytest.mark.parametrize("k", [2.0, 20.0])
def test_the_target_is_that_of_the_gates_that_are_given(k):
    """Order numbers of another range close other channels: those of `Dam()` would close all."""
    kind, sizes = dam.Dam(k=k), {"a": 10, "b": 10}
    state = budget.start(dict.fromkeys(sizes, jnp.float32(1)))
    for offset in np.linspace(1, -k, 40):
        state = budget.hold(state, dict.fromkeys(sizes, jnp.float32(offset)), sizes, 12, kind=kind)
    left = [int(dam.active(beta, 10, k=k)) for beta in state.offsets.values()]
    assert all(map(bool, state.reached.values())) and sum(left) == 12 and min(left) > 0


@pytest.mark.parametrize(
    "hold, target", [(budget.hold, 9), (budget.hold_layers, dict.fromkeys(SIZES, 2))]
)
def test_the_gates_are_no_default(hold, target):
    with pytest.raises(TypeError, match=r"missing .* 'kind'"):
        hold(starting(), moved(0, 0, 0), SIZES, target)


@pytest.mark.parametrize("convention", ["paper", "code"])
def test_budgets_of_layers(convention):
    kind = dam.Dam(convention=convention)
    targets = {"a": 1, "b": 3, "c": 9}
    state = starting()
    for offset in (-0.5, -2.2, -4.4, -6.0):
        state = budget.hold_layers(
            state, dict.fromkeys(SIZES, jnp.float32(offset)), SIZES, targets, kind=kind
        )
        for name, n in SIZES.items():
            left = int(np.count_nonzero(kind.values({"beta": state.offsets[name]}, n)))
            assert left >= targets[name]
            assert bool(state.reached[name]) == (left == targets[name])
    assert all(map(bool, state.reached.values()))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: budget.hold(starting(), moved(0, 0, 0), SIZES, 0, kind=DAM),
            "more than 0, 3 or more",
        ),
        (lambda: budget.hold(starting(), moved(0, 0, 0), SIZES, 29, kind=DAM), "is 29, expected"),
        (lambda: budget.hold(starting(), moved(0, 0, 0), SIZES, float("nan"), kind=DAM), "is nan"),
        (
            lambda: budget.hold(starting(), {"a": jnp.float32(0)}, SIZES, 5, kind=DAM),
            "offsets are of",
        ),
        (lambda: budget.hold(starting(), moved(0, 0, 0), {"a": 8}, 5, kind=DAM), "offsets are of"),
        (
            lambda: budget.hold_layers(
                starting(), moved(0, 0, 0), SIZES, {"a": 8, "b": 1, "c": 1}, kind=DAM
            ),
            "target of 'a' is 8 channels, expected 1 to 7",
        ),
        (
            lambda: jax.jit(lambda m: budget.hold(starting(), m, SIZES, 99, kind=DAM))(
                moved(0, 0, 0)
            ),
            "is 99, expected .* and less than 29",
        ),
        (
            lambda: budget.hold(
                starting(), moved(0, 0, 0), SIZES, 9, ranks={"A": jnp.arange(8)}, kind=DAM
            ),
            r"ranks are for \['A'\]",
        ),
        (lambda: budget.hold(starting(), moved(0, 0, 0), SIZES, 2, kind=DAM), "is 2, .* 3 or more"),
        (
            lambda: budget.hold(starting(), moved(0, 0, 0), SIZES, 9, keep=5, kind=DAM),
            "keep is 5, .* 0 to 4",
        ),
        (lambda: budget.start({}), "no offsets"),
        (lambda: budget.hold(budget.Budget({}, {}), {}, {}, 1, kind=DAM), "there are no layers"),
        (lambda: budget.start({"a": jnp.zeros(2)}), "the offset of 'a' is"),
        (lambda: budget.start({"a": jnp.bfloat16(1)}), "'a' is bfloat16, .* float32 or wider"),
        (
            lambda: inspect.unwrap(budget.start)({"a": 1}),
            r"'a' is int32\(\), expected one floating-point number",
        ),
        (
            lambda: budget.hold_layers(starting(), moved(0, 0, 0), SIZES, {"a": 0}, kind=DAM),
            "targets are for",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
