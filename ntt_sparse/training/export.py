"""Trained networks as safetensors files: parameters, masks and gates of one network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ntt_sparse._types import Masks, Params
from ntt_sparse.gates.network import Network, gated_channels
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.training.files import read_safetensors, write_safetensors

_FORMAT = "ntt_sparse trained network 1"


def save_network(path: str | Path, params: Params, masks: Masks, model_state: Any = None) -> None:
    """Writes the effective parameters and the masks of one network.

    Args:
        path: A file ending in `.safetensors`; it is replaced.
        params: Any pytree of arrays. Files hold paths alone, such as `"Dense_0/kernel"`, so of
            another one than nested dictionaries `load_masks` gives the structure back, but
            `load_network` does not.
        masks: Masks of the structure of `params`; leaves that are `None` are not stored.
        model_state: What the network carries besides, such as `{"batch_stats": ...}`.

    Raises:
        ValueError: `masks` does not fit `params`, two leaves have one path or the path of one
            goes on from that of another, or numbers are not finite.
    """
    effective = pruning_masks.apply(params, masks)
    arrays = {}
    for part, tree in ("params", effective), ("masks", masks), ("state", dict(model_state or {})):
        leaves = pruning_masks.named_leaves(tree)
        _check_nested(path, leaves)
        arrays |= {f"{part}/{name}": np.asarray(leaf) for name, leaf in leaves.items()}
    _check_finite(path, arrays)
    _write(path, arrays)


def load_network(path: str | Path) -> tuple[Params, Masks]:
    """Reads what `save_network` wrote.

    Returns:
        Parameters, exactly zero where pruned, and their masks, `None` for leaves without one:
        nested dictionaries by the parts of each path. Where a network has tuples, lists, keys
        that are no strings or hold a slash (Haiku's `"mlp/~/linear_0"`), or NNX's `State`, that
        is another structure than its own; their leaves are told by
        `ntt_sparse.pruning.masks.named_leaves`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file does not hold a network.
    """
    arrays = _read(path)
    params, masks = _under("params/", arrays), _under("masks/", arrays)
    if not params:
        raise ValueError(f"{path} holds no parameters: expected a file that save_network wrote")
    _check_masks(path, masks, params)
    return _nested(path, params), _nested(path, {name: masks.get(name) for name in params})


def load_model_state(path: str | Path) -> dict[str, Any]:
    """Reads the model state that `save_network` wrote; empty if the network carries none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or of something else.
    """
    return _nested(path, _under("state/", _read(path)))


def load_masks(path: str | Path, params: Params) -> Masks:
    """Reads the masks of a file of `save_network` for a network, and checks that they fit it.

    Args:
        path: The file.
        params: Of the network that the masks are for, or their shapes.

    Returns:
        Of the structure of `params`, `None` where the file has no mask.

    Raises:
        ValueError: The file holds no masks, or some that the network has no parameter for, of
            another shape, or that are not boolean, or two leaves of `params` have one path.
    """
    found = _under("masks/", _read(path))
    leaves = pruning_masks.named_leaves(params)
    if not found:
        raise ValueError(f"{path} holds no masks: expected a file that save_network wrote")
    _check_masks(path, found, leaves)
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: found.get(pruning_masks.path_name(keys)), params
    )


def save_gates(path: str | Path, gates: Mapping[str, Any]) -> None:
    """Writes what the channels of each gate are multiplied by, as `layer.values` has it.

    Args:
        path: A file ending in `.safetensors`; it is replaced.
        gates: By path, `(n,)`; booleans say which channels are open.
    """
    _write(path, {f"gates/{name}": np.asarray(value) for name, value in gates.items()})


def load_gates(path: str | Path, network: Network) -> dict[str, Any]:
    """Reads what `save_gates` wrote for a network, and checks that it fits.

    Args:
        path: The file.
        network: The description of the network that the gates are for.

    Returns:
        By path, `(n,)` float32.

    Raises:
        ValueError: The file holds no gates, others than the network has, of another width, or
            numbers that are not finite.
    """
    found, expected = _under("gates/", _read(path)), gated_channels(network)
    if set(found) != set(expected):
        raise ValueError(f"{path} has gates {sorted(found)}, the network has {sorted(expected)}")
    for name, value in found.items():
        if value.shape != (expected[name],):
            raise ValueError(
                f"{path}: gate {name!r} has shape {value.shape}, expected ({expected[name]},)"
            )
        if value.dtype != bool and not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"{path}: gate {name!r} is {value.dtype}, expected numbers or booleans"
            )
        if not np.all(np.isfinite(value)):
            raise ValueError(f"{path}: gate {name!r} holds numbers that are not finite")
    return {name: jnp.asarray(found[name], jnp.float32) for name in expected}


def _write(path: str | Path, arrays: dict[str, Any]) -> None:
    write_safetensors(
        Path(path), {k: jnp.asarray(v) for k, v in arrays.items()}, {"format": _FORMAT}
    )


def _read(path: str | Path) -> dict[str, Any]:
    header, arrays = read_safetensors(Path(path))
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has format {header.get('format')!r}, expected {_FORMAT!r}: a file of "
            "ntt_sparse.training.export"
        )
    _check_finite(path, arrays)
    return arrays


def _check_finite(path: str | Path, arrays: Mapping[str, Any]) -> None:
    for name, value in arrays.items():
        if not np.all(np.isfinite(value)):
            raise ValueError(f"{path}: {name!r} holds numbers that are not finite")


def _check_masks(path: str | Path, masks: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    for name, mask in masks.items():
        if name not in leaves:
            raise ValueError(f"{path} has a mask of {name!r}, the network has {sorted(leaves)}")
        if mask.dtype != bool or mask.shape != leaves[name].shape:
            raise ValueError(
                f"{path}: the mask of {name!r} is {mask.dtype}{list(mask.shape)}, expected "
                f"bool{list(leaves[name].shape)}"
            )


def _under(prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _nested(path: str | Path, leaves: dict[str, Any]) -> Any:
    _check_nested(path, leaves)
    return traverse_util.unflatten_dict(leaves, sep="/")


def _check_nested(path: str | Path, leaves: Mapping[str, Any]) -> None:
    inner = {
        "/".join(name.split("/")[:end]) for name in leaves for end in range(name.count("/") + 1)
    }
    if both := sorted(inner & leaves.keys()):
        raise ValueError(f"{path}: {both[0]!r} is an array, and others are inside it")
