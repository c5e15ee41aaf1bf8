r"""Neurons in the order in which they can go: by similarity of representations, and rivals.

The layer's activations of n examples are $X$ `(n, p)`, centred. With $C = X^\top X$,
$Q = C \circ C$ and $r = Q 1$ the similarity of the whole layer to one of which only the neurons
$S$ are left, the others constant, is

$$\mathrm{CKA}(X, X_S) = \frac{\sum_{j \in S} r_j}{\sqrt{1^\top Q 1}\,\sqrt{1_S^\top Q 1_S}}.$$

So one matrix product gives what every removal costs, and each further removal is O(p): with the
removed neurons T, shares $\rho = \sum_T r_j / 1^\top Q 1$ and $q = 1_T^\top Q 1_T / 1^\top Q 1$,

$$1 - \mathrm{CKA}^2 = \frac{q - \rho^2}{1 - 2 \rho + q},$$

whose sums only grow: it keeps the digits that CKA, a number next to one, does not have. The
order is that of brute force, which takes time $\Omega(p^2 n p)$.

All is computed in double precision, whatever the configuration of JAX, also inside of `jax.jit`
and `jax.vmap`. Neurons whose removals differ by rounding alone are tied, and go by index. What is
left when little is left is summed anew, so the digits last to the last neuron.

References:
    Higgins, "Representation aware pruning with centered kernel alignment", 2023, Section 3.
    Kornblith et al., "Similarity of neural network representations revisited", ICML 2019.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Num

from ntt_sparse._types import PRNGKey
from ntt_sparse.pruning._neuron_curve import PruneCurve, curve

_MODES = ("greedy", "oneshot")


def cka_prune_order(
    activations: Num[ArrayLike, "..."],
    count: int,
    *,
    mode: str = "greedy",
    reference: Num[ArrayLike, "..."] | None = None,
    kept: Bool[ArrayLike, " _"] | None = None,
) -> Int[Array, " count"]:
    """Indices `(count,)` of neurons in the order in which they are removed.

    See `cka_prune_curve`, which also says how similar the rest stays.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 5.0, 0.1], [0.0, 5.0, 0.0], [1.0, 5.0, 0.3], [3.0, 5.0, 0.0]])
        >>> cka_prune_order(x, 2).tolist()  # The second never changes, the third hardly.
        [1, 2]
    """
    return cka_prune_curve(activations, count, mode=mode, reference=reference, kept=kept).order


def cka_prune_curve(
    activations: Num[ArrayLike, "..."],
    count: int | None = None,
    *,
    mode: str = "greedy",
    reference: Num[ArrayLike, "..."] | None = None,
    kept: Bool[ArrayLike, " _"] | None = None,
) -> PruneCurve:
    """Removes neuron after neuron, always the one without which the layer is most like itself.

    O(n p^2) operations for the layer, O(p) for each removal, and O(p^2) the few times that next to
    nothing is left of what there was; O(p^2) memory up to p = 16,384, beyond O(n p), and as many
    operations for each removal. For maps of s positions O(n^2 p (s + p)) for the layer, for a
    reference of m features O(n^2 (m + s p)) more.

    Args:
        activations: `(n, p)` of the layer, before or after its nonlinearity: n examples of p
            neurons. With axes between, such as `(n, height, width, p)`, a neuron is a channel, and
            what is compared are flattened features, as in `ntt_sparse.similarity.cka`.
        count: How many neurons are removed, 0 to p; all by default.
        mode: `"greedy"`, the algorithm of the paper, or `"oneshot"`, that of its published
            code: neurons by the damage of their removal alone.
        reference: `(n, ...)`, what the layer has to stay like, for the same examples, of any
            number of neurons; by default the activations themselves.
        kept: `(p,)`, neurons that are there; the others are neither compared nor removed.

    Returns:
        The order and the similarity after each removal. Similarities are 0 if the layer is
        constant; the order is then that of indices.

    Raises:
        ValueError: Shapes or dtypes do not fit, `count` is not possible, the mode is unknown, or
            (outside of a transformation) values are not finite.

    References:
        Higgins 2023, Section 3, "CKA pruning".
    """
    if mode not in _MODES:
        raise ValueError(f"{mode=} is unknown, expected one of {', '.join(_MODES)}")
    dtype = jnp.result_type(float)
    # Also where JAX is set to single precision, or this is traced there.
    with jax.enable_x64(True):
        x, target = _checked_pair(activations, reference)
        left = _checked_kept(kept, x.shape[-1])
        order, similarity = curve(x, target, left, None, _checked_count(count, left), mode)
        return PruneCurve(order, similarity.astype(dtype))


def similarity_along(
    activations: Num[ArrayLike, "..."],
    order: Int[ArrayLike, " count"],
    *,
    reference: Num[ArrayLike, "..."] | None = None,
) -> Float[Array, " count"]:
    """How similar a layer stays to itself when its neurons go in any order.

    Args:
        activations: See `cka_prune_curve`.
        order: Indices of different neurons, the first to go first.
        reference: See `cka_prune_curve`.

    Returns:
        CKA of the whole layer with what is left after each removal, in [0, 1].

    Raises:
        ValueError: Shapes do not fit, or (outside of a transformation) an index is out of range or
            repeated, or a value is not finite.
    """
    dtype = jnp.result_type(float)
    with jax.enable_x64(True):
        x, target = _checked_pair(activations, reference)
        given = _checked_order(order, x.shape[-1])
        left = _checked_kept(None, x.shape[-1])
        return curve(x, target, left, given, len(given), "given").similarity.astype(dtype)


def l1_prune_order(
    kernel: Num[ArrayLike, "..."], count: int, *, kept: Bool[ArrayLike, " _"] | None = None
) -> Int[Array, " count"]:
    """Indices of the neurons with the smallest L1 norms of their incoming weights.

    Args:
        kernel: `(..., p)`, weights into a layer of p neurons or channels; without biases.
        count: How many are removed, 0 to p.
        kept: `(p,)`, neurons that are there, all by default.

    Returns:
        `(count,)` in the order of removal, ties by index.

    Raises:
        ValueError: As `cka_prune_curve`.

    References:
        Higgins 2023, Section 3, "L1 pruning".
    """
    with jax.enable_x64(True):
        weights = _checked(kernel, "kernel").astype(jnp.float64)
        left = _checked_kept(kept, weights.shape[-1])
        count = _checked_count(count, left)
        norms = jnp.sum(jnp.abs(weights), axis=tuple(range(weights.ndim - 1)))
        return _smallest(norms, left, count)


def random_prune_order(
    key: PRNGKey, p: int, count: int, *, kept: Bool[ArrayLike, " _"] | None = None
) -> Int[Array, " count"]:
    """Indices of `count` of p neurons at random, each order as likely as any other.

    Args:
        key: Of the draw.
        p: Neurons of the layer.
        count: How many are removed, 0 to p.
        kept: `(p,)`, neurons that are there, all by default.

    Raises:
        ValueError: As `cka_prune_curve`.
    """
    left = _checked_kept(kept, p)
    count = _checked_count(count, left)
    places = jax.random.permutation(key, p)
    return _smallest(places, left, count)


def prune_layers(
    activations: Mapping[str, Num[ArrayLike, "..."]],
    counts: Mapping[str, int],
    *,
    mode: str = "greedy",
) -> dict[str, PruneCurve]:
    """The curves of several layers, each as if the others stayed whole.

    Args:
        activations: By layer, see `cka_prune_curve`.
        counts: By layer, how many neurons go.
        mode: See `cka_prune_curve`.

    Raises:
        ValueError: There are no activations of a layer, or as `cka_prune_curve`.
    """
    return {
        name: cka_prune_curve(_of_layer(activations, name), count, mode=mode)
        for name, count in counts.items()
    }


def prune_sequentially(
    activations_of: Callable[[dict[str, Array]], Mapping[str, Num[ArrayLike, "..."]]],
    counts: Mapping[str, int],
    *,
    mode: str = "greedy",
) -> dict[str, PruneCurve]:
    """The curves of several layers, where each sees the pruning of those before it.

    Of what a layer computes when those before it are pruned already, neurons go so that it stays
    like that layer of the whole network. One forward pass for each layer.

    Args:
        activations_of: `{layer: (p,) bool} -> {layer: activations}`: what the network computes
            without the neurons that are `False`; a layer that is not there is whole.
        counts: By layer, from input to output, how many neurons go.
        mode: See `cka_prune_curve`.

    Raises:
        ValueError: There are no activations of a layer, or as `cka_prune_curve`.
    """
    whole = activations_of({})
    kept: dict[str, Array] = {}
    curves = {}
    for name, count in counts.items():
        now = activations_of(dict(kept)) if kept else whole
        reference = _of_layer(whole, name) if kept else None
        curves[name] = cka_prune_curve(_of_layer(now, name), count, mode=mode, reference=reference)
        p = jnp.shape(_of_layer(whole, name))[-1]
        kept[name] = jnp.ones(p, bool).at[curves[name].order].set(False)
    return curves


def counts_at_rate(widths: Mapping[str, int], rate: float) -> dict[str, int]:
    """How many neurons of each layer a rate of those that are left is; one always stays.

    Args:
        widths: Neurons that are left, by layer.
        rate: In [0, 1); the product is rounded, halves to even.

    Raises:
        ValueError: The rate is out of range, or a layer has no neuron.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"{rate=}, expected a fraction of the neurons in [0, 1)")
    if empty := [name for name, width in widths.items() if width < 1]:
        raise ValueError(f"layers without any neuron: {', '.join(empty)}")
    return {name: min(round(rate * width), width - 1) for name, width in widths.items()}


