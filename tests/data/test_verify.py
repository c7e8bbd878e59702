"""Verification: valid folders pass. Each invariant, broken alone and with new hashes, is named with its place."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from ismdata.choices import MASKS
from ismdata.data import shards
from ismdata.data.index import write_index
from ismdata.data.verification import verify
from ismdata.errors import DataError
from tests.support.handmade import PACKED, SEQ_LEN, ConvertedFolder, PackedFolder, write_stream


def break_and_verify(packed, change):
    change(packed)
    packed.write()
    return verify(packed.folder).problems


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_sound_packed_folder_passes(tmp_path, mask, weighted):
    packed = PackedFolder(tmp_path / "packed", mask=mask, weighted=weighted)
    report = verify(packed.folder)
    assert report.problems == []
    assert report.ok
    assert report.format == shards.FORMAT
    assert report.counts == {name: packed.index["totals"][name] for name in report.counts}
    assert report.counts["conversations"] == 5
    assert report.counts["sequences"] == 3


def test_a_sound_converted_folder_passes(tmp_path):
    report = verify(ConvertedFolder(tmp_path / "converted").folder)
    assert report.problems == []
    assert report.counts == {"conversations": 2, "messages": 6}


def put(shard, row, column, at, value):
    def change(packed):
        packed.rows[shard][row][column][at] = value

    return change


def span(shard, row, at, **fields):
    def change(packed):
        packed.rows[shard][row]["spans"][at] |= fields

    return change


def claim(*path, value):
    def change(packed):
        *outer, last = path
        place = packed.index
        for name in outer:
            place = place[name]
        place[last] = value

    return change


# Row 0 of shard 0 is padded from token 200 on, its row 1 is full: see handmade.PACKED.
BROKEN_CONTENT = [
    (put(0, 0, "input_ids", 3, 100), "shard-00000.arrow: row 0, token 3: input_ids is 100; expected 0 to 99"),
    (put(0, 0, "input_ids", 3, -1), "shard-00000.arrow: row 0, token 3: input_ids is -1; expected 0 to 99"),
    (
        put(0, 0, "input_ids", 255, 7),
        "shard-00000.arrow: row 0, token 255: input_ids is 7 on padding; expected the pad id 0",
    ),
    (put(0, 1, "position_ids", 7, 8), "shard-00000.arrow: row 1, token 7: position_ids is 8; expected 7"),
    (put(0, 0, "position_ids", 100, 100), "shard-00000.arrow: row 0, token 100: position_ids is 100; expected 0"),
    (put(0, 0, "position_ids", 230, 1), "shard-00000.arrow: row 0, token 230: position_ids is 1; expected 0"),
    (
        put(0, 0, "loss_mask", 12, 1),
        "shard-00000.arrow: row 0, token 12: loss_mask is 1; expected 0 under the ism mask",
    ),
    (
        put(0, 0, "loss_mask", 12, 1),
        "shard-00000.arrow: row 0, token 12: a target that token 11 predicts and sees: its kv_end is 30; "
        "expected at most 12",
    ),
    (put(0, 0, "loss_mask", 31, 0), "row 0, token 31: loss_mask is 0; expected 1 under the ism mask"),
    (put(0, 0, "loss_mask", 31, 2), "row 0, token 31: loss_mask is 2; expected 1 under the ism mask"),
    (put(0, 0, "loss_mask", 220, 1), "row 0, token 220: loss_mask is 1; expected 0 under the ism mask"),
    (put(1, 0, "loss_mask", 150, 1), "shard-00001.arrow: row 0, token 150: loss_mask is 1; expected 0"),
    (span(0, 0, 2, train=False), "row 0, token 30: loss_mask is 1; expected 0 under the ism mask"),
    (span(0, 0, 2, kind=1), "row 0, token 30: loss_mask is 1; expected 0 under the ism mask"),
    (span(0, 0, 2, kind=5), "shard-00000.arrow: row 0: the span at token 30 has kind 5; expected 0 (prompt)"),
    (span(0, 1, 1, end=155), "shard-00000.arrow: row 1: a gap between spans at token 156"),
    (span(0, 1, 1, end=157), "shard-00000.arrow: row 1: spans that overlap or are out of order at token 156"),
    (span(0, 0, 4, end=99), "row 0: a span that crosses a document border, or a document without spans"),
    (put(0, 0, "seq_lens", 0, 99), "shard-00000.arrow: row 0: "),
    (put(0, 1, "seq_lens", 0, 257), "shard-00000.arrow: row 1: documents fill 257 tokens; expected at most 256"),
    (put(0, 1, "seq_lens", 0, 0), "shard-00000.arrow: row 1: a document has length 0; expected at least 1"),
    (
        put(0, 1, "block_table", 5, 9),
        "shard-00000.arrow: row 1, token 128: block_table visible_hi of block row 1 is 9; expected 2",
    ),
    (
        lambda packed: packed.rows[1][0]["conversation_ids"].pop(),
        "shard-00001.arrow: row 0: 2 conversation_ids; expected 3, one per document",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), BROKEN_CONTENT)
def test_broken_content_is_named(tmp_path, change, sentence):
    problems = break_and_verify(PackedFolder(tmp_path / "packed"), change)
    assert any(sentence in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("at", "weight"),
    [(3, 1.0), (31, float("nan")), (31, -1.0), (250, 0.5)],
    ids=["query", "nan", "negative", "padding"],
)
def test_broken_weights_are_named(tmp_path, at, weight):
    problems = break_and_verify(PackedFolder(tmp_path / "packed", weighted=True), put(0, 0, "loss_weight", at, weight))
    assert problems == [
        f"{tmp_path}/packed/shard-00000.arrow: row 0, token {at}: loss_weight is {weight}; "
        "expected a finite number of at least 0 on targets, and 0 elsewhere"
    ]


def test_prefix_shards_do_not_pass_as_ism(tmp_path):
    packed = PackedFolder(tmp_path / "packed", mask="prefix")
    problems = break_and_verify(packed, claim("mask", value="ism"))
    assert any("loss_mask is 0; expected 1 under the ism mask" in problem for problem in problems)


def test_one_bad_row_does_not_hide_another(tmp_path):
    """If the spans of a row do not tile its documents, other rows are still checked."""
    packed = PackedFolder(tmp_path / "packed", packed=[[PACKED[0][0]] * 9])
    packed.rows[0][2]["spans"][0]["end"] = 9
    for row in (3, 5, 8):
        packed.rows[0][row]["position_ids"][1] = 7
    packed.write()
    path = packed.folder / "shard-00000.arrow"
    assert verify(packed.folder).problems == [
        f"{path}: row 2: a gap between spans at token 10; expected spans that tile each document",
        f"{path}: row 3, token 1: position_ids is 7; expected 1 (2 more rows have this problem)",
    ]


def test_many_rows_at_once_equal_each_alone(tmp_path, monkeypatch):
    packed = PackedFolder(tmp_path / "packed", packed=[PACKED[0] * 5 + PACKED[1] * 3])
    packed.rows[0][7]["position_ids"][9] = 3
    packed.rows[0][11]["block_table"][2] = 77
    packed.write()
    together = verify(packed.folder)
    monkeypatch.setattr("ismdata.data.verification._TOKENS_AT_ONCE", 1)
    assert verify(packed.folder) == together
    assert ["row 7, token 9" in together.problems[0], "row 11, token 0" in together.problems[1]] == [True, True]


TOTALS = [
    "conversations",
    "documents",
    "sequences",
    "tokens",
    "target_tokens",
    "padding_tokens",
    "lower_bound_sequences",
]


@pytest.mark.parametrize("name", TOTALS)
def test_wrong_totals_are_named(tmp_path, name):
    packed = PackedFolder(tmp_path / "packed")
    right = packed.index["totals"][name]
    assert break_and_verify(packed, claim("totals", name, value=right + 1)) == [
        f"{packed.folder}/index.json: totals.{name} is {right + 1}; expected {right}, which the shards hold"
    ]


def test_lost_conversations_are_noticed(tmp_path):
    packed = PackedFolder(tmp_path / "packed")
    problems = break_and_verify(packed, claim("counts", "read", value=8))
    assert problems == [f"{packed.folder}/index.json: counts.read is 8; expected 7 = 5 packed + 2 quarantined"]


BROKEN_INDEX = [
    (claim("seq_len", value="256"), 'seq_len is "256"; expected an integer of at least 0'),
    (claim("seq_len", value=100), "seq_len is 100; expected a multiple of 128"),
    (claim("seq_len", value=0), "seq_len is 0; expected a multiple of 128"),
    (claim("seq_len", value=512), "columns are input_ids"),
    (claim("block_size", value=64), "block_size is 64; expected 128"),
    (claim("mask", value="full"), "mask is 'full'; expected one of ism, causal, prefix"),
    (claim("weighted", value=1), "weighted is 1; expected true or false"),
    (claim("weighted", value=True), "columns are input_ids"),
    (claim("totals", "tokens", value=-1), "totals.tokens is -1; expected an integer of at least 0"),
    (claim("totals", value=[]), "totals is []; expected an object"),
    (lambda packed: packed.index.pop("counts"), "counts is missing; expected an object"),
    (claim("tokenizer", "vocab_size", value=None), "tokenizer.vocab_size is null; expected an integer of at least 0"),
    (
        claim("tokenizer", "pad_id", value=100),
        "the tokenizer pads with 100; expected a pad_id or eos_id in its vocabulary",
    ),
    (claim("format", value="ismdata.packed/2"), "format is 'ismdata.packed/2'; expected ismdata.conversations/1 or"),
    (claim("counts", "quarantined", "no_target", value=2), "1 lines with reason no_target; expected 2"),
]


@pytest.mark.parametrize(("change", "sentence"), BROKEN_INDEX)
def test_a_broken_index_is_named(tmp_path, change, sentence):
    problems = break_and_verify(PackedFolder(tmp_path / "packed"), change)
    assert any(sentence in problem for problem in problems), problems


def test_pad_falls_back_to_eos(tmp_path):
    packed = PackedFolder(tmp_path / "packed")
    packed.index["tokenizer"]["pad_id"] = None
    problems = break_and_verify(packed, lambda packed: None)
    assert any("input_ids is 0 on padding; expected the pad id 1" in problem for problem in problems)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\udcff"])
def test_an_unreadable_index_is_a_problem(tmp_path, text):
    packed = PackedFolder(tmp_path / "packed")
    (packed.folder / "index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    [problem] = verify(packed.folder).problems
    assert problem.startswith(f"{packed.folder}/index.json: ")


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nowhere: found nothing; expected a folder that"):
        verify(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: found a file"):
        verify(tmp_path / "file")


@pytest.mark.parametrize("name", ["shard-00001.arrow", "quarantine.jsonl", "tokenizer/tokenizer.json"])
def test_a_missing_file_is_named(tmp_path, name):
    packed = PackedFolder(tmp_path / "packed")
    (packed.folder / name).unlink()
    [problem] = verify(packed.folder).problems
    assert problem.startswith(f"{packed.folder / name}: missing")


def test_an_additional_file_is_named(tmp_path):
    packed = PackedFolder(tmp_path / "packed")
    (packed.folder / "tokenizer" / "extra.json").write_text("{}")
    [problem] = verify(packed.folder).problems
    assert problem.startswith(f"{packed.folder}/tokenizer/extra.json: index.json does not list it")


def test_a_file_outside_the_folder_is_not_read(tmp_path):
    packed = PackedFolder(tmp_path / "packed")
    packed.index["files"][0]["name"] = "../secret"
    write_index(packed.folder, packed.index)
    assert any("lists '../secret'; expected each file once" in problem for problem in verify(packed.folder).problems)


def test_swapped_shards_are_noticed(tmp_path):
    packed = PackedFolder(tmp_path / "packed", packed=[PACKED[0], PACKED[0][::-1]])
    one, other = packed.folder / "shard-00000.arrow", packed.folder / "shard-00001.arrow"
    assert one.stat().st_size == other.stat().st_size
    shutil.move(one, tmp_path / "kept")
    shutil.move(other, one)
    shutil.move(tmp_path / "kept", other)
    problems = verify(packed.folder).problems
    assert len(problems) == 2
    assert all("SHA-256 is" in problem for problem in problems)


def test_rows_in_the_wrong_number_are_noticed(tmp_path):
    packed = PackedFolder(tmp_path / "packed")
    packed.index["shards"][0]["rows"] = 3
    write_index(packed.folder, packed.index)
    assert verify(packed.folder).problems == [
        f"{packed.folder}/shard-00000.arrow: 2 rows; expected 3 (index.json). Make the folder again"
    ]


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99, -8, -1])
def test_a_truncated_shard_is_a_problem_even_when_signed(tmp_path, keep):
    packed = PackedFolder(tmp_path / "packed")
    path = packed.folder / "shard-00000.arrow"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    problems = verify(packed.folder).problems
    assert len(problems) == 1
    assert "bytes; expected" in problems[0]
    packed.sign()
    at_end = keep in (-8, -1)  # the end-of-stream marker, which Arrow does not need
    assert at_end or any(str(path) in problem for problem in verify(packed.folder).problems)


def test_a_null_where_none_may_be_is_named(tmp_path):
    packed = PackedFolder(tmp_path / "packed")
    loose = pa.schema([pa.field(field.name, field.type) for field in packed.schema])
    write_stream(packed.folder / "shard-00001.arrow", loose, packed.rows[1], loss_mask=[None])
    packed.sign()
    assert any("columns are" in problem and "loss_mask" in problem for problem in verify(packed.folder).problems)


@pytest.mark.slow
def test_a_flipped_bit_that_was_signed_raises_nothing(tmp_path):
    """The hashes match, so that Arrow reads the flipped bit; the result is a report."""
    packed = PackedFolder(tmp_path / "packed")
    path = packed.folder / "shard-00000.arrow"
    sound = path.read_bytes()
    rng = np.random.default_rng(1)
    reported = 0
    for bit in rng.choice(8 * len(sound), size=200, replace=False).tolist():
        broken = bytearray(sound)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        packed.sign()
        reported += not verify(packed.folder).ok
    assert reported > 20  # many bits are in token ids, and another id in the vocabulary is valid


# ---- converted folders ----

BROKEN_CONVERSATIONS = [
    (
        lambda messages: messages[0].update(role="bot"),
        "row 0: message 0 has role 'bot'; expected system, user, assistant, tool",
    ),
    (lambda messages: messages[1].update(tool_calls=None), "row 0: message 1 has no content; expected content or tool"),
    (lambda messages: messages.clear(), "row 0: no messages; expected at least one"),
]


@pytest.mark.parametrize(("change", "sentence"), BROKEN_CONVERSATIONS)
def test_broken_conversations_are_named(tmp_path, change, sentence):
    converted = ConvertedFolder(tmp_path / "converted")
    row = converted.rows[1][0]
    row["messages"] = [dict(message) for message in row["messages"]]
    change(row["messages"])
    converted.write()
    assert [problem for problem in verify(converted.folder).problems if sentence in problem] == [
        problem
        for problem in verify(converted.folder).problems
        if problem.startswith(f"{converted.folder}/conversations-00001.arrow: ")
    ]
    assert not verify(converted.folder).ok


def test_converted_counts_must_add_up(tmp_path):
    converted = ConvertedFolder(tmp_path / "converted")
    converted.index["counts"] |= {"written": 3}
    converted.write()
    path = converted.folder / "index.json"
    assert verify(converted.folder).problems == [
        f"{path}: counts.read is 3; expected 4 = 3 written + 1 quarantined",
        f"{path}: counts.written is 3; expected 2, which the shards hold",
    ]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "line 1 is not valid JSON"),
        ("[]", "line 1 is []; expected an object"),
        ('{"source": "", "record": 1}', "line 1 lacks reason, detail; expected source, reason, detail and record"),
        (
            json.dumps({"source": "", "reason": "whim", "detail": "", "record": 1}),
            "line 1 has the reason 'whim'; expected one that ismdata knows",
        ),
    ],
)
def test_a_broken_quarantine_line_is_named(tmp_path, line, fault):
    converted = ConvertedFolder(tmp_path / "converted")
    (converted.folder / "quarantine.jsonl").write_text(line + "\n")
    converted.sign()
    problems = verify(converted.folder).problems
    assert any(f"quarantine.jsonl: {fault}" in problem for problem in problems), problems


def test_the_handmade_rows_are_as_long_as_they_say():
    assert [sum(n for _, spans in row for n, _, _ in spans) for shard in PACKED for row in shard] == [200, SEQ_LEN, 226]
