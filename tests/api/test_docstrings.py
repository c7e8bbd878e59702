"""What packages export is documented in Google style: each parameter under Args, the result under Returns."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "ismdata"

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def exported() -> Iterator[tuple[str, str]]:
    """(file, name) of each name in a package's stub, or in the `__all__` of a package without one."""
    for stub in sorted(PACKAGE.rglob("__init__.pyi")):
        for node in ast.parse(stub.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module is not None and stub.parent != PACKAGE:
                path = stub.parent.joinpath(*node.module.split(".")).with_suffix(".py")
                yield from ((path.relative_to(PACKAGE).as_posix(), alias.name) for alias in node.names)
    for node in ast.parse((PACKAGE / "masks" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ismdata.masks."):
            yield from (
                (node.module.removeprefix("ismdata.").replace(".", "/") + ".py", each.name) for each in node.names
            )


def definition(path: Path, name: str) -> Definition | None:
    """The function or class of that name; None for a constant."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, Definition) and node.name == name:
            return node
    return None


def missing(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """What a function's docstring does not say."""
    text = ast.get_docstring(function) or ""
    arguments = function.args
    each = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    names = [argument.arg for argument in each if argument.arg not in ("self", "cls")]
    lacks = [] if text else ["a docstring"]
    lacks += [
        f"Args: {name}" for name in names if not re.search(rf"^ +\*{{0,2}}{name}(, \w+)*( \(.*?\))?: ", text, re.M)
    ]
    returns = ast.unparse(function.returns) if function.returns else "None"
    if returns != "None" and not re.search(r"^(Returns|Yields):$", text, re.M):
        lacks.append("Returns")
    return lacks


EXPORTED = sorted(set(exported()))


@pytest.mark.parametrize(("file", "name"), EXPORTED, ids=[f"{file}::{name}" for file, name in EXPORTED])
def test_exported_names_are_documented(file: str, name: str) -> None:
    node = definition(PACKAGE / file, name)
    if node is None:
        return
    if isinstance(node, ast.ClassDef):
        assert ast.get_docstring(node), f"{name} has no docstring"
        public = [each for each in node.body if isinstance(each, ast.FunctionDef) and not each.name.startswith("_")]
        lacks = {each.name: ["a docstring"] for each in public if not ast.get_docstring(each)}
    else:
        found = missing(node)
        lacks = {name: found} if found else {}
    assert not lacks
