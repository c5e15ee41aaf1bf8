"""Vision transformers: published sizes, attention by hand, weights as DeiT names them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse import models
from ntt_sparse.models import attention, deit, vit
from ntt_sparse.models.vit import VisionTransformer
from ntt_sparse.similarity.features import capture

SHAPE = (8, 12, 3)


def small(**fields):
    return VisionTransformer(
        **{"num_outputs": 5, "patch": 4, "width": 12, "depth": 2, "heads": 3, **fields}
    )


@pytest.mark.parametrize(
    ("name", "parameters", "flops"),
    # Of DeiT's Table 1: 5M, 22M, 86M; of the weights that are published, by count. FLOPs are
    # 1.3, 4.6 and 17.6 G as multiply-adds.
    [
        ("deit_tiny", 5_717_416, 1.3e9),
        ("deit_small", 22_050_664, 4.6e9),
        ("deit_base", 86_567_656, 17.6e9),
    ],
)
def test_published_sizes(name, parameters, flops):
    module = models.create(name, num_outputs=1000)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    counted = vit.multiply_adds(module, (224, 224, 3))
    # Published to a tenth of a G.
    assert abs(counted - flops) < 0.06e9


def test_multiply_adds_are_those_of_the_program():
    """Every product in the trace of a forward pass, by its shapes."""
    module = small()
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *SHAPE)))
    x = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
    total = 0
    for eqn in jax.make_jaxpr(module.apply)(variables, x).jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += eqn.outvars[0].aval.size * int(np.prod([left[axis] for axis in contracted]))
        elif eqn.primitive.name == "conv_general_dilated":
            total += eqn.outvars[0].aval.size * int(np.prod(eqn.invars[1].aval.shape[:3]))
    assert total == vit.multiply_adds(module, SHAPE)


def reference(params, x):
    """The network in NumPy, of double precision, of one head after another."""
    from scipy.special import erf

    def dense(y, layer):
        return y @ np.asarray(layer["kernel"], float) + np.asarray(layer["bias"], float)

    def norm(y, layer):
        y = y - y.mean(-1, keepdims=True)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
        return y * np.asarray(layer["scale"]) + np.asarray(layer["bias"])

    n, height, width, _ = x.shape
    rows = []
    for top in range(0, height, 4):
        for left in range(0, width, 4):
            patch = x[:, top : top + 4, left : left + 4].reshape(n, -1)
            kernel = np.asarray(params["patch"]["kernel"], float).reshape(patch.shape[1], -1)
            rows.append(patch @ kernel + np.asarray(params["patch"]["bias"]))
    cls = np.broadcast_to(np.asarray(params["cls"])[0], (n, 1, 12))
    y = np.concatenate([cls, np.stack(rows, 1)], 1) + np.asarray(params["position"], float)
    for index in range(2):
        block = params[f"block_{index}"]
        joined = dense(norm(y, block["norm1"]), block["attn"]["qkv"])
        heads = []
        for head in range(3):
            q, k, v = (joined[..., part * 12 + head * 4 :][..., :4] for part in range(3))
            scores = np.exp(q @ k.transpose(0, 2, 1) / 2)
            heads.append(scores / scores.sum(-1, keepdims=True) @ v)
        y = y + dense(np.concatenate(heads, -1), block["attn"]["proj"])
        z = dense(norm(y, block["norm2"]), block["fc1"])
        y = y + dense(z * 0.5 * (1 + erf(z / np.sqrt(2))), block["fc2"])
    return dense(norm(y, params["norm"])[:, 0], params["head"])


def drawn(module, shape=SHAPE):
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    draws = [jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, draws)


def test_outputs_by_hand():
    module = small()
    variables = drawn(module)
    x = np.random.default_rng(1).normal(size=(3, *SHAPE))
    expected = reference(variables["params"], x)
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=2e-4, atol=2e-4)


def test_masked_attention():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 3, 4, 4)) * 3
    policy = np.array([[1, 0, 1, 0], [0, 0, 0, 0]])
    got = np.asarray(attention.masked_softmax(scores, policy))
    for image in range(2):
        for query in range(4):
            row = scores[image, :, query]
            weights = np.exp(row - row.max(-1, keepdims=True))
            unseen = [key for key in range(4) if key != query and not policy[image, key]]
            weights[:, unseen] = 0
            expected = weights / weights.sum(-1, keepdims=True)
            np.testing.assert_allclose(got[image, :, query], expected, atol=1e-6)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)
    whole = attention.masked_softmax(scores, np.ones((2, 4)))
    np.testing.assert_allclose(whole, jax.nn.softmax(scores), atol=1e-6)
    gradient = jax.grad(lambda p: jnp.sum(attention.masked_softmax(scores, p) ** 2))(
        jnp.ones((2, 4))
    )
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)


def test_a_dropped_token_with_a_large_score_is_not_seen():
    scores = np.zeros((1, 1, 3, 3))
    scores[..., 2] = 300
    policy = jnp.array([[1.0, 1.0, 0.0]])
    got = attention.masked_softmax(scores, policy)[0, 0]
    np.testing.assert_allclose(got[:2], [[0.5, 0.5, 0]] * 2, atol=1e-7)
    np.testing.assert_allclose(got[2], [0, 0, 1], atol=1e-7)
    slope = jax.grad(lambda p: jnp.sum(attention.masked_softmax(scores, p)[..., 0]))(policy)
    assert np.all(np.isfinite(slope)) and slope[0, 2] < 0


def test_softmax_in_half_precision_is_that_of_float32():
    """Scores of some hundreds, which bfloat16 has in steps of two."""
    module = attention.Attention(heads=1, dtype=jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 8)), jnp.bfloat16)
    variables = module.init(jax.random.key(0), x)
    dtypes = [
        eqn.outvars[0].aval.dtype
        for eqn in jax.make_jaxpr(module.apply)(variables, x).jaxpr.eqns
        if eqn.primitive.name == "exp"
    ]
    assert dtypes == [jnp.float32]


def test_blocks_are_features():
    module = small()
    variables = drawn(module)
    _, features = jax.jit(capture(module, ["block_?"]))(variables, jnp.ones((2, *SHAPE)))
    assert {name: leaf.shape for name, leaf in features.items()} == {
        "block_0": (2, 7, 12), "block_1": (2, 7, 12)
    }  # fmt: skip


# Weights as DeiT names them


def published_arrays(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "cls_token": (1, 1, 12), "pos_embed": (1, 7, 12), "patch_embed.proj.weight": (12, 3, 4, 4),
        "patch_embed.proj.bias": (12,), "norm.weight": (12,), "norm.bias": (12,),
        "head.weight": (5, 12), "head.bias": (5,),
    }  # fmt: skip
    for index in range(2):
        for name, outputs, inputs in (
            ("attn.qkv", 36, 12), ("attn.proj", 12, 12), ("mlp.fc1", 48, 12), ("mlp.fc2", 12, 48),
        ):  # fmt: skip
            shapes[f"blocks.{index}.{name}.weight"] = (outputs, inputs)
            shapes[f"blocks.{index}.{name}.bias"] = (outputs,)
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{index}.{name}.{leaf}": (12,) for leaf in ("weight", "bias")}
    return {
        name: np.asarray(rng.normal(size=shape) * 0.3, np.float32) for name, shape in shapes.items()
    }


def forward_in_torch(arrays, x):
    """The network of the public checkpoints, by functions of PyTorch."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    functional = torch.nn.functional
    t = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}

    def dense(y, place):
        return functional.linear(y, t[f"{place}.weight"], t[f"{place}.bias"])

    def norm(y, place):
        weight, bias = t[f"{place}.weight"], t[f"{place}.bias"]
        return functional.layer_norm(y, weight.shape, weight, bias, eps=1e-6)

    y = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)
    place = "patch_embed.proj"
    y = functional.conv2d(y, t[f"{place}.weight"], t[f"{place}.bias"], stride=4)
    y = y.flatten(2).transpose(1, 2)
    y = torch.cat([t["cls_token"].expand(len(y), -1, -1), y], dim=1) + t["pos_embed"]
    for index in range(2):
        block = f"blocks.{index}"
        joined = dense(norm(y, f"{block}.norm1"), f"{block}.attn.qkv")
        parts = joined.reshape(*y.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
        z = functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        y = y + dense(z, f"{block}.attn.proj")
        z = functional.gelu(dense(norm(y, f"{block}.norm2"), f"{block}.mlp.fc1"))
        y = y + dense(z, f"{block}.mlp.fc2")
    return dense(norm(y, "norm")[:, 0], "head").numpy()


def loaded(tmp_path, arrays):
    from safetensors.numpy import save_file

    save_file(arrays, tmp_path / "made.safetensors")
    return deit.load_deit(tmp_path / "made.safetensors", small(), SHAPE)


def test_outputs_of_loaded_weights_are_those_of_pytorch(tmp_path):
    arrays = published_arrays()
    x = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    expected = forward_in_torch(arrays, x)
    got = small().apply(loaded(tmp_path, arrays), x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_every_array_has_its_place(tmp_path):
    """By outputs: those of the network above in NumPy, from arrays put in place by hand."""
    arrays = published_arrays()
    variables = loaded(tmp_path, arrays)
    module = small()
    expected = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *SHAPE)))
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    params = variables["params"]
    np.testing.assert_array_equal(
        params["block_1"]["fc2"]["kernel"], arrays["blocks.1.mlp.fc2.weight"].T
    )
    np.testing.assert_array_equal(
        params["patch"]["kernel"], arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(
        params["block_0"]["norm2"]["scale"], arrays["blocks.0.norm2.weight"]
    )
    np.testing.assert_array_equal(params["position"], arrays["pos_embed"])


def test_files_that_do_not_fit(tmp_path):
    arrays = published_arrays()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        deit.load_deit(tmp_path / "none", small())
    with pytest.raises(ValueError, match="'dist_token' is no array of DeiT without distillation"):
        deit.from_arrays({**arrays, "dist_token": np.ones(1)}, small(), SHAPE)
    with pytest.raises(ValueError, match=r"made.*unknown .*block_7"):
        loaded(tmp_path, {**arrays, "blocks.7.norm1.bias": np.ones(12, np.float32)})
    with pytest.raises(ValueError, match=r"position has shape \(1, 7, 12\), expected \(1, 5, 12\)"):
        deit.from_arrays(arrays, small(), (8, 8, 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 10}, "width is 10, expected a multiple of 3 heads"),
        ({"depth": 0}, "depth is 0, expected 1 or more"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


def test_bad_images():
    module = small()
    for shape, message in (
        ((2, 8, 9, 3), "images of 8x9 cannot be cut into patches of 4x4"),
        ((2, 8, 3), r"input is \(2, 8, 3\), expected images"),
    ):
        with pytest.raises(ValueError, match=message):
            module.init(jax.random.key(0), jnp.zeros(shape))
    with pytest.raises(ValueError, match="tokens are of 1 blocks, expected 2"):
        vit.multiply_adds(module, SHAPE, (7,))
