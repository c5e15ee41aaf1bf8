# %% [markdown]
# # Widths that choose themselves, and networks that really get smaller
#
# A *discriminative masking* (DAM) gate (Bu et al. 2021, <https://arxiv.org/abs/2110.01684>) has one
# number for a whole layer: an offset that slides channel after channel to zero, in a fixed order,
# as far as the loss lets it. What is closed in the end is cut off.
#
# A minute or two on a CPU.

# %%
# Notebooks install the package here.

# %%
import jax
import jax.numpy as jnp
import optax

from ntt_sparse import models
from ntt_sparse.data import images
from ntt_sparse.gates import channels, dam, layer
from ntt_sparse.gates.optimizer import labels
from ntt_sparse.pruning.compact import compact
from ntt_sparse.training.terms import example_losses

STEPS = 600
COEFFICIENT = 0.3

# %% [markdown]
# ## A network with gates
#
# LeNet-5 with a DAM gate behind each hidden layer.

# %%
data = images.load("digits", validation_fraction=0.1)
x_train, y_train = (jnp.asarray(leaf) for leaf in data.train)
module = models.create("lenet5", num_outputs=data.num_classes, kind=dam.Dam())
network = module.network(data.input_shape)
params = jax.jit(module.init)(jax.random.key(0), x_train[:1])["params"]
offsets = {path: float(leaves["beta"]) for path, leaves in layer.find(params).items()}
print("offsets at the start:", offsets)

# %% [markdown]
# ## Train: the task, and a price for every open layer
#
# The penalty is the mean of the offsets. They have a learning rate of their own.

# %%
optimizer = optax.partition({"gate": optax.adam(2e-2), "network": optax.adam(2e-3)}, labels)


@jax.jit
def step(params, state, key):
    chosen = jax.random.choice(key, len(x_train), (64,), replace=False)

    def loss_fn(params):
        outputs = module.apply({"params": params}, x_train[chosen])
        task = jnp.mean(example_losses(outputs, y_train[chosen], "cross_entropy"))
        betas = {path: leaves["beta"] for path, leaves in layer.find(params).items()}
        return task + COEFFICIENT * dam.penalty(betas), task

    (_, task), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, task


state = optimizer.init(params)
for number in range(STEPS):
    params, state, task = step(params, state, jax.random.key(number))
    if number % (STEPS // 5) == 0 or number == STEPS - 1:
        gates = layer.values(module.kind, {"params": params}, network)
        open_ = {path: int(jnp.sum(gate > 0)) for path, gate in gates.items()}
        print(f"step {number:4}: task {task:.3f}, open channels {list(open_.values())}")

# %% [markdown]
# ## What is left of it
#
# Counted exactly, with what follows from a closed channel; then made small. The small network is
# another, dense, one, with the same outputs.

# %%
gates = layer.values(module.kind, {"params": params}, network)
left = channels.count(network, {path: gate > 0 for path, gate in gates.items()})
whole = channels.whole(network)
print(f"parameters: {int(left.parameters):,} of {int(whole.parameters):,}")
print(f"multiply-adds: {int(left.multiply_adds):,} of {int(whole.multiply_adds):,}")

small = compact(module, {"params": params}, data.input_shape)
x_test = jnp.asarray(data.test.x)
before = jax.jit(module.apply)({"params": params}, x_test)
after = jax.jit(small.module.apply)(small.variables, x_test)
print("largest difference of outputs:", float(jnp.max(jnp.abs(before - after))))
accuracy = float(jnp.mean(jnp.argmax(after, 1) == data.test.y))
print(f"{100 * accuracy:.1f} % of the test digits")

# %% [markdown]
# `python -m experiments.dam_pruning` does this for larger networks, beside Network Slimming, ChipNet
# and L1, with several coefficients and seeds.
