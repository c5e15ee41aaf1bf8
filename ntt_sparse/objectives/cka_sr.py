r"""CKA-SR: sparse networks through layers that are less alike.

The regulariser is the linear CKA between the features of different layers, summed over
pairs. With the vectors $v_l$ of unit length that `ntt_sparse.similarity` compares (a layer's
centred Gram matrix over its norm), the sum over pairs is a sum over layers, and no pair is
ever visited:

$$\sum_{i \ne j} \mathrm{CKA}(X_i, X_j) = \Big\|\sum_l v_l\Big\|^2 - \sum_l \|v_l\|^2$$

The terms take features, not networks: they go with any network, any mask and any other
term of a loss. `ntt_sparse.similarity.features` collects features by pattern.

A layer whose features are the same for all examples takes no part: its similarities and its
gradient are zero.

References:
    Ni et al., "Learning sparse neural networks with identity layers", 2023,
    arXiv:2307.07389; its appendix, Eq. 11 (stages), Eq. 14 (AugCKA-SR), Section 3.3
    (samples and batches) and 3.5 (CCA).
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, SupportsIndex, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ntt_sparse._types import Scalar
from ntt_sparse.similarity import cca, grams
from ntt_sparse.similarity.grams import Features

Similarity: TypeAlias = Literal["cka", "cca"]


def cka_sr(
    stages: Collection[Collection[Features]],
    *,
    samples: SupportsIndex | None = None,
    debiased: bool = False,
    similarity: Similarity = "cka",
    axis_name: str | None = None,
) -> Scalar:
    r"""Stage-wise CKA-SR: $\sum_s \sum_{i \ne j} \mathrm{CKA}(X_{si}, X_{sj})$.

    The sum is over ordered pairs, so that a published coefficient carries over; the
    published double sum (Eq. 11) has the constant diagonal as well. N maps that are all
    alike give N (N - 1) in a stage.

    Args:
        stages: For each stage the features of its layers, `(n, ...)` each, of any shapes.
            Unstack features of a scanned block first, see `aug_cka_sr`.
        samples: How many examples to compare, the first of the batch; by default all. The
            paper uses 8 of 128.
        debiased: Whether to take the debiased CKA. The plain one (the paper's) is near 1 for
            any two layers with many more features than examples.
        similarity: `"cka"`, or `"cca"`: squared ridge CCA (`ntt_sparse.similarity.cca`) of
            features averaged over their inner axes (the positions of images). It tells layers
            apart only with more examples than channels: with 8, any two are alike.
        axis_name: Inside `jax.pmap` or `jax.shard_map`, the axis over which the batch is
            split; the value is that of the whole batch, and gradients are taken as for
            `ntt_sparse.similarity.cka.linear_cka`.

    Returns:
        The sum, not weighted.

    Raises:
        ValueError: No stage, a stage with fewer than two maps, different numbers of
            examples, fewer than `samples` of them, `samples` or a batch below three (two
            examples are alike in all layers) or, to be debiased, four, or an unknown
            similarity.
    """
    grams.check_collection(stages, "stages")
    if not len(stages):
        raise ValueError("CKA-SR needs one stage or more, there are none")
    options = _options(samples, debiased, similarity, axis_name)
    values = [_pair_sum(maps, f"stage {i}", **options) for i, maps in enumerate(stages, start=1)]
    counts = [len(next(iter(maps))) for maps in stages]
    if len(set(counts)) > 1:
        raise ValueError(f"stages have feature maps of {counts} examples, expected the same ones")
    return grams.averaged(sum(values[1:], start=values[0]), axis_name)


def aug_cka_sr(
    features: Collection[Features],
    *,
    samples: SupportsIndex | None = None,
    debiased: bool = False,
    similarity: Similarity = "cka",
    axis_name: str | None = None,
) -> Scalar:
    r"""AugCKA-SR: the mean CKA over all pairs of N layers, of any shapes (Eq. 14).

    N maps that are all alike give 1. With a few layers in each stage, the same coefficient
    is some tens of times weaker here than for `cka_sr`, which is a sum.

    Args:
        features: The features of all layers, `(n, ...)` each. Those of a scanned block come as
            one array `(layers, n, ...)`, whose first axis would be taken for examples: unstack
            them, `[*features["blocks"]]`.
        samples: As for `cka_sr`, as are all other arguments.
        debiased: See `cka_sr`.
        similarity: See `cka_sr`.
        axis_name: See `cka_sr`.

    Returns:
        The mean, not weighted.

    Raises:
        ValueError: As for `cka_sr`.
    """
    options = _options(samples, debiased, similarity, axis_name)
    total = _pair_sum(features, "AugCKA-SR", **options)
    return grams.averaged(total / (len(features) * (len(features) - 1)), axis_name)


def every_nth_batch(
    term: Callable[[Any], Scalar], features: Any, step: Int[Array, ""], every: SupportsIndex
) -> Scalar:
    """A term of the loss in one batch of `every`, zero in the others (the paper's Batch-m).

    The skipped batches do no work, forward or backward: the branch not taken is not run,
    where `step` is the same for all members of a `vmap`. The term is not scaled up.

    Args:
        term: A function of the features.
        features: A pytree of arrays, which enter the branch whole, and so does their
            derivative in every step: capture the examples alone that are compared
            (`ntt_sparse.similarity.features.capture(..., examples=8)`).
        step: The step, counted from 0; those divisible by `every` count.
        every: 1 for every batch.

    Raises:
        ValueError: `every` is less than 1, or no integer.
    """
    every = grams.whole_number(every, 1, f"{every=}, expected 1 (each batch) or a larger integer")
    if every == 1:
        return term(features)
    value = jax.eval_shape(term, features)
    zero = jnp.zeros(value.shape, value.dtype)
    return jax.lax.cond(step % every == 0, term, lambda _: zero, features)


def _options(
    samples: Any, debiased: bool, similarity: str, axis_name: str | None
) -> Mapping[str, Any]:
    if similarity not in ("cka", "cca"):
        raise ValueError(f"{similarity=} is unknown: expected 'cka' or 'cca'")
    if debiased and similarity == "cca":
        raise ValueError("there is no debiased CCA: use similarity='cka' or debiased=False")
    if samples is not None:
        samples = grams.whole_number(
            samples,
            4 if debiased else 3,
            f"{samples=}: expected three examples or more to compare, four or more to be debiased",
        )
    return {
        "samples": samples,
        "debiased": debiased,
        "similarity": similarity,
        "axis_name": axis_name,
    }


def _pair_sum(
    maps: Any,
    name: str,
    *,
    samples: int | None,
    debiased: bool,
    similarity: str,
    axis_name: str | None,
) -> Scalar:
    """The similarity summed over ordered pairs of different layers."""
    grams.check_collection(maps, name)
    if len(maps) < 2:
        raise ValueError(f"{name} has {len(maps)} feature maps, expected two or more to compare")
    counts = [len(x) for x in maps]
    if len(set(counts)) > 1:
        raise ValueError(f"{name} has feature maps of {counts} examples, expected the same ones")
    # Cut first: only the examples that count are flattened, cast and gathered.
    features = [grams.gather_examples(x, axis_name, samples) for x in maps]
    if (n := len(features[0])) < 3:
        raise ValueError(
            f"{name} has feature maps of {n} examples, expected three or more: fewer are alike in "
            "all layers"
        )
    # Kept apart from the network, whose steps are then compiled as they are without the term.
    features = jax.lax.optimization_barrier(features)
    if similarity == "cca":
        features = [jnp.mean(x, axis=tuple(range(1, x.ndim - 1))) for x in features]
    features = [grams.flat(x) for x in features]
    if debiased:
        grams.check_debiased(len(features[0]))
    units = [_unit(x, debiased, similarity) for x in features]
    dtype = jnp.result_type(*units)
    total = jnp.sum(sum(units[1:], start=units[0]).astype(dtype) ** 2)
    own = jax.lax.stop_gradient(sum(jnp.sum(unit**2) for unit in units))
    return total - own


def _unit(x: Float[Array, "n p"], debiased: bool, similarity: str) -> Float[Array, "n n"]:
    if similarity == "cca":
        return grams.unit(cca.whitened_kernel(x), jnp.zeros((), bool))
    return grams.unit_gram(x, debiased=debiased)
