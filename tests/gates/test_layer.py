"""Gates inside networks."""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ntt_sparse.gates import dam, layer
from ntt_sparse.gates import network as graph
from ntt_sparse.gates.chipnet import ChipNet
from ntt_sparse.gates.hard_concrete import HardConcrete
from ntt_sparse.gates.l1 import L1
from ntt_sparse.gates.slimming import Slimming
from ntt_sparse.pruning import masks as pruning_masks


class Folded(nn.Module):
    """A convolution whose channels are gated by their weights."""

    @nn.compact
    def __call__(self, x, folded=True):
        kernel = self.param("kernel", nn.initializers.normal(), (3, 3, x.shape[-1], 6))
        gate = layer.Gate(name="gate")
        if folded:
            kernel = kernel * gate(n=6)
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y if folded else gate(y)


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Folded(name="block")(x)
        return layer.Gate(L1(0.5))(nn.Dense(4)(x.mean((1, 2))))


@pytest.fixture(scope="module")
def network():
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 3))
    return Outer(), x, Outer().init(jax.random.key(0), x)["params"]


def test_folding_is_the_same_function(network):
    _, x, params = network
    for beta in (1.0, -2.0, -6.0):
        variables = {"params": layer.replace(params["block"], {"gate": {"beta": jnp.array(beta)}})}
        one, other = (Folded().apply(variables, x, folded=f) for f in (True, False))
        np.testing.assert_allclose(one, other, atol=1e-6)
        closed = np.asarray(dam.gate(beta, 6)) == 0
        assert np.all(np.asarray(one)[..., closed] == 0)


def test_parameters_of_gates_are_found_and_replaced(network):
    module, x, params = network
    found = layer.find(params)
    assert list(found) == ["Gate_0", "block/gate"]
    assert found["block/gate"] == {"beta": jnp.float32(1)}
    assert found["Gate_0"]["scale"].tolist() == [0.5] * 4
    closed = layer.replace(params, {"Gate_0": {"scale": jnp.array([1.0, 0, -1, 2])}})
    y = module.apply({"params": closed}, x)
    dense = module.apply({"params": layer.replace(params, {"Gate_0": {"scale": jnp.ones(4)}})}, x)
    np.testing.assert_allclose(y, dense * jnp.array([1.0, 0, 0, 2]), rtol=1e-6)
    # The others are as they were.
    assert closed["block"] is params["block"] and closed["Dense_0"] is params["Dense_0"]
    assert params["Gate_0"]["scale"].tolist() == [0.5] * 4


class Pair(NamedTuple):
    left: Any
    right: Any


def test_gates_are_found_in_lists_and_tuples():
    """In the order of JAX: numbers by their size, whether of a list or keys."""

    def gate(value):
        return {"beta": jnp.float32(value)}

    params = {
        "blocks": [{"gate": gate(0)}, {"Dense_0": {"kernel": jnp.ones(2)}, "gate_1": gate(1)}],
        "layers": {10: {"gate": gate(3)}, 2: {"gate": gate(2)}},
        "pair": Pair({"gate": gate(4)}, (gate(5), {"Gate_0": gate(6)})),
    }
    found = layer.find(params)
    assert list(found) == [
        "blocks/0/gate", "blocks/1/gate_1", "layers/2/gate", "layers/10/gate", "pair/left/gate",
        "pair/right/1/Gate_0",
    ]  # fmt: skip
    assert [float(each["beta"]) for each in found.values()] == [0, 1, 2, 3, 4, 6]
    assert layer.find((params,)).keys() == {f"0/{path}" for path in found}
    moved = layer.replace(params, {path: gate(-1) for path in found})
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    assert [float(each["beta"]) for each in layer.find(moved).values()] == [-1] * 6
    assert float(moved["pair"].right[0]["beta"]) == 5
    # Of such keys JAX has no order, nor has the type checker of the tests.
    mixed = {"b": params["pair"], 1: params["blocks"]}
    assert next(iter(inspect.unwrap(layer.find)(mixed))) == "1/0/gate"


def test_layers_named_gate_are_no_gates():
    """Of gated linear units, of one matrix or more."""
    x = jnp.ones(())
    dense = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    params = {"glu": {"gate": dense, "up": dense}, "gate": {"Dense_0": dense, "gate1": {"m": x}}}
    assert list(layer.find(params)) == ["gate/gate1"]
    # A learnable activation has a parameter of that name too.
    swish = {"Swish_0": {"beta": x}}
    assert list(layer.find({**params, **swish})) == ["gate/gate1"]


class Named(nn.Module):
    name_of_gate: str

    @nn.compact
    def __call__(self, x):
        return layer.Gate(L1(), name=self.name_of_gate)(x)


