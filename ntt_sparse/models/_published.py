"""Published weights by the names of another library, read and fitted to a network."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util


def read(path: str | Path, convert: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What `convert` makes of the arrays of a safetensors file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no safetensors file, or `convert` refuses the arrays.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no safetensors file of arrays NumPy knows: {error}") from error
    try:
        return convert(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def fit(
    found: Mapping[str, np.ndarray], shapes: Mapping[str, Any], network: str, fields: str
) -> dict[str, Any]:
    """Arrays as the tree of a network, in its dtypes.

    Args:
        found: By path, such as `"params/head/kernel"`.
        shapes: The tree with shapes and dtypes in place of arrays.
        network: What it is, for messages.
        fields: On which shapes depend, for messages.

    Raises:
        ValueError: Paths or shapes differ, or values are no finite floats.
    """
    expected: dict[str, Any] = traverse_util.flatten_dict(dict(shapes), sep="/")
    missing, unknown = set(expected) - set(found), set(found) - set(expected)
    if missing or unknown:
        raise ValueError(
            f"missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}: these are not the "
            f"weights of {network}"
        )
    for path, value in found.items():
        if value.shape != expected[path].shape:
            raise ValueError(
                f"{path} has shape {value.shape}, expected {expected[path].shape} for {fields}"
            )
        # Of bfloat16 NumPy knows no kind.
        if not jnp.issubdtype(value.dtype, jnp.floating) or not jnp.all(jnp.isfinite(value)):
            raise ValueError(f"{path} is {value.dtype}, expected finite floating-point numbers")
    leaves = {path: jnp.asarray(found[path], expected[path].dtype) for path in expected}
    return traverse_util.unflatten_dict(leaves, sep="/")
