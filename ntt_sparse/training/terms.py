"""Loss terms of supervised training, and their evaluation over whole sets."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from ntt_sparse._precision import at_least_single
from ntt_sparse._types import ApplyFn, Masks, Params, Scalar
from ntt_sparse.pruning import masks as pruning_masks
from ntt_sparse.training.step import Forward, Term, TermInputs

Loss: TypeAlias = Literal["cross_entropy", "squared_error"]


def example_losses(
    outputs: Float[Array, "..."],
    labels: Int[ArrayLike, "..."],
    loss: Loss,
    *,
    label_smoothing: float = 0.0,
) -> Float[Array, " n"]:
    """The loss of each example. Half precision is computed in float32.

    Args:
        outputs: Network outputs, `(n, k)`, or `(n, t, k)` where an example has many labels: logits
            for cross-entropy, plain outputs for squared error.
        labels: Classes in 0..k-1, `(n,)` or `(n, t)`. Where an example has many, as a text has one
            for each token, its loss is their mean.
        loss: `"cross_entropy"` of the softmax, or `"squared_error"`: half the squared
            distance to the one-hot target, whose gradient flow is df/dt = -K(f - y).
        label_smoothing: The part of the target that all classes share, from 0 to 1, of
            cross-entropy (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, Section 7).

    Raises:
        ValueError: `loss` is unknown, the part is out of range or of another loss, or there is not
            a label for each output.
    """
    if jnp.ndim(outputs) < 2 or jnp.shape(labels) != jnp.shape(outputs)[:-1]:
        # Others would broadcast, to another loss.
        raise ValueError(
            f"labels have shape {jnp.shape(labels)} and outputs {jnp.shape(outputs)}, expected the "
            "same but for the last axis of outputs, which are the classes"
        )
    # The negated form also refuses NaN.
    if not 0.0 <= label_smoothing <= 1.0 or (label_smoothing and loss != "cross_entropy"):
        raise ValueError(
            f"label_smoothing is {label_smoothing} with loss {loss!r}, expected 0, or a number up "
            "to 1 with 'cross_entropy'"
        )
    if loss not in ("cross_entropy", "squared_error"):
        raise ValueError(f"{loss=} is unknown: expected 'cross_entropy' or 'squared_error'")
    outputs = at_least_single(outputs)
    if loss == "cross_entropy" and not label_smoothing:
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    else:
        targets = jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)
        if loss == "cross_entropy":
            smooth = optax.smooth_labels(targets, label_smoothing)
            losses = optax.softmax_cross_entropy(outputs, smooth)
        else:
            losses = 0.5 * jnp.sum((outputs - targets) ** 2, axis=-1)
    return _of_examples(losses)


def _of_examples(values: Float[Array, "n *t"]) -> Float[Array, " n"]:
    """The mean of each example."""
    return jnp.mean(values, axis=tuple(range(1, values.ndim))) if values.ndim > 1 else values


class NetworkOutputs(NamedTuple):
    """What the forward pass that terms share gives."""

    outputs: Float[Array, "n *t k"]
    features: dict[str, Float[Array, "n ..."]]
    """Features of inner layers, by name."""


def masked_forward(apply: Callable[..., Any], *, straight_through: bool = False) -> Forward:
    """One training pass of the masked network over batches `(x, y)`, for all terms.

    Args:
        apply: Called as `apply({"params": params, **model_state}, x, train=True,
            mutable=collections, rngs={"dropout": key})`, where collections are those of the
            model state; it returns outputs, features and the collections after the pass, as
            `ntt_sparse.similarity.features.capture` makes it. Batch statistics are those of
            the whole batch, also where its examples are spread over devices.
        straight_through: Whether pruned weights get the gradient they would have if they were
            there. (An optimiser that keeps them at zero does not see it.)

    Returns:
        A forward pass for `make_step`, whose outputs are `NetworkOutputs`.
    """
    mask = pruning_masks.straight_through if straight_through else pruning_masks.apply

    def forward(inputs: TermInputs):
        state = dict(inputs.model_state)
        effective = mask(inputs.params, inputs.masks)
        outputs, features, state = apply(
            {"params": effective, **state},
            inputs.batch[0],
            train=True,
            mutable=list(state),
            rngs={"dropout": inputs.key},
        )
        # Of the structure it came in: a network without state may carry `()` or `{}`.
        return NetworkOutputs(outputs, features), dict(state) or inputs.model_state

    return forward


def without_features(module: Any) -> Callable[..., Any]:
    """A Linen network as `masked_forward` takes it, which gives no features."""

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        outputs, state = module.apply(variables, *args, **kwargs)
        return outputs, {}, state

    return apply


def task(*, loss: Loss = "cross_entropy", label_smoothing: float = 0.0) -> Term:
    """The mean loss of the outputs of a shared forward pass; logs the accuracy.

    Raises:
        ValueError: (In the step.) There is no such pass.
    """

    def term(inputs: TermInputs):
        if inputs.outputs is None:
            raise ValueError(
                "task() reads the outputs of a forward pass, and there is none: give make_step one "
                "(forward=masked_forward(...)), or take supervised(apply_fn)"
            )
        return _task(inputs.outputs.outputs, inputs.batch[1], loss, label_smoothing)

    return term


def supervised(apply_fn: Callable[..., Any], *, loss: Loss = "cross_entropy") -> Term:
    """The mean loss of the masked network over batches `(x, y)`; logs the accuracy.

    `apply_fn(params, x, train=True, rngs={"dropout": key})` is called, so networks
    with dropout drop.
    """

    def term(inputs: TermInputs):
        x, y = inputs.batch
        effective = pruning_masks.apply(inputs.params, inputs.masks)
        return _task(apply_fn(effective, x, train=True, rngs={"dropout": inputs.key}), y, loss)

    return term


def _task(
    outputs: Float[Array, "n *t k"],
    y: Int[ArrayLike, "n *t"],
    loss: Loss,
    label_smoothing: float = 0.0,
) -> Any:
    losses = example_losses(outputs, y, loss, label_smoothing=label_smoothing)
    accuracy = jnp.mean(jnp.argmax(outputs, axis=-1) == y, dtype=losses.dtype)
    return jnp.mean(losses), {"accuracy": accuracy}


def weight_decay(coefficient: float) -> Term:
    """`coefficient` times the sum of squares of the surviving weights, without biases.

    Raises:
        ValueError: (In the step.) No leaf has a mask.
    """

    def term(inputs: TermInputs):
        if not jax.tree.leaves(inputs.masks):
            raise ValueError("weight_decay is for weights that have masks, and no leaf has one")
        effective = pruning_masks.apply(inputs.params, inputs.masks)
        squares = jax.tree.map(
            lambda leaf, mask: None if mask is None else jnp.sum(at_least_single(leaf) ** 2),
            effective,
            inputs.masks,
        )
        total = jnp.sum(jnp.stack(jax.tree.leaves(squares)))
        return coefficient * total, {"sum_of_squares": total}

    return term


def evaluate_supervised(
    apply_fn: ApplyFn,
    params: Params,
    masks: Masks,
    data: tuple[Shaped[ArrayLike, "..."], Int[ArrayLike, "..."]],
    *,
    loss: Loss = "cross_entropy",
    batch_size: int = 1000,
) -> dict[str, Scalar]:
    """Mean loss and accuracy of the masked network over a whole set.

    Args:
        apply_fn: The network, deterministic.
        params: Parameters, not masked.
        masks: Masks of the structure of `params`.
        data: Inputs `(n, ...)` and labels `(n,)`, or `(n, t)`; any number of examples, at least
            one. An example of many labels counts with its means.
        loss: See `example_losses`.
        batch_size: Examples at a time, which bounds the memory.

    Returns:
        `{"loss": ..., "accuracy": ...}`, scalars.

    Raises:
        ValueError: The set is empty, or there is not a label for each input.
    """
    inputs, labels = map(jnp.asarray, data)
    n = len(labels)
    if n == 0:
        raise ValueError("the set to evaluate on is empty")
    if len(inputs) != n:
        raise ValueError(f"{len(inputs)} inputs and {n} labels, expected as many")
    effective = pruning_masks.apply(params, masks)
    batch_size = min(batch_size, n)
    num_batches = -(-n // batch_size)
    padding = num_batches * batch_size - n

    def split(leaf):
        leaf = jnp.pad(leaf, [(0, padding)] + [(0, 0)] * (leaf.ndim - 1))
        return leaf.reshape(num_batches, batch_size, *leaf.shape[1:])

    def sums(batch):
        x, y, counts = batch
        outputs = apply_fn(effective, x)
        losses = jnp.where(counts, example_losses(outputs, y, loss), 0)
        correct = (jnp.argmax(outputs, axis=-1) == y).astype(losses.dtype)
        return jnp.sum(losses), jnp.sum(jnp.where(counts, _of_examples(correct), 0))

    real = jnp.arange(num_batches * batch_size).reshape(num_batches, batch_size) < n
    losses, correct = jax.lax.map(sums, (split(inputs), split(labels), real))
    return {"loss": jnp.sum(losses) / n, "accuracy": jnp.sum(correct) / n}
