"""Turn numbers of answers in any packing, checked with answers whose text names their conversation and turn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from ismdata.convert.pipeline import convert
from ismdata.data.shards import PackedShards
from ismdata.eval.answers import find_answers
from ismdata.masks.intervals import ANSWER, QUERY
from ismdata.pack.pipeline import pack
from ismdata.rendering import train_tokenizer
from ismdata.rendering.conversation_encoder import ConversationEncoder
from tests.support.tiny import sample, write_packed


def said(name, turn):
    return f"answer {name} {turn} " + "word " * (turn * 7 % 11)


def talk(name, turns, *, untrained=()):
    messages = []
    for turn in range(1, turns + 1):
        messages.append({"role": "user", "content": f"question {turn} " + "word " * (turn * 5 % 7)})
        answer = {"role": "assistant", "content": said(name, turn)}
        messages.append(answer | ({"train": False} if turn in untrained else {}))
    return {"id": name, "messages": messages}


TALKS = [
    talk("one", 1),
    talk("few", 4),
    talk("some", 9),
    talk("many", 25),
    talk("odd#3", 6),  # an id of the form of a piece's
    talk("odd", 7),
]
GAPS = [talk("gaps", 8, untrained=(1, 4, 5)), talk("late", 5, untrained=(1, 2, 3))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    base = tmp_path_factory.mktemp("turns")
    train_tokenizer(map(json.dumps, TALKS), vocab_size=2000).save_pretrained(str(base / "tokenizer"))
    for name, talks in ("whole", TALKS), ("gaps", GAPS):
        lines = "".join(json.dumps(talk) + "\n" for talk in talks)
        (base / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        convert([str(base / f"{name}.jsonl")], base / name)
    return base


def packed(corpus, folder, *, source="whole", **options):
    tokenizer = str(corpus / "tokenizer")
    pack([corpus / source], folder, tokenizer=tokenizer, chat_template="chatml", workers=1, **options)
    return PackedShards(folder)


def check(shards):
    """(conversation, turn) of each answer, read off its text."""
    encoder = ConversationEncoder.load(shards.folder / "tokenizer")
    answers = find_answers(shards)
    found = []
    for at in range(len(answers)):
        tokens = shards[int(answers.row[at])].input_ids[answers.start[at] : answers.end[at]]
        words = encoder.decode(tokens.tolist()).split()
        assert words[0] == "answer" and words[1] == answers.conversation[at]
        assert int(words[2]) == answers.turn[at]
        found.append((words[1], int(words[2])))
    assert answers.targets.sum() == shards.index["totals"]["target_tokens"]
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.slow
@pytest.mark.parametrize("seq_len", [128, 256, 1024])
@pytest.mark.parametrize("mask", ["ism", "prefix"])
@pytest.mark.parametrize("history", ["append", "expand"])
def test_turns_in_every_packing(corpus, tmp_path, mask, seq_len, history):
    shards = packed(corpus, tmp_path / "p", mask=mask, seq_len=seq_len, history=history)
    whole = {(one["id"], turn) for one in TALKS for turn in range(1, len(one["messages"]) // 2 + 1)}
    assert check(shards) == whole


@pytest.mark.parametrize("seq_len", [128, 1024])
def test_turns_of_every_third_answer(corpus, tmp_path, seq_len):
    shards = packed(corpus, tmp_path / "p", mask="prefix", seq_len=seq_len, prefix_every=3)
    found = check(shards)
    assert ("many", 24) in found and all(turn % 3 == 0 for _, turn in found)


@pytest.mark.parametrize(("source", "seq_len"), [("whole", 128), ("whole", 1024), ("gaps", 1024)])
def test_turns_in_the_glm_layout(corpus, tmp_path, source, seq_len):
    """There `[START]` has a span of kind answer, but is not counted as an answer."""
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "[MASK]", "[START]"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {"chat_template": "chatml", "workers": 1, "seq_len": seq_len, "layout": "glm"}
    pack([corpus / source], tmp_path / "p", tokenizer=str(tmp_path / "tokenizer"), **options)
    assert check(PackedShards(tmp_path / "p")) == check(packed(corpus, tmp_path / "plain", source=source, seq_len=1024))


@pytest.mark.parametrize("mask", ["ism", "prefix"])
def test_untrained_answers_are_counted(corpus, tmp_path, mask):
    found = check(packed(corpus, tmp_path / "p", source="gaps", mask=mask, seq_len=1024))
    assert found == {("gaps", turn) for turn in (2, 3, 6, 7, 8)} | {("late", 4), ("late", 5)}


def test_the_same_answers_have_the_same_hash(corpus, tmp_path):
    whole = packed(corpus, tmp_path / "a", mask="ism", seq_len=1024)
    prefix = packed(corpus, tmp_path / "b", mask="prefix", seq_len=2048, seed=3)
    cut = packed(corpus, tmp_path / "c", mask="ism", seq_len=128)
    other = packed(corpus, tmp_path / "d", source="gaps", mask="ism", seq_len=1024)
    hashes = [find_answers(shards).sha256 for shards in (whole, prefix, cut, other)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_the_hash_depends_on_where_an_answer_begins(tmp_path):
    tokens = list(range(10, 17))
    rows = [sample([[(QUERY, k), (ANSWER, 7 - k)]], tokens=tokens) for k in (3, 4)]
    first, second = find_answers(PackedShards(write_packed(tmp_path / "p", rows))).digest
    assert first != second


def test_two_conversations_with_one_id(tmp_path):
    """They may come from two folders packed together. Only their content distinguishes them."""
    rows = [sample([[(QUERY, 3), (ANSWER, 4)]], seed=seed) for seed in (1, 2)]
    answers = find_answers(PackedShards(write_packed(tmp_path / "p", rows)))
    assert answers.conversation == ["0", "0"] and answers.turn.tolist() == [1, 1]
    assert len(set(answers.digest)) == 2
    np.testing.assert_array_equal(answers.context_tokens, [3, 3])
