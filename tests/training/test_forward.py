"""The forward pass that terms share: model state, batch statistics, augmented batches."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from ntt_sparse.models.resnet import ResNet
from ntt_sparse.pruning import masks, saliency
from ntt_sparse.similarity.features import capture
from ntt_sparse.training import loop, terms
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import program as programs
from ntt_sparse.training import state as states
from ntt_sparse.training import step as steps
from ntt_sparse.training.checkpoint import Checkpoints
from ntt_sparse.training.metrics import MetricsLog

PER_EPOCH = problems.NUM_EXAMPLES // problems.BATCH_SIZE
NUM_IMAGES, BATCH_SIZE, NUM_STEPS, RATE = 48, 16, 3, 0.1

# A BatchNorm ResNet against Flax and jax.grad, in float64.


def resnet():
    return ResNet(num_outputs=3, blocks_per_stage=1, channels=(4,), param_dtype=jnp.float64)


def images():
    rng = np.random.default_rng(0)
    return rng.normal(0.5, 1.5, (NUM_IMAGES, 8, 8, 2)), rng.integers(0, 3, NUM_IMAGES)


# SGD whose state is the last gradient.
KEEP_GRADIENTS = optax.GradientTransformation(
    lambda params: params,
    lambda grads, state, params=None: (jax.tree.map(lambda g: -RATE * g, grads), grads),
)


def image_members(seeds=(3, 5)):
    def member(key):
        variables = resnet().init(key, jnp.zeros((1, 8, 8, 2)))
        scores = saliency.random(key, variables["params"])
        kept = masks.from_counts(scores, masks.keep_counts(scores, 0.5, scope="layer"))
        return states.create_member(
            variables["params"], kept, KEEP_GRADIENTS, key,
            model_state={"batch_stats": variables["batch_stats"]},
        )  # fmt: skip

    return jax.jit(jax.vmap(member))(jnp.stack([jax.random.key(seed) for seed in seeds]))


def plain(tree):
    return jax.tree.map(np.asarray, tree)


def assert_close(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, **tolerance)


@pytest.fixture(scope="module")
def trained_by_hand():
    """Of each member and step: gradients, parameters and statistics after it, and the batch."""

    @jax.jit
    def hand_step(params, kept, stats, x, y):
        def loss_fn(params):
            effective = jax.tree.map(
                lambda leaf, mask: leaf if mask is None else leaf * mask, params, kept
            )
            variables = {"params": effective, "batch_stats": stats}
            logits, updated = resnet().apply(variables, x, train=True, mutable=["batch_stats"])
            logp = logits - jax.scipy.special.logsumexp(logits, axis=1, keepdims=True)
            return -jnp.mean(logp[jnp.arange(len(y)), y]), updated["batch_stats"]

        return jax.grad(loss_fn, has_aux=True)(params)

    with jax.enable_x64(True):
        x, y = images()
        members, trajectories = image_members(), []
        for index in range(2):
            member = jax.tree.map(lambda leaf, i=index: leaf[i], members)
            order = jax.random.permutation(
                jax.random.fold_in(jax.random.fold_in(member.key, 0), 0), NUM_IMAGES
            )
            params, stats, rows = member.params, member.model_state["batch_stats"], []
            for step in range(NUM_STEPS):
                batch = np.asarray(order[step * BATCH_SIZE :][:BATCH_SIZE])
                grads, stats = hand_step(params, member.masks, stats, x[batch], y[batch])
                params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
                rows.append({**plain({"grads": grads, "params": params, "stats": stats})})
            first = {"start": plain(member.params), "masks": plain(member.masks)}
            trajectories.append((rows, first, np.asarray(order)))
    return trajectories


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("shape", "mode"), [((2, 4), "vmap")], ids=str)
def test_batch_statistics_and_gradients_are_those_of_flax(trained_by_hand, shape, mode):
    """Also where the batch, whose statistics are meant, is spread over devices."""
    mesh = meshes.make_mesh(*shape)
    step_fn = steps.make_step(
        {"task": terms.task()},
        KEEP_GRADIENTS,
        forward=terms.masked_forward(capture(resnet(), "stage?_block1")),
    )
    program = programs.make_program(step_fn, batch_size=BATCH_SIZE, mesh=mesh, mode=mode)
    data = jax.device_put(jax.tree.map(jnp.asarray, images()), meshes.replicated(mesh))
    state = program.init(image_members(), data)
    permutations = program.permutations(state, jnp.int32(0), data)
    for stop in (1, NUM_STEPS):
        state = program.chunk(state, data, permutations, jnp.int32(stop))
        for index, (rows, _, _) in enumerate(trained_by_hand):
            member = jax.tree.map(lambda leaf, i=index: leaf[i], state.members)
            actual = {
                "grads": member.opt_state,
                "params": member.params,
                "stats": member.model_state["batch_stats"],
            }
            assert_close(plain(actual), rows[stop - 1], rtol=1e-9, atol=1e-12)
    leaf = jax.tree.leaves(state.members.model_state)[0]
    assert len({shard.device for shard in leaf.addressable_shards}) == shape[0] * shape[1]


def test_statistics_of_the_first_layer_by_hand(trained_by_hand):
    """Momentum 0.9, and the variance of the batch with n in its divisor."""
    x, _ = images()
    for rows, first, order in trained_by_hand:
        kernel = first["start"]["Conv_0"]["kernel"] * first["masks"]["Conv_0"]["kernel"]
        padded = np.pad(x[order[:BATCH_SIZE]], [(0, 0), (1, 1), (1, 1), (0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
        features = np.einsum("nhwcij,ijco->nhwo", windows, kernel)
        stats = rows[0]["stats"]["BatchNorm_0"]
        np.testing.assert_allclose(stats["mean"], 0.1 * features.mean((0, 1, 2)), rtol=1e-10)
        np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * features.var((0, 1, 2)), rtol=1e-10)


# Smaller networks: what a step hands to whom.


def on_devices(data):
    return jax.device_put(data, meshes.replicated(meshes.make_mesh()))


def run_chunks(program, members, stops):
    data = on_devices(problems.data())
    state = program.init(members, data)
    for stop in stops:
        epoch = jnp.int32(int(state.step) // PER_EPOCH)
        permutations = program.permutations(state, epoch, data)
        state = program.chunk(state, data, permutations, jnp.int32(stop))
    return state


SGD = optax.sgd(1.0)


def one_member(seed=7, **changes):
    member = jax.tree.map(lambda leaf: leaf[0], problems.members((seed,)))
    return member._replace(opt_state=SGD.init(member.params), **changes)


def test_terms_share_one_forward_pass_and_its_gradient():
    calls = []

    def forward(inputs):
        calls.append(inputs)
        return jnp.sum(inputs.params["in"]), inputs.model_state

    def term(inputs):
        return inputs.outputs, {}

    step_fn = steps.make_step({"a": term, "b": term, "c": term}, SGD, forward=forward)
    member = one_member()
    after, logs = step_fn(member, problems.data(), jnp.int32(0))
    assert len(calls) == 1 and calls[0].outputs is None
    total = jnp.sum(member.params["in"])
    np.testing.assert_allclose([logs[name] for name in "abc"], [total] * 3, rtol=1e-6)
    np.testing.assert_allclose(logs["loss"], 3 * total, rtol=1e-6)
    # The derivative of the sum is 1 for each of three terms.
    np.testing.assert_allclose(after.params["in"], member.params["in"] - 3.0, rtol=1e-6)
    np.testing.assert_array_equal(after.params["out"], member.params["out"])


def test_terms_see_the_step_and_the_state_before_it():
    def forward(inputs):
        return inputs.model_state["seen"], {"seen": inputs.model_state["seen"] + 1}

    def term(inputs):
        step = jnp.asarray(inputs.step, jnp.float32)
        state, outputs = inputs.model_state["seen"], inputs.outputs
        return jnp.zeros(()), {"step": step, "state": state, "outputs": outputs}

    step_fn = steps.make_step({"made": term}, problems.optimizer, forward=forward)
    start = jnp.array([0.0, 10.0, 20.0, 30.0])
    members = problems.members()._replace(model_state={"seen": start})
    state = run_chunks(problems.program(fn=step_fn), members, [2, 6, 9])
    # 0 + 1 + ... + 8, and nine times what each member started from.
    np.testing.assert_array_equal(state.sums["made/step"], [36.0] * 4)
    np.testing.assert_array_equal(state.sums["made/state"], 36.0 + 9 * start)
    np.testing.assert_array_equal(state.sums["made/outputs"], 36.0 + 9 * start)
    np.testing.assert_array_equal(state.members.model_state["seen"], 9 + start)


def test_without_a_forward_pass_the_state_stays():
    def term(inputs):
        assert inputs.outputs is None
        return jnp.sum(inputs.params["in"]), {}

    step_fn = steps.make_step({"made": term}, SGD)
    member, _ = step_fn(one_member(model_state={"kept": 7}), problems.data(), jnp.int32(0))
    assert member.model_state == {"kept": 7}


def test_each_step_draws_anew_and_nothing_shares_a_key():
    keys, batches = [], []

    def augment(key, batch):
        keys.append(key)
        x, y = batch
        return x + jax.random.normal(key, x.shape), y

    def forward(inputs):
        keys.append(inputs.key)
        batches.append(np.asarray(inputs.batch[0]))
        return jnp.zeros(()), inputs.model_state

    def term(inputs):
        keys.append(inputs.key)
        np.testing.assert_array_equal(inputs.batch[0], batches[-1])
        return jnp.sum(inputs.params["in"] ** 2), {}

    step_fn = steps.make_step({"a": term, "b": term}, SGD, forward=forward, augment=augment)
    first, other = one_member(0), one_member(1)
    data = problems.data()
    for member, step in ((first, 0), (first, 1), (other, 0)):
        step_fn(member, data, jnp.int32(step))
    # Those that training itself draws the order of the data with.
    orders = [jax.random.fold_in(jax.random.fold_in(first.key, 0), epoch) for epoch in range(2)]
    drawn = {tuple(jax.random.key_data(key).tolist()) for key in [*keys, *orders, first.key]}
    assert len(keys) == 12 and len(drawn) == 15
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not np.any(batches[a] == batches[b])
    step_fn(first, data, jnp.int32(1))
    np.testing.assert_array_equal(batches[3], batches[1])
    np.testing.assert_array_equal(data[0], problems.data()[0])


def test_augmentation_changes_batches_and_not_the_data():
    def term(inputs):
        return jnp.zeros(()), {"mean": jnp.mean(inputs.batch[0])}

    step_fn = steps.make_step(
        {"made": term}, problems.optimizer, augment=lambda key, batch: (batch[0] + 5.0, batch[1])
    )
    program = problems.program(fn=step_fn)
    state = run_chunks(program, problems.members(), [PER_EPOCH, 2 * PER_EPOCH])
    # Every example is in one batch of each epoch, and 5 is added once.
    expected = 2 * PER_EPOCH * (problems.data()[0].mean(dtype=float) + 5.0)
    np.testing.assert_allclose(state.sums["made/mean"], [expected] * 4, rtol=1e-5)


def test_the_masked_network_is_called_to_train():
    called = {}

    def apply(variables, x, **kwargs):
        called.update(kwargs, variables=variables, x=x)
        return x @ variables["params"]["in"], {"x": x}, {"stats": {"mean": jnp.ones(2)}}

    member = one_member(model_state={"stats": {"mean": jnp.zeros(2)}})
    member.params["in"] = jnp.where(member.masks["in"], member.params["in"], jnp.inf)
    x, y = problems.data()
    key = jax.random.key(9)
    inputs = steps.TermInputs(member.params, member.masks, (), (x, y), key, 0, member.model_state)
    outputs, state = terms.masked_forward(apply)(inputs)
    kept = np.where(member.masks["in"], member.params["in"], 0)
    np.testing.assert_array_equal(called["variables"]["params"]["in"], kept)
    np.testing.assert_array_equal(called["variables"]["stats"]["mean"], [0.0, 0.0])
    assert called["x"] is x and called["train"] is True and called["mutable"] == ["stats"]
    assert set(called["rngs"]) == {"dropout"} and called["rngs"]["dropout"] is key
    np.testing.assert_allclose(outputs.outputs, x @ kept, rtol=1e-5)
    assert set(outputs.features) == {"x"}
    np.testing.assert_array_equal(state["stats"]["mean"], [1.0, 1.0])


def test_the_task_is_the_mean_loss_of_shared_outputs():
    logits, labels = np.array([[2.0, 0.0], [1.0, 3.0], [0.0, 0.5]]), jnp.array([0, 1, 0])
    outputs = terms.NetworkOutputs(jnp.asarray(logits, jnp.float32), {})
    inputs = steps.TermInputs({}, {}, (), (None, labels), jax.random.key(0), outputs=outputs)
    loss, logs = terms.task()(inputs)
    margins = np.array([-2.0, -2.0, 0.5])
    np.testing.assert_allclose(loss, np.mean(np.log1p(np.exp(margins))), rtol=1e-6)
    np.testing.assert_allclose(logs["accuracy"], 2 / 3, rtol=1e-6)
    loss, _ = terms.task(loss="squared_error")(inputs)
    np.testing.assert_allclose(loss, (0.5 * 1 + 0.5 * (1 + 4) + 0.5 * (1 + 0.25)) / 3, rtol=1e-6)


def running_mean(variables, x, **kwargs):
    """A network whose outputs depend on a state that every step moves."""
    del kwargs
    params, mean = variables["params"], variables["stats"]["mean"]
    hidden = jnp.tanh(x @ params["in"] + params["bias"])
    mean = 0.9 * mean + 0.1 * hidden.mean(0)
    return (hidden - mean) @ params["out"], {}, {"stats": {"mean": mean}}


def stateful(forward):
    step_fn = steps.make_step({"task": terms.task()}, problems.optimizer, forward=forward)
    members = problems.members()._replace(model_state={"stats": {"mean": jnp.zeros((4, 16))}})
    return problems.program(fn=step_fn), members


def test_a_network_without_state_needs_none():
    def apply(variables, x, **kwargs):
        assert kwargs["mutable"] == []
        return jnp.tanh(x @ variables["params"]["in"]) @ variables["params"]["out"], {}, {}

    program, members = stateful(terms.masked_forward(apply))
    for empty in ((), {}):
        state = run_chunks(program, members._replace(model_state=empty), [2])
        assert state.members.model_state == empty


def test_model_state_is_resumed_bit_for_bit(tmp_path):
    program, members = stateful(terms.masked_forward(running_mean))

    def run(workdir, program):
        workdir.mkdir(exist_ok=True)
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            return loop.fit(
                program, members,
                on_devices(problems.data()),
                loop.Plan(total_steps=12, steps_per_epoch=PER_EPOCH, record_every=5),
                log=MetricsLog(workdir / "metrics.jsonl", "made"),
                checkpoints=checkpoints,
                member_names=["a", "b", "c", "d"],
            )  # fmt: skip

    def interrupted(state, data, permutations, stop):
        if int(stop) > 5:
            os.kill(os.getpid(), signal.SIGINT)
        return program.chunk(state, data, permutations, stop)

    unbroken = run(tmp_path / "whole", program)
    with pytest.raises(loop.Interrupted):
        run(tmp_path / "broken", program._replace(chunk=interrupted))
    resumed = run(tmp_path / "broken", program)
    for a, b in zip(
        jax.tree.leaves((unbroken.members.params, unbroken.members.model_state)),
        jax.tree.leaves((resumed.members.params, resumed.members.model_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    # It had moved at all.
    assert np.all(np.asarray(unbroken.members.model_state["stats"]["mean"]) != 0)


def test_a_state_that_is_not_finite_is_reported(tmp_path):
    """Where no loss shows it yet: statistics that only evaluation reads."""

    def forward(inputs):
        bad = jnp.asarray(inputs.step) >= inputs.model_state["from"]
        mean = jnp.where(bad, jnp.nan, 0.0)
        outputs, _ = terms.masked_forward(
            lambda variables, x, **kwargs: (x @ variables["params"]["in"][:, :3], {}, {})
        )(inputs._replace(model_state={}))
        return outputs, {"from": inputs.model_state["from"], "mean": mean}

    program, members = stateful(forward)
    # Integers of a state are left alone by the check.
    start = jnp.array([99, 4, 99, 2])
    members = members._replace(model_state={"from": start, "mean": jnp.zeros(4)})
    state = run_chunks(program, members, [1, 2, 3, 4, 5, 6])
    assert state.bad_step["model_state"].tolist() == [-1, 4, -1, 2]
    assert state.bad_step["params"].tolist() == [-1] * 4
    assert state.bad_step["task"].tolist() == [-1] * 4
    with pytest.raises(loop.DivergenceError, match="'model_state' of member 'd' is not finite"):
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            loop.fit(
                program, members, on_devices(problems.data()), loop.Plan(6, PER_EPOCH, 1),
                log=MetricsLog(tmp_path / "metrics.jsonl", "made"), checkpoints=checkpoints,
                member_names=["a", "b", "c", "d"],
            )  # fmt: skip
