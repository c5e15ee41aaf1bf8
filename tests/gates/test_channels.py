"""Counts of what is left of a network, against hand counts and a network of positive numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse import models
from ntt_sparse.gates import budget, layer
from ntt_sparse.gates import channels as accounting
from ntt_sparse.gates.channels import Channels, Layer, Network
from ntt_sparse.gates.dam import Dam
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.models.preresnet import PreResNet
from ntt_sparse.models.vgg import Vgg

# Published denominators (conv, normalisation and dense; methods of Liu et al. 2017 and of
# Bu et al. 2021, Tables 5, 6), gates and gated channels.
WHOLE = [
    ("lenet5", 10, (28, 28, 1), 61_706, 4, 226),
    ("preresnet20", 100, (32, 32, 3), 242_612, 19, 1_360),
    ("preresnet56", 100, (32, 32, 3), 613_556, 55, 4_048),
    ("preresnet110", 10, (32, 32, 3), 1_146_842, 109, 8_080),
    ("preresnet110", 100, (32, 32, 3), 1_169_972, 109, 8_080),
    ("preresnet164", 10, (32, 32, 3), 1_703_258, 163, 12_112),
    ("preresnet164", 100, (32, 32, 3), 1_726_388, 163, 12_112),
    ("vgg19", 10, (32, 32, 3), 20_035_018, 16, 5_504),
    ("vgg19", 100, (32, 32, 3), 20_081_188, 16, 5_504),
]


@pytest.mark.parametrize(("name", "outputs", "shape", "count", "gates", "gated"), WHOLE)
def test_published_denominators(name, outputs, shape, count, gates, gated):
    module = models.create(name, num_outputs=outputs, kind=Dam())
    network = accounting.check(module.network(shape))
    whole = accounting.whole(network)
    assert (whole.parameters, whole.channels) == (count, gated)
    assert len(accounting.sizes(network)) == gates


@functools.cache
def small(name):
    """A small network of each family: module, input shape, description."""
    module, shape = {
        "lenet": (
            LeNet(3, ((2,), (3,)), 3, (4, 3), activation="relu", kind=Dam(), gated=3), (12, 12, 2)
        ),
        "preresnet": (PreResNet(3, 2, (2, 3), Dam()), (6, 6, 2)),
        "vgg": (Vgg(3, ((2, 3), (4,)), Dam()), (4, 4, 2)),
    }[name]  # fmt: skip
    return module, shape, accounting.check(module.network(shape))


def opened(network, seed, closed=0.5):
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(rng.random(n) >= closed) for path, n in accounting.sizes(network).items()
    }


class Binary:
    """Gates that are given: one or zero."""

    def init(self, n):
        return {"open": jnp.ones(n)}

    def values(self, params, n, *, ranks=None):
        return params["open"]

    def penalty(self, layers):
        return jnp.zeros(())


@pytest.mark.parametrize("name", ["lenet", "preresnet", "vgg"])
def test_what_counts_is_what_the_outputs_depend_on(name):
    """With all numbers positive, a weight has a derivative where it is on an open way.

    Zeros of normalised channels pass it on, as scales are one and shifts zero.
    """
    module, shape, network = small(name)
    module = module.clone(kind=Binary())
    x = jnp.ones((1, *shape))
    variables = module.init(jax.random.key(0), x)
    ones = jax.tree.map(lambda leaf: jnp.ones_like(leaf) / max(leaf.size, 1), variables["params"])

    def with_norms(path, leaf):
        last = path[-1].key
        return jnp.ones_like(leaf) if last == "scale" else 0 * leaf if last == "bias" else leaf

    params = jax.tree_util.tree_map_with_path(with_norms, ones)
    state = {key: value for key, value in variables.items() if key != "params"}

    @jax.jit
    def slopes(open_):
        gated = layer.replace(
            params, {path: {"open": mask.astype(float)} for path, mask in open_.items()}
        )
        return jax.grad(lambda p: jnp.sum(module.apply({"params": p, **state}, x)))(gated)

    weights = network._replace(
        channels={key: each._replace(parameters=0) for key, each in network.channels.items()}
    )
    count = jax.jit(lambda open_: accounting.count(weights, open_))
    for seed in range(12):
        open_ = opened(network, seed, 0.2 + 0.06 * seed)
        grads = slopes(open_)
        kernels = [
            np.count_nonzero(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
            if path[-1].key == "kernel"
        ]
        counts = count(open_)
        assert sum(kernels) == counts.parameters
        assert counts.channels == sum(int(mask.sum()) for mask in open_.values())


HAND = Network(
    {
        "input": Channels(2),
        "a": Channels(3, "a/gate", 1),
        "b": Channels(3, "b/gate"),
        "sum": Channels(3, sources=("a", "b")),
        "norm": Channels(3, None, 2, ("sum",)),
        "out": Channels(4, parameters=1),
    },
    (Layer("input", "a", 9, 5), Layer("a", "b", 1, 5), Layer("norm", "out", 2)),
)


@pytest.mark.parametrize(
    ("a", "b", "parameters", "multiply_adds"),
    [
        # 2x3x9 + 3x1, 3x3, 3x2, 3x4x2 + 4x1.
        ([1, 1, 1], [1, 1, 1], 57 + 9 + 6 + 28, 5 * 54 + 5 * 9 + 24),
        # One channel of a is left, and it feeds two of b; the sum has all three.
        ([1, 0, 0], [0, 1, 1], 19 + 2 + 6 + 28, 5 * 18 + 5 * 2 + 24),
        # b is closed: nothing reads a for it, but the sum does.
        ([1, 1, 0], [0, 0, 0], 38 + 0 + 4 + 20, 5 * 36 + 16),
        # Without a nothing reaches b, nor the output, which is its biases.
        ([0, 0, 0], [1, 1, 1], 4, 0),
    ],
)
def test_by_hand(a, b, parameters, multiply_adds):
    open_ = {"a/gate": jnp.array(a, bool), "b/gate": jnp.array(b, bool)}
    counts = accounting.count(accounting.check(HAND), open_)
    assert counts == (sum(a) + sum(b), parameters, multiply_adds)


@pytest.mark.parametrize("name", ["lenet", "preresnet"])
def test_closing_a_channel_never_costs_more(name):
    network = small(name)[2]
    cost = jax.jit(lambda open_: accounting.count(network, open_))
    open_ = opened(network, 0, 0.0)
    before = cost(open_)
    rng = np.random.default_rng(0)
    places = [(path, i) for path, n in accounting.sizes(network).items() for i in range(n)]
    for index in rng.permutation(len(places)):
        path, channel = places[index]
        open_[path] = open_[path].at[channel].set(False)
        after = cost(open_)
        assert all(new <= old for new, old in zip(after, before, strict=True))
        before = after
    # The biases of the outputs are left.
    assert before == (0, 3, 0)


def test_a_budget_of_parameters_and_multiply_adds():
    network = small("lenet")[2]
    sizes = accounting.sizes(network)
    offsets = dict.fromkeys(sizes, jnp.float32(1.0))
    for cost, whole in (
        (accounting.parameters(network), accounting.whole(network).parameters),
        (accounting.multiply_adds(network), accounting.whole(network).multiply_adds),
    ):
        state = budget.start(offsets)
        hold = jax.jit(functools.partial(_hold, network, 0.6 * whole, cost))
        for step in range(25):
            state = hold(state, jnp.float32(1.0 - 0.25 * step))
        left = {path: Dam().values({"beta": beta}, sizes[path]) > 0 for path, beta in
                state.offsets.items()}  # fmt: skip
        assert all(state.reached.values())
        assert cost(left) <= 0.6 * whole
        more = []
        for path, open_ in left.items():
            wider = {**left, path: open_.at[jnp.argmax(open_) - 1].set(True)}
            more.append(int(cost(wider)))
        assert max(more) > 0.6 * whole


def _hold(network, target, cost, state, offset):
    sizes = accounting.sizes(network)
    return budget.hold(state, dict.fromkeys(sizes, offset), sizes, target, cost=cost)


def test_numbers_beyond_int32():
    huge = Network(
        {"input": Channels(3), "a": Channels(1000, "a/gate"), "out": Channels(10)},
        (Layer("input", "a", 49, 10**5), Layer("a", "out", 1, 10**6)),
    )
    open_ = {"a/gate": jnp.ones(1000, bool)}
    counts = accounting.count(huge, open_)
    assert counts.parameters.dtype == jnp.int32
    assert counts.multiply_adds.dtype == jnp.float32
    np.testing.assert_allclose(counts.multiply_adds, 3 * 1000 * 49 * 1e5 + 1e4 * 1e6, rtol=1e-6)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (HAND._replace(layers=HAND.layers[1:]), "0 layers write 'a', expected 1"),
        (HAND._replace(layers=(*HAND.layers, Layer("input", "b"))), "2 layers write 'b'"),
        (HAND._replace(layers=(*HAND.layers, Layer("c", "b"))), "but 'c' is none"),
        (HAND._replace(layers=(Layer("sum", "a"), *HAND.layers[1:])), "reads what comes later"),
        (
            HAND._replace(channels={**HAND.channels, "sum": Channels(2, sources=("a", "b"))}),
            "'sum' is the sum of",
        ),
        (
            HAND._replace(channels={**HAND.channels, "b": Channels(3, "a/gate")}),
            "each on one set",
        ),
        (
            Network({"input": Channels(2), "a": Channels(1, "a/gate")}, (Layer("input", "a"),)),
            "'a' has a gate on 1 channel",
        ),
    ],
)
def test_descriptions_that_do_not_fit(network, message):
    with pytest.raises(ValueError, match=message):
        accounting.check(network)


def test_gates_that_do_not_fit():
    for wrong, message in (
        (jnp.ones((3, 1), bool), "open channels are of gates and shapes"),
        (jnp.ones(3), "open channels are float32, expected booleans"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            accounting.used.__wrapped__(HAND, {"a/gate": wrong, "b/gate": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match="open channels are of gates"):
        accounting.count(HAND, {"a/gate": jnp.ones(3, bool)})
    ungated = PreResNet(3, 1, (2,)).network((4, 4, 1))
    with pytest.raises(ValueError, match="no gates"):
        accounting.sizes(ungated)
    assert accounting.whole(ungated).channels == 0
