"""Masks: which weights of a parameter pytree are kept.

A mask tree has the structure of its params. Each leaf is a boolean array of
the leaf's shape (`True` = kept), or `None` where the leaf is never pruned.
Masks are ordinary traced values: a new mask never recompiles a program.

Two layers of functions select masks from scores:

* `from_scores` takes densities, checks everything, and warns of empty layers.
* `keep_counts` turns densities into exact integer counts on the host, and
  `from_counts` selects that many entries. Counts may be traced, so members of
  one compiled program can have different densities.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, PyTree, Real

from ntt_sparse._types import Masks, Params, Scalar, Scores
from ntt_sparse.pruning._checks import check_count, check_density
from ntt_sparse.pruning._select import largest, zeros_kept_and_cut

Scope: TypeAlias = Literal["global", "layer"]
Density: TypeAlias = Real[ArrayLike, ""] | Mapping[str, Real[ArrayLike, ""]]
Prunable: TypeAlias = Callable[[str, Any], bool]
"""A predicate `(path, leaf) -> bool`; paths read like `"Dense_0/kernel"`."""


class LayerDensity(NamedTuple):
    """What a mask keeps of one layer."""

    kept: int
    total: int
    density: float


def matrices(path: str, leaf: Any) -> bool:
    """The default prunable set: leaves with two or more dimensions, but no `bias` or `scale`.

    Those of attention, and of layers in one leaf (`nn.scan`, `jax.vmap`), have two axes or more.
    Such a stack of layers counts as one layer.
    """
    return jnp.ndim(leaf) >= 2 and own_name(path) not in ("bias", "scale")


def kernels(path: str, leaf: Any) -> bool:
    """Prunable are weights of Flax's layers, not what tokens or their places begin with."""
    return matrices(path, leaf) and own_name(path) == "kernel"


