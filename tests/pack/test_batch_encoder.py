"""Documents of a batch against each conversation rendered individually, on random and on hostile text."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ismdata.conversation import CONVERSATION_SCHEMA
from ismdata.masks.intervals import ANSWER
from ismdata.pack.batch_encoder import BatchEncoder, prefetch
from ismdata.pack.conversation_batch import ConversationBatch
from ismdata.pack.documents import make_documents
from ismdata.pack.options import PackOptions
from ismdata.pack.requests import Requests
from ismdata.pack.skeleton_cache import SkeletonCache
from ismdata.pack.splitting import TurnRange, split, split_turns
from ismdata.pack.token_runs import as_runs, take_runs
from ismdata.rendering.encoding import Encoding
from ismdata.rendering.messages import as_template_messages
from ismdata.rendering.refusals import CannotRender
from tests.conftest import encoding, template_named

#: Text that templates or tokenizers could take for something else, between ordinary words.
FRAGMENTS = [
    "Hello",
    " ",
    "\n",
    "\n\n",
    "你好",
    "é",
    "a  b",
    "<|im_end|>",
    "<|im_start|>user\n",
    "</think>",
    "<think>",
    "{{",
    "\t",
]
FRAGMENTS += [
    "<|eot_id|>",
    "<end_of_turn>",
    "\u2003",
    "\ue000",
    "0\ue001",
    "x" * 40,
    "👩‍👩‍👧",
    "\x00",
    "<s>",
    "\U000f0000",
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)
roles = st.sampled_from(["user", "assistant"])


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    head = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    if draw(st.booleans()):
        body = [{"role": ("user", "assistant")[k % 2], "content": draw(texts)} for k in range(draw(st.integers(1, 7)))]
    else:
        body = [{"role": draw(roles), "content": draw(texts)} for _ in range(draw(st.integers(1, 5)))]
    if draw(st.integers(0, 5)) == 0:
        body[-1]["name"] = "Bo"
    return {"id": "c", "source": "test:1", "messages": head + body}


def whole(batch: Any) -> Requests:
    count = len(batch)
    return Requests(
        conversation=np.arange(count),
        head=batch.heads,
        lo=batch.heads,
        hi=np.diff(batch.first),
        target_from=np.zeros(count, np.int64),
        cut=np.zeros(count, bool),
    )


def reference(
    with_: Encoding, batch: Any, requests: Requests, r: int
) -> tuple[list[int], list[tuple[int, ...]]] | None:
    """Tokens and (start, end, kind, answered message) of a document rendered individually; None if it is refused."""
    c = int(requests.conversation[r])
    messages, tools = as_template_messages(batch.conversation(c))
    head, lo, hi = int(requests.head[r]), int(requests.lo[r]), int(requests.hi[r])
    try:
        pieces = with_.document(messages[:head] + messages[lo:hi], tools)
    except CannotRender:
        return None
    if requests.cut[r]:
        last = max(piece.span for piece in pieces if piece.kind == ANSWER)
        pieces = tuple(piece for piece in pieces if piece.span <= last)
    ids: list[int] = []
    spans: list[tuple[int, ...]] = []
    for span in sorted({piece.span for piece in pieces}):
        start = len(ids)
        for piece in pieces:
            if piece.span == span:
                ids += piece.ids or ()
                kind, message = piece.kind, piece.message
        if len(ids) > start:
            spans.append((start, len(ids), kind, message))
    return ids, spans


def check(with_: Encoding, batch: Any, requests: Requests, encoder: BatchEncoder) -> int:
    layout = encoder.lay_out(requests)
    documents = encoder.documents(layout, requests)
    assert encoder.stray_controls(layout, documents).size == 0
    token_ends, span_ends = np.cumsum(documents.lengths), np.cumsum(documents.span_counts)
    compared = 0
    for r in range(len(requests)):
        expected = reference(with_, batch, requests, r)
        if expected is None:
            assert r in layout.refused
            assert documents.lengths[r] == 0
            continue
        assert r not in layout.refused
        ids, spans = expected
        assert documents.input_ids[token_ends[r] - documents.lengths[r] : token_ends[r]].tolist() == ids
        found = documents.spans[span_ends[r] - documents.span_counts[r] : span_ends[r]]
        assert [tuple(row) for row in found[:, :3].tolist()] == [span[:3] for span in spans]
        head, lo = int(requests.head[r]), int(requests.lo[r])
        for row, (_, _, kind, message) in zip(found.tolist(), spans, strict=True):
            in_conversation = message if message < head else message - head + lo
            assert bool(row[3]) == (kind == ANSWER and in_conversation >= requests.target_from[r])
        compared += 1
    return compared


TEMPLATES = ["chatml", "qwen3", "llama3", "gemma3", "phi3", "glm4moe", "idefics3"]
if sys.version_info >= (3, 11):  # trl 1.14, the last one for Python 3.10, does not ship it
    TEMPLATES.append("smolvlm")


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_columns_equal_the_reference(name: str, smollm2: Path) -> None:
    with_ = encoding(smollm2) if name == "chatml" else encoding(smollm2, template_named(name), markers=True)
    cache = SkeletonCache(with_)
    compared = 0

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(conversations(), min_size=1, max_size=5))
    def run(rows: list[dict[str, Any]]) -> None:
        nonlocal compared
        batch = ConversationBatch.from_rows(
            pa.RecordBatch.from_pylist(rows, schema=CONVERSATION_SCHEMA), with_.sensitivity
        )
        compared += check(with_, batch, whole(batch), BatchEncoder(cache, batch))
        with ThreadPoolExecutor(1) as thread:
            prefetched = prefetch(cache, batch, whole(batch), thread)
            prefetch(cache, batch, whole(batch).take(np.arange(1)), thread)  # the next batch, before this one is used
            compared += check(with_, batch, whole(batch), BatchEncoder(cache, batch, prefetched))

    run()
    assert compared > 20


@pytest.mark.parametrize("history", ["append", "expand"])
def test_ranges_of_messages(history: Any, smollm2: Path) -> None:
    """Documents that repeat the system prompt and begin anywhere, one per answer, with or without the text after it."""
    with_ = encoding(smollm2, template_named("qwen3"), history, markers=True)
    cache = SkeletonCache(with_)
    rows = []
    for k in range(4):
        head = [{"role": "system", "content": "Be brief."}] if k % 2 else []
        talk = [
            {"role": ("user", "assistant")[n % 2], "content": f"{n} of {k} {'</think>' * (k == 3)}"} for n in range(8)
        ]
        rows.append({"id": str(k), "source": f"t:{k}", "messages": head + talk})
    batch = ConversationBatch.from_rows(pa.RecordBatch.from_pylist(rows, schema=CONVERSATION_SCHEMA), with_.sensitivity)
    table = [
        (c, head, head + 2 * a, head + 2 * b + 2, head + 2 * b + 1)
        for c in range(4)
        for a in range(4)
        for b in range(a, 4)
        for head in [int(batch.heads[c])]
    ]
    columns = np.array(table, np.int64).T
    requests = Requests(
        conversation=columns[0],
        head=columns[1],
        lo=columns[2],
        hi=columns[3],
        target_from=columns[4],
        cut=np.full(len(table), history == "append"),
    )
    assert check(with_, batch, requests, BatchEncoder(cache, batch)) == len(table)
    with ThreadPoolExecutor(1) as thread:  # the texts of some documents are prefetched, the others encoded on request
        begun = np.arange(0, len(table), 3)
        encoder = BatchEncoder(cache, batch, prefetch(cache, batch, requests.take(begun), thread))
        assert check(with_, batch, requests, encoder) == len(table)
        for asked in (begun, begun[::-1], np.array([begun[2], 1, begun[2], begun[0]]), begun[:0]):
            assert check(with_, batch, requests.take(asked), encoder) == len(asked)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_long_conversations(name: str, smollm2: Path) -> None:
    """Answers found in one rendering of a long conversation are those found in one rendering per answer."""
    with_ = encoding(smollm2) if name == "chatml" else encoding(smollm2, template_named(name), markers=True)
    rows = []
    for k, shape in enumerate(["ua" * 20, "s" + "ua" * 20, "ua" * 20 + "u", "a" + "ua" * 20, "uua" * 14, "uaa" * 14]):
        roles = {"s": "system", "u": "user", "a": "assistant"}
        talk = [{"role": roles[letter], "content": f"{n} \n"} for n, letter in enumerate(shape)]
        rows.append({"id": str(k), "source": f"t:{k}", "messages": talk})
    batch = ConversationBatch.from_rows(pa.RecordBatch.from_pylist(rows, schema=CONVERSATION_SCHEMA), with_.sensitivity)
    assert check(with_, batch, whole(batch), BatchEncoder(SkeletonCache(with_), batch)) >= 3


def test_each_text_is_encoded_once_per_batch(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K documents of a conversation do not encode its text K times."""
    with_ = encoding(smollm2)
    rows = [
        {
            "id": "0",
            "source": "t:0",
            "messages": [{"role": ("user", "assistant")[n % 2], "content": f"text {n}"} for n in range(12)],
        }
    ]
    batch = ConversationBatch.from_rows(pa.RecordBatch.from_pylist(rows, schema=CONVERSATION_SCHEMA), with_.sensitivity)
    answers = np.arange(1, 12, 2)
    nothing = np.zeros(6, np.int64)
    requests = Requests(
        conversation=nothing, head=nothing, lo=nothing, hi=answers + 1, target_from=answers, cut=nothing == 0
    )
    cache = SkeletonCache(with_)
    BatchEncoder(cache, batch).lay_out(requests)  # skeletons are built here
    encoder = BatchEncoder(cache, batch)
    encoded: list[str] = []
    original = cache.backend.encode
    monkeypatch.setattr(
        cache.backend,
        "encode",
        lambda texts, opening: (encoded.extend(texts), original(texts, opening=opening))[1],
    )
    encoder.lay_out(requests)
    encoder.lay_out(requests.take(np.arange(6)[::-1]))
    assert len(encoded) == len(set(encoded)) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rendered"), [("llama3_1", 0), ("qwen3", 0), ("gemma4", 0), ("phi3", 0), ("glm4moe", 1), ("cohere2", 1)]
)
def test_messages_without_text(name: str, rendered: int, smollm2: Path) -> None:
    """They are rendered individually only if the template writes something else around them."""
    with_ = encoding(smollm2, template_named(name), markers=True)
    rows = []
    for k, blank in enumerate(("", " ", "\n", " \n\t")):
        for at in range(6):
            talk = [{"role": ("user", "assistant")[n % 2], "content": f"{n}."} for n in range(6)]
            talk[at]["content"] = talk[-at]["content"] = blank
            rows.append({"id": f"{k} {at}", "source": "t:0", "messages": talk})
    batch = ConversationBatch.from_rows(pa.RecordBatch.from_pylist(rows, schema=CONVERSATION_SCHEMA), with_.sensitivity)
    assert set(batch.individual.tolist()) == {bool(rendered)}
    assert check(with_, batch, whole(batch), BatchEncoder(SkeletonCache(with_), batch)) == len(rows)


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6), st.data())
def test_take_runs(runs: list[list[int]], data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, len(runs) - 1), max_size=12)) if runs else []
    pool = np.array([id for run in runs for id in run], np.int32)
    found = take_runs(as_runs(pool, np.array([len(run) for run in runs], np.int64)), np.array(numbers, np.int64))
    assert found.tolist() == [id for number in numbers for id in runs[number]]


