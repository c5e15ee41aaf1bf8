"""How gates are optimised apart from the network they are in."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ntt_sparse._types import Params
from ntt_sparse.gates.layer import find


def labels(params: Params) -> Any:
    """`"gate"` for each parameter of a gate, `"network"` for the others, for `optax.partition`.

    Raises:
        ValueError: There is no gate.
    """
    gates = find(params)

    def label(path, _):
        keys = (path[:depth] for depth in range(1, len(path)))
        above = {jax.tree_util.keystr(each, simple=True, separator="/") for each in keys}
        return "gate" if above & gates.keys() else "network"

    return jax.tree_util.tree_map_with_path(label, params)


def cold_start(
    inner: optax.GradientTransformation, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimiser so that gates stay as they are in its first steps.

    For gates these steps do not exist: no gradient, decay or momentum is seen or kept of them,
    as in the published code (Bu et al. 2021, Table 4: 20 epochs). Gates and network have a
    state each, so whatever `inner` counts, it counts for gates from their own first step: put
    a schedule of the learning rate after the wrapper,
    `optax.chain(cold_start(optax.trace(0.9), 100), optax.scale_by_learning_rate(schedule))`,
    for it to be the same for both. A transformation that joins all parameters, such as clipping
    by the global norm, belongs before it, and `ntt_sparse.pruning.transform.keep_masked` around
    it.

    Args:
        inner: Any gradient transformation.
        steps: Updates without gates, 0 or more.

    Returns:
        A transformation. Its `init` raises ValueError for parameters without a gate.

    Raises:
        ValueError: `steps` is negative.
    """
    if steps < 0:
        raise ValueError(f"a cold start of {steps} steps, expected 0 or more")
    held = optax.conditionally_mask(inner, lambda step, **_: jnp.asarray(step) >= steps)
    return optax.partition({"gate": held, "network": inner}, labels)
