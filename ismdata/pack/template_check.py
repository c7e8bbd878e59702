"""Law 5 on real data: the tokens of a document are the model's own.

Checked on a sample at the start of every `pack`, where a wrong template would otherwise show only in a model that
learns the wrong thing. Two comparisons: the columnar road against the conversation rendered by itself, tokens and
spans, and that rendering against the tokenizer's own encoding of the rendered text, special tokens parsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from ismdata.errors import DataError, Refused
from ismdata.pack.conversation_batch import ConversationBatch, IntArray
from ismdata.pack.document_encoder import DocumentEncoder
from ismdata.pack.requests import Requests
from ismdata.rendering import (
    AddedToken,
    Chunk,
    Encoding,
    Piece,
    as_template_messages,
    compile_chunks,
    marked_pieces,
    render_chunks,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Conversations compared in the first batch, and in each later one, where it is a short one of so many.
SAMPLE = 32
LATER_SAMPLE = 1
_CANDIDATES = 8

#: Conversations of more messages are left out: rendering one by itself takes time that grows with their square.
_MOST_MESSAGES = 100

#: Bytes of text to compare for each conversation of a sample. Long texts take the tokenizer longer and show no more.
_BYTES_EACH = 1 << 11


class ColumnsDiffer(Exception):
    """The columnar road and a conversation rendered by itself disagree: the template needs all rendered by
    themselves.
    """


def sample(batch: ConversationBatch, count: int) -> IntArray:
    """Conversations to compare: spread over the batch, those of the most turns among them; the shortest of these, as
    many as may be encoded, and at least one.
    """
    turns = np.diff(batch.first)
    short = np.flatnonzero(turns <= _MOST_MESSAGES)
    if not len(short):
        return short
    spread = short[np.linspace(0, len(short) - 1, min(len(short), max(count, _CANDIDATES))).astype(np.int64)]
    longest = short[np.argsort(turns[short], kind="stable")[len(short) - count // 8 :]]
    chosen = np.union1d(spread, longest)
    text_before = np.concatenate([[0], np.cumsum(pc.binary_length(batch.contents).to_numpy(zero_copy_only=False))])
    size = text_before[batch.first[chosen + 1]] - text_before[batch.first[chosen]]
    by_size = np.argsort(size, kind="stable")
    within = np.cumsum(size[by_size]) <= count * _BYTES_EACH
    within[0] = True
    taken: IntArray = np.sort(chosen[by_size[within]])
    return taken


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Documents of the columnar road, and what the reference is going to make of the same conversations."""

    encoding: Encoding
    found: Sequence[list[int]]
    spans: Sequence[list[_Span]]
    cut: Sequence[bool]  # whether a document ends with its last answer
    rendered: Sequence[_Rendered]

    def check(self) -> int:
        """Encode by the reference and compare; how many documents. Nearly all of its time is the tokenizer's, which
        holds up no other thread.

        Raises ColumnsDiffer where the columnar road does not give what the template renders, DataError where that is
        not what the tokenizer makes of it.
        """
        rendered = _encode(self.encoding, self.rendered)
        glm = self.encoding.glm
        for document, found, spans, cut in zip(rendered, self.found, self.spans, self.cut, strict=True):
            pieces = document.pieces if glm is None else marked_pieces(document.pieces, glm)
            reference, expected = _ids(pieces), _spans(pieces)
            if found != (reference[: len(found)] if cut else reference):
                raise ColumnsDiffer(document.place)
            if spans != (expected[: len(spans)] if cut else expected):
                raise ColumnsDiffer(f"{document.place}: the same tokens, other spans")
        _compare_with_tokenizer(self.encoding, [document for document in rendered if document.as_written])
        return len(rendered)


def comparison(
    encoding: Encoding, encoder: DocumentEncoder, batch: ConversationBatch, requests: Requests
) -> Comparison:
    """The documents asked for by both roads, up to the reference's tokens. `encoder` must have begun `batch`.

    Raises ColumnsDiffer where the template refuses what the columnar road takes. Documents that both refuse are passed
    over: packing quarantines them.
    """
    layout = encoder.lay_out(requests)
    documents = encoder.documents(layout, requests)
    ends, span_ends = np.cumsum(documents.lengths), np.cumsum(documents.span_counts)
    there = [r for r in range(len(requests)) if r not in layout.refused]
    return Comparison(
        encoding=encoding,
        found=[documents.input_ids[ends[r] - documents.lengths[r] : ends[r]].tolist() for r in there],
        spans=[
            [(int(end - start), int(kind)) for start, end, kind, _ in documents.spans[end - count : end]]
            for end, count in zip(span_ends[there].tolist(), documents.span_counts[there].tolist(), strict=True)
        ],
        cut=[bool(requests.cut[r]) for r in there],
        rendered=[_render(encoding, batch, requests, r, encoder.without_reasoning) for r in there],
    )


