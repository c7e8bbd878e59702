"""Exports of chat programs, sessions of agents, logs and task-oriented corpora."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ismdata.conversation import ROLE_NAMES
from ismdata.convert.corpus_format import Choices, with_choices
from ismdata.convert.formats.registry import FORMATS, detect
from ismdata.errors import DataError
from tests.convert.formats.test_properties import paths_of, read_or_refused, values
from tests.support.converted import convert_files
from tests.support.exports import CODE, CODEX, EXPORTS, SLACK, TAVERN, TELEGRAM, code_row, lines, whatsapp
from tests.support.shapes import QA, RECORDS, A, Q, R, U

NAMES = list(dict.fromkeys(export.format for export in EXPORTS))


@pytest.mark.parametrize("export", EXPORTS, ids=[f"{one.format}-{at}" for at, one in enumerate(EXPORTS)])
def test_what_an_export_becomes(tmp_path, export):
    found = convert_files(tmp_path, {export.name: export.text})
    assert (found.talks, found.refusals) == (export.talks, [])
    assert found.report.sources[0].format == export.format


@pytest.mark.parametrize("export", EXPORTS, ids=[f"{one.format}-{at}" for at, one in enumerate(EXPORTS)])
def test_an_export_may_be_a_member_of_an_archive_or_packed(tmp_path, export):
    import gzip
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(f"export/{export.name}", export.text)
        archive.writestr("export/photo.jpg", b"\xff\xd8\xff")
    found = convert_files(tmp_path, {"a.zip": out.getvalue(), "b.gz": gzip.compress(export.text.encode())})
    assert found.talks == export.talks * 2


@pytest.mark.parametrize("name", NAMES)
def test_records_of_other_formats_are_not_taken(name):
    assert [record for other, record, *_ in RECORDS if FORMATS[name].matches(record)] == []


def group(*more):
    return [*SLACK, *more]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", json.dumps(group({"type": "message", "user": "U3", "text": "Me too", "ts": "3"})), "3 speakers"),
        ("a.json", json.dumps(group({"type": "message", "subtype": "channel_join", "user": "U3", "ts": "3"})),
         "3 speakers"),
        ("a.json", json.dumps({**TELEGRAM, "messages": [*TELEGRAM["messages"], {
            "type": "message", "from": "Di", "from_id": "user3", "text": "Hi"}]}), "3 speakers: 'Bo', 'Cy', 'Di'"),
        ("a.txt", whatsapp("31.12.20, 22:15 - {name}: {text}") + "31.12.20, 22:16 - Di: Hi\n", "3 speakers"),
        ("a.jsonl", lines(*TAVERN, {"name": "Eve", "is_user": False, "mes": "Hi"}), "2 characters: 'Ada', 'Eve'"),
        ("a.jsonl", lines(*CODE, code_row("y", "gone", U, "?")), "the parent 'gone' is missing"),
        ("a.jsonl", lines(*CODEX, {"type": "response_item", "payload": {"type": "image_generation_call"}}),
         "an item of type 'image_generation_call'"),
        ("a.txt", b"31.12.20, 22:15 - Bo: caf\xe9\n31.12.20, 22:15 - Cy: No\n", "byte 0xe9; expected UTF-8"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, name, text, reason):
    with pytest.raises(DataError, match=reason):
        convert_files(tmp_path, {name: text})


def test_the_assistant_may_be_named(tmp_path):
    files = {"a.json": json.dumps(group({"type": "message", "user": "U3", "text": "Me too", "ts": "3"}))}
    found = convert_files(tmp_path, files, roles={"U2": "assistant"})
    assert found.talks == [[*QA, (U, "Me too")]]


def test_the_assistant_may_be_the_first(tmp_path):
    files = {"a.txt": f"31.12.20, 22:15 - Bo: {Q}\n31.12.20, 22:16 - Cy: {R}\n"}
    assert convert_files(tmp_path, files, assistant="both").talks == [QA, [(A, Q), (U, R)]]


def test_lines_of_an_answer_without_an_id_are_one_answer(tmp_path):
    rows = [code_row("1", None, U, Q), code_row("2", "1", A, [{"type": "thinking", "thinking": "hm"}]),
            code_row("3", "2", A, [{"type": "text", "text": R}])]  # fmt: skip
    assert convert_files(tmp_path, {"a.jsonl": lines(*rows)}).talks == [QA]


def test_two_people_of_one_name_are_kept_apart(tmp_path):
    rows = [{"type": "message", "from": "Bo", "from_id": f"user{at}", "text": text} for at, text in enumerate([Q, R])]
    assert convert_files(tmp_path, {"a.json": json.dumps({**TELEGRAM, "messages": rows})}).talks == [QA]


def test_what_is_left_out_is_counted(tmp_path):
    found = convert_files(tmp_path, {"a.json": json.dumps(TELEGRAM), "b.jsonl": lines(*CODE)})
    assert found.report.ignored_fields == {
        "messages without text: pictures, stickers, files, calls": 1,
        "notices, such as that somebody joined": 1,
        "lines of type 'summary'": 1,
        "messages of other branches": 1,
        "messages of subagents": 1,
    }


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_broken_record_is_read_or_refused(name, data):
    export = data.draw(st.sampled_from([one for one in EXPORTS if one.format == name]))
    if name == "whatsapp":
        cut = data.draw(st.integers(0, len(export.text)))
        record = export.text[:cut] + data.draw(st.text(max_size=5)) + export.text[cut + 3 :]
    else:
        text = export.text
        record = json.loads(text) if not export.name.endswith("l") else [json.loads(line) for line in text.splitlines()]
        *inside, last = [None, *data.draw(st.sampled_from([*paths_of(record)][1:]))]
        holder = record
        for key in inside[1:]:
            holder = holder[key]
        holder[last] = copy.deepcopy(data.draw(values))
    for corpus_format in (FORMATS[name], with_choices(FORMATS[name], Choices(roles=ROLE_NAMES, assistant="both"))):
        for one in [record, *(record if isinstance(record, list) else [])]:
            assert isinstance(corpus_format.matches(one), bool)
            read_or_refused(corpus_format, one)
    detect(record)
