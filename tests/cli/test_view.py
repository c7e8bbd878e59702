"""Views: facts counted again in the plainest way, and drawings that lose nothing without colours."""

from __future__ import annotations

import io
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ismdata import display
from ismdata.cli.views import folders as view
from ismdata.cli.views import reports
from ismdata.cli.views import row as row_view
from ismdata.data.shards import PackedShards
from ismdata.data.verification import verify
from ismdata.errors import DataError, UsageError
from tests.support import oracle
from tests.support.handmade import PACKED, SEQ_LEN, ConvertedFolder, PackedFolder


@pytest.fixture
def packed(tmp_path):
    return PackedFolder(tmp_path / "packed")


@pytest.fixture
def converted(tmp_path):
    return ConvertedFolder(tmp_path / "converted")


def words(ids):
    """Stands in for a tokenizer: token 5 is `w5`, and every tenth a line break."""
    return " ".join("\n" if token % 10 == 0 else f"w{token}" for token in ids)


def drawn(shown, *, terminal=False, width=160):
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system="truecolor" if terminal else None
    )
    console.print(shown)
    return console.file.getvalue()


def row(folder, number):
    return view.row(folder, number, decode=lambda: words)


def test_a_packed_folder_is_counted(packed):
    found = view.summary(packed.folder)
    assert found["documents"] == 6
    assert found["fill"] == (200 + 256 + 226) / (3 * SEQ_LEN)
    assert found["target_share"] == packed.index["totals"]["target_tokens"] / found["tokens"]
    documents = [spans for shard in PACKED for documents in shard for _, spans in documents]
    for name, values in (
        ("lengths", [sum(length for length, _, _ in spans) for spans in documents]),
        ("answers", [sum(kind == oracle.ANSWER for _, kind, _ in spans) for spans in documents]),
    ):
        for bar in found[name]:
            assert bar["count"] == sum(bar["from"] <= value <= bar["to"] for value in values)
        assert sum(bar["count"] for bar in found[name]) == len(documents)
    assert found["first_refusals"] == {
        "no_target": {"source": "a.jsonl:1", "detail": "so"},
        "over_long": {"source": "a.jsonl:2", "detail": "so"},
    }


def test_a_converted_folder_is_counted(converted):
    found = view.summary(converted.folder)
    assert found["conversations"] == 2
    assert found["messages"] == 6
    assert found["roles"] == {"user": 2, "assistant": 3, "tool": 1}
    # user, call, tool, answer: a call and its result are part of the assistant's one turn
    assert found["turns"] == [{"from": 2, "to": 2, "count": 2}]
    assert found["quarantined"] == {"unknown_role": 1}
    assert found["first_refusals"]["unknown_role"]["source"] == "a.jsonl:9"


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_histograms_count_everything_once(values):
    bars = view.histogram(np.array(values))
    assert [bar["count"] for bar in bars] == [sum(b["from"] <= v <= b["to"] for v in values) for b in bars]
    assert sum(bar["count"] for bar in bars) == len(values)
    assert all(one["to"] + 1 == other["from"] for one, other in itertools.pairwise(bars))


def test_what_is_drawn_without_colours(packed, converted):
    text = drawn(view.folder_summary(packed.folder))
    assert "mask ism · 256 tokens per sequence · tokenizer t" in text
    assert "lower bound 3 · × 1.0000" in text
    assert "88.8% of all positions filled" in text
    assert "quarantine  2 of 7 read" in text
    assert "\x1b" not in text
    text = drawn(view.folder_summary(converted.folder))
    assert "a.jsonl:9: so" in text
    assert "a message has a role that is not known and not mapped with --role" in text


def test_bars_are_in_proportion():
    assert display.bar(1.0, 8) == "█" * 8
    assert display.bar(0.5, 8) == "█" * 4
    assert display.bar(0.5 + 1 / 64, 8) == "█" * 4 + "▏"
    assert display.bar(1e-9, 8) == "▏"
    assert display.bar(0.0, 8) == ""


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_row_says_every_token_once(packed, number):
    facts = row(packed.folder, number).as_json()
    sequence = PackedShards(packed.folder)[number]
    spans = [span for document in facts["documents"] for span in document["spans"]]
    assert [[span["start"], span["end"]] for span in spans] == sequence.spans[:, :2].tolist()
    texts = [run["text"] for span in spans for run in span["runs"]]
    used = int(sequence.seq_lens.sum())
    assert " ".join(texts) == words(sequence.input_ids[:used].tolist())
    targets = [run["target"] for span in spans for run in span["runs"] for _ in run["text"].split(" ")]
    assert targets == sequence.loss_mask[:used].astype(bool).tolist()
    assert [document["conversation_id"] for document in facts["documents"]] == sequence.conversation_ids
    json.dumps(facts)


