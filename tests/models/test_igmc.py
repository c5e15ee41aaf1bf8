"""IGMC against a graph network by hand in float64, over all nodes and directed edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.gates.dam import Dam
from ntt_sparse.models import igmc
from ntt_sparse.models.igmc import Igmc, RelationalConv

WIDTHS, CODE = (5, 4, 3), 6


def made(num_levels, pairs=3, seed=0):
    """Subgraphs of a few pairs side by side, with padding: what a network takes."""
    rng = np.random.default_rng(seed)
    labels, partners, levels, targets, edges = [], [], [], [], []
    for pair in range(pairs):
        users, items = rng.integers(0, 5, 2) if pair else (0, 0)
        first = len(labels)
        targets.append((first, first + 1))
        labels += [0, 1, *[2] * users, *[3] * items]
        partners += [2 * pairs] * 2 + [2 * pair + 1] * users + [2 * pair] * items
        levels += [0, 0, *rng.integers(0, num_levels, users + items)]
        edges += [
            (first + 2 + a, first + 2 + users + b, rng.integers(0, num_levels))
            for a in range(users)
            for b in range(items)
            if rng.uniform() < 0.6
        ]
    padding = 4
    labels += [0] * padding
    partners += [2 * pairs] * padding
    levels += [1] * padding
    edges += [(len(labels), len(labels), 0)] * 3
    columns = (np.array(column, np.int32) for column in zip(*edges, strict=True))
    arrays = (np.array(values, np.int32) for values in (labels, partners, levels))
    return (*map(jnp.asarray, arrays), tuple(map(jnp.asarray, columns)), jnp.asarray(targets))


def directed(graphs):
    """All edges in both directions: `[(from, to, level)]`."""
    _, partners, levels, edges, targets = jax.device_get(graphs)
    nodes = targets.reshape(-1)
    both = [
        (nodes[partner], node, level)
        for node, (partner, level) in enumerate(zip(partners, levels, strict=True))
        if partner < len(nodes)
    ]
    both += [edge for edge in zip(*edges, strict=True) if edge[0] < len(partners)]
    return [(a, b, r) for a, b, r in both] + [(b, a, r) for a, b, r in both]


def by_hand(params, graphs):
    """Ratings and codes before gates: Eq. 1, 3 and 4 of the paper, message by message."""
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, float), params)
    labels, *_, targets = jax.device_get(graphs)
    x, states = np.eye(4)[labels], []
    for number in range(len(WIDTHS)):
        layer = tree[f"convs_{number}"]
        weights = np.einsum("rb,bio->rio", layer["mixing"], layer["basis"])
        y = x @ layer["root"] + layer["bias"]
        for source, target, level in directed(graphs):
            y[target] += x[source] @ weights[level]
        x = np.tanh(y)
        states.append(x)
    everything = np.concatenate(states, axis=1)
    joined = np.concatenate([everything[targets[:, 0]], everything[targets[:, 1]]], axis=1)
    code = np.maximum(joined @ tree["dense"]["kernel"] + tree["dense"]["bias"], 0)
    if "gate" in tree:
        mu = 5 * np.arange(1, CODE + 1) / CODE
        code = code * np.maximum(np.tanh(mu + tree["gate"]["beta"]), 0)
    return (code @ tree["readout"]["kernel"] + tree["readout"]["bias"])[:, 0], code


def network(num_levels, **fields):
    return Igmc(num_levels, WIDTHS, bases=2, code=CODE, **fields)


def double(params):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params)


def drawn(module, *arguments, seed=0):
    """Parameters of the right shapes, without compiling how they start."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape)), shapes)


@pytest.fixture(scope="module")
def start():
    """Few levels, for which messages come from tables, and many, for which they do not."""
    found = {}
    for num_levels in (2, 40):
        graphs, module = made(num_levels), network(num_levels)
        found[num_levels] = drawn(module, *graphs) | {"gate": {"beta": jnp.ones(())}}
    return found


@pytest.mark.parametrize(
    ("beta", "num_levels"),
    [
        (1.0, 2),
        (-2.0, 40),
        (None, 2),
        pytest.param(1.0, 40, marks=pytest.mark.slow),
        pytest.param(-2.0, 2, marks=pytest.mark.slow),
        pytest.param(None, 40, marks=pytest.mark.slow),
    ],
)
def test_ratings_by_hand(x64, start, num_levels, beta):
    params = double(start[num_levels])
    graphs = made(num_levels)
    if beta is None:
        params = {name: leaf for name, leaf in params.items() if name != "gate"}
        module = network(num_levels)
    else:
        params["gate"] = {"beta": jnp.asarray(beta)}
        module = network(num_levels, kind=Dam())
    ratings, code = by_hand(params, graphs)
    apply = jax.jit(
        lambda params: (
            module.apply({"params": params}, *graphs),
            module.apply({"params": params}, *graphs, method="embed"),
        )
    )
    found = apply(params)
    np.testing.assert_allclose(found[0], ratings, rtol=1e-9)
    np.testing.assert_allclose(found[1], code, rtol=1e-9)
    opened = igmc.open_gates(module, params)
    assert int(opened.sum()) == {1.0: 6, -2.0: 4, None: 6}[beta]
    assert np.all(found[1][:, ~opened] == 0)


