"""Every error says what was expected or what to do, in its own words or in a part that it ends with."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import ismdata

PACKAGE = Path(ismdata.__file__).parent
ERRORS = {"DataError", "UsageError", "UnsupportedModelError"}

#: A word that tells the reader what to do; it begins a sentence or follows a comma or semicolon.
DO = re.compile(
    r"(^|[.;:,(]\s+)(then |or |and |please |only )?(add|ask|attach|call|change|check|choose|convert|copy|cut|delete|"
    r"did|download|draw|evaluate|export|free|give|install|keep|leave|load|log|look|lower|make|map|mount|move|name|pack|pad|pass|"
    r"put|raise|remove|rename|repeat|report|restore|run|save|select|set|shorten|split|start|take|train|try|turn|type|"
    r"unpack|use|wait|write)\b|expected|requires|needs|`ismdata |pip install",
    re.IGNORECASE,
)

#: Errors without a step, by file and a part of the text: what they quote has it, or none would help.
WITHOUT = {
    ("convert/job.py", "none of which can be used"),
    ("generate/chat_file.py", "not written, because convert would refuse it"),
    ("train/checkpoints.py", "the run was interrupted while writing it"),
}


def texts() -> Iterator[tuple[str, str, bool]]:
    """Place, text and whether it ends in a part that is made elsewhere, of each error that has a text."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and node.args):
                continue
            parts = [part for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant | ast.FormattedValue)]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else " X " for part in parts)
            message = node.args[0]
            last = message.values[-1] if isinstance(message, ast.JoinedStr) and message.values else message
            last = last.right if isinstance(last, ast.BinOp) else last
            yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text, not isinstance(last, ast.Constant)


def test_every_error_says_what_to_do() -> None:
    found = list(texts())
    assert len(found) > 300
    for place, text, ends_elsewhere in found:
        allowed = any(place.startswith(file) and part in text for file, part in WITHOUT)
        assert ends_elsewhere or allowed or DO.search(text), f"{place}: {text}"
