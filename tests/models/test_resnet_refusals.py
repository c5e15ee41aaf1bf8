"""What the residual networks refuse, each in one line."""

import functools

import jax
import jax.numpy as jnp
import pytest

from ntt_sparse import models
from ntt_sparse.models import resnet

TINY = {"num_outputs": 3, "blocks_per_stage": 1, "channels": (2, 3, 5)}


def shapes(module, image=(32, 32, 3)):
    """Shapes of all variables, without computing anything."""
    x = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), x)


STATISTICS = (
    "besides its params (norm='batch' carries statistics): use norm='group' or 'none', or "
    "call module.init and carry the state through module.apply(mutable=...)"
)


def test_init_refuses_batch_norm():
    init = functools.partial(models.init, resnet.ResNet(**TINY), input_shape=(4, 4, 1))
    with pytest.raises(ValueError) as error:
        jax.eval_shape(init, jax.random.key(0))
    assert str(error.value) == f"ResNet keeps ['batch_stats'] {STATISTICS}"


@pytest.mark.parametrize("train", [False, True])
def test_apply_fn_refuses_batch_norm(train):
    module = resnet.ResNet(**TINY)
    params = shapes(module, (4, 4, 1))["params"]
    apply_fn = functools.partial(models.apply_fn(module), train=train)
    with pytest.raises(ValueError) as error:
        jax.eval_shape(apply_fn, params, jax.ShapeDtypeStruct((3, 4, 4, 1), jnp.float32))
    assert str(error.value) == f"ResNet keeps state {STATISTICS}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shortcut": "C"}, "shortcut is 'C', expected one of A, B"),
        ({"shortcut": ""}, "shortcut is '', expected one of A, B"),
        ({"norm": "layer"}, "norm is 'layer', expected one of batch, group, none"),
        ({"num_outputs": 0}, "num_outputs is 0, expected 1 or more"),
        ({"blocks_per_stage": -1}, "blocks_per_stage is -1, expected 1 or more"),
        ({"channels": ()}, r"channels are \(\), expected 1 or more for each stage"),
        ({"channels": (4, 0)}, r"channels are \(4, 0\), expected 1 or more"),
        ({"channels": (4, 2)}, r"channels are \(4, 2\), but .* use shortcut='B'"),
    ],
)
def test_fields_without_meaning(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        resnet.ResNet(**fields)


def test_channels_may_shrink_with_projections():
    params = shapes(resnet.ResNet(channels=(4, 2), shortcut="B"))["params"]
    assert params["Dense_0"]["kernel"].shape == (2, 10)


def test_fields_by_name():
    with pytest.raises(ValueError, match="norm is 'groups', expected one of batch, group, none"):
        models.create("resnet20", norm="groups")
    with pytest.raises(ValueError, match="expected one of num_outputs, norm, shortcut, dtype"):
        models.create("resnet20", padding="SAME")


@pytest.mark.parametrize("shape", [(784,), (8, 8), (0, 8, 1), (8, 8, 0)])
def test_inputs_that_are_not_images(shape):
    with pytest.raises(ValueError, match=r"input is \(1, .*, expected images \(n, height"):
        shapes(models.create("resnet20"), shape)
