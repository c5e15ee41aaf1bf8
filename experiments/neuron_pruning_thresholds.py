"""Similarity thresholds on whole networks: what each would remove, by two readings.

The paper prunes until the similarity falls below a threshold and finds none that is of use
(Appendix B). Its similarity is that of the layer without one neuron. The one of the layer without
all neurons that went before comes with the order.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.neuron_pruning_members import Smaller
from experiments.neuron_pruning_orders import silenced
from ntt_sparse.pruning import neurons

THRESHOLDS = (0.9999, 0.999, 0.99, 0.98, 0.95, 0.9, 0.8)
READINGS = {"cumulative": "cumulative", "l1": "cumulative, in the order of L1", "alone": "alone"}


def rows(
    network: Smaller,
    activations: Mapping[str, Float[Array, "n ... p"]],
    accuracies: Callable[[Any], dict[str, float]],
) -> list[dict[str, Any]]:
    """For each reading and threshold the neurons left of each layer, and accuracies at once.

    Args:
        network: The whole one.
        activations: Of each hidden layer.
        accuracies: `params -> {part of the data: accuracy}`.
    """
    found = []
    for reading in READINGS:
        orders, curves = {}, {}
        for name, x in activations.items():
            if reading == "l1":
                kernel = network.params[name]["kernel"]
                order = neurons.l1_prune_order(kernel, kernel.shape[-1])
                similarity = neurons.similarity_along(x, order)
            elif reading == "cumulative":
                order, similarity = neurons.cka_prune_curve(x)
            else:
                order = neurons.cka_prune_order(x, x.shape[-1], mode="oneshot")
                similarity = without_each(x, order)
            # One neuron of each layer stays.
            orders[name], curves[name] = np.asarray(order)[:-1], similarity[:-1]
        for threshold in THRESHOLDS:
            counts = neurons.counts_at_threshold(curves, threshold)
            kept = {}
            for name, count in counts.items():
                left = np.ones(len(network.units[name]), bool)
                left[orders[name][:count]] = False
                kept[name] = jnp.asarray(left)
            found.append({
                "reading": reading,
                "threshold": threshold,
                "left": {name: int(jnp.sum(left)) for name, left in kept.items()},
                **accuracies(silenced(network.params, kept)),
            })  # fmt: skip
    return found


def without_each(x: Float[Array, "n ... p"], order: Array) -> Float[np.ndarray, " count"]:
    """CKA of a layer with itself without one neuron, of each in this order."""
    one = jax.vmap(lambda index: neurons.similarity_along(x, index[None])[0])
    return np.asarray(one(jnp.asarray(order)))
