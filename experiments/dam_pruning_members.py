"""The members of the structured pruning study: which networks there are and how each starts."""

import itertools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.study import decayed_rate, stack
from ntt_sparse import models
from ntt_sparse._types import PRNGKey
from ntt_sparse.gates import budget as budgets
from ntt_sparse.gates import channels, order
from ntt_sparse.gates import layer as gates
from ntt_sparse.gates.chipnet import ChipNet
from ntt_sparse.gates.dam import Dam
from ntt_sparse.gates.hard_concrete import HardConcrete
from ntt_sparse.gates.l1 import L1
from ntt_sparse.gates.layer import Kind
from ntt_sparse.gates.network import Network
from ntt_sparse.gates.optimizer import cold_start, labels
from ntt_sparse.gates.slimming import Slimming
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.state import Member, create_member
from ntt_sparse.training.transforms import gradient_noise

# Independent of the streams that training folds from a member's key.
_NOISE_STREAM = 1001
_GATE_STREAM = 1002
# Gates that start at random; of ChipNet and of hard-concrete gates (their code).
_DRAWN = ("chipnet", "hard_concrete")
_LARGEST_ZETA = 0.01
_DEVIATION = 0.01


CUT = ("slimming", "chipnet", "l1")
"""Gates whose channels are cut after training, if there is a budget, and trained on then."""


class Run(NamedTuple):
    """One network of the study."""

    coefficient: float
    target: float
    order: int
    cka_sr: float
    seed: int


def runs_of(config: Any) -> list[Run]:
    """Every combination of the settings."""
    fields = (
        config.coefficients, config.targets, config.orders, config.cka_sr.coefficients,
        config.seeds,
    )  # fmt: skip
    return [Run(*values) for values in itertools.product(*fields)]


def member_names(runs: list[Run]) -> list[str]:
    """Names such as `"c0.1-t1.0-o0-s1"`, with CKA-SR `"c0.1-t1.0-o0-k0.01-s1"`."""
    return [
        f"c{r.coefficient!r}-t{r.target!r}-o{r.order}{f'-k{r.cka_sr!r}' if r.cka_sr else ''}"
        f"-s{r.seed}"
        for r in runs
    ]


def make_kind(config: Any) -> Kind:
    """The gates of a study."""
    return {
        "dam": lambda: Dam(config.initial, config.alpha, config.k, config.convention, config.shape),
        "l1": lambda: L1(config.initial),
        "slimming": lambda: Slimming(config.initial),
        "chipnet": ChipNet,
        "hard_concrete": lambda: HardConcrete(config.drop),
    }[config.gate]()


def make_model(config: Any, num_outputs: int) -> Any:
    """The gated network of a study."""
    fields = {name: config.model[name] for name in ("activation", "gated") if config.model[name]}
    return models.create(
        config.model.name, num_outputs=num_outputs, kind=make_kind(config), **fields
    )


def make_optimizer(
    config: Any, settings: Any, plan: Plan, *, key: PRNGKey | None = None
) -> optax.GradientTransformation:
    """SGD with momentum, Adam, AdamW or AdaBelief, with a schedule, after a cold start of gates.

    Args:
        config: The settings.
        settings: Those of the stage.
        plan: Of the stage.
        key: Of the member, for the noise on gradients, which is part of the optimiser's state.
    """
    # Coupled with the step, as in the training it comes from, but for AdamW.
    decay = optax.add_decayed_weights(
        settings.weight_decay, None if settings.get("decay_gates", True) else _without_gates
    )
    scale = {
        "sgd": lambda: optax.trace(settings.momentum),
        "adam": optax.scale_by_adam,
        "adamw": optax.scale_by_adam,
        "adabelief": optax.scale_by_belief,
    }[settings.optimizer]()
    steps = round(settings.get("cold_start", 0.0) * plan.steps_per_epoch)
    moved = optax.chain(*((scale, decay) if settings.optimizer == "adamw" else (decay, scale)))
    # The rate is that of the run for gates too, so it comes after the cold start.
    rate = decayed_rate(settings, plan.total_steps, settings.milestone_factor)
    parts = [cold_start(moved, steps) if steps else moved, optax.scale_by_learning_rate(rate)]
    if config.gradient_noise:
        noise = None if key is None else jax.random.fold_in(key, _NOISE_STREAM)
        parts.insert(0, gradient_noise(config.gradient_noise, noise))
    return optax.chain(*parts)


