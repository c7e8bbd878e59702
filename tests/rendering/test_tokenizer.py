"""Tokenizers are saved as by transformers, only faster; control tokens can be removed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.rendering.tokenizer import Tokenizer, load_pretrained, remove_tokens
from tests.conftest import encoding


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "deepseek"])
def test_saving_writes_what_save_pretrained_does(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Including the model, which is written as text. Afterwards the tokenizer is unchanged."""
    tokenizer = Tokenizer(load_pretrained(str(request.getfixturevalue(name))), name=name, template="")
    (tmp_path / "ours").mkdir()
    before = tokenizer.pretrained.backend_tokenizer.to_str()
    tokenizer.save(tmp_path / "ours")
    assert tokenizer.pretrained.backend_tokenizer.to_str() == before
    tokenizer.pretrained.save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = ({path.name: path for path in (tmp_path / of).iterdir()} for of in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, path in ours.items():
        if name == "tokenizer.json":
            assert json.loads(path.read_text("utf-8")) == json.loads(theirs[name].read_text("utf-8"))
        else:
            assert path.read_bytes() == theirs[name].read_bytes()


@pytest.mark.slow
def test_taking_tokens_out_does_not_depend_on_how_the_description_is_written(smollm2: Path) -> None:
    tokenizer = encoding(smollm2).tokenizer
    backend = tokenizer.pretrained.backend_tokenizer
    removed = frozenset(tokenizer.controls.tokens)
    for pretty in (False, True):
        found = remove_tokens(backend.to_str(pretty=pretty).encode(), removed, removed, "t")
        assert found.opening.to_str() == found.inside.to_str() == tokenizer.reference.inside.to_str()
        assert len(found.opening.encode("<|im_end|>").ids) > 1


@given(st.sets(st.integers(0, 40), max_size=8), st.lists(st.integers(0, 40), max_size=60))
def test_control_tokens_are_found_wherever_their_ids_lie(controls: set[int], ids: list[int]) -> None:
    tokenizer = object.__new__(Tokenizer)
    tokenizer.control_ids = np.array(sorted(controls), np.int32)
    found = tokenizer.find_controls(np.array(ids, np.int32))
    assert found.tolist() == [place for place, id in enumerate(ids) if id in controls]
