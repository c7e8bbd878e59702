"""Commands start quickly: they import what they use, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from ismdata.cli.common import _defer_pandas
from tests.support.byte_tokenizer import save_tokenizer
from tests.support.paths import ROOT

#: Packages that take longer to import than a command may take on a tiny corpus.
HEAVY = ("torch", "transformers", "datasets", "pandas", "huggingface_hub")

COMMANDS = [
    ["convert", "talks.jsonl", "-o", "converted"],
    ["pack", "converted", "-o", "packed", "--tokenizer", "tokenizer", "--seq-len", "256"],
    ["verify", "converted"],
    ["verify", "packed"],
    ["inspect", "converted"],
    ["inspect", "packed"],
    ["inspect", "packed", "--row", "0"],
]

#: Calls that are refused before anything heavy is imported.
REFUSED = [
    ["train", "nothing", "--model", "tiny", "-o", "model"],
    ["train", "packed", "--model", "tiny", "--eval", "nothing", "-o", "model"],
    ["eval", "tokenizer", "nothing"],
]


@pytest.mark.slow
def test_the_data_commands_import_no_heavy_package(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(talk) + "\n", encoding="utf-8")
    save_tokenizer(tmp_path / "tokenizer")
    code = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from ismdata.cli import app\n"
        f"for command in {COMMANDS + REFUSED!r}:\n"
        "    result = CliRunner().invoke(app, command)\n"
        f"    print(result.exit_code, *sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["0"] * len(COMMANDS) + ["1"] * len(REFUSED), done.stderr


def test_pandas_works_after_it_was_deferred() -> None:
    _defer_pandas()
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"number": [1.0, None], "text": ["a", None]})
    table = pa.Table.from_pandas(frame)
    assert [table.column(name).null_count for name in table.column_names] == [1, 1]
    assert table.to_pandas().equals(frame)
