"""The order of the house: a file imports only files above it, and heavy packages come in only where models do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ismdata"

#: From the top down, in the order in which data flows. A file may import what stands in a line above its own, and in
#: its own line what stands to its left.
LAYERS = """
errors terminal limits memory
conversation masks columns lock folders journal
digests near sampling limits runs
shards bootstrap text_scores answers readers control_tokens template tracing conservation template_probe
tokenizer_backends tokenizer turns
counting_sort bins exact_completion cutting_stock best_bins packing
skeleton sensitivity
glm_layout encoder template_report
batch document_columns piece_columns tokens overlong behind spool documents sequences parity
mapping explain cleaning conversation_files workers conversion convert tokenizing pack
problems invariants verify_texts verify
dataset varlen_tables collate intervals dense flex varlen_kernels varlen backends
architecture weighted_loss glm canary attention presets
train_options distributed order metrics loss resume base_model model_out train_progress trainer train
conversation_line decoding greedy feeding cache_policy held transcript session batched chat
evaluate generate_eval eval_results eval_run
row_view view eval_view template_view demo command bench
template_command train_command eval_command chat_command
cli
__main__
""".strip().splitlines()
ORDER = {module: (line, at) for line, layer in enumerate(LAYERS) for at, module in enumerate(layer.split())}

#: Files that are about models: they alone may import these packages when they are imported themselves.
MODEL_FILES = {
    *("dataset", "collate", "presets", "train"),
    *("intervals", "dense", "flex", "varlen_kernels", "varlen", "backends"),
    *("architecture", "weighted_loss", "glm", "canary", "attention"),
    *("order", "loss", "resume", "base_model", "model_out", "train_progress", "trainer"),
    *("evaluate", "generate_eval", "eval_results", "eval_run"),
    *("decoding", "greedy", "feeding", "cache_policy", "held", "transcript", "session", "batched", "chat"),
    *("bench/attention", "bench/cases", "bench/steps", "bench/timing", "bench/yardstick"),
    *("bench/flops", "bench/latency", "bench/models"),
}
HEAVY = {"torch", "transformers", "datasets", "accelerate"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def layer_name(path: Path) -> str:
    """`readers/sharegpt.py` is part of `readers`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def test_every_file_has_a_place() -> None:
    assert {layer_name(path) for path in modules()} <= ORDER.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_what_is_above(path: Path) -> None:
    own = layer_name(path)
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] != "ismdata" or len(parts) == 1 or parts[1] in (own, "__version__"):
            continue
        assert parts[1] in ORDER, f"{path.name} imports {name}, which is no file of the package"
        assert ORDER[parts[1]] < ORDER[own], f"{path.name} imports {name}, which stands below it"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_only_where_models_are(path: Path) -> None:
    if {layer_name(path), str(path.relative_to(PACKAGE).with_suffix(""))} & MODEL_FILES:
        return
    tree = at_import_time(ast.parse(path.read_text(encoding="utf-8")))
    heavy = {name for name in imported(tree) if name.split(".")[0] in HEAVY}
    assert not heavy, f"{path.name} imports {', '.join(sorted(heavy))} when it is imported"


def test_the_data_road_imports_no_model_file() -> None:
    """Converting and packing work without torch: not even a lazy import of a file about models."""
    first_model_line = min(ORDER[name][0] for name in MODEL_FILES if name in ORDER)
    for path in modules():
        if ORDER[layer_name(path)][0] < first_model_line:
            names = set(imported(ast.parse(path.read_text(encoding="utf-8"))))
            assert not {name for name in names if name.split(".")[0] == "torch"}, path


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
