"""Pruning that stops at a target: offsets are held from the step at which it is reached.

The paper leaves budgets to the future (Bu et al. 2021, Section 6) and does not say whether a
target is for the network or for each layer; here both are.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from ntt_sparse.gates.dam import Dam

Offsets: TypeAlias = Mapping[str, Float[ArrayLike, "..."]]
"""The offset of each gated layer, by its path."""

Cost: TypeAlias = Callable[[dict[str, Bool[Array, "_"]]], Real[Array, ""]]
"""What a network costs whose open channels are these: it must not grow when one is closed."""


class Budget(NamedTuple):
    """Where a budget stands; to be carried from step to step.

    Attributes:
        offsets: The offset of each layer after the last step.
        reached: Whether the target is reached, for the network or for each layer: from then
            on its offsets stay as they are.
    """

    offsets: dict[str, Float[Array, ""]]
    reached: dict[str, Bool[Array, ""]]


def start(offsets: Offsets) -> Budget:
    """The budget before the first step.

    Raises:
        ValueError: There are no offsets, or one is no scalar of float32 or more.
    """
    values = {path: jnp.asarray(beta) for path, beta in offsets.items()}
    if not values:
        raise ValueError("there are no offsets, expected one per gated layer")
    for path, beta in values.items():
        if beta.shape or not jnp.issubdtype(beta.dtype, jnp.floating):
            raise ValueError(
                f"the offset of {path!r} is {beta.dtype}{beta.shape}, expected one floating-point "
                "number, such as jnp.float32(1)"
            )
        if beta.dtype.itemsize < 4:
            raise ValueError(
                f"the offset of {path!r} is {beta.dtype}, expected float32 or wider: channels of "
                "wide layers are less than a rounding of half precision apart"
            )
    return Budget(values, dict.fromkeys(values, jnp.asarray(False)))


def channels(open_: Mapping[str, Bool[Array, "_"]]) -> Real[Array, ""]:
    """The cost that counts open channels."""
    return jnp.sum(jnp.stack([jnp.sum(layer, dtype=jnp.int32) for layer in open_.values()]))


def hold(
    budget: Budget,
    moved: Offsets,
    sizes: Mapping[str, int],
    target: Real[ArrayLike, ""],
    *,
    kind: Dam,
    cost: Cost = channels,
    keep: int = 1,
    ranks: Mapping[str, ArrayLike] | None = None,
) -> Budget:
    """One step of a budget for the whole network.

    A step of training may close several channels, of several layers, and cost what is below
    the target. Then the channels are closed one by one in the order in which the offsets, on
    their straight ways from `budget.offsets` to `moved`, come by them, until the cost is no
    more than the target; all offsets are put to where exactly these channels are closed, and
    stay. So without its last channel the cost is above the target, unless it was not from the
    start.

    Args:
        budget: From the step before.
        moved: Offsets after this step of the optimiser.
        sizes: Channels of each layer.
        target: The largest cost wanted; may be traced.
        kind: The gates, the very ones of the network: where channels close follows from their
            `k` and `convention`, and with others a layer may close whole.
        cost: What counts, by default open channels.
        keep: Channels of each layer that stay open whatever comes, those of the highest order;
            a closed layer may cut the network in two, which costs nothing and is no target.
        ranks: Orders of layers where they are not those of the index.

    Returns:
        The budget with the offsets to go on from; put them into the params. An offset that is
        not finite reaches nothing and is returned as it is.

    Raises:
        ValueError: Layers do not fit, a layer has no more channels than are kept, or the target
            is not positive, below the cost of what is kept, or no less than the cost of all
            channels, so that there is nothing to prune.
    """
    _check_layers(budget, moved, sizes)
    if unknown := set(ranks or {}) - set(sizes):
        raise ValueError(f"ranks are for {sorted(unknown)}, sizes for {sorted(sizes)}")
    if not 0 <= keep < min(sizes.values()):
        raise ValueError(
            f"keep is {keep}, expected 0 to {min(sizes.values()) - 1}: fewer than the channels of "
            "the smallest layer"
        )
    names, widths = list(sizes), list(sizes.values())
    owner = np.repeat(np.arange(len(names)), widths)
    before = jnp.stack([budget.offsets[name] for name in names])
    after = jnp.stack([jnp.asarray(moved[name], before.dtype) for name in names])
    mu = jnp.concatenate([
        kind.order_numbers(n, ranks=(ranks or {}).get(name)) for name, n in sizes.items()
    ]).astype(before.dtype)  # fmt: skip

    # An offset at which all channels but those that are kept are closed.
    lowest = jnp.stack([
        -kind.order_numbers(n)[n - keep - 1] if keep else -jnp.inf for n in sizes.values()
    ]).astype(before.dtype)  # fmt: skip
    _check_target(target, cost, sizes, keep, ranks or {})
    # What is not finite is left to be seen.
    bounded = jnp.maximum(after, jnp.minimum(before, lowest))
    after = jnp.where(jnp.isfinite(after), bounded, after)

    was_open, is_open = mu + before[owner] > 0, mu + after[owner] > 0
    closing = was_open & ~is_open
    # When an offset passes a channel, from 0 to 1; the others never. Of several at once those of
    # low order come first.
    fall = jnp.where(before > after, before - after, 1.0)
    when = jnp.where(closing, (mu + before[owner]) / fall[owner], jnp.inf)
    place = jnp.argsort(jnp.lexsort((mu, when)))

    def reached_after(count):
        flat = is_open | (closing & (place >= count))
        return cost(_by_layer(flat, sizes)) <= target

    # The smallest count of closed channels that reaches the target, by bisection.
    def halve(_, ends):
        low, high = ends
        middle = (low + high) // 2
        enough = reached_after(middle)
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    everything = jnp.sum(closing, dtype=jnp.int32)
    done = jnp.stack([budget.reached[name] for name in names]).all()
    reaches = reached_after(everything) & jnp.all(jnp.isfinite(after))

    def search():
        ends = jnp.zeros_like(everything), everything
        return jax.lax.fori_loop(0, sum(widths).bit_length(), halve, ends)[0]

    # In the one step of a run that needs it.
    count = jax.lax.cond(reaches & ~done, search, lambda: everything)
    # Where the closed channels of a layer end; with none, it may have opened some.
    accepted = jnp.where(closing & (place < count), mu, -jnp.inf)
    last = jax.ops.segment_max(accepted, owner, len(names))
    stopped = jnp.where(last > -jnp.inf, -last, jnp.maximum(before, after))
    values = jnp.where(done, before, jnp.where(reaches, stopped, after))
    return Budget(
        {name: values[index] for index, name in enumerate(names)},
        dict.fromkeys(names, done | reaches),
    )


def _by_layer(flat: Bool[Array, "_"], sizes: Mapping[str, int]) -> dict[str, Bool[Array, "_"]]:
    layers = jnp.split(flat, np.cumsum(list(sizes.values()))[:-1])
    return dict(zip(sizes, layers, strict=True))


def _check_target(
    target: Real[ArrayLike, ""],
    cost: Cost,
    sizes: Mapping[str, int],
    keep: int,
    ranks: Mapping[str, ArrayLike],
) -> None:
    if isinstance(target, Tracer) or any(isinstance(each, Tracer) for each in ranks.values()):
        return
    # A compiled step may hold this: what is known is computed now.
    with jax.ensure_compile_time_eval():
        whole = cost({path: jnp.ones(n, bool) for path, n in sizes.items()})
        least = cost({
            path: jnp.asarray(ranks.get(path, np.arange(n))) >= n - keep
            for path, n in sizes.items()
        })  # fmt: skip
        if isinstance(whole, Tracer):
            return
        # The negated form also refuses NaN.
        above = cast(float, least) <= cast(float, target) < cast(float, whole)
        if not (above and cast(float, target) > 0):
            raise ValueError(
                f"the target of the budget is {target}, expected more than 0, {least} or more, "
                f"the cost of the channels that are kept, and less than {whole}, the cost of all"
            )


def hold_layers(
    budget: Budget,
    moved: Offsets,
    sizes: Mapping[str, int],
    targets: Mapping[str, Int[ArrayLike, ""]],
    *,
    kind: Dam,
) -> Budget:
    """One step of a budget of channels for each layer: it ends at exactly its target.

    Args:
        budget: From the step before.
        moved: Offsets after this step of the optimiser.
        sizes: Channels of each layer.
        targets: Open channels wanted of each layer; may be traced.
        kind: The gates, as for `hold`.

    Returns:
        The budget with the offsets to go on from; put them into the params.

    Raises:
        ValueError: Layers do not fit, or a target is below 1 or no less than the channels.
    """
    _check_layers(budget, moved, sizes)
    if set(targets) != set(sizes):
        raise ValueError(f"targets are for {sorted(targets)}, expected {sorted(sizes)}")
    offsets, reached = {}, {}
    for name, n in sizes.items():
        target = targets[name]
        whole = jnp.issubdtype(jnp.result_type(target), jnp.integer)
        if not whole or (not isinstance(target, Tracer) and not 1 <= cast(int, target) < n):
            raise ValueError(
                f"the target of {name!r} is {target} channels, expected 1 to {n - 1}: it has {n}"
            )
        before = budget.offsets[name]
        after = jnp.asarray(moved[name], before.dtype)
        # At this offset the last channel to go is closed, and all after it are open.
        # An offset that starts beyond it stays: closed channels are not opened.
        stop = -kind.order_numbers(n)[n - target - 1].astype(before.dtype)
        enough = after <= stop
        done = budget.reached[name]
        offsets[name] = jnp.where(done, before, jnp.where(enough, jnp.minimum(before, stop), after))
        reached[name] = done | enough
    return Budget(offsets, reached)


def _check_layers(budget: Budget, moved: Offsets, sizes: Mapping[str, int]) -> None:
    for what, given in (("offsets", moved), ("the budget", budget.offsets)):
        if set(given) != set(sizes):
            raise ValueError(f"{what} are of {sorted(given)}, sizes of {sorted(sizes)}")
    if not sizes:
        raise ValueError("there are no layers, expected one or more")
    for name, offset in moved.items():
        if jnp.shape(offset):
            raise ValueError(
                f"the offset of {name!r} has shape {jnp.shape(offset)}, expected one number"
            )
