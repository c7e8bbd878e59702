"""`ismdata template`, and `ismdata verify --conversations`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from ismdata.cli.main import app
from ismdata.convert.pipeline import convert
from ismdata.data.verification import verify
from ismdata.errors import UsageError
from ismdata.pack.pipeline import pack
from ismdata.pack.text_verification import check_texts, verify_conversations, words_of
from ismdata.rendering.template_report import SHAPES, TOOLS, cautions, encoding_of, report_template, shapes_in
from tests.conftest import TEMPLATES, encoding, template_named

pytestmark = pytest.mark.slow  # packs a corpus under many templates

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def said_by(source: str, tmp_path: Path, **options: Any) -> dict[str, Any]:
    (tmp_path / "t.jinja").write_text(source, encoding="utf-8")
    return report_template(encoding_of(str(tmp_path / "t.jinja"), **options)).facts


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gptoss", "glm4moe", "phi3", "gemma3", "cohere2"])
def test_what_is_reported_is_what_pack_does(name: str, smollm2: Path, tmp_path: Path) -> None:
    """Each shape as a corpus of one conversation is packed if the report says so, otherwise refused for its reason."""
    facts = report_template(encoding(smollm2, template_named(name), markers=True)).facts
    assert set(facts["shapes"]) == set(SHAPES)
    folder = tmp_path / "tokenizer"
    encoding(smollm2, template_named(name), markers=True).tokenizer.pretrained.save_pretrained(str(folder))
    lines = []
    for shape, (messages, _) in SHAPES.items():
        lines.append({"id": shape, "messages": messages} | ({"tools": TOOLS} if SHAPES[shape][1] else {}))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    convert([str(tmp_path / "c.jsonl")], tmp_path / "converted")
    for history in ("append", "expand"):
        pack(
            [tmp_path / "converted"],
            tmp_path / "packed",
            tokenizer=str(folder),
            chat_template=str(template_named(name)),
            seq_len=2048,
            history=history,  # type: ignore[arg-type]
            overwrite=True,
        )
        text = (tmp_path / "packed" / "quarantine.jsonl").read_text(encoding="utf-8")
        refused = {line["record"]["id"]: line["reason"] for line in map(json.loads, text.splitlines())}
        expected = {shape: found[history]["reason"] for shape, found in facts["shapes"].items() if found[history]}
        assert refused == expected
        problems, _ = check_texts(tmp_path / "packed", [tmp_path / "converted"])
        assert problems == []


def test_the_facts_of_some_templates(tmp_path: Path, smollm2: Path) -> None:
    plain = said_by(CHATML, tmp_path)
    assert plain["prefix_stable"] and plain["difference"] is None
    assert (plain["end_of_turn"], plain["end_of_turn_trained"]) == ("<|im_end|>", "always")
    assert plain["end_of_turn_is_token"]
    assert (plain["reasoning_field"], plain["reasoning_in_text"]) == ("left out", "kept")
    assert plain["shapes"]["several turns"] == {"append": None, "expand": None}
    assert plain["shapes"]["a tool call"]["append"]["reason"] == "not_rendered"
    qwen3 = report_template(encoding(smollm2, template_named("qwen3"), markers=True)).facts
    assert not qwen3["prefix_stable"]
    assert qwen3["reasoning_field"] == qwen3["reasoning_in_text"] == "cut"
    glm = report_template(encoding(smollm2, template_named("glm4moe"), markers=True)).facts
    assert (glm["end_of_turn"], glm["end_of_turn_trained"]) == ("", "followed")
    assert glm["next_turn_ends"] == ["<|user|>", "<|observation|>"]


def test_cautions_name_what_most_corpora_have(tmp_path: Path, smollm2: Path) -> None:
    moves = (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if m == users[-1] %}{{ system }} {% endif %}"
        "{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    (tmp_path / "moves.jinja").write_text(moves, encoding="utf-8")
    [note] = cautions(encoding(smollm2, tmp_path / "moves.jinja", markers=True), ["several turns", "system prompt"])
    assert "go to quarantine under --history append: system prompt (history_rewritten)" in note
    assert "With --history expand these can be packed: system prompt" in note
    assert cautions(encoding(smollm2, tmp_path / "moves.jinja", "expand", markers=True), ["system prompt"]) == []
    assert cautions(encoding(smollm2), ["several turns", "system prompt"]) == []
    [note] = cautions(encoding(smollm2), ["a tool call"])
    assert "expand takes" not in note


def test_the_shapes_of_a_corpus_are_found(tmp_path: Path) -> None:
    for shape, (messages, with_tools) in SHAPES.items():
        record = {"messages": messages} | ({"tools": TOOLS} if with_tools else {})
        (tmp_path / "c.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
        convert([str(tmp_path / "c.jsonl")], tmp_path / "converted", overwrite=True)
        [rows] = pa.ipc.open_stream(tmp_path / "converted" / "conversations-00000.arrow")
        found = shapes_in(rows)
        assert shape in found
        expected = {shape}
        if with_tools:
            expected |= {"tools, not called"}
        if any(message.get("tool_calls") for message in messages):
            expected |= {"a tool call"}
        answers = sum(message["role"] == "assistant" for message in messages)
        assert set(found) - {"several turns", "two questions in a row"} == expected - {
            "several turns",
            "two questions in a row",
        }
        assert answers > 1 or "several turns" not in found


@pytest.mark.parametrize("path", TEMPLATES[::6], ids=lambda path: path.stem)
def test_the_command(path: Path) -> None:
    shown = CliRunner().invoke(app, ["template", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "prefix-stable" in shown.output
    assert "conversation with its spans" in shown.output
    facts = json.loads(CliRunner().invoke(app, ["template", str(path), "--json"]).output)
    assert facts["example"]
    assert any(span["train"] for span in facts["example"])
    assert {span["kind"] for span in facts["example"]} <= {"prompt", "query", "answer"}


def test_a_tokenizer_by_itself_and_what_cannot_be(smollm2: Path, tmp_path: Path) -> None:
    facts = json.loads(CliRunner().invoke(app, ["template", str(smollm2), "--json"]).output)
    assert facts["tokenizer"] == str(smollm2)
    with pytest.raises(UsageError, match="no template file"):
        encoding_of(str(smollm2), tokenizer=str(smollm2))
    missing = CliRunner().invoke(app, ["template", str(tmp_path / "none.jinja")])
    assert missing.exit_code == 1


# ---- verify --conversations ----

TALKS = [
    [
        {"role": "system", "content": "Answer like a captain."},
        {"role": "user", "content": "Where is the harbour of Husum?"},
        {"role": "assistant", "content": "On the west coast, my friend."},
        {"role": "user", "content": "And where is the harbour of Kiel?"},
        {"role": "assistant", "content": "On the east coast, my friend."},
    ],
    [{"role": "user", "content": f"Question number {k} about tides?"} for k in range(1)]
    + [{"role": "assistant", "content": "An answer about tides."}],
    [
        {"role": role, "content": f"{role} says number {k} of many words in this long talk"}
        for k in range(20)
        for role in ("user", "assistant")
    ],
]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    lines = [json.dumps({"id": f"talk{k}", "messages": messages}) for k, messages in enumerate(TALKS)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    convert([str(tmp_path / "c.jsonl")], tmp_path / "converted")
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"history": "expand"}, {"mask": "prefix"}, {"train_on": "last"}], ids=str)
def test_sound_folders_hold_every_text(options: dict[str, Any], folders: Path, smollm2: Path) -> None:
    """Whole conversations, one document per answer, parts of a long one."""
    pack([folders / "converted"], folders / "packed", tokenizer=str(smollm2), seq_len=256, **options)
    found = verify_conversations(verify(folders / "packed"), [folders / "converted"])
    assert found.problems == []
    assert found.counts["answers found"] == (3 if "train_on" in options else 23)


def rewritten(folders: Path, change: Any) -> None:
    """The packed rows, each changed by `change`."""
    path = folders / "packed" / "shard-00000.arrow"
    table = pa.ipc.open_stream(path).read_all()
    rows = table.to_pylist()
    for row in rows:
        change(row)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, table.schema))


def span_of(row: dict[str, Any], kind: int) -> dict[str, Any]:
    return next(span for span in row["spans"] if span["kind"] == kind)


def drop_question(row: dict[str, Any]) -> None:
    span = span_of(row, 1)
    row["input_ids"][span["start"] : span["end"]] = [0] * (span["end"] - span["start"])


def train_question(row: dict[str, Any]) -> None:
    for at, span in enumerate(row["spans"][:-1]):
        if span["kind"] == 1 and row["spans"][at + 1]["kind"] == 2:
            row["spans"][at + 1]["start"] = span["start"] + 1
            row["loss_mask"][span["start"] + 1 : span["end"]] = [1] * (span["end"] - span["start"] - 1)
            span["end"] = span["start"] + 1


def untrain(row: dict[str, Any]) -> None:
    row["loss_mask"] = [0] * len(row["loss_mask"])


def swap_names(row: dict[str, Any]) -> None:
    row["conversation_ids"] = ["talk1" if name == "talk0" else "talk0" for name in row["conversation_ids"]]


def unknown_name(row: dict[str, Any]) -> None:
    row["conversation_ids"] = ["talk9"] * len(row["conversation_ids"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_question, "is not in the context"),
        (train_question, "not in the context|is in the answer"),
        (untrain, "is a target 0 times"),
        (swap_names, "not the conversation's"),
        (unknown_name, "not in the converted folders"),
    ],
)
def test_what_is_wrong_is_found(change: Any, said: str, folders: Path, smollm2: Path) -> None:
    """Changed rows, some of which pass every other check."""
    pack([folders / "converted"], folders / "packed", tokenizer=str(smollm2), seq_len=1024)
    rewritten(folders, change)
    problems, _ = check_texts(folders / "packed", [folders / "converted"])
    assert re.search(said, "\n".join(problems)), problems


def test_a_conversation_that_is_gone_is_missed(folders: Path, smollm2: Path) -> None:
    pack([folders / "converted"], folders / "packed", tokenizer=str(smollm2), seq_len=1024)
    (folders / "d.jsonl").write_text(json.dumps({"id": "other", "messages": TALKS[1]}) + "\n", encoding="utf-8")
    convert([str(folders / "d.jsonl")], folders / "more")
    problems, _ = check_texts(folders / "packed", [folders / "converted", folders / "more"])
    assert "other: neither packed nor quarantined" in problems[0]


def test_words() -> None:
    assert words_of("…") == ""
    assert words_of(" a-b ") == " a b "


def test_the_option_goes_with_packed_folders(folders: Path) -> None:
    result = CliRunner().invoke(
        app, ["verify", str(folders / "converted"), "--conversations", str(folders / "converted")]
    )
    assert result.exit_code == 2
