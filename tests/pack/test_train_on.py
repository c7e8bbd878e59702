"""`--train-on`, and the messages' own flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ismdata.convert.pipeline import convert
from ismdata.data.shards import PackedShards
from ismdata.data.verification import verify
from ismdata.errors import DataError, UsageError
from ismdata.pack.pipeline import pack
from ismdata.rendering.tokenizer import load_pretrained
from tests.conftest import template_named
from tests.support.reporters import Recorder

pytestmark = pytest.mark.slow  # packs a corpus for each choice

TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes, one.", "reasoning_content": "It is one."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "<think>\nIt is two.\n</think>\n\nYes, two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Yes, three."},
]


def converted(tmp_path: Path, conversations: list[list[dict[str, Any]]]) -> Path:
    lines = [json.dumps({"id": f"c{k}", "messages": messages}) for k, messages in enumerate(conversations)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    convert([str(tmp_path / "c.jsonl")], tmp_path / "converted", overwrite=True)
    return tmp_path / "converted"


def answers(
    tmp_path: Path, tokenizer: Path, talk: list[dict[str, Any]] = TALK, **options: Any
) -> list[tuple[bool, str]]:
    """(trained, text) of the answer spans of all documents; the rows are verified."""
    options = {"seq_len": 512, "chat_template": str(template_named("qwen3")), "overwrite": True} | options
    pack([converted(tmp_path, [talk])], tmp_path / "packed", tokenizer=str(tokenizer), **options)
    assert verify(tmp_path / "packed").problems == []
    decode = load_pretrained(str(tmp_path / "packed" / "tokenizer")).decode
    found = []
    for row in map(PackedShards(tmp_path / "packed").__getitem__, range(len(PackedShards(tmp_path / "packed")))):
        for start, end, kind, train in row.spans.tolist():
            if kind == 2:
                assert bool(row.loss_mask[start:end].any()) == bool(train)
                found.append((bool(train), decode(row.input_ids[start:end].tolist())))
    return found


def test_all_answers_with_their_reasoning(tmp_path: Path, smollm2: Path) -> None:
    assert answers(tmp_path, smollm2) == [
        (True, "<think>\nIt is one.\n</think>\n\nYes, one.<|im_end|>"),
        (True, "<think>\nIt is two.\n</think>\n\nYes, two.<|im_end|>"),
        (True, "<think>\n\n</think>\n\nYes, three.<|im_end|>"),
    ]


def test_the_last_answer(tmp_path: Path, smollm2: Path) -> None:
    assert [trained for trained, _ in answers(tmp_path, smollm2, train_on="last")] == [False, False, True]
    flagged = [*TALK[:5], {**TALK[5], "train": False}]
    # The last of those that the flags allow.
    assert [trained for trained, _ in answers(tmp_path, smollm2, flagged, train_on="last")] == [False, True, False]
    assert [text for _, text in answers(tmp_path, smollm2, train_on="last", history="expand")][-1].endswith(
        "three.<|im_end|>"
    )


@pytest.mark.parametrize("history", ["append", "expand"])
def test_content_without_reasoning(history: Any, tmp_path: Path, smollm2: Path) -> None:
    """The same tokens, with reasoning in its own spans; an empty reasoning block does not count as reasoning."""
    found = answers(tmp_path, smollm2, train_on="content", history=history)
    assert [text for trained, text in found if trained] == [
        "Yes, one.<|im_end|>",
        "Yes, two.<|im_end|>",
        "<think>\n\n</think>\n\nYes, three.<|im_end|>",
    ]
    thought = [text for trained, text in found if not trained and "<think>" in text]
    assert thought == ["<think>\nIt is one.\n</think>\n\n", "<think>\nIt is two.\n</think>\n\n"]
    ids = [row.input_ids.tolist() for row in map(PackedShards(tmp_path / "packed").__getitem__, range(1))]
    answers(tmp_path, smollm2, history=history)
    assert ids == [row.input_ids.tolist() for row in map(PackedShards(tmp_path / "packed").__getitem__, range(1))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_on": "first"}, "expected one of all, last, content"),
        ({"train_on": "content", "mask": "prefix"}, "--mask ism or causal"),
        ({"train_on": "content", "layout": "glm"}, "--layout plain"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        pack([tmp_path], tmp_path / "packed", tokenizer="x", **options)


def test_omitted_reasoning_is_counted_and_reported(tmp_path: Path, smollm2: Path) -> None:
    recorder = Recorder()
    report = pack(
        [converted(tmp_path, [TALK, TALK[:2], TALK[4:]])],
        tmp_path / "packed",
        tokenizer=str(smollm2),
        seq_len=256,
        reporter=recorder,
    )
    assert report.totals["unwritten_reasoning"] == 2
    assert any("the reasoning of 2 answers" in note for note in recorder.notes)


# ---- flags of messages ----


def flags(tmp_path: Path, *messages: dict[str, Any]) -> list[bool | None] | str:
    """`train` of each answer as converted, or why the conversation is refused."""
    talk = [one for message in messages for one in ({"role": "user", "content": "?"}, message)]
    folder = converted(tmp_path, [talk, TALK])
    refused = (folder / "quarantine.jsonl").read_text(encoding="utf-8")
    if refused:
        return str(json.loads(refused)["detail"])
    from datasets import Dataset

    row = Dataset.from_file(str(folder / "conversations-00000.arrow"))[0]
    return [message["train"] for message in row["messages"] if message["role"] == "assistant"]


def said(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "a", **fields}


@pytest.mark.parametrize("name", ["train", "loss", "trainable", "training", "loss_mask", "step_loss_mask"])
def test_usual_names_of_the_flag(name: str, tmp_path: Path) -> None:
    fields = (False, True, 0, 1, 0.0, "false", "True", None)
    expected = [False, True, False, True, False, False, True, None]
    assert flags(tmp_path, *(said(**{name: value}) for value in fields)) == expected


@pytest.mark.parametrize("name", ["mask", "masked"])
def test_a_mask_excludes_answers(name: str, tmp_path: Path) -> None:
    assert flags(tmp_path, said(**{name: True}), said(**{name: False}), said()) == [False, True, None]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": 0.3}, "has loss 0.3; expected true or false"),
        ({"loss": "maybe"}, "expected true or false"),
        ({"mask": 1}, "has mask 1; expected true to leave the answer out"),
        ({"mask": "User"}, "has mask 'User'"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}, "trains parts of an answer"),
        ({"train": True, "loss": False}, "expected fields that agree"),
    ],
)
def test_values_without_a_plain_meaning_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in str(flags(tmp_path, said(**fields)))


def test_weights_by_other_names(tmp_path: Path) -> None:
    folder = converted(tmp_path, [[TALK[0], {"role": "assistant", "content": "a", "loss_scale": 0.5}]])
    from datasets import Dataset

    [row] = Dataset.from_file(str(folder / "conversations-00000.arrow"))
    assert row["messages"][1]["weight"] == 0.5


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_both_paths_of_convert_use_flags(extension: str, tmp_path: Path) -> None:
    """Parquet is read as columns; a flag in a column is not ignored."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    talk = [{"from": "human", "value": "?", "loss": None}, {"from": "gpt", "value": "a", "loss": False}]
    path = tmp_path / f"c.{extension}"
    rows = [{"conversations": [*talk, {**talk[0]}, {"from": "gpt", "value": "b", "loss": True}]}] * 3
    if extension == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = convert([str(path)], tmp_path / "converted")
    assert report.written == 3
    from datasets import Dataset

    for row in Dataset.from_file(str(tmp_path / "converted" / "conversations-00000.arrow")):
        assert [message["train"] for message in row["messages"]] == [None, False, None, True]


def test_a_flag_in_an_unexpected_place_is_refused(tmp_path: Path) -> None:
    rows = [
        {"dialogue_id": "d", "turn_id": k, "speaker": who, "utterance": text, "loss": k > 2}
        for k, (who, text) in enumerate([("user", "?"), ("assistant", "a"), ("user", "!"), ("assistant", "b")])
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match="loss may decide what is trained"):
        convert([str(tmp_path / "r.jsonl")], tmp_path / "converted")
