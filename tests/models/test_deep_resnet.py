"""ResNet-18 and -50: published sizes, their description, and weights as torchvision names them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from ntt_sparse import models
from ntt_sparse.gates import channels, layer
from ntt_sparse.gates.chipnet import ChipNet
from ntt_sparse.gates.dam import Dam
from ntt_sparse.gates.slimming import Slimming
from ntt_sparse.models import torchvision
from ntt_sparse.models.deep_resnet import DeepResNet
from ntt_sparse.models.described import Described
from ntt_sparse.pruning.compact import compact


def small(bottleneck, stem="imagenet", **fields):
    return DeepResNet(3, (2, 1), (4, 6), bottleneck, stem, **fields)


@pytest.mark.parametrize(
    ("name", "stem", "outputs", "parameters"),
    [
        # As torchvision's documentation has them.
        ("resnet18", "imagenet", 1000, 11_689_512),
        ("resnet50", "imagenet", 1000, 25_557_032),
        # 11,689,512 less 1000 x 513 and 49 x 3 x 64, plus 10 x 513 and 9 x 3 x 64; likewise.
        ("resnet18", "cifar", 10, 11_173_962),
        ("resnet50", "cifar", 10, 23_520_842),
    ],
)
def test_published_sizes(name, stem, outputs, parameters):
    module = models.create(name, num_outputs=outputs, stem=stem)
    shape = (224, 224, 3) if stem == "imagenet" else (32, 32, 3)
    shapes = jax.eval_shape(lambda key: module.init(key, jnp.zeros((1, *shape))), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == parameters
    assert channels.whole(module.network(shape)).parameters == parameters


def test_published_multiply_adds():
    """1.8 and 4.1 billion for images of 224 x 224 (He et al. 2016, Table 1: 1.8 and 3.8, with the
    stride in the first convolution of a bottleneck)."""
    eighteen = models.create("resnet18", num_outputs=1000, stem="imagenet").network((224, 224, 3))
    fifty = models.create("resnet50", num_outputs=1000, stem="imagenet").network((224, 224, 3))
    assert channels.whole(eighteen).multiply_adds == 1_814_073_344
    assert channels.whole(fifty).multiply_adds == 4_089_184_256


@pytest.mark.parametrize(
    ("stem", "bottleneck"),
    [
        ("cifar", True),
        pytest.param("imagenet", False, marks=pytest.mark.slow),
        pytest.param("cifar", False, marks=pytest.mark.slow),
        pytest.param("imagenet", True, marks=pytest.mark.slow),
    ],
)
def test_the_description_is_the_network(stem, bottleneck):
    module, shape = small(bottleneck, stem), (17, 22, 3)
    x = jax.random.normal(jax.random.key(0), (3, *shape))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    described = Described(module.network(shape))
    assert jax.tree.map(
        jnp.shape, jax.eval_shape(described.init, jax.random.key(2), x)
    ) == jax.tree.map(jnp.shape, variables)
    for train in (False, True):
        options = {"train": train, "mutable": ["batch_stats"]}
        expected, state = jax.jit(functools.partial(module.apply, **options))(variables, x)
        got, other = jax.jit(functools.partial(described.apply, **options))(variables, x)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state, other
        )


@pytest.mark.parametrize(
    ("kind", "bottleneck"),
    [
        (Dam(), True),
        (Slimming(), False),
        pytest.param(ChipNet(), True, marks=pytest.mark.slow),
        pytest.param(Dam(), False, marks=pytest.mark.slow),
        pytest.param(Slimming(), True, marks=pytest.mark.slow),
        pytest.param(ChipNet(), False, marks=pytest.mark.slow),
    ],
)
def test_gated_and_made_small(kind, bottleneck):
    module, shape = small(bottleneck, kind=kind), (16, 16, 3)
    x = np.random.default_rng(1).standard_normal((3, *shape), np.float32)
    variables = dict(jax.jit(module.init)(jax.random.key(1), x))
    network = module.network(shape)
    # Inside of blocks alone.
    sizes = channels.sizes(network)
    assert sorted(sizes.values()) == ([4, 4, 4, 4, 6, 6] if bottleneck else [4, 4, 6])
    rng = np.random.default_rng(0)
    variables["batch_stats"] = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype),
        variables["batch_stats"],
    )
    open_ = {path: jnp.arange(n) % 2 == 0 for path, n in sizes.items()}
    if isinstance(kind, Dam):
        gates = {path: {"beta": jnp.float32(-2.5)} for path in sizes}
        variables["params"] = layer.replace(variables["params"], gates)
        open_ = {path: value != 0 for path, value in layer.values(kind, variables, network).items()}
    elif isinstance(kind, ChipNet):
        variables |= layer.state(network, open=open_)
    else:
        masks = layer.masks(kind, variables["params"], network, open_)
        variables["params"] = jax.tree.map(
            lambda leaf, mask: leaf if mask is None else jnp.where(mask, leaf, 0),
            variables["params"], masks, is_leaf=lambda leaf: leaf is None,
        )  # fmt: skip
    result = compact(module, variables, shape)
    assert result.after == channels.count(network, jax.tree.map(np.asarray, open_))
    np.testing.assert_allclose(
        jax.jit(result.module.apply)(result.variables, x),
        jax.jit(module.apply)(variables, x),
        atol=1e-5,
    )


# Weights as torchvision names them


def torch_names(module):
    """Names and shapes of a made file, by hand: outputs first, 1 for the block's number."""
    wide, names, before = (4 if module.bottleneck else 1), {}, module.channels[0]

    def norm(prefix, n):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            names[f"{prefix}.{leaf}"] = (n,)
        names[f"{prefix}.num_batches_tracked"] = ()

    names["conv1.weight"] = (before, 3, 7, 7)
    norm("bn1", before)
    for stage, (count, n) in enumerate(zip(module.blocks, module.channels, strict=True), start=1):
        for block in range(count):
            place = f"layer{stage}.{block}"
            if module.bottleneck:
                sizes = [(n, before, 1), (n, n, 3), (4 * n, n, 1)]
            else:
                sizes = [(n, before, 3), (n, n, 3)]
            for index, (out, given, size) in enumerate(sizes, start=1):
                names[f"{place}.conv{index}.weight"] = (out, given, size, size)
                norm(f"{place}.bn{index}", out)
            if block == 0 and (stage > 1 or before != wide * n):
                names[f"{place}.downsample.0.weight"] = (wide * n, before, 1, 1)
                norm(f"{place}.downsample.1", wide * n)
            before = wide * n
    names["fc.weight"], names["fc.bias"] = (module.num_outputs, before), (module.num_outputs,)
    return names


