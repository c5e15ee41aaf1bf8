"""Features: what the modules inside a network compute, by the path of the module.

`capture` (Flax Linen) and `capture_nnx` turn an unchanged model into a pure function that
returns outputs and features, for use under `jit`, `grad`, `vmap`, `pmap` and `shard_map`.
Features are differentiable like outputs.

A module is named by its path, joined by slashes: `"stage1_block2"`, `"encoder/Dense_0"`,
`"layers/0"`. A feature is named by the module that computes it; further calls of that module
in the same forward pass are `"name#2"`, `"name#3"`, ...; inputs of modules are `"name:input"`,
`"name#2:input"`.

A pattern is a shell-style wildcard over the whole path, case-sensitive (`fnmatch.fnmatchcase`):
`*` also crosses slashes, and all calls of a module match. It selects the output of `__call__`,
or, with the suffix `":input"`, its first positional argument. The model itself has the empty
path, which no pattern matches: its output is returned anyway.
"""

import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, SupportsIndex, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.core import tracers
from jaxtyping import Array, Shaped

from ntt_sparse.similarity.grams import whole_number

CaptureFn: TypeAlias = Callable[..., Any]
"""A pure function `(variables, *args, mutable=False, **kwargs) -> (output, features)`, or
`(output, features, updated)` with `mutable`."""

COLLECTION = "captured_features"
"""The Linen collection that carries features while a captured function runs."""

_INPUT = ":input"
_SITE = "_captured_site"
_RUNS = itertools.count()


def capture(
    module: nn.Module, patterns: Sequence[str] | str, *, examples: SupportsIndex | None = None
) -> CaptureFn:
    """A Linen model as a pure function that also returns features.

    The function is `apply(variables, *args, mutable=False, **kwargs)`; arguments go to
    `module.apply`, so `rngs`, `method` and the model's own, such as `train=True`, work as there.
    It returns `(output, features)`, or with `mutable` (a collection, several, or `True`)
    `(output, features, updated)`, `updated` being the state that `module.apply` would return.

    `features` is a dict from names to arrays in the order of execution: a module follows the
    modules inside it, and its input precedes them. A dict that crosses a boundary of `jit` or
    another transform comes out sorted by name instead ("Dense_10" before "Dense_9"): what
    depends on the order belongs inside.

    Modules inside `nn.remat` and `nn.jit` are captured. Those inside `nn.scan` and `nn.vmap` are
    where `variable_axes` lifts the collection `COLLECTION`, stacked along that axis, and refused
    otherwise, as are those inside other control flow and inside transforms of JAX. Call it
    under `jax.jit`: outside of that each call compiles what is under `nn.jit` anew.

    What compares layers takes axis 0 for examples. Features of a scanned block, stacked along it,
    are `(layers, n, ...)`; unstack them first, `[*features["blocks"]]`, or its layers are compared
    as if they were examples.

    Args:
        module: The model; it is not changed.
        patterns: What to capture; see the head of this file.
        examples: How many of the first examples to capture; by default all. Their gradient is
            then added in place, instead of to that of all examples; there is no forward mode.

    Returns:
        The function. While it is traced it raises ValueError where a pattern matches no call,
        where a pattern that is a path means something other than one array (wildcards pass over
        that), and where a lifted transform would drop a feature.

    Raises:
        ValueError: There is no pattern.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ntt_sparse.models.resnet import ResNet
        >>> module, images = ResNet(channels=(4, 8), norm="none"), jnp.zeros((2, 8, 8, 3))
        >>> variables = module.init(jax.random.key(0), images)
        >>> apply = capture(module, "stage?_block1")
        >>> logits, features = apply(variables, images)

        Shapes are known, and patterns are checked, before any work starts:

        >>> {k: f.shape for k, f in jax.eval_shape(apply, variables, images)[1].items()}
        {'stage1_block1': (2, 8, 8, 4), 'stage2_block1': (2, 4, 4, 8)}
    """
    wanted = _listed(patterns)

    def apply(
        variables: Any, *args: Any, mutable: bool | str | Sequence[str] = False, **kwargs: Any
    ) -> Any:
        run = _Run(wanted, examples)

        def interceptor(next_fun, args, kwargs, context):
            called = context.module
            if context.method_name != "__call__" or called.scope is None:
                return next_fun(*args, **kwargs)
            path = "/".join(called.path)

            def stored(slot):
                return called.has_variable(COLLECTION, slot)

            def store(slot, value):
                if not called.is_mutable_collection(COLLECTION):
                    raise ValueError(
                        f"{path!r} runs in a lifted transform that drops its features, such as "
                        f"nn.scan or nn.vmap: add {COLLECTION!r} to its variable_axes, or "
                        "capture a module outside"
                    )
                # Flax itself would let tracers of the transform escape.
                if called.scope.root.trace_level != tracers.current_trace():
                    raise ValueError(
                        f"{path!r} runs in a transform of JAX that its model applies: apply the "
                        "one of flax.linen, such as nn.remat, or capture a module outside"
                    )
                called.put_variable(COLLECTION, slot, value)

            return run.call(path, next_fun, args, kwargs, stored, store)

        # A hit in a cache of nn.jit would bypass the interceptor. Its key has the names of
        # mutable collections, which differ between runs by one without use, and the structure
        # of variables, which differs between modules by a mark without arrays.
        unused = f"{COLLECTION}_{next(_RUNS)}"
        if mutable is True:
            collections = nn.DenyList([unused])
        else:
            named = [mutable] if isinstance(mutable, str) else list(mutable or [])
            collections = [*named, COLLECTION, unused]
        leaves = [key for tree in variables.values() for key in traverse_util.flatten_dict(tree)]
        paths = {leaf[:depth] for leaf in leaves for depth in range(1, len(leaf))}
        marks = traverse_util.unflatten_dict({(*p, f":{p}"): {} for p in paths})
        with nn.intercept_methods(interceptor):
            output, state = module.apply(
                {**variables, COLLECTION: marks}, *args, mutable=collections, **kwargs
            )
        features = run.features(traverse_util.flatten_dict(state[COLLECTION], sep="/"))
        if mutable is False:
            return output, features
        ours = (COLLECTION, unused)
        return output, features, {name: state[name] for name in state if name not in ours}

    return apply


