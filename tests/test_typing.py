"""The public API has types: every argument and every result."""

import importlib
import inspect
import pkgutil

import pytest

import ntt_sparse

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(ntt_sparse.__path__, "ntt_sparse.")
    if not any(part.startswith("_") for part in module.name.split("."))
)


def public(module):
    """Functions and methods that a module defines under names without an underscore."""
    for name, item in vars(module).items():
        if name.startswith("_") or getattr(item, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(item):
            for attribute, method in vars(item).items():
                function = getattr(method, "__func__", method)
                if isinstance(function, property):
                    function = function.fget
                # Flax calls it, and wraps what it finds.
                if attribute.startswith("_") or attribute == "setup":
                    continue
                # What a decorator adds is not ours.
                if getattr(function, "__module__", None) == module.__name__:
                    yield f"{name}.{attribute}", function
        elif inspect.isfunction(inspect.unwrap(item)):
            yield name, inspect.unwrap(item)


def missing(function):
    signature = inspect.signature(function)
    names = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.annotation is parameter.empty and name not in ("self", "cls")
    ]
    return names + ["return"] * (signature.return_annotation is signature.empty)


@pytest.mark.parametrize("name", MODULES)
def test_arguments_and_results_have_types(name):
    module = importlib.import_module(name)
    found = {path: missing(function) for path, function in public(module)}
    assert {path: names for path, names in found.items() if names} == {}


def test_what_is_found():
    """Functions without types would be seen."""

    def half(x: int, y):
        return x, y

    assert missing(half) == ["y", "return"]
    from ntt_sparse.pruning import masks

    assert {"apply", "from_scores"} <= {path for path, _ in public(masks)}
