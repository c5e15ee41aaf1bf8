"""SynFlow against its definition in float64, and pruning in rounds."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from ntt_sparse import models
from ntt_sparse.models.preresnet import PreResNet
from ntt_sparse.models.resnet import ResNet
from ntt_sparse.models.vgg import Vgg
from ntt_sparse.pruning import _flow, masks, rounds, saliency


def chain(widths, scale=1.0):
    rng = np.random.default_rng(0)
    return {
        f"layer{i:02}": jnp.asarray(scale * rng.standard_normal((n, m)), jnp.float32)
        for i, (n, m) in enumerate(itertools.pairwise(widths))
    }


def relu_chain(params, x):
    *hidden, last = params.values()
    for kernel in hidden:
        x = jax.nn.relu(x @ kernel)
    return x @ last


def synflow(apply_fn, params, shape):
    """As one program."""
    return jax.jit(lambda p: saliency.synflow(apply_fn, p, shape))(params)


def by_definition(apply_fn, params, shape, transform=jax.jit):
    """`|theta * dR/dtheta|` at absolute values; `params` decide the precision."""
    positive = jax.tree.map(np.abs, params)
    x = np.ones((1, *shape), jax.tree.leaves(params)[0].dtype)
    gradients = transform(jax.grad(lambda p: jnp.sum(apply_fn(p, x))))(positive)
    return jax.tree.map(
        lambda p, g: np.abs(p * np.asarray(g)) if p.ndim > 1 else None, positive, gradients
    )


one_by_one = functools.partial(by_definition, transform=lambda function: function)
"""Where many layers are equal, which then are compiled once."""


def double(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def zoo(module, shape):
    variables = dict(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *shape))))
    params = variables.pop("params")

    def apply_fn(state, p, x):
        return module.apply({"params": p, **state}, x)

    return params, variables, apply_fn


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (models.create("lenet5_caffe"), (28, 28, 1)),
        (models.create("lenet_300_100"), (8, 8, 1)),
        (Vgg(3, ((4, 6), (8,))), (8, 8, 3)),
        (ResNet(num_outputs=3, blocks_per_stage=1, channels=(4, 6)), (8, 8, 3)),
        (PreResNet(3, 1, (4, 6)), (8, 8, 3)),
    ],
)
def test_as_its_definition_in_double_precision(module, shape):
    params, state, apply_fn = zoo(module, shape)
    scores = synflow(functools.partial(apply_fn, state), params, shape)
    with jax.enable_x64(True):
        expected = by_definition(functools.partial(apply_fn, double(state)), double(params), shape)
    assert jax.tree.structure(scores) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(scores), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * want.max())


def test_every_layer_of_a_chain_has_the_whole_flow():
    """Conservation: the scores of each layer sum to R, and none is negative."""
    params = chain((5, 7, 6, 4, 2))
    scores = synflow(relu_chain, params, (5,))
    total = np.sum(np.linalg.multi_dot([np.ones((1, 5)), *map(np.abs, params.values())]))
    for leaf in scores.values():
        assert jnp.min(leaf) >= 0
        np.testing.assert_allclose(jnp.sum(leaf), total, rtol=1e-5)


def test_scores_of_a_chain_by_hand():
    params = {"a": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "b": jnp.array([[-4.0], [5.0]])}
    scores = synflow(relu_chain, params, (2,))
    np.testing.assert_allclose(scores["a"], [[4, 10], [12, 2.5]], rtol=1e-6)
    np.testing.assert_allclose(scores["b"], [[16], [12.5]], rtol=1e-6)


@pytest.mark.variants(1)
@pytest.mark.parametrize("scale", [1e5, 1e-6])
def test_deep_networks_stay_in_range(scale):
    """60 layers, R = 1e-300 or more than 1e300: the scores of a scale of one, all finite.

    Layer by layer, as equal layers compile once.
    """
    params = chain((8,) * 60 + (3,))
    scaled = jax.tree.map(lambda leaf: leaf * np.float32(scale), params)
    naive = one_by_one(relu_chain, scaled, (8,))
    assert not np.all(np.isfinite(naive["layer00"])) or not naive["layer00"].any()
    scores = saliency.synflow(relu_chain, scaled, (8,))
    with jax.enable_x64(True):
        expected = one_by_one(relu_chain, double(params), (8,))
    for path, want in expected.items():
        share = np.asarray(scores[path], np.float64)
        assert np.all(np.isfinite(share)) and share.sum() > 0
        np.testing.assert_allclose(share / share.sum(), want / want.sum(), rtol=2e-4, atol=1e-7)


def test_both_branches_of_a_sum_keep_their_share():
    """A skip of ones beside branches of large weights, thirty times: no layer stands alone."""
    rng = np.random.default_rng(0)
    params = {
        f"block{i:02}": jnp.asarray(1e3 * rng.standard_normal((2, 4, 4)), jnp.float32)
        for i in range(30)
    }
    params["weak"] = 1e-20 * jnp.ones((1, 4, 4))

    def apply_fn(params, x):
        for i in range(30):
            first, second = params[f"block{i:02}"]
            x = x + jax.nn.relu(x @ first) @ second
        return x + x @ params["weak"][0]

    scores = saliency.synflow(apply_fn, params, (4,))
    with jax.enable_x64(True):
        expected = one_by_one(apply_fn, double(params), (4,))
    whole = expected["block00"].sum()
    factor = float(jnp.sum(scores["block00"])) / whole
    for path, want in expected.items():
        np.testing.assert_allclose(np.asarray(scores[path], float) / factor, want, rtol=1e-3)


def test_more_operations():
    """What networks are made of besides layers, against plain numbers."""
    params = {"a": jnp.abs(chain((4, 6, 6))["layer00"]), "b": jnp.abs(chain((4, 6, 6))["layer01"])}

    def apply_fn(params, x):
        h = x @ params["a"]
        h = jnp.concatenate([h, h[:, ::-1] / 3], 1)[:, :6] ** 2
        h = jnp.where(h > 2.0, h, 0.5 * h) * jnp.clip(h, 0.0, 4.0)
        h = jnp.pad(h, ((0, 0), (1, 1)))[:, 1:-1] + jax.lax.stop_gradient(jnp.max(h))
        h = jax.checkpoint(lambda h: jnp.tanh(h / 100.0) + jnp.square(h))(h)
        pooled = jnp.mean(h.reshape(1, 2, 3).transpose(0, 2, 1), 1)
        taken = jnp.take(h, jnp.array([0, 3]), axis=1)
        return jnp.sqrt(h @ params["b"]) @ jnp.ones((6, 2)) + pooled + taken

    scores = synflow(apply_fn, params, (4,))
    with jax.enable_x64(True):
        expected = by_definition(apply_fn, double(params), (4,))
    for path, want in expected.items():
        np.testing.assert_allclose(scores[path], want, rtol=1e-4, atol=1e-5 * want.max())


def test_nothing_flows():
    params = {**chain((3, 4, 2)), "layer01": jnp.zeros((4, 2))}
    scores = synflow(relu_chain, params, (3,))
    assert not any(np.any(leaf) for leaf in scores.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_overflows_no_more(dtype):
    """Scores of 64-wide layers as those of single precision, up to their factor."""
    params = chain((64, 64, 64, 64))
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    scores, expected = (synflow(relu_chain, p, (64,)) for p in (half, params))
    for path, want in expected.items():
        got = np.asarray(scores[path], np.float32)
        assert scores[path].dtype == dtype and np.all(np.isfinite(got))
        np.testing.assert_allclose(got / got.sum(), want / want.sum(), rtol=0.1, atol=1e-5)


def test_loops_are_refused():
    def apply_fn(params, x):
        return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, params["w"])[0]

    with pytest.raises(ValueError, match="the network holds 'scan'"):
        saliency.synflow(apply_fn, {"w": jnp.ones((5, 3, 3))}, (3,))


def test_the_exponents_of_numbers():
    for value in (1.0, 1.5, 3e-30, 7e30, 0.0, -5.0):
        got = _flow._scaled(jnp.array([value, value / 4], jnp.float32))
        largest = float(jnp.max(jnp.abs(got.x)))
        assert 1 <= largest < 2 or value == 0
        if value:
            np.testing.assert_allclose(
                np.asarray(got.x, float) * 2.0 ** int(got.power), [value, value / 4], rtol=1e-7
            )


# Rounds


def test_densities_of_rounds():
    np.testing.assert_allclose(rounds.densities(0.01, 4), [0.01**0.25, 0.1, 0.01**0.75, 0.01])
    np.testing.assert_allclose(rounds.densities(0.2, 4, schedule="linear"), [0.8, 0.6, 0.4, 0.2])
    assert rounds.densities(0.3, 1) == [0.3]


def loop(score_fn, params, density, count):
    """The rounds one by one, in NumPy."""
    kept = {path: np.ones(leaf.shape, bool) for path, leaf in params.items()}
    total = sum(mask.size for mask in kept.values())
    for e in range(1, count + 1):
        left = round(density ** (e / count) * total)
        scores = score_fn({p: jnp.where(kept[p], params[p], 0) for p in params})
        flat = np.concatenate(
            [np.where(kept[p], np.asarray(scores[p]), -np.inf).ravel() for p in params]
        )
        chosen = np.zeros(total, bool)
        chosen[np.argsort(-flat, kind="stable")[:left]] = True
        start = 0
        for p, mask in kept.items():
            kept[p] = chosen[start : start + mask.size].reshape(mask.shape)
            start += mask.size
    return kept


@pytest.mark.parametrize("score", ["synflow", "grasp"])
def test_rounds_as_one_by_one(score):
    params = chain((6, 12, 10, 4))
    x, y = jax.random.normal(jax.random.key(5), (2, 9, 6))
    if score == "synflow":

        def score_fn(p):
            return saliency.synflow(relu_chain, p, (6,))
    else:

        def score_fn(p):
            return saliency.grasp(
                lambda p, b: jnp.mean((relu_chain(p, b[0]) - b[1][:, :4]) ** 2), p, (x, y)
            )

    expected = loop(score_fn, params, 0.1, 7)
    got = rounds.prune(score_fn, params, 0.1, rounds=7)
    for path, mask in expected.items():
        np.testing.assert_array_equal(got[path], mask)
    under_jit = jax.jit(lambda p: rounds.prune(score_fn, p, 0.1, rounds=7))(params)
    jax.tree.map(np.testing.assert_array_equal, under_jit, got)


def test_no_layer_collapses_where_single_rounds_do():
    """The paper's claim: at 0.1 % of a VGG-like network every layer keeps a weight."""
    module = Vgg(10, ((16,), (32,), (64,)))
    params, state, apply_fn = zoo(module, (8, 8, 3))

    @jax.jit
    def score_fn(p):
        return saliency.synflow(functools.partial(apply_fn, state), p, (8, 8, 3))

    with pytest.warns(UserWarning, match="layers left without any weight"):
        rounds.prune(score_fn, params, 0.002, rounds=1)
    kept = rounds.prune(score_fn, params, 0.002)
    report = masks.layer_densities(kept)
    assert min(row.kept for row in report.values()) > 0
    total = sum(row.total for row in report.values())
    assert sum(row.kept for row in report.values()) == round(0.002 * total)


