"""Tangent kernels computed as others do, for `benchmarks/ntk.py`.

All take a network `f(params, x) -> (n, k)`, params, masks and two batches, and return the
full kernel of the masked network with the mask inside the Jacobian.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ntt_sparse.ntk import neural_tangents
from ntt_sparse.ntk.kernel import empirical_ntk
from ntt_sparse.pruning import masks as pruning_masks


def ours(f: Any, params: Any, masks: Any, x1: Any, x2: Any) -> Any:
    """`empirical_ntk` as it comes."""
    return empirical_ntk(f, params, x1, x2, masks=masks)


def jacrev(f: Any, params: Any, masks: Any, x1: Any, x2: Any) -> Any:
    """One reverse Jacobian for each example, contracted leaf by leaf."""
    if masks is not None:
        params = pruning_masks.apply(params, masks)

    def jacobians(x):
        return jax.vmap(jax.jacrev(lambda p, e: f(p, e[None])[0]), (None, 0))(params, x)

    one, two = jacobians(x1), jacobians(x2)
    if masks is not None:
        one = pruning_masks.apply(one, _broadcast(masks, one))
    kernels = jax.tree.map(
        lambda a, b: jnp.einsum(
            "iop,jqp->ijoq",
            a.reshape(*a.shape[:2], -1),
            b.reshape(*b.shape[:2], -1),
            precision="highest",
        ),
        one,
        two,
    )
    return functools.reduce(jnp.add, jax.tree.leaves(kernels))


def _broadcast(masks: Any, jacobians: Any) -> Any:
    return jax.tree.map(
        lambda j, m: None if m is None else jnp.broadcast_to(m, j.shape), jacobians, masks
    )


def jacobian_of_jvp_of_vjp(f: Any, params: Any, masks: Any, x1: Any, x2: Any) -> Any:
    """The published way: the Jacobian of a backward and a forward pass, pair by pair."""

    def masked(p, x):
        return f(p if masks is None else pruning_masks.apply(p, masks), x)

    def pair(a, b):
        def there_and_back(cotangent):
            _, pull = jax.vjp(lambda p: masked(p, b[None])[0], params)
            (row,) = pull(cotangent)
            return jax.jvp(lambda p: masked(p, a[None])[0], (params,), (row,))[1]

        k = jax.eval_shape(masked, params, a[None]).shape[1]
        return jax.jacobian(there_and_back)(jnp.zeros(k))

    with jax.default_matmul_precision("highest"):
        return jax.vmap(jax.vmap(pair, (None, 0)), (0, None))(x1, x2)


def neural_tangents_kernel(
    implementation: Any, f: Any, params: Any, masks: Any, x1: Any, x2: Any
) -> Any:
    """One of the implementations of the package neural-tangents, one example at a time."""
    leaves, treedef = jax.tree.flatten(params)
    leaf_masks = [None] * len(leaves) if masks is None else treedef.flatten_up_to(masks)
    if masks is not None:
        leaves = treedef.flatten_up_to(pruning_masks.apply(params, masks))

    def fn(leaves, x):
        return f(jax.tree.unflatten(treedef, leaves), x)

    return neural_tangents.contraction(
        fn, leaves, leaf_masks, x1, x2, implementation=implementation
    )


def kernels() -> dict[str, Callable[..., Any]]:
    """The peers that are installed."""
    found = {"vmap(jacrev)": jacrev, "jacobian(jvp(vjp))": jacobian_of_jvp_of_vjp}
    if importlib.util.find_spec("neural_tangents"):
        for name in ("jacobian_contraction", "ntk_vector_products", "structured_derivatives"):
            found[f"nt {name}"] = functools.partial(neural_tangents_kernel, name)
    return found


def names() -> list[str]:
    """Of all peers that are installed, that in PyTorch last."""
    torch = ["torch.func jacrev"] if importlib.util.find_spec("torch") else []
    return [*kernels(), *torch]


def torch_objective(
    params: Any, masks: Any, teacher: Any, x: Any, pads: str, kernel_weight: float
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The objective in `torch.func`, Jacobians contracted, as two calls: value, and gradient.

    The networks are stacks of convolutions, ReLU and 2x2 pooling, then dense layers: the
    names of `params` say which, a pooling follows where `pads` has "p".
    """
    import numpy as np
    import torch
    from torch.func import grad, jacrev, vmap

    def tensors(tree):
        result = {}
        for layer, leaves in tree.items():
            kernel = torch.tensor(np.asarray(leaves["kernel"]))
            order = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
            result[layer] = (kernel.permute(order).contiguous(), leaves["bias"])
        return result

    def weights(tree):
        flat = {}
        for layer, (kernel, bias) in tensors(tree).items():
            flat[f"{layer}.kernel"], flat[f"{layer}.bias"] = kernel, torch.tensor(np.asarray(bias))
        return flat

    student, target = weights(params), weights(teacher)
    keep = {f"{layer}.kernel": kernel for layer, (kernel, _) in tensors(masks).items()}
    images = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous()

    def net(p, image):
        h, count = image[None], sum("Dense" in name for name in p) // 2
        for i, after in enumerate(pads):
            h = torch.relu(
                torch.nn.functional.conv2d(h, p[f"Conv_{i}.kernel"], p[f"Conv_{i}.bias"])
            )
            if after == "p":
                c, rows, columns = h.shape[1], h.shape[2] // 2, h.shape[3] // 2
                h = h[..., : 2 * rows, : 2 * columns]
                h = h.reshape(1, c, rows, 2, columns, 2).amax(dim=(3, 5))
        h = h.permute(0, 2, 3, 1).reshape(1, -1)
        for i in range(count):
            h = torch.nn.functional.linear(h, p[f"Dense_{i}.kernel"], p[f"Dense_{i}.bias"])
            h = torch.relu(h) if i < count - 1 else h
        return h[0]

    def masked(p):
        return {name: p[name] * keep[name] if name in keep else p[name] for name in p}

    def kernel(function, p, x1, x2):
        one, two = (vmap(jacrev(function), (None, 0))(p, batch) for batch in (x1, x2))
        return sum(torch.einsum("iop,jqp->ijoq", one[n].flatten(2), two[n].flatten(2)) for n in p)

    half = len(images) // 2

    def loss(p):
        ours = kernel(lambda p, e: net(masked(p), e), p, images[:half], images[half:])
        theirs = kernel(net, target, images[:half], images[half:])
        outputs = vmap(lambda e: net(masked(p), e) - net(target, e))(images)
        return kernel_weight * ((ours - theirs) ** 2).mean() + (outputs**2).mean()

    return lambda: float(loss(student)), lambda: grad(loss)(student)
