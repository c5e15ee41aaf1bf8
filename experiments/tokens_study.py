"""The study of dynamic tokens: prepare, train whole, train with tokens that go, report."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments import tokens_report
from experiments.cli import claim_workdir, user_errors
from experiments.stage import fit_stage
from experiments.study import (
    hold_out,
    make_plan,
    member_mode,
    save_networks,
    training_input,
)
from experiments.tokens_checks import check_config, check_sizes
from experiments.tokens_members import (
    PRETRAIN,
    Variant,
    dynamic,
    dynamic_optimizer,
    gone_before,
    gone_dynamic,
    gone_whole,
    names_of,
    stage_of,
    start_dynamic,
    start_whole,
    transformer,
    variants,
    whole_names,
    whole_optimizer,
)
from ntt_sparse.data import images
from ntt_sparse.data.images import ImageData
from ntt_sparse.models.tokens import RNG, DynamicTransformer, TokenOutputs, keep_ratios
from ntt_sparse.models.vit import VisionTransformer
from ntt_sparse.objectives.cka_sr import aug_cka_sr, cka_sr, every_nth_batch
from ntt_sparse.objectives.tokens import (
    distillation_loss,
    keep_ratio_loss,
    token_distillation_loss,
)
from ntt_sparse.similarity.cka import cka_matrix
from ntt_sparse.similarity.features import capture
from ntt_sparse.training import terms
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import Forward, Term, TermInputs, make_step

# Held-out images on which the similarity of blocks is measured, at most.
_PROBE = 256
_logger = logging.getLogger(__name__)


class DynamicOutputs(NamedTuple):
    """What a training pass with dropped tokens gives, and what its teacher gives."""

    outputs: Float[Array, "n k"]
    sampled: TokenOutputs
    teacher_outputs: Float[Array, "n k"]
    teacher_features: Float[Array, "n t d"]


def run(config: Any, workdir: str | Path, *, data_dir: str | None = None) -> dict[str, Any]:
    """Runs the study, or goes on with it.

    Args:
        config: From `experiments.configs.tokens.get_config`.
        workdir: Where everything is written; an earlier run of the same config there is
            continued, and a finished one only draws its report again.
        data_dir: Where prepared TensorFlow Datasets are; by default as TFDS decides.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        UserError: The config, the data or the work directory does not permit the study;
            nothing was changed.
    """
    with user_errors():
        check_config(config)
        data = prepare(config, data_dir)
    with claim_workdir(workdir, config.to_dict()) as claimed:
        whole = train_whole(config, data, claimed)
        for variant in variants(config):
            train_dynamic(config, data, whole, variant, claimed)
        return tokens_report.write(config, claimed, data.input_shape, data.num_classes)


def prepare(config: Any, data_dir: str | None) -> ImageData:
    """Loads the images, before anything is trained or written."""
    whole = images.load(
        config.data.name, data_dir=data_dir, validation_fraction=0.0,
        seed=config.data.split_seed, size=config.data.size,
    )  # fmt: skip
    data = hold_out(whole, config.pretrain.validation_fraction, config.data.split_seed)
    check_sizes(config, data)
    return data


def train_whole(config: Any, data: ImageData, workdir: Path) -> Member:
    """Trains the whole transformers as one program, with CKA-SR where variants ask for it."""
    module = transformer(config, data.num_classes)
    blocks = [f"block_{index}" for index in range(module.depth)]
    settings = config.pretrain
    plan = make_plan(settings, len(data.train.y), config.checkpoint_seconds)
    optimizer = whole_optimizer(settings, plan.total_steps)

    def similarity(inputs: TermInputs) -> Any:
        def total(features):
            maps = [features[name] for name in blocks]
            summed = config.cka_sr.regulariser == "cka_sr"
            value = cka_sr([maps], samples=samples) if summed else aug_cka_sr(maps, samples=samples)
            return jnp.where(inputs.context > 0, inputs.context * value, 0)

        features = inputs.outputs.features
        return every_nth_batch(total, features, jnp.asarray(inputs.step), config.cka_sr.every), {}

    samples = config.cka_sr.samples or None
    step_fn = make_step(
        {"task": terms.task(label_smoothing=settings.label_smoothing), "similarity": similarity},
        optimizer,
        forward=terms.masked_forward(capture(module, blocks, examples=samples)),
        augment=training_input(config, data.train)[1],
    )
    names = whole_names(config)
    members = start_whole(config, module, data.input_shape, optimizer)
    members = _fit(config, data, PRETRAIN, names, members, step_fn, plan, module, workdir)
    save_networks(workdir / "networks", names, members, gone_whole(config, workdir))
    return members


def train_dynamic(
    config: Any, data: ImageData, whole: Member, variant: Variant, workdir: Path
) -> None:
    """Trains the networks of a variant as one program, and writes them.

    Nothing is trained if all whole transformers from which they start have diverged.
    """
    names, stage = names_of(config, variant), stage_of(variant)
    gone = gone_whole(config, workdir)
    if len(gone_before(config, variant, gone)) == len(names):
        _logger.warning("%s: all networks from which it starts have diverged", stage)
        return
    module = dynamic(config, transformer(config, data.num_classes), variant)
    settings = config.dynamic
    plan = make_plan(settings, len(data.train.y), config.checkpoint_seconds)
    optimizer = dynamic_optimizer(settings, plan.total_steps)
    step_fn = make_step(
        dynamic_terms(config, module),
        optimizer,
        forward=dynamic_forward(module),
        augment=training_input(config, data.train)[1],
    )
    members = start_dynamic(config, module, data.input_shape, whole, variant, optimizer)
    members = _fit(config, data, stage, names, members, step_fn, plan, module, workdir)
    gone = gone_dynamic(config, workdir, variant, gone)
    save_networks(workdir / "networks", names, members, gone)


def _fit(
    config: Any,
    data: ImageData,
    stage: str,
    names: list[str],
    members: Member,
    step_fn: Any,
    plan: Any,
    module: VisionTransformer | DynamicTransformer,
    workdir: Path,
) -> Member:
    count = config.evaluated or None
    held_out, test = (
        tuple(leaf[:count] for leaf in split) for split in (data.validation, data.test)
    )
    mode = member_mode(members)
    batch_size = config[PRETRAIN if stage == PRETRAIN else "dynamic"].batch_size
    train_data, _ = training_input(config, data.train)
    return fit_stage(
        config, workdir, stage, names, members, step_fn, plan, train_data,
        functools.partial(evaluate, module), (held_out, test), mode, batch_size=batch_size,
        freeze=True,
    )  # fmt: skip


def dynamic_forward(module: DynamicTransformer) -> Forward:
    """A training pass of a network with dropped tokens, and of the teacher in its context."""

    def forward(inputs: TermInputs) -> Any:
        x = inputs.batch[0]
        sampled: Any = module.apply(
            {"params": inputs.params}, x, rngs={RNG: inputs.key}, method="sample"
        )
        teacher = {"params": jax.lax.stop_gradient(inputs.context)}
        tokens: Any = module.vit.apply(teacher, x, method="encode")
        outputs: Any = module.vit.apply(teacher, tokens, method="classify")
        found = DynamicOutputs(sampled.logits, sampled, outputs, tokens[:, 1:])
        return found, inputs.model_state

    return forward


def dynamic_terms(config: Any, module: DynamicTransformer) -> dict[str, Term]:
    """The task, the part of tokens that is kept, and what the teacher says."""
    ratios, weights = keep_ratios(module), config.losses

    def weighted(name: str, value: Callable[[DynamicOutputs], Any]) -> Term:
        def term(inputs: TermInputs) -> Any:
            found = value(inputs.outputs)
            return weights[name] * found, {"unweighted": found}

        return term

    return {
        "task": terms.task(label_smoothing=config.dynamic.label_smoothing),
        "ratio": weighted("ratio", lambda o: keep_ratio_loss(o.sampled.decisions, ratios)),
        "distillation": weighted(
            "distillation", lambda o: distillation_loss(o.outputs, o.teacher_outputs)
        ),
        "tokens": weighted(
            "tokens",
            lambda o: token_distillation_loss(
                o.sampled.features, o.teacher_features, o.sampled.decisions[-1]
            ),
        ),
    }


def evaluate(
    module: VisionTransformer | DynamicTransformer, member: Member, validation: Any, test: Any
) -> dict[str, Array]:
    """Loss and accuracy in inference, and of whole transformers how similar their blocks are.

    Nothing is chosen by test images.
    """
    result = {}
    if isinstance(module, VisionTransformer):
        apply = capture(module, [f"block_{index}" for index in range(module.depth)])
        _, features = apply({"params": member.params}, validation[0][:_PROBE])
        matrix = cka_matrix(list(features.values()))
        pairs = module.depth * (module.depth - 1)
        result["similarity"] = (jnp.sum(matrix) - jnp.trace(matrix)) / pairs
    for name, data in (("validation", validation), ("test", test)):
        values = terms.evaluate_supervised(
            lambda params, x: module.apply({"params": params}, x), member.params, member.masks, data
        )
        result |= {f"{name}/{key}": value for key, value in values.items()}
    return result
