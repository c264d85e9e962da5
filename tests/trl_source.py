"""One function of the installed TRL, by its own source: importing the package takes 7 seconds."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path


def method(path, name, names):
    """A method of a module of TRL, as a function.

    Args:
        path: of the module within the package.
        name: of the method; the first of that name.
        names: what the module imports that the method uses.
    """
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / path).read_text())
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    found.decorator_list = []
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    tree = ast.fix_missing_locations(ast.Module([future, found], []))
    space = dict(names)
    exec(compile(tree, path, "exec"), space)
    return space[name]
