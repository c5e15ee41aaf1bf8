"""What sparse training minimises and measures."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.optimizers import adamw, warmed_up
from experiments.sparse_training_masks import PRUNABLE
from experiments.study import decayed_rate
from ntt_sparse.data.text import is_text
from ntt_sparse.objectives.cka_sr import aug_cka_sr, cka_sr, every_nth_batch
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.pruning.sparsity import epsilon_sparsity
from ntt_sparse.pruning.transform import keep_masked
from ntt_sparse.similarity.cka import cka_matrix
from ntt_sparse.similarity.features import capture, select
from ntt_sparse.training import terms
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import Term, TermInputs

EPSILONS = (1e-3, 1e-2)
BASELINE = "none"


class Regulariser(NamedTuple):
    """A regulariser: its name in figures, and which similarity of which layers it is.

    Of a norm of the weights `power` is that of each, and the rest is not read.
    """

    label: str
    over_stages: bool
    debiased: bool = False
    similarity: str = "cka"
    power: int = 0


REGULARISERS = {
    "cka_sr": Regulariser("CKA-SR", True),
    "cka_sr_debiased": Regulariser("CKA-SR, debiased", True, debiased=True),
    "aug_cka_sr": Regulariser("AugCKA-SR", False),
    "aug_cka_sr_debiased": Regulariser("AugCKA-SR, debiased", False, debiased=True),
    "cca_sr": Regulariser("CCA", True, similarity="cca"),
    "aug_cca_sr": Regulariser("AugCCA", False, similarity="cca"),
    "l1": Regulariser("L1", False, power=1),
    "l2": Regulariser("L2", False, power=2),
}


def stage_patterns(config: Any) -> list[list[str]]:
    """The patterns of each stage."""
    return [stage.split(",") for stage in config.stages]


def all_patterns(config: Any) -> list[str]:
    """The patterns of all stages, each once."""
    return list(dict.fromkeys(pattern for stage in stage_patterns(config) for pattern in stage))


def block_patterns(config: Any) -> list[str]:
    """Without inputs of stages, which are outputs of the layer before."""
    return [pattern for pattern in all_patterns(config) if not pattern.endswith(":input")]


def make_optimizer(config: Any, *, total_steps: int) -> optax.GradientTransformation:
    """That of `whole_optimizer`; pruned weights stay zero."""
    return keep_masked(whole_optimizer(config, total_steps=total_steps))


def whole_optimizer(config: Any, *, total_steps: int) -> optax.GradientTransformation:
    """Adam, SGD with Nesterov momentum and a schedule, or AdamW with its own, of all weights."""
    settings = config.supervised
    if settings.optimizer == "adamw":
        return adamw(settings, total_steps, settings.learning_rate)
    rate = warmed_up(decayed_rate(settings, total_steps), round(settings.warmup * total_steps))
    if settings.optimizer == "adam":
        inner = optax.adam(rate)
    else:
        inner = optax.sgd(rate, momentum=0.9, nesterov=True)
    # Coupled with the step and on all parameters, as in the training it comes from.
    return optax.chain(optax.add_decayed_weights(settings.weight_decay), inner)


def training_terms(config: Any) -> Mapping[str, Term]:
    """The task loss, and all regularisers, each by the member's own coefficient."""
    every = {name: REGULARISERS[name] for name in config.regularisers.split(",")}
    chosen = {name: one for name, one in every.items() if not one.power}
    norms = {name: one.power for name, one in every.items() if one.power}
    samples = config.samples or None

    def value(regulariser, features):
        options = {
            "samples": samples,
            "debiased": regulariser.debiased,
            "similarity": regulariser.similarity,
        }
        if regulariser.over_stages:
            return cka_sr(select(features, stage_patterns(config)), **options)
        (blocks,) = select(features, [block_patterns(config)])
        return aug_cka_sr(blocks, **options)

    def similarity(inputs: TermInputs):
        def total(features):
            # One of a member's coefficients is not zero, or none: the rest is not its loss,
            # whatever it is.
            parts = [
                jnp.where(inputs.context[name] > 0, inputs.context[name] * value(one, features), 0)
                for name, one in chosen.items()
            ]
            return jnp.sum(jnp.stack(parts))

        features = inputs.outputs.features
        return every_nth_batch(total, features, jnp.asarray(inputs.step), config.every), {}

    def norm(inputs: TermInputs):
        parts = [inputs.context[name] * norm_of(inputs, power) for name, power in norms.items()]
        return jnp.sum(jnp.stack(parts)), {}

    def l1(inputs: TermInputs):
        return config.supervised.l1 * norm_of(inputs, 1), {}

    result: dict[str, Term] = {
        "task": terms.task(label_smoothing=config.supervised.label_smoothing)
    }
    if config.supervised.l1:
        result["l1"] = l1
    if chosen:
        result["similarity"] = similarity
    if norms:
        result["norm"] = norm
    return result


def norm_of(inputs: TermInputs, power: int) -> Any:
    """The sum of a power of the absolute weights that are kept, without biases."""
    effective = pruning_masks.apply(inputs.params, inputs.masks)
    weights = jax.tree.leaves(pruning_masks.map_prunable(lambda _, leaf: leaf, effective, PRUNABLE))
    # The derivative at zero is zero: a weight that has just come is not pushed one way.
    size = {1: lambda w: w * jax.lax.stop_gradient(jnp.sign(w)), 2: jnp.square}[power]
    return sum(jnp.sum(size(leaf)) for leaf in weights)


def evaluation(config: Any, module: Any) -> Callable[..., dict[str, Any]]:
    """Accuracy on held-out and test data, similarity and sparsity, for one member.

    `kept` is how many weights each layer has, in the order of the masks.

    Test numbers are measured for the report; nothing is chosen by them.
    """
    similarities = layer_similarities(config, module)
    # As much memory for long windows of a text as for short ones.
    batch_size = max(1, 64_000 // config.data.length) if is_text(config.data.name) else 1000

    def evaluate(member: Member, validation: Any, test: Any, probe: Any) -> dict[str, Any]:
        result = {}
        for name, data in (("validation", validation), ("test", test)):
            values = terms.evaluate_supervised(
                lambda params, x: module.apply({"params": params, **member.model_state}, x),
                member.params,
                member.masks,
                data,
                batch_size=batch_size,
            )
            result |= {f"{name}/{key}": value for key, value in values.items()}
        for name, matrix in similarities(member, probe).items():
            layers = len(matrix)
            off_diagonal = jnp.sum(matrix) - jnp.trace(matrix)
            result[f"similarity/{name}"] = off_diagonal / (layers * (layers - 1))
        for epsilon in EPSILONS:
            value = epsilon_sparsity(member.params, epsilon, masks=member.masks)
            result[f"epsilon_sparsity/{epsilon!r}"] = value
        counts = [jnp.sum(mask, dtype=jnp.int32) for mask in jax.tree.leaves(member.masks)]
        result["kept"] = jnp.stack(counts)
        return result

    return evaluate


def layer_similarities(config: Any, module: Any) -> Callable[[Member, Any], dict[str, Any]]:
    """CKA between all layers of one member on a probe, biased and debiased."""
    patterns = block_patterns(config)
    apply = capture(module, patterns)

    def measure(member: Member, probe: Any) -> dict[str, Any]:
        effective = pruning_masks.apply(member.params, member.masks)
        _, features = apply({"params": effective, **member.model_state}, probe)
        (maps,) = select(features, [patterns])
        return {
            "cka": cka_matrix(maps),
            "cka_debiased": cka_matrix(maps, debiased=True),
        }

    return measure
