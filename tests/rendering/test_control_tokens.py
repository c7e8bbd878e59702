"""Control tokens are found as the tokenizer finds them: at the first possible position, and there the longest."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.rendering import control_tokens
from ismdata.rendering.control_tokens import AddedToken, ControlTokens

#: Few characters, so that texts share prefixes; some are special in regular expressions.
CHARACTERS = "ab<|.*\\\n"


def controls(texts):
    return ControlTokens(AddedToken(text=text, id=number, special=True) for number, text in enumerate(texts))


def one_after_the_other(texts):
    """The oracle: tries all texts at each position, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def found(pattern, text):
    return [match.span() for match in pattern.finditer(text)]


@pytest.mark.parametrize("levels", [0, 1, 2, 32])
@given(
    texts=st.lists(st.text(CHARACTERS, min_size=1, max_size=6), min_size=1, max_size=12),
    text=st.text(CHARACTERS, max_size=60),
)
def test_as_when_all_are_tried_in_turn(levels, texts, text):
    pattern = re.compile(control_tokens._any_of(texts, levels))
    assert found(pattern, text) == found(one_after_the_other(texts), text)
    assert found(pattern, "".join(texts)) == found(one_after_the_other(texts), "".join(texts))


@pytest.mark.slow
def test_texts_that_begin_one_another_without_end():
    """Some tokenizers have runs of blanks as added tokens; a regular expression cannot be nested a thousand times."""
    texts = ["a" * length for length in range(1, 1500)]
    pieces = controls(texts).cut("a" * 1234 + "b" + "a" * 2000)
    assert [piece if isinstance(piece, str) else len(piece.text) for piece in pieces] == [1234, "b", 1499, 501]


def test_no_control_tokens_are_found_nowhere():
    assert controls([]).cut("<|im_start|>") == ["<|im_start|>"]
    assert controls([]).first_end("") is None


def test_a_thousand_that_begin_alike_are_told_apart():
    texts = [f"<|place_{number}|>" for number in range(1000)]
    cut = controls(texts).cut("".join(f"{text}x" for text in texts))
    assert [piece.id for piece in cut if isinstance(piece, AddedToken)] == list(range(1000))
    assert cut.count("x") == 1000
