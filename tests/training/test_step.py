"""Steps and chunks against a loop written by hand, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from ntt_sparse.pruning import dynamic, masks
from ntt_sparse.pruning.transform import keep_masked
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import program as programs
from ntt_sparse.training import state as states
from ntt_sparse.training import step as steps
from ntt_sparse.training import terms

PER_EPOCH = problems.NUM_EXAMPLES // problems.BATCH_SIZE


def run_chunks(program, members, stops, mesh=None):
    """Runs to each stop in turn; the final state."""
    mesh = meshes.make_mesh() if mesh is None else mesh
    data = jax.device_put(problems.data(), meshes.replicated(mesh))
    state = program.init(members, data)
    for stop in stops:
        epoch = int(state.step) // PER_EPOCH
        permutations = program.permutations(state, jnp.int32(epoch), data)
        state = program.chunk(state, data, permutations, jnp.int32(stop))
    return state


@jax.jit
def gradient_by_hand(params, masks, x, y):
    def loss_fn(params):
        hidden = jnp.tanh(x @ (params["in"] * masks["in"]) + params["bias"])
        logits = hidden @ (params["out"] * masks["out"])
        logp = logits - jax.scipy.special.logsumexp(logits, axis=1, keepdims=True)
        return -jnp.mean(logp[jnp.arange(16), y])

    return jax.value_and_grad(loss_fn)(params)


def by_hand(seed, num_steps):
    """Adam on softmax cross-entropy of the masked network, written out; no dropout."""
    member = jax.tree.map(lambda leaf: leaf[0], problems.members((seed,)))
    x, y = problems.data()
    params, opt_state = member.params, member.opt_state
    losses = []
    for index in range(num_steps):
        key = jax.random.fold_in(jax.random.fold_in(member.key, 0), index // PER_EPOCH)
        order = jax.random.permutation(key, len(y))
        batch = order[(index % PER_EPOCH) * 16 :][:16]
        loss, grads = gradient_by_hand(params, member.masks, x[batch], y[batch])
        updates, opt_state = problems.optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    return params, losses


def no_dropout(params, x, **kwargs):
    del kwargs
    return problems.apply_fn(params, x)


def test_chunks_follow_a_loop_written_by_hand():
    fn = steps.make_step({"task": terms.supervised(no_dropout)}, problems.optimizer)
    state = run_chunks(problems.program(fn=fn), problems.members((3, 5)), [4, 6, 9])
    for index, seed in enumerate((3, 5)):
        params, losses = by_hand(seed, 9)
        for name, leaf in params.items():
            np.testing.assert_allclose(state.members.params[name][index], leaf, atol=2e-6)
        np.testing.assert_allclose(state.sums["task"][index], sum(losses), rtol=1e-5)
    assert state.since.tolist() == [9, 9]


@pytest.mark.variants(2)
@pytest.mark.parametrize("mode", ["vmap", "loop", "dispatch"])
def test_where_chunks_are_cut_changes_no_bit(mode):
    program = problems.program(mode=mode)
    one = run_chunks(program, problems.members(), [6, 12])
    many = run_chunks(program, problems.members(), [1, 2, 5, 6, 8, 11, 12])
    same = jax.tree.map(
        lambda a, b: bool(jnp.all(a == b)), one._replace(members=()), many._replace(members=())
    )
    assert all(jax.tree.leaves(same))
    for a, b in zip(
        jax.tree.leaves(one.members.params), jax.tree.leaves(many.members.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    if mode != "dispatch":
        assert program.chunk._cache_size() == 1


@pytest.fixture(scope="module")
def one_device():
    return run_chunks(problems.program(), problems.members(), [6, 9])


@pytest.mark.variants(3)
@pytest.mark.parametrize(
    ("shape", "mode"),
    [((4, 1), "vmap"), ((1, 8), "vmap"), ((2, 4), "vmap"), ((2, 4), "loop"), ((1, 8), "dispatch")],
)
def test_eight_devices_give_the_numbers_of_one(one_device, shape, mode):
    mesh = meshes.make_mesh(*shape)
    many = run_chunks(problems.program(mesh, mode), problems.members(), [6, 9], mesh)
    for a, b in zip(
        jax.tree.leaves(one_device.members.params),
        jax.tree.leaves(many.members.params),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for name, values in one_device.sums.items():
        np.testing.assert_allclose(many.sums[name], values, rtol=1e-5)
    used = {shard.device for shard in many.members.params["in"].addressable_shards}
    assert len(used) == shape[0] * shape[1]


def test_calls_for_each_step_give_the_numbers_of_one_program(one_device):
    """Also where a mesh of several devices needs one program after all."""
    state = run_chunks(problems.program(mode="dispatch"), problems.members(), [6, 9])
    for a, b in zip(jax.tree.leaves(one_device), jax.tree.leaves(state), strict=True):
        if jnp.issubdtype(a.dtype, jnp.inexact):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        elif not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)
    assert int(state.step) == 9 and set(state.since.tolist()) == {9}


def test_members_are_independent_of_their_company():
    alone = run_chunks(problems.program(), problems.members((2,)), [6])
    together = run_chunks(problems.program(), problems.members((0, 2, 7)), [6])
    np.testing.assert_allclose(
        alone.members.params["in"][0], together.members.params["in"][1], atol=1e-6
    )


def test_pruned_weights_stay_zero_and_masks_are_kept():
    members = problems.members()
    state = run_chunks(problems.program(), members, [6, 12])
    for name in ("in", "out"):
        pruned = ~np.asarray(members.masks[name])
        assert np.all(np.asarray(state.members.params[name])[pruned] == 0)
    np.testing.assert_array_equal(state.members.masks["in"], members.masks["in"])


def test_after_update_sees_steps_from_one_and_may_change_masks():
    def after_update(member, step, gradients):
        def refresh(member):
            return member._replace(masks=masks.full(member.params))

        return jax.lax.cond(step == 3, refresh, lambda member: member, member)

    loss = {"task": terms.supervised(problems.apply_fn)}
    fn = steps.make_step(loss, problems.optimizer, after_update=after_update)
    program = problems.program(fn=fn)
    densities = [
        float(masks.density(run_chunks(program, problems.members(), [stop]).members.masks))
        for stop in (2, 3)
    ]
    assert densities == [0.5, 1.0]


def test_connections_are_replaced_by_gradients_in_training():
    """RigL in a step: each layer keeps its number of weights, what comes has the largest
    gradient of the batch among what was not there, and starts from zero."""

    def apply(variables, x, **kwargs):
        params = variables["params"]
        return jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"], {}, {}

    def after_update(member, step, gradients):
        def grow(member):
            scores = masks.map_prunable(lambda _, leaf: jnp.abs(leaf), gradients)
            new = dynamic.replace(member.params, member.masks, scores, 0.3)
            return member._replace(masks=new, context=gradients)

        due = dynamic.due(step, every=4, end=9)
        return jax.lax.cond(due, grow, lambda member: member, member)

    fn = steps.make_step(
        {"task": terms.task()},
        keep_masked(problems.optimizer),
        forward=terms.masked_forward(apply, straight_through=True),
        after_update=after_update,
    )
    program = problems.program(fn=fn)
    members = problems.members()
    members = members._replace(context=jax.tree.map(jnp.zeros_like, members.params))
    before = run_chunks(program, members, [3]).members
    after = run_chunks(program, members, [4]).members
    for name in ("in", "out"):
        old, new = np.asarray(before.masks[name]), np.asarray(after.masks[name])
        counts = new.sum((1, 2))
        np.testing.assert_array_equal(counts, old.sum((1, 2)))
        size = np.abs(np.asarray(after.context[name]))
        for m in range(4):
            gone, come = old[m] & ~new[m], new[m] & ~old[m]
            assert come.sum() == gone.sum() > 0
            # What came beats what was and is not there, unless it has just gone.
            assert size[m][come].min() >= size[m][~old[m] & ~new[m]].max()
            assert np.all(np.asarray(after.params[name])[m][come] == 0)
    # Steps 4 and 8 and no other; weights that came have moved since.
    end = run_chunks(program, members, [6, 7, 10]).members
    moved = np.asarray(end.params["in"])[np.asarray(end.masks["in"])]
    assert np.mean(moved != 0) > 0.95
    at_seven = run_chunks(program, members, [7]).members.masks
    np.testing.assert_array_equal(at_seven["in"], after.masks["in"])
    assert np.any(np.asarray(end.masks["in"]) != np.asarray(after.masks["in"]))


def test_first_bad_step_of_each_member_is_remembered():
    def term(inputs):
        bad = inputs.params["steps"] >= inputs.context
        return jnp.where(bad, jnp.inf, 0.0), {}

    count_up = optax.GradientTransformation(
        lambda params: (), lambda grads, state, params: ({"steps": jnp.ones(())}, state)
    )

    def member(key, bad_from):
        return states.create_member(
            {"steps": jnp.zeros(())}, {"steps": None}, count_up, key, bad_from
        )

    keys = jnp.stack([jax.random.key(seed) for seed in range(3)])
    members = jax.vmap(member)(keys, jnp.array([99, 4, 2]))
    program = problems.program(fn=steps.make_step({"made": term}, count_up))
    assert run_chunks(program, members, [6]).bad_step["made"].tolist() == [-1, 4, 2]


@pytest.mark.parametrize("name", ["loss", "params", "model_state", "a/b"])
def test_a_term_cannot_hide_another_entry_of_the_logs(name):
    with pytest.raises(ValueError, match="cannot be named"):
        steps.make_step({name: lambda inputs: (0.0, {})}, problems.optimizer)


def test_loss_without_terms_raises():
    with pytest.raises(ValueError, match="at least one term"):
        steps.make_step({}, problems.optimizer)


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_members_with_data_of_their_own(mode):
    """Shared by index: each descends to the mean of its own set, by hand."""
    sets = np.array([[1.0, 3.0], [10.0, 20.0]], np.float32)
    optimizer = optax.sgd(0.25)
    step_fn = steps.make_step(
        {"distance": lambda inputs: (jnp.mean((inputs.params - inputs.batch) ** 2), {})}, optimizer
    )
    program = programs.make_program(
        step_fn, batch_size=1, mesh=meshes.make_mesh(), mode=mode,
        pick=lambda member, data, indices: data[member.context],
    )  # fmt: skip
    members = jax.vmap(
        lambda key, index: states.create_member(jnp.zeros(()), None, optimizer, key, index)
    )(jax.random.split(jax.random.key(0), 3), jnp.array([1, 0, 1]))
    state = program.init(members, sets)
    permutations = program.permutations(state, jnp.int32(0), sets)
    state = program.chunk(state, sets, permutations, jnp.int32(2))
    # Each step halves the distance to the mean.
    np.testing.assert_allclose(state.members.params, [0.75 * 15, 0.75 * 2, 0.75 * 15], rtol=1e-6)


def test_logs_in_half_precision_are_summed_in_single():
    """In bfloat16 a sum of ones ends at 256; booleans count, and integers stay exact."""

    def term(inputs):
        one = jnp.ones((), jnp.bfloat16)
        return 0 * jnp.sum(inputs.params["in"]), {"half": one, "true": one > 0, "whole": 2**24 + 1}

    program = problems.program(fn=steps.make_step({"made": term}, problems.optimizer))
    stops = range(PER_EPOCH, 100 * PER_EPOCH + 1, PER_EPOCH)
    sums = run_chunks(program, problems.members(), stops).sums
    for name in ("made/half", "made/true"):
        np.testing.assert_array_equal(sums[name], 100.0 * PER_EPOCH)
    sums = run_chunks(program, problems.members(), [3]).sums
    np.testing.assert_array_equal(sums["made/whole"], 3 * (2**24 + 1))


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (lambda inputs: jnp.float32(0), r"term 'made' returned \w+, expected \(contribution"),
        (
            lambda inputs: (jnp.ones(2), {}),
            r"'made' of the loss has shape \(2,\), expected a scalar",
        ),
        (lambda inputs: (0.0, {"a": jnp.ones(2)}), r"'made/a' of the loss has shape \(2,\)"),
        (terms.task(), r"there is none: give make_step one \(forward=masked_forward"),
    ],
)
def test_terms_that_give_something_else(term, message):
    program = problems.program(fn=steps.make_step({"made": term}, problems.optimizer))
    with pytest.raises(ValueError, match=message):
        program.init(problems.members(), problems.data())


def test_decay_of_nothing_is_refused():
    fn = steps.make_step({"decay": terms.weight_decay(1e-4)}, problems.optimizer)
    members = problems.members()
    members = members._replace(masks=jax.tree.map(lambda leaf: None, members.params))
    with pytest.raises(ValueError, match="no leaf has one"):
        problems.program(fn=fn).init(members, problems.data())
