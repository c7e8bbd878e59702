"""The order of the house: a file imports only files above it, and heavy packages come in only where models do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "ismdata"

#: Files that are about models: they alone may import these packages when they are imported themselves.
MODEL_FILES = ("data/dataset", "data/collate", "attention/", "train/", "generate/", "eval/", "bench/", "cli/demo")
HEAVY = {"torch", "transformers", "datasets", "accelerate"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of all modules that a syntax tree imports: `from ismdata import masks` gives `ismdata.masks`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            if node.module == "ismdata":
                yield from (f"ismdata.{alias.name}" for alias in node.names)
            else:
                yield node.module


def at_import_time(tree: ast.Module) -> ast.Module:
    """The tree without what does not run when the module is imported: function bodies and `if TYPE_CHECKING`."""

    class Pruned(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST:
            if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                return ast.Module(body=node.orelse, type_ignores=[])
            self.generic_visit(node)
            return node

    pruned = Pruned().visit(ast.parse(ast.unparse(tree)))
    assert isinstance(pruned, ast.Module)
    return pruned


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_only_where_models_are(path: Path) -> None:
    if str(path.relative_to(PACKAGE)).startswith(MODEL_FILES):
        return
    tree = at_import_time(ast.parse(path.read_text(encoding="utf-8")))
    heavy = {name for name in imported(tree) if name.split(".")[0] in HEAVY}
    assert not heavy, f"{path.name} imports {', '.join(sorted(heavy))} when it is imported"


def test_pruning_sees_through_type_checking() -> None:
    """The oracle of the test above: what runs at import is kept, the rest is not."""
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def late() -> None:\n    import transformers\n"
        "try:\n    import datasets\nexcept ImportError:\n    pass\n"
    )
    assert set(imported(at_import_time(tree))) == {"typing", "datasets"}


def test_help_imports_no_model_library() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from ismdata.cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        f"print(*sorted(set({sorted(HEAVY)!r}) & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
