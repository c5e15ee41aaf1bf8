r"""L0 regularisation of weights: a hard-concrete gate for each of them, as functions of pytrees.

A tree of gate parameters $\log\alpha$ has the structure of the params, with `None` where a leaf is
never pruned. In training every weight is multiplied by a gate that is drawn, and the expected
number of weights whose gate is not zero is minimised with the loss; in evaluation gates are fixed,
and many are exactly zero.

    gates = l0.init(key, params)
    effective = l0.sample(key, params, gates)             # in training
    penalty = coefficient / num_examples * l0.expected_count(gates)
    masks.from_scores(l0.scores(params, gates), 0.05)     # at a density of one's own

Source: Louizos, Welling & Kingma 2018, "Learning Sparse Neural Networks through L0
Regularization", https://arxiv.org/abs/1712.01312, Eqs. 9 to 13, there for groups of weights.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ntt_sparse._types import Masks, Params, PRNGKey, Scalar, Scores
from ntt_sparse.gates import hard_concrete
from ntt_sparse.gates.hard_concrete import HardConcrete
from ntt_sparse.pruning.masks import Prunable, map_prunable, matrices, named_leaves

# Of what parameters are drawn with at the start, as in the published code.
_DEVIATION = 0.01


def init(
    key: PRNGKey, params: Params, *, drop: float = 0.3, prunable: Prunable = matrices
) -> PyTree:
    """Gate parameters to start from: normal about `log((1 - drop) / drop)`, deviation 0.01.

    Args:
        key: For the draws.
        params: Parameters of the network.
        drop: The chance of being dropped at the start, between 0.0099 and 0.9167.
        prunable: Which leaves have gates.

    Returns:
        Of the structure of `params`, floating-point arrays of the shapes of its leaves or `None`.

    Raises:
        ValueError: The chance is out of range, or no leaf is prunable.
    """
    start = HardConcrete(drop).start
    index = {name: place for place, name in enumerate(named_leaves(params))}

    def drawn(name, leaf):
        draws = jax.random.normal(jax.random.fold_in(key, index[name]), jnp.shape(leaf))
        return (start + _DEVIATION * draws).astype(jnp.result_type(leaf, jnp.float32))

    return map_prunable(drawn, params, prunable)


def sample(key: PRNGKey, params: Params, log_alpha: PyTree) -> Params:
    """The weights of one pass of training: each times a gate that is drawn for it alone.

    Args:
        key: Another one for each pass.
        params: Parameters.
        log_alpha: From `init`.

    Returns:
        Of the structure of `params`; leaves without gates as they are.

    Raises:
        ValueError: The trees do not fit.
    """
    _check(params, log_alpha)
    index = {name: place for place, name in enumerate(named_leaves(log_alpha))}

    def gate(name, alpha):
        noise = hard_concrete.uniform(jax.random.fold_in(key, index[name]), alpha.shape)
        return hard_concrete.sample(alpha, noise.astype(alpha.dtype))

    return _multiplied(params, map_prunable(gate, log_alpha, lambda *_: True))


def deterministic(params: Params, log_alpha: PyTree) -> Params:
    """The weights of evaluation, see `ntt_sparse.gates.hard_concrete.deterministic`.

    Raises:
        ValueError: The trees do not fit.
    """
    _check(params, log_alpha)
    return _multiplied(params, jax.tree.map(hard_concrete.deterministic, log_alpha))


def open_masks(log_alpha: PyTree) -> Masks:
    """Which weights gates of evaluation let through: masks."""
    return jax.tree.map(lambda alpha: hard_concrete.deterministic(alpha) > 0, log_alpha)


def expected_count(log_alpha: PyTree) -> Scalar:
    """The expected number of weights whose gate of training is not zero (Eq. 12).

    Raises:
        ValueError: There is no gate.
    """
    leaves = jax.tree.leaves(log_alpha)
    if not leaves:
        raise ValueError("there are no gates: expected parameters as `init` makes them")
    return jnp.sum(jnp.stack([jnp.sum(hard_concrete.probability(leaf)) for leaf in leaves]))


def scores(params: Params, log_alpha: PyTree) -> Scores:
    """The probability of each gate to be open, times the magnitude of its weight.

    Ours, for masks of a density that is asked for. (By gates alone all that are held at an end
    of their range would be equal, and the order of layers would decide between them.)

    Raises:
        ValueError: The trees do not fit.
    """
    _check(params, log_alpha)
    chances = jax.tree.map(hard_concrete.probability, log_alpha)
    return jax.tree.map(
        lambda leaf, chance: None if chance is None else jnp.abs(leaf) * chance, params, chances
    )


def clip(log_alpha: PyTree) -> PyTree:
    """Parameters held where gates still learn, to be called after each step."""
    return jax.tree.map(hard_concrete.clip, log_alpha)


def _multiplied(params: Params, gates: PyTree) -> Params:
    def times(leaf: Array, gate: Array | None) -> Array:
        return leaf if gate is None else leaf * gate.astype(leaf.dtype)

    return jax.tree.map(times, params, gates)


def _check(params: Params, log_alpha: PyTree) -> None:
    """Raises a ValueError unless gates are arrays of the shapes of their weights, or `None`."""
    trees = (params, log_alpha)
    ours, theirs = (jax.tree.structure(tree, is_leaf=lambda x: x is None) for tree in trees)
    weights, gates = map(named_leaves, trees)
    shared = [name for name in gates if name in weights]
    differ = [name for name in shared if jnp.shape(gates[name]) != jnp.shape(weights[name])]
    if ours != theirs or differ:
        raise ValueError(
            f"gates are of {list(gates)}, params of {list(weights)}"
            + (f"; shapes differ of {', '.join(differ)}" if differ else "")
            + ": expected gates as `init` makes them of these params"
        )
