"""Who is the assistant: speakers that alternate, names, and the choices of the user."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ismdata.conversation import ROLE_NAMES
from ismdata.convert.canonical import Rules, canonicalize
from ismdata.convert.corpus_format import Choices, with_choices
from ismdata.convert.formats.registry import FORMATS
from tests.support.records import PLAIN_TEXTS, read, refusal, turns_of
from tests.support.shapes import QA, A, Q, R, U, spoken


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("utterances", {"id": "t", "content": [{"agent": "x", "message": "a"}, {"agent": "y", "message": "b"}]}),
        ("utterances", {"id": "t", "log": [{"text": "a"}, {"text": "b"}]}),
        ("separated", {"id": "t", "dialogue": "Ann: a|EOM|Bo: b"}),
        ("dailydialog", "a __eou__ b"),
        ("tsv_pairs", "a\tb"),
        ("lists", ["a", "b"]),
    ],
    ids=["speakers", "log", "separated", "dailydialog", "tsv_pairs", "lists"],
)
def test_the_assistant_is_whom_the_user_says(name, record):
    second, first = [(U, "a"), (A, "b")], [(A, "a"), (U, "b")]
    assert read(name, record) == [second]
    assert read(name, record, assistant="first") == [first]
    assert read(name, record, assistant="both") == [second, first]
    corpus_format = with_choices(FORMATS[name], Choices(roles=ROLE_NAMES, assistant="both"))
    assert [draft.id_suffix for draft in corpus_format.parse_record(record)] == ["second", "first"]


def test_known_names_win_over_the_order_and_swapped_names_are_swapped_once():
    record = {"dialog": [{"speaker": "bot", "text": "a"}, {"speaker": "Ann", "text": "b"}]}
    assert read("utterances", record) == [[(A, "a"), (U, "b")]]
    record = {"dialog": [{"speaker": "user", "text": "a"}, {"speaker": "assistant", "text": "b"}]}
    swapped = {**ROLE_NAMES, "user": "assistant", "assistant": "user"}
    (draft,) = with_choices(FORMATS["utterances"], Choices(roles=swapped)).parse_record(record)
    assert turns_of(canonicalize(draft, Rules(roles=swapped))) == [(A, "a"), (U, "b")]


def test_more_than_two_speakers_are_refused_with_the_way_out():
    record = {"dialog": [{"speaker": name, "text": "a"} for name in ("Ann", "Bo", "Cy")]}
    reason, detail = refusal("utterances", record)
    assert reason == "many_speakers" and "--role NAME=assistant" in detail


def test_numbers_before_names_go_only_where_names_stay_different():
    assert read("utterances", {"dialog": spoken("speaker", "text", ("1_agent", Q), ("2_agent", R))}) == [QA]


@settings(deadline=None, max_examples=60)
@given(turns=st.lists(st.tuples(st.sampled_from(["Ann", "Bo"]), PLAIN_TEXTS), min_size=2, max_size=6))
def test_neighbours_of_one_speaker_stay_apart_and_in_order(turns):
    opener = turns[0][0]
    expected = [(U if name == opener else A, text) for name, text in turns]
    record = {"conversation": "|EOM|".join(f"{name}: {text}" for name, text in turns)}
    assert read("separated", record) == [expected]
    record = {"dialog": [{"speaker": name, "text": text} for name, text in turns]}
    assert read("utterances", record) == [expected]
