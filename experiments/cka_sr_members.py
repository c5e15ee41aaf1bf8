"""The members of the CKA-SR study: which networks there are and how each starts."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.cka_sr_stages import BASELINE
from experiments.study import stack, warn_of_empty_layers
from ntt_sparse.data.images import Split
from ntt_sparse.pruning import densities, saliency
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.training.state import Member, create_member
from ntt_sparse.training.terms import example_losses

# Independent of the streams that training folds from a member's key.
_MASK_STREAM = 1000
# Of GraSP's scoring loss (Wang et al. 2020, their code).
_GRASP_TEMPERATURE = 200.0


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
        for density in config.density
        for name, coefficient in variants
        for seed in config.seeds
    ]


def member_names(runs: list[Run]) -> list[str]:
    """Names such as `"cka_sr-c0.001-d0.05-s1"`, fit for file names."""
    return [f"{r.regulariser}-c{r.coefficient!r}-d{r.density!r}-s{r.seed}" for r in runs]


def layer_counts(config: Any, params: Any) -> dict[float, Any]:
    """Weights to keep at each density: of each layer, or of the whole network."""
    scores = pruning_masks.map_prunable(lambda _, leaf: leaf, params)
    spread = {"erk": densities.erk, "uniform": densities.uniform}.get(config.layer_densities)

    def counts(density):
        if spread is None:
            return pruning_masks.keep_counts(scores, density, scope="global")
        return pruning_masks.keep_counts(scores, spread(params, density))

    return {density: counts(density) for density in config.density}


def start_members(
    config: Any,
    module: Any,
    input_shape: tuple[int, ...],
    train: Split,
    optimizer: optax.GradientTransformation,
    runs: list[Run],
) -> Member:
    """All networks at their start. A seed fixes weights, masks and the order of the data.

    So networks of one seed and density differ in their regulariser alone. The context of each
    is its `coefficients`, by regulariser.
    """
    x = jnp.asarray(train.x[: config.score_batch_size])
    y = jnp.asarray(train.y[: config.score_batch_size])
    score = jax.jit(functools.partial(_scores, config, module))
    select = jax.jit(pruning_masks.from_counts)
    by_seed, masks = {}, {}
    # Not one program: XLA takes minutes to compile the draws of a deep network together.
    for seed in config.seeds:
        key = jax.random.key(seed)
        variables = dict(module.init(key, jnp.zeros((1, *input_shape))))
        params = variables.pop("params")
        by_seed[seed] = key, params, variables
        draws = saliency.random(jax.random.fold_in(key, _MASK_STREAM), params)
        for density, counts in layer_counts(config, params).items():
            if config.layer_densities in ("snip", "grasp"):
                scored = select(score(params, variables, (x, y)), counts)
                counts = jax.tree.map(jnp.sum, scored)
            masks[seed, density] = select(draws, counts)
            warn_of_empty_layers(f"density {density!r}, seed {seed}", masks[seed, density])

    def member(key, params, variables, masks, coefficients):
        params = pruning_masks.apply(params, masks)
        return create_member(params, masks, optimizer, key, coefficients, variables)

    names = config.regularisers.split(",")
    return jax.jit(jax.vmap(member))(
        *stack([by_seed[run.seed] for run in runs]),
        stack([masks[run.seed, run.density] for run in runs]),
        {
            name: jnp.asarray([run.coefficient * (run.regulariser == name) for run in runs])
            for name in names
        },
    )


def _scores(config: Any, module: Any, params: Any, state: Any, batch: Any) -> Any:
    """Scores whose layer densities are taken over; batch statistics are those of the batch."""
    temperature = _GRASP_TEMPERATURE if config.layer_densities == "grasp" else 1.0

    def loss_fn(p, batch):
        x, y = batch
        logits, _ = module.apply({"params": p, **state}, x, train=True, mutable=list(state))
        return jnp.mean(example_losses(logits / temperature, y, "cross_entropy"))

    score = saliency.grasp if config.layer_densities == "grasp" else saliency.snip
    return score(loss_fn, params, batch)
