"""Networks to be used elsewhere: with their description in a file, or as compiled programs."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ntt_sparse.gates import network_text
from ntt_sparse.models import described
from ntt_sparse.models.described import STATISTICS, Described
from ntt_sparse.training.files import one_line, read_safetensors, write_safetensors

_FORMAT = "ntt_sparse network 1"
_SUFFIX = ".safetensors"
# Trained weights compress to no such part of their size.
_MOST_COMPRESSED = 1000


def save(path: str | Path, module: Described, variables: Mapping[str, Any]) -> None:
    """Writes a network with its description.

    Args:
        path: A file ending in `.safetensors`, which is replaced, or another name: then an Orbax
            checkpoint, a new directory.
        module: The network, such as `ntt_sparse.pruning.compact` makes.
        variables: Of it.

    Raises:
        ValueError: Variables do not fit the module, or the directory exists.
        TypeError: The module is no described network.
    """
    if not isinstance(module, Described):
        raise TypeError(
            f"the module is a {type(module).__name__}, expected a ntt_sparse.models.described."
            "Described, as pruning.compact makes: for others there is training.export.save_network"
        )
    path = Path(path)
    arrays = _checked(module, _flat(variables), "the variables")
    header = {"format": _FORMAT, "network": network_text.to_json(module.network)}
    for field in ("dtype", "param_dtype"):
        value = getattr(module, field)
        header[field] = "" if value is None else jnp.dtype(value).name
    if path.suffix == _SUFFIX:
        write_safetensors(path, arrays, header)
        return
    from orbax.checkpoint import v1 as ocp

    if path.exists():
        raise ValueError(f"{path} exists: expected a new directory, or a file ending in {_SUFFIX}")
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    ocp.save(str(path.absolute()), {"header": text, "arrays": arrays})


def load(path: str | Path) -> tuple[Described, dict[str, Any]]:
    """Reads what `save` wrote.

    Returns:
        The module and its variables.

    Raises:
        ValueError: The file holds no such network, or its arrays do not fit its description.
        FileNotFoundError: There is none.
    """
    path = Path(path)
    header, arrays = (_read_orbax if path.is_dir() else read_safetensors)(path)
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has format {header.get('format')!r}, expected {_FORMAT!r}: a network that "
            "ntt_sparse.training.deploy.save wrote"
        )
    dtype = header.get("dtype") or None
    try:
        network = network_text.from_json(header.get("network", ""))
        kinds = (dtype and jnp.dtype(dtype), jnp.dtype(header.get("param_dtype", "")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    if not all(kind is None or jnp.issubdtype(kind, jnp.floating) for kind in kinds):
        raise ValueError(f"{path} is of dtypes {kinds}, expected floating-point ones")
    module = Described(network, *kinds)
    arrays = _checked(module, arrays, str(path))
    nested = traverse_util.unflatten_dict(arrays, sep="/")
    return module, {collection: nested.get(collection, {}) for collection in nested}


def export(
    module: Any,
    variables: Mapping[str, Any],
    input_shape: tuple[int, ...],
    *,
    batch: int | None = None,
    dtype: Any = jnp.float32,
    platforms: tuple[str, ...] | None = None,
) -> bytes:
    """The network in evaluation as a serialised program, its weights inside.

    It runs wherever JAX does, without this package:
    `jax.export.deserialize(bytearray(data)).call(x)`.

    Args:
        module: Any Linen module that takes examples.
        variables: Of it.
        input_shape: Of one example.
        batch: How many examples the program takes; by default any number.
        dtype: Of the examples.
        platforms: For which it is compiled, such as `("cpu", "cuda")`; by default the one here.

    Raises:
        ValueError: The module does not take such examples.
    """
    from jax import export as jax_export

    size: Any = jax_export.symbolic_shape("batch")[0] if batch is None else batch
    example = jax.ShapeDtypeStruct((size, *input_shape), dtype)
    program = jax.jit(lambda x: module.apply(variables, x))
    try:
        program.eval_shape(example)
    except Exception as error:  # Modules raise many kinds.
        raise ValueError(
            f"the module does not take examples of shape {input_shape} ({one_line(error)})"
        ) from error
    exported = jax_export.export(program, platforms=platforms)(example)
    return bytes(exported.serialize())


def _flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    flat = traverse_util.flatten_dict(dict(variables), sep="/")
    return {path: jnp.asarray(leaf) for path, leaf in flat.items()}


def _checked(module: Described, arrays: dict[str, Any], where: str) -> dict[str, Any]:
    """The arrays, if they are just those of the module."""
    leaves = {
        f"params/{path}": leaf for path, leaf in described.parameter_shapes(module.network).items()
    } | {
        f"{STATISTICS}/{path}": leaf
        for path, leaf in described.statistics_shapes(module.network).items()
    }
    expected = {path: leaf.shape for path, leaf in leaves.items()}
    given = {path: jnp.shape(leaf) for path, leaf in arrays.items()}
    if wrong := sorted(path for path, _ in set(given.items()) ^ set(expected.items())):
        path, more = wrong[0], len(set(wrong)) - 1
        raise ValueError(
            f"{where} do not fit the network: {path!r} has shape {given.get(path, 'none')}, "
            f"expected {expected.get(path, 'none')}" + (f", and {more} more" if more else "")
        )
    for path, leaf in arrays.items():
        if not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating):
            raise ValueError(f"{where}: {path!r} is {leaf.dtype}, expected floating-point numbers")
        if not bool(jnp.all(jnp.isfinite(leaf))):
            raise ValueError(f"{where}: {path!r} holds numbers that are not finite")
    return arrays


def _read_orbax(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    from orbax.checkpoint import v1 as ocp

    try:
        claimed = jax.tree.leaves(ocp.metadata(str(path.absolute())).metadata)
        size = sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in claimed)
        stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if size > _MOST_COMPRESSED * stored:
            raise ValueError(f"{stored} bytes that claim to hold {size}")
        tree = ocp.load(str(path.absolute()))
        return dict(json.loads(bytes(np.asarray(tree["header"])))), dict(tree["arrays"])
    except Exception as error:  # What is damaged raises many kinds.
        raise ValueError(f"{path} is no network file, or damaged ({one_line(error)})") from error


def compiled(module: Any, variables: Mapping[str, Any], x: Any) -> Callable[[], Any]:
    """A call that runs a network in evaluation on some examples and waits for its outputs."""
    variables, x = jax.device_put((dict(variables), jnp.asarray(x)))
    program = jax.jit(lambda variables, x: module.apply(variables, x)).lower(variables, x).compile()
    return lambda: jax.block_until_ready(program(variables, x))


def latencies(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 15, least: float = 0.02
) -> dict[str, list[float]]:
    """Times calls in turn, so that what else the machine does falls on all of them.

    Args:
        calls: By name.
        rounds: Turns of each, 1 or more; one more that does not count comes first.
        least: Seconds that a turn takes at least: it is the mean of as many calls as that needs.

    Returns:
        Seconds of one call, of each turn.

    Raises:
        ValueError: There are no calls, or no rounds.
    """
    if not calls or rounds < 1:
        raise ValueError(f"{len(calls)} calls in {rounds} rounds, expected 1 or more of both")
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            count, began = 0, time.perf_counter()
            while not count or time.perf_counter() - began < least:
                call()
                count += 1
            if round_:
                found[name].append((time.perf_counter() - began) / count)
    return found
