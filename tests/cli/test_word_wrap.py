"""Streamed text is broken as the whole text would be, by the width of characters in a terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from ismdata.cli.word_wrap import WordWrap
from tests.support.talks import FEW


def wrapped(text, width, pieces=None):
    wrap = WordWrap(lambda: width)
    return "".join(map(wrap.feed, [text] if pieces is None else pieces)) + wrap.end()


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("", 10, ""),
        ("three little words", 10, "three\nlittle\nwords"),
        ("exactly 10", 10, "exactly 10"),
        ("exactly 10 x", 10, "exactly 10\nx"),
        ("a b\nc", 10, "a b\nc"),
        ("trailing  \nspace", 20, "trailing\nspace"),
        ("    indented code", 12, "    indented\ncode"),
        ("one\n\n\ntwo", 10, "one\n\n\ntwo"),
        ("a\tb", 20, "a       b"),
        ("see https://example.org/a/long/address now", 12, "see https://example.org/a/long/address now"),
        ("我们今天去公园玩吧", 10, "我们今天去\n公园玩吧"),
        ("我们今天去，公园", 10, "我们今天\n去，公园"),  # no line begins with a comma
        ("我们今天「公园」", 10, "我们今天\n「公园」"),  # none ends with an opening bracket
        ("我说 hello 你好", 8, "我说\nhello 你\n好"),
        ("가나다 라마바", 8, "가나다\n라마바"),  # Korean breaks at spaces
        ("ab👩‍👩‍👧cd👍🏽ef", 5, "ab👩‍👩‍👧\ncd👍🏽\nef"),
        ("cafe\u0301 cafe\u0301", 9, "cafe\u0301 cafe\u0301"),  # an accent has no width
    ],
)
def test_lines(text, width, expected):
    assert wrapped(text, width) == expected


def test_code_keeps_its_lines():
    code = "```python\nprint('a line that is longer than the terminal')\n```"
    assert wrapped(f"Look at this:\n{code}\nand so on and on", 12) == f"Look at\nthis:\n{code}\nand so on\nand on"


def test_a_word_is_shown_when_it_is_complete():
    wrap = WordWrap(lambda: 20)
    assert [wrap.feed(piece) for piece in ("he", "llo", " wor", "ld", "\n")] == ["", "", "hello", "", " world\n"]
    assert [wrap.feed(piece) for piece in ("我", "们", "吧")] == ["", "我", "们"]
    assert wrap.end() == "吧"
    assert wrap.end() == ""


def test_the_width_may_change():
    widths = [20, 20, 20]
    wrap = WordWrap(lambda: widths[-1])
    written = wrap.feed("one two three ")
    widths.append(5)
    assert written + wrap.feed("four five ") + wrap.end() == "one two three\nfour\nfive"


TEXTS = st.text(
    st.sampled_from("ab c\n\t我，。「」가👍🏽é\u0301\u200d`-") | st.characters(categories=("L", "N", "P", "So", "Zs"))
)


@FEW
@given(TEXTS, st.integers(4, 30), st.data())
def test_pieces_do_not_matter_and_nothing_is_lost(text, width, data):
    text = "".join(character for character in text if character in "\n\t " or unicodedata.category(character) != "Zs")
    whole = wrapped(text, width)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert wrapped(text, width, pieces) == whole
    assert "".join(whole.split()) == "".join(text.split())
    if "```" in text:
        return
    for line in whole.split("\n"):
        words = line.split()
        # A line is too long only if it has a word that is, or characters that must not be parted.
        assert cell_len(line) <= width or any(cell_len(word) > width // 2 for word in words)