def test_ratings_of_one_layer(x64):
    """The first layer is the last: shared states, and messages to targets alone."""
    graphs = made(2)
    module = Igmc(2, WIDTHS[:1], bases=2, code=CODE)
    params = double(drawn(module, *graphs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "WIDTHS", WIDTHS[:1])
        expected, _ = by_hand(params, graphs)
    found = jax.jit(module.apply)({"params": params}, *graphs)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_layer_gives_the_states_of_all_nodes(x64):
    """Also those that the network never looks at, from states of their own."""
    graphs = made(3)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(len(graphs[0]), 4)))
    layer = RelationalConv(5, 3, 2)
    users, items, between = graphs[3]
    both = [jnp.concatenate(pair) for pair in ((items, users), (users, items), (between, between))]
    nodes = graphs[4].reshape(-1)
    paths = igmc.Paths(nodes, graphs[2], graphs[1], graphs[1], *both)
    params = double(drawn(layer, x, paths))
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, float), params)
    expected = np.asarray(x) @ tree["root"] + tree["bias"]
    for source, target, level in directed(graphs):
        weights = np.einsum("b,bio->io", tree["mixing"][level], tree["basis"])
        expected[target] += np.asarray(x)[source] @ weights
    apply = jax.jit(layer.apply, static_argnames="targets_only")
    np.testing.assert_allclose(apply({"params": params}, x, paths), expected, rtol=1e-9)
    few = apply({"params": params}, x, paths, targets_only=True)
    np.testing.assert_allclose(few, expected[np.asarray(nodes)], rtol=1e-9)


def test_a_pair_is_rated_alike_in_any_batch(start):
    """Subgraphs do not touch each other, and padding touches none."""
    labels, partners, levels, edges, targets = jax.device_get(made(2))
    module = network(2, kind=Dam())
    apply = jax.jit(lambda *graphs: module.apply({"params": start[2]}, *graphs))
    together = apply(*made(2))
    first, stop = int(targets[2, 0]), len(labels) - 4
    inside = (edges[0] >= first) & (edges[0] < stop)
    alone = apply(
        labels[first:stop],
        np.where(partners[first:stop] < 6, partners[first:stop] - 4, 2).astype(np.int32),
        levels[first:stop],
        (edges[0][inside] - first, edges[1][inside] - first, edges[2][inside]),
        np.array([[0, 1]], np.int32),
    )
    np.testing.assert_allclose(alone[0], together[2], rtol=1e-5)


def test_edges_are_dropped_one_direction_at_a_time():
    n, e, t = 30_000, 20_000, 10
    ends = jnp.zeros(n, jnp.int32), jnp.zeros(e, jnp.int32)
    paths = igmc.Paths(jnp.arange(t), ends[0], ends[0], ends[0] + 1, ends[1], ends[1], ends[1])
    module = network(2)
    dropped = module.apply(
        {}, paths, method="_dropped", rngs={"dropout": jax.random.key(0)}
    )  # fmt: skip
    inward, outward, target = (
        np.asarray(getattr(dropped, name) == nowhere)
        for name, nowhere in (("inward", t), ("outward", t), ("target", n))
    )
    for lost in (inward, outward, target):
        # Four standard deviations.
        assert abs(lost.mean() - 0.2) < 4 * (0.2 * 0.8 / len(lost)) ** 0.5
    assert abs(np.mean(inward & outward) - 0.04) < 4 * (0.04 * 0.96 / n) ** 0.5
    assert np.all(dropped.outward[~outward] == 1) and np.all(dropped.inward[~inward] == 0)
    np.testing.assert_array_equal(dropped.source, paths.source)
    # Draws have 16 bits, which the nearest share of 2^16 would not fit in.
    dropped = network(2, edge_dropout=1 - 1e-6).apply(
        {}, paths, method="_dropped", rngs={"dropout": jax.random.key(0)}
    )
    assert np.mean(dropped.inward == t) > 0.99


def embed(module, params, graphs, **options):
    """The codes, by one compiled call."""
    return np.asarray(
        jax.jit(lambda p: module.apply({"params": p}, *graphs, method="embed", **options))(params)
    )


