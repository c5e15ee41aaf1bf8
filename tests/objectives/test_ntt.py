"""Neural Tangent Transfer against NumPy float64 references and hand-made cases."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ntt_sparse.objectives.ntt import ntt_loss, ntt_loss_from_targets, teacher_targets
from ntt_sparse.pruning import masks as pruning_masks

METHODS = ["jacobian", "ntk_vector_products", "structured"]  # "auto" is one of them
WEIGHTS = {"kernel_weight": 0.3, "l2_weight": 0.02}


def net(params, x):
    """One hidden layer, tanh."""
    hidden = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


# Compiled once for all problems of a size.
loss_of_net = jax.jit(functools.partial(ntt_loss, net), static_argnames=("wrt", "method"))
gradient_of_net = jax.jit(
    jax.grad(functools.partial(ntt_loss, net), has_aux=True), static_argnames=("wrt", "method")
)


def problem(n, seed=0, dtype=np.float64):
    """Student, masks, teacher and inputs as NumPy arrays."""
    rng = np.random.default_rng(seed)

    def params():
        return {
            name: {"bias": rng.normal(size=q).astype(dtype), "kernel": w.astype(dtype)}
            for name, w, q in (
                ("in", rng.normal(size=(4, 6)), 6),
                ("out", rng.normal(size=(6, 3)), 3),
            )
        }

    student, teacher = params(), params()
    masks = {
        name: {"bias": None, "kernel": rng.random(layer["kernel"].shape) < 0.4}
        for name, layer in student.items()
    }
    return student, masks, teacher, rng.normal(size=(n, 4)).astype(dtype)


def to_jax(trees):
    return jax.tree.map(jnp.asarray, trees)


def reference_outputs_and_kernel(params, masks, x1, x2, wrt):
    """Closed forms of `net`: Theta = (M-weighted input Gram + bias) times sensitivities."""
    w1 = np.where(masks["in"]["kernel"], params["in"]["kernel"], 0)
    w2 = np.where(masks["out"]["kernel"], params["out"]["kernel"], 0)
    m1, m2 = (
        masks[name]["kernel"] if wrt == "masked" else np.ones_like(masks[name]["kernel"])
        for name in ("in", "out")
    )
    h1, h2 = (np.tanh(x @ w1 + params["in"]["bias"]) for x in (x1, x2))
    d1, d2 = ((1 - h**2)[:, None] * w2.T for h in (h1, h2))  # (n, k, hidden)
    first = np.einsum("ijb,iob,jqb->ijoq", np.einsum("ia,ja,ab->ijb", x1, x2, m1 * 1.0) + 1, d1, d2)
    last = (np.einsum("ib,jb,bo->ijo", h1, h2, m2 * 1.0) + 1)[..., None] * np.eye(3)
    return (h @ w2 + params["out"]["bias"] for h in (h1, h2)), first + last


def reference_loss(student, masks, teacher, x, wrt="masked", kernel_weight=0.3, l2_weight=0.02):
    x1, x2 = x[: len(x) // 2], x[len(x) // 2 :]
    dense = jax.tree.map(np.ones_like, masks)
    ours, kernel = reference_outputs_and_kernel(student, masks, x1, x2, wrt)
    theirs, target = reference_outputs_and_kernel(teacher, dense, x1, x2, "all")
    kernel_term = np.mean((kernel - target) ** 2)
    output_term = np.mean((np.concatenate([*ours]) - np.concatenate([*theirs])) ** 2)
    names = ("in", "out")
    l2 = sum(np.sum(student[n]["kernel"][masks[n]["kernel"]] ** 2) for n in names)
    density = np.mean(np.concatenate([masks[n]["kernel"].ravel() for n in names]))
    loss = kernel_weight * kernel_term + output_term + l2_weight / density * l2
    return loss, (kernel_term, output_term, l2)


@pytest.mark.variants(6)
@pytest.mark.parametrize(("n", "wrt"), [(2, "masked"), (6, "all"), (7, "masked"), (7, "all")])
@pytest.mark.parametrize("method", METHODS)
def test_value_and_terms(x64, method, wrt, n):
    arrays = problem(n)
    expected, expected_terms = reference_loss(*arrays, wrt)
    loss, terms = loss_of_net(*to_jax(arrays), **WEIGHTS, wrt=wrt, method=method)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(terms, expected_terms, rtol=1e-12)
    assert terms._fields == ("kernel", "output", "l2")


@pytest.mark.variants(3)
@pytest.mark.parametrize("wrt", ["masked", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_equals_difference_quotients(x64, method, wrt):
    student, masks, teacher, x = problem(7, seed=1)
    rng = np.random.default_rng(2)
    grad, _ = gradient_of_net(
        *to_jax((student, masks, teacher, x)), kernel_weight=1e4, wrt=wrt, method=method
    )
    step = 1e-5
    for _ in range(5):
        direction = jax.tree.map(lambda p: rng.normal(size=p.shape), student)
        up, down = (
            reference_loss(
                jax.tree.map(lambda p, d, s=s: p + s * d, student, direction),
                masks, teacher, x, wrt, 1e4, 0.0,
            )[0]
            for s in (step, -step)
        )  # fmt: skip
        actual = sum(
            np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grad, direction)), strict=True)
        )
        np.testing.assert_allclose(actual, (up - down) / (2 * step), rtol=1e-6)
    for name, mask in masks.items():
        assert np.all(np.asarray(grad[name]["kernel"])[~mask["kernel"]] == 0)
        assert np.any(np.asarray(grad[name]["kernel"])[mask["kernel"]] != 0)


def test_no_gradient_reaches_the_teacher():
    student, masks, teacher, x = to_jax(problem(4, dtype=np.float32))
    grad = jax.jit(jax.grad(lambda t: loss_of_net(student, masks, t, x, **WEIGHTS)[0]))(teacher)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grad))


def test_recorded_arithmetic_of_the_published_run():
    """Terms 6439, 1.022 and 82.9 at density 0.03 weigh to 7.737, gamma^2 1e-3, beta 1e-4.

    A linear model of 100 weights, 3 kept. Both inputs are e_0 + c e_9: e_0 is kept, so
    the outputs differ by w_0 - t_0 = sqrt(1.022); e_9 is pruned, so the kernels differ
    by c^2 = sqrt(6439). The survivors are 2, sqrt(78.9) and 0.
    """
    w, teacher, x = (np.zeros(shape, np.float32) for shape in ((100, 1), (100, 1), (2, 100)))
    w[:10, 0] = [2, 78.9**0.5, 0, 7, 7, 7, 7, 7, 7, 7]
    mask = np.arange(100)[:, None] < 3
    teacher[0] = 2 - 1.022**0.5
    x[:, 0], x[:, 9] = 1, 6439**0.25
    loss_of_linear = jax.jit(functools.partial(ntt_loss, lambda w, x: x @ w))
    loss, terms = loss_of_linear(*to_jax((w, mask, teacher, x)), kernel_weight=1e-3, l2_weight=1e-4)
    np.testing.assert_allclose(terms, (6439, 1.022, 82.9), rtol=1e-5)
    np.testing.assert_allclose(loss, 7.737, atol=5e-4)


def gradient_descent(weights, apply, x, y, rate=0.02, steps=300):
    """Outputs at `x` along gradient descent on half the summed squares."""

    def step(w, _):
        grad = jax.grad(lambda w: 0.5 * jnp.sum((apply(w, x) - y) ** 2))(w)
        return w - rate * grad, apply(w, x)

    return jax.lax.scan(step, weights, length=steps)[1]


@pytest.mark.parametrize("pruned", ["always_zero", "in_use"])
def test_proposition_1(x64, pruned):
    """Equal kernels and equal first outputs make equal curves at the training inputs.

    The teacher's kernel is a sum of one positive semidefinite matrix per feature, so a
    masked linear model has the same kernel exactly if the features cut off are zero on
    all training inputs (such as the border of images). Its other weights still differ
    from the teacher's: there are more features than inputs. In the control a feature in
    use is cut and the first outputs are made equal all the same.
    """
    rng = np.random.default_rng(3)
    x, y, teacher = rng.normal(size=(6, 14)), rng.normal(size=(6, 1)), rng.normal(size=(14, 1))
    x[:, 10:] = 0
    mask = np.arange(14)[:, None] < (10 if pruned == "always_zero" else 9)
    kept_x = x * mask.T
    student = rng.normal(size=(14, 1))
    student += np.linalg.pinv(kept_x) @ (x @ teacher - kept_x @ student)
    assert np.abs(student - teacher)[:9].max() > 0.1

    def linear(w, x):
        return x @ w

    x, y, teacher, student, mask = to_jax((x, y, teacher, student, mask))

    @jax.jit
    def terms_and_curves(student, mask, teacher, x, y):
        def masked(w, x):
            return linear(pruning_masks.apply(w, mask), x)

        _, terms = ntt_loss(linear, student, mask, teacher, x, kernel_weight=1.0)
        curves = gradient_descent(teacher, linear, x, y), gradient_descent(student, masked, x, y)
        return terms, *curves

    terms, dense, sparse = terms_and_curves(student, mask, teacher, x, y)
    dense, sparse, x, y = map(np.asarray, (dense, sparse, x, y))
    # Discrete descent in closed form: f_t = y + (I - rate X X^T)^t (f_0 - y).
    power = np.linalg.matrix_power(np.eye(6) - 0.02 * (x @ x.T), 299)
    np.testing.assert_allclose(dense[-1], y + power @ (dense[0] - y), rtol=1e-10)
    np.testing.assert_allclose(sparse[0], dense[0], atol=1e-12)
    assert float(terms.output) < 1e-24
    assert np.abs(dense[-1] - dense[0]).max() > 0.5
    gap = np.abs(dense - sparse).max()
    if pruned == "always_zero":
        assert float(terms.kernel) < 1e-24
        assert gap < 1e-11
    else:
        assert float(terms.kernel) > 1e-2
        assert gap > 1e-2


@pytest.mark.variants(2)
@pytest.mark.parametrize("method", METHODS)
def test_members_and_traced_weights(x64, method):
    members = [problem(6, seed=seed) for seed in range(3)]
    kernel_weights, l2_weights = np.array([0.1, 1.0, 0.0]), np.array([0.0, 0.5, 1e-3])
    expected = [
        reference_loss(*member, "masked", kernel_weight, l2_weight)[0]
        for member, kernel_weight, l2_weight in zip(
            members, kernel_weights, l2_weights, strict=True
        )
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    @jax.jit
    @jax.vmap
    def losses(student, masks, teacher, x, kernel_weight, l2_weight):
        def loss(p):
            return ntt_loss(
                net, p, masks, teacher, x,
                kernel_weight=kernel_weight, l2_weight=l2_weight, method=method,
            )[0]  # fmt: skip

        return jax.value_and_grad(loss)(student)

    values, grads = losses(*stacked, jnp.asarray(kernel_weights), jnp.asarray(l2_weights))
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    for i, member in enumerate(members):
        single, _ = gradient_of_net(
            *to_jax(member),
            kernel_weight=kernel_weights[i],
            l2_weight=l2_weights[i],
            method="jacobian",
        )
        for batched, alone in zip(*map(jax.tree.leaves, (grads, single)), strict=True):
            np.testing.assert_allclose(batched[i], alone, rtol=1e-10, atol=1e-12)


def test_new_masks_do_not_recompile():
    student, masks, teacher, x = to_jax(problem(4, dtype=np.float32))
    traces = []

    @jax.jit
    def loss(masks, kernel_weight):
        traces.append(None)
        return ntt_loss(net, student, masks, teacher, x, kernel_weight=kernel_weight)[0]

    first, second = loss(masks, 1.0), loss(jax.tree.map(jnp.logical_not, masks), 2.0)
    assert first != second
    assert len(traces) == 1


@pytest.mark.variants(2)
@pytest.mark.parametrize(
    ("wrap", "dtype", "local"),
    [
        ("shard_map", np.float64, 1),
        ("shard_map", np.float32, 2),
        ("shard_map", np.float64, 3),
        ("shard_map_unchecked", np.float64, 1),
        ("pmap", np.float64, 3),
        pytest.param("shard_map_unchecked", np.float64, 3, marks=pytest.mark.slow),
        pytest.param("pmap", np.float64, 1, marks=pytest.mark.slow),
    ],
)
def test_devices_equal_one_device(wrap, dtype, local):
    """Value and gradient of a split batch.

    With one example each, the four rows of pairs leave four devices idle; with three,
    twelve rows in shares of two leave two idle.
    """
    with jax.enable_x64(dtype == np.float64):
        student, masks, teacher, x = to_jax(problem(8 * local, dtype=dtype))

        def loss(p, m, t, x, axis_name=None):
            return ntt_loss(net, p, m, t, x, **WEIGHTS, axis_name=axis_name)

        one_device = jax.jit(jax.value_and_grad(loss, has_aux=True))
        expected, expected_grad = one_device(student, masks, teacher, x)

        def local_step(p, m, t, x):
            value, grad = jax.value_and_grad(loss, has_aux=True)(p, m, t, x, "data")
            return value, grad if wrap == "shard_map" else jax.lax.pmean(grad, "data")

        if wrap == "pmap":
            step = jax.pmap(local_step, "data", in_axes=(None, None, None, 0))
            value, grad = jax.tree.map(
                lambda leaf: leaf[0], step(student, masks, teacher, x.reshape(8, local, -1))
            )
        else:
            mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
            step = jax.shard_map(
                local_step,
                mesh=mesh,
                in_specs=(P(), P(), P(), P("data")),
                out_specs=P(),
                check_vma=wrap == "shard_map",
            )
            value, grad = jax.jit(step)(student, masks, teacher, x)
        tolerance = 1e-5 if dtype == np.float32 else 1e-11
        for actual, single in zip(*map(jax.tree.leaves, (value, expected)), strict=True):
            np.testing.assert_allclose(actual, single, rtol=tolerance)
        for actual, single in zip(*map(jax.tree.leaves, (grad, expected_grad)), strict=True):
            scale = np.abs(single).max()
            np.testing.assert_allclose(actual, single, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_counts_more_weights_than_it_has_numbers(dtype):
    """As the same network in float32, within the rounding of its outputs and kernels."""
    params = {"w": jnp.full((300, 300), 0.9, dtype)}
    teacher, masks = {"w": jnp.full((300, 300), 0.89, dtype)}, {"w": jnp.ones((300, 300), bool)}
    x = jnp.ones((2, 300), dtype) * 1e-2
    weights = {"kernel_weight": 1e-3, "l2_weight": 1e-4}

    @jax.jit
    def value_and_grad(params, teacher, x):
        def loss(params):
            return ntt_loss(lambda q, x: x @ q["w"], params, masks, teacher, x, **weights)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, terms), grads = value_and_grad(params, teacher, x)
    exact = [
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), each) for each in (params, teacher)
    ]
    (_, expected), exact_grads = value_and_grad(*exact, x.astype(jnp.float32))
    assert loss.dtype == terms.l2.dtype == jnp.float32
    assert grads["w"].dtype == dtype and np.all(np.isfinite(grads["w"].astype(jnp.float32)))
    # Above 65504, where float16 ends.
    np.testing.assert_allclose(terms.l2, expected.l2, rtol=1e-6)
    assert terms.l2 > 7e4
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(terms.kernel, expected.kernel, rtol=8 * rounding, atol=1e-6)
    np.testing.assert_allclose(
        grads["w"].astype(jnp.float32), exact_grads["w"], rtol=16 * rounding, atol=1e-6
    )
    plain, _ = ntt_loss(lambda q, x: x @ q["w"], params, masks, params, x, kernel_weight=1e-3)
    assert plain == 0


def test_targets_can_be_kept():
    student, masks, teacher, x = to_jax(problem(6, dtype=np.float32))
    targets = jax.jit(functools.partial(teacher_targets, net))(teacher, x)
    assert targets.outputs.shape == (6, 3)
    assert targets.kernel.shape == (3, 3, 3, 3)
    from_targets = jax.jit(functools.partial(ntt_loss_from_targets, net))
    kept = from_targets(student, masks, targets, x, **WEIGHTS)
    whole = loss_of_net(student, masks, teacher, x, **WEIGHTS)
    np.testing.assert_allclose(jax.tree.leaves(kept), jax.tree.leaves(whole), rtol=1e-6)


# In float64 `test_value_and_terms` asks for more.
@pytest.mark.variants(3)
@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_precision(method, dtype):
    arrays = problem(8, dtype=np.float32)
    exact = jax.tree.map(lambda a: a if a.dtype == bool else a.astype(np.float64), arrays)
    expected, expected_terms = reference_loss(*exact)
    with jax.enable_x64(dtype == np.float64):
        arrays = to_jax(arrays if dtype == np.float32 else exact)
        loss, terms = loss_of_net(*arrays, **WEIGHTS, method=method)
    assert loss.dtype == dtype
    tolerance = 1e-4 if dtype == np.float32 else 1e-9
    np.testing.assert_allclose(loss, expected, rtol=tolerance)
    np.testing.assert_allclose(terms, expected_terms, rtol=tolerance)


def relu_net(params, x):
    hidden = jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


value_and_gradient_of_relu_net = jax.jit(
    jax.value_and_grad(functools.partial(ntt_loss, relu_net), has_aux=True),
    static_argnames="method",
)


@pytest.mark.variants(6)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["empty_masks", "dead_layer", "constant_inputs", "same_network"])
def test_degenerate_cases_stay_finite(case, method):
    student, masks, teacher, x = to_jax(problem(4, dtype=np.float32))
    if case == "empty_masks":
        masks = jax.tree.map(jnp.zeros_like, masks)
    elif case == "dead_layer":
        student["in"]["bias"] -= 1e3
    elif case == "constant_inputs":
        x = jnp.ones_like(x)
    else:
        student, masks = teacher, jax.tree.map(jnp.ones_like, masks)
    (loss, terms), grad = value_and_gradient_of_relu_net(
        student, masks, teacher, x, **WEIGHTS, method=method
    )
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grad))
    if case == "empty_masks":
        assert terms.l2 == 0
    if case == "same_network":
        np.testing.assert_allclose(terms[:2], 0, atol=1e-8)


def test_memory_of_lenet_300_100():
    """A batch of 64 needs far less than the 1.4 GB that its two Jacobians would take."""
    sizes = (784, 300, 100, 10)
    params = [
        {"kernel": jnp.zeros((p, q)), "bias": jnp.zeros(q)} for p, q in itertools.pairwise(sizes)
    ]
    masks = [{"kernel": jnp.ones(layer["kernel"].shape, bool), "bias": None} for layer in params]

    def lenet(params, x):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ params[-1]["kernel"] + params[-1]["bias"]

    step = jax.jit(jax.grad(lambda p, t, x: ntt_loss(lenet, p, masks, t, x, kernel_weight=1e-3)[0]))
    compiled = step.lower(params, params, jnp.zeros((64, 784))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 2**20
