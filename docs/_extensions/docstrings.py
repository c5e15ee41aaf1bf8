"""Reads docstrings as they are written here: `names` in single backticks, mathematics in dollars.

A name in backticks becomes a link where it is a public object of this package, as seen from the
module that it stands in, and plain code otherwise. One that begins with the name of the package
has to exist: it becomes a reference in any case, and the build fails where it leads nowhere.
"""

import ast
import copy
import functools
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx

PACKAGE = "ntt_sparse"

_LITERAL = r"``.+?``"
_ROLE = r":[\w:]+:`[^`]*`"
_NAME = r"`(?P<name>[^`]+)`(?!_)"
_MATH = r"\$(?P<math>[^$]+?)\$"
_INLINE = re.compile(f"{_LITERAL}|{_ROLE}|{_NAME}|{_MATH}", re.S)
_RULE = r"=+(?:  ?=+)+"
_TABLE = re.compile(rf"^(?P<indent>[ ]*){_RULE}\n(?:.+\n)+?[ ]*{_RULE}(?=\n\n|\n?\Z)", re.M)
_DISPLAY = re.compile(r"^([ ]*)\$\$(.+?)\$\$", re.M | re.S)


def _resolve(text: str, modules: list[ModuleType], owner: Any) -> str | None:
    """The full name of the object of this package that a name means, if it means one."""
    parts = text.removesuffix("()").split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    roots = [vars(owner)] if inspect.isclass(owner) else []
    for names in (*roots, *(vars(module) for module in modules)):
        if parts[0] not in names:
            continue
        value = names[parts[0]]
        try:
            for part in parts[1:]:
                value = getattr(value, part)
        except AttributeError:
            continue
        if inspect.ismodule(value):
            found = value.__name__
        elif inspect.isclass(value) or inspect.isroutine(value):
            found = f"{value.__module__}.{value.__qualname__}"
        else:
            continue
        if found.split(".")[0] == PACKAGE and not re.search(r"\._|<locals>", found):
            return found
    return None


def _absolute(text: str) -> str:
    """The full name of what is written in full, where it is defined if it is imported."""
    name = text.removesuffix("()")
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            if not hasattr(value, part):
                return name
            value = getattr(value, part)
        if inspect.isclass(value) or inspect.isroutine(value):
            return f"{value.__module__}.{value.__qualname__}"
        return name
    return name


def _modules(name: str) -> list[ModuleType]:
    """The module that an object is in, and the packages above it."""
    parts = name.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return [sys.modules[each] for each in names if each in sys.modules]


