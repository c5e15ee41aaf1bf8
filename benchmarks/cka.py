"""CKA-SR beside other ways to compute it, and inside a training step, in one process.

    python benchmarks/cka.py                          # nine maps, 128 examples
    python benchmarks/cka.py --layers 27 --examples 16
    python benchmarks/cka.py --layers 9 --examples 32 --members 4
    python benchmarks/cka.py --step                   # ResNet-20, batch 128

Feature maps are thirds of 16x32x32, 32x16x16 and 64x8x8, as in the ResNets for small images.
The candidates run in turn; printed are medians, the median of the ratios to ours, the error
against float64, and (of JAX) temporary memory. PyTorch takes part if it is installed.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import blocked, in_turn, ratio

from ntt_sparse import models
from ntt_sparse.objectives.cka_sr import aug_cka_sr, every_nth_batch
from ntt_sparse.pruning import densities, masks, saliency
from ntt_sparse.pruning.transform import keep_masked
from ntt_sparse.similarity.features import capture
from ntt_sparse.training import terms
from ntt_sparse.training.state import create_member
from ntt_sparse.training.step import make_step

_SHAPES = ((16, 32, 32), (32, 16, 16), (64, 8, 8))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison that the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=9, help="feature maps (default 9)")
    parser.add_argument("--examples", type=int, default=128, help="rows of each (default 128)")
    parser.add_argument("--rounds", type=int, default=9, help="turns (default 9)")
    parser.add_argument(
        "--members", type=int, default=1, help="networks side by side, JAX alone (default 1)"
    )
    parser.add_argument("--step", action="store_true", help="time a ResNet-20 training step")
    options = parser.parse_args(arguments)
    least = {"layers": 2, "examples": 4, "rounds": 1, "members": 1}
    if any(getattr(options, name) < value for name, value in least.items()):
        parser.error(f"expected at least {least}")
    if options.step:
        training_step(options.rounds)
    else:
        alone(options.layers, options.examples, options.rounds, options.members)


def alone(layers: int, n: int, rounds: int, members: int) -> None:
    """Value, and value with gradient, of AugCKA-SR."""
    rng = np.random.default_rng(0)
    shapes = [_SHAPES[layer * 3 // layers] for layer in range(layers)]
    # Like features after a ReLU.
    features = [np.maximum(rng.normal(size=(n, *s)), 0).astype(np.float32) for s in shapes]
    exact = {debiased: _exact(features, debiased) for debiased in (False, True)}
    for mode in ("value", "value and gradient"):
        candidates: dict[str, Callable[[], Any]] = {}
        temporary = {}
        for name, fn in _in_jax().items():
            transformed = fn if mode == "value" else jax.value_and_grad(fn)
            inputs = list(map(jnp.asarray, features))
            if members > 1:
                transformed = jax.vmap(transformed)
                inputs = [jnp.stack([x] * members) for x in inputs]
            compiled = jax.jit(transformed).lower(inputs).compile()
            temporary[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
            candidates[name] = functools.partial(blocked, compiled, inputs)
        if members == 1:
            candidates |= _in_torch(features, gradient=mode != "value")
        times = in_turn(candidates, rounds)
        print(f"\n{mode}: {layers} maps, {n} examples, {members} networks side by side")
        print(f"{'':<22}{'median ms':>10}{'ratio':>8}{'error':>9}{'temp MiB':>10}")
        for name, seconds in times.items():
            value = candidates[name]()
            value = float(np.ravel(value[0] if isinstance(value, tuple) else value)[0])
            to_ours = ratio(times, name, "ours")
            reference = exact["debiased" in name]
            memory = f"{temporary[name]:>10.1f}" if name in temporary else ""
            print(
                f"{name:<22}{1e3 * statistics.median(seconds):>10.2f}{to_ours:>8.2f}"
                f"{abs(value / reference - 1):>9.0e}{memory}"
            )


def _exact(features: Sequence[np.ndarray], debiased: bool) -> float:
    """The definition in float64."""
    units = []
    for x in features:
        x = x.reshape(n := len(x), -1).astype(float)
        x = x - x.mean(0)
        k = x @ x.T
        if debiased:
            np.fill_diagonal(k, 0)
            rows = k.sum(0) / (n - 2)
            k += k.sum() / ((n - 1) * (n - 2)) - rows - rows[:, None]
            np.fill_diagonal(k, 0)
        units.append(k / np.linalg.norm(k))
    pairs = [np.sum(a * b) for i, a in enumerate(units) for b in units[i + 1 :]]
    return float(np.mean(pairs))


def _in_jax() -> Mapping[str, Callable[[list[Any]], Any]]:
    def centred(k):
        k = k - k.mean(0)
        return k - k.mean(1, keepdims=True)

    def gram(x):
        x = x.reshape(len(x), -1)
        return jnp.matmul(x, x.T, precision="highest")

    def batched(features):
        k = jnp.stack([centred(gram(x)).ravel() for x in features])
        v = k / jnp.linalg.norm(k, axis=1, keepdims=True)
        total = jnp.matmul(v, v.T, precision="highest")
        return (total.sum() - len(v)) / (len(v) * (len(v) - 1))

    def loop(features):
        def hsic(x, y):
            h = jnp.eye(len(x)) - 1 / len(x)
            return jnp.sum((h @ gram(x) @ h) * (h @ gram(y) @ h))

        pairs = [(x, y) for i, x in enumerate(features) for y in features[i + 1 :]]
        values = [hsic(x, y) / jnp.sqrt(hsic(x, x)) / jnp.sqrt(hsic(y, y)) for x, y in pairs]
        return sum(values) / len(values)

    debiased = functools.partial(aug_cka_sr, debiased=True)
    return {
        "ours": aug_cka_sr,
        "ours, debiased": debiased,
        "jax, batched": batched,
        "jax, loop": loop,
    }


def _in_torch(
    features: Sequence[np.ndarray], *, gradient: bool
) -> Mapping[str, Callable[[], float]]:
    """The same in PyTorch: batched over layers, and as a loop over pairs."""
    try:
        import torch
    except ImportError:
        return {}
    tensors = [torch.tensor(x, requires_grad=gradient) for x in features]

    def batched():
        k = torch.stack([x.flatten(1) @ x.flatten(1).T for x in tensors])
        k = k - k.mean(1, keepdim=True)
        v = (k - k.mean(2, keepdim=True)).flatten(1)
        v = v / v.norm(dim=1, keepdim=True)
        return ((v @ v.T).sum() - len(v)) / (len(v) * (len(v) - 1))

    def hsic(x, y):
        x, y = x.flatten(1).float(), y.flatten(1).float()
        n = len(x)
        h = torch.eye(n) - torch.ones(n, n) / n
        return torch.sum(torch.mm(torch.mm(h, x @ x.T), h) * torch.mm(torch.mm(h, y @ y.T), h))

    def loop():
        total = torch.zeros(())
        for i in range(len(tensors) - 1):
            for j in range(i + 1, len(tensors)):
                x, y = tensors[i], tensors[j]
                total = total + hsic(x, y) / (torch.sqrt(hsic(x, x)) * torch.sqrt(hsic(y, y)))
        return 2 * total / (len(tensors) * (len(tensors) - 1))

    def run(fn):
        if not gradient:
            with torch.no_grad():
                return float(fn())
        for tensor in tensors:
            tensor.grad = None
        value = fn()
        value.backward()
        return float(value.detach())

    return {
        "torch, batched": functools.partial(run, batched),
        "torch, loop over pairs": functools.partial(run, loop),
    }


def training_step(rounds: int) -> None:
    """A training step of a sparse ResNet-20 at batch 128, with and without the term.

    Two bases: the plain step, and one whose features are all kept alive by a use that costs
    nothing. Five steps are timed as one, of which `batch-5` computes the term in one.
    """
    module = models.create("resnet20", shortcut="B")
    shape = (32, 32, 3)
    variables = dict(module.init(jax.random.key(0), jnp.zeros((1, *shape))))
    params = variables.pop("params")
    kept = masks.from_scores(
        saliency.random(jax.random.key(1), params), densities.erk(params, 0.05)
    )
    optimizer = keep_masked(
        optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=True))
    )
    member = create_member(
        masks.apply(params, kept), kept, optimizer, jax.random.key(2), jnp.float32(1e-4), variables
    )
    rng = np.random.default_rng(3)
    batch = (
        jnp.asarray(rng.normal(size=(128, *shape)), jnp.float32),
        jnp.asarray(rng.integers(0, 10, 128)),
    )

    def similarity(samples, every):
        def term(inputs):
            def value(features):
                return inputs.context * aug_cka_sr(list(features.values()), samples=samples)

            return every_nth_batch(value, inputs.outputs.features, inputs.step, every), {}

        return term

    def alive(inputs):
        ends = [jnp.sum(x[0, 0, 0]) for x in inputs.outputs.features.values()]
        # A coefficient that is zero, but not known to be.
        return (inputs.context - inputs.context) * sum(ends[1:], start=ends[0]), {}

    extra = {
        "plain": (None, None),
        "features alive": (alive, None),
        "all 128": (similarity(None, 1), None),
        "sample-8": (similarity(8, 1), 8),
        "sample-8, batch-5": (similarity(8, 5), 8),
    }
    candidates, temporary = {}, {}
    for name, (term, examples) in extra.items():
        used = {"task": terms.task()} | ({} if term is None else {"similarity": term})
        # The plain step knows of no features.
        apply = (
            terms.without_features(module)
            if term is None
            else capture(module, "stage*", examples=examples)
        )
        step_fn = make_step(used, optimizer, forward=terms.masked_forward(apply))

        compiled = jax.jit(step_fn).lower(member, batch, jnp.int32(0)).compile()
        temporary[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        candidates[name] = functools.partial(_five, compiled, member, batch)
    times = in_turn(candidates, rounds)
    print(
        "\nfive training steps of ResNet-20 at batch 128, density 0.05, AugCKA-SR over nine blocks"
    )
    print(f"{'':<22}{'median ms':>10}{'to plain':>10}{'to alive':>10}{'temp MiB':>10}")
    for name, seconds in times.items():
        ratios = [ratio(times, name, other) for other in ("plain", "features alive")]
        print(
            f"{name:<22}{1e3 * statistics.median(seconds):>10.1f}{ratios[0]:>10.3f}"
            f"{ratios[1]:>10.3f}{temporary[name]:>10.0f}"
        )


def _five(step_fn: Callable[..., Any], member: Any, batch: Any) -> Any:
    """Not a loop inside the program, where convolutions are slow on CPU."""
    for step in range(5):
        member, _ = step_fn(member, batch, jnp.int32(step))
    return jax.block_until_ready(member.params)


if __name__ == "__main__":
    main()
