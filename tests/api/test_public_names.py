"""What users import stays: names, signatures, and that importing what needs no model loads no model library."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ismdata
from ismdata.data.collate import Collator
from ismdata.data.dataset import PackedDataset
from tests.api.make_public_names import STORED, described


def test_names_and_signatures_are_the_stored_ones() -> None:
    """A change here is a change for users: say it in CHANGELOG.md, then run `python -m tests.api.make_public_names`."""
    assert described() == STORED.read_text(encoding="utf-8")


def test_the_package_gives_its_names_lazily() -> None:
    assert ismdata.PackedDataset is PackedDataset
    assert ismdata.Collator is Collator
    assert set(dir(ismdata)) == {"Collator", "PackedDataset", "Session", "__version__", "answer_many", "attach"}
    with pytest.raises(AttributeError, match="Packer"):
        ismdata.Packer  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    "statement",
    [
        "import ismdata; ismdata.__version__",
        "import ismdata.masks",
        "from ismdata.convert import convert",
        "from ismdata.pack import pack",
        "from ismdata.data import verify, PackedShards",
        "from ismdata.rendering import load_encoding",
    ],
)
def test_what_needs_no_model_loads_no_model_library(statement: str) -> None:
    code = f"import sys; {statement}; print(*sorted({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_old_module_names_are_packages_that_still_give_their_functions() -> None:
    code = (
        "from ismdata.attention import load\n"
        "from ismdata.convert import convert\n"
        "from ismdata.pack import pack\n"
        "from ismdata.train import train\n"
        "from ismdata.cli import app, main\n"
        "print(*map(callable, (load, convert, pack, train, app, main)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 6
