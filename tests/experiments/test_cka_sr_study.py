"""The CKA-SR study: members, what it minimises and measures, and its report."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    cka_sr_members,
    cka_sr_report,
    cka_sr_stages,
    cka_sr_study,
    figures,
    study,
)
from experiments.cka_sr_members import Run
from experiments.configs import cka_sr as configs
from ntt_sparse.data import images
from ntt_sparse.models.lenet import LeNet
from ntt_sparse.models.resnet import ResNet
from ntt_sparse.pruning import masks
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import program as programs
from ntt_sparse.training.export import load_model_state, load_network
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.metrics import MetricsLog
from ntt_sparse.training.state import create_member


def get_config(name="digits_lenet300,smoke", **fields):
    config = configs.get_config(name)
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


# Members


def tiny_split(dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 8, 8, 1)).astype(dtype)
    return images.Split(x, rng.integers(0, 10, 40).astype(np.int32))


def tiny_mlp(dtype=jnp.float32):
    return LeNet(hidden=(12, 9, 7), param_dtype=dtype)


def member_of(members, index):
    return jax.tree.map(lambda leaf: leaf[index], members)


def kept_by_layer(member):
    return {name: row.kept for name, row in masks.layer_densities(member.masks).items()}


def start(config, module, train):
    optimizer = cka_sr_stages.make_optimizer(config, total_steps=10)
    runs = cka_sr_members.runs_of(config)
    shape = train.x.shape[1:]
    return runs, cka_sr_members.start_members(config, module, shape, train, optimizer, runs)


# Of the 768, 108, 63 and 70 weights of layers 64-12-9-7-10, by sums of shapes and by sizes.
COUNTS = {
    # (76, 21, 16, 17) * 1009 * density / 130, rounded.
    "erk": {0.1: (59, 16, 12, 13), 0.02: (12, 3, 2, 3)},
    "uniform": {0.1: (77, 11, 6, 7), 0.02: (15, 2, 1, 1)},
}


@pytest.mark.parametrize("layer_densities", COUNTS)
def test_members_of_a_seed_and_density_differ_in_coefficients_alone(layer_densities):
    config = get_config(
        layer_densities=layer_densities, density=(0.1, 0.02), seeds=(4, 2),
        regularisers="cka_sr,cca_sr", coefficients=(0.5, 2.0),
    )  # fmt: skip
    runs, members = start(config, tiny_mlp(), tiny_split())
    names = cka_sr_members.member_names(runs)
    assert len(runs) == 20 and len(set(names)) == 20
    assert names[0] == "none-c0.0-d0.1-s4" and names[2] == "cka_sr-c0.5-d0.1-s4"
    members = members._replace(key=jax.random.key_data(members.key))
    members = jax.tree.map(np.asarray, members)
    by_run = {run: member_of(members, index) for index, run in enumerate(runs)}
    init = jax.jit(tiny_mlp().init)
    kernels = {
        seed: init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))["params"]["Dense_1"]["kernel"]
        for seed in config.seeds
    }
    for run, member in by_run.items():
        kept = [int(np.sum(leaf)) for leaf in masks.named_leaves(member.masks).values()]
        assert tuple(kept) == COUNTS[layer_densities][run.density]
        reference = by_run[Run("none", 0.0, run.density, run.seed)]
        for field in ("params", "masks", "key", "opt_state"):
            for a, b in zip(
                jax.tree.leaves(getattr(member, field)),
                jax.tree.leaves(getattr(reference, field)),
                strict=True,
            ):
                np.testing.assert_array_equal(a, b, err_msg=f"{run} {field}")
        context = {
            name: run.coefficient * (run.regulariser == name) for name in ("cka_sr", "cca_sr")
        }
        assert {name: float(value) for name, value in member.context.items()} == context
        # The weights are those of Flax from the seed, zero where they are pruned.
        kernel, mask = kernels[run.seed], member.masks["Dense_1"]["kernel"]
        np.testing.assert_allclose(
            member.params["Dense_1"]["kernel"], np.where(mask, kernel, 0), rtol=1e-6
        )
    first, second = (by_run[Run("none", 0.0, 0.1, seed)] for seed in (4, 2))
    differing = first.masks["Dense_0"]["kernel"] != second.masks["Dense_0"]["kernel"]
    assert np.mean(differing) > 0.05


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_layers_have_the_counts_of_a_scored_mask_and_random_places(method):
    """With batch statistics, and scores written by hand; reverse over reverse for H g."""
    module = ResNet(blocks_per_stage=1, channels=(4,))
    train = tiny_split()
    config = get_config(
        layer_densities=method, density=(0.3,), seeds=(1,), score_batch_size=24,
        regularisers="cka_sr", coefficients=(0.5,),
    )  # fmt: skip
    _, members = start(config, module, train)
    x, y = jnp.asarray(train.x[:24]), train.y[:24]
    variables = jax.jit(module.init)(jax.random.key(1), x[:1])

    def network_loss(kernels):
        params = jax.tree.map(
            lambda kernel, leaf: leaf if kernel is None else kernel, kernels, variables["params"],
            is_leaf=lambda leaf: leaf is None,
        )  # fmt: skip
        logits, _ = module.apply(
            {**variables, "params": params}, x, train=True, mutable="batch_stats"
        )
        logits = logits / (200.0 if method == "grasp" else 1.0)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(24), y])

    kernels = jax.tree.map(lambda leaf: leaf if leaf.ndim > 1 else None, variables["params"])
    if method == "snip":
        scores = jax.tree.map(
            lambda w, g: abs(w * g), kernels, jax.jit(jax.grad(network_loss))(kernels)
        )
    else:

        def half_norm(kernels):
            grads = jax.tree.leaves(jax.grad(network_loss)(kernels))
            return 0.5 * sum(jnp.sum(g**2) for g in grads)

        scores = jax.tree.map(jnp.multiply, kernels, jax.jit(jax.grad(half_norm))(kernels))
    scores = {name: np.asarray(leaf) for name, leaf in masks.named_leaves(scores).items()}
    everything = np.sort(np.concatenate([leaf.ravel() for leaf in scores.values()]))
    keep = round(0.3 * everything.size)
    threshold = everything[-keep]
    expected = {name: int(np.sum(leaf >= threshold)) for name, leaf in scores.items()}
    assert len(set(np.array(list(expected.values())) / [s.size for s in scores.values()])) > 1
    for index in range(2):
        member = member_of(members, index)
        assert kept_by_layer(member) == expected and sum(expected.values()) == keep
        mask = masks.named_leaves(member.masks)["stage1_block1/Conv_0/kernel"]
        assert np.any(np.asarray(mask) != (scores["stage1_block1/Conv_0/kernel"] >= threshold))


# What is minimised: four steps of the program against steps written by hand, in float64.

HAND = {
    "stages": ("Dense_0,Dense_1", "Dense_1,Dense_2"), "samples": 8, "every": 3,
    "regularisers": "cka_sr,aug_cka_sr,cka_sr_debiased", "coefficients": (0.5,),
    "density": (0.5,), "seeds": (1,), "supervised.optimizer": "sgd",
    "supervised.batch_size": 16, "supervised.learning_rate": 0.1,
    "supervised.weight_decay": 0.01, "supervised.milestones": (0.5,), "supervised.max_steps": 4,
}  # fmt: skip


def hand_cka(a, b, debiased=False):
    """By definition; debiased as in Song et al. 2012, Eq. 5. Of NumPy or JAX arrays."""
    n = len(a)
    first, second = (f.reshape(n, -1) @ f.reshape(n, -1).T for f in (a, b))
    if not debiased:
        h = np.eye(n) - 1 / n
        first, second = h @ first @ h, h @ second @ h
        return (first * second).sum() / ((first**2).sum() * (second**2).sum()) ** 0.5

    def hsic(k, m):
        k, m = k * (1 - np.eye(n)), m * (1 - np.eye(n))
        sums = k.sum() * m.sum() / ((n - 1) * (n - 2))
        return ((k * m).sum() + sums - 2 / (n - 2) * (k @ m).sum()) / (n * (n - 3))

    return hsic(first, second) / (hsic(first, first) * hsic(second, second)) ** 0.5


def hand_value(regulariser, maps):
    """Of three layers, in the stages of `HAND`: sums over ordered pairs, or the mean of pairs."""
    if regulariser == "none":
        return 0.0
    if regulariser == "aug_cka_sr":
        return sum(hand_cka(maps[i], maps[j]) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    debiased = regulariser == "cka_sr_debiased"
    return 2 * sum(hand_cka(maps[i], maps[i + 1], debiased) for i in (0, 1))


def train_by_hand(member, regulariser, coefficient, data):
    """SGD with Nesterov momentum and decay; its rate falls at half of four steps."""
    x, y = data
    params, keep = member.params, member.masks
    velocity = jax.tree.map(jnp.zeros_like, params)
    totals = [0.0]
    for step in range(4):
        key = jax.random.fold_in(jax.random.fold_in(member.key, 0), step // 2)
        batch = np.asarray(jax.random.permutation(key, 40)[16 * (step % 2) :][:16])

        def loss_fn(params, step=step, batch=batch):
            hidden, maps = x[batch].reshape(16, -1), []
            for layer in range(4):
                dense = params[f"Dense_{layer}"]
                mask = keep[f"Dense_{layer}"]["kernel"]
                maps.append(hidden @ (dense["kernel"] * mask) + dense["bias"])
                hidden = jnp.maximum(maps[-1], 0)
            similarity = 0.0
            if step in (0, 3):
                similarity = coefficient * hand_value(regulariser, [m[:8] for m in maps[:3]])
            logp = jax.nn.log_softmax(maps[-1])
            return similarity - jnp.mean(logp[jnp.arange(16), y[batch]]), similarity

        grads, similarity = jax.grad(loss_fn, has_aux=True)(params)
        totals.append(totals[-1] + similarity)
        grads = jax.tree.map(lambda g, p: g + 0.01 * p, grads, params)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        steps = jax.tree.map(lambda g, v: g + 0.9 * v, grads, velocity)
        params = jax.tree.map(
            lambda p, s, rate=0.1 if step < 2 else 0.01: p - rate * s, params, steps
        )
    return params, totals


class Trained(NamedTuple):
    """What the study's own program gives: members before and after, sums by step, its code."""

    start: object
    members: object
    sums: dict
    jaxpr: object
    code: str


