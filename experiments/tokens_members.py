"""The members of the study of dynamic tokens: networks, how they start and what moves them."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from experiments import diverged
from experiments.optimizers import adamw
from experiments.study import stack
from ntt_sparse import models
from ntt_sparse.models.deit import load_deit
from ntt_sparse.models.redundancy import Redundancy
from ntt_sparse.models.tokens import DynamicTransformer
from ntt_sparse.models.vit import VisionTransformer
from ntt_sparse.training.state import Member, create_member

# Independent of the streams that training folds from a member's key.
_PREDICTOR_STREAM, _DYNAMIC_STREAM = 1000, 2000
_BACKBONE, _PREDICTORS, _FROZEN = "backbone", "predictors", "frozen"
# As published, they stay when tokens are dropped.
_STAYING = ("cls", "position")


NONE, TRAINING, DECISION, BOTH = "no", "training", "decision", "both"
"""Where similarities take part: nowhere, as CKA-SR in the training of the whole transformer, in the
decision which tokens to keep, or, as in Algorithm 1, in both."""
CKA = (NONE, TRAINING, DECISION, BOTH)


class Variant(NamedTuple):
    """What networks of one stage have in common."""

    keep: float
    cka: str

    @property
    def whole(self) -> str:
        """Of the whole transformers from which they start."""
        return TRAINING if self.cka in (TRAINING, BOTH) else NONE


PRETRAIN = "pretrain"
"""The stage in which transformers are trained whole."""


def variants(config: Any) -> list[Variant]:
    """Every keep ratio with every place of similarities."""
    return [Variant(float(keep), cka) for keep in config.keep for cka in config.cka.split(",")]


def wholes(config: Any) -> list[str]:
    """Where similarities take part in the training of whole transformers."""
    asked = {variant.whole for variant in variants(config)}
    return [cka for cka in CKA if cka in asked]


def stage_of(variant: Variant) -> str:
    """The name of a training, such as `"keep_0.7_both"`."""
    return f"keep_{variant.keep!r}{_suffix(variant.cka)}"


def whole_names(config: Any) -> list[str]:
    """Names of the whole transformers, those without CKA-SR first."""
    return [f"whole{_suffix(cka)}-s{seed}" for cka in wholes(config) for seed in config.seeds]


def _suffix(cka: str) -> str:
    return "" if cka == NONE else f"_{cka}"


def names_of(config: Any, variant: Variant) -> list[str]:
    """Names of the networks of a variant, fit for file names."""
    return [f"{stage_of(variant)}-s{seed}" for seed in config.seeds]


def sources_of(config: Any, variant: Variant) -> list[int]:
    """The indices of the whole transformers from which the networks of a variant start."""
    count = len(config.seeds)
    first = count * wholes(config).index(variant.whole)
    return list(range(first, first + count))


def gone_whole(config: Any, workdir: Path) -> diverged.Gone:
    """Whole transformers that diverged."""
    return diverged.gone(workdir, PRETRAIN, whole_names(config))


def gone_before(config: Any, variant: Variant, whole: diverged.Gone) -> diverged.Gone:
    """Networks of a variant whose whole transformers diverged."""
    return diverged.heirs(names_of(config, variant), sources_of(config, variant), whole)


def gone_dynamic(
    config: Any, workdir: Path, variant: Variant, whole: diverged.Gone
) -> diverged.Gone:
    """Networks of a variant that diverged, or whose whole transformers did."""
    before = gone_before(config, variant, whole)
    return diverged.gone(workdir, stage_of(variant), names_of(config, variant), before)


def transformer(config: Any, num_outputs: int) -> VisionTransformer:
    """The network of a study.

    Raises:
        ValueError: It is no vision transformer.
    """
    module = models.create(config.model.name, num_outputs=num_outputs)
    if not isinstance(module, VisionTransformer):
        raise ValueError(
            f"config.model.name is {config.model.name!r}, expected a vision transformer, such as "
            "'vit_patch4' or 'deit_tiny'"
        )
    return module


def dynamic(config: Any, module: VisionTransformer, variant: Variant) -> DynamicTransformer:
    """The network with tokens that are dropped."""
    settings = config.redundancy
    redundancy = None
    if variant.cka in (DECISION, BOTH):
        redundancy = Redundancy(**{**settings.to_dict(), "weight": float(settings.weight)})
    return DynamicTransformer(module, variant.keep, tuple(config.model.places), redundancy)


def whole_optimizer(settings: Any, total_steps: int) -> optax.GradientTransformation:
    """AdamW with a rate that rises and falls.

    As in DeiT vectors do not decay, nor the token of the class and the positions.
    """
    return adamw(settings, total_steps, settings.learning_rate)


def dynamic_optimizer(settings: Any, total_steps: int) -> optax.GradientTransformation:
    """AdamW of the predictors, and of the transformer later and slower."""
    fixed = round(settings.fixed * total_steps)
    slow = adamw(settings, total_steps, settings.learning_rate * settings.backbone)

    def still(updates, state, params=None):
        del params
        stays = state < fixed
        updates = jax.tree.map(lambda leaf: jnp.where(stays, jnp.zeros_like(leaf), leaf), updates)
        return updates, state + 1

    hold = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), still)
    return optax.partition(
        {
            _BACKBONE: optax.chain(slow, hold),
            _PREDICTORS: adamw(settings, total_steps, settings.learning_rate),
            _FROZEN: optax.set_to_zero(),
        },
        _labels,
    )


def _labels(params: Any) -> Any:
    def label(path, leaf):
        del leaf
        if path[0] != "vit":
            return _PREDICTORS
        return _FROZEN if path[1] in _STAYING else _BACKBONE

    return traverse_util.path_aware_map(label, params)


def start_whole(
    config: Any,
    module: VisionTransformer,
    input_shape: tuple[int, ...],
    optimizer: optax.GradientTransformation,
) -> Member:
    """The whole transformers at their start; a seed fixes weights and the order of the data.

    Weights of a file are those of all seeds. The context of each is the coefficient of CKA-SR.
    """
    h, w, c = input_shape

    def member(key, coefficient):
        params = loaded or module.init(key, jnp.zeros((1, *input_shape)))["params"]
        masks = jax.tree.map(lambda leaf: None, params)
        return create_member(params, masks, optimizer, key, coefficient)

    weights = config.model.weights
    loaded = load_deit(weights, module, (h, w, c))["params"] if weights else None
    keys = [jax.random.key(seed) for _ in wholes(config) for seed in config.seeds]
    coefficients = [
        float(config.cka_sr.coefficient) if cka == TRAINING else 0.0
        for cka in wholes(config)
        for _ in config.seeds
    ]
    return jax.jit(jax.vmap(member))(stack(keys), jnp.asarray(coefficients))


def start_dynamic(
    config: Any,
    module: DynamicTransformer,
    input_shape: tuple[int, ...],
    whole: Member,
    variant: Variant,
    optimizer: optax.GradientTransformation,
) -> Member:
    """The networks of a variant, each from its whole transformer, which is its context."""
    sources = sources_of(config, variant)
    first, stop = sources[0], sources[-1] + 1
    teachers = jax.tree.map(lambda leaf: leaf[first:stop], whole.params)

    def member(key, teacher):
        start = jax.random.fold_in(key, _PREDICTOR_STREAM)
        params = dict(module.init(start, jnp.zeros((1, *input_shape)))["params"])
        params["vit"] = teacher
        masks = jax.tree.map(lambda leaf: None, params)
        # The order of the data is another one than that of the first training.
        again = jax.random.fold_in(key, _DYNAMIC_STREAM)
        return create_member(params, masks, optimizer, again, teacher)

    return jax.jit(jax.vmap(member))(
        stack([jax.random.key(seed) for seed in config.seeds]), teachers
    )
