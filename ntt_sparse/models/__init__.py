"""Models by name, and as the pure functions that objectives take."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn

from ntt_sparse._types import Params, PRNGKey
from ntt_sparse.models.deep_resnet import DeepResNet
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.models.preresnet import PreResNet
from ntt_sparse.models.resnet import ResNet
from ntt_sparse.models.text import TextTransformer
from ntt_sparse.models.vgg import Vgg
from ntt_sparse.models.vit import VisionTransformer


class _Entry(NamedTuple):
    """A named model: its module class, the fields the name fixes, and those left open."""

    module: type[nn.Module]
    fixed: Mapping[str, Any]
    options: tuple[str, ...]


_DTYPES = ("dtype", "param_dtype")
_RESNET = ("norm", "shortcut", *_DTYPES)
_GATED = ("kind", *_DTYPES)
_SMALL_VIT = {"width": 96, "depth": 9, "heads": 3}
_NANO_VIT = {"width": 48, "depth": 6, "heads": 3}
_CONV4 = {"stages": ((64, 64), (128, 128)), "kernel_size": 3, "hidden": (512,)}

_MODELS = {
    "lenet_300_100": _Entry(LeNet, {"hidden": (300, 100)}, ("dropout", *_DTYPES)),
    "lenet5_caffe": _Entry(
        LeNet,
        {"stages": ((20,), (50,)), "kernel_size": 5, "hidden": (500,)},
        ("padding", *_DTYPES),
    ),
    "lenet5": _Entry(
        LeNet,
        {"stages": ((6,), (16,)), "kernel_size": 5, "hidden": (120, 84), "field": 32},
        ("padding", "activation", "gated", *_GATED),
    ),
    "conv4": _Entry(LeNet, _CONV4, ("padding", *_DTYPES)),
    "conv4_dropout": _Entry(LeNet, {**_CONV4, "dropout": True}, ("padding", *_DTYPES)),
    "resnet20": _Entry(ResNet, {"blocks_per_stage": 3}, _RESNET),
    "resnet32": _Entry(ResNet, {"blocks_per_stage": 5}, _RESNET),
    "resnet56": _Entry(ResNet, {"blocks_per_stage": 9}, _RESNET),
    "preresnet20": _Entry(PreResNet, {"blocks_per_stage": 2}, _GATED),
    "preresnet56": _Entry(PreResNet, {"blocks_per_stage": 6}, _GATED),
    "preresnet110": _Entry(PreResNet, {"blocks_per_stage": 12}, _GATED),
    "preresnet164": _Entry(PreResNet, {"blocks_per_stage": 18}, _GATED),
    "vgg19": _Entry(Vgg, {}, _GATED),
    "resnet18": _Entry(DeepResNet, {"blocks": (2, 2, 2, 2)}, ("stem", *_GATED)),
    "resnet50": _Entry(DeepResNet, {"blocks": (3, 4, 6, 3), "bottleneck": True}, ("stem", *_GATED)),
    "deit_tiny": _Entry(VisionTransformer, {}, _DTYPES),
    "deit_small": _Entry(VisionTransformer, {"width": 384, "heads": 6}, _DTYPES),
    "deit_base": _Entry(VisionTransformer, {"width": 768, "heads": 12}, _DTYPES),
    "vit_patch4": _Entry(VisionTransformer, {"patch": 4, **_SMALL_VIT}, _DTYPES),
    "vit_patch2": _Entry(VisionTransformer, {"patch": 2, **_SMALL_VIT}, _DTYPES),
    "vit_nano_patch4": _Entry(VisionTransformer, {"patch": 4, **_NANO_VIT}, _DTYPES),
    "vit_nano_patch2": _Entry(VisionTransformer, {"patch": 2, **_NANO_VIT}, _DTYPES),
    "gpt_nano": _Entry(TextTransformer, {"width": 48, "depth": 3, "heads": 3}, _DTYPES),
    "gpt_micro": _Entry(TextTransformer, {}, _DTYPES),
    "gpt_mini": _Entry(TextTransformer, {"width": 192, "depth": 6, "heads": 6}, _DTYPES),
}


def create(name: str, *, num_outputs: int = 10, **kwargs: Any) -> nn.Module:
    """Creates a model by name.

    ================  ==========================================================
    `lenet_300_100`   LeNet-300-100, for inputs of any shape (flattened)
    `lenet5_caffe`    LeNet-5 as shipped with Caffe: 20, 50, 500
    `lenet5`          LeNet-5: 6, 16, 120, 84, on a field of at least 32 x 32
    `conv4`           Conv-4: 64, 64, 128, 128, 512
    `conv4_dropout`   Conv-4 with dropout, drawn when called with `train=True`
    `resnet20`        ResNet-20 for small images: 16, 32, 64
    `resnet32`        ResNet-32
    `resnet56`        ResNet-56
    `preresnet20`     Pre-activation ResNet-20 of bottlenecks: 16, 32, 64, times four
    `preresnet56`     Pre-activation ResNet-56
    `preresnet110`    Pre-activation ResNet-110
    `preresnet164`    Pre-activation ResNet-164
    `vgg19`           VGG-19 for small images, with batch normalisation
    `resnet18`        ResNet-18, with the stem for small images or that of ImageNet
    `resnet50`        ResNet-50
    `deit_tiny`       DeiT-Tiny for ImageNet: patches of 16 x 16, 12 blocks, width 192
    `deit_small`      DeiT-Small: width 384
    `deit_base`       DeiT-Base: width 768
    `vit_patch4`      A small transformer for images of 28 x 28 or 32 x 32: 9 blocks, width 96
    `vit_patch2`      The same for images of 8 x 8
    `vit_nano_patch4` A smaller one for images of 28 x 28: 6 blocks, width 48
    `vit_nano_patch2` The same for images of 8 x 8
    `gpt_nano`        A transformer of texts, of the sizes of minGPT: 3 blocks, width 48
    `gpt_micro`       4 blocks, width 128
    `gpt_mini`        6 blocks, width 192
    ================  ==========================================================

    Args:
        name: One of the names above.
        num_outputs: Outputs of the last layer, 1 or more; of a text its different tokens.
        **kwargs: `dtype` of the computation, `param_dtype`; of `lenet_300_100`, whether there is
            `dropout`; of LeNets with convolutions, `padding` ("VALID" or "SAME"); of `resnet20`
            to `resnet56`, `norm` ("batch", "group" or "none") and `shortcut` ("A" or "B"); of
            `resnet18` and `resnet50`, the `stem` ("cifar" or "imagenet"); of these two,
            pre-activation ResNets, VGG and `lenet5`, the `kind` of gates; of `lenet5`,
            `activation` and how many layers are `gated`. See `LeNet`, `ResNet`, `DeepResNet`,
            `PreResNet`, `Vgg`, `VisionTransformer` and `TextTransformer`.

    Returns:
        A Flax Linen module.

    Raises:
        ValueError: The name, a keyword or a value is not one of these.
    """
    if name not in _MODELS:
        raise ValueError(f"unknown model {_unknown(name, _MODELS)}")
    entry = _MODELS[name]
    for keyword in kwargs:
        if keyword not in entry.options:
            raise ValueError(
                f"unknown keyword of {name!r} {_unknown(keyword, ('num_outputs', *entry.options))}"
            )
    return entry.module(num_outputs=num_outputs, **entry.fixed, **kwargs)


def apply_fn(module: nn.Module) -> Callable[..., Any]:
    """The module as a pure function `(params, x) -> outputs`.

    Keyword arguments of that function are passed on to `module.apply`, such as
    `train=True, rngs={"dropout": key}`. It raises a `ValueError` for a module that keeps
    state besides its parameters (batch statistics).
    """

    def apply(params: Any, x: Any, /, **kwargs: Any) -> Any:
        try:
            return module.apply({"params": params}, x, **kwargs)
        except errors.ScopeCollectionNotFound as error:
            if not jax.tree.leaves(params):
                raise
            raise ValueError(_stateful(module, "state")) from error

    return apply


def init(module: nn.Module, key: PRNGKey, input_shape: tuple[int, ...]) -> Params:
    """Initial parameters of a module without state, a nested dict of arrays.

    Safe under `jit`, `vmap` over keys, and `jax.eval_shape`.

    Args:
        module: The module.
        key: A typed key.
        input_shape: Shape of one input, without the batch dimension.

    Returns:
        The parameters; the same key gives the same parameters.

    Raises:
        ValueError: The module keeps state besides its parameters (batch statistics), or
            refuses the shape.
    """
    variables = module.init(key, jnp.zeros((1, *input_shape)))
    if set(variables) != {"params"}:
        raise ValueError(_stateful(module, str(sorted(set(variables) - {"params"}))))
    return variables["params"]


def _stateful(module: nn.Module, state: str) -> str:
    """The error line of a module that is no pure function of its params."""
    cause, instead = "", ""
    if isinstance(module, ResNet) and module.norm == "batch":
        cause = " (norm='batch' carries statistics)"
        instead = "use norm='group' or 'none', or "
    return (
        f"{type(module).__name__} keeps {state} besides its params{cause}: {instead}"
        "call module.init and carry the state through module.apply(mutable=...)"
    )


def _unknown(name: str, known: Any) -> str:
    """The part of an error line that names what is unknown and what exists."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{name!r}{hint}: expected one of {', '.join(known)}"
