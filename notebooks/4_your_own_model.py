# %% [markdown]
# # Your own Flax model
#
# Objectives here take a function `(params, x) -> outputs` and trees of arrays, never a class. So a
# model of yours gets masks, SNIP, NTT and CKA-SR in a few lines each, in Linen or in NNX.
#
# A minute on a CPU.

# %%
# Notebooks install the package here.

# %%
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

from ntt_sparse.objectives.cka_sr import aug_cka_sr
from ntt_sparse.objectives.ntt import ntt_loss
from ntt_sparse.pruning import masks, saliency
from ntt_sparse.pruning.transform import keep_masked
from ntt_sparse.similarity.features import capture, capture_nnx

x = jax.random.normal(jax.random.key(0), (32, 16, 16, 3))
y = jax.random.randint(jax.random.key(1), (32,), 0, 10)


def cross_entropy(outputs):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, y))


# %% [markdown]
# ## Linen


# %%
class Mine(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (8, 16, 16):
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


linen = Mine()
params = linen.init(jax.random.key(2), x)["params"]


def apply_fn(params, x):
    return linen.apply({"params": params}, x)


# %% [markdown]
# Masks and SNIP:

# %%
scores = saliency.snip(lambda params, x: cross_entropy(apply_fn(params, x)), params, x)
kept = masks.from_scores(scores, 0.1)
print(masks.format_layer_densities(kept))

# %% [markdown]
# One step of NTT, of a student that begins as the teacher under its mask:

# %%
optimizer = keep_masked(optax.adam(1e-3))


@jax.jit
def transfer(student, state):
    def loss_fn(student):
        return ntt_loss(apply_fn, student, kept, params, x[:8], kernel_weight=1e-3)

    (loss, _), gradients = jax.value_and_grad(loss_fn, has_aux=True)(student)
    updates, state = optimizer.update(gradients, state, student, masks=kept)
    return optax.apply_updates(student, updates), state, loss


student = masks.apply(params, kept)
student, state, loss = transfer(student, optimizer.init(student))
print("NTT:", float(loss))

# %% [markdown]
# CKA-SR between its convolutions:

# %%
with_features = capture(linen, ["Conv_*"])


@jax.jit
def regularised(params):
    outputs, features = with_features({"params": params}, x)
    return cross_entropy(outputs) + 0.1 * aug_cka_sr(list(features.values()))


loss, gradients = jax.value_and_grad(regularised)(masks.apply(params, kept))
print("with CKA-SR:", float(loss))

# %% [markdown]
# ## NNX
#
# The same, where the parameters are split off from the model.


# %%
class MineToo(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.last = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.last(x.reshape(len(x), -1))


model = MineToo(nnx.Rngs(3))
graph, state = nnx.split(model)
nnx_params = nnx.to_pure_dict(state)


def nnx_apply(params, x):
    replaced = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(replaced, params)
    return nnx.merge(graph, replaced)(x)


scores = saliency.snip(lambda params, x: cross_entropy(nnx_apply(params, x)), nnx_params, x)
nnx_kept = masks.from_scores(scores, 0.1)
print(masks.format_layer_densities(nnx_kept))
student = masks.apply(nnx_params, nnx_kept)
loss, _ = jax.jit(
    lambda student: ntt_loss(nnx_apply, student, nnx_kept, nnx_params, x[:8], kernel_weight=1e-3)
)(student)
print("NTT:", float(loss))

features_of = capture_nnx(graph, ["first", "second"])
outputs, features = features_of(state, x)
print("CKA-SR:", float(cross_entropy(outputs) + 0.1 * aug_cka_sr(list(features.values()))))