def capture_nnx(
    graphdef: Any, patterns: Sequence[str] | str, *, examples: SupportsIndex | None = None
) -> CaptureFn:
    """An NNX model as a pure function that also returns features.

    The function is `apply(state, *args, mutable=False, **kwargs)`, other arguments going to the
    model. It returns `(output, features)`, or with `mutable` (an NNX filter, such as
    `nnx.BatchStat`, or `True` for everything) `(output, features, updated)`, `updated` being the
    matching part of the state after the call. `features` are those of `capture`.

    The state is never changed in place: random streams and batch statistics advance in `updated`
    only. Modules inside `nnx.remat` and `nnx.jit` are captured; those inside `nnx.scan` and
    `nnx.vmap` are, stacked, where the transform maps over their state: unstack them, see `capture`.

    Args:
        graphdef: From `graphdef, state = nnx.split(model)`; the states it came with go to the
            function, as a tuple where there are several.
        patterns: What to capture; see the head of this file. A module that can be reached on
            several paths has the one that `nnx.iter_modules` gives.
        examples: As for `capture`.

    Returns:
        The function. It raises as that of `capture` does.

    Raises:
        ValueError: There is no pattern.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
        >>> graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        >>> apply = capture_nnx(graphdef, "layers/0")
        >>> loss = lambda p: jnp.sum(apply((p, rest), jnp.ones((1, 3)))[1]["layers/0"])
        >>> jax.grad(loss)(params)["layers"][0]["bias"][...]
        Array([1., 1., 1., 1.], dtype=float32)
    """
    from flax import nnx

    wanted = _listed(patterns)

    def apply(state: Any, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        # A copy, as jax.grad refuses changes of the variables that it is given.
        states = state if isinstance(state, tuple) else (state,)
        model = nnx.merge(graphdef, *states, copy=True)
        run = _Run(wanted, examples)
        for path, called in list(nnx.iter_modules(model)):
            if path and any("__call__" in vars(cls) for cls in type(called).__mro__):
                # Being static, it goes through transforms, and being new, it misses their caches.
                setattr(called, _SITE, _Site(run, "/".join(map(str, path))))
                object.__setattr__(called, "__class__", _recording(type(called)))
        output = model(*args, **kwargs)
        values = {}
        for _, called in list(nnx.iter_modules(model)):
            if site := vars(called).get(_SITE):
                for slot in [name for name in vars(called) if name.startswith(":")]:
                    values[f"{site.path}/{slot}"] = getattr(called, slot).get_value()
                    delattr(called, slot)
        features = run.features(values)
        if mutable is False:
            return output, features
        return output, features, nnx.state(model, mutable)

    return apply


def select(
    features: Mapping[str, Shaped[Array, "..."]], stages: Sequence[Sequence[str] | str]
) -> list[list[Shaped[Array, "..."]]]:
    """Groups features into stages.

    Args:
        features: Features by name, from a captured function.
        stages: A pattern, or several, for each stage. A pattern means what it means in
            `capture`; it may also single out a call, as in `"conv#2"`.

    Returns:
        The features of each stage, in the order of `features`. A feature may be in several
        stages, and is once in each.

    Raises:
        ValueError: A stage has no pattern, or a pattern matches no feature.

    Example:
        >>> import jax.numpy as jnp
        >>> features = {"conv": jnp.zeros(3), "conv#2": jnp.zeros(4), "head": jnp.zeros(2)}
        >>> [[f.size for f in stage] for stage in select(features, ["conv", ["conv#2", "head"]])]
        [[3, 4], [4, 2]]
    """
    groups = []
    for stage in stages:
        wanted = _listed(stage)
        hits = {name: [p for p in wanted if _selects(p, name)] for name in features}
        for pattern in wanted:
            if not any(pattern in matching for matching in hits.values()):
                raise ValueError(_no_match(pattern, "feature", features))
        groups.append([feature for name, feature in features.items() if hits[name]])
    return groups


def _listed(patterns: Sequence[str] | str) -> tuple[str, ...]:
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not listed:
        raise ValueError("there is no pattern, expected one or more: '*' means every module")
    return listed


def _matches(pattern: str, path: str, kind: str) -> bool:
    """Whether a pattern means this path and kind, which is `""` (output) or `":input"`."""
    glob = pattern.removesuffix(_INPUT)
    return pattern == glob + kind and fnmatchcase(path, glob)


def _selects(pattern: str, name: str) -> bool:
    """Whether a pattern means the feature of this name."""
    call = name.removesuffix(_INPUT)
    kind = name[len(call) :]
    return _matches(pattern, call, kind) or _matches(pattern, call.split("#")[0], kind)


def _no_match(pattern: str, what: str, names: Iterable[str], limit: int = 20) -> str:
    """The message for a pattern without a match."""
    names = list(names)
    close = difflib.get_close_matches(pattern, names)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"pattern {pattern!r} matches no {what}: {hint}there are {names[:limit]}{more}"


class _Run:
    """What one run of a captured function meets: names and their order, never arrays.

    Arrays are stored in the state of the modules, which is the only way out of a transform. A
    transform may trace its body more than once: the state numbers the calls of a module, and a
    name that is met again keeps its place.
    """

    def __init__(self, patterns: tuple[str, ...], examples: SupportsIndex | None):
        message = f"{examples=}, expected a number of examples, 1 or more, or None"
        self.patterns = patterns
        self.examples = None if examples is None else whole_number(examples, 1, message)
        self.matched: set[str] = set()
        self.active: set[str] = set()
        self.paths: dict[str, None] = {}
        self.slots: dict[str, str] = {}

    def call(
        self,
        path: str,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        stored: Callable[[str], bool],
        store: Callable[[str, Any], None],
    ) -> Any:
        """Runs a `__call__` and stores what is wanted of it in the slots of its module."""
        # It is active already where a method calls that of its base class.
        if not path or path in self.active:
            return fn(*args, **kwargs)
        self.paths.setdefault(path)
        self.active.add(path)
        try:
            slot, value = self.slot(path, _INPUT, args[0] if args else None, stored), None
            if slot:
                first, value = self.cut(args[0])
                args = (first, *args[1:])
            output = fn(*args, **kwargs)
        finally:
            self.active.remove(path)
        # Only now: a transform inside would take it for a variable of its own.
        if slot:
            store(slot, value)
        if slot := self.slot(path, "", output, stored):
            output, value = self.cut(output)
            store(slot, value)
        return output

    def cut(self, x: Any) -> tuple[Any, Any]:
        """An array, to go on with, and what is captured of it."""
        return (x, x) if self.examples is None else _with_first(jnp.asarray(x), self.examples)

    def slot(self, path: str, kind: str, value: Any, stored: Callable[[str], bool]) -> str | None:
        """Where to store a value, if it is wanted; takes the next place in the order."""
        hits = [pattern for pattern in self.patterns if _matches(pattern, path, kind)]
        if hits and not isinstance(value, jax.Array | np.ndarray):
            if path + kind in hits:
                raise ValueError(
                    f"the {'first positional argument' if kind else 'output'} of {path!r} is of "
                    f"type {type(value).__name__}, expected one array: capture another module"
                )
            return None
        if not hits:
            return None
        self.matched.update(hits)
        number = next(n for n in itertools.count(1) if not stored(f":{n}{kind}"))
        name = f"{path}#{number}{kind}" if number > 1 else path + kind
        self.slots.setdefault(name, f"{path}/:{number}{kind}")
        return f":{number}{kind}"

    def features(self, values: Mapping[str, Any]) -> dict[str, Array]:
        """The stored arrays by name, in the order of execution."""
        for pattern in self.patterns:
            if pattern not in self.matched:
                raise ValueError(_no_match(pattern, "module call that gives one array", self.paths))
        if astray := set(self.slots.values()) ^ set(values):
            raise ValueError(
                f"features at {sorted(astray)} cannot be followed through the transform that "
                "their modules run in: capture modules outside of it"
            )
        return {name: jnp.asarray(values[slot]) for name, slot in self.slots.items()}


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _with_first(x: Array, n: int) -> tuple[Array, Array]:
    """An array and its first rows."""
    return x, x[:n]


def _with_first_backward(n: int, _: None, gradients: tuple[Array, Array]) -> tuple[Array]:
    # In place. The automatic rule adds two arrays of the size of x.
    whole, first = gradients
    return (jax.lax.dynamic_update_slice_in_dim(whole, whole[:n] + first, 0, 0),)


_with_first.defvjp(lambda x, n: ((x, x[:n]), None), _with_first_backward)


class _Site:
    """The path of an NNX module in a run; equal to itself only."""

    def __init__(self, run: _Run, path: str):
        self.run = run
        self.path = path


@cache
def _recording(cls: Any) -> Any:
    """An NNX module class that records its calls; made once, as NNX keeps each class for good."""
    from flax import nnx

    def call(self, *args, **kwargs):
        def store(slot, value):
            setattr(self, slot, nnx.Intermediate(value))

        site, fn = getattr(self, _SITE), super(recording, self).__call__
        return site.run.call(site.path, fn, args, kwargs, vars(self).__contains__, store)

    recording = type(cls)(cls.__name__, (cls,), {"__call__": call}, pytree=cls._pytree__is_pytree)
    return recording