@dataclass(frozen=True, kw_only=True)
class _Rendered:
    """A conversation rendered by itself. pieces: without ids where they are text that is still to be encoded."""

    place: str
    chunks: Sequence[Chunk]
    pieces: tuple[Piece, ...]
    as_written: bool  # no text in it had to be escaped

    def ids_of(self, chunk: int) -> list[int]:
        return _ids([piece for piece in self.pieces if piece.chunk == chunk])


def _render(
    encoding: Encoding, batch: ConversationBatch, requests: Requests, r: int, without_reasoning: bool
) -> _Rendered:
    c = int(requests.conversation[r])
    place = str(batch.rows.column("source")[c])
    tokenizer = encoding.tokenizer
    try:
        messages, tools = as_template_messages(batch.conversation(c))
        asked = messages[: int(requests.head[r])] + messages[int(requests.lo[r]) : int(requests.hi[r])]
        chunks, escapes = render_chunks(encoding.renderer, tokenizer, asked, tools, encoding.history)
        pieces = compile_chunks(
            chunks, tokenizer, lambda text: (escapes.undo(text),), encode=False, without_reasoning=without_reasoning
        )
    except Refused as error:
        raise ColumnsDiffer(f"{place}: {error}") from error
    return _Rendered(place=place, chunks=chunks, pieces=pieces, as_written=not escapes.mapping)


def _encode(encoding: Encoding, documents: Sequence[_Rendered]) -> list[_Rendered]:
    """The documents with the ids of all pieces, by the reference; all texts at once, which takes it less time."""
    ids: dict[tuple[bool, str], tuple[int, ...]] = {}
    pieces = [piece for document in documents for piece in document.pieces if piece.ids is None]
    for opening in (False, True):
        texts = list(dict.fromkeys("".join(map(str, piece.parts)) for piece in pieces if piece.opening is opening))
        for text, found in zip(texts, encoding.tokenizer.encode(texts, opening=opening), strict=True):
            ids[opening, text] = tuple(found)

    def known(piece: Piece) -> Piece:
        return (
            piece if piece.ids is not None else replace(piece, ids=ids[piece.opening, "".join(map(str, piece.parts))])
        )

    return [replace(document, pieces=tuple(map(known, document.pieces))) for document in documents]


def _ids(pieces: Sequence[Piece]) -> list[int]:
    return [id for piece in pieces for id in piece.ids or ()]


#: A span of a document: how many tokens it has, and its kind.
_Span = tuple[int, int]


def _spans(pieces: Sequence[Piece]) -> list[_Span]:
    """The spans of a document, those without tokens left out."""
    lengths: dict[int, int] = {}
    for piece in pieces:
        lengths[piece.span] = lengths.get(piece.span, 0) + len(piece.ids or ())
    kinds = {piece.span: piece.kind for piece in pieces}
    return [(length, kinds[span]) for span, length in lengths.items() if length]


def _compare_with_tokenizer(encoding: Encoding, documents: Sequence[_Rendered]) -> None:
    """Our ids against the tokenizer's own for the same text: of the whole if that agrees, else chunk by chunk.

    Chunk by chunk, because the border between a context and an answer is always a token border here. A chunk is encoded
    behind a control token, as it stands in a document; one behind plain text has no reference of the tokenizer's own.
    """
    pretrained, controls = encoding.tokenizer.pretrained, encoding.tokenizer.controls
    anchor = next((token for token in controls.tokens.values() if not token.lstrip and not token.rstrip), None)
    wholes = _by_tokenizer(pretrained, ["".join(chunk.text for chunk in document.chunks) for document in documents])
    texts: list[str] = []
    compared: list[tuple[_Rendered, int, int]] = []  # a document, a span of it, and how many tokens stand before it
    for document in (document for document, ids in zip(documents, wholes, strict=True) if ids != _ids(document.pieces)):
        before: AddedToken | str = ""
        for span, chunk in enumerate(document.chunks):
            if span == 0:
                texts.append(chunk.text)
                compared.append((document, span, 0))
            elif isinstance(before, AddedToken) and not before.rstrip and anchor is not None:
                texts.append(anchor.text + chunk.text)
                compared.append((document, span, 1))
            before = (controls.cut(chunk.text) or [""])[-1]
    for (document, span, ahead), ids in zip(compared, _by_tokenizer(pretrained, texts), strict=True):
        found, expected = document.ids_of(span), ids[ahead:]
        if found != expected:
            raise DataError(_difference(encoding, found, expected, document.place))


def _by_tokenizer(pretrained: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """What the tokenizer makes of texts in which control tokens are parsed."""
    if not texts:
        return []
    ids: list[list[int]] = pretrained(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return ids


def _difference(encoding: Encoding, found: list[int], expected: list[int], place: str) -> str:
    pairs = zip(found, expected, strict=False)
    at = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
    decode = encoding.tokenizer.decode
    return (
        f"{place}: token {at} of a span is {found[at : at + 4]} ({decode(found[at : at + 4])!r}); the tokenizer itself "
        f"gives {expected[at : at + 4]} ({decode(expected[at : at + 4])!r}). It does something that ismdata does not "
        "follow; nothing was written. Please report it with the tokenizer's name"
    )
