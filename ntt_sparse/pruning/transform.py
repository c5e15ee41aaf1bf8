"""Training under masks with any Optax optimiser."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int

from ntt_sparse.pruning import masks as masking


def keep_masked(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimiser so that pruned weights are exactly zero after every step.

    Masking gradients is not enough: momentum, decay and trust ratios move a weight
    whose gradient is zero. Here `inner` sees gradients and params that are zero where
    pruned, and its update of a pruned weight is replaced by `-param`, so that
    `optax.apply_updates` lands on zero from any finite value.

    The masks are an argument of each update, not part of the optimiser's state: they
    live in one place, the training state, and may change between steps (a weight that
    returns starts from zero and with what is left of its moments). The state is that
    of `inner`.

    Put the wrapper last in an `optax.chain`, or around the chain: a transformation
    after it would change the update of pruned weights again.

    Args:
        inner: Any gradient transformation, with schedules or extra arguments or without.

    Returns:
        A transformation whose `update(grads, state, params, *, masks, **extra)` needs
        params, and masks that fit them; `extra` is passed on to `inner`. It raises
        ValueError where params or masks are missing or do not fit.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params, masks = {"w": jnp.ones((1, 2))}, {"w": jnp.array([[True, False]])}
        >>> optimiser = keep_masked(optax.sgd(0.25, momentum=0.9))
        >>> state = optimiser.init(params)
        >>> updates, state = optimiser.update(params, state, params, masks=masks)
        >>> print(optax.apply_updates(params, updates)["w"])
        [[0.75 0.  ]]
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, *, masks: Any = None, **extra: Any):
        _check_given("keep_masked", params, masks)
        effective = masking.apply(params, masks)
        updates, state = inner.update(masking.apply(updates, masks), state, effective, **extra)
        return jax.tree.map(_replace_pruned, updates, params, masks), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _replace_pruned(update: Any, param: Any, mask: Any) -> Any:
    """The update, or `-param` where pruned, in a dtype that holds both exactly."""
    return update if mask is None else jnp.where(mask, update, -param)


class GrowingDecayState(NamedTuple):
    """The state of `growing_decay`.

    Attributes:
        step: Updates so far.
    """

    step: Int[Array, ""]


def growing_coefficient(
    step: Int[ArrayLike, ""],
    *,
    every: int = 5,
    increment: float = 1e-4,
    ceiling: float = 1.0,
    power: int = 1,
) -> Float[Array, ""]:
    r"""The decay at a step that grows by an increment in every so many steps, then stays.

    It stays once it is above the ceiling, so in the end it is one increment more.

    Args:
        step: Steps done; may be traced. The first increment is there at step 0.
        every: Steps between increments.
        increment: How much is added.
        ceiling: What the sum is to pass.
        power: Of the sum, 1, 2 or 3 in the published code: a later rise.

    Raises:
        ValueError: A number is not positive, or no integer where one is expected.

    References:
        Bai, Wang, Tao, Li & Fu: Dual lottery ticket hypothesis, ICLR 2022,
        https://arxiv.org/abs/2203.04248, and its published code.
    """
    if type(power) is not int or power < 1:
        raise ValueError(f"power is {power}, expected 1, 2, 3, ...")
    most = growth_steps(every, increment, ceiling) // every
    increments = jnp.minimum(jnp.asarray(step) // every + 1, most)
    return (increments * increment) ** power


def growth_steps(every: int, increment: float, ceiling: float) -> int:
    """Steps in which `growing_coefficient` grows.

    Raises:
        ValueError: A number is not positive and finite, or `every` is no integer.
    """
    if type(every) is not int or every < 1:
        raise ValueError(f"every is {every}, expected 1 step or more")
    for name, value in (("increment", increment), ("ceiling", ceiling)):
        # The negated form also refuses NaN.
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, expected a finite number above 0")
    # Decimal fractions as they are written.
    return every * (math.floor(ceiling / increment * (1 + 1e-6)) + 1)


def growing_decay(coefficient: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Decays the weights that masks prune, and these alone, more and more.

    Random sparse network transformation: what is going to be pruned is drawn to zero while the
    network is trained whole, so that the others take over what it knew. The decay is added to
    gradients: put this before momentum, as weight decay. The masks are not applied yet.

    Args:
        coefficient: By the number of updates so far, such as `growing_coefficient`; or one
            number for all of them.

    Returns:
        A transformation whose `update(grads, state, params, *, masks, **extra)` needs params, and
        masks that fit them; it raises ValueError where they are missing or do not.

    References:
        Bai, Wang, Tao, Li & Fu: Dual lottery ticket hypothesis, ICLR 2022,
        https://arxiv.org/abs/2203.04248, Section 3.2.
    """

    def init(params: Any) -> GrowingDecayState:
        del params
        return GrowingDecayState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, *, masks: Any = None, **extra: Any):
        del extra
        _check_given("growing_decay", params, masks)
        masking.check(params, masks)
        decay = coefficient(state.step) if callable(coefficient) else coefficient
        updates = jax.tree.map(
            lambda update, param, mask: (
                update
                if mask is None
                else update + jnp.where(mask, 0, decay * param).astype(update.dtype)
            ),
            updates,
            params,
            masks,
        )
        return updates, GrowingDecayState(jnp.asarray(optax.safe_increment(state.step)))

    return optax.GradientTransformationExtraArgs(init, update)


def _check_given(name: str, params: Any, masks: Any) -> None:
    if params is None or masks is None:
        missing = "params" if params is None else "masks"
        raise ValueError(f"{name} needs {missing}: call update(grads, state, params, masks=masks)")
