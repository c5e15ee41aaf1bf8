"""What the two stages of Neural Tangent Transfer minimise and measure."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from ntt_sparse._types import ApplyFn
from ntt_sparse.objectives.ntt import ntt_loss
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.pruning import saliency
from ntt_sparse.training import terms
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import AfterUpdate, Term, TermInputs


def make_optimizer(settings: Any) -> optax.GradientTransformation:
    """The optimiser of a stage; the transfer stage always uses Adam."""
    name = settings.get("optimizer", "adam")
    return {"adam": optax.adam, "sgd": optax.sgd}[name](settings.learning_rate)


def _loss(
    config: Any,
    apply_fn: ApplyFn,
    member: Any,
    x: Any,
    **distance: Any,
) -> Any:
    settings = config.transfer
    return ntt_loss(
        apply_fn,
        member.params,
        member.masks,
        member.context["teacher"],
        x,
        kernel_weight=settings.kernel_weight,
        l2_weight=settings.l2_weight,
        wrt=settings.wrt,
        max_density=_max_density(config),
        **distance,
    )


def _max_density(config: Any) -> float:
    """A bound of the density of every layer, where it is known and of use."""
    # Members side by side cannot choose each for itself: both ways would be computed.
    one_by_one = jax.default_backend() == "cpu"
    return max(config.density) if config.scope == "layer" and one_by_one else 1.0


def transfer_terms(config: Any, apply_fn: ApplyFn) -> Mapping[str, Term]:
    """The NTT objective; logs its parts unweighted."""
    settings = config.transfer

    def ntt(inputs: TermInputs):
        distance = {"distance": settings.distance}
        if settings.distance == "sketch":
            distance |= {"probes": settings.probes, "key": inputs.key}
        loss, parts = _loss(config, apply_fn, inputs, inputs.batch, **distance)
        return loss, parts._asdict()

    return {"ntt": ntt}


def transfer_evaluation(config: Any, apply_fn: ApplyFn) -> Callable[..., dict[str, Any]]:
    """The exact objective and its parts on held-out inputs, for one member."""

    def evaluate(member: Member, x: Any) -> dict[str, Any]:
        loss, parts = _loss(config, apply_fn, member, x)
        values = {"loss": loss, **parts._asdict()}
        return {f"validation/{name}": value for name, value in values.items()}

    return evaluate


def refresh_masks(every: int, total_steps: int) -> AfterUpdate:
    """Re-selects the mask by magnitude of the unmasked weights, every so many steps.

    Steps count from 1; none in the last `every` steps, so that the final mask is
    trained: a refresh happens where `step % every == 0` and `step < total_steps - every`.
    With `every=0` the initial mask stays.
    """
    if every == 0 or every >= total_steps:
        return lambda member, step, gradients: member

    def refresh(member: Member) -> Member:
        scores = saliency.magnitude(member.params)
        return member._replace(masks=pruning_masks.from_counts(scores, member.context["counts"]))

    def after_update(member: Member, step: Any, gradients: Any) -> Member:
        del gradients
        due = (step % every == 0) & (step < total_steps - every)
        return jax.lax.cond(due, refresh, lambda member: member, member)

    return after_update


def supervised_terms(config: Any, apply_fn: ApplyFn) -> Mapping[str, Term]:
    """Task loss and, where asked for, the decay of surviving weights."""
    result = {"task": terms.supervised(apply_fn, loss=config.supervised.loss)}
    if config.supervised.weight_decay:
        result["decay"] = terms.weight_decay(config.supervised.weight_decay)
    return result


def supervised_evaluation(config: Any, apply_fn: ApplyFn) -> Callable[..., dict[str, Any]]:
    """Loss and accuracy on held-out and test data, and the probe's outputs, for one member.

    Test numbers are measured for the report; nothing is chosen by them.
    """

    def evaluate(member: Member, validation: Any, test: Any, probe: Any) -> dict[str, Any]:
        result = {}
        for name, data in (("validation", validation), ("test", test)):
            values = terms.evaluate_supervised(
                apply_fn, member.params, member.masks, data, loss=config.supervised.loss
            )
            result |= {f"{name}/{key}": value for key, value in values.items()}
        if config.probe:
            effective = pruning_masks.apply(member.params, member.masks)
            result["outputs"] = apply_fn(effective, probe)
        return result

    return evaluate
