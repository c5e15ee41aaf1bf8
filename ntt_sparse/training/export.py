"""Trained networks as files: parameters and masks of one network in a plain `.npz`."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ntt_sparse._types import Masks, Params
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
