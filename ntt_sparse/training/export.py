"""Trained networks as files: parameters, masks and gates of one network in a plain `.npz`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ntt_sparse._types import Masks, Params
from ntt_sparse.gates.network import Network, gated_channels
from ntt_sparse.pruning import masks as pruning_masks


def save_network(path: str | Path, params: Params, masks: Masks, model_state: Any = None) -> None:
    """Writes the effective parameters and the masks of one network.

    Args:
        path: A file ending in `.npz`; it is replaced.
        params: Nested dictionaries of arrays.
        masks: Masks of the structure of `params`; leaves that are `None` are not stored.
        model_state: What the network carries besides, such as `{"batch_stats": ...}`.

    Raises:
        ValueError: `masks` does not fit `params`.
    """
    effective = pruning_masks.apply(params, masks)
    arrays = {
        f"params/{k}": np.asarray(v) for k, v in pruning_masks.named_leaves(effective).items()
    }
    arrays |= {f"masks/{k}": np.asarray(v) for k, v in pruning_masks.named_leaves(masks).items()}
    arrays |= {
        f"state/{k}": np.asarray(v)
        for k, v in pruning_masks.named_leaves(dict(model_state or {})).items()
    }
    with Path(path).open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_network(path: str | Path) -> tuple[Params, Masks]:
    """Reads what `save_network` wrote.

    Returns:
        Parameters, exactly zero where pruned, and their masks.

    Raises:
        ValueError: The file does not hold a network.
    """
    arrays = _read(path)
    params = _under("params/", arrays)
    if not params:
        raise ValueError(f"{path} holds no parameters: expected a file that save_network wrote")
    masks = {name: arrays.get(f"masks/{name}") for name in params}
    return _nested(params), _nested(masks)


def load_model_state(path: str | Path) -> dict[str, Any]:
    """Reads the model state that `save_network` wrote; empty if the network carries none.

    Raises:
        ValueError: The file is damaged.
    """
    return _nested(_under("state/", _read(path)))


def load_masks(path: str | Path, params: Params) -> Masks:
    """Reads the masks of a file of `save_network` for a network, and checks that they fit it.

    Args:
        path: The file.
        params: Of the network that the masks are for, or their shapes.

    Returns:
        Of the structure of `params`, `None` where the file has no mask.

    Raises:
        ValueError: The file holds no masks, or some that the network has no parameter for, of
            another shape, or that are not boolean.
    """
    found = _under("masks/", _read(path))
    leaves = pruning_masks.named_leaves(params)
    if not found:
        raise ValueError(f"{path} holds no masks: expected a file that save_network wrote")
    for name, mask in found.items():
        if name not in leaves:
            raise ValueError(f"{path} has a mask of {name!r}, the network has {sorted(leaves)}")
        if mask.dtype != bool or mask.shape != leaves[name].shape:
            raise ValueError(
                f"{path}: the mask of {name!r} is {mask.dtype}{list(mask.shape)}, expected "
                f"bool{list(leaves[name].shape)}"
            )
    return _nested({name: found.get(name) for name in leaves})


def save_gates(path: str | Path, gates: Mapping[str, Any]) -> None:
    """Writes what the channels of each gate are multiplied by, as `layer.values` has it.

    Args:
        path: A file ending in `.npz`; it is replaced.
        gates: By path, `(n,)`; booleans say which channels are open.
    """
    with Path(path).open("wb") as file:
        arrays = {f"gates/{name}": np.asarray(value) for name, value in gates.items()}
        np.savez_compressed(file, allow_pickle=False, **arrays)


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


def _read(path: str | Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: jnp.asarray(file[name]) for name in file.files}
    except OSError:
        raise
    except Exception as error:  # A damaged zip raises many kinds.
        raise ValueError(f"{path} is no network file, or damaged ({error})") from error


def _under(prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _nested(leaves: dict[str, Any]) -> Any:
    return traverse_util.unflatten_dict(leaves, sep="/")