def own_name(path: str) -> str:
    """The last part of a path name, such as `"kernel"`, without the `value` that NNX puts after."""
    *parents, last = path.split("/")
    return parents[-1] if parents and last == "value" else last


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf: its key path joined by slashes, such as `"Dense_0/kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree that are not `None`, by path name, in tree order.

    Raises:
        ValueError: Two leaves have one name.
    """
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        if name in named:
            raise ValueError(
                f"two leaves are named {name!r}, expected one: a key that holds a slash reads like "
                "a path, rename it"
            )
        named[name] = leaf
    return named


def map_prunable(
    fn: Callable[[str, Any], Any], params: PyTree, prunable: Prunable = matrices
) -> Any:
    """Applies `fn(path, leaf)` to prunable leaves and puts `None` in place of the others.

    Leaves need a shape only, so the result of `jax.eval_shape` is also accepted.

    Raises:
        ValueError: No leaf is prunable.
    """

    def leaf_fn(path, leaf):
        name = path_name(path)
        return fn(name, leaf) if prunable(name, leaf) else None

    result = jax.tree_util.tree_map_with_path(leaf_fn, params)
    if not jax.tree.leaves(result):
        raise ValueError(
            f"no leaf is prunable among {list(named_leaves(params))}: the predicate must accept "
            "at least one (the default takes leaves with two or more dimensions "
            "that are not named bias or scale)"
        )
    return result


def full(params: Params, *, prunable: Prunable = matrices) -> Masks:
    """A mask that keeps everything: the dense network in masked form."""
    return map_prunable(lambda _, leaf: jnp.ones(jnp.shape(leaf), bool), params, prunable)


def check(params: Params, masks: Masks) -> None:
    """Checks that a mask tree fits its params.

    Raises:
        ValueError: The structures differ, a shape differs, or a mask is not boolean.
    """

    def leaf_fn(path, leaf, mask):
        if mask is None:
            return
        # None leaves and values without shape or dtype are reported like a wrong shape.
        shape, dtype = getattr(mask, "shape", None), getattr(mask, "dtype", type(mask).__name__)
        if shape != jnp.shape(leaf) or dtype != jnp.bool_:
            raise ValueError(
                f"mask of {path_name(path)!r} is {dtype}{shape}, expected bool{jnp.shape(leaf)}: "
                "masks are boolean arrays of the shape of their params, or None"
            )

    try:
        jax.tree_util.tree_map_with_path(leaf_fn, params, masks)
    except (ValueError, TypeError) as error:
        if str(error).startswith("mask of"):
            raise
        raise ValueError(
            f"masks must have the structure of params: params hold {list(named_leaves(params))}, "
            f"masks hold {list(named_leaves(masks))}"
        ) from error


def apply(params: Params, masks: Masks) -> Params:
    """Sets pruned weights to exactly zero.

    Selects with `jnp.where`, never by multiplication, so that a pruned infinity
    or NaN is zero too and gets a gradient of exactly zero.

    Args:
        params: Parameters, any pytree of arrays.
        masks: Masks of the same structure; `None` leaves pass the params through.

    Returns:
        The effective parameters, same structure, shapes and dtypes.

    Raises:
        ValueError: `masks` does not fit `params`.
    """
    check(params, masks)
    return jax.tree.map(
        lambda leaf, mask: leaf if mask is None else jnp.where(mask, leaf, jnp.zeros_like(leaf)),
        params,
        masks,
    )


def straight_through(params: Params, masks: Masks) -> Params:
    """As `apply`, but pruned weights get the gradient they would have if they were there.

    What a network would gain by a weight that it does not have: RigL grows by it.

    Raises:
        ValueError: `masks` does not fit `params`.
    """
    check(params, masks)
    return jax.tree.map(
        lambda leaf, mask: leaf if mask is None else _straight_through(leaf, mask), params, masks
    )


@jax.custom_jvp
def _straight_through(leaf: Array, mask: Array) -> Array:
    return jnp.where(mask, leaf, jnp.zeros_like(leaf))


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> Any:
    return _straight_through(*primals), tangents[0]


def rescale(params: Params, masks: Masks) -> Params:
    """Masks `params` and divides the survivors of each layer by the root of its density.

    The variance of a pre-activation then stays that of the dense network. With
    random masks this is the "Scaled Rand." baseline of Neural Tangent Transfer.
    Leaves that are never pruned (biases) are left alone; an empty layer stays zero.

    Raises:
        ValueError: `masks` does not fit `params`.
    """

    def leaf_fn(leaf, mask):
        if mask is None:
            return leaf
        # Half precision is too coarse for counts: bfloat16 is exact up to 256 only.
        precise = jnp.result_type(jnp.float32, leaf)
        kept = jnp.maximum(jnp.sum(mask, dtype=jnp.int32), 1).astype(precise)
        return leaf * jnp.sqrt(mask.size / kept).astype(leaf.dtype)

    return jax.tree.map(leaf_fn, apply(params, masks), masks)


def density(masks: Masks) -> float | Scalar:
    """The fraction kept over all prunable entries, in [0, 1].

    Returns:
        A Python float, or a scalar array when called on traced masks.

    Raises:
        ValueError: No leaf of `masks` is an array, or all are empty.
    """
    leaves = jax.tree.leaves(masks)
    total = _entries(mask.size for mask in leaves)
    kept = sum(jnp.sum(mask, dtype=jnp.int32) for mask in leaves)
    return kept / total if isinstance(kept, Tracer) else int(kept) / total


def _entries(sizes: Iterable[int]) -> int:
    """How many entries masks have, which must not be none."""
    total = sum(sizes)
    if not total:
        raise ValueError("masks hold no entry: every leaf is None or empty, no density is defined")
    return total


def layer_densities(masks: Masks) -> dict[str, LayerDensity]:
    """The per-layer report: `{path: (kept, total, density)}`, in tree order.

    A leaf without entries has a density of 0.

    Raises:
        ValueError: Masks are traced.
    """
    report = {}
    for name, mask in named_leaves(masks).items():
        if isinstance(mask, Tracer):
            raise ValueError(
                f"mask of {name!r} is traced, expected known values: call this outside of the "
                "transformation (masks.density takes traced masks)"
            )
        kept = int(mask.sum())
        report[name] = LayerDensity(kept, mask.size, kept / max(mask.size, 1))
    return report


def format_layer_densities(masks: Masks) -> str:
    """The per-layer report as a table with a line for the whole network.

    Raises:
        ValueError: Masks are traced, or none has an entry.
    """
    rows = layer_densities(masks)
    kept, total = sum(r.kept for r in rows.values()), _entries(r.total for r in rows.values())
    rows["total"] = LayerDensity(kept, total, kept / total)
    width = max(len("layer"), *map(len, rows))
    lines = [f"{'layer':<{width}}  {'kept':>11}  {'total':>11}  density"]
    lines += [
        f"{n:<{width}}  {r.kept:>11,}  {r.total:>11,}  {r.density:.5f}" for n, r in rows.items()
    ]
    return "\n".join(lines)


def from_scores(scores: Scores, density: Density, *, scope: Scope = "global") -> Masks:
    """Keeps the entries with the largest scores.

    Exactly `round(density * N)` entries are kept, of all `N` prunable entries
    or of each layer; ties are kept in index order (tree order of the leaves,
    then row-major order within a leaf).

    Args:
        scores: Floating-point scores, larger is kept; `None` for leaves never pruned.
        density: Fraction to keep in (0, 1], or `{path: fraction}` with an entry for
            every prunable leaf (then each layer keeps its own fraction and `scope`
            is not used).
        scope: Whether weights compete across the whole network or within their layer.

    Returns:
        Masks of the structure of `scores`.

    Raises:
        ValueError: A density that is traced or outside (0, 1], paths that do not match, two
            leaves of one path, a density that keeps no weight at all, or (outside of a
            transformation; inside NaN counts as the smallest score) NaN scores.

    Warns:
        UserWarning: Outside of a transformation, a layer ends empty, or of scores that are
            exactly zero some are kept and some are not.
    """
    counts = keep_counts(scores, density, scope=scope)
    masks = from_counts(scores, counts)
    # Asked of the masks: within a trace they are traced even where the scores are constants.
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(masks)):
        for name, leaf in named_leaves(scores).items():
            if bool(jnp.any(jnp.isnan(leaf))):
                raise ValueError(
                    f"scores of {name!r} hold NaN: the gradients they come from diverged"
                )
        warn_empty_layers(masks)
        _warn_of_ties(scores, masks, together=isinstance(counts, int))
    return masks


def warn_empty_layers(masks: Masks) -> None:
    """Warns when a layer keeps no weight, which cuts the network in two."""
    empty = [name for name, row in layer_densities(masks).items() if row.kept == 0 < row.total]
    if empty:
        warnings.warn(f"layers left without any weight: {', '.join(empty)}", stacklevel=3)


def _warn_of_ties(scores: Scores, masks: Masks, *, together: bool) -> None:
    """Warns when nothing but their place told some weights from others: both score zero."""
    pairs = zip(named_leaves(scores).items(), jax.tree.leaves(masks), strict=True)
    zeros = {name: zeros_kept_and_cut(leaf, mask).tolist() for (name, leaf), mask in pairs}
    cut_anywhere = any(cut for _, cut in zeros.values())
    picked = [n for n, (kept, cut) in zeros.items() if kept and (cut_anywhere if together else cut)]
    if picked:
        warnings.warn(
            f"weights of {', '.join(picked)} were picked by their place: they score zero, as do "
            "others that are pruned; keep fewer, or score params whose gradients are not zero",
            stacklevel=3,
        )


def keep_counts(scores: Scores, density: Density, *, scope: Scope = "global") -> Any:
    """The exact number of entries to keep: an integer, or one per prunable leaf.

    Only the shapes of `scores` are read, so it also works on traced values or on
    the result of `jax.eval_shape`; densities are known numbers, not traced. See `from_scores`
    for arguments and errors.
    """
    sizes = {name: leaf.size for name, leaf in named_leaves(scores).items()}
    if not sizes:
        raise ValueError("scores hold no array: every leaf is None, so there is nothing to prune")
    if scope not in ("global", "layer"):
        raise ValueError(f"{scope=} is unknown: expected 'global' or 'layer'")
    if isinstance(density, Mapping):
        if set(density) != set(sizes):
            raise ValueError(
                "densities must name every prunable leaf: "
                f"missing {sorted(set(sizes) - set(density))}, "
                f"unknown {sorted(set(density) - set(sizes))}"
            )
        densities = {n: check_density(d, f"density of {n!r}") for n, d in density.items()}
    else:
        densities = dict.fromkeys(sizes, check_density(density))
    if isinstance(density, Mapping) or scope == "layer":
        counts = {name: round(densities[name] * size) for name, size in sizes.items()}
        total = sum(counts.values())
        result = jax.tree_util.tree_map_with_path(lambda path, _: counts[path_name(path)], scores)
    else:
        total = result = round(check_density(density) * sum(sizes.values()))
    if total == 0:
        raise ValueError(
            f"{density=} keeps none of {sum(sizes.values())} weights: ask for at least one weight"
        )
    return result


def from_counts(scores: Scores, counts: Any) -> Masks:
    """Keeps the `counts` entries with the largest scores, ties in index order.

    The cost is a few counting passes over the scores, without a sort or a copy of
    them (`ntt_sparse.pruning._select`). NaN counts as the smallest score, and
    -0.0 as 0.0. Safe under `jit` and `vmap`.

    Args:
        scores: Floating-point scores of any shapes; `None` for leaves never pruned.
        counts: An integer for the whole tree (global), or a tree of integers with
            the structure of `scores` (one per leaf), from 0 to N; of traced ones those out of
            range count as the nearest in it.

    Returns:
        Masks of the structure of `scores`.

    Raises:
        ValueError: Scores are not floating point, two leaves have one path, or `counts` is of
            another structure, no integer, an array of several or out of range.
    """
    leaves, treedef = jax.tree.flatten(scores)
    for name, leaf in named_leaves(scores).items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"scores of {name!r} are {jnp.result_type(leaf)}, expected floating point"
            )
    if jax.tree.structure(counts) == treedef and not jax.tree_util.treedef_is_leaf(treedef):
        each = list(zip(leaves, jax.tree.leaves(counts), strict=True))
        for leaf, count in each:
            check_count(count, jnp.size(leaf))
        selected = [largest([leaf], count)[0] for leaf, count in each]
    elif jax.tree_util.treedef_is_leaf(jax.tree.structure(counts)):
        check_count(counts, sum(jnp.size(leaf) for leaf in leaves))
        selected = largest(leaves, counts)
    else:
        raise ValueError(
            f"counts must be one integer or a tree like scores, got {jax.tree.structure(counts)} "
            f"for scores {treedef}"
        )
    return jax.tree.unflatten(treedef, selected)
