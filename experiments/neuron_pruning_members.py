"""The members of the neuron pruning study: networks, how they start and how they get smaller."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from experiments.study import stack
from ntt_sparse.models.dropout import COLLECTION
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.pruning.compact import compact
from ntt_sparse.pruning.transform import keep_masked
from ntt_sparse.training.state import Member, create_member
from ntt_sparse.training.stopping import ACTIVE

CONVOLUTIONS = "lenet5_caffe"


class Run(NamedTuple):
    """One line of networks, from the whole one to the smallest."""

    criterion: str
    dropout: float
    seed: int


class Smaller(NamedTuple):
    """A network between two trainings.

    Attributes:
        params: Of the neurons that are left.
        units: Of each hidden layer, which neurons of the whole network these are, growing.
    """

    params: Any
    units: dict[str, np.ndarray]


def dense_runs(config: Any) -> list[Run]:
    """The whole networks, before any criterion tells them apart."""
    return [Run("dense", rate, seed) for rate in config.dropouts for seed in config.seeds]


def runs_of(config: Any) -> list[Run]:
    """Every criterion, dropout rate and seed."""
    return [
        Run(criterion, run.dropout, run.seed)
        for criterion in config.criteria.split(",")
        for run in dense_runs(config)
    ]


def member_names(runs: Sequence[Run]) -> list[str]:
    """Names such as `"cka-p0.5-s1"`, fit for file names."""
    return [f"{run.criterion}-p{float(run.dropout)!r}-s{run.seed}" for run in runs]


def stage_of(network: str, rate: float | None, iteration: int) -> str:
    """The name of a training, such as `"512-512-r0.2-i03"`; the first is for all rates."""
    return f"{network}-{'whole' if rate is None else f'r{rate!r}-i{iteration:02}'}"


def dense_of(run: Run) -> Run:
    """The whole network with which a line begins."""
    return Run("dense", run.dropout, run.seed)


def whole_widths(network: str) -> dict[str, int]:
    """Neurons or channels of each hidden layer of a network, from input to output."""
    if network == CONVOLUTIONS:
        return {"Conv_0": 20, "Conv_1": 50, "Dense_0": 500}
    return {f"Dense_{index}": int(width) for index, width in enumerate(network.split("-"))}


def make_module(widths: Mapping[str, int], num_outputs: int, *, dropout: bool) -> LeNet:
    """The network of these widths, which drops neurons of its hidden layers."""
    return LeNet(
        num_outputs=num_outputs,
        stages=tuple((width,) for name, width in widths.items() if name.startswith("Conv")),
        hidden=tuple(width for name, width in widths.items() if name.startswith("Dense")),
        dropout=dropout,
        initializer="torch",
    )


def has_dropout(config: Any) -> bool:
    """Whether any network drops neurons."""
    return any(rate > 0 for rate in config.dropouts)


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """Adam; neurons that are gone stay so."""
    return keep_masked(optax.adam(config.training.learning_rate))


def start(config: Any, network: str, num_outputs: int, input_shape: Any) -> list[Smaller]:
    """The whole networks before training; a seed fixes the weights, whatever the dropout."""
    widths = whole_widths(network)
    module = make_module(widths, num_outputs, dropout=False)
    init = jax.jit(module.init)
    params = {
        seed: init(jax.random.key(seed), jnp.zeros((1, *input_shape)))["params"]
        for seed in config.seeds
    }
    units = {name: np.arange(width) for name, width in widths.items()}
    return [Smaller(params[run.seed], units) for run in dense_runs(config)]


def make_members(
    config: Any,
    network: str,
    networks: Sequence[Smaller],
    runs: Sequence[Run],
    iteration: int,
) -> tuple[Member, dict[str, int]]:
    """Members of one shape, and their widths: those of the widest, or of the whole network.

    Where a network has fewer neurons, zeros stand in their place, which masks keep. The context
    says which neurons of the whole network there are, -1 for none. Optimisers start anew.
    """
    widths = whole_widths(network)
    if config.compact:
        widths = {name: max(len(each.units[name]) for each in networks) for name in widths}
    optimizer = make_optimizer(config)

    def member(params, masks, key, units, rate):
        # Of the neurons by their names in the whole network.
        drawn = {name: jnp.maximum(units[name], 0) for name in units}
        convolutional = sum(name.startswith("Conv") for name in drawn)
        dropped = {
            f"Dropout_{index}": {"rate": rate * (index >= convolutional), "units": drawn[name]}
            for index, name in enumerate(drawn)
        }
        state = {COLLECTION: dropped} if has_dropout(config) else {}
        context = {ACTIVE: jnp.ones((), bool), "units": units}
        return create_member(params, masks, optimizer, key, context, state)

    places = [_places(each, widths, config.compact) for each in networks]
    full = all(len(each.units[name]) == widths[name] for each in networks for name in widths)
    embedded = [embed(e.params, at, widths) for e, at in zip(networks, places, strict=True)]
    masks = [
        None if full else embed(jax.tree.map(np.ones_like, e.params), at, widths)
        for e, at in zip(networks, places, strict=True)
    ]
    none = jax.tree.map(lambda leaf: None, networks[0].params)
    stacked_masks = none if full else jax.tree.map(lambda m: m.astype(bool), stack(masks))
    units = []
    for each, at in zip(networks, places, strict=True):
        now = {name: np.full(width, -1, np.int32) for name, width in widths.items()}
        for name, index in at.items():
            now[name][index] = each.units[name]
        units.append(now)
    keys = stack([jax.random.fold_in(jax.random.key(run.seed), iteration) for run in runs])
    rates = jnp.asarray([float(run.dropout) for run in runs])
    members = jax.jit(jax.vmap(member))(stack(embedded), stacked_masks, keys, stack(units), rates)
    return members, widths


def networks_of(members: Member) -> list[Smaller]:
    """The networks of members, without the zeros that stand for neurons that are gone."""
    params, units = jax.device_get((members.params, members.context["units"]))
    found = []
    for index in range(len(next(iter(units.values())))):
        own = {name: ids[index] for name, ids in units.items()}
        places = {name: np.flatnonzero(ids >= 0) for name, ids in own.items()}
        # In the order of the whole network, wherever they stood.
        places = {name: at[np.argsort(own[name][at])] for name, at in places.items()}
        tree = jax.tree.map(lambda leaf, i=index: leaf[i], params)
        selected = jax.tree.map(jnp.asarray, _select(tree, places))
        found.append(Smaller(selected, {name: own[name][at] for name, at in places.items()}))
    return found


def without(
    config: Any,
    network: Smaller,
    removed: Mapping[str, np.ndarray],
    num_outputs: int,
    input_shape: Any,
) -> Smaller:
    """A network without some of its neurons, by their places; what they gave is in the biases.

    A neuron whose incoming weights are zero gives the same for each input, by its bias.
    """
    widths = {name: len(ids) for name, ids in network.units.items()}
    masks = traverse_util.unflatten_dict(
        {path: None for path in traverse_util.flatten_dict(network.params)}
    )
    for name, places in removed.items():
        mask = np.ones(network.params[name]["kernel"].shape, bool)
        mask[..., places] = False
        masks[name]["kernel"] = jnp.asarray(mask)
    module = make_module(widths, num_outputs, dropout=has_dropout(config))
    small = compact(module, {"params": network.params}, input_shape, masks=masks)
    params = jax.tree.map(jnp.asarray, small.variables["params"])
    # Neurons that nothing reaches or reads go as well.
    return Smaller(params, {name: ids[small.kept[name]] for name, ids in network.units.items()})


def embed(params: Any, places: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> Any:
    """Parameters of hidden layers of more neurons, zero but for these places."""

    def widened(leaf, axis, at, width):
        shape = list(leaf.shape)
        shape[axis] = width
        result = np.zeros(shape, np.asarray(leaf).dtype)
        result[(slice(None),) * axis + (at,)] = leaf
        return result

    return _by_neurons(params, places, lambda leaf, axis, name: widened(
        leaf, axis, places[name], widths[name]
    ))  # fmt: skip


def _select(params: Any, places: Mapping[str, np.ndarray]) -> Any:
    """Parameters of the neurons in these places alone."""
    return _by_neurons(params, places, lambda leaf, axis, name: np.take(leaf, places[name], axis))


def _by_neurons(params: Any, names: Mapping[str, Any], change: Any) -> Any:
    """Applies `(leaf, axis, layer) -> leaf` where an axis is over the neurons of that layer."""
    result, before = {}, None
    for name in sorted(params, key=_depth):
        kernel, bias = (np.asarray(params[name][leaf]) for leaf in ("kernel", "bias"))
        if before is not None:
            flattened = kernel.ndim == 2 and before.startswith("Conv")
            if flattened:
                # Of each position all channels.
                kernel = kernel.reshape(-1, params[before]["bias"].shape[0], kernel.shape[-1])
            kernel = change(kernel, kernel.ndim - 2, before)
            if flattened:
                kernel = kernel.reshape(-1, kernel.shape[-1])
        if name in names:
            kernel, bias = change(kernel, kernel.ndim - 1, name), change(bias, 0, name)
        result[name] = {"kernel": kernel, "bias": bias}
        before = name
    return result


def _depth(name: str) -> tuple[bool, int]:
    kind, index = name.split("_")
    return kind != "Conv", int(index)


def _places(network: Smaller, widths: Mapping[str, int], compact: bool) -> dict[str, np.ndarray]:
    """Where the neurons of a network go: to the front, or to their places in the whole one."""
    units = network.units
    return {name: np.arange(len(units[name])) if compact else units[name] for name in widths}
