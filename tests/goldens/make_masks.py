"""Make masks.json: masks, targets, positions and block tables, computed token by token from their definitions.

    python -m tests.goldens.make_masks

Nothing here is fast and nothing is taken from the package, so that an agreement means something. A sequence is
written as its documents, a document as its spans `(kind, length, train)`. The definitions:

- Padding belongs to no document and sees itself alone. A token sees only tokens of its own document.
- Under every mask a token sees itself and what stands before it. Under `ism` it also sees all of its context block, a
  maximal run of spans that are not answers. Under `prefix` a token before the document's last answer also sees all
  else that stands before that answer; a document without answers sees all of itself.
- A token is a target if it lies in an answer that is to be trained and is not its document's first token. Under
  `prefix` only the document's last answer counts.
- Positions start at 0 in every document; padding is at position 0.
- GLM layout: `[MASK]` and `[START]` stand before each answer (under `prefix` before a document's last answer, the
  earlier ones being context). Position 1 of a context token or `[MASK]` is its index in the document, counted from 1;
  `[START]` and the answer have that of their `[MASK]`. Position 2 is 0 on context and `[MASK]`, and 1, 2, 3 … from
  `[START]` on.

The file holds three lists:

- `sequences`: `doc_start` and, per mask, `kv_end` (token `t` sees the keys `doc_start[t]` to `kv_end[t]`, half-open),
  `loss_mask`, `tiles` (a character per tile of block_size x block_size pairs: `.` none is seen, `p` some, `f` all) and
  `block_table` (per row of blocks: visible_lo, visible_hi, full_lo, full_hi). Short sequences have `dense` too.
- `refused`: spans that do not tile their documents.
- `glm`: `tokens` of one document with the two tokens put in, and both positions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STORED = Path(__file__).with_name("masks.json")

PROMPT, QUERY, ANSWER = 0, 1, 2
MASKS = ("causal", "ism", "prefix")

#: Sequences up to this length are also stored pair by pair.
DENSE = 16

#: One span: its kind, its length, whether it is to be trained.
Span = tuple[int, int, bool]
Document = Sequence[Span]


class Token(NamedTuple):
    """A token of a document: the numbers of its document, span and context block (-1 in an answer)."""

    document: int
    first: int  # the place of the document's first token
    span: int
    kind: int
    train: bool
    block: int


#: A place in a sequence: a token, or None for padding.
Place = Token | None


# ---- definitions -----------------------------------------------------------------------------------------------------


def places(documents: Sequence[Document], seq_len: int) -> list[Place]:
    """The sequence token by token, padded to `seq_len`."""
    laid: list[Place] = []
    span_number = block = 0
    for number, document in enumerate(documents):
        first = len(laid)
        before = ANSWER
        for kind, length, train in document:
            if kind != ANSWER and before == ANSWER:
                block += 1
            before = kind
            token = Token(number, first, span_number, kind, train, -1 if kind == ANSWER else block)
            laid += [token] * length
            span_number += 1
    return laid + [None] * (seq_len - len(laid))


def last_answers(laid: Sequence[Place]) -> dict[int, int]:
    """For each document that has an answer, the number of its last answer's span."""
    return {token.document: token.span for token in laid if token is not None and token.kind == ANSWER}


def sees(laid: Sequence[Place], t: int, u: int, mask: str, last: dict[int, int]) -> bool:
    """Whether the token at place `t` sees the one at place `u`."""
    row, key = laid[t], laid[u]
    if row is None or key is None:
        return t == u
    if row.document != key.document:
        return False
    if u <= t:
        return True
    if mask == "ism":
        return row.block != -1 and row.block == key.block
    if mask == "prefix":
        return row.document not in last or (row.span < last[row.document] and key.span < last[row.document])
    return False


def is_target(laid: Sequence[Place], t: int, mask: str, last: dict[int, int]) -> bool:
    token = laid[t]
    if token is None or token.kind != ANSWER or not token.train or t == token.first:
        return False
    return mask != "prefix" or token.span == last[token.document]