def test_gates_of_other_names_are_refused():
    """By which penalty and cold start would leave them out."""
    for name in ("gate", "gate1", "Gate_0"):
        assert list(layer.find(Named(name).init(jax.random.key(0), jnp.ones((1, 2))))) == [
            f"params/{name}"
        ]
    for name in ("hidden_gate", "gates_0", "mask"):
        with pytest.raises(ValueError, match=f"a gate is named '{name}', .*: name it gate, gate1"):
            Named(name).init(jax.random.key(0), jnp.ones((1, 2)))
    for leaf in ("beta", "zeta", "log_alpha"):
        with pytest.raises(ValueError, match=f"'a/0/hidden_gate' has the parameter .* '{leaf}'"):
            layer.find({"a": [{"hidden_gate": {leaf: jnp.ones(())}}], "b": {"gate": {}}})


DENSE = graph.Network({"input": graph.Input((3,)), "a": graph.Dense("input", 6, gate="a/gate")})


@pytest.mark.parametrize("kind", [L1(), Slimming(), dam.Dam(), ChipNet(), HardConcrete()])
def test_masks_close_what_they_say_or_are_refused(kind):
    """Parameters of zero leave gates of some kinds half open."""
    open_ = {"a/gate": np.array([1, 0, 0, 0, 0, 1], bool)}
    params = {"a": {"kernel": jnp.ones((3, 6)), "gate": kind.init(6)}}

    @jax.jit
    def masked(params):
        masks = layer.masks(kind, params, DENSE, open_)
        return layer.values(kind, {"params": pruning_masks.apply(params, masks)}, DENSE)

    if kind in (L1(), Slimming()):
        np.testing.assert_array_equal(masked(params)["a/gate"] != 0, open_["a/gate"])
        return
    message = f"masks do not close gates of {type(kind).__name__}: .* L1 or Slimming; lower the"
    with pytest.raises(ValueError, match=message) as error:
        masked(params)
    assert "\n" not in str(error.value)
    # What it says to do instead.
    state = {}
    if isinstance(kind, ChipNet):
        state = layer.state(DENSE, open={"a/gate": jnp.asarray(open_["a/gate"])})
    elif isinstance(kind, HardConcrete):
        gate = {"log_alpha": jnp.where(open_["a/gate"], 1.0, -4.0)}
        params = layer.replace(params, {"a/gate": gate})
    else:
        return
    values = layer.values(kind, {"params": params, **state}, DENSE)
    np.testing.assert_array_equal(values["a/gate"] != 0, open_["a/gate"])


def test_an_order_is_a_variable():
    """So that members of one program may have different ones."""
    x = jnp.ones((1, 4))
    gate = layer.Gate(dam.Dam(initial=-2.0))
    params = gate.init(jax.random.key(0), x)

    def run(ranks):
        return gate.apply({**params, layer.STATE: {"ranks": ranks}}, x)[0]

    ranks = jnp.array([[3, 2, 1, 0], [1, 3, 0, 2]])
    plain = gate.apply(params, x)[0]
    np.testing.assert_array_equal(jax.vmap(run)(ranks), plain[ranks])


def test_features_keep_their_dtype():
    x = jnp.ones((2, 3), jnp.bfloat16)
    gate = layer.Gate()
    assert gate.apply(gate.init(jax.random.key(0), x), x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: layer.Gate().init(jax.random.key(0)), "expected features x, or the number"),
        (lambda: layer.Gate().init(jax.random.key(0), jnp.ones((2, 3)), n=3), "expected features"),
        (lambda: layer.Gate().init(jax.random.key(0), jnp.ones((2, 1))), "on 1 channel"),
        (lambda: layer.Gate(dam.Dam(initial=-5.0)).init(jax.random.key(0), n=4), "closes all 4"),
        (lambda: layer.find({"Dense_0": {"kernel": jnp.ones(2)}}), "hold no gate"),
        (lambda: layer.find({"gated_conv": {"kernel": jnp.ones(2)}}), "hold no gate"),
        (lambda: layer.Gate().init(jax.random.key(0), jnp.ones((2, 3), int)), "are int32"),
        (lambda: layer.replace({"a": {}}, {"b": {}}), "hold no 'b'"),
        (lambda: layer.replace({"a": jnp.ones(3)}, {"a": jnp.ones(5)}), "'a' holds arrays"),
        (lambda: layer.replace({"a": jnp.ones(3)}, {"a/b": jnp.ones(5)}), "hold no 'a/b'"),
        (lambda: layer.replace({"a": {"beta": jnp.ones(())}}, {"a": {}}), "'a' holds"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