def test_documents_of_runs_that_were_added_later(smollm2: Path) -> None:
    """Within a batch, when new roles and texts add runs, and in the next batch, which has as many runs of its own."""
    with_ = encoding(smollm2)

    def batch_of(name: str) -> ConversationBatch:
        pair = [{"role": "user", "content": f"{name} asks"}, {"role": "assistant", "content": f"{name} answers"}]
        talks = [
            pair,
            [{"role": "system", "content": f"be {name}"}, *pair, *pair],
            [*pair, {**pair[0], "role": "tool"}],
        ]
        rows = [{"id": f"{name}{k}", "source": f"t:{k}", "messages": talk} for k, talk in enumerate(talks)]
        return ConversationBatch.from_rows(
            pa.RecordBatch.from_pylist(rows, schema=CONVERSATION_SCHEMA), with_.sensitivity
        )

    def ids(encoder: BatchEncoder, batch: ConversationBatch, row: int) -> list[int]:
        requests = whole(batch).take(np.array([row]))
        return encoder.documents(encoder.lay_out(requests), requests).input_ids.tolist()

    cache = SkeletonCache(with_)
    for name in ("Ada", "Bob"):
        batch = batch_of(name)
        used = BatchEncoder(cache, batch)
        for row in (0, 1, 2, 0):
            fresh = BatchEncoder(SkeletonCache(with_), batch)
            assert ids(used, batch, row) == ids(fresh, batch, row)


