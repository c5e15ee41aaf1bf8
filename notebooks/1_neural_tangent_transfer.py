# %% [markdown]
# # Sparse networks that train like dense ones, found without labels
#
# *Neural Tangent Transfer* (Liu and Zenke 2020, <https://arxiv.org/abs/2006.08228>) looks for a sparse
# network whose outputs and tangent kernel are those of a dense one. No label is used. Then the
# sparse network is trained as usual.
#
# Everything here runs on a CPU in a minute or two, on the 8 x 8 digits that come with
# scikit-learn.

# %%
# Notebooks install the package here.

# %%
import functools

import jax
import jax.numpy as jnp
import optax

from ntt_sparse import models
from ntt_sparse.data import images
from ntt_sparse.objectives.ntt import ntt_loss
from ntt_sparse.pruning import masks, saliency
from ntt_sparse.pruning.transform import keep_masked
from ntt_sparse.training.terms import evaluate_supervised, example_losses

STEPS = 1000
"""Of each training."""

# %% [markdown]
# ## A dense teacher, and which weights a student keeps
#
# The teacher is LeNet-300-100 as it is initialised. Nothing trains it. The student keeps the 3 %
# of its weights that are largest, layer by layer.

# %%
data = images.load("digits", validation_fraction=0.1)
x_train, y_train = (jnp.asarray(leaf) for leaf in data.train)
module = models.create("lenet_300_100", num_outputs=data.num_classes)
apply_fn = models.apply_fn(module)
teacher = models.init(module, jax.random.key(0), data.input_shape)
magnitude = masks.from_scores(saliency.magnitude(teacher), 0.03, scope="layer")
print(masks.format_layer_densities(magnitude))

# %% [markdown]
# ## Transfer
#
# The loss is the distance of outputs and, weighted, of tangent kernels on a batch of images. Masks
# stay; values of the weights that are kept move. `keep_masked` makes any optimiser of Optax hold
# pruned weights at exactly zero.

# %%
KERNEL_WEIGHT = 1e-3
optimizer = keep_masked(optax.adam(1e-3))


@jax.jit
def transfer_step(params, state, key):
    x = jax.random.choice(key, x_train, (64,), replace=False)

    def loss_fn(params):
        return ntt_loss(apply_fn, params, magnitude, teacher, x, kernel_weight=KERNEL_WEIGHT)

    (loss, _), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = optimizer.update(gradients, state, params, masks=magnitude)
    return optax.apply_updates(params, updates), state, loss


student = masks.apply(teacher, magnitude)
state = optimizer.init(student)
for step in range(STEPS):
    student, state, loss = transfer_step(student, state, jax.random.key(step))
    if step % (STEPS // 3) == 0 or step == STEPS - 1:
        print(f"step {step:4}: distance to the teacher {loss:.3f}")

# %% [markdown]
# ## Training with labels, beside rivals
#
# The same training for all, of the same density: the student, the plain magnitude mask it began
# with, SNIP (which looks at labels), Logit-SNIP (which does not), and a random mask. Those have as
# many weights of each layer as the student; SNIP and Logit-SNIP of the whole network choose how many
# each layer keeps as well.


# %%
@functools.partial(jax.jit, static_argnames="steps")
def train(params, kept, key, steps=STEPS):
    def step(carry, key):
        params, state = carry
        chosen = jax.random.choice(key, len(x_train), (64,), replace=False)

        def loss_fn(params):
            outputs = apply_fn(masks.apply(params, kept), x_train[chosen])
            return jnp.mean(example_losses(outputs, y_train[chosen], "cross_entropy"))

        updates, state = optimizer.update(jax.grad(loss_fn)(params), state, params, masks=kept)
        return (optax.apply_updates(params, updates), state), None

    start = masks.apply(params, kept)
    (params, _), _ = jax.lax.scan(
        step, (start, optimizer.init(start)), jax.random.split(key, steps)
    )
    return evaluate_supervised(apply_fn, params, kept, tuple(data.test))["accuracy"]


def loss_of(params, batch):
    return jnp.mean(example_losses(apply_fn(params, batch[0]), batch[1], "cross_entropy"))


batch = x_train[:128], y_train[:128]
scores = {
    "SNIP": saliency.snip(loss_of, teacher, batch),
    "Logit-SNIP": saliency.logit_snip(apply_fn, teacher, batch[0]),
    "random": saliency.random(jax.random.key(7), teacher),
}
starts = {"NTT": (student, magnitude), "magnitude": (teacher, magnitude)}
for scope in ("layer", "global"):
    for name in scores if scope == "layer" else ("SNIP", "Logit-SNIP"):
        kept = masks.from_scores(scores[name], 0.03, scope=scope)
        starts[f"{name}, {scope}" if "SNIP" in name else name] = (teacher, kept)
accuracies = {}
print(f"% of the test digits after {STEPS // 5} and {STEPS} steps")
for name, (params, kept) in starts.items():
    accuracies[name] = [
        float(train(params, kept, jax.random.key(1), steps)) for steps in (STEPS // 5, STEPS)
    ]
    print(f"{name:18}", *(f"{100 * accuracy:5.1f}" for accuracy in accuracies[name]))

# %% [markdown]
# What was transferred is how the dense network learns: in the first steps the student is ahead of all
# that keep as many weights of each layer. Later, on digits this small, magnitude and random masks
# catch up, and SNIP passes it. SNIP and Logit-SNIP of the whole network, which choose the layers too,
# are ahead throughout. One seed proves nothing. `python -m experiments.ntt` repeats this with all
# baselines, several densities and seeds, as one compiled program; on MNIST, where NTT ends near SNIP,
# its numbers are in `results/README.md`.