def train_by_program(**fields):
    """What `train` hands to the engine, run by hand for four steps."""
    config = get_config(**(HAND | fields))
    train = tiny_split(np.float64)
    data = images.ImageData(train, train, train, 10, "made", np.zeros(1), np.ones(1))
    setup = cka_sr_study.Setup(tiny_mlp(jnp.float64), data, Plan(4, 2, 4))
    handed = {}

    def fit_stage(config, workdir, stage, names, members, step_fn, plan, train_data, *rest):
        handed.update(members=members, step_fn=step_fn, data=train_data)
        return members

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cka_sr_study, "fit_stage", fit_stage)
        cka_sr_study.train(config, setup, Path("unused"))
    mesh = meshes.make_mesh()
    program = programs.make_program(handed["step_fn"], batch_size=16, mesh=mesh)
    data = jax.device_put(jax.tree.map(jnp.asarray, handed["data"]), meshes.replicated(mesh))
    state = program.init(handed["members"], data)
    permutations = program.permutations(state, jnp.int32(0), data)
    arguments = (state, data, permutations, jnp.int32(1))
    jaxpr = jax.make_jaxpr(program.chunk)(*arguments)
    compiled = program.chunk.lower(*arguments).compile()
    sums = {}
    for stop in (1, 2, 3, 4):
        permutations = program.permutations(state, jnp.int32((stop - 1) // 2), data)
        state = compiled(state, data, permutations, jnp.int32(stop))
        sums[stop] = jax.tree.map(np.asarray, state.sums)
    members = jax.tree.map(np.asarray, state.members.params)
    return Trained(handed["members"], members, sums, jaxpr, compiled.as_text())


@pytest.fixture(scope="module")
def trained():
    with jax.enable_x64(True):
        return train_by_program()


@pytest.mark.usefixtures("x64")
def test_the_program_takes_the_steps_written_by_hand(trained):
    runs = cka_sr_members.runs_of(get_config(**HAND))
    assert [run.regulariser for run in runs] == ["none", *HAND["regularisers"].split(",")]
    data = tiny_split(np.float64)
    ends = []
    for index, run in enumerate(runs):
        member = member_of(trained.start, index)
        params, totals = train_by_hand(member, run.regulariser, run.coefficient, data)
        for name in ("Dense_0", "Dense_1", "Dense_2", "Dense_3"):
            np.testing.assert_allclose(
                trained.members[name]["bias"][index], params[name]["bias"], rtol=1e-9, atol=1e-13
            )
            np.testing.assert_allclose(
                trained.members[name]["kernel"][index],
                np.where(member.masks[name]["kernel"], params[name]["kernel"], 0),
                rtol=1e-9, atol=1e-13,
            )  # fmt: skip
        measured = [trained.sums[stop]["similarity"][index] for stop in (1, 2, 3, 4)]
        np.testing.assert_allclose(measured, totals[1:], rtol=1e-9)
        assert measured[0] == measured[1] == measured[2]
        assert (measured[3] > measured[2] > 0) == (run.regulariser != "none")
        ends.append(params["Dense_0"]["kernel"])
    # The regularisers do something, each of its own.
    for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        assert np.max(np.abs(ends[i] - ends[j])) > 1e-5


@pytest.mark.usefixtures("x64")
def test_others_leave_the_network_without_a_regulariser_alone(trained):
    other = train_by_program(every=1, coefficients=(50.0,))
    for name in ("Dense_0", "Dense_1", "Dense_2"):
        a, b = trained.members[name]["kernel"], other.members[name]["kernel"]
        np.testing.assert_allclose(a[0], b[0], rtol=1e-12, atol=1e-15)
        assert np.max(np.abs(a[1] - b[1])) > 1e-3
    np.testing.assert_array_equal(other.sums[4]["similarity"][0], 0.0)
    # With nothing to skip, nothing is conditional; see the test below.
    assert skipping(other.jaxpr.jaxpr) == 0


def equations(jaxpr):
    """All equations, also of what is inside of others."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def skipping(jaxpr):
    """How many conditionals have a branch that multiplies matrices and one that does not."""
    count = 0
    for equation in equations(jaxpr):
        if equation.primitive.name == "cond":
            works = [
                any(e.primitive.name == "dot_general" for e in equations(branch.jaxpr))
                for branch in equation.params["branches"]
            ]
            count += sorted(works) == [False, True]
    return count


def test_skipped_batches_do_no_work(trained):
    """Forward and backward are each in a conditional, also after compilation."""
    assert skipping(trained.jaxpr.jaxpr) == 2
    assert trained.code.count(" conditional(") >= 2


# What is measured


def relu_network(params, x):
    """Features before the ReLU, in float64."""
    hidden, maps = np.asarray(x, np.float64).reshape(len(x), -1), []
    for layer in range(len(params)):
        dense = params[f"Dense_{layer}"]
        maps.append(hidden @ np.asarray(dense["kernel"], float) + np.asarray(dense["bias"], float))
        hidden = np.maximum(maps[-1], 0)
    return maps


def test_evaluation_and_files_hold_running_statistics(tmp_path):
    module, train = ResNet(blocks_per_stage=1, channels=(4,)), tiny_split()
    config = get_config(stages=("Conv_0,stage1_block1",))
    variables = jax.jit(module.init)(jax.random.key(0), train.x[:1])
    rng = np.random.default_rng(3)
    stats = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.2, 2, leaf.shape), leaf.dtype),
        variables["batch_stats"],
    )
    params = variables["params"]
    member = create_member(
        params, masks.full(params), cka_sr_stages.make_optimizer(config, total_steps=2),
        jax.random.key(0), (), {"batch_stats": stats},
    )  # fmt: skip
    values = jax.jit(cka_sr_stages.evaluation(config, module))(
        member, tuple(train), (train.x[:9], train.y[:9]), train.x[:12]
    )
    logits, found = module.apply(
        {"params": params, "batch_stats": stats}, train.x, capture_intermediates=True
    )
    logits = np.asarray(logits, float)
    accuracy = np.mean(logits.argmax(1) == train.y)
    np.testing.assert_allclose(values["validation/accuracy"], accuracy, rtol=1e-6)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(40), train.y]
    np.testing.assert_allclose(values["validation/loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(values["test/loss"], losses[:9].mean(), rtol=1e-5)
    maps = [
        np.asarray(found["intermediates"][name]["__call__"][0], float)[:12]
        for name in ("Conv_0", "stage1_block1")
    ]
    for name, debiased in (("cka", False), ("cka_debiased", True)):
        expected = hand_cka(*maps, debiased)
        np.testing.assert_allclose(values[f"similarity/{name}"], expected, atol=1e-5)
    # With statistics of the batch it would be another number.
    batch_logits, _ = module.apply(
        {"params": params, "batch_stats": stats}, train.x, train=True, mutable="batch_stats"
    )
    assert np.max(np.abs(batch_logits - logits)) > 0.1

    other = member._replace(model_state={"batch_stats": variables["batch_stats"]})
    members = jax.tree.map(lambda *leaves: jnp.stack(leaves), member, other)
    study.save_networks(tmp_path / "networks", ["one", "two"], members)
    for name, expected in (("one", stats), ("two", variables["batch_stats"])):
        loaded = load_model_state(tmp_path / "networks" / f"{name}.npz")["batch_stats"]
        assert jax.tree.structure(loaded) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)


# A finished study, and its report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cka_sr") / "w"
    config = get_config(regularisers="cka_sr,aug_cka_sr_debiased", coefficients=(0.5,))
    return config, workdir, cka_sr_study.run(config, workdir)


def test_measurements_are_those_of_the_saved_networks(finished):
    config, workdir, _ = finished
    measured = np.load(workdir / "measurements.npz")
    names = cka_sr_members.member_names(cka_sr_members.runs_of(config))
    assert len(names) == 12 and measured["cka"].shape == (12, 2, 2)
    probe = images.load("digits", validation_fraction=0.1, seed=9).validation.x[:16]
    networks = [load_network(workdir / "networks" / f"{name}.npz") for name in names]
    log = MetricsLog(workdir / "supervised.jsonl", "supervised")
    assert log.column("similarity/cka")[0].tolist() == [0, 6, 12]
    last = log.records[-1]
    everything = []
    for index, (params, kept) in enumerate(networks):
        maps = relu_network(params, probe)[:2]
        for name, debiased in (("cka", False), ("cka_debiased", True)):
            expected = hand_cka(*maps, debiased)
            matrix = measured[name][index]
            np.testing.assert_allclose(matrix, [[1, expected], [expected, 1]], atol=1e-5)
            np.testing.assert_allclose(last[f"similarity/{name}"][index], expected, atol=1e-5)
        weights = np.concatenate([
            np.asarray(params[layer]["kernel"])[np.asarray(kept[layer]["kernel"])]
            for layer in params
        ])  # fmt: skip
        everything.append(weights)
        for epsilon in (1e-3, 1e-2):
            value = last[f"epsilon_sparsity/{epsilon!r}"][index]
            np.testing.assert_allclose(value, np.mean(np.abs(weights) < epsilon), rtol=1e-6)
    largest = max(np.max(np.abs(weights)) for weights in everything)
    np.testing.assert_allclose(measured["edges"], np.linspace(-largest, largest, 202), rtol=1e-6)
    for counts, weights in zip(measured["counts"], everything, strict=True):
        assert counts.sum() == len(weights)
        assert counts.tolist() == np.histogram(weights, measured["edges"])[0].tolist()


def paired_by_hand(differences):
    """Student's t with one or two degrees of freedom, in closed form."""
    d = np.asarray(differences, float)
    mean, error = d.mean(), d.std(ddof=1) / math.sqrt(len(d))
    t = abs(mean) / error
    critical = {2: 12.706204736432095, 3: 4.302652729911275}[len(d)]
    p = 1 - 2 / math.pi * math.atan(t) if len(d) == 2 else 1 - t / math.sqrt(2 + t * t)
    return {"mean": mean, "low": mean - critical * error, "high": mean + critical * error,
            "p_value": p}  # fmt: skip


def check_summary(config, workdir, summary):
    """Every comparison of the summary, recomputed from the records."""
    runs = cka_sr_members.runs_of(config)
    records = [json.loads(line) for line in (workdir / "supervised.jsonl").read_text().splitlines()]
    validation = np.array([record["validation/accuracy"] for record in records])
    test = np.array([record["test/accuracy"] for record in records])
    at_best = test[validation.argmax(0), np.arange(len(runs))]
    assert summary["supervised"] == json.loads((workdir / "summary.json").read_text())["supervised"]
    p_values = {"last": [], "best_validation": []}
    for row in summary["supervised"]:

        def of(values, name, coefficient, row=row):
            chosen = [
                i for seed in config.seeds for i, run in enumerate(runs)
                if run == Run(name, coefficient, row["density"], seed)
            ]  # fmt: skip
            return values[chosen]

        own = (row["regulariser"], row["coefficient"])
        last = of(test[-1], *own)
        assert row["test_accuracy_last"]["values"] == last.tolist()
        np.testing.assert_allclose(row["test_accuracy_last"]["mean"], last.mean())
        np.testing.assert_allclose(row["test_accuracy_last"]["std"], last.std(ddof=1), atol=1e-12)
        assert row["test_accuracy_best_validation"]["values"] == of(at_best, *own).tolist()
        similarity = of(np.array(records[-1]["similarity/cka"]), *own)
        np.testing.assert_allclose(row["similarity/cka"]["mean"], similarity.mean())
        assert ("less_baseline_last" in row) == (row["regulariser"] != "none")
        if row["regulariser"] == "none":
            continue
        for name, values in (("last", test[-1]), ("best_validation", at_best)):
            comparison = row[f"less_baseline_{name}"]
            differences = of(values, *own) - of(values, "none", 0.0)
            p_values[name].append((comparison["p_value"], comparison["p_value_holm"]))
            np.testing.assert_allclose(comparison["mean"], differences.mean(), atol=1e-12)
            if np.ptp(differences):
                for key, value in paired_by_hand(differences).items():
                    np.testing.assert_allclose(comparison[key], value, rtol=1e-6, atol=1e-9)
    for pairs in p_values.values():
        plain, corrected = np.array(pairs).T
        # Holm: the largest of (m - j) p_j over all p_j that are not larger, at most 1.
        order = np.argsort(plain, kind="stable")
        steps = np.minimum((len(plain) - np.arange(len(plain))) * plain[order], 1)
        np.testing.assert_allclose(corrected[order], np.maximum.accumulate(steps), rtol=1e-12)


def test_the_summary_follows_from_the_records(finished):
    config, workdir, summary = finished
    check_summary(config, workdir, summary)
    assert len(summary["supervised"]) == 6 and summary["published"] == {}
    assert json.loads((workdir / "summary.json").read_text()) == summary
    names = ["less_baseline_against_density", "accuracy_against_density"] + [
        f"{kind}_d{density!r}_s1"
        for kind in ("cka", "cka_debiased", "weights")
        for density in config.density
    ]
    for name in names:
        for suffix in ("png", "pdf"):
            assert (workdir / "figures" / f"{name}.{suffix}").stat().st_size > 1000
    report = (workdir / "report.md").read_text()
    assert report.count("\n| 0.1 |") == 3 and "AugCKA-SR, debiased, 0.5" in report


def test_the_report_of_made_records(tmp_path, monkeypatch):
    """Test accuracy never chooses, p-values are corrected, published numbers stand beside."""
    drawn = []
    monkeypatch.setattr(figures, "heat_maps", lambda path, maps: drawn.append((path.name, maps)))
    monkeypatch.setattr(figures, "histograms", lambda path, *rest: drawn.append((path.name, *rest)))
    config = get_config("table3", seeds=(1, 2, 3), coefficients=(8e-4, 1e-2))
    runs = cka_sr_members.runs_of(config)
    rng = np.random.default_rng(5)
    log = MetricsLog(tmp_path / "supervised.jsonl", "supervised")
    names = ("validation/accuracy", "test/accuracy", "similarity/cka", "similarity/cka_debiased",
             "epsilon_sparsity/0.001", "epsilon_sparsity/0.01")  # fmt: skip
    records = {step: {name: rng.random(len(runs)) for name in names} for step in (0, 5, 10)}
    # Of CKA-SR, 0.01 validates best and tests worst; its best validation is before its end.
    chosen = [i for i, run in enumerate(runs) if run[:2] == ("cka_sr", 1e-2)]
    for step, (validation, test) in {0: (0.1, 0.9), 5: (0.999, 0.3), 10: (0.99, 0.2)}.items():
        records[step]["validation/accuracy"][chosen] = validation
        records[step]["test/accuracy"][chosen] = test + np.array([0.01, 0.02, 0.04])
    for step, values in records.items():
        log.write(step, values)
    matrices = rng.random((len(runs), 2, 2))
    counts = np.arange(len(runs))[:, None] * np.ones(3, int)
    np.savez(
        tmp_path / "measurements.npz",
        cka=matrices, cka_debiased=-matrices, counts=counts, edges=np.arange(4.0),
    )  # fmt: skip
    summary = cka_sr_report.write(config, tmp_path)
    check_summary(config, tmp_path, summary)
    choice = {row["regulariser"]: row["coefficient"] for row in summary["chosen_by_validation"]}
    assert choice["cka_sr"] == 1e-2 and choice["none"] == 0.0
    row = summary["supervised"][[r["coefficient"] for r in summary["supervised"]].index(1e-2)]
    assert row["best_validation_step"] == [5, 5, 5]
    np.testing.assert_allclose(
        row["test_accuracy_best_validation"]["values"], [0.31, 0.32, 0.34], rtol=1e-12
    )
    # Ni et al. 2023, appendix, Table 3.
    assert summary["published"][0.05]["cca_sr"] == 0.8458
    report = (tmp_path / "report.md").read_text()
    assert "Published (single runs) at density 0.05: none 84.16, cka_sr 85.03" in report
    assert "- density 0.05: CKA-SR, 0.01\n" in report
    # Each figure shows the first seed of every regulariser and coefficient.
    assert [name for name, *_ in drawn] == [
        "cka_d0.05_s1",
        "cka_debiased_d0.05_s1",
        "weights_d0.05_s1",
    ]
    labels = ["none", "CKA-SR, 0.0008", "CKA-SR, 0.01", "CCA, 0.0008", "CCA, 0.01"]
    for (_, *_, shown), array in zip(drawn, (matrices, -matrices, None), strict=True):
        assert list(shown) == labels
        for index, values in zip((0, 3, 6, 9, 12), shown.values(), strict=True):
            expected = [index] * 3 if array is None else array[index]
            np.testing.assert_array_equal(values, expected)


def test_what_figures_show(tmp_path, monkeypatch):
    """Without rendering: the drawn numbers are the given ones."""
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: saved.append((path, self)))
    matrices = {f"m{i}": np.array([[1.0, 0.1 * i], [0.1 * i - 0.3, 1.0]]) for i in range(6)}
    figures.heat_maps(tmp_path / "maps", matrices)
    assert [path for path, _ in saved] == [f"{tmp_path / 'maps'}.{s}" for s in ("png", "pdf")]
    axes = [axis for axis in saved[0][1].axes if axis.images]
    assert [axis.get_title() for axis in axes] == list(matrices)
    for axis, matrix in zip(axes, matrices.values(), strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), matrix)
        np.testing.assert_allclose(axis.images[0].get_clim(), (-0.3, 1.0))
    # Empty places of the grid are not shown; the last one is the scale.
    assert sum(axis.get_visible() for axis in saved[0][1].axes) == 6 + 1

    saved.clear()
    figures.histograms(tmp_path / "h", np.arange(4.0), {"a": np.array([1, 5, 2])})
    (axis,) = saved[0][1].axes
    values, edges, _ = axis.patches[0].get_data()
    assert (values.tolist(), edges.tolist()) == ([1, 5, 2], [0.0, 1.0, 2.0, 3.0])

    saved.clear()
    one = {"mean": 0.02, "low": 0.01, "high": 0.05}
    alone = {"mean": -0.03, "low": None, "high": None}
    figures.paired_differences(tmp_path / "d", {"x": [(0.5, alone), (0.1, one)]})
    (axis,) = saved[0][1].axes
    ((line, _, (bars,)),) = axis.containers
    np.testing.assert_allclose(line.get_xydata(), [[0.1, 2.0], [0.5, -3.0]])
    heights = [segment[:, 1].tolist() for segment in bars.get_segments()]
    np.testing.assert_allclose(heights, [[1.0, 5.0], [-3.0, -3.0]])
    assert axis.get_xscale() == "log"
