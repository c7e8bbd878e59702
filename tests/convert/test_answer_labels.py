"""Labels of answers: whatever the format and the file, a bad answer is not trained as a good one."""

from __future__ import annotations

import pyarrow as pa
import pytest

from ismdata.convert.answer_labels import labels_of
from tests.support.one_corpus import convert_text, lines
from tests.support.records import conversations, read, refusal
from tests.support.shapes import QA, A, Q, R, U, chat

GOOD, BAD = {"prompt": "q", "completion": "good"}, {"prompt": "q", "completion": "bad"}
#: A field, a value that calls the answer bad, and one that calls it good.
LABELS = [
    ("label", False, True), ("label", 0, 1), ("label", "false", "True"), ("label", "0", "1"), ("label", 0.0, 1.0),
    ("Label", "bad", "good"), ("label", -1, 1), ("label", "rejected", "chosen"), ("kto_tag", "no", "yes"),
    ("is_rejected", True, False), ("is_bad", 1, 0), ("isGood", "False", "true"), ("thumbs_up", False, True),
    ("thumbs-down", "yes", "no"), ("rating", "thumbs_down", "Thumbs up"), ("rating", "-1", "👍"),
    ("feedback", "negative", "positive"), ("chosen", False, True), ("rejected", True, False),
    ("is_correct", "incorrect", "correct"), ("is_safe", False, True),
    ("feedback", {"rating": "thumbs_down"}, {"rating": "thumbs_up"}),
]  # fmt: skip


def converted(*arguments, **options):
    """The answers that were written, and the reasons for the others."""
    found = convert_text(*arguments, **options)
    return found.answers, found.reasons


@pytest.mark.parametrize(("name", "bad", "good"), LABELS)
def test_labels_of_all_names_and_types(tmp_path, name, bad, good):
    text = lines({**BAD, name: bad}, {**GOOD, name: good})
    assert converted(tmp_path, text) == (["good"], ["rejected"])
    assert converted(tmp_path, text, preference="rejected") == (["bad"], ["rejected"])


