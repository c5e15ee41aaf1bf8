"""The members of sparse training: which networks there are and how each starts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.sparse_training_masks import layer_counts, random_masks, starting_masks
from experiments.sparse_training_stages import BASELINE
from experiments.study import asked_densities, stack, warn_of_empty_layers
from ntt_sparse._types import PRNGKey
from ntt_sparse.data.images import Split, blank, take
from ntt_sparse.models.torchvision import load_resnet
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.training.state import Member, create_member


class Run(NamedTuple):
    """One network of the study."""

    regulariser: str
    coefficient: float
    density: float
    seed: int


def runs_of(config: Any) -> list[Run]:
    """Every regulariser and coefficient, and none, at every density and seed."""
    variants = [(BASELINE, 0.0)] + [
        (name, coefficient)
        for name in config.regularisers.split(",")
        for coefficient in config.coefficients
    ]
    return [
        Run(name, coefficient, density, seed)
        for density in asked_densities(config)
        for name, coefficient in variants
        for seed in config.seeds
    ]


def whole_runs(config: Any) -> list[Run]:
    """The networks of each seed before anything is pruned, which all densities begin with."""
    first = asked_densities(config)[0]
    return [run._replace(density=1.0) for run in runs_of(config) if run.density == first]


def member_names(runs: list[Run]) -> list[str]:
    """Names such as `"cka_sr-c0.001-d0.05-s1"`, fit for file names."""
    return [f"{r.regulariser}-c{r.coefficient!r}-d{r.density!r}-s{r.seed}" for r in runs]


def score_batch(config: Any, train: Split) -> tuple[Any, Any]:
    """Images and labels that score masks: the first of the training part, or of each class."""
    # Checked where masks are scored.
    indices = np.arange(min(config.score_batch_size, len(train.y)))
    if count := config.score_per_class:
        found = [np.flatnonzero(train.y == label)[:count] for label in np.unique(train.y)]
        indices = np.concatenate(found)
    chosen = take(train, indices)
    return jnp.asarray(chosen.x[:]), jnp.asarray(chosen.y)


def initial_variables(config: Any, module: Any, key: PRNGKey, train: Split) -> dict[str, Any]:
    """What a network starts from: drawn, or the weights of a file, the same for all seeds."""
    if config.model.weights:
        return load_resnet(config.model.weights, module)
    return dict(module.init(key, blank(train)))


def start_members(
    config: Any,
    module: Any,
    train: Split,
    optimizer: optax.GradientTransformation,
    runs: list[Run],
) -> Member:
    """All networks at their start. A seed fixes weights, masks and the order of the data.

    Weights of a file are those of all seeds. Networks of one seed and density differ in their
    regulariser alone. The context of each is its coefficient, by regulariser, and for gradual
    pruning the `counts` it ends with.
    """
    batch = score_batch(config, train)
    make = starting_masks(config, module, train.x.shape[1:])
    by_seed, masks, counts = {}, {}, {}
    for seed in config.seeds:
        key = jax.random.key(seed)
        variables = initial_variables(config, module, key, train)
        params = variables.pop("params")
        by_seed[seed] = key, params, variables
        counts = layer_counts(config, params)
        for density, made in make(key, params, variables, batch).items():
            masks[seed, density] = made
            warn_of_empty_layers(f"density {density!r}, seed {seed}", made)

    def member(key, params, variables, masks, context):
        params = pruning_masks.apply(params, masks)
        return create_member(params, masks, optimizer, key, context, variables)

    names = config.regularisers.split(",")
    context: dict[str, Any] = {
        name: jnp.asarray([run.coefficient * (run.regulariser == name) for run in runs])
        for name in names
    }
    if config.method == "gradual":
        context["counts"] = stack([counts[run.density] for run in runs])
    return jax.jit(jax.vmap(member))(
        *stack([by_seed[run.seed] for run in runs]),
        stack([masks[run.seed, run.density] for run in runs]),
        context,
    )


def stacked_masks(config: Any, members: Member, runs: list[Run], at: dict[float, float]) -> Any:
    """Random masks of all networks, at densities that stand for those asked for."""
    params = jax.tree.map(lambda leaf: leaf[0], members.params)
    by_seed = {
        seed: random_masks(config, params, jax.random.key(seed), at) for seed in config.seeds
    }
    return stack([by_seed[run.seed][run.density] for run in runs])
