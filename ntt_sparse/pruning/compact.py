"""Networks that really get smaller: channels that do nothing are taken out.

A channel is kept if it depends on the input and the output depends on it, as in
`ntt_sparse.gates.channels`, by the gates and by the weights that are not zero. What the others
add is the same for every input: a channel closed before normalisation and ReLU is its rectified
shift. It is computed once, in double precision, and becomes a bias of the layers that read it.
Where a convolution has zeros around its input that bias differs at the borders, and is kept as
the few different rows and columns that it has. So the small network is the same function.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ntt_sparse._types import Masks, Params
from ntt_sparse.gates import channels
from ntt_sparse.gates import layer as gates_layer
from ntt_sparse.gates import network as graph
from ntt_sparse.gates.channels import Counts
from ntt_sparse.gates.network import Conv, Dense, Network, Norm
from ntt_sparse.models import described
from ntt_sparse.models.described import STATISTICS, Described
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.pruning._small import SmallNetwork

_CHOICES = ("refuse", "remove")


class Compacted(NamedTuple):
    """A network without the channels that do nothing.

    Attributes:
        module: An ordinary Linen module; its description is `module.network`.
        variables: Its parameters and running statistics.
        kept: Of each node of the whole network, which channels are left, growing.
        before: What the whole network costs.
        after: What is left of that; `channels` counts open gates.
        constants: Parameters in addition: the biases and shifts that stand for channels that
            were taken out. The small network has `after.parameters + constants` parameters.
        removed: Layers of which nothing is left.
    """

    module: Described
    variables: dict[str, Any]
    kept: dict[str, np.ndarray]
    before: Counts
    after: Counts
    constants: int
    removed: tuple[str, ...]


def compact(
    module: Any,
    variables: Mapping[str, Any],
    input_shape: tuple[int, ...],
    *,
    masks: Masks | None = None,
    gates: Mapping[str, Any] | None = None,
    empty: str = "refuse",
) -> Compacted:
    """The small network of a gated or masked one of `ntt_sparse.models`.

    In evaluation it gives the outputs of the large one, up to rounding of the parameters' dtype:
    1e-5 of the largest output in float32. Constants are those of evaluation; in training, where a
    closed channel is its shift, they are the same if its running mean is zero. Dropout draws anew.

    Args:
        module: The large network, with a method `network` that describes it and, if it has
            gates, their `kind`; or a `Described` one.
        variables: Of it: `params`, and what else it has.
        input_shape: Of one example. Constants at borders are for images of this size.
        masks: Of the parameters, those of gates among them; what is masked is zero.
        gates: What channels are multiplied by, `(n,)` of each gate by path, in place of what
            the variables say; such as `ntt_sparse.training.export.load_gates` reads.
        empty: What to do about a layer of which no channel is left: `"refuse"`, or `"remove"`
            it, so that its constant stands in its place (a residual block becomes its
            shortcut).

    Returns:
        The small network, and what it costs.

    Raises:
        ValueError: Masks, gates or parameters do not fit the network, a number is not finite,
            or a layer is left empty and `empty` is `"refuse"`.
    """
    if "params" not in variables:
        raise ValueError(f"variables hold {sorted(variables)}, expected 'params' among them")
    if isinstance(module, Described):
        network = module.network
        if graph.input_shape(network) != tuple(input_shape):
            raise ValueError(
                f"input_shape is {input_shape}, expected {graph.input_shape(network)}: constants "
                "are of images of that size"
            )
    else:
        if not hasattr(module, "network"):
            raise ValueError(
                f"{type(module).__name__} has no method 'network' that describes it: expected a "
                "model of ntt_sparse.models, or describe it for compact_network"
            )
        network = graph.check(module.network(input_shape))
    params = variables["params"]
    if masks is not None:
        params = pruning_masks.apply(params, masks)
    values = gates
    if values is None:
        # Masks may close gates as well.
        masked = {**variables, "params": params}
        values = gates_layer.values(getattr(module, "kind", None), masked, network)
    return compact_network(
        network, params, variables.get(STATISTICS, {}), gates=values, empty=empty,
        dtype=module.dtype if hasattr(module, "dtype") else None,
    )  # fmt: skip


def compact_network(
    network: Network,
    params: Params,
    statistics: Mapping[str, Any] | None = None,
    *,
    gates: Mapping[str, Any] | None = None,
    masks: Masks | None = None,
    empty: str = "refuse",
    dtype: Any = None,
) -> Compacted:
    """The small network of any network that is described.

    Args:
        network: The description.
        params: By the paths that are the names of nodes, nested; what else there is, such as
            parameters of gates, is left alone.
        statistics: Running statistics of batch normalisation, nested likewise.
        gates: What the channels of each gate are multiplied by, `(n,)`, by path.
        masks: See `compact`.
        empty: See `compact`.
        dtype: Of the computation.

    Returns:
        The small network, and what it costs.

    Raises:
        ValueError: See `compact`.
    """
    if empty not in _CHOICES:
        raise ValueError(f"{empty=} is unknown, expected one of {', '.join(_CHOICES)}")
    if masks is not None:
        params = pruning_masks.apply(params, masks)
    weights = _leaves(params, described.parameter_shapes(network), "parameter")
    state = _leaves(statistics or {}, described.statistics_shapes(network), "statistic")
    gates = _checked_gates(network, gates or {})
    weights = _gated(network, weights, gates)

    open_ = {path: value != 0 for path, value in gates.items()}
    connected = _connected(network, weights)
    reached, counted = channels.ways(network, open_, connected=connected)
    kept = {name: np.flatnonzero(mask) for name, mask in counted.items()}
    last = list(network.nodes)[-1]
    removed = tuple(
        name
        for name, node in network.nodes.items()
        if isinstance(node, Conv | Dense)
        and not (len(kept[name]) if name != last else np.any(reached[name]))
    )
    if removed and empty == "refuse":
        raise ValueError(
            f"no channel is left of {', '.join(removed)}: keep one open there (a budget with "
            "keep=1), or empty='remove', which puts the constant that they give in their place"
        )
    builder = SmallNetwork(
        network, weights, state, kept, {k: np.asarray(v) for k, v in reached.items()}
    )
    small = builder.build()
    after = channels.tally(network, open_, counted)
    kinds = {leaf.dtype for leaf in weights.values()}
    module = Described(small, dtype, jnp.result_type(*kinds) if kinds else jnp.float32)
    return Compacted(
        module,
        builder.variables(),
        kept,
        channels.whole(network),
        after,
        builder.added,
        removed,
    )


def _leaves(tree: Any, shapes: Mapping[str, Any], what: str) -> dict[str, np.ndarray]:
    """The arrays that the description asks for, by path, checked."""
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    found: dict[str, np.ndarray] = {}
    for path, leaf in shapes.items():
        if path not in flat:
            raise ValueError(f"there is no {what} {path!r}, expected {sorted(shapes)}")
        value = np.asarray(flat[path])
        if value.shape != leaf.shape:
            raise ValueError(f"{what} {path!r} has shape {value.shape}, expected {leaf.shape}")
        if not np.all(np.isfinite(value)):
            raise ValueError(f"{what} {path!r} is not finite: expected finite numbers")
        found[path] = value
    return found


def _checked_gates(network: Network, gates: Mapping[str, Any]) -> dict[str, np.ndarray]:
    expected = graph.gated_channels(network)
    if set(gates) != set(expected):
        raise ValueError(f"gates are {sorted(gates)}, the network has {sorted(expected)}")
    found = {path: np.asarray(value) for path, value in gates.items()}
    for path, value in found.items():
        if value.shape != (expected[path],):
            raise ValueError(
                f"gate {path!r} has shape {value.shape}, expected ({expected[path]},): one number "
                "per channel"
            )
        # In single precision, which they are multiplied in.
        kinds = (jnp.floating, jnp.integer, jnp.bool_)
        real = any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
        if not real or not np.all(np.abs(value.astype(float)) <= np.finfo(np.float32).max):
            raise ValueError(f"gate {path!r} is {value}, expected finite numbers")
    return found


def _gated(
    network: Network, weights: Mapping[str, np.ndarray], gates: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Gates multiplied into what makes their channels, in the precision of the network."""
    result = dict(weights)
    for name, node in network.nodes.items():
        if path := graph.gate(node):
            for leaf in ("kernel", "scale", "bias"):
                if (full := f"{name}/{leaf}") in result:
                    result[full] = result[full] * gates[path].astype(result[full].dtype)
    return result


def _connected(network: Network, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Which channels feed which, by the weights that are not zero."""
    shapes = graph.shapes(network)
    found = {}
    for name, node in network.nodes.items():
        if isinstance(node, Conv | Dense):
            kernel = weights[f"{name}/kernel"]
            kernel = kernel.reshape(-1, shapes[node.input][-1], node.channels)
            found[name] = np.any(kernel != 0, 0)
        elif isinstance(node, Norm) and not node.groups:
            found[name] = weights[f"{name}/scale"] != 0
    return found
