"""Folders in the GLM layout: what verification finds, what is read and drawn, what chat feeds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from ismdata.cli.main import app
from ismdata.convert.pipeline import convert
from ismdata.data.collate import Collator
from ismdata.data.dataset import PackedDataset
from ismdata.data.index import write_index
from ismdata.data.invariants import RowFormat, Rows, check_rows
from ismdata.data.problems import Problems
from ismdata.data.shards import PackedShards, packed_schema
from ismdata.data.verification import verify
from ismdata.errors import DataError, UsageError
from ismdata.masks.glm_positions import block_positions, token_positions
from ismdata.rendering.conversation_encoder import ConversationEncoder
from ismdata.rendering.glm_tokens import (
    GlmTokens,
    insert_glm_tokens_in_blocks,
)
from tests.pack.test_glm_layout import converted as converted
from tests.pack.test_glm_layout import documents as documents
from tests.pack.test_glm_layout import glm_tokenizer as glm_tokenizer
from tests.pack.test_glm_layout import packed as packed
from tests.pack.test_glm_layout import talk as talk

# -- verification ------------------------------------------------------------------------------------------------------


def rows_of(shards: PackedShards) -> tuple[Rows, RowFormat]:
    index = shards.index
    row_format = RowFormat(
        seq_len=shards.seq_len,
        mask=shards.mask,
        weighted=shards.weighted,
        vocab_size=index["tokenizer"]["vocab_size"],
        pad_id=index["tokenizer"]["pad_id"],
        schema=packed_schema(shards.seq_len, weighted=shards.weighted, layout="glm"),
        glm=(index["glm_tokens"]["mask"], index["glm_tokens"]["start"]),
    )
    batch = shards.table(0).combine_chunks().to_batches()[0]
    return Rows.of(batch, 0, row_format), row_format


def broken(shards: PackedShards, column: str, at: Any, value: int) -> list[str]:
    rows, row_format = rows_of(shards)
    changed = getattr(rows, column).copy()
    changed[at] = value
    problems = Problems()
    check_rows(Path("shard"), replace(rows, **{column: changed}), row_format, problems)
    return problems.sentences()


def test_verification_names_what_is_wrong(tmp_path, converted, glm_tokenizer):
    shards = packed(tmp_path / "glm", converted, glm_tokenizer)
    sequence = shards[0]
    start_id, mask_id = shards.index["glm_tokens"]["start"], shards.index["glm_tokens"]["mask"]
    start = int(np.flatnonzero(sequence.input_ids == start_id)[0])
    first = int(sequence.position_ids[start])
    assert broken(shards, "position_ids_2", start, 7) == [
        f"shard: row 0, token {start}: position_ids_2 is 7; expected 1"
    ]
    assert broken(shards, "position_ids", start, 0) == [
        f"shard: row 0, token {start}: position_ids is 0; expected {first}"
    ]
    for place in (start, start - 1):
        (found,) = broken(shards, "input_ids", place, 5)
        assert f"expected [START] ({start_id}) as an untrained span of one token, after [MASK] ({mask_id})" in found
    number = int(np.flatnonzero(sequence.spans[:, 0] == start)[0])
    assert any("untrained span" in sentence for sentence in broken(shards, "spans", (number, 3), 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "other"}, "layout is 'other'; expected one of plain, glm"),
        ({"glm_tokens": {"mask": 3}}, "expected mask and start, ids in the vocabulary"),
        ({"glm_tokens": {"mask": 3, "start": 10**6}}, "expected mask and start, ids in the vocabulary"),
        ({"layout": "plain"}, "columns are"),
    ],
    ids=["name", "missing", "beyond", "columns"],
)
def test_verification_of_the_index(changes, message, tmp_path, converted, glm_tokenizer):
    index = packed(tmp_path / "glm", converted, glm_tokenizer).index | changes
    write_index(tmp_path / "glm", {name: value for name, value in index.items() if name != "sha256"})
    assert any(message in problem for problem in verify(tmp_path / "glm").problems)


# -- reading and looking -----------------------------------------------------------------------------------------------


def test_the_batch_has_both_positions(tmp_path, converted, glm_tokenizer):
    packed(tmp_path / "glm", converted, glm_tokenizer)
    packed(tmp_path / "plain", converted, glm_tokenizer, layout="plain")
    dataset, plain = PackedDataset(tmp_path / "glm"), PackedDataset(tmp_path / "plain")
    assert (dataset.layout, plain.layout) == ("glm", "plain")
    batch = Collator()([dataset[0]])
    assert batch["position_ids_2"].tolist() == [dataset[0].sequence.position_ids_2.tolist()]
    assert str(batch["position_ids_2"].dtype) == "torch.int64"
    assert "position_ids_2" not in Collator()([plain[0]])
    with pytest.raises(UsageError, match="GLM layout and others in the plain layout"):
        Collator()([dataset[0], plain[0]])


def test_plain_shards_say_nothing_of_layouts(tmp_path, converted, glm_tokenizer):
    packed(tmp_path / "plain", converted, glm_tokenizer, layout="plain")
    index = json.loads((tmp_path / "plain" / "index.json").read_text(encoding="utf-8"))
    assert "layout" not in index and "glm_tokens" not in index
    table = pa.ipc.open_stream(tmp_path / "plain" / "shard-00000.arrow").read_all()
    assert "position_ids_2" not in table.schema.names
    assert "glm" not in json.loads((tmp_path / "plain" / "tokenizer" / "ismdata_template.json").read_text())


def test_inspect_shows_layout_and_positions(tmp_path, converted, glm_tokenizer):
    shards = packed(tmp_path / "glm", converted, glm_tokenizer)
    facts = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "glm"), "--json"]).stdout)
    assert facts["layout"] == "glm"
    plain = packed(tmp_path / "plain", converted, glm_tokenizer, layout="plain")
    same = json.loads(CliRunner().invoke(app, ["inspect", str(plain.folder), "--json"]).stdout)
    assert facts["answers"] == same["answers"]  # [START] is no answer
    row = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "glm"), "--row", "0", "--json"]).stdout)
    span = next(span for span in row["documents"][0]["spans"] if span["train"])
    sequence = shards[0]
    for name, column in (("position_1", sequence.position_ids), ("position_2", sequence.position_ids_2)):
        assert span[name] == [column[span["start"]], column[span["end"] - 1]]
    drawn = CliRunner().invoke(app, ["inspect", str(tmp_path / "glm"), "--row", "0"]).stdout
    assert f"({span['position_1'][0]} | {span['position_2'][0]}–{span['position_2'][1]})" in drawn


# -- what chat feeds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", ["append", "expand"])
@pytest.mark.parametrize("mask", ["ism", "prefix"])
def test_marked_blocks_are_what_pack_writes(mask, history, tmp_path, converted, glm_tokenizer):
    """A conversation fed in blocks, through [START], is the beginning of what `pack` makes of it."""
    source = tmp_path / "one.jsonl"
    source.write_text(json.dumps({"id": "one", "messages": talk(3, "n")}) + "\n")
    convert([str(source)], tmp_path / "converted")
    shards = packed(tmp_path / "glm", tmp_path / "converted", glm_tokenizer, mask=mask, history=history)
    document = max(documents(shards).values(), key=lambda each: len(each["ids"]))
    encoder = ConversationEncoder.load(tmp_path / "glm" / "tokenizer")
    assert encoder.glm == GlmTokens(
        mask_id=shards.index["glm_tokens"]["mask"],
        start_id=shards.index["glm_tokens"]["start"],
        every_answer=mask != "prefix",
    )
    blocks = insert_glm_tokens_in_blocks(encoder.blocks(talk(3, "n")[:-1]), encoder.glm)
    ids = [id for _, block in blocks for id in block]
    assert ids == document["ids"][: len(ids)]
    assert ids[-1] == encoder.glm.start_id
    assert document["targets"][len(ids)] == 1
    first, second = block_positions(blocks)
    assert (first, second) == (document["first"][: len(ids)], document["second"][: len(ids)])
    rest = len(document["ids"]) - len(ids)
    answer = [k for k in range(rest) if document["second"][len(ids) + k] > 0]
    ones, twos = token_positions(len(ids), len(answer), start=len(ids) - 1)
    assert ones == document["first"][len(ids) : len(ids) + len(answer)]
    assert twos == document["second"][len(ids) : len(ids) + len(answer)]


def test_answers_in_a_row_and_one_that_opens_get_a_context_each():
    glm = GlmTokens(mask_id=8, start_id=9, every_answer=True)
    assert insert_glm_tokens_in_blocks([(True, [1]), (True, [2]), (False, [3])], glm) == [
        (False, [8]),
        (True, [9, 1]),
        (False, [8]),
        (True, [9, 2]),
        (False, [3, 8]),
        (True, [9]),
    ]
    assert insert_glm_tokens_in_blocks([(False, [1]), (True, [2]), (False, [3])], replace(glm, every_answer=False)) == [
        (False, [1, 2, 3, 8]),
        (True, [9]),
    ]


def test_a_broken_settings_file_is_a_plain_folder(tmp_path, converted, glm_tokenizer):
    packed(tmp_path / "plain", converted, glm_tokenizer, layout="plain")
    assert ConversationEncoder.load(tmp_path / "plain" / "tokenizer").glm is None
    with pytest.raises(DataError):
        ConversationEncoder.load(tmp_path)
