"""PersonaChat: numbered lines, and ConvAI2's JSON."""

from __future__ import annotations

from ismdata.conversation import ROLE_NAMES
from ismdata.convert.corpus_format import Choices, SourceBlock, with_choices
from ismdata.convert.formats.registry import FORMATS, detect
from ismdata.convert.read_block import read_block
from ismdata.convert.sources.framing import line_block
from tests.support.records import PLACE, RULES, conversations, refusal, turns_of
from tests.support.shapes import A, S, U


def dialogues(text, **choices):
    """The rows and refusals of a file of numbered lines."""
    block, _ = line_block(text.encode(), 1, plain_text=True)
    corpus_format = with_choices(FORMATS["personachat"], Choices(roles=ROLE_NAMES, **choices))
    readings = [
        read_block(SourceBlock(group, place, corpus_format), RULES)
        for group, place in corpus_format.regroup([(block, PLACE)])
    ]
    return (
        [row for reading in readings for row in reading.rows.to_pylist()],
        [entry for reading in readings for entry in reading.quarantined],
    )


PERSONAS = """1 your persona: i cook.
2 partner's persona: i sing.
3 hi !\thello .\t\tone|two
4 who ?\tme .
1 your persona: i run.
2 hi !\thello .
1 hi !\tno persona .
2 bye
"""


def test_numbered_lines():
    rows, refused = dialogues(PERSONAS)
    assert refused == []
    assert [turns_of(row) for row in rows] == [
        [(S, "i cook.\npartner's persona: i sing."), (U, "hi !"), (A, "hello ."), (U, "who ?"), (A, "me .")],
        [(S, "i run."), (U, "hi !"), (A, "hello .")],
        [(U, "hi !"), (A, "no persona ."), (U, "bye")],
    ]
    assert [row["source"] for row in rows] == ["corpus:1", "corpus:5", "corpus:7"]


def test_the_system_prompt_is_the_persona_of_the_trained_side():
    rows, _ = dialogues(PERSONAS, assistant="first")
    assert turns_of(rows[0])[:2] == [(S, "i sing.\npartner's persona: i cook."), (A, "hi !")]
    assert turns_of(rows[1])[:2] == [(S, "partner's persona: i run."), (A, "hi !")]
    rows, _ = dialogues(PERSONAS, assistant="both")
    assert [row["id"] for row in rows][:2] == ["corpus-1/second", "corpus-1/first"]


def test_a_dialogue_with_a_missing_line_is_refused_and_its_neighbours_are_not():
    rows, refused = dialogues("1 a\tb\n2 c\td\n1 e\tf\n3 g\th\n1 i\tj\n1 your persona: alone\n")
    assert [turns_of(row)[0] for row in rows] == [(U, "a"), (U, "i")]
    assert [(entry.source, entry.reason, entry.record) for entry in refused] == [
        ("corpus:3", "invalid_row", ["1 e\tf", "3 g\th"]),
        ("corpus:6", "no_messages", ["1 your persona: alone"]),
    ]


def test_which_line_opens_a_file_of_numbered_lines():
    assert detect("1 your persona: i cook.") == detect("1 partner's persona: i sing.") == "personachat"
    assert detect("1 hi !\thello .") == "personachat"
    assert detect("1 2 monkeys\ta film") == detect("2 hi\thello") == "tsv_pairs"


def test_the_last_answer_has_the_whole_dialogue_before_it():
    first = {"history": ["a"], "candidates": ["x", "b"]}
    last = {"history": ["a", "b", "c"], "candidates": ["y", "d"]}
    (conversation,) = conversations("convai", {"utterances": [first, last]})
    assert turns_of(conversation) == [(U, "a"), (A, "b"), (U, "c"), (A, "d")]
    broken = {"utterances": [first, {**last, "history": ["a", "z", "c"]}]}
    assert refusal("convai", broken)[0] == "broken_tree"
