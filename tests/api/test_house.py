"""The house rules that a reader relies on: short files, few parameters, one door into each package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "ismdata"
FILES = sorted(PACKAGE.rglob("*.py"))

#: The files that stand beside the packages: what every package shares.
GROUND = {
    *("__init__", "__main__", "arrays", "choices", "concurrency", "conversation", "display", "distributed", "errors"),
    *("memory", "suggestions"),
}
MOST_LINES = 450
MOST_PARAMETERS = 8


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many parameters a function has, `self` and `cls` aside."""
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_only_ground_modules_stand_beside_the_packages() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == GROUND


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", [path for path in FILES if "cli" not in path.parts], ids=name_of)
def test_functions_have_few_parameters(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [each.name for each in functions(tree) if parameters(each) > MOST_PARAMETERS]


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != PACKAGE], ids=name_of)
def test_packages_are_entered_by_their_door(path: Path) -> None:
    """Another package is imported by what its `__init__` names, not by its files."""
    own = path.relative_to(PACKAGE).parts[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ismdata."):
            parts = node.module.split(".")
            inner = len(parts) > 2 and parts[1] != own
            assert not inner, f"{name_of(path)} imports {node.module}; expected from {'.'.join(parts[:2])} import …"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_of_the_tests_is_shipped(path: Path) -> None:
    """No mocks, no path out of the package."""
    text = path.read_text(encoding="utf-8")
    assert "unittest" not in text
    assert not [line for line in text.splitlines() if "__file__" in line and "attach_stub" not in line]
