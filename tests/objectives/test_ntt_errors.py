"""What the objective refuses, each in one line and before any work; and what it passes on."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.ntk import structured
from ntt_sparse.objectives.ntt import ntt_loss, ntt_loss_from_targets, teacher_targets


def net(params, x):
    hidden = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def problem(n=4):
    """Student, masks, teacher and inputs."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    student, teacher = (
        {
            "in": {"bias": draw(6), "kernel": draw(4, 6)},
            "out": {"bias": draw(3), "kernel": draw(6, 3)},
        }
        for _ in range(2)
    )
    masks = {name: {"bias": None, "kernel": student[name]["kernel"] > 0} for name in student}
    return student, masks, teacher, draw(n, 4)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"kernel_weight": -1e-3}, "kernel_weight is -0.001, expected a finite number"),
        ({}, {"kernel_weight": float("nan")}, "kernel_weight is nan"),
        ({}, {"kernel_weight": jnp.ones(2)}, r"kernel_weight has shape \(2,\), expected a scalar"),
        ({}, {"kernel_weight": "1"}, "kernel_weight is '1', expected a finite number"),
        ({}, {"l2_weight": None}, "l2_weight is None, expected a finite number"),
        ({}, {"l2_weight": float("inf")}, "l2_weight is inf"),
        ({}, {"wrt": "some"}, "wrt is 'some', expected one of"),
        ({}, {"method": "magic"}, "method is 'magic', expected one of"),
        ({}, {"distance": "exact"}, "distance is 'exact', expected"),
        ({}, {"max_density": 2}, r"max_density is 2, expected a fraction in \(0, 1\]"),
        ({}, {"memory_limit": 0}, "memory_limit is 0, expected a number of bytes"),
        ({"x": jnp.ones(())}, {}, "x is a scalar, expected a batch"),
        ({"x": {"x": jnp.ones((2, 4))}}, {}, "x is of type dict, expected one array of inputs"),
        ({"x": jnp.ones((1, 4))}, {}, "a batch of 1 holds no pair"),
        ({"x": jnp.ones((0, 4))}, {}, "a batch of 0 holds no pair"),
        ({"masks": {"in": None, "out": None}}, {}, "masks must have the structure of params"),
        ({"masks": {n: {"bias": None, "kernel": None} for n in ("in", "out")}}, {}, "no array"),
        ({"masks": lambda m: m[1:]}, {}, r"'in/kernel' is bool\(3, 6\), expected bool\(4, 6\)"),
        (
            {"teacher": lambda t: t[1:]},
            {},
            r"teacher's 'in/bias' has shape \(5,\), the student's \(6,\)",
        ),
        ({"teacher": {"in": jnp.ones(3)}}, {}, "teacher_params have structure"),
    ],
)
def test_errors(change, options, message):
    arrays = dict(zip(("params", "masks", "teacher", "x"), problem(), strict=True))
    for name, value in change.items():
        arrays[name] = jax.tree.map(value, arrays[name]) if callable(value) else value
    calls = []

    def seen(params, x):
        calls.append(None)
        return net(params, x)

    with pytest.raises(ValueError, match=message) as error:
        # Without the run-time type checker of the tests, which is first otherwise.
        inspect.unwrap(ntt_loss)(seen, *arrays.values(), **{"kernel_weight": 1.0, **options})
    assert "\n" not in str(error.value)
    assert not calls


def test_targets_of_another_batch_are_refused():
    student, masks, teacher, x = problem(6)
    targets = teacher_targets(net, teacher, x[:4])
    with pytest.raises(ValueError, match=r"targets are of 4 examples, x has 6"):
        inspect.unwrap(ntt_loss_from_targets)(net, student, masks, targets, x, kernel_weight=1.0)


def test_targets_of_another_kernel_are_refused():
    student, masks, teacher, x = problem(6)
    targets = teacher_targets(net, teacher, x)
    targets = targets._replace(kernel=targets.kernel[:2])
    message = r"targets.kernel has shape \(2, 3, 3, 3\), the student's \(3, 3, 3, 3\)"
    with pytest.raises(ValueError, match=message):
        ntt_loss_from_targets(net, student, masks, targets, x, kernel_weight=1.0)
    how = {"distance": "sketch", "key": jax.random.key(0)}
    targets = teacher_targets(net, teacher, x, **how)._replace(key=None)
    with pytest.raises(ValueError, match="distance='sketch' needs a key"):
        ntt_loss_from_targets(net, student, masks, targets, x, kernel_weight=1.0, distance="sketch")


def test_targets_check_their_arguments():
    student, _, _, x = problem()
    with pytest.raises(ValueError, match="x is a scalar, expected a batch"):
        inspect.unwrap(teacher_targets)(net, student, jnp.ones(()))
    with pytest.raises(ValueError, match="memory_limit is nan, expected a number of bytes"):
        inspect.unwrap(teacher_targets)(net, student, x, memory_limit=float("nan"))


def test_the_memory_limit_reaches_both_kernels(monkeypatch):
    student, masks, teacher, x = problem()
    limits = []
    plan = structured.plan

    def spy(fn, leaves, x, memory_limit, passes):
        limits.append(memory_limit)
        return plan(fn, leaves, x, memory_limit, passes)

    monkeypatch.setattr(structured, "plan", spy)
    targets = teacher_targets(net, teacher, x, memory_limit=100)
    ntt_loss_from_targets(net, student, masks, targets, x, kernel_weight=1.0, memory_limit=200)
    loss, _ = ntt_loss(net, student, masks, teacher, x, kernel_weight=1.0, memory_limit=300)
    assert limits == [100, 200, 300, 300]
    plain, _ = ntt_loss(net, student, masks, teacher, x, kernel_weight=1.0)
    np.testing.assert_allclose(loss, plain, rtol=1e-5)