def counts_at_threshold(
    similarities: Mapping[str, Float[ArrayLike, " count"]], threshold: float
) -> dict[str, int]:
    """How many neurons of each layer can go while its similarity stays at a threshold or above.

    Args:
        similarities: By layer, of `cka_prune_curve`; not inside of a transformation.
        threshold: In (0, 1], the same for all layers.

    Returns:
        For each layer the removals before the first that falls below, fewer than all neurons if
        the curve has all of them (without any the similarity is 0).

    Raises:
        ValueError: The threshold is out of range, or a similarity is not finite.
    """
    # The negated form also refuses NaN.
    if not 0 < threshold <= 1:
        raise ValueError(f"{threshold=}, expected a similarity in (0, 1]")
    falling = _falling(similarities)
    return {name: int(np.sum(each >= threshold)) for name, each in falling.items()}


def counts_of_total(
    similarities: Mapping[str, Float[ArrayLike, " count"]], total: int
) -> tuple[dict[str, int], float]:
    """How many neurons of each layer go, of `total`, so that they share the highest threshold.

    Args:
        similarities: By layer, of `cka_prune_curve`; not inside of a transformation.
        total: Of all layers together.

    Returns:
        The numbers, and the threshold: the lowest similarity that a layer had on the way.

    Raises:
        ValueError: There are not so many removals in the curves, or one is not finite.
    """
    falling = _falling(similarities)
    available = sum(map(len, falling.values()))
    if not 0 <= total <= available:
        raise ValueError(f"{total=}, expected 0 to {available}, the removals in the curves")
    values = np.concatenate([*falling.values(), np.zeros(0)])
    layers = np.repeat(np.arange(len(falling)), [len(each) for each in falling.values()])
    # Of one layer in its order, as it falls; of equal ones the first layer's first.
    chosen = np.argsort(-values, kind="stable")[:total]
    numbers = np.bincount(layers[chosen], minlength=len(falling))
    lowest = float(values[chosen[-1]]) if total else 1.0
    return dict(zip(falling, map(int, numbers), strict=True)), lowest


