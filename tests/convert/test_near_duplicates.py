"""Near duplicates, compared with the exact Jaccard similarity."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ismdata.convert.near_duplicates import NearIndex, shingles, words
from tests.support.talks import FEW


@FEW
@given(st.text(max_size=60))
def test_shingles_are_runs_of_words(text: str) -> None:
    found = words(text)
    runs = {tuple(found[at : at + 5]) for at in range(max(len(found) - 4, 1))}
    assert len(shingles(text)) == len(runs)
    if words(text):
        assert np.array_equal(shingles(text), shingles(f"{text} \n."))


def test_each_character_is_a_word_in_scripts_without_spaces() -> None:
    assert words("你好，World!") == ["你", "好", "world"]
    assert words("สวัสดี") == list("สวัสดี")
    assert words("안녕 하세요") == ["안녕", "하세요"]


def jaccard(one: str, other: str) -> float:
    first, second = set(shingles(one).tolist()), set(shingles(other).tolist())
    return len(first & second) / len(first | second)


def test_near_finds_similar_texts_and_no_others() -> None:
    """All pairs well above the threshold are found, none well below."""
    rng = np.random.default_rng(5)
    story = [f"w{k}" for k in rng.integers(0, 400, 300)]
    index = NearIndex()
    index.add(index.signature(" ".join(story)))
    index.add(index.signature("something else altogether, 你好, and no more than that"))
    seen = {"near": 0, "far": 0}
    for changes in [0, 1, 2, 3, 4, 15, 20, 30, 60] * 5:
        changed = list(story)
        for place in rng.choice(300, changes, replace=False):
            changed[place] = "other"
        text = " ".join(changed)
        similarity, found = jaccard(" ".join(story), text), index.nearest(index.signature(text))
        if similarity > 0.92:
            assert found is not None and found[0] == 0 and abs(found[1] - similarity) < 0.15
            seen["near"] += 1
        elif similarity < 0.65:
            assert found is None
            seen["far"] += 1
    assert seen["near"] > 5 < seen["far"]


def test_texts_without_words_are_similar_only_if_equal() -> None:
    index = NearIndex()
    for text in ("👍", "", "!!!"):
        assert index.nearest(index.signature(text)) is None
        index.add(index.signature(text))
    assert index.nearest(index.signature("!!!")) == (2, 1.0)