def tile_of(dense: Sequence[Sequence[bool]], row: int, column: int, size: int) -> str:
    """What the rows of one block see of the keys of another: `.` nothing, `p` some pairs, `f` all pairs."""
    pairs = [
        dense[t][u] for t in range(row * size, (row + 1) * size) for u in range(column * size, (column + 1) * size)
    ]
    return "f" if all(pairs) else "p" if any(pairs) else "."


def table_row(doc_start: Sequence[int], kv_end: Sequence[int], row: int, size: int) -> list[int]:
    """visible = [min(doc_start) / B, ceil(max(kv_end) / B)), full = [ceil(max(doc_start) / B), min(kv_end) / B)."""
    starts, ends = doc_start[row * size : (row + 1) * size], kv_end[row * size : (row + 1) * size]
    return [min(starts) // size, -(-max(ends) // size), -(-max(starts) // size), min(ends) // size]


def glm_document(spans: Sequence[tuple[str, int]], mask: str) -> dict[str, Any]:
    """A document of (`query` or `answer`, length) in the GLM layout, its tokens as words."""
    last = max(number for number, (kind, _) in enumerate(spans) if kind == "answer")
    tokens: list[str] = []
    for number, (kind, length) in enumerate(spans):
        if kind == "answer" and (mask != "prefix" or number == last):
            tokens += ["[MASK]", "[START]", *["answer"] * length]
        else:
            tokens += ["context"] * length
    position_1, position_2 = [], []
    of_mask = count = 0
    for index, token in enumerate(tokens, 1):
        if token in ("context", "[MASK]"):
            of_mask, count = index, 0
        else:
            count += 1
        position_1.append(of_mask)
        position_2.append(count)
    return {"tokens": tokens, "position_1": position_1, "position_2": position_2}


# ---- sequences -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A sequence to solve: its documents, what they leave of `seq_len` being padding."""

    name: str
    seq_len: int
    block_size: int
    documents: Sequence[Document]


def solved(row: Row) -> dict[str, Any]:
    """Everything that is stored for a sequence."""
    length, size = row.seq_len, row.block_size
    laid = places(row.documents, length)
    last = last_answers(laid)
    doc_start = [t if token is None else token.first for t, token in enumerate(laid)]
    masks = {}
    for mask in MASKS:
        dense = [[sees(laid, t, u, mask, last) for u in range(length)] for t in range(length)]
        kv_end = [max(u for u in range(length) if seen[u]) + 1 for seen in dense]
        loss_mask = [int(is_target(laid, t, mask, last)) for t in range(length)]
        check(dense, doc_start, kv_end, loss_mask)
        blocks = range(length // size)
        masks[mask] = {
            "kv_end": kv_end,
            "loss_mask": "".join(map(str, loss_mask)),
            "tiles": ["".join(tile_of(dense, high, wide, size) for wide in blocks) for high in blocks],
            "block_table": [table_row(doc_start, kv_end, high, size) for high in blocks],
        }
        if length <= DENSE:
            masks[mask]["dense"] = ["".join(str(int(pair)) for pair in seen) for seen in dense]
    return {
        "name": row.name,
        "seq_len": length,
        "block_size": size,
        "documents": row.documents,
        "position_ids": [0 if token is None else t - token.first for t, token in enumerate(laid)],
        "doc_start": doc_start,
        "masks": masks,
    }


def check(
    dense: Sequence[Sequence[bool]], doc_start: Sequence[int], kv_end: Sequence[int], loss_mask: Sequence[int]
) -> None:
    """Laws of every mask: a row sees one interval, a key is seen by one, no target is seen by the token before it."""
    length = len(dense)
    for t in range(length):
        assert [u for u in range(length) if dense[t][u]] == list(range(doc_start[t], kv_end[t]))
        rows = [row for row in range(length) if dense[row][t]]
        assert rows == list(range(rows[0], rows[-1] + 1))
        assert not loss_mask[t] or not dense[t - 1][t]


def prompt(length: int) -> Span:
    return PROMPT, length, False


def query(length: int) -> Span:
    return QUERY, length, False


def answer(length: int) -> Span:
    return ANSWER, length, True


def untrained(length: int) -> Span:
    """An answer that is not to be trained."""
    return ANSWER, length, False


def rows() -> Iterator[Row]:
    """Every shape of a document by hand, then sequences of several documents, then many at random."""
    shapes = {
        "figure 1 of the paper": [prompt(2), query(3), answer(2), query(2), answer(3)],
        "a prompt alone": [prompt(5)],
        "a query alone": [query(5)],
        "an answer alone": [answer(5)],
        "an answer of one token alone": [answer(1)],
        "no prompt": [query(3), answer(4)],
        "no query": [prompt(3), answer(4)],
        "the answer first": [answer(3), query(2), answer(4)],
        "the query last": [prompt(2), query(2), answer(3), query(4)],
        "two queries in a row": [query(2), query(3), answer(2), query(1), query(2), answer(1)],
        "two answers in a row": [query(3), answer(2), answer(3), query(2), answer(1), answer(1)],
        "a prompt after an answer": [query(2), answer(2), prompt(3), query(1), answer(2)],
        "an untrained answer first": [query(2), untrained(3), query(2), answer(3)],
        "an untrained answer last": [query(2), answer(3), query(2), untrained(3)],
        "an untrained answer between answers": [query(1), answer(2), untrained(2), answer(2), query(2)],
        "untrained answers only": [prompt(1), untrained(3), query(2), untrained(2)],
        "spans of one token": [prompt(1), query(1), answer(1), query(1), answer(1), answer(1), query(1), query(1)],
        "a trained flag on a prompt and a query": [(PROMPT, 2, True), (QUERY, 3, True), answer(3)],
    }
    for name, document in shapes.items():
        yield Row(name, 16, 4, [document])
    talk = [prompt(2), query(3), answer(4), query(2), answer(5)]
    yield Row("padding alone", 8, 4, [])
    yield Row("no padding", 16, 4, [talk])
    yield Row("two documents, no padding", 32, 8, [talk, talk])
    yield Row("documents of one token", 16, 4, [[prompt(1)], [query(1)], [answer(1)], [untrained(1)], [answer(1)]])
    yield Row("borders on borders of blocks", 32, 8, [[query(8), answer(8)], [answer(8)]])
    yield Row("borders beside borders of blocks", 32, 8, [[query(7), answer(2)], [query(8), answer(7)], [query(1)]])
    yield Row("a block of many documents", 32, 16, [[query(1), answer(1)] for _ in range(11)])
    yield Row("one block", 16, 16, [talk[:4], [answer(2), query(1)]])
    yield Row("a context over several blocks", 48, 8, [[prompt(9), query(17), answer(3)], [query(11), answer(6)]])
    yield Row("an answer over several blocks", 48, 8, [[query(5), answer(29), query(3), answer(2)], [answer(7)]])
    yield Row("a chat, blocks of 128", 384, 128, [[prompt(61), query(140), answer(20), query(19), answer(90)], talk])
    draw = random.Random(0)
    for number in range(60):
        size = (4, 8)[number % 2]
        documents = [drawn(draw) for _ in range(upto(draw, 4))]
        while sum(length for document in documents for _, length, _ in document) > 40:
            documents.pop()
        used = sum(length for document in documents for _, length, _ in document)
        blocks = max(-(-used // size), 1) + (upto(draw, 3) == 1)
        yield Row(f"random {number}", blocks * size, size, documents)


def drawn(draw: random.Random) -> Document:
    """A document of one to six random spans."""
    return [(upto(draw, 3) - 1, upto(draw, 6), upto(draw, 4) > 1) for _ in range(upto(draw, 6))]


def upto(draw: random.Random, most: int) -> int:
    """1 to `most`, by the one method of `random` that gives the same numbers in every version of Python."""
    return int(draw.random() * most) + 1


def refused() -> Iterator[dict[str, Any]]:
    """Sequences of 8 tokens whose spans (start, end, kind, train) do not tile their documents."""
    for name, seq_lens, spans in (
        ("a gap", [4], [[0, 2, PROMPT, 0], [3, 4, ANSWER, 1]]),
        ("a gap at the beginning", [4], [[1, 4, ANSWER, 1]]),
        ("a gap at the end", [4], [[0, 3, ANSWER, 1]]),
        ("an overlap", [4], [[0, 3, PROMPT, 0], [2, 4, ANSWER, 1]]),
        ("out of order", [4], [[2, 4, ANSWER, 1], [0, 2, QUERY, 0]]),
        ("an empty span", [4], [[0, 4, QUERY, 0], [4, 4, ANSWER, 1]]),
        ("an empty span between others", [4], [[0, 2, QUERY, 0], [2, 2, ANSWER, 1], [2, 4, QUERY, 0]]),
        ("a reversed span", [4], [[0, 3, QUERY, 0], [3, 2, ANSWER, 1], [2, 4, QUERY, 0]]),
        ("across a border", [2, 2], [[0, 4, ANSWER, 1]]),
        ("a document without spans", [2, 2], [[0, 2, ANSWER, 1]]),
        ("no spans", [4], []),
        ("a span on padding", [4], [[0, 4, QUERY, 0], [4, 6, ANSWER, 1]]),
        ("an unknown kind", [4], [[0, 2, QUERY, 0], [2, 4, 3, 0]]),
        ("a negative kind", [4], [[0, 2, QUERY, 0], [2, 4, -1, 0]]),
        ("longer than the sequence", [5, 4], [[0, 5, QUERY, 0], [5, 9, ANSWER, 1]]),
        ("a document of no tokens", [4, 0], [[0, 4, QUERY, 0]]),
    ):
        yield {"name": name, "seq_len": 8, "seq_lens": seq_lens, "spans": spans}


def glm() -> Iterator[dict[str, Any]]:
    """Documents in the GLM layout; the first two are the paper's Figure 2 (a) and (b)."""
    for name, mask, spans in (
        ("figure 2 (a) of the paper", "prefix", [("query", 8), ("answer", 2)]),
        ("figure 2 (b) of the paper", "ism", [("query", 3), ("answer", 2), ("query", 3), ("answer", 2)]),
        ("earlier answers are context", "prefix", [("query", 3), ("answer", 2), ("query", 3), ("answer", 2)]),
        ("causal", "causal", [("query", 5), ("answer", 3), ("query", 1), ("answer", 4)]),
        ("the answer first", "ism", [("answer", 3), ("query", 2), ("answer", 2)]),
        ("two answers in a row", "ism", [("query", 2), ("answer", 3), ("answer", 2), ("query", 1), ("answer", 2)]),
        ("the query last", "ism", [("query", 4), ("answer", 2), ("query", 5)]),
        ("two queries in a row", "ism", [("query", 1), ("query", 1), ("answer", 2), ("query", 2), ("answer", 5)]),
        ("four answers", "ism", [(kind, 2 + turn) for turn in range(4) for kind in ("query", "answer")]),
        ("four answers, the last one marked", "prefix", [(kind, 2) for _ in range(4) for kind in ("query", "answer")]),
    ):
        yield {"name": name, "mask": mask, "spans": spans, **glm_document(spans, mask)}


def text() -> str:
    """The whole file, one line per case."""
    lists = {"sequences": map(solved, rows()), "refused": refused(), "glm": glm()}
    parts = (
        f'"{name}": [\n'
        + ",\n".join(json.dumps(case, separators=(",", ":"), ensure_ascii=False) for case in cases)
        + "\n]"
        for name, cases in lists.items()
    )
    return "{" + ",\n".join(parts) + "}\n"


if __name__ == "__main__":
    STORED.write_text(text(), encoding="utf-8")