@pytest.mark.parametrize(("name", "bad", "good"), LABELS)
def test_every_format_heeds_them(name, bad, good):
    shapes = {
        "messages": {"messages": chat(*QA)},
        "sharegpt": {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": R}]},
        "alpaca": {"instruction": Q, "output": R},
        "prompt_completion": {"prompt": Q, "completion": R},
        "pairs": {"history": [[Q, R]]},
        "lists": {"dialog": [Q, R]},
        "utterances": {"utterances": [{"speaker": "user", "text": Q}, {"speaker": "bot", "text": R}]},
        "separated": {"text": f"### Human: {Q}### Assistant: {R}"},
    }
    for each, record in shapes.items():
        assert read(each, {**record, name: good}) == [QA]
        assert refusal(each, {**record, name: bad})[0] == "rejected"


def test_a_first_record_without_a_label(tmp_path):
    unlabelled = {"prompt": "q", "completion": "unknown"}
    for first in (unlabelled, {**unlabelled, "label": None}, {**unlabelled, "label": ""}):
        text = lines(first, {**BAD, "label": False}, {**GOOD, "label": True})
        assert converted(tmp_path, text) == (["good"], ["invalid_field", "rejected"])


def test_a_label_far_behind_the_records_that_decide(tmp_path):
    plain = [{"messages": chat((U, "q"), (A, "plain"))}] * 200
    labelled = [{"messages": chat((U, "q"), (A, text)), "label": label} for text, label in (("bad", 0), ("good", 1))]
    written, reasons = converted(tmp_path, lines(*plain, *labelled))
    assert written == ["plain"] * 200 + ["good"]
    assert reasons == ["rejected"]


def test_tables(tmp_path):
    csv = "prompt,completion,label\nq,bad,False\nq,good,True\nq,unknown,\n"
    assert converted(tmp_path, csv, "corpus.csv") == (["good"], ["rejected", "invalid_field"])
    messages = [chat((U, "q"), (A, text)) for text in ("bad", "good")]
    table = pa.table({"messages": messages, "label": pa.array([0, 1], pa.int8())})
    assert converted(tmp_path, table) == (["good"], ["rejected"])


@pytest.mark.parametrize("record", [
    {"label": "sports"}, {"label": "no"}, {"label": 3}, {"rating": 4}, {"rating": 0}, {"rating": "1"}, {"score": 0.0},
    {"chosen": "Fry."}, {"feedback": "It was wrong in three places."}, {"label": ["false"]}, {"correct": 0},
    {"is_good": None}, {"is_good": ""}, {"labels": 0}, {"feedback": {"text": "bad"}},
])  # fmt: skip
def test_what_is_no_label(record):
    assert labels_of(record) == {}


@pytest.mark.parametrize("record", [
    {"is_good": "perhaps"}, {"kto_tag": 0.5}, {"thumbs_up": 3}, {"is_bad": []}, {"is_rejected": False, "label": 0},
])  # fmt: skip
def test_unclear_labels_are_refused(record):
    assert refusal("prompt_completion", {**GOOD, **record})[0] == "invalid_field"
    assert refusal("kto", {**GOOD, **record})[0] == "invalid_field"


@pytest.mark.parametrize("name", ["rejected", "rejected_messages", "rejected_response", "non_preferred_output"])
def test_a_worse_answer_beside_a_chat_is_no_metadata(name):
    reason, detail = refusal("messages", {"messages": chat(*QA), name: "worse"})
    assert reason == "no_preference" and name in detail
    assert read("messages", {"messages": chat(*QA), name: None}) == [QA]


def test_labels_of_single_messages():
    answers = [{"role": A, "content": "b", "is_bad": True}, {"role": A, "content": "g", "is_rejected": "false"}]
    (conversation,) = conversations(
        "messages", {"messages": [*chat((U, "q")), answers[0], *chat((U, "q")), answers[1]]}
    )
    assert [one["train"] for one in conversation["messages"]] == [None, False, None, True]


@pytest.mark.parametrize("field", [
    {"feedback": {"rating": "thumbsDown"}}, {"annotation": {"rating": -1}}, {"rating": "bad"}, {"label": False},
    {"rejected": True}, {"vote": "down"},
])  # fmt: skip
def test_a_message_that_its_own_field_calls_bad(tmp_path, field):
    other = dict.fromkeys(field) | {"n": 1}
    talks = [[*chat((U, "q")), {"role": A, "content": "a", **one}] for one in (field, other)]
    records = [{"messages": talk, "source": "s"} for talk in talks]
    for data in (lines(*records), pa.Table.from_pylist(records)):
        assert [row["messages"][1]["train"] for row in convert_text(tmp_path, data).rows] == [False, None]


@pytest.mark.parametrize(
    "field", [{"label": 0}, {"rating": 1}, {"label": "news"}, {"feedback": "It is bad."}, {"thumbs_up": 0}]
)
def test_a_message_that_is_perhaps_not_bad(field):
    (conversation,) = conversations("messages", {"messages": [{"role": A, "content": "a", **field}]})
    assert conversation["messages"][0]["train"] is None


@pytest.mark.parametrize(
    "field", [{"train": False}, {"trainable": "false"}, {"loss": False}, {"weight": 0}, {"loss_weight": "0"}]
)
def test_a_record_that_is_not_trained_is_refused(tmp_path, field):
    (name,) = field
    record = {"messages": chat(*QA), "n": 1}
    found = convert_text(tmp_path, lines({**record, name: None}, {**record, **field}))
    assert (found.turns, found.reasons) == ([QA], ["invalid_field"])
    assert name in found.quarantine[0]["detail"]
    assert read("messages", {**record, "loss": 0.3, "weight": 2, "train": "2019"}) == [QA]


@pytest.mark.parametrize(("flag", "trained"), [
    ({"train": "false"}, False), ({"train": "0"}, False), ({"loss": 0.0}, False), ({"loss_mask": "1.0"}, True),
    ({"training": "True"}, True), ({"mask": True}, False), ({"masked": "0"}, True), ({"is_good": "0"}, False),
])  # fmt: skip
def test_flags_as_text_and_numbers(flag, trained):
    (conversation,) = conversations("messages", {"messages": [{"role": A, "content": "a", **flag}]})
    assert conversation["messages"][0]["train"] is trained


@pytest.mark.parametrize("flag", [{"mask": "1"}, {"mask": 0}, {"train": "maybe"}, {"is_bad": True, "train": True}])
def test_unclear_flags_are_refused(flag):
    assert refusal("messages", {"messages": [{"role": A, "content": "a", **flag}]})[0] == "invalid_field"
