"""The kernels of the package neural-tangents, made to run on a JAX that it does not know.

neural-tangents 0.6.5, its last release, takes names from JAX that have moved or are
gone, and imports TensorFlow for a bridge that kernels do not need. `load` imports it
all the same. It acts on two places only:

* JAX, for as long as the import lasts: the missing names are put back, and stand-ins
  take the place of a missing module and of the TensorFlow bridge. All of it is taken
  out again, also if the import fails, so that JAX is left as it was.
* The module of neural-tangents that computes empirical kernels, for good: what it would
  miss when it is called is replaced there, in public JAX wherever JAX offers it.

Infinite-width kernels (`neural_tangents.stax`) are outside the scope of this module:
nothing in them is replaced, and they may miss names when they are called.

References:
    Novak et al., "Neural Tangents: Fast and Easy Infinite Neural Networks in Python",
    ICLR 2020, and "Fast Finite Width Neural Tangent Kernel", ICML 2022.
"""

import contextlib
import functools
import importlib
import importlib.util
import math
import sys
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import core as jax_core
from jax.extend import core
from jaxtyping import Array, Float, Shaped

from ntt_sparse import _program
from ntt_sparse.ntk.jacobian import FlatFn, LeafMasks, Leaves, Projections

Implementation: TypeAlias = Literal[
    "jacobian_contraction", "ntk_vector_products", "structured_derivatives"
]

_IMPLEMENTATIONS = ("jacobian_contraction", "ntk_vector_products", "structured_derivatives")
_PACKAGE = "neural_tangents"
_BRIDGE = f"{_PACKAGE}.experimental"
_lock = threading.Lock()


def load() -> ModuleType:
    """Imports neural-tangents, or finds it where it has been imported already.

    TensorFlow is not imported with it: `neural_tangents.experimental`, its bridge to
    TensorFlow, is left out until someone imports it by that name. Later calls return
    the same module; calls from several threads wait for one another.

    Returns:
        The package `neural_tangents`, whose empirical kernels can be called.

    Raises:
        ImportError: The package is not installed, or JAX has lost more than is put back.
    """
    with _lock:
        package = sys.modules.get(_PACKAGE) or _import()
        _repair(importlib.import_module(f"{_PACKAGE}._src.empirical"))
        return package


def contraction(
    fn: FlatFn,
    leaves: Leaves,
    masks: LeafMasks,
    x1: Shaped[Array, "n1 ..."],
    x2: Shaped[Array, "n2 ..."],
    *,
    trace: bool = False,
    projections: Projections | None = None,
    implementation: Implementation = "jacobian_contraction",
) -> Float[Array, "n1 n2 k k"] | Float[Array, "n1 n2 r s"] | Float[Array, "n1 n2"]:
    """The kernel as neural-tangents computes it, example by example (`vmap_axes=0`).

    Args:
        fn: The network, `fn(leaves, x) -> (n, k)`; it may not mix the examples of a batch.
        leaves: Its weights.
        masks: A boolean array or `None` per leaf: which weights count.
        x1: The first batch, `(n1, ...)`.
        x2: The second batch, `(n2, ...)`.
        trace: Whether to sum over equal outputs, where neural-tangents takes the mean.
        projections: Which combinations of outputs to give, made of the full kernel.
        implementation: One of neural-tangents' own; its default, the plainest, is ours.
            Its choice `AUTO` cannot be had, as it reads operation counts in a form that
            JAX has given up. `"structured_derivatives"` takes no program whose derivative
            has an operation with several results, such as a split. Only the default
            works under `jax.shard_map` with `check_vma=True`.

    Returns:
        The kernel, `(n1, n2, k, k)`, `(n1, n2)` with `trace`, or `(n1, n2, r, s)`.

    Raises:
        ImportError: As from `load`.
        ValueError: An implementation that cannot be had.
        NotImplementedError: A program that `"structured_derivatives"` does not take.
    """
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}, expected one of {_IMPLEMENTATIONS}"
            " (AUTO reads operation counts that JAX no longer reports in that form)"
        )
    package = load()
    # Structured derivatives have a rule for products and none for selections, for which
    # they would build a square Jacobian of each leaf.
    keep = _scaled if implementation == "structured_derivatives" else jnp.where

    def masked(counted, x):
        """The network, whose derivative by `counted` is zero where a mask is False."""
        both = zip(masks, counted, leaves, strict=True)
        return fn([leaf if mask is None else keep(mask, leaf, old) for mask, leaf, old in both], x)

    kernel_fn = package.empirical_ntk_fn(
        masked,
        trace_axes=(1,) if trace else (),
        vmap_axes=0,
        implementation=package.NtkImplementation[implementation.upper()],
    )
    with jax.default_matmul_precision("highest"), warnings.catch_warnings():
        # The general way that follows is exact.
        warnings.filterwarnings("ignore", "No Jacobian rule found for", UserWarning)
        kernel = kernel_fn(x1, None if x2 is x1 else x2, leaves)
    if projections is not None:
        return jnp.einsum("ijoq,iro,jsq->ijrs", kernel, *projections, precision="highest")
    return kernel * jax.eval_shape(fn, leaves, x1).shape[1] if trace else kernel


def _scaled(mask: Any, kept: Any, other: Any) -> Any:
    return kept * mask.astype(kept.dtype) + jnp.where(mask, jnp.zeros((), other.dtype), other)


