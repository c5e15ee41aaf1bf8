"""Training under masks with any Optax optimiser."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

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
        if params is None or masks is None:
            missing = "params" if params is None else "masks"
            raise ValueError(
                f"keep_masked needs {missing}: call update(grads, state, params, masks=masks)"
            )
        effective = masking.apply(params, masks)
        updates, state = inner.update(masking.apply(updates, masks), state, effective, **extra)
        return jax.tree.map(_replace_pruned, updates, params, masks), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _replace_pruned(update: Any, param: Any, mask: Any) -> Any:
    """The update, or `-param` where pruned, in a dtype that holds both exactly."""
    return update if mask is None else jnp.where(mask, update, -param)
