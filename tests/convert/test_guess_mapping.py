"""Guessed mappings equal the formats, and explaining a file shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.convert.canonical import Rules, role_table
from ismdata.convert.corpus_format import CorpusFormat, with_choices
from ismdata.convert.explain import PartSample, explain, explain_records
from ismdata.convert.formats.mapped import Mapped
from ismdata.convert.formats.registry import FORMATS, detect
from ismdata.convert.guess_mapping import guess_mapping
from ismdata.convert.mapping_file import load_mapping, mapping_text, parse_mapping
from ismdata.convert.parts import FormatChoice, open_parts
from ismdata.convert.read_block import read_records
from ismdata.convert.sources.arguments import expand
from ismdata.errors import DataError
from tests.conftest import DATA, needs_data
from tests.convert.test_mapping_file import CHOICES as CHOICES
from tests.convert.test_mapping_file import conversations as conversations
from tests.convert.test_mapping_file import mappings as mappings
from tests.convert.test_mapping_file import names as names
from tests.convert.test_mapping_file import read as read
from tests.convert.test_mapping_file import values as values
from tests.support.converted import convert_paths

# ---- mappings that equal formats, and guesses ----

TALKS = [
    ["Is it open?", "Until six.", "Good, thank you!"],
    ["Hello there.", "What can I do for you?", "Nothing at all, I am only looking.", "As you like."],
    ["One question: is it far?", "Ten minutes on foot: down the road."],
]
SIDES = ("user", "assistant")


def listed(talk: list[str], role: str, content: str, names: Sequence[str] = SIDES) -> list[dict[str, Any]]:
    return [{role: names[number % 2], content: text} for number, text in enumerate(talk)]


def as_rows(**columns: str) -> list[dict[str, Any]]:
    """Rows of a table with other column names."""
    return [
        {
            columns["dialogue"]: str(number),
            columns["order"]: str(at),
            columns["who"]: "AB"[at % 2],
            columns["what"]: text,
        }
        for number, talk in enumerate(TALKS)
        for at, text in enumerate(talk)
    ]


EVEN = [talk[: len(talk) // 2 * 2] for talk in TALKS]

SAMPLES: dict[str, tuple[list[Any], str]] = {
    "messages": ([{"messages": listed(talk, "role", "content")} for talk in TALKS],
                 'messages = "messages"\nrole = "role"\ncontent = "content"'),
    "sharegpt": ([{"conversations": listed(talk, "from", "value", ("human", "gpt")), "system": "Be kind."}
                  for talk in TALKS],
                 'messages = "conversations"\nrole = "from"\ncontent = "value"\nsystem = "system"'),
    "kdconv": ([{"messages": [{"message": text} for text in talk]} for talk in TALKS],
               'messages = "messages"\ncontent = "message"'),
    "lists": (TALKS, 'messages = "."'),
    "alpaca": ([{"instruction": talk[0], "output": talk[1]} for talk in TALKS],
               'messages = "."\nexchange = ["instruction", "output"]'),
    "dailydialog": ([" __eou__ ".join([*talk, ""]).strip() for talk in TALKS],
                    'text = "."\nseparator = "__eou__"\nstrip = true'),
    "utterances": ([{"utterances": listed(talk, "speaker", "text", ("Ann", "Bo"))} for talk in TALKS],
                   'messages = "utterances"\nrole = "speaker"\ncontent = "text"'),
    "pairs": ([{"conversation": [{"human": talk[at], "assistant": talk[at + 1]} for at in range(0, len(talk), 2)]}
               for talk in EVEN],
              'messages = "conversation"\nexchange = ["human", "assistant"]'),
    "separated": ([{"conversation": "|EOM|".join(f"{'AB'[at % 2]}: {text}" for at, text in enumerate(talk))}
                   for talk in TALKS],
                  'text = "conversation"\nseparator = "|EOM|"\nspeaker_separator = ": "\nstrip = true'),
    "dialogue_rows": (as_rows(dialogue="Dialogue_ID", order="Utterance_ID", who="Speaker", what="Utterance"),
                      'group = "Dialogue_ID"\norder = "Utterance_ID"\nrole = "Speaker"\ncontent = "Utterance"'),
}  # fmt: skip


def taken(corpus_format: CorpusFormat, records: list[Any]) -> list[Any]:
    """The records of the format: for rows, the rows of each dialogue."""
    if type(corpus_format).regroup is CorpusFormat.regroup:
        return records
    talks: dict[str, list[Any]] = {}
    for row in records:
        talks.setdefault(row["Dialogue_ID"], []).append(row)
    return list(talks.values())


@pytest.mark.parametrize("name", SAMPLES)
def test_a_mapping_reads_as_the_format_does(name: str) -> None:
    records, text = SAMPLES[name]
    corpus_format = with_choices(FORMATS[name], CHOICES)
    assert detect(records[0]) == name
    expected = conversations(corpus_format, taken(corpus_format, records))
    assert len(expected) == 3
    assert all(len(talk) > 1 for talk in expected)
    assert read(text, *records) == expected
    assert parse_mapping(text, "my.toml").matches(records[0])


@pytest.mark.parametrize("name", SAMPLES)
def test_formats_are_explained_with_an_equivalent_mapping(name: str) -> None:
    records, _ = SAMPLES[name]
    corpus_format = with_choices(FORMATS[name], CHOICES)
    placed = [(f"a.json:{number}", record) for number, record in enumerate(taken(corpus_format, records), 1)]
    sample = PartSample(
        source="a.json", layout="JSON", records=placed, format=name, corpus_format=corpus_format, choices=CHOICES
    )
    found = explain_records(sample)
    assert found.equivalent
    assert found.mapping is not None
    assert read(found.mapping, *records) == conversations(corpus_format, taken(corpus_format, records))
    assert found.text().startswith(f"a.json: JSON, format {name}\n\na.json:1 is read as:\n  ")
    assert json.loads(json.dumps(found.as_json()))["format"] == name


#: Corpora of no known format, and that they hold the talks.
UNKNOWN: dict[str, list[Any]] = {
    "renamed": [{"nr": number, "talk": {"turns": listed(talk, "who", "said", ("caller", "clerk"))}}
                for number, talk in enumerate(TALKS)],
    "renamed, known roles": [{"chatlog": [{**one, "ts": 17} for one in listed(talk, "by", "msg")]} for talk in TALKS],
    "numbered object": [{"chat": {f"turn_{at}": {"said": text, "by": "AB"[at % 2]} for at, text in enumerate(talk)}}
                        for talk in TALKS],
    "nested content": [{"log": [{"head": {"by": "AB"[at % 2]}, "body": {"said": text}} for at, text in enumerate(talk)]}
                       for talk in TALKS],
    "no roles": [{"parts": [{"said": text, "at": 7} for text in talk]} for talk in TALKS],
    "texts": [{"sentences": talk, "tags": ["a", "b"]} for talk in TALKS],
    "rows": [{"chat": str(number), "who": "AB"[at % 2], "line": text, "seq": at}
             for number, talk in enumerate(TALKS) for at, text in enumerate(talk)],
    "one string": [{"story": "|EOM|".join(talk)} for talk in TALKS],
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_shapes_are_guessed(name: str) -> None:
    records = UNKNOWN[name]
    mapped = guess_mapping(records)
    assert mapped is not None
    expected = [[(SIDES[at % 2], text) for at, text in enumerate(talk)] for talk in TALKS]
    assert read(mapping_text(mapped), *records) == expected


TALK = [
    {"sender": "A1", "said": "Is it open today?"},
    {"sender": "A1", "said": "The shop, I mean."},
    {"sender": "B2", "said": "Until six o'clock."},
]
READ = [("user", TALK[0]["said"]), ("user", TALK[1]["said"]), ("assistant", TALK[2]["said"])]
#: Files whose shape a mapping reaches only with `*`, `records` or `answer`, and how often they hold READ.
REACHED: dict[str, tuple[Any, int]] = {
    "by id": ({f"talk{at}": {"chat": TALK, "start": "x"} for at in range(3)}, 3),
    "by name": ({"ann": {"chat": TALK, "start": "x"}, "bo": {"chat": TALK, "start": "x"}}, 2),
    "by name, many": ({name: {"chat": TALK, "start": "x"} for name in "abcdef"}, 6),
    "nested lists": ([{"chat": [TALK[:2], TALK[2:]], "start": "x"}] * 2, 2),
    "nested lists by id": ({f"talk{at}": {"chat": [TALK[:2], TALK[2:]]} for at in range(2)}, 2),
    "splits": ({"train": [{"chat": TALK}, {"chat": TALK}], "valid": [{"chat": TALK}]}, 3),
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", REACHED)
def test_the_explained_mapping_reads_every_record(name: str, indent: int | None, tmp_path: Path) -> None:
    value, count = REACHED[name]
    (tmp_path / "a.json").write_text(json.dumps(value, indent=indent), encoding="utf-8")
    found = explained(tmp_path / "a.json")
    assert found.format is None
    assert found.mapping is not None
    assert [(one["role"], one["content"]) for one in found.conversations[0]["messages"]] == READ
    (tmp_path / "my.toml").write_text(found.mapping, encoding="utf-8")
    done = convert_paths([str(tmp_path / "a.json")], tmp_path / "out", mapping=tmp_path / "my.toml")
    assert (done.talks, done.refusals) == ([READ] * count, [])


@pytest.mark.parametrize("record", [
    {"asked": [{"role": "user", "content": "Hi"}], "reply": "Yo"},
    {"asked": [{"role": "user", "content": "Hi"}], "output": {"message": {"role": "assistant", "content": "Yo"}}},
])  # fmt: skip
def test_an_answer_beside_the_messages_is_guessed(record: Any) -> None:
    mapped = guess_mapping([record, record])
    assert mapped is not None
    assert read(mapping_text(mapped), record) == [[("user", "Hi"), ("assistant", "Yo")]]


def test_a_format_without_a_mapping_does_not_say_that_none_can_be() -> None:
    found = explain_records(PartSample(source="a", layout="JSON", records=[("a:1", {"a": 1})], format="alpaca",
                                       corpus_format=FORMATS["alpaca"], choices=CHOICES))  # fmt: skip
    assert "No mapping was found that reads the first record in the same way" in found.text()


@given(st.lists(values, max_size=4))
def test_any_records_can_be_guessed_from(records: list[Any]) -> None:
    mapped = guess_mapping(records)
    if mapped is not None:
        assert mapped == parse_mapping(mapping_text(mapped), "my.toml")


# ---- explaining files ----


def explained(path: Path, mapping: Mapped | None = None) -> Any:
    (source,) = expand(str(path))
    if mapping is None:
        return explain(source, FormatChoice(choices=CHOICES))
    choices = replace(CHOICES, roles=role_table(mapping.roles))
    return explain(source, FormatChoice(name="my.toml", corpus_format=mapping, choices=choices))


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_file_of_a_known_format_is_explained(tmp_path: Path) -> None:
    found = explained(write(tmp_path / "a.jsonl", SAMPLES["messages"][0]))
    assert (found.format, found.layout, found.looked_at, found.refused) == ("messages", "JSON Lines", 3, None)
    assert "  user       Is it open?\n  assistant  Until six.\n" in found.text()
    assert "A mapping that reads the first 3 records in the same way:" in found.text()


def test_a_file_of_no_known_format_is_explained(tmp_path: Path) -> None:
    found = explained(write(tmp_path / "a.jsonl", UNKNOWN["renamed"]))
    assert found.format is None
    assert found.mapping is not None
    assert found.text().splitlines()[3:5] == ["  user       Is it open?", "  assistant  Until six."]
    (tmp_path / "my.toml").write_text(found.mapping, encoding="utf-8")
    again = explained(tmp_path / "a.jsonl", load_mapping(tmp_path / "my.toml"))
    assert again.conversations == found.conversations
    assert again.mapping == found.mapping


def test_rows_of_no_known_format_are_explained(tmp_path: Path) -> None:
    found = explained(write(tmp_path / "a.jsonl", UNKNOWN["rows"]))
    assert [one["content"] for one in found.conversations[0]["messages"]] == TALKS[0]


def test_records_without_messages_are_explained(tmp_path: Path) -> None:
    found = explained(write(tmp_path / "a.jsonl", [{"a": 1}, {"a": 2}]))
    assert (found.format, found.mapping, found.conversations) == (None, None, ())
    assert "No messages were found in the records" in found.text()


def test_broken_and_empty_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}, ', encoding="utf-8")
    with pytest.raises(DataError, match="expected"):
        explained(tmp_path / "a.json")
    (tmp_path / "b.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="found no record"):
        explained(tmp_path / "b.jsonl")


# ---- real corpora ----

CORPORA = {
    "esconv/FailedESConv.json": 'messages = "dialog"\nrole = "speaker"\ncontent = "content"\nstrip = true',
    "firefly/dummy_data.jsonl": 'messages = "conversation"\nexchange = ["human", "assistant"]',
    "mathdial/test.jsonl": 'text = "conversation"\nseparator = "|EOM|"\nspeaker_separator = ": "\nstrip = true',
    "meld/test_sent_emo.csv": (
        'group = "Dialogue_ID"\norder = "Utterance_ID"\nrole = "Speaker"\ncontent = "Utterance"'
    ),
    "multiwoz/val.json.zip": 'messages = "log"\ncontent = "text"\nstrip = true',
}


def all_of(path: Path, format: FormatChoice) -> tuple[list[Any], list[str]]:
    """Messages of all conversations, and the reasons of all refusals."""
    rules = Rules(roles=format.choices.roles)
    readings = [
        read_records(block, rules)
        for source in expand(str(path))
        for part in open_parts(source, format)
        for block in part.blocks
    ]
    rows = [row for reading in readings for row in reading.rows["messages"].to_pylist()]
    return rows, [refused.reason for reading in readings for refused in reading.quarantined]


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", CORPORA)
def test_real_corpora_are_read_as_their_formats_read_them(name: str) -> None:
    expected = all_of(DATA / name, FormatChoice(choices=CHOICES))
    mapped = parse_mapping(CORPORA[name], "my.toml")
    assert len(expected[0]) > 30
    assert all_of(DATA / name, FormatChoice(name="my.toml", corpus_format=mapped, choices=CHOICES)) == expected
