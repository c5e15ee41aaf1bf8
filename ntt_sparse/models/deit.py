"""Weights of DeiT as the public PyTorch checkpoints name them, from safetensors files.

The files that are published are pickles, which are not read here. With PyTorch they are converted
by `safetensors.torch.save_file(torch.load(path, weights_only=True)["model"], "deit.safetensors")`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntt_sparse.models import _published
from ntt_sparse.models.vit import VisionTransformer

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_LAYERS = {
    "norm1": "norm1", "attn.qkv": "attn/qkv", "attn.proj": "attn/proj", "norm2": "norm2",
    "mlp.fc1": "fc1", "mlp.fc2": "fc2",
}  # fmt: skip
_OTHERS = {"patch_embed.proj": "patch", "norm": "norm", "head": "head"}
_TOKENS = {"cls_token": "cls", "pos_embed": "position"}


def load_deit(
    path: str | Path, module: VisionTransformer, input_shape: tuple[int, int, int] = (224, 224, 3)
) -> dict[str, Any]:
    """The parameters of a vision transformer from a safetensors file with the names of DeiT.

    Args:
        path: Of the file.
        module: The network, such as `ntt_sparse.models.create("deit_tiny", num_outputs=1000)`.
        input_shape: `(height, width, channels)` of the images it was trained on.

    Returns:
        `{"params": ...}` for `module.apply`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no safetensors file, or holds other names or shapes than the network.
    """
    return _published.read(path, lambda arrays: from_arrays(arrays, module, input_shape))


def from_arrays(
    arrays: Mapping[str, Any],
    module: VisionTransformer,
    input_shape: tuple[int, int, int] = (224, 224, 3),
) -> dict[str, Any]:
    """The parameters of a vision transformer from arrays by the names of DeiT; see `load_deit`.

    Raises:
        ValueError: Names or shapes are other than the network's.
    """
    found = {_place(name): _array(np.asarray(value)) for name, value in arrays.items()}
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *input_shape)))
    return _published.fit(
        found,
        shapes,
        f"{module.depth} blocks",
        f"num_outputs={module.num_outputs}, width={module.width}, patch={module.patch} and "
        f"images {input_shape}",
    )


def _place(name: str) -> str:
    """The path of an array among the variables."""
    if name in _TOKENS:
        return f"params/{_TOKENS[name]}"
    block = _BLOCK.fullmatch(name)
    if block and block[2] in _LAYERS:
        layer, leaf = f"block_{block[1]}/{_LAYERS[block[2]]}", block[3]
    else:
        layer, _, leaf = name.rpartition(".")
        if layer not in _OTHERS or leaf not in ("weight", "bias"):
            raise ValueError(f"{name!r} is no array of DeiT without distillation")
        layer = _OTHERS[layer]
    if leaf == "weight":
        leaf = "scale" if layer.rpartition("/")[2].startswith("norm") else "kernel"
    return f"params/{layer}/{leaf}"


def _array(value: np.ndarray) -> np.ndarray:
    """Channels last: kernels are (outputs, inputs, ...) there."""
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if value.ndim == 2 else value
