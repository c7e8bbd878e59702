"""gigatoken has the ids of the reference or is not used: the shards do not depend on the backend."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ismdata.rendering.encoding import Encoding
from ismdata.rendering.tokenizer_backends import (
    Gigatoken,
    Reference,
    TokenizerEngine,
    _slices,
    choose_sample,
)
from tests.conftest import encoding, template_named
from tests.pack.test_pack import bytes_tokenizer

__all__ = ["bytes_tokenizer"]  # a fixture

pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")

#: Texts that tokenizers split in different ways.
PIECES = st.sampled_from(
    [
        "",
        " ",
        "  \n",
        "Hello, world",
        "it's",
        "naïve",
        "你好，世界",
        "🙂",
        "<|im_end|>",
        "<think>",
        "</s>",
        "0123456789",
    ]
)
TEXTS = st.lists(st.one_of(st.lists(PIECES, max_size=6).map("".join), st.text(max_size=20)), max_size=8)


def large(texts: list[str]) -> pa.LargeStringArray:
    return pa.array(texts, pa.large_string())


@pytest.fixture(scope="session")
def deepseek_encoding(deepseek: Path) -> Encoding:
    return encoding(deepseek, template_named("deepseekv3"))


@pytest.mark.parametrize("name", ["hf", "gigatoken"])
@settings(deadline=None, max_examples=60)
@given(texts=TEXTS, cut=st.integers(0, 3), opening=st.booleans(), at_once=st.sampled_from([1, 15, 1 << 20]))
def test_ids_are_those_of_each_text_alone(
    name: str, deepseek_encoding: Encoding, texts: list[str], cut: int, opening: bool, at_once: int
) -> None:
    reference = deepseek_encoding.tokenizer.reference
    backend: TokenizerEngine = reference if name == "hf" else gigatoken_for(reference)
    with patch("ismdata.rendering.tokenizer_backends._SLICE_BYTES", at_once):
        ids, lengths = backend.encode(large(["left out"] * cut + texts).slice(cut), opening=opening)
    one_by_one = [reference.inside.encode(text, add_special_tokens=False).ids for text in texts]
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
    assert lengths.tolist() == list(map(len, one_by_one))
    assert ids.tolist() == [id for own in one_by_one for id in own]


@given(texts=TEXTS, cut=st.integers(0, 3), size=st.integers(1, 30))
def test_slices_are_the_texts_in_order(texts: list[str], cut: int, size: int) -> None:
    """Each as long as allowed."""
    slices = [part.to_pylist() for part in _slices(large(["left out"] * cut + texts).slice(cut), size)]
    assert [text for part in slices for text in part] == texts
    assert all(slices) or slices == [[]]
    sizes = [len("".join(part).encode()) for part in slices]
    assert all(here <= size or len(part) == 1 for here, part in zip(sizes, slices, strict=True))
    for here, after in itertools.pairwise(zip(sizes, slices, strict=True)):
        assert here[0] + len(after[1][0].encode()) > size


@functools.cache
def gigatoken_for(reference: Reference) -> Gigatoken:
    return Gigatoken(reference)


def test_gigatoken_forgets_what_it_has_seen(bytes_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reloaded after a number of bytes, and gives the same ids."""
    import gigatoken

    load, loads = gigatoken.Tokenizer.from_json, []
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda text: loads.append(text) or load(text))
    monkeypatch.setattr("ismdata.rendering.tokenizer_backends._RELOAD_BYTES", 250)
    backend = Gigatoken(encoding(bytes_tokenizer).tokenizer.reference)
    first = len(loads)
    texts = large(["forty bytes of text that stand in a line"] * 2)
    found = [backend.encode(texts, opening=False)[0].tolist() for _ in range(6)]
    assert len(loads) == first + 1
    assert all(ids == found[0] for ids in found)


def test_a_sample_has_a_text_of_every_kind() -> None:
    plain = [f"plain text number {k}" for k in range(1000)]
    odd = {
        137: "x",
        400: "long " * 2000,
        500: "非 ASCII text",
        777: "the marker <|end|> in it",
        900: "too long" * 10_000,
    }
    texts = large([odd.get(k, text) for k, text in enumerate(plain)])
    found = choose_sample(texts).tolist()
    assert {137, 400, 500, 777} <= set(found)
    assert 900 not in found  # it alone would take longer than all the rest
    assert found == sorted(set(found)) == choose_sample(texts).tolist()
    assert len(found) <= 40
    assert len(choose_sample(large([]))) == 0
