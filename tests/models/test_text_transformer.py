"""The transformer of texts: by hand, of the published size, and blind to what follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from ntt_sparse import models
from ntt_sparse.models.attention import Block
from ntt_sparse.models.text import TextTransformer
from ntt_sparse.similarity.features import capture

TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)


def small(**fields):
    return TextTransformer(**{"num_outputs": 11, "width": 12, "depth": 2, "heads": 3, **fields})


def drawn(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    draws = [jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, draws)


def test_published_size():
    """GPT-2 has 124,439,808 parameters, where the last layer is the first one transposed."""
    module = TextTransformer(num_outputs=50257, width=768, depth=12, heads=12)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1024), jnp.int32))
    params = dict(shapes["params"])
    del params["head"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 124_439_808


def test_outputs_by_hand():
    """One window, one head and one token after the other, in double precision."""

    def dense(y, layer):
        return y @ np.asarray(layer["kernel"], float) + np.asarray(layer["bias"], float)

    def norm(y, layer):
        y = (y - y.mean()) / np.sqrt(y.var() + 1e-6)
        return y * np.asarray(layer["scale"], float) + np.asarray(layer["bias"], float)

    module = small()
    variables = drawn(module)
    params, expected = variables["params"], []
    for window in TOKENS:
        y = np.asarray(params["embed"]["embedding"], float)[window]
        y = y + np.asarray(params["position"], float)[0]
        for index in range(2):
            block = params[f"block_{index}"]
            joined = [dense(norm(row, block["norm1"]), block["attn"]["qkv"]) for row in y]
            after = []
            for now in range(len(window)):
                seen = []
                for head in range(3):
                    at = [
                        slice(part * 12 + head * 4, part * 12 + head * 4 + 4) for part in range(3)
                    ]
                    scores = [joined[now][at[0]] @ joined[t][at[1]] / 2 for t in range(now + 1)]
                    weights = np.exp(scores) / np.sum(np.exp(scores))
                    seen.append(sum(w * joined[t][at[2]] for t, w in enumerate(weights)))
                row = y[now] + dense(np.concatenate(seen), block["attn"]["proj"])
                z = dense(norm(row, block["norm2"]), block["fc1"])
                after.append(row + dense(z * 0.5 * (1 + erf(z / np.sqrt(2))), block["fc2"]))
            y = np.stack(after)
        expected.append([dense(norm(row, params["norm"]), params["head"]) for row in y])
    np.testing.assert_allclose(module.apply(variables, TOKENS), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("changed", range(5))
def test_nothing_sees_what_follows(changed):
    module = small()
    variables = drawn(module)
    other = TOKENS.copy()
    other[:, changed] = 10
    before, after = (np.asarray(module.apply(variables, x)) for x in (TOKENS, other))
    np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
    assert np.all(np.any(before[:, changed:] != after[:, changed:], axis=-1))


def test_sizes_by_name():
    for name, depth, width in (("gpt_nano", 3, 48), ("gpt_micro", 4, 128), ("gpt_mini", 6, 192)):
        module = models.create(name, num_outputs=256)
        variables = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
        _, features = jax.eval_shape(capture(module, ["block_?"]), variables, TOKENS)
        assert [leaf.shape for leaf in features.values()] == [(2, 5, width)] * depth


def test_half_precision():
    module = small(dtype=jnp.bfloat16)
    variables = drawn(module)
    outputs = module.apply(variables, TOKENS)
    assert outputs.dtype == jnp.bfloat16
    np.testing.assert_allclose(outputs, small().apply(variables, TOKENS), atol=0.15)


def test_tokens_that_there_are_not_give_no_number():
    module = small()
    # The largest of the first window is the last that there is.
    for wrong in (TOKENS + 5, TOKENS - 1, TOKENS - 20):
        outputs = module.apply(drawn(module), wrong)
        known = np.all((wrong >= 0) & (wrong < 11), axis=1)
        np.testing.assert_array_equal(np.all(np.isfinite(outputs), axis=(1, 2)), known)
        assert np.all(np.isnan(np.asarray(outputs)[~known]))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 5)), r"input is float.*\(2, 5\), expected tokens"),
        (np.zeros(5, int), "expected tokens"),
        (np.zeros((2, 0), int), "expected tokens"),
    ],
)
def test_inputs_that_are_no_tokens(x, message):
    module = small()
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"heads": 5}, "expected a multiple of 5 heads"),
    ],
)
def test_fields_without_meaning(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


def test_causal_attention_takes_no_policy():
    block = Block(heads=3, causal=True)
    with pytest.raises(ValueError, match="policy is given to causal attention"):
        block.init(jax.random.key(0), jnp.zeros((1, 4, 12)), jnp.ones((1, 4)))