def _without_gates(params: Any) -> Any:
    return jax.tree.map(lambda label: label == "network", labels(params))


def target_of(config: Any, network: Network, target: float) -> Any:
    """The largest cost that meets a target, as an integer, or the channels of each layer."""
    # Decimal fractions as they are written: 0.65 of 1,360 is 884.
    fraction = Fraction(repr(target))
    if config.budget == "layers":
        sizes = channels.sizes(network)
        return {path: min(max(round(fraction * n), 1), n - 1) for path, n in sizes.items()}
    return math.floor(fraction * getattr(channels.whole(network), config.budget))


def start_members(
    config: Any,
    module: Any,
    input_shape: tuple[int, ...],
    runs: list[Run],
    settings: Any,
    plan: Plan,
) -> Member:
    """All networks at their start. A seed fixes weights and the order of the data.

    The context of each is its `coefficient`, that of CKA-SR and, with a budget, its `target`
    (see `is_fraction`) and, of DAM, where its budget stands. Orders other than that of the index,
    and what ChipNet's gates know, are in the model state.

    Args:
        config: The settings.
        module: The network.
        input_shape: Of an example.
        runs: Of each network.
        settings: Those of the first stage.
        plan: Of the first stage.
    """
    network = module.network(input_shape)
    sizes = channels.sizes(network)
    limits = [_limit(config, network, run.target) for run in runs]
    init = jax.jit(lambda key: dict(module.init(key, jnp.zeros((1, *input_shape)))))
    by_seed = {seed: init(jax.random.key(seed)) for seed in config.seeds}

    def member(key, variables, coefficient, similarity, target, ranks):
        variables = dict(variables)
        params = variables.pop("params")
        variables |= ranks
        context = {"coefficient": coefficient, "cka_sr": similarity}
        if config.budget:
            context |= {"target": target}
        if config.budget and config.gate == "dam":
            offsets = {path: gate["beta"] for path, gate in gates.find(params).items()}
            context |= {"budget": budgets.start(offsets)}
        if config.gate in _DRAWN:
            drawn = _drawn(config, sizes, jax.random.fold_in(key, _GATE_STREAM))
            params = gates.replace(params, drawn)
        if config.gate == "chipnet":
            # All open, until the stage that trains them.
            variables |= gates.state(
                network, open={path: jnp.ones(n, bool) for path, n in sizes.items()}
            )
        optimizer = make_optimizer(config, settings, plan, key=key)
        masks = jax.tree.map(lambda _: None, params)
        return create_member(params, masks, optimizer, key, context, variables)

    return jax.jit(jax.vmap(member))(
        stack([jax.random.key(run.seed) for run in runs]),
        stack([by_seed[run.seed] for run in runs]),
        jnp.asarray([run.coefficient for run in runs], float),
        jnp.asarray([run.cka_sr for run in runs], float),
        stack(limits),
        stack([orders(config, sizes, run.order) for run in runs]),
    )


def _drawn(config: Any, sizes: Mapping[str, int], key: PRNGKey) -> dict[str, Any]:
    """Parameters of gates that start at random, as in their published code."""
    start = HardConcrete(config.drop).start

    def draw(key: PRNGKey, n: int) -> dict[str, Any]:
        if config.gate == "chipnet":
            return {"zeta": jax.random.uniform(key, (n,), maxval=_LARGEST_ZETA)}
        return {"log_alpha": start + _DEVIATION * jax.random.normal(key, (n,))}

    keys = jax.random.split(key, len(sizes))
    return {path: draw(each, n) for each, (path, n) in zip(keys, sizes.items(), strict=True)}


def is_fraction(config: Any) -> bool:
    """Whether gates are held to a fraction, as published, in place of a number of its kind."""
    return config.gate == "chipnet" or (config.gate, config.budget) == ("slimming", "channels")


def _limit(config: Any, network: Network, target: float) -> Any:
    if not config.budget:
        return ()
    return target if is_fraction(config) else target_of(config, network, target)


def orders(config: Any, sizes: Mapping[str, int], number: int) -> dict[str, Any]:
    """The collection of variables that holds an order of the channels of each gated layer.

    Empty where all orders of the study are those of the index, whose number is 0.
    """
    if not any(config.orders):
        return {}
    key = jax.random.key(number)
    ranks = {
        path: order.random(jax.random.fold_in(key, index), n) if number else jnp.arange(n)
        for index, (path, n) in enumerate(sizes.items())
    }
    return gates.state(sizes, ranks=ranks)
