"""Counts of what is left of a network, against hand counts and a network of positive numbers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from ntt_sparse import models
from ntt_sparse.gates import budget, layer, network_text
from ntt_sparse.gates import channels as accounting
from ntt_sparse.gates import network as graph
from ntt_sparse.gates.chipnet import ChipNet
from ntt_sparse.gates.dam import Dam
from ntt_sparse.gates.network import Conv, Network
from ntt_sparse.gates.slimming import Slimming
from ntt_sparse.models.activations import ACTIVATIONS
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
    network = graph.check(module.network(shape))
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
    return module, shape, graph.check(module.network(shape))


def opened(network, seed, closed=0.5):
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(rng.random(n) >= closed) for path, n in accounting.sizes(network).items()
    }


@pytest.mark.parametrize("name", ["lenet", "preresnet", "vgg"])
def test_numpy_finds_what_jax_does(name):
    """With weights of zero as well, where a network has them."""
    _, _, network = small(name)
    rng = np.random.default_rng(5)
    shapes = graph.shapes(network)
    connected = {
        key: rng.random((shapes[node.input][-1], node.channels)) < 0.7
        for key, node in network.nodes.items()
        if isinstance(node, Conv)
    }
    both = jax.jit(
        lambda open_, connected: (
            accounting.ways(network, open_, connected=connected),
            accounting.count(network, open_, connected=connected),
        )
    )
    open_ = {path: np.asarray(mask) for path, mask in opened(network, 3, 0.3).items()}
    ways, count = both(open_, connected)
    host = accounting.ways(network, open_, connected=connected)
    jax.tree.map(np.testing.assert_array_equal, host, ways)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))
    found = accounting.count(network, open_, connected=connected)
    assert found == count and {type(number) for number in found} == {int}


@pytest.mark.parametrize(
    ("connected", "message"),
    [
        ({"Conv_9": np.ones((2, 2), bool)}, "connected has 'Conv_9', expected names of"),
        ({"Conv_0": np.ones((2, 1), bool)}, r"bool of shape \(2, 1\), expected .* \(2, 2\)"),
        ({"Conv_0": np.ones((2, 2), np.int8)}, "int8 of shape .*, expected booleans"),
    ],
)
def test_what_does_not_connect_the_network(connected, message):
    _, _, network = small("lenet")
    # Type checks of the tests are before the function's own.
    with pytest.raises((ValueError, TypeCheckError), match=rf"{message}|Parameter annotations"):
        accounting.used(network, opened(network, 0), connected=connected)


class Binary:
    """Gates that are given: one or zero."""

    place = "layer"

    def init(self, n):
        return {"open": jnp.ones(n)}

    def values(self, params, n, *, ranks=None):
        return params["open"]

    def penalty(self, layers):
        return jnp.zeros(())


@pytest.mark.variants(2)
@pytest.mark.parametrize("name", ["lenet", "vgg", "preresnet"])
def test_what_counts_is_what_the_outputs_depend_on(name):
    """With all numbers positive, a weight has a derivative where it is on an open way.

    Zeros of normalised channels pass it on, as scales are one and shifts zero.
    """
    module, shape, network = small(name)
    module = module.clone(kind=Binary())
    x = jnp.ones((1, *shape))
    variables = jax.jit(module.init)(jax.random.key(0), x)
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

    def rest(left):
        """Parameters besides kernels: biases, scales and shifts."""
        total = 0
        for key, node in network.nodes.items():
            number = int(jnp.sum(left[key]))
            total += (
                2 * number if isinstance(node, graph.Norm) else number * getattr(node, "bias", 0)
            )
        return total

    count = jax.jit(lambda open_: accounting.count(network, open_))
    for seed in range(12):
        open_ = opened(network, seed, 0.2 + 0.06 * seed)
        grads = slopes(open_)
        kernels = [
            np.count_nonzero(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
            if path[-1].key == "kernel"
        ]
        counts = count(open_)
        assert sum(kernels) == counts.parameters - rest(accounting.used(network, open_))
        assert counts.channels == sum(int(mask.sum()) for mask in open_.values())


def hand_made(gates=("a/gate", "b/gate")):
    """Layers of 9 and 1 weights between channels on 5 positions, summed, normalised, read by 2."""
    build = graph.Builder((5, 1, 2))
    a = build(Conv("input", 3, 3, 1, (1, 1), bias=True, gate=gates[0]), "a")
    b = build(Conv(a, 3, 1, gate=gates[1]), "b")
    norm = build(graph.Norm(build(graph.Add((a, b)), "sum")), "norm")
    build(graph.Dense(norm, 4), "out")
    return build.nodes


HAND = Network(hand_made())


@pytest.mark.parametrize(
    ("a", "b", "parameters", "multiply_adds"),
    [
        # 2x3x9 + 3x1, 3x3, 3x2, 3x4x5 + 4x1.
        ([1, 1, 1], [1, 1, 1], 57 + 9 + 6 + 64, 5 * 54 + 5 * 9 + 60),
        # One channel of a is left, and it feeds two of b; the sum has all three.
        ([1, 0, 0], [0, 1, 1], 19 + 2 + 6 + 64, 5 * 18 + 5 * 2 + 60),
        # b is closed: nothing reads a for it, but the sum does.
        ([1, 1, 0], [0, 0, 0], 38 + 0 + 4 + 44, 5 * 36 + 40),
        # Without a nothing reaches b, nor the output, which is its biases.
        ([0, 0, 0], [1, 1, 1], 4, 0),
    ],
)
def test_by_hand(a, b, parameters, multiply_adds):
    open_ = {"a/gate": jnp.array(a, bool), "b/gate": jnp.array(b, bool)}
    counts = accounting.count(graph.check(HAND), open_)
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
    return budget.hold(state, dict.fromkeys(sizes, offset), sizes, target, kind=Dam(), cost=cost)


def test_numbers_beyond_int32():
    build = graph.Builder((2000, 1000, 3))
    y = build(Conv("input", 1000, 7, 10, (3, 3), gate="a/gate"), "a")
    build(Conv(y, 10, 1), "out")
    open_ = {"a/gate": jnp.ones(1000, bool)}
    counts = accounting.count(build.network(), open_)
    assert counts.parameters.dtype == jnp.int32
    assert counts.multiply_adds.dtype == jnp.float32
    np.testing.assert_allclose(counts.multiply_adds, (3 * 1000 * 49 + 1e4) * 2e4, rtol=1e-6)
    exact = accounting.count(build.network(), {"a/gate": np.ones(1000, bool)})
    assert exact.multiply_adds == (3 * 1000 * 49 + 10_000) * 20_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": Conv("c", 3, 3)}, "'a' reads 'c', expected a node before it"),
        ({"a": Conv("sum", 3, 3)}, "'a' reads 'sum', expected a node before it"),
        ({"b": Conv("a", 2, 1)}, "'sum', .*, does not fit 'a' of .*: expected nodes of one shape"),
        ({"b": Conv("a", 3, 1, gate="a/gate")}, "gates are .*, expected each on one node"),
        ({"a": Conv("input", 3, 9)}, "'a', .*, has shape .*, expected sizes above 0"),
        ({"norm": graph.Norm("sum", 2)}, "3 channels in 2 groups"),
        ({"sum": graph.Reshape("b", (15,))}, "that as the last node alone"),
        ({"sum": graph.Select("b", (0, 3, 1))}, "expected growing places among 3"),
        ({"sum": graph.Embed("b", (0, 2), 4)}, "2 places"),
        ({"sum": graph.Shift("b", (2, 2), (1,))}, "a constant of 4 x 1 positions"),
        ({"sum": graph.Subsample("b", 2, 1)}, "3 channels among 2"),
        ({"b": graph.Input((2,))}, "'b' is another input"),
        ({"b": Conv("a", 3, 1, 0)}, "has stride 0, which makes no sense"),
        ({"norm": graph.Norm("sum", -1)}, "has groups -1"),
        ({"sum": graph.Activation("b", "exec")}, "has function 'exec'"),
        ({"sum": graph.Dropout("b", 1.0)}, "has rate 1.0"),
        ({"sum": graph.Shift("b", (-1, 6), (1,))}, "has rows"),
        ({"out": graph.Reshape("norm", (4, 4))}, "15 numbers in 16"),
    ],
)
def test_descriptions_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        graph.check(Network({**HAND.nodes, **change}))


def test_a_gate_on_one_channel():
    build = graph.Builder((2,))
    build(graph.Dense("input", 1, gate="a/gate"), "a")
    with pytest.raises(ValueError, match="'a' has a gate on 1 channel"):
        build.network()
    with pytest.raises(ValueError, match="expected the input first"):
        graph.check(Network({}))


def test_descriptions_know_the_activations_there_are():
    assert set(graph.ACTIVATION_NAMES) == set(ACTIVATIONS)


def test_names_and_order_matter():
    build = graph.Builder((2,))
    build(graph.Dense("input", 3), "a")
    with pytest.raises(ValueError, match="two nodes are named 'a'"):
        build(graph.Dense("input", 3), "a")
    build(graph.Dense("input", 3), "b")
    nodes = build.nodes
    swapped = Network({name: nodes[name] for name in ("input", "b", "a")})
    assert swapped != build.network() and build.network() == Network(dict(nodes))


@pytest.mark.parametrize("name", ["lenet", "preresnet", "vgg"])
def test_descriptions_as_text(name):
    network = small(name)[2]
    again = network_text.from_json(network_text.to_json(network))
    assert again == network and hash(again) == hash(network)


def test_text_of_before_has_the_epsilon_of_before():
    nodes = {"a": {"node": "Input", "shape": [4]}}
    nodes["b"] = {"node": "Norm", "input": "a", "groups": 2, "gate": None}
    network = network_text.from_json(json.dumps(nodes))
    assert network.nodes["b"] == graph.Norm("a", 2, epsilon=1e-5)
    for epsilon in (0.0, -1e-5, float("nan"), float("inf")):
        nodes["b"]["epsilon"] = epsilon
        with pytest.raises(ValueError, match=f"has epsilon {epsilon}, which makes no sense"):
            network_text.from_json(json.dumps(nodes))


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"a": 3}', '{"a": {"node": "Lambda"}}', '{"a": {"node": "Input"}}',
             '{"a": {"node": "Input", "shape": [2], "code": 1}}',
             '{"a": {"node": "Input", "shape": "ab"}}', "[" * 100_000,
             '{"a": {"node": "Input", "shape": [2.5]}}',
             '{"a": {"node": "Input", "shape": [4]}, '
             '"b": {"node": "Dense", "input": "a", "channels": "x"}}',
             '{"a": {"node": "Input", "shape": [9, 9, 1]}, "b": {"node": "Conv", "input": "a", '
             '"channels": 1, "size": 1, "padding": [1, 1, 1]}}',
             '{"a": {"node": "Pool", "input": "a"}}'],
)  # fmt: skip
def test_text_that_describes_nothing(text):
    with pytest.raises(ValueError, match="describes no network"):
        network_text.from_json(text)


def test_gates_that_do_not_fit():
    for wrong, message in (
        (jnp.ones((3, 1), bool), "channels are of gates and shapes"),
        (jnp.ones(3), "open channels are float32, expected booleans"),
    ):
        with pytest.raises(ValueError, match=message):
            accounting.used(HAND, {"a/gate": wrong, "b/gate": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match="channels are of gates"):
        accounting.count(HAND, {"a/gate": jnp.ones(3, bool)})
    ungated = PreResNet(3, 1, (2,)).network((4, 4, 1))
    with pytest.raises(ValueError, match="no gates"):
        accounting.sizes(ungated)
    assert accounting.whole(ungated).channels == 0


@pytest.mark.parametrize("kind", [Dam(), Slimming(), ChipNet()])
@pytest.mark.parametrize("name", ["lenet", "preresnet", "vgg"])
def test_soft_fractions_of_crisp_gates(name, kind):
    """They are the exact counts where one channel of each layer is open."""
    module, shape, _ = small(name)
    network = module.clone(kind=kind).network(shape)
    whole = accounting.whole(network)
    rng = np.random.default_rng(3)
    gates = {}
    for path, n in accounting.sizes(network).items():
        open_ = rng.random(n) < 0.6
        open_[0] = True
        gates[path] = jnp.asarray(open_)
    crisp = accounting.soft_fractions(network, {k: v.astype(float) for k, v in gates.items()})
    counts = accounting.count(network, gates)
    for key in ("channels", "parameters", "multiply_adds"):
        expected = getattr(counts, key) / getattr(whole, key)
        np.testing.assert_allclose(crisp[key], expected, rtol=1e-5)
    assert 0 < crisp["volume"] < 1


def test_soft_fractions_by_hand_and_by_differences():
    a, b = jnp.array([1.0, 0.5, 0.0]), jnp.array([0.25, 0.75, 0.0])
    soft = accounting.soft_fractions(HAND, {"a/gate": a, "b/gate": b})
    # a: 1.5 of 3, b: 1 of 3; of the sum the most of both, 1 + 0.75.
    parameters = 1.5 * 18 + 1.5 + 1.5 * 1 + 1.75 * 2 + 1.75 * 20 + 4
    np.testing.assert_allclose(soft["parameters"], parameters / 136, rtol=1e-6)
    np.testing.assert_allclose(soft["channels"], 2.5 / 6, rtol=1e-6)
    np.testing.assert_allclose(soft["volume"], 2.5 / 6, rtol=1e-6)
    adds = 5 * (1.5 * 18 + 1.5) + 1.75 * 20
    np.testing.assert_allclose(soft["multiply_adds"], adds / (5 * 63 + 60), rtol=1e-6)

    def parameters_of(first):
        gates = {"a/gate": a.at[0].set(first), "b/gate": b}
        return accounting.soft_fractions(HAND, gates)["parameters"]

    slope = jax.grad(parameters_of)(0.9)
    np.testing.assert_allclose(slope, (parameters_of(0.95) - parameters_of(0.85)) / 0.1, rtol=1e-3)