def test_known_pieces_are_not_looked_up_again(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that were prefetched need neither skeletons nor keys when they are laid out."""
    with_ = encoding(smollm2)
    cache = SkeletonCache(with_)
    talk = [{"role": ("user", "assistant")[n % 2], "content": f"text {n}"} for n in range(4)]
    rows = [{"id": str(k), "source": f"t:{k}", "messages": talk[: 2 + 2 * (k % 2)]} for k in range(6)]
    batch = ConversationBatch.from_rows(pa.RecordBatch.from_pylist(rows, schema=CONVERSATION_SCHEMA), with_.sensitivity)
    requests = whole(batch)
    with ThreadPoolExecutor(1) as thread:
        prefetched = prefetch(cache, batch, requests, thread)
    matched: list[int] = []
    match = cache.match
    monkeypatch.setattr(
        cache, "match", lambda batch, requests: (matched.append(len(requests)), match(batch, requests))[1]
    )
    encoder = BatchEncoder(cache, batch, prefetched)
    encoder.lay_out(requests)
    encoder.lay_out(requests.take(np.array([4, 1])))
    assert matched == []
    shorter = requests.take(np.array([0, 1]))
    shorter.hi[1] = 2
    encoder.lay_out(shorter)
    assert matched == [1]


@pytest.mark.parametrize(("seq_len", "times"), [(1024, 1), (128, 2)])
def test_documents_are_laid_out_again_only_if_some_changed(
    seq_len: int, times: int, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_ = encoding(smollm2)
    talk = [{"role": ("user", "assistant")[n % 2], "content": "word " * 60} for n in range(4)]
    rows = [{"id": "0", "source": "t:0", "messages": talk}]
    batch = ConversationBatch.from_rows(pa.RecordBatch.from_pylist(rows, schema=CONVERSATION_SCHEMA), with_.sensitivity)
    encoder = BatchEncoder(SkeletonCache(with_), batch)
    laid_out: list[int] = []
    lay_out = encoder.lay_out
    monkeypatch.setattr(encoder, "lay_out", lambda requests: (laid_out.append(len(requests)), lay_out(requests))[1])
    result = make_documents(encoder, PackOptions(tokenizer="", seq_len=seq_len, over_long="drop"))
    assert len(laid_out) == times
    assert len(result.names) == 2 - times


turn_lengths = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@given(turn_lengths, st.data(), st.integers(0, 4), st.integers(0, 2), st.integers(5, 30))
def test_split_turns(lengths: list[int], data: st.DataObject, prefix: int, extra: int, seq_len: int) -> None:
    targets = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))

    def size(first: int, last: int) -> int:
        return prefix + sum(lengths[first : last + 1]) + (extra if first else 0)

    pieces = split_turns(lengths, targets, prefix=prefix, seq_len=seq_len, extra=extra)
    wanted = [k for k, target in enumerate(targets) if target]
    if isinstance(pieces, int):
        assert targets[pieces]
        assert size(pieces, pieces) > seq_len
        return
    trained = [k for p in pieces for k in range(p.target, p.last + 1) if targets[k]]
    assert trained == wanted  # each exactly once, in order
    for piece in pieces:
        assert targets[piece.target]
        assert targets[piece.last]
        assert size(piece.first, piece.last) <= seq_len
        assert piece.first == 0 or size(piece.first - 1, piece.last) > seq_len  # as much history as fits
        following = [k for k in wanted if k > piece.last]
        assert not following or size(piece.target, following[0]) > seq_len  # as many targets as fit


def test_split_turns_omits_long_untrained_turns() -> None:
    pieces = split_turns([4, 50, 4], [True, False, True], prefix=1, seq_len=10)
    assert pieces == [TurnRange(first=0, last=0, target=0), TurnRange(first=2, last=2, target=2)]


@pytest.mark.parametrize("name", ["chatml", "gemma3", "phi3"])
def test_parts_fit_and_are_as_long_as_possible(name: str, smollm2: Path) -> None:
    """The length of a part is that of its own rendering, not of its turns inside the conversation."""
    with_ = encoding(smollm2) if name == "chatml" else encoding(smollm2, template_named(name), markers=True)
    rng = np.random.default_rng(0)
    rows = []
    for k in range(12):
        talk = [
            {"role": ("user", "assistant")[n % 2], "content": " ".join(["word"] * int(rng.integers(1, 30)))}
            for n in range(20)
        ]
        head = [{"role": "system", "content": "Be brief."}] if k % 2 else []
        rows.append({"id": str(k), "source": f"t:{k}", "messages": head + talk})
    batch = ConversationBatch.from_rows(pa.RecordBatch.from_pylist(rows, schema=CONVERSATION_SCHEMA), with_.sensitivity)
    encoder = BatchEncoder(SkeletonCache(with_), batch)
    requests = whole(batch)
    layout = encoder.lay_out(requests)
    seq_len = 160
    over = np.flatnonzero(layout.document_lengths(12) > seq_len)
    assert len(over) >= 10
    parts = split(encoder, requests, layout, over, seq_len)
    assert not parts.refused
    lengths = encoder.lay_out(parts.requests).document_lengths(len(parts.requests))
    assert lengths.max() <= seq_len
    check(with_, batch, parts.requests, encoder)
    for c in over.tolist():
        mine = np.flatnonzero(parts.requests.conversation == c)
        head = int(batch.heads[c])
        assert (parts.requests.head[mine] == head).all()  # every part repeats the system prompt
        answers = [k for k in range(head, int(requests.hi[c])) if batch.roles[batch.first[c] + k] == 2]
        trained = [k for r in mine for k in answers if parts.requests.target_from[r] <= k < parts.requests.hi[r]]
        assert trained == answers
        for r in mine.tolist():
            lo = int(parts.requests.lo[r])
            if lo > head:  # one more turn of history would not fit
                longer = parts.requests.take(np.array([r]))
                longer.lo[0] = lo - 2
                assert encoder.lay_out(longer).document_lengths(1)[0] > seq_len
