"""Which neurons go: the criteria of the study, and what each of them keeps."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.neuron_pruning_members import Run, Smaller
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.pruning import neurons
from ntt_sparse.similarity.features import capture

CRITERIA = {
    "cka": "CKA, greedy",
    "cka_oneshot": "CKA, one-shot",
    "cka_sequential": "CKA, layer after layer",
    "l1": "L1",
    "random": "random",
}
BASELINE = "l1"
"""What the others are compared with."""

# Independent of the streams that training and the choice of images fold from a key, which are
# numbers of three and four digits.
_RANDOM_STREAM = 1_000_000


class Decision(NamedTuple):
    """Neurons of a network that go, by layer.

    Attributes:
        removed: Their places, the first to go first.
        similarity: CKA of the layer with what is left of it, all other layers being whole.
    """

    removed: dict[str, np.ndarray]
    similarity: dict[str, float]


def activation_fn(config: Any, module: Any) -> Callable[..., dict[str, Array]]:
    """`(params, images, kept={}) -> {layer: activations}`, compiled; see `prune_sequentially`."""
    return _activation_fn(module, config.activations)


@functools.lru_cache(maxsize=64)
def _activation_fn(module: LeNet, which: str) -> Callable[..., dict[str, Array]]:
    hidden = [f"Conv_{index}" for index in range(sum(map(len, module.stages)))]
    hidden += [f"Dense_{index}" for index in range(len(module.hidden))]
    apply = capture(module, hidden)

    @jax.jit
    def activations_of(params, images, kept):
        params = silenced(params, kept)
        features = apply({"params": params}, images)[1]
        return {
            name: jax.nn.relu(value) if which == "after" else value
            for name, value in features.items()
        }

    return activations_of


def silenced(params: Any, kept: Mapping[str, Any]) -> Any:
    """Parameters where neurons that go give the same for all inputs."""
    params = dict(params)
    for name, left in kept.items():
        kernel = jnp.where(left, params[name]["kernel"], 0)
        params[name] = {**params[name], "kernel": kernel}
    return params


def decide(
    config: Any,
    module: LeNet,
    network: Smaller,
    run: Run,
    rate: float,
    images: Float[Array, "n ..."],
    iteration: int,
) -> Decision:
    """The neurons of a network that a criterion removes.

    Args:
        config: The settings.
        module: The network.
        network: Its parameters.
        run: The criterion and the seed.
        rate: Part of the neurons that goes, of each layer or of all, as the settings say.
        images: Whose activations are compared.
        iteration: Counted from the whole network, 0.
    """
    widths = {name: len(ids) for name, ids in network.units.items()}
    activations_of = activation_fn(config, module)
    whole = activations_of(network.params, images, {})
    if config.amount == "rate":
        counts = neurons.counts_at_rate(widths, rate)
    else:
        counts = {name: width - 1 for name, width in widths.items()}

    similarities: dict[str, np.ndarray] = {}
    if run.criterion == "cka_sequential":
        curves = neurons.prune_sequentially(
            lambda kept: activations_of(network.params, images, kept), counts
        )
        orders = {name: curve.order for name, curve in curves.items()}
    elif run.criterion in ("cka", "cka_oneshot"):
        mode = "greedy" if run.criterion == "cka" else "oneshot"
        curves = neurons.prune_layers(whole, counts, mode=mode)
        orders = {name: curve.order for name, curve in curves.items()}
        similarities = {name: np.asarray(curve.similarity) for name, curve in curves.items()}
    elif run.criterion == "l1":
        orders = {
            name: neurons.l1_prune_order(network.params[name]["kernel"], count)
            for name, count in counts.items()
        }
    else:
        key = jax.random.fold_in(jax.random.key(run.seed), _RANDOM_STREAM)
        key = jax.random.fold_in(key, iteration)
        orders = {
            name: neurons.random_prune_order(jax.random.fold_in(key, i), widths[name], count)
            for i, (name, count) in enumerate(counts.items())
        }
    # Of what the criterion did not look at, or not with all other layers whole.
    for name, order in orders.items():
        if name not in similarities:
            similarities[name] = np.asarray(neurons.similarity_along(whole[name], order))
    if config.amount == "threshold":
        counts = neurons.counts_at_threshold(similarities, config.threshold)
    elif config.amount == "total":
        total = min(round(rate * sum(widths.values())), sum(map(len, similarities.values())))
        counts, _ = neurons.counts_of_total(similarities, total)
    return Decision(
        {name: np.asarray(orders[name])[: counts[name]] for name in orders},
        {
            name: float(curve[counts[name] - 1]) if counts[name] else 1.0
            for name, curve in similarities.items()
        },
    )