def _falling(similarities: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The lowest similarity of each layer up to each removal."""
    falling = {name: np.minimum.accumulate(np.asarray(c)) for name, c in similarities.items()}
    if bad := [name for name, each in falling.items() if not np.all(np.isfinite(each))]:
        raise ValueError(f"similarities of {', '.join(bad)} hold a number that is not finite")
    return falling


def _smallest(values: Any, left: Any, count: int) -> Any:
    """The indices of the smallest values of those left, in order, -1 where there are no more."""
    last = jnp.where(left, 0, 1)
    order = jnp.lexsort((values, last))[:count]
    return jnp.where(left[order], order, -1).astype(jnp.int32)


def _of_layer(activations: Mapping[str, Any], name: str) -> Any:
    if name not in activations:
        raise ValueError(f"there are no activations of {name!r}, only of {sorted(activations)}")
    return activations[name]


def _checked(value: Any, name: str) -> Any:
    array = jnp.asarray(value)
    if array.ndim < 2 or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}, expected two axes or more, none empty")
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"{name} is {array.dtype}, expected real numbers")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.float32)
    if not isinstance(array, Tracer) and not np.all(np.isfinite(np.asarray(array))):
        raise ValueError(f"{name} holds a number that is not finite")
    return array


def _checked_pair(activations: Any, reference: Any) -> Any:
    x = _checked(activations, "activations")
    target = None if reference is None else _checked(reference, "reference")
    if target is not None and len(target) != len(x):
        raise ValueError(
            f"reference has {len(target)} examples, activations have {len(x)}: CKA compares "
            "representations of the same ones"
        )
    return x, target


def _checked_kept(kept: Any, p: int) -> Any:
    if kept is None:
        return jnp.ones(p, bool)
    left = jnp.asarray(kept)
    if left.shape != (p,):
        raise ValueError(f"kept has shape {left.shape}, expected ({p},): one for each neuron")
    if left.dtype != bool:
        raise ValueError(f"kept is {left.dtype}, expected booleans")
    return left


def _checked_order(order: Any, p: int) -> Any:
    given = jnp.asarray(order)
    if given.ndim != 1 or not (jnp.issubdtype(given.dtype, jnp.integer) or not given.size):
        raise ValueError(f"order is {given}, expected indices (count,) of neurons")
    if not isinstance(given, Tracer):
        values = np.asarray(given)
        if np.any((values < 0) | (values >= p)) or len(np.unique(values)) < len(values):
            raise ValueError(f"order is {values}, expected different numbers from 0 to {p - 1}")
    return given.astype(jnp.int32)


def _checked_count(count: Any, left: Any) -> int:
    most = len(left) if isinstance(left, Tracer) else int(jnp.sum(left))
    try:
        count = most if count is None else operator.index(count)
    except (TypeError, jax.errors.JAXTypeError):
        raise ValueError(f"{count=}, expected a whole number that is known in advance") from None
    if not 0 <= count <= most:
        raise ValueError(f"{count=}, expected 0 to {most}, the neurons that are there")
    return count