def test_a_row_without_colours_keeps_its_meaning(packed):
    text = drawn(row(packed.folder, 2))
    assert "row 2 of 3  3 documents · 256 tokens · 109 targets · 30 padding" in text
    assert [name for name in ("c#1", "d", "e") if f"· {name} · " in text] == ["c#1", "d", "e"]
    labels = [
        line.split()[0] for line in text.splitlines() if line.strip() and line.split()[0].rstrip("●○") in row_view.KINDS
    ]
    assert labels[:-1] == [
        *("prompt", "query", "answer●"),
        *("query", "answer○", "query", "answer●"),
        *("query", "answer●"),
    ]
    assert labels[-1] == "prompt"  # the legend
    assert "padding · 30 tokens" in text
    assert "\x1b" not in text


def test_targets_are_underlined_on_a_terminal(packed):
    text = drawn(row(packed.folder, 0), terminal=True)
    underlined_green, plain_blue = "\x1b[4;32m", "\x1b[34m"
    assert f"{underlined_green}w32" in text
    assert f"{plain_blue}w12" in text


def test_a_corpus_cannot_drive_the_terminal(packed):
    def hostile(ids):
        return "\x1b[2J\x07\x9b31m\r[bold]x[/bold]"

    shown = view.row(packed.folder, 0, decode=lambda: hostile)
    text = drawn(shown)
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(text)
    assert "␛[2J␇�31m␍[bold]x[/bold]" in text


@pytest.mark.parametrize("mask", ["ism", "causal", "prefix"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_drawn_mask_is_the_mask(packed, mask, number):
    """Cells against the share of visible pairs, counted pair by pair; 256 tokens, so 4 by 4 a cell."""
    sequence = PackedShards(packed.folder)[number]
    documents = [spans for _, spans in [row for shard in PACKED for row in shard][number]]
    visible = np.zeros((SEQ_LEN, SEQ_LEN), bool)
    for token, keys in enumerate(oracle.Row(documents, SEQ_LEN).visible(mask)):
        visible[token, keys] = True
    beyond = visible & np.triu(np.ones_like(visible), 1)
    cells = visible.reshape(64, 4, 64, 4).sum((1, 3))
    cells_beyond = beyond.reshape(64, 4, 64, 4).sum((1, 3))
    seen, ahead = row_view.mask_cells(sequence, mask=mask, seq_len=SEQ_LEN)
    assert (seen == (cells >= 8)).all()
    assert (ahead == ((cells >= 8) & (2 * cells_beyond >= cells))).all()
    assert ahead.any() == (mask != "causal")


def test_the_mask_in_half_blocks(packed):
    sequence = PackedShards(packed.folder)[0]
    seen, _ = row_view.mask_cells(sequence, mask="ism", seq_len=SEQ_LEN)
    lines = [line.strip()[1:-1] for line in drawn(row(packed.folder, 0)).splitlines() if line.strip().startswith("│")]
    upper, lower = {"█": (1, 1), "▀": (1, 0), "▄": (0, 1), " ": (0, 0)}, len(lines)
    assert lower == 32
    rows = [[upper[sign][half] for sign in line] for line in lines for half in (0, 1)]
    assert rows == seen.astype(int).tolist()


@pytest.mark.parametrize("number", [-1, 3])
def test_a_row_that_is_not_there(packed, number):
    with pytest.raises(UsageError, match=rf"--row {number}: .* has 3 rows; expected 0 to 2"):
        row(packed.folder, number)


def test_what_is_no_folder_of_ours(tmp_path, converted):
    with pytest.raises(DataError, match=r"found nothing; expected a folder that `ismdata convert` or"):
        view.folder_summary(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"expected 'ismdata\.packed/1'"):
        row(converted.folder, 0)
    (converted.folder / "conversations-00000.arrow").unlink()
    with pytest.raises(DataError, match="missing"):
        view.folder_summary(converted.folder)


def test_a_verification_is_shown(packed):
    shown = reports.verify_report(verify(packed.folder))
    assert shown.as_json()["ok"] is True
    assert drawn(shown).startswith("✓ sound")
    packed.rows[0][0]["position_ids"][4] = 9
    packed.write()
    shown = reports.verify_report(verify(packed.folder))
    assert shown.as_json()["ok"] is False
    assert "✗ 1 problem in" in drawn(shown)
    assert "row 0, token 4: position_ids is 9; expected 4" in drawn(shown, width=300)
