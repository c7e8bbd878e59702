"""The GLM layout: Figure 2 of the paper, inserted tokens and both positions against plain versions, packed folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from transformers import PreTrainedTokenizerFast

from ismdata import masks
from ismdata.convert.pipeline import convert
from ismdata.data.shards import PackedShards
from ismdata.data.verification import verify
from ismdata.errors import UsageError
from ismdata.masks.glm_positions import positions
from ismdata.masks.intervals import ANSWER, PROMPT, QUERY
from ismdata.pack.pipeline import pack
from ismdata.rendering.glm_tokens import (
    GlmTokens,
    insert_glm_tokens,
    insert_glm_tokens_in_pieces,
)
from ismdata.rendering.pieces import Piece
from tests.support.byte_tokenizer import save_tokenizer
from tests.support.paths import SCHEMAS, SHARED

GOLDEN = SHARED / "golden" / "glm_positions.json"
SCHEMA = SCHEMAS / "packed_index.schema.json"

#: The paper's Figure 2: (a) one answer after eight tokens of context, (b) two answers.
FIGURE_2 = [
    {
        "spans": [["query", 8], ["answer", 2]],
        "position_1": [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9],
        "position_2": [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3],
    },
    {
        "spans": [["query", 3], ["answer", 2], ["query", 3], ["answer", 2]],
        "position_1": [1, 2, 3, 4, 4, 4, 4, 8, 9, 10, 11, 11, 11, 11],
        "position_2": [0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0, 1, 2, 3],
    },
]
MASK_ID, START_ID = 900, 901


def golden_cases():
    cases = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else []
    return [*FIGURE_2, *cases]


def written(spans):
    """Spans of (kind, length) as `pack` writes them: start, end, kind, train."""
    table, at = [], 0
    for kind, length in spans:
        if kind == "answer":
            for part, part_kind, train in ((1, QUERY, 0), (1, ANSWER, 0), (length, ANSWER, 1)):
                table.append((at, at + part, part_kind, train))
                at += part
        else:
            table.append((at, at + length, QUERY, 0))
            at += length
    return at, table


def dumb_positions(document):
    """Token by token from the definition; `document` is a list of `context`, `mask`, `start`, `answer`."""
    first, second, of_mask, count = [], [], 0, 0
    for index, token in enumerate(document, 1):
        if token in ("context", "mask"):
            of_mask = index
            first.append(index)
            second.append(0)
        else:
            count = 1 if token == "start" else count + 1
            first.append(of_mask)
            second.append(count)
    return first, second


@pytest.mark.parametrize("case", golden_cases())
def test_figure_2(case):
    used, table = written(case["spans"])
    first, second = positions([used], table, seq_len=128)
    assert first.tolist() == case["position_1"] + [0] * (128 - used)
    assert second.tolist() == case["position_2"] + [0] * (128 - used)
    assert first.dtype == second.dtype == np.int32


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(["query", "answer"]), st.integers(1, 5)), min_size=1, max_size=6),
        min_size=1,
        max_size=4,
    )
)
def test_positions_of_packed_documents(documents):
    lengths, table, first, second = [], [], [], []
    for document in documents:
        used, spans = written(document)
        at = sum(lengths)
        table += [(start + at, end + at, kind, train) for start, end, kind, train in spans]
        lengths.append(used)
        names = []
        for kind, length in document:
            names += ["context"] * length if kind == "query" else ["mask", "start", *["answer"] * length]
        ones, twos = dumb_positions(names)
        first += ones
        second += twos
    rest = [0] * (256 - sum(lengths))
    found = positions(lengths, table, seq_len=256)
    assert [part.tolist() for part in found] == [first + rest, second + rest]


# -- putting the tokens in ---------------------------------------------------------------------------------------------

PIECES = st.lists(
    st.tuples(
        st.sampled_from([PROMPT, QUERY, ANSWER]),
        st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=2),
    ),
    max_size=6,
)


@given(st.lists(PIECES, min_size=1, max_size=4), st.booleans())
def test_the_columnar_insertion_is_the_plain_one(documents, every_answer):
    """Documents of spans of pieces, some of them empty, as columns and individually."""
    runs: list[list[int]] = [[MASK_ID], [START_ID]]
    rows, references = [], []
    for request, document in enumerate(documents):
        pieces = []
        for span, (kind, parts) in enumerate(document):
            message = span if kind == ANSWER else -1
            for ids in parts:
                runs.append(ids)
                rows.append((request, span, kind, message, len(runs) - 1, len(ids), 0))
                pieces.append(Piece(span=span, kind=kind, message=message, ids=tuple(ids)))
        glm = GlmTokens(mask_id=MASK_ID, start_id=START_ID, every_answer=every_answer)
        references.append(insert_glm_tokens_in_pieces(pieces, glm))
    names = ("request", "span", "kind", "message", "run", "length", "controls")
    table = np.array(rows, np.int64).reshape(-1, 7)
    columns = dict(zip(names, table.T, strict=True))
    found = insert_glm_tokens(columns, (0, 1), every_answer=every_answer)
    for request, reference in enumerate(references):
        of = found["request"] == request
        pieces = [
            (int(span), int(kind), int(message), runs[run], int(controls))
            for span, kind, message, run, controls in zip(
                *(found[name][of] for name in ("span", "kind", "message", "run", "controls")), strict=True
            )
        ]
        assert pieces == [(p.span, p.kind, p.message, list(p.ids or ()), p.controls) for p in reference]
        assert found["length"][of].tolist() == [len(ids) for _, _, _, ids, _ in pieces]
        assert np.all(np.diff(found["span"][of]) >= 0)


# -- packed folders ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glm_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("glm-tokenizer"), "[MASK]", "<sop>")


def talk(turns: int, name: str, **answer: Any) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": f"{name}{k}{role[0]} [MASK]<sop>", **(answer if role == "assistant" else {})}
        for k in range(turns)
        for role in ("user", "assistant")
    ]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Talks with text that looks like the two tokens: of several lengths, opened by the assistant, with an untrained
    answer, with a weight, with two answers in a row.
    """
    folder = tmp_path_factory.mktemp("talks")
    talks = [talk(k % 3 + 1, f"c{k}") for k in range(8)]
    talks.append([{"role": "system", "content": "Be kind."}, *talk(2, "s")[1:]])
    talks.append([*talk(1, "u", train=False), *talk(2, "t")])
    talks.append(talk(2, "w", weight=0.5))
    talks.append([*talk(1, "d"), {"role": "assistant", "content": "and more"}, {"role": "user", "content": "so?"}])
    lines = [json.dumps({"id": f"t-{k}", "messages": messages}) for k, messages in enumerate(talks)]
    (folder / "talks.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    convert([str(folder / "talks.jsonl")], folder / "converted")
    return folder / "converted"


def packed(folder: Path, converted: Path, tokenizer: Path, **options: Any) -> PackedShards:
    options = {"seq_len": 512, "layout": "glm", "overwrite": True} | options
    pack([converted], folder, tokenizer=str(tokenizer), chat_template="chatml", **options)
    assert verify(folder).problems == []
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    Draft202012Validator(json.loads(SCHEMA.read_text("utf-8"))).validate(index)
    return PackedShards(folder)


def documents(shards: PackedShards) -> dict[str, dict[str, Any]]:
    """By conversation id: tokens, spans with offsets in the document, targets, weights and positions."""
    found = {}
    for row in range(len(shards)):
        sequence = shards[row]
        start = 0
        for name, length in zip(sequence.conversation_ids, sequence.seq_lens.tolist(), strict=True):
            inside = slice(start, start + length)
            spans = sequence.spans[(sequence.spans[:, 0] >= start) & (sequence.spans[:, 0] < start + length)]
            found[name] = {
                "ids": sequence.input_ids[inside].tolist(),
                "spans": (spans - [start, start, 0, 0]).tolist(),
                "targets": sequence.loss_mask[inside].tolist(),
                "weights": sequence.loss_weight[inside].tolist() if sequence.loss_weight is not None else None,
                "first": sequence.position_ids[inside].tolist(),
                "second": None if sequence.position_ids_2 is None else sequence.position_ids_2[inside].tolist(),
            }
            start += length
    return found


def dumb_glm(plain: dict[str, Any], *, every_answer: bool, mask_id: int, start_id: int) -> dict[str, Any]:
    """A plain document in the GLM layout, from the words of the definition; spans as one kind a token."""
    answers = [span for span in plain["spans"] if span[2] == ANSWER]
    marked_ones = answers if every_answer else answers[-1:]
    ids, kinds, targets, weights, names = [], [], [], [], []
    for span in plain["spans"]:
        start, end, kind, _ = span
        if span in marked_ones:
            ids += [mask_id, start_id]
            kinds += [QUERY, ANSWER]
            targets += [0, 0]
            weights += [0.0, 0.0]
            names += ["mask", "start"]
        elif kind == ANSWER:
            kind = QUERY
        ids += plain["ids"][start:end]
        kinds += [kind] * (end - start)
        targets += plain["targets"][start:end]
        weights += plain["weights"][start:end]
        names += ["answer" if kind == ANSWER else "context"] * (end - start)
    first, second = dumb_positions(names)
    return {"ids": ids, "kinds": kinds, "targets": targets, "weights": weights, "first": first, "second": second}


@pytest.mark.slow
@pytest.mark.parametrize("history", ["append", "expand"])
@pytest.mark.parametrize("mask", masks.MASKS)
def test_packed_documents_are_the_plain_ones_with_the_tokens_in(mask, history, tmp_path, converted, glm_tokenizer):
    plain = documents(packed(tmp_path / "plain", converted, glm_tokenizer, mask=mask, history=history, layout="plain"))
    shards = packed(tmp_path / "glm", converted, glm_tokenizer, mask=mask, history=history)
    tokens = shards.index["glm_tokens"]
    assert shards.layout == shards.index["layout"] == "glm"
    found = documents(shards)
    assert found.keys() == plain.keys()
    for name, document in found.items():
        kinds = [kind for start, end, kind, _ in document["spans"] for _ in range(start, end)]
        expected = dumb_glm(
            plain[name], every_answer=mask != "prefix", mask_id=tokens["mask"], start_id=tokens["start"]
        )
        assert document | {"kinds": kinds} == expected | {"spans": document["spans"]}
        assert [end - start for start, end, kind, train in document["spans"] if kind == ANSWER and not train][:1] == [1]
    assert shards.index["totals"]["target_tokens"] == sum(sum(each["targets"]) for each in plain.values())


@pytest.mark.parametrize("mask", ["ism", "prefix"])
def test_no_target_is_seen_and_start_is_causal_under_ism(mask, tmp_path, converted, glm_tokenizer):
    shards = packed(tmp_path / "glm", converted, glm_tokenizer, mask=mask)
    start_id = shards.index["glm_tokens"]["start"]
    seen_by_context = 0
    for row in range(len(shards)):
        sequence = shards[row]
        _, kv_end = masks.intervals(sequence.seq_lens, sequence.spans, seq_len=512, mask=mask)
        target = np.flatnonzero(sequence.loss_mask)
        assert (kv_end[target - 1] <= target).all()
        start = np.flatnonzero(sequence.input_ids == start_id)
        assert (sequence.loss_mask[start] == 0).all()
        assert (kv_end[start] == start + 1).all()
        seen_by_context += int((kv_end[start - 1] > start).sum())
    assert (seen_by_context > 0) == (mask == "prefix")


@pytest.mark.slow
def test_over_long_conversations_are_split_and_every_answer_is_trained_once(tmp_path, glm_tokenizer):
    source = tmp_path / "long.jsonl"
    source.write_text(json.dumps({"id": "l", "messages": talk(30, "n")}) + "\n")
    convert([str(source)], tmp_path / "converted")
    plain = packed(tmp_path / "plain", tmp_path / "converted", glm_tokenizer, layout="plain", seq_len=2048)
    for over_long in ("split", "truncate"):
        for mask in ("ism", "prefix"):
            shards = packed(
                tmp_path / "glm", tmp_path / "converted", glm_tokenizer, mask=mask, over_long=over_long, seq_len=256
            )
            if over_long == "split":
                assert shards.index["totals"]["target_tokens"] == plain.index["totals"]["target_tokens"]
                assert shards.index["totals"]["split"] == 1


def test_skeletons_and_individual_rendering_give_the_same_shards(tmp_path, converted, glm_tokenizer):
    """A template that depends on contents is rendered for each conversation, to the same documents."""
    from ismdata.rendering.chat_template import built_in

    acting = tmp_path / "acting.jinja"
    acting.write_text(built_in("chatml") + "{% if messages[0].content == 'never' %}x{% endif %}")
    columnar = documents(packed(tmp_path / "a", converted, glm_tokenizer))
    pack(
        [converted], tmp_path / "b", tokenizer=str(glm_tokenizer), chat_template=str(acting), layout="glm", seq_len=512
    )
    assert verify(tmp_path / "b").problems == []
    assert documents(PackedShards(tmp_path / "b")) == columnar


# -- which tokens ------------------------------------------------------------------------------------------------------


def test_named_tokens_take_precedence(tmp_path, converted, glm_tokenizer):
    tokenizer = save_tokenizer(tmp_path / "tokenizer", "[gMASK]", "[MASK]", "<sop>", "<|other|>")
    ids = PreTrainedTokenizerFast.from_pretrained(str(tokenizer)).convert_tokens_to_ids
    found = packed(tmp_path / "a", converted, tokenizer).index["glm_tokens"]
    assert found == {"mask": ids("[gMASK]"), "start": ids("<sop>")}
    named = packed(tmp_path / "b", converted, tokenizer, glm_mask_token="[MASK]", glm_start_token="<|other|>")
    assert named.index["glm_tokens"] == {"mask": ids("[MASK]"), "start": ids("<|other|>")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"no token for \[MASK\].*--glm-mask-token \(there are: <\|im_start\|>\)"),
        ({"glm_mask_token": "a"}, "--glm-mask-token a: no control token of"),
        ({"glm_mask_token": "<|pad|>"}, "--glm-mask-token <|pad|>: .*padding".replace("|", r"\|")),
        ({"glm_mask_token": "<|im_start|>"}, r"no token for \[START\]"),
        ({"glm_mask_token": "<|im_start|>", "glm_start_token": "<|im_start|>"}, "expected two tokens"),
        ({"layout": "plain", "glm_mask_token": "a"}, "--glm-mask-token requires --layout glm"),
        ({"layout": "plain", "glm_start_token": "a"}, "--glm-start-token requires --layout glm"),
        ({"layout": "chatglm"}, "--layout is 'chatglm'; expected one of plain, glm"),
    ],
    ids=["none", "text", "pad", "half", "same", "plain-mask", "plain-start", "unknown"],
)
def test_invalid_tokens_are_refused(options, message, tmp_path, converted):
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(UsageError, match=message):
        packed(tmp_path / "out", converted, tokenizer, **options)
    assert not (tmp_path / "out").exists()
