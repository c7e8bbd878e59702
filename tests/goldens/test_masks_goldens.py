"""ismdata.masks against stored vectors, and the stored vectors against the script that makes them.

The definitions stand in `make_masks.py`. The GLM layout is checked through `pack`, which puts the two tokens in.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ismdata import masks
from ismdata.errors import DataError
from tests.goldens import make_masks, make_shard_bytes

STORED = json.loads(make_masks.STORED.read_text(encoding="utf-8"))


def by_name(cases: list) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in cases])


def arrays_of(case: dict) -> tuple[list[int], np.ndarray]:
    """Document lengths, and spans as int64[S, 4] of start, end, kind, train."""
    flat = [span for document in case["documents"] for span in document]
    ends = np.cumsum([length for _, length, _ in flat], dtype=np.int64)
    spans = [(end - length, end, kind, train) for (kind, length, train), end in zip(flat, ends, strict=True)]
    lengths = [sum(length for _, length, _ in document) for document in case["documents"]]
    return lengths, np.array(spans, np.int64).reshape(-1, 4)


def test_the_script_makes_the_stored_file() -> None:
    assert make_masks.text() == make_masks.STORED.read_text(encoding="utf-8"), (
        "masks.json is not what make_masks.py makes. Run `python -m tests.goldens.make_masks`, and say in the commit "
        "why the definitions or the cases have changed"
    )


def test_the_stored_cases_are_of_every_kind() -> None:
    """Every mask, kind of tile, kind of span, flag; rows with and without padding, and without documents."""
    assert masks.MASKS == ("ism", "causal", "prefix") and set(make_masks.MASKS) == set(masks.MASKS)
    cases = STORED["sequences"]
    assert len({case["name"] for case in cases}) == len(cases)
    tiles = "".join(tile for case in cases for mask in case["masks"].values() for tile in mask["tiles"])
    assert set(tiles) == set(".pf")
    spans = [tuple(span) for case in cases for document in case["documents"] for span in document]
    assert {(kind, train) for kind, _, train in spans} == {
        (kind, train) for kind in (0, 1, 2) for train in (False, True)
    }
    free = [case["seq_len"] - sum(arrays_of(case)[0]) for case in cases]
    assert 0 in free and any(0 < left < case["seq_len"] for left, case in zip(free, cases, strict=True))
    assert [] in [case["documents"] for case in cases]


@by_name(STORED["sequences"])
@pytest.mark.parametrize("mask", masks.MASKS)
def test_a_sequence(case: dict, mask: str) -> None:
    seq_lens, spans = arrays_of(case)
    seq_len, block_size, stored = case["seq_len"], case["block_size"], case["masks"][mask]
    doc_start, kv_end = masks.intervals(seq_lens, spans, seq_len=seq_len, mask=mask)
    assert doc_start.tolist() == case["doc_start"]
    assert kv_end.tolist() == stored["kv_end"]
    loss_mask = masks.targets(seq_lens, spans, seq_len=seq_len, mask=mask)
    assert "".join(map(str, loss_mask)) == stored["loss_mask"]
    assert masks.position_ids(seq_lens, seq_len=seq_len).tolist() == case["position_ids"]
    table = masks.block_table(doc_start, kv_end, block_size=block_size)
    assert table.tolist() == stored["block_table"]
    assert ["".join(row) for row in tiles_of(table)] == stored["tiles"]
    if "dense" in stored:
        assert ["".join(map(str, row)) for row in masks.dense(doc_start, kv_end).astype(int)] == stored["dense"]
    types = [array.dtype for array in (doc_start, kv_end, loss_mask, masks.position_ids([], seq_len=8), table)]
    assert types == [np.int32, np.int32, np.uint8, np.int32, np.int16]


def tiles_of(table: np.ndarray) -> list[list[str]]:
    """A block table as the stored file draws it."""
    drawn = [["."] * len(table) for _ in table]
    for row, (visible_lo, visible_hi, full_lo, full_hi) in zip(drawn, table.tolist(), strict=True):
        for column in range(visible_lo, visible_hi):
            row[column] = "f" if full_lo <= column < full_hi else "p"
    return drawn


def test_rows_laid_end_to_end() -> None:
    """`tile` cuts all sequences of one length at once into their spans and stretches of padding."""
    several = 0
    for seq_len, group in groupby(
        sorted(STORED["sequences"], key=lambda case: case["seq_len"]), lambda c: c["seq_len"]
    ):
        rows = list(group)
        several += len(rows) > 1
        pieces, document = [], 0
        for number, case in enumerate(rows):
            at = number * seq_len
            for spans in case["documents"]:
                first = at
                for kind, length, train in spans:
                    pieces.append((at, length, kind, int(train), document, first))
                    at += length
                document += 1
            if at < (number + 1) * seq_len:
                pieces.append((at, (number + 1) * seq_len - at, -1, 0, -1, at))
        arrays = [arrays_of(case) for case in rows]
        tiling = masks.tile(
            [len(lengths) for lengths, _ in arrays],
            [length for lengths, _ in arrays for length in lengths],
            [len(spans) for _, spans in arrays],
            np.concatenate([spans for _, spans in arrays]),
            seq_len=seq_len,
        )
        assert list(zip(*(column.tolist() for column in tiling), strict=True)) == pieces
        assert tiling._fields == ("start", "length", "kind", "train", "document", "document_start")
    assert several > 2


@by_name(STORED["refused"])
def test_spans_that_do_not_tile_are_refused(case: dict) -> None:
    for mask in masks.MASKS:
        with pytest.raises(DataError, match="row 0"):
            masks.intervals(case["seq_lens"], case["spans"], seq_len=case["seq_len"], mask=mask)
        with pytest.raises(DataError, match="row 0"):
            masks.targets(case["seq_lens"], case["spans"], seq_len=case["seq_len"], mask=mask)


# ---- the GLM layout, through pack ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[dict]]]:
    """For each mask, the documents that `pack --layout glm` makes of the stored ones: by conversation, in order.

    The template `bare.jinja` writes a message as one token per letter and one that ends it, with nothing around.
    """
    folder = tmp_path_factory.mktemp("glm")
    make_shard_bytes.prepare(folder)
    return {mask: packed_with(mask, folder) for mask in masks.MASKS}


def packed_with(mask: str, folder: Path) -> dict[str, list[dict]]:
    roles = {"query": "user", "answer": "assistant"}
    lines = []
    for case in STORED["glm"]:
        if case["mask"] == mask:
            messages = [{"role": roles[kind], "content": "z" * (length - 1)} for kind, length in case["spans"]]
            lines.append(json.dumps({"id": case["name"], "messages": messages}))
    (folder / f"{mask}.messages.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    convert = make_shard_bytes.Case(name=mask, arguments=("convert", f"{mask}.messages.jsonl"))
    make_shard_bytes.run(convert, folder, output=f"{mask}-converted")
    options = ("--chat-template", "bare.jinja", "--layout", "glm", "--mask", mask, "--seq-len", "128")
    pack = make_shard_bytes.pack(mask, f"{mask}-converted", *options)
    outcome = make_shard_bytes.run(pack, folder, output=f"{mask}-packed")
    assert outcome["quarantined"] == {}
    documents: dict[str, list[dict]] = {}
    for row in (
        pa.ipc.open_stream((folder / f"{mask}-packed" / "shard-00000.arrow").read_bytes()).read_all().to_pylist()
    ):
        at = 0
        for name, length in zip(row["conversation_ids"], row["seq_lens"], strict=True):
            inside = slice(at, at + length)
            document = {key: row[key][inside] for key in ("input_ids", "position_ids", "position_ids_2")}
            documents.setdefault(name.partition("#")[0], []).append(document)
            at += length
        for key in ("position_ids", "position_ids_2"):
            assert not any(row[key][at:])
    return documents


@by_name(STORED["glm"])
def test_glm_layout(case: dict, packed: dict[str, dict[str, list[dict]]]) -> None:
    made = packed[case["mask"]][case["name"]]
    if case["mask"] == "prefix":  # one document per answer: the longest is the whole conversation
        assert len(made) == sum(kind == "answer" for kind, _ in case["spans"])
    else:
        assert len(made) == 1
    document = max(made, key=lambda each: len(each["input_ids"]))
    tokenizer = make_shard_bytes.made_tokenizer((*make_shard_bytes.MARKERS, *make_shard_bytes.GLM_MARKERS))
    markers = {tokenizer.token_to_id("[MASK]"): "[MASK]", tokenizer.token_to_id("<sop>"): "[START]"}
    tokens = [markers.get(id, "text") for id in document["input_ids"]]
    assert tokens == [token if token in markers.values() else "text" for token in case["tokens"]]
    assert document["position_ids"] == case["position_1"]
    assert document["position_ids_2"] == case["position_2"]
