"""The members of the study: which networks there are and how each is initialised."""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.ntt_stages import make_optimizer
from experiments.study import asked_densities, stack, warn_of_empty_layers
from ntt_sparse import models
from ntt_sparse.data.images import Split
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.pruning import saliency
from ntt_sparse.training.state import Member, create_member
from ntt_sparse.training.terms import example_losses

_logger = logging.getLogger(__name__)

# Independent of the streams that training folds from a member's key.
_MASK_STREAM = 1000
_LOGIT_SNIP_BATCH = 128


class Method(NamedTuple):
    """A way to get a sparse network: its name in figures and where its weights compete.

    Without a scope the config's counts.
    """

    label: str
    scope: pruning_masks.Scope | None = None


METHODS = {
    "ntt": Method("NTT"),
    "dense": Method("Dense"),
    # Exact counts per layer: global and layerwise random pruning agree in expectation.
    "random": Method("Random", "layer"),
    "random_scaled": Method("Scaled random", "layer"),
    "snip": Method("SNIP", "global"),
    "layerwise_snip": Method("Layerwise SNIP", "layer"),
    "logit_snip": Method("Logit-SNIP", "global"),
    "layerwise_logit_snip": Method("Layerwise Logit-SNIP", "layer"),
    "magnitude": Method("Magnitude"),
}


class Run(NamedTuple):
    """One network of the study."""

    method: str
    density: float
    seed: int


def member_names(runs: list[Run]) -> list[str]:
    """Names such as `"ntt-d0.03-s1"`, fit for file names; densities in full precision."""
    return [f"{run.method}-d{run.density!r}-s{run.seed}" for run in runs]


def transfer_runs(config: Any) -> list[Run]:
    """One student per density and seed."""
    levels = asked_densities(config)
    return [Run("ntt", level, seed) for level in levels for seed in config.seeds]


def supervised_runs(config: Any) -> list[Run]:
    """Every method at every density and seed; the dense network once per seed."""
    return [
        Run(method, density, seed)
        for method in config.methods.split(",")
        for density in ((1.0,) if method == "dense" else asked_densities(config))
        for seed in config.seeds
    ]


def keep_counts(module: Any, input_shape: tuple[int, ...], runs: list[Run], scope: Any) -> Any:
    """Exact counts of weights to keep, with a leading member axis."""
    params = jax.eval_shape(lambda: models.init(module, jax.random.key(0), input_shape))
    scores = pruning_masks.map_prunable(lambda _, leaf: leaf, params)
    return stack([pruning_masks.keep_counts(scores, run.density, scope=scope) for run in runs])


def transfer_members(
    config: Any, module: Any, input_shape: tuple[int, ...], inputs: Any, runs: list[Run]
) -> Member:
    """Students at their start: the teacher's own weights under the initial mask.

    The context of each holds its `teacher` and the `counts` of weights to keep.
    """
    apply_fn = models.apply_fn(module)
    optimizer = make_optimizer(config.transfer)

    def member(key, counts):
        params = models.init(module, key, input_shape)
        if config.transfer.initial_mask == "logit_snip":
            scores = saliency.logit_snip(apply_fn, params, inputs[:_LOGIT_SNIP_BATCH])
        else:
            scores = saliency.magnitude(params)
        masks = pruning_masks.from_counts(scores, counts)
        return create_member(params, masks, optimizer, key, {"teacher": params, "counts": counts})

    keys = stack([jax.random.key(run.seed) for run in runs])
    return jax.jit(jax.vmap(member))(keys, keep_counts(module, input_shape, runs, config.scope))


def supervised_members(
    config: Any,
    module: Any,
    input_shape: tuple[int, ...],
    train: Split,
    runs: list[Run],
    transferred: Member | None,
) -> Member:
    """All networks before supervised training, in the order of `runs`.

    A seed fixes the initial weights, so that methods are compared on the same draws.
    """
    optimizer = make_optimizer(config.supervised)
    sources = {run: index for index, run in enumerate(transfer_runs(config))}
    score_fns = _score_fns(config, module, train)
    init = jax.jit(lambda key: models.init(module, key, input_shape))

    @jax.jit
    def masked(key, params, masks):
        masks = pruning_masks.full(params) if masks is None else masks
        return create_member(pruning_masks.apply(params, masks), masks, optimizer, key)

    @functools.partial(jax.jit, static_argnames="rescale")
    def pruned(key, params, scores, counts, *, rescale):
        masks = pruning_masks.from_counts(scores, counts)
        apply = pruning_masks.rescale if rescale else pruning_masks.apply
        return create_member(apply(params, masks), masks, optimizer, key)

    def start(run: Run) -> Member:
        key = jax.random.key(run.seed)
        if run.method == "ntt":
            params, masks = jax.tree.map(lambda leaf: leaf[sources[run]], students)
            return masked(key, params, masks)
        params = init(key)
        if run.method == "dense":
            return masked(key, params, None)
        scope = METHODS[run.method].scope or config.scope
        scores = score_fns[run.method](key, params)
        counts = pruning_masks.keep_counts(scores, run.density, scope=scope)
        return pruned(key, params, scores, counts, rescale=run.method == "random_scaled")

    students = jax.device_get((transferred.params, transferred.masks)) if transferred else ()
    return stack([start(run) for run in runs])


def log_densities(runs: list[Run], members: Member) -> None:
    """Logs what each method keeps of each layer, for one seed; warns of every empty layer."""
    shown, host = set(), jax.device_get(members.masks)
    for index, (run, name) in enumerate(zip(runs, member_names(runs), strict=True)):
        masks = jax.tree.map(lambda leaf, i=index: leaf[i], host)
        rows = warn_of_empty_layers(name, masks)
        if (run.method, run.density) not in shown and run.method != "dense":
            kept = ", ".join(f"{layer} {row.kept}/{row.total}" for layer, row in rows.items())
            _logger.info("%s at density %r keeps %s", run.method, run.density, kept)
        shown.add((run.method, run.density))


def _score_fns(config: Any, module: Any, train: Split) -> dict[str, Any]:
    """`(key, params) -> scores` of every method that scores weights, compiled."""
    apply_fn = models.apply_fn(module)
    x, y = train.x[: config.snip_batch_size], train.y[: config.snip_batch_size]

    def loss_fn(params, batch):
        inputs, labels = batch
        return jnp.mean(example_losses(apply_fn(params, inputs), labels, config.supervised.loss))

    @jax.jit
    def random(key, params):
        return saliency.random(jax.random.fold_in(key, _MASK_STREAM), params)

    @jax.jit
    def snip(key, params):
        del key
        return saliency.snip(loss_fn, params, (x, y))

    @jax.jit
    def logit_snip(key, params):
        del key
        return saliency.logit_snip(apply_fn, params, x)

    @jax.jit
    def magnitude(key, params):
        del key
        return saliency.magnitude(params)

    return {
        "random": random,
        "random_scaled": random,
        "snip": snip,
        "layerwise_snip": snip,
        "logit_snip": logit_snip,
        "layerwise_logit_snip": logit_snip,
        "magnitude": magnitude,
    }
