"""A digest of the code that can change what a stage computes, module by module.

A stage's fingerprint holds these digests, so that an edited line is run and not passed over for
what an older version of it has made. Counted are the module of the stage's function and all
modules of minmacpo that it imports, directly or through others, as parsed code: comments,
docstrings and formatting do not count.
"""

import ast
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import minmacpo

PACKAGE = Path(minmacpo.__file__).parent

# They say where, when and whether a stage is computed, never what. Settings count by their values.
NOT_COUNTED = (
    "__init__.py",
    "config/",
    "pipeline/code_digest.py",
    "pipeline/disk_space.py",
    "pipeline/reuse.py",
    "pipeline/run.py",
    "pipeline/run_dir.py",
    "pipeline/scheduler.py",
    "pipeline/stage.py",
    "pipeline/stage_maker.py",
    "runtime/files.py",
    "runtime/progress.py",
)


def code_digests(compute: Callable) -> dict[str, str]:
    """The digest of every module that a function reaches: {"core/losses.py": "9f3c..."}.

    Args:
        compute: a stage's function. Functions that it was given by its surroundings count as well.
    """
    modules: set[str] = set()
    for module in modules_of(compute):
        if is_counted(module):
            modules |= reached_modules(module)
    return {module: module_digest(module) for module in sorted(modules)}


@functools.cache
def reached_modules(start: str) -> frozenset[str]:
    """A module and all that it imports, directly or through others."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting.extend(imported_modules(module))
    return frozenset(reached)


def modules_of(function: Callable) -> Iterator[str]:
    """The modules that define a function and the functions in its closure."""
    seen = set()
    waiting = [function]
    while waiting:
        current = waiting.pop()
        # functools.partial holds the function as `func`, functools.cache as `__wrapped__`
        current = getattr(current, "func", getattr(current, "__wrapped__", current))
        if id(current) in seen or not callable(current):
            continue
        seen.add(id(current))
        name = getattr(current, "__module__", None) or ""
        if name.startswith("minmacpo."):
            yield module_path(name)
        for cell in getattr(current, "__closure__", None) or ():
            try:
                content = cell.cell_contents
            except ValueError:  # a name that has no value yet
                continue
            if hasattr(content, "__closure__") or hasattr(content, "__wrapped__"):
                waiting.append(content)


def module_path(name: str) -> str:
    """The path inside the package of a module's dotted name: "core/losses.py"."""
    parts = name.split(".")[1:]
    return "/".join(parts) + ".py"


def is_counted(module: str) -> bool:
    """Whether a module of the package can change what a stage computes."""
    return (PACKAGE / module).is_file() and not module.startswith(NOT_COUNTED)


@functools.cache
def imported_modules(module: str) -> tuple[str, ...]:
    """The counted modules of minmacpo that a module imports, also within its functions."""
    imported = []
    for node in ast.walk(parsed(module)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # "from minmacpo.core import losses" names a module, "... .losses import x" does not
            names = [node.module]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("minmacpo.") and is_counted(module_path(name)):
                imported.append(module_path(name))
    return tuple(imported)


@functools.cache
def module_digest(module: str) -> str:
    """16 hex digits that stand for a module's code."""
    return hashlib.sha256(canonical(parsed(module)).encode()).hexdigest()[:16]


@functools.cache
def parsed(module: str) -> ast.Module:
    """A module's syntax tree without docstrings and without what only type checkers see."""
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        node.body = [child for child in body if not is_for_type_checkers(child)]
        if has_docstring(node):
            node.body = node.body[1:]
    return tree


def is_for_type_checkers(node: ast.AST) -> bool:
    """Whether a statement is "if TYPE_CHECKING:"."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def has_docstring(node: ast.AST) -> bool:
    """Whether the first statement of a module, class or function is its docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None


def canonical(node) -> str:
    """A syntax tree as text that does not depend on Python's version: empty fields are left out."""
    if isinstance(node, list):
        return "[" + ",".join(canonical(child) for child in node) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if value is not None and value != []:
            fields.append(f"{name}={canonical(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def module_digest_or_none(module: str) -> str | None:
    """A module's digest; None if there is no such module any more."""
    return module_digest(module) if (PACKAGE / module).is_file() else None
