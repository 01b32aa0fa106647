"""Fingerprints: what a stage's result is made of, as hashes.

The code that decides a result is the notebook's cells and every helper module that they import, directly or through
another module. Modules that decide nothing (`SHOWS`) are left out: another colour in a figure makes no stage again.
"""

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from helpers.core import project

# They show, count or spread work and decide no result, so no stage is made again when they change.
SHOWS = ("helpers.reports", "helpers.core.child", "helpers.core.notebooks", "helpers.core.parallel")
SHOWS += ("helpers.core.progress",)
DECIDE_NOTHING = ("keep_cache",)  # parameters that do not change the result of a stage


def fingerprint(content: Any) -> str:
    """Return 16 hexadecimal digits that identify a JSON-able content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def code_of(notebook: Path) -> dict[str, str]:
    """Return a hash per piece of code that decides a notebook's result: its cells and each helper module it imports.

    Comments, docstrings, formatting and prose do not count, nor does the parameters cell, whose values do.
    """
    source = _source(notebook)
    return {notebook.stem: _code_hash(source)} | code_of_modules(_imported(source, ""))


def shown_by(notebook: Path) -> dict[str, str]:
    """Return a hash for each module behind a notebook that decides no result; a stage keeps them on record."""
    return _hashes(_imported(_source(notebook), ""), decides=False)


def code_of_modules(names: Iterable[str]) -> dict[str, str]:
    """Return a hash for each of the helper modules `names` and each that they import, except those in `SHOWS`.

    Args:
        names: dotted names, such as "helpers.training.compiling".
    """
    return _hashes(names, decides=True)


def libraries(notebook: Path) -> set[str]:
    """Return the dotted names outside the project that a notebook and its helper modules import when they are loaded.

    A name can be that of a function or class: of ``from keras import ops``, both "keras" and "keras.ops" are returned.
    """
    waiting, seen, names = _loaded(_source(notebook), ""), set(), set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        if not name.startswith("helpers"):
            names.add(name)
        elif path := _file_of(name):
            waiting |= _loaded(path.read_text(encoding="utf-8"), _package_of(name, path)) - seen
    return names


def _loaded(source: str, package: str) -> set[str]:
    """Return the dotted names that `source` imports outside its functions."""
    return _names(ast.parse(source).body, package)


def _hashes(names: Iterable[str], *, decides: bool) -> dict[str, str]:
    waiting, hashes, seen = set(names), {}, set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        digest, imported = _module_code(name, _file_of(name))
        if _shows(name) is not decides:
            hashes[name] = digest
        if decides and _shows(name):
            continue
        waiting |= imported - seen
    return dict(sorted(hashes.items()))


def _shows(name: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in SHOWS)


def _source(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code" and "parameters" not in c["metadata"].get("tags", [])]
    return "\n".join("".join(cell["source"]) for cell in code)


@cache
def _module_code(name: str, path: Path) -> tuple[str, frozenset[str]]:
    source = path.read_text(encoding="utf-8")
    return _code_hash(source), frozenset(_imported(source, _package_of(name, path)))


def _package_of(name: str, path: Path) -> str:
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


def _imported(source: str, package: str) -> set[str]:
    """Return the dotted names of the helper modules that `source`, a module of `package`, imports anywhere."""
    return {name for name in _names_imported(source, package) if name.startswith("helpers.") and _file_of(name)}


@cache
def _names_imported(source: str, package: str) -> frozenset[str]:
    return frozenset(_names(ast.walk(ast.parse(source)), package))


def _names(nodes: Iterable[ast.AST], package: str) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package or None)
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def _file_of(name: str) -> Path | None:
    """Return the file of a module or package of the project, None when there is none of that name."""
    path = project.ROOT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def _code_hash(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                body[0] = ast.Pass()
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