def made(module, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in torch_names(module).items():
        draw = rng.normal(size=shape) * 0.3
        positive = name.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight"))
        arrays[name] = np.asarray(np.abs(draw) + 0.5 if positive else draw, np.float32)
    return arrays


def forward_in_torch(arrays, module, x):
    """The network of torchvision, by functions of PyTorch."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    functional = torch.nn.functional
    t = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}

    def norm(y, place):
        return functional.batch_norm(
            y, t[f"{place}.running_mean"], t[f"{place}.running_var"], t[f"{place}.weight"],
            t[f"{place}.bias"], training=False, eps=1e-5,
        )  # fmt: skip

    y = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)
    y = functional.relu(norm(functional.conv2d(y, t["conv1.weight"], stride=2, padding=3), "bn1"))
    y = functional.max_pool2d(y, 3, 2, 1)
    for stage, count in enumerate(module.blocks, start=1):
        for block in range(count):
            place, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            convolutions = 3 if module.bottleneck else 2
            z = y
            for index in range(1, convolutions + 1):
                kernel = t[f"{place}.conv{index}.weight"]
                strided = index == (2 if module.bottleneck else 1)
                z = functional.conv2d(
                    z, kernel, stride=stride if strided else 1, padding=kernel.shape[-1] // 2
                )
                z = norm(z, f"{place}.bn{index}")
                z = functional.relu(z) if index < convolutions else z
            if f"{place}.downsample.0.weight" in t:
                y = functional.conv2d(y, t[f"{place}.downsample.0.weight"], stride=stride)
                y = norm(y, f"{place}.downsample.1")
            y = functional.relu(y + z)
    return functional.linear(y.mean((2, 3)), t["fc.weight"], t["fc.bias"]).numpy()


@pytest.mark.parametrize("bottleneck", [False, True])
def test_outputs_of_loaded_weights_are_those_of_pytorch(tmp_path, bottleneck):
    from safetensors.numpy import save_file

    module = small(bottleneck)
    arrays = made(module)
    save_file(arrays, tmp_path / "made.safetensors")
    variables = torchvision.load_resnet(tmp_path / "made.safetensors", module)
    x = np.random.default_rng(1).normal(size=(2, 37, 41, 3)).astype(np.float32)
    expected = forward_in_torch(arrays, module, x)
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-4, atol=1e-4)


def test_every_array_has_its_place():
    """Each is there once, channels last; gates start as the network has them."""
    module = small(True, kind=Dam())
    arrays = made(module)
    variables = torchvision.from_arrays(arrays, module)
    assert jax.tree.structure(variables) == jax.tree.structure(
        dict(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    )
    flat = traverse_util.flatten_dict(variables, sep="/")
    np.testing.assert_array_equal(
        flat["params/stage2_block1/Conv_1/kernel"],
        arrays["layer2.0.conv2.weight"].transpose(2, 3, 1, 0),
    )
    np.testing.assert_array_equal(
        flat["params/stage1_block1/Conv_3/kernel"][0, 0],
        arrays["layer1.0.downsample.0.weight"][:, :, 0, 0].T,
    )
    np.testing.assert_array_equal(
        flat["batch_stats/stage1_block2/BatchNorm_2/var"], arrays["layer1.1.bn3.running_var"]
    )
    np.testing.assert_array_equal(flat["params/Dense_0/kernel"], arrays["fc.weight"].T)


def test_files_that_do_not_fit(tmp_path):
    from safetensors.numpy import save_file

    module, path = small(False), tmp_path / "made.safetensors"
    arrays = made(module)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        torchvision.load_resnet(path, module)
    path.write_bytes(b"pickle")
    with pytest.raises(ValueError, match="is no safetensors file"):
        torchvision.load_resnet(path, module)
    save_file({**arrays, "layer9.0.conv1.weight": np.ones((1, 1, 1, 1), np.float32)}, path)
    with pytest.raises(ValueError, match=r"made\.safetensors: missing .* unknown .*stage9"):
        torchvision.load_resnet(path, module)
    for name in (
        "classifier.weight",
        "layer1.x.conv1.weight",
        "layer1.0.relu.weight",
        "conv1.bias",
    ):
        with pytest.raises(ValueError, match="is no array of a ResNet of torchvision"):
            torchvision.from_arrays({**arrays, name: np.ones(1)}, module)
    fewer = {name: value for name, value in arrays.items() if name != "fc.bias"}
    with pytest.raises(ValueError, match=r"missing .*Dense_0/bias"):
        torchvision.from_arrays(fewer, module)
    with pytest.raises(ValueError, match=r"expected \(3, 3, 3, 4\)"):
        torchvision.from_arrays(arrays, small(False, "cifar"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem": "mnist"}, "stem is 'mnist', expected one of cifar, imagenet"),
        ({"blocks": (2, 0)}, "expected 1 or more for each stage"),
        ({"blocks": (2,)}, "blocks are of 1 stages, channels of 2"),
        ({"num_outputs": 0}, "num_outputs is 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        DeepResNet(**{"num_outputs": 3, "blocks": (2, 1), "channels": (4, 6), **fields})
