"""Weights of ResNets as torchvision names them, from safetensors files.

The files that are published are pickles, which are not read here. With PyTorch they are converted
by `safetensors.torch.save_file(torch.load(path, weights_only=True), "resnet50.safetensors")`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ntt_sparse.models import _published
from ntt_sparse.models.deep_resnet import DeepResNet

# Stage and block, a layer or that of the shortcut, the leaf.
_NAME = re.compile(r"(?:layer(\d+)\.(\d+)\.)?(?:(conv|bn)(\d+)|downsample\.([01]))\.(\w+)")
_DENSE = {"fc.weight": "kernel", "fc.bias": "bias"}
# What torchvision calls the leaves of a normalisation.
_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_STATISTICS = ("mean", "var")
# Not a weight: how many batches were seen.
_IGNORED = "num_batches_tracked"


def load_resnet(path: str | Path, module: DeepResNet) -> dict[str, Any]:
    """The variables of a ResNet from a safetensors file with the names of torchvision.

    Args:
        path: Of the file.
        module: The network, with `stem="imagenet"`; of its gates the parameters at the start are
            taken.

    Returns:
        `{"params": ..., "batch_stats": ...}` for `module.apply`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no safetensors file, or holds other names or shapes than the network.
    """
    return _published.read(path, lambda arrays: from_arrays(arrays, module))


def from_arrays(arrays: Mapping[str, Any], module: DeepResNet) -> dict[str, Any]:
    """The variables of a ResNet from arrays by the names of torchvision; see `load_resnet`.

    Raises:
        ValueError: Names or shapes are other than the network's.
    """
    found = {
        _place(name, module): _array(name, np.asarray(value))
        for name, value in arrays.items()
        if not name.endswith(_IGNORED)
    }
    # Its shapes do not depend on the size of images.
    shapes = jax.eval_shape(
        lambda key: module.init(key, jnp.zeros((1, 64, 64, 3))), jax.random.key(0)
    )
    gates = [
        path
        for path in traverse_util.flatten_dict(dict(shapes), sep="/")
        if "/gate/" in path or "Gate_" in path
    ]
    if gates:
        start = module.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        flat: dict[str, Any] = traverse_util.flatten_dict(dict(start), sep="/")
        found |= {path: np.asarray(flat[path]) for path in gates}
    return _published.fit(
        found,
        shapes,
        f"{module.blocks} blocks, bottleneck={module.bottleneck}",
        f"num_outputs={module.num_outputs} and stem={module.stem!r}",
    )


def _place(name: str, module: DeepResNet) -> str:
    """The path of an array among the variables, `"params/..."` or `"batch_stats/..."`."""
    if name in _DENSE:
        return f"params/Dense_0/{_DENSE[name]}"
    if match := _NAME.fullmatch(name):
        stage, block, kind, number, shortcut, leaf = match.groups()
        place = f"stage{stage}_block{int(block) + 1}/" if stage else ""
        index = int(number) - 1 if number else 3 if module.bottleneck else 2
        if (kind == "conv" or shortcut == "0") and leaf == "weight":
            return f"params/{place}Conv_{index}/kernel"
        if (kind == "bn" or shortcut == "1") and leaf in _NORM:
            collection = "batch_stats" if _NORM[leaf] in _STATISTICS else "params"
            return f"{collection}/{place}BatchNorm_{index}/{_NORM[leaf]}"
    raise ValueError(f"{name!r} is no array of a ResNet of torchvision")


def _array(name: str, value: np.ndarray) -> np.ndarray:
    """Channels last: kernels are (outputs, inputs, ...) there."""
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if name == "fc.weight" else value