def _import() -> ModuleType:
    if importlib.util.find_spec(_PACKAGE) is None:
        raise ImportError(f"{_PACKAGE} is not installed, try: pip install neural-tangents")
    _forget()  # what an import that failed elsewhere has left
    try:
        with _restored():
            package = importlib.import_module(_PACKAGE)
    except BaseException as error:
        _forget()
        if not isinstance(error, Exception):
            raise
        message = f"{_PACKAGE} cannot be imported on JAX {jax.__version__}: {error}"
        raise ImportError(message) from error
    delattr(package, "experimental")  # the stand-in
    return package


def _forget() -> None:
    """Drops all modules of the package, so that an import begins anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
        del sys.modules[name]


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """JAX with the names that neural-tangents imports, until the block ends."""
    # Not a namespace to build on; neural-tangents does, and looks for a name there.
    from jax.interpreters import ad

    names: list[tuple[ModuleType, str, Any]] = [
        (jax_core, name, getattr(core, name))
        for name in ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")
    ]
    # Key of a rule for an operation that no program has any more.
    names.append((ad, "zeros_like_p", core.Primitive("zeros_like")))
    util = ModuleType("jax.util")
    vars(util).update(
        safe_map=lambda f, *args: [f(*each) for each in zip(*args, strict=True)],
        safe_zip=lambda *args: list(zip(*args, strict=True)),
    )
    with contextlib.ExitStack() as undo:
        for module, name, value in names:
            if name not in vars(module):
                undo.callback(delattr, module, name)
                setattr(module, name, value)
        for module in (util, ModuleType(_BRIDGE)):
            if module.__name__ not in sys.modules:
                undo.callback(sys.modules.pop, module.__name__)
                sys.modules[module.__name__] = module
        yield


def _repair(empirical: ModuleType) -> None:
    """Gives the module of empirical kernels what it misses when it is called."""
    if isinstance(empirical.ad, SimpleNamespace):
        return

    # Names that only label operations, or guard a check that is off by default.
    labels = SimpleNamespace(transform_name_stack=lambda name: contextlib.nullcontext())
    checks = SimpleNamespace(jax_enable_checks=False)
    vars(empirical).update(
        ad=_extended(empirical.ad, source_info_util=labels, config=checks),
        # Arrays with a dimension of traced size: no value is of this type.
        core=_extended(empirical.core, DShapedArray=type("DShapedArray", (), {})),
        # Called with what JAX deprecates there, a shape without an array and an array.
        jnp=_extended(jnp, size=lambda a: math.prod(jnp.shape(a)), dtype=jnp.result_type),
        _get_primals_out_and_pullback=functools.partial(_linear_program, empirical),
        _eqn_vjp_fn=functools.partial(_transposed, empirical),
    )


def _extended(module: ModuleType, **names: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(module), **names})


def _linear_program(
    empirical: Any, fn: Any, mode: Any, _j_rules: Any, _s_rules: Any, _fwd: Any, *primals: Any
) -> tuple[Any, Any]:
    """The outputs of `fn`, and neural-tangents' walk back through its derivative.

    Replaces a function that takes the linear program from inside JAX.
    """
    leaves, treedef = jax.tree.flatten(primals)
    # Functions under `jit` are opened up, as in the original.
    with jax.disable_jit():
        outputs, tangents = jax.linearize(lambda *w: fn(*jax.tree.unflatten(treedef, w)), *leaves)
        closed = jax.make_jaxpr(tangents)(*leaves)
    program = closed.jaxpr

    # The walk takes every operation as linear in the tangents, and would go astray else.
    linear = set(program.invars)
    for equation in program.eqns:
        if not any(v in linear for v in equation.invars if not isinstance(v, core.Literal)):
            raise NotImplementedError(f"{equation.primitive} without a tangent in a derivative")
        linear.update(equation.outvars)

    def pullback(cotangents):
        unknown = [empirical.UndefinedPrimal(v.aval) for v in program.invars]
        found = empirical._backward_pass(
            program,
            consts=closed.consts,
            primals_in=unknown,
            cotangents_in=tuple(jax.tree.leaves(cotangents)),
            mode=mode,
            _j_rules=_j_rules,
            _s_rules=_s_rules,
            _fwd=_fwd,
        )
        return jax.tree.unflatten(treedef, found)

    return outputs, pullback


def _transposed(empirical: Any, equation: Any, cotangent: Any, *operands: Any) -> Any:
    """Cotangents of the unknown operands of a linear operation, `None` for the others.

    Replaces JAX's table of transposes, in which some operations are no longer.
    """
    if equation is None:  # the identity
        return (cotangent,)
    found = [None] * len(operands)
    if not isinstance(cotangent, empirical.Zero):
        unknown = empirical.UndefinedPrimal
        places = [i for i, value in enumerate(operands) if isinstance(value, unknown)]

        def apply(*values):
            given = dict(zip(places, values, strict=True))
            known = [given.get(i, value) for i, value in enumerate(operands)]
            return _program.bind(equation, known)[0]

        avals = [operands[i].aval for i in places]
        for i, value in zip(places, jax.linear_transpose(apply, *avals)(cotangent), strict=True):
            found[i] = value
    return found
