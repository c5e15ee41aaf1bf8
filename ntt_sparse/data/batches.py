"""Which examples a step sees: pure functions of a key and the step, computed on device.

Nothing is carried from step to step, so a run resumes exactly from its step
number, and members of one compiled program shuffle independently under `vmap`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, Int32, Key


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Full batches in one pass over `n` examples; the rest of the pass is dropped.

    Raises:
        ValueError: `n` or `batch_size` is not positive, or a batch is larger than the set.
    """
    _check_sizes(n, batch_size)
    if batch_size > n:
        raise ValueError(f"{batch_size=} is larger than the {n} examples: no batch can be filled")
    return n // batch_size


def total_steps(n: int, batch_size: int, epochs: int) -> int:
    """The published step count of `epochs` epochs: `epochs * ceil(n / batch_size)`.

    Neural Tangent Transfer counts its iterations this way although a pass yields
    only `floor(n / batch_size)` full batches, so a run is slightly more than
    `epochs` passes. 59,880 images at batch 64 for 20 epochs are 18,720 steps.

    Raises:
        ValueError: `n` or `batch_size` is not positive, or `epochs` is negative.
    """
    _check_sizes(n, batch_size)
    if epochs < 0:
        raise ValueError(f"{epochs=} is negative")
    return epochs * math.ceil(n / batch_size)


def epoch_permutation(
    key: Key[Array, ""], epoch: Int[ArrayLike, ""], n: int
) -> Int32[Array, "{n}"]:
    """The order of the examples in one pass: a permutation of 0..n-1.

    Args:
        key: Key of the run's data order, the same at every epoch.
        epoch: Number of the pass, may be traced.
        n: Number of examples.
    """
    order = jax.random.permutation(jax.random.fold_in(key, epoch), n)
    return order.astype(jnp.int32)


def batch_indices(
    permutation: Int[Array, "n"], step: Int[ArrayLike, ""], batch_size: int
) -> Int[Array, "{batch_size}"]:
    """The examples of one step: the slice of its pass that belongs to it.

    Args:
        permutation: The order of the pass that contains `step`, which is pass number
            `step // steps_per_epoch(n, batch_size)`.
        step: Step since the start of the run, 0-based, may be traced.
        batch_size: Examples per step.

    Raises:
        ValueError: A batch is larger than the set.
    """
    steps = steps_per_epoch(permutation.shape[0], batch_size)
    start = (jnp.asarray(step) % steps) * batch_size
    return jax.lax.dynamic_slice_in_dim(permutation, start, batch_size)


def _check_sizes(n: int, batch_size: int) -> None:
    if n < 1 or batch_size < 1:
        raise ValueError(f"{n=} and {batch_size=} must be positive")