def test_what_is_dropped_in_training(start):
    """Edges in both; numbers of the code without gates alone, at half of them by default."""
    graphs = made(2)
    plain = {name: leaf for name, leaf in start[2].items() if name != "gate"}

    def code(module, params, keys):
        def one(key):
            return module.apply(
                {"params": params}, *graphs, train=True, rngs={"dropout": key}, method="embed"
            )

        return np.asarray(jax.jit(jax.vmap(one))(keys))

    keys = jax.random.split(jax.random.key(0), 40)
    still = embed(network(2, kind=Dam()), start[2], graphs)
    for drawn in code(network(2, kind=Dam(), edge_dropout=0.0), start[2], keys[:2]):
        np.testing.assert_allclose(drawn, still, rtol=1e-5)
    first, second, third = code(network(2, kind=Dam()), start[2], keys[jnp.array([0, 1, 0])])
    np.testing.assert_array_equal(first, third)
    assert not np.allclose(first, second) and not np.allclose(first, still)
    whole = embed(network(2), plain, graphs)
    halves = code(network(2, edge_dropout=0.0), plain, keys)
    assert np.all((halves == 0) | np.isclose(halves, 2 * whole, rtol=1e-5))
    share = np.mean(halves[:, whole > 0] == 0)
    assert abs(share - 0.5) < 4 * 0.5 / (40 * np.sum(whole > 0)) ** 0.5


def test_both_networks_drop_the_same_edges(start):
    """Of one key: they are compared seed by seed."""
    graphs = made(2)
    plain = {name: leaf for name, leaf in start[2].items() if name != "gate"}
    options = {"train": True, "rngs": {"dropout": jax.random.key(5)}}
    gated = embed(network(2, kind=Dam()), start[2], graphs, **options)
    bare = embed(network(2, dropout=0.0), plain, graphs, **options)
    gates = Dam().values(start[2]["gate"], CODE)
    np.testing.assert_allclose(gated, bare * gates, rtol=1e-5)


def test_cut_to_open_channels_it_is_the_same_function(x64, start):
    graphs, module = made(40), network(40, kind=Dam())
    params = double(start[40])
    params["gate"] = {"beta": jnp.asarray(-2.0)}
    small, left = module.cut(params)
    assert (small.code, small.kind) == (4, None) and "gate" not in left
    assert left["dense"]["kernel"].shape == (24, 4) and left["readout"]["kernel"].shape == (4, 1)
    found = jax.jit(small.apply)({"params": left}, *graphs)
    np.testing.assert_allclose(found, by_hand(params, graphs)[0], rtol=1e-9)
    with pytest.raises(ValueError, match="has no gates: there is nothing to cut"):
        network(40).cut(params)
    params["gate"] = {"beta": jnp.asarray(-5.0)}
    with pytest.raises(ValueError, match="all gates are closed"):
        module.cut(params)


def test_the_penalty_of_neighbouring_levels(x64, start):
    params = double(start[40])
    expected = 0.0
    for number in range(len(WIDTHS)):
        layer = params[f"convs_{number}"]
        weights = np.einsum("rb,bio->rio", layer["mixing"], layer["basis"])
        expected += np.sum((weights[1:] - weights[:-1]) ** 2)
    np.testing.assert_allclose(igmc.adjacent_rating_penalty(params), expected, rtol=1e-9)


def test_where_weights_start():
    """U(-1, 1) / sqrt(bases inputs) in convolutions, U(-1, 1) / sqrt(inputs) after them."""
    graphs = made(40)
    module = Igmc(40, (32, 32), 4, 128)
    params = jax.jit(module.init)(jax.random.key(1), *graphs)["params"]
    for name, inputs in (("convs_0", 4), ("convs_1", 32)):
        limit = (4 * inputs) ** -0.5
        assert params[name]["basis"].shape == (4, inputs, 32)
        for leaf in params[name].values():
            assert np.abs(leaf).max() <= limit
            assert np.abs(leaf).max() > 0.85 * limit and abs(np.mean(leaf)) < 0.3 * limit
    for name, inputs in (("dense", 128), ("readout", 128)):
        for leaf in params[name].values():
            assert np.abs(leaf).max() <= inputs**-0.5
        assert np.abs(params[name]["kernel"]).max() > 0.95 * inputs**-0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_levels": 0}, "expected 1 or more each"),
        ({"widths": ()}, "expected 1 or more each"),
        ({"widths": (4, 0)}, "expected 1 or more each"),
        ({"dropout": 1.0}, "dropout is 1.0, expected a probability"),
        ({"edge_dropout": float("nan")}, "edge_dropout is nan, expected a probability"),
    ],
    ids=str,
)
def test_mistakes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Igmc(**({"num_levels": 2} | fields))
