# %% [markdown]
# # Layers through CKA, and training with CKA-SR
#
# Linear CKA says how similar the features of two layers are, from 0 to 1, whatever their widths.
# *CKA-SR* (Ni et al. 2023, <https://arxiv.org/abs/2307.07389>) puts the similarity of layers into the
# loss, so that layers do not repeat each other.
#
# A few minutes on a CPU.

# %%
# Notebooks install the package here.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from ntt_sparse.data import images
from ntt_sparse.models.vit import VisionTransformer
from ntt_sparse.objectives.cka_sr import aug_cka_sr
from ntt_sparse.similarity.cka import cka_matrix, linear_cka
from ntt_sparse.similarity.features import capture
from ntt_sparse.training.terms import example_losses

STEPS = 600

# %% [markdown]
# ## Features of any layer
#
# `capture` wraps a Linen module, so that it also gives the outputs of the modules whose paths match
# a pattern; here those of the six blocks of a small vision transformer. (`capture_nnx` is the same
# for NNX.)

# %%
data = images.load("digits", validation_fraction=0.1)
x_train, y_train = (jnp.asarray(leaf) for leaf in data.train)
probe = jnp.asarray(data.validation.x[:100])
module = VisionTransformer(data.num_classes, patch=2, width=48, depth=6, heads=3)
apply = capture(module, ["block_?"])
params = jax.jit(module.init)(jax.random.key(0), probe)["params"]
outputs, features = jax.jit(apply)({"params": params}, probe)
print({name: leaf.shape for name, leaf in features.items()})
print("first and last block:", float(linear_cka(features["block_0"], features["block_5"])))

# %% [markdown]
# ## Two trainings: with and without
#
# `aug_cka_sr` is the mean similarity of all pairs of layers, one product of their Gram matrices.
# Eight images of a batch are enough for it.


# %%
optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, STEPS), weight_decay=0.05)


@jax.jit
def step(params, state, key, coefficient):
    chosen = jax.random.choice(key, len(x_train), (32,), replace=False)

    def loss_fn(params):
        outputs, features = apply({"params": params}, x_train[chosen])
        task = jnp.mean(example_losses(outputs, y_train[chosen], "cross_entropy"))
        return task + coefficient * aug_cka_sr(list(features.values()), samples=8), task

    (_, task), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, task


def train(coefficient):
    trained, state = params, optimizer.init(params)
    for number in range(STEPS):
        trained, state, task = step(trained, state, jax.random.key(number), coefficient)
    outputs, features = jax.jit(apply)({"params": trained}, jnp.asarray(data.test.x))
    accuracy = float(jnp.mean(jnp.argmax(outputs, 1) == data.test.y))
    print(f"coefficient {coefficient}: task {task:.3f}, {100 * accuracy:.1f} % of the test digits")
    return cka_matrix([leaf[:100] for leaf in features.values()], debiased=True)


matrices = {coefficient: train(coefficient) for coefficient in (0.0, 0.3)}

# %% [markdown]
# By the debiased estimate (values of the plain one rise where there are fewer examples than
# dimensions) similarity is:

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
for axis, (coefficient, matrix) in zip(axes, matrices.items(), strict=True):
    image = axis.imshow(matrix, vmin=0, vmax=1)
    axis.set(title=f"coefficient {coefficient}", xlabel="block", ylabel="block")
figure.colorbar(image, ax=axes, label="debiased CKA")

# %% [markdown]
# Whether that makes sparse networks better is another question: see "Sparse training of every kind"
# in `results/README.md`, where on MNIST there is no gain, and `python -m experiments.sparse_training
# --config=experiments/configs/sparse_training.py:digits_vit_random` for transformers.
