"""A saved session is a line that `convert` reads. Any other file is refused, and the session does not change."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from ismdata.convert.pipeline import convert
from ismdata.errors import DataError, UsageError
from ismdata.generate.session import Session
from ismdata.generate.window import Window
from ismdata.rendering.messages import as_template_messages
from tests.generate.test_session import TWO_TURNS, session_of
from tests.support.scripted import END, CharacterEncoder, ScriptedModel

TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}


def converted(path, folder):
    """The conversations that `ismdata convert` reads from a file, in the form that templates take."""
    report = convert([str(path)], folder)
    with pa.memory_map(str(folder / "conversations-00000.arrow")) as source, pa.ipc.open_stream(source) as stream:
        rows = stream.read_all().to_pylist()
    return report, [as_template_messages(row) for row in rows]


def test_a_saved_session_converts_to_itself(tmp_path):
    script = [7, 8, END, 0, 0, 9, END, 0]  # the 0 before 9 follows the given answer
    session = Session(ScriptedModel(script), CharacterEncoder(), mask="ism", system="be kind\n— 你好", tools=TOOLS)
    session.reply("ab")
    session.give([{"role": "assistant", "content": "one moment", "tool_calls": [CALL]}])
    session.reply("c", role="tool")
    session.save(tmp_path / "talk.jsonl")
    assert (tmp_path / "talk.jsonl").read_text("utf-8").count("\n") == 1
    report, rows = converted(tmp_path / "talk.jsonl", tmp_path / "converted")
    assert (report.read, report.written) == (1, 1)
    assert rows == [(session.messages, TOOLS)]
    assert rows[0][0][3]["tool_calls"] == [CALL]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    other, model, encoder = session_of([0, 0, 0, 0, 0, 5, END, 0])
    other.load(tmp_path / "talk.jsonl")
    assert other.messages == session.messages
    assert other.fed == []
    assert other.reply("f") == "f"
    assert encoder.asked[-1][:-1] == session.messages
    assert [ids for ids, _, _ in model.calls[:2]] == [[80, 0, 1, 81], [7, 8, END]]  # answers as pack encodes them
    other.save(tmp_path / "talk.jsonl")  # loaded by this session, so it may be replaced
    assert len(json.loads((tmp_path / "talk.jsonl").read_text("utf-8"))["messages"]) == 8


def test_a_file_of_something_else_is_not_replaced(tmp_path):
    session, _, _ = session_of(TWO_TURNS)
    session.reply("ab")
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(UsageError, match=r"diary.txt: exists, and this session did not write or load it; name another"):
        session.save(tmp_path / "diary.txt")
    assert (tmp_path / "diary.txt").read_text() == "dear diary"
    session.save(tmp_path / "talk.jsonl")
    session.reply("c")
    session.save(str(tmp_path / "talk.jsonl"))
    assert len(json.loads((tmp_path / "talk.jsonl").read_text())["messages"]) == 4


def test_what_convert_would_refuse_is_not_written(tmp_path):
    session, _, _ = session_of([END, 0])
    with pytest.raises(DataError, match=r"talk.jsonl: not written, because convert would refuse it"):
        session.save(tmp_path / "talk.jsonl")  # no messages
    session.reply("ab")
    with pytest.raises(DataError, match=r"convert would refuse it: message 2 \(assistant\) is empty"):
        session.save(tmp_path / "talk.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    session, _, _ = session_of(TWO_TURNS)
    session.reply("ab")
    with pytest.raises(DataError, match=r"talk.jsonl: cannot be written \(No such file or directory\). Name another"):
        session.save(tmp_path / "nowhere" / "talk.jsonl")


LINE = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"talk.jsonl: No such file or directory; expected a file with one JSON line"),
        (b"\xff\xfe{}", r"talk.jsonl: not UTF-8 at byte 0; expected one JSON line of messages"),
        (b"", r"talk.jsonl: 0 non-empty lines; expected one, the conversation that /save writes"),
        (f"{LINE}\n{LINE}\n".encode(), r"talk.jsonl: 2 non-empty lines; expected one"),
        (b'\n{"messages": [', r"talk.jsonl:2: not JSON \(Expecting value"),
        (b'{"messages": [], "x": NaN}', r"talk.jsonl:1: not JSON \(NaN is not JSON\)"),
        (b"[1, 2]", r"talk.jsonl:1: no messages found; expected"),
        (b'{"messages": []}', r"talk.jsonl:1: no messages found; expected"),
        (b'{"turns": ["a"]}', r"talk.jsonl:1: no messages found; expected"),
        (
            b'{"messages": [{"role": "narrator", "content": "a"}]}',
            r"talk.jsonl:1: message 1 has role 'narrator'; expected system, user, assistant or tool$",
        ),
        (b'{"messages": [{"role": "user", "content": 7}]}', r"talk.jsonl:1: message 1's content is a number"),
        (b'{"messages": [{"role": "user", "content": "a\\ud800"}]}', r"talk.jsonl:1: .*half a surrogate pair"),
        (b'{"messages": [{"role": "system", "content": "a"}]}', r"talk.jsonl: the conversation has no question"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', r"talk.jsonl: the conversation has no question"),
        (
            LINE.replace('"a"', '"' + "a" * 40 + '"').encode(),
            r"talk.jsonl: the conversation would have 42 tokens before the answer; the model has 30 positions",
        ),
        ("folder", r"talk.jsonl: Is a directory; expected a file"),
    ],
    ids=[
        "missing", "not UTF-8", "empty", "two lines", "broken JSON", "NaN", "a list", "no messages", "another format",
        "a role", "a number", "surrogate", "only a system prompt", "only an answer", "too long", "a folder",
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_and_the_session_kept(content, message, tmp_path):
    session, _, _ = session_of(TWO_TURNS, max_positions=30)
    session.reply("ab")
    path = tmp_path / "talk.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    before = (session.messages, list(session.fed))
    with pytest.raises(DataError, match=message):
        session.load(path)
    assert (session.messages, session.fed) == before
    assert session.reply("c") == "j"


def test_a_long_file_is_loaded_if_turns_may_be_dropped(tmp_path):
    path = tmp_path / "talk.jsonl"
    turns = [{"role": role, "content": "abcde"} for _ in range(8) for role in ("user", "assistant")]
    path.write_text(json.dumps({"messages": turns}))
    model = ScriptedModel([3] * 40)
    window = Window(when_full="drop-oldest", context=40)
    session = Session(model, CharacterEncoder(), mask="ism", window=window, max_new_tokens=4)
    session.load(path)
    session.reply("f")
    assert session.left_out > 8
    assert len(session.messages) == 18
    assert len(session.fed) <= 40