def test_layers_with_densities_of_their_own():
    params = chain((6, 12, 10, 4))

    def score_fn(p):
        return saliency.synflow(relu_chain, p, (6,))

    kept = rounds.prune(score_fn, params, 0.25, rounds=5, scope="layer")
    assert [int(mask.sum()) for mask in kept.values()] == [18, 30, 10]
    given = dict(zip(params, (0.5, 0.1, 1.0), strict=True))
    kept = rounds.prune(score_fn, params, given, rounds=5, schedule="linear")
    assert [int(mask.sum()) for mask in kept.values()] == [36, 12, 40]


def test_bad_rounds():
    params = chain((3, 4, 2))

    def score_fn(p):
        return saliency.synflow(relu_chain, p, (3,))

    with pytest.raises(ValueError, match="rounds is 0"):
        rounds.prune(score_fn, params, 0.5, rounds=0)
    # Type checks of the tests are before the function's own.
    with pytest.raises((ValueError, TypeCheckError), match="'cubic'"):
        rounds.prune(score_fn, params, 0.5, schedule="cubic")
    with pytest.raises(ValueError, match="keeps none of 20 weights"):
        rounds.prune(score_fn, params, 0.01)
    with pytest.raises(ValueError, match="scores hold NaN"):
        rounds.prune(lambda p: jax.tree.map(lambda leaf: leaf * jnp.nan, p), params, 0.5)
    with pytest.warns(UserWarning, match="nothing flows"):
        params["layer01"] = jnp.zeros((4, 2))
        rounds.prune(score_fn, params, 0.5, rounds=2, scope="layer")