@functools.cache
def _definitions(module: ModuleType) -> dict[str, ast.stmt]:
    """Functions and classes of a module, and methods of its classes, by their names."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    found[f"{node.name}.{inner.name}"] = inner
    return found


def _inline(modules: list[ModuleType], owner: Any):
    def replace(match: re.Match[str]) -> str:
        made = translated(match)
        # A letter that follows, as of a plural, would be taken for a part of it.
        return rf"{made}\ " if re.match(r"\w", match.string[match.end() :]) else made

    def translated(match: re.Match[str]) -> str:
        if math := match["math"]:
            return f":math:`{' '.join(math.split())}`"
        name = match["name"]
        if name is None:
            return match[0]
        if re.fullmatch(rf"{PACKAGE}(\.\w+)+(\(\))?", name):
            private = any(part.startswith("_") for part in name.split("."))
            return f"``{name}``" if private else f":py:obj:`~{_absolute(name)}`"
        found = _resolve(name, modules, owner)
        if found is not None:
            return f":py:obj:`{name} <{found}>`"
        return f"``{' '.join(name.split())}``"

    return replace


def _display(match: re.Match[str]) -> str:
    indent, body = match[1], textwrap.dedent(match[2]).split("\n")
    lines = [f"{indent}   {line.strip()}" for line in body if line.strip()]
    return "\n".join(["", f"{indent}.. math::", "", *lines, ""])


def _cells(line: str, columns: list[tuple[int, int]]) -> list[str]:
    ends = [end for _, end in columns[:-1]] + [len(line)]
    return [line[start:end].strip() for (start, _), end in zip(columns, ends, strict=True)]


def _table(match: re.Match[str]) -> str:
    """A simple table as a list, whose cells may become longer than the columns are wide."""
    lines = match[0].split("\n")
    columns = [found.span() for found in re.finditer("=+", lines[0])]
    parts: list[list[list[str]]] = [[]]
    for line in lines[1:-1]:
        if set(line.strip()) == {"=", " "}:
            parts.append([])
            continue
        cells = _cells(line, columns)
        if cells[0]:
            parts[-1].append(cells)
        else:
            last = parts[-1][-1]
            last[:] = [f"{old} {new}".strip() for old, new in zip(last, cells, strict=True)]
    indent = match["indent"]
    made = [f"{indent}.. list-table::"]
    if len(parts) > 1:
        made.append(f"{indent}   :header-rows: {len(parts[0])}")
    made.append("")
    for row in (row for part in parts for row in part):
        marks = ["* -"] + ["  -"] * (len(row) - 1)
        made += [
            f"{indent}   {mark} {cell}".rstrip() for mark, cell in zip(marks, row, strict=True)
        ]
    return "\n".join([*made, ""])


def translate(text: str, modules: list[ModuleType], owner: Any = None) -> str:
    """A docstring as reStructuredText."""
    blocks = _DISPLAY.sub(_display, _TABLE.sub(_table, text))
    parts = re.split(r"(?m)(^[ ]*\.\. math::\n\n(?:[ ]+.*\n)+)", blocks)
    # Every other part is a formula.
    parts[::2] = [_INLINE.sub(_inline(modules, owner), part) for part in parts[::2]]
    return "".join(parts)


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    del app, options
    modules = _modules(name)
    owner = obj if what == "class" else getattr(modules[0], name.split(".")[-2:][0], None)
    lines[:] = translate("\n".join(lines), modules, owner).split("\n")
    if what in ("data", "attribute", "property"):
        # An empty comment: napoleon takes what is before a colon in the first line for a type.
        lines[:0] = ["..", ""]


class _Qualify(ast.NodeTransformer):
    """Writes out the names of public classes of this package, which may be many of one name."""

    def __init__(self, modules: list[ModuleType]):
        self.modules = modules

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Replaces a name by the full one."""
        return self._full(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """Replaces a dotted name by the full one."""
        return self._full(node)

    def _full(self, node: ast.expr) -> ast.expr:
        found = _resolve(ast.unparse(node), self.modules, None)
        return node if found is None else ast.parse(found, mode="eval").body

    def arguments(self, arguments: ast.arguments) -> str:
        """All arguments as text, without `self`."""
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        for argument in (*every, arguments.vararg, arguments.kwarg):
            if argument is not None and argument.annotation is not None:
                argument.annotation = self.visit(argument.annotation)
        return f"({ast.unparse(arguments)})"


def _fields(definition: ast.ClassDef) -> ast.arguments:
    """The fields of a named tuple or data class, as arguments of its constructor."""
    fields = [
        node
        for node in definition.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not ast.unparse(node.annotation).startswith("ClassVar")
    ]
    # A default before a field without one is legal here, as no order is checked.
    kwonly = [ast.arg(node.target.id, node.annotation) for node in fields]  # type: ignore
    return ast.arguments([], [], None, kwonly, [node.value for node in fields], None, [])


def _signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returned: str
) -> tuple[str, str | None] | None:
    """Types as the source has them, so that shapes and the names of aliases can be read."""
    del app, obj, options, signature, returned
    module = _modules(name)[0]
    definition = _definitions(module).get(name.removeprefix(f"{module.__name__}."))
    qualify = _Qualify([module])
    if isinstance(definition, ast.ClassDef):
        arguments = _fields(definition)
        if not arguments.kwonlyargs:
            return None
        return qualify.arguments(arguments).replace("(*, ", "("), None
    if not isinstance(definition, ast.FunctionDef) or what == "property":
        return None
    arguments = copy.deepcopy(definition.args)
    positional = arguments.posonlyargs or arguments.args
    if positional and positional[0].arg in ("self", "cls"):
        del positional[0]
    returns = definition.returns and ast.unparse(qualify.visit(definition.returns))
    return qualify.arguments(arguments), returns


def _skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of named tuples that have no docstring of their own."""
    del app, what, options
    if skip or name.startswith("_"):
        return True
    if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number"):
        return True
    return None


def _unwrap(app: Sphinx) -> None:
    """Puts functions in place of what JAX has made of them, which autodoc would pass over."""
    del app
    package = importlib.import_module(PACKAGE)
    for info in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        module = importlib.import_module(info.name)
        for name, value in list(vars(module).items()):
            plain = inspect.unwrap(value) if callable(value) else value
            if plain is not value and not inspect.isroutine(value) and not inspect.isclass(value):
                setattr(module, name, plain)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects the above."""
    app.connect("builder-inited", _unwrap, priority=400)
    # Before napoleon, which reads sections.
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True}
