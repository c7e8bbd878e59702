"""Check skeletons against individual renderings, on a sample of each batch.

A template that does more than its probing showed would otherwise be noticed only in a trained model. Two comparisons
are made. The tokens and spans of documents made from skeletons are compared with those of the same conversations
rendered individually. The tokens of these renderings are compared with what the tokenizer itself makes of the rendered
text, control tokens parsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from ismdata.arrays import IntArray, offsets_of
from ismdata.errors import DataError, Refused
from ismdata.masks import END, KIND, START
from ismdata.pack.batch_encoder import BatchEncoder
from ismdata.pack.conversation_batch import ConversationBatch
from ismdata.pack.requests import Requests
from ismdata.rendering import (
    AddedToken,
    Chunk,
    Encoding,
    Piece,
    as_template_messages,
    compile_chunks,
    insert_glm_tokens_in_pieces,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ismdata.rendering import SavedTokenizer

#: Conversations to compare in the first batch, and in each later batch.
SAMPLE = 32
LATER_SAMPLE = 1

#: At least this many conversations are candidates for a sample; the shortest of them are compared.
_CANDIDATES = 8

#: Conversations with more messages are not compared: rendering one individually takes time quadratic in its length.
_MOST_MESSAGES = 100

#: Bytes of text to compare per conversation of a sample. Longer texts take longer and show no more.
_BYTES_PER_CONVERSATION = 1 << 11


class SkeletonMismatch(Exception):
    """A document made from a skeleton differs from its individual rendering; the message names the conversation."""


def sample_conversations(batch: ConversationBatch, count: int) -> IntArray:
    """Choose conversations to compare.

    Candidates are spread over the batch, and include those with the most messages. The shortest are chosen, at least
    one, until their texts reach the limit.

    Args:
        batch: The batch.
        count: About how many to choose.

    Returns:
        Their numbers, in order.
    """
    sizes = np.diff(batch.first)
    short = np.flatnonzero(sizes <= _MOST_MESSAGES)
    if not len(short):
        return short
    spread = short[np.linspace(0, len(short) - 1, min(len(short), max(count, _CANDIDATES))).astype(np.int64)]
    longest = short[np.argsort(sizes[short], kind="stable")[len(short) - count // 8 :]]
    candidates = np.union1d(spread, longest)
    text_before = offsets_of(pc.binary_length(batch.contents).to_numpy(zero_copy_only=False))
    size = text_before[batch.first[candidates + 1]] - text_before[batch.first[candidates]]
    by_size = np.argsort(size, kind="stable")
    chosen = np.cumsum(size[by_size]) <= count * _BYTES_PER_CONVERSATION
    chosen[0] = True
    return np.sort(candidates[by_size[chosen]])


#: A span of a document: its number of tokens, and its kind.
_Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Documents made from skeletons, and the renderings to compare them with. Each sequence has one entry per document.

    Attributes:
        encoding: The tokenizer and its template.
        ids: The tokens of the documents.
        spans: Their spans.
        cut: Whether each document ends with its last answer.
        rendered: The individual renderings, their texts not encoded yet.
    """

    encoding: Encoding
    ids: Sequence[list[int]]
    spans: Sequence[list[_Span]]
    cut: Sequence[bool]
    rendered: Sequence[_Rendering]

    def check(self) -> int:
        """Encode the renderings and compare.

        Nearly all of the time is spent in the tokenizer, which blocks no other thread.

        Returns:
            Number of documents compared.

        Raises:
            SkeletonMismatch: If a document differs from its rendering.
            DataError: If a rendering differs from what the tokenizer makes of its text.
        """
        rendered = _encode(self.encoding, self.rendered)
        glm = self.encoding.glm
        for document, ids, spans, cut in zip(rendered, self.ids, self.spans, self.cut, strict=True):
            pieces = document.pieces if glm is None else insert_glm_tokens_in_pieces(document.pieces, glm)
            expected_ids, expected_spans = _ids(pieces), _spans(pieces)
            if ids != (expected_ids[: len(ids)] if cut else expected_ids):
                raise SkeletonMismatch(document.place)
            if spans != (expected_spans[: len(spans)] if cut else expected_spans):
                raise SkeletonMismatch(f"{document.place}: same tokens, different spans")
        _compare_with_tokenizer(self.encoding, [document for document in rendered if not document.has_escapes])
        return len(rendered)


def prepare_comparison(encoder: BatchEncoder, requests: Requests) -> Comparison:
    """Make documents from skeletons and render them individually, without encoding the renderings yet.

    Documents that the template refuses either way are omitted: `pack` quarantines their conversations.

    Args:
        encoder: The encoder of the batch.
        requests: The documents to compare.

    Returns:
        A comparison to check, in another thread.

    Raises:
        SkeletonMismatch: If the template refuses a document that was made from a skeleton.
    """
    table = encoder.lay_out(requests)
    documents = encoder.documents(table, requests)
    starts, span_starts = offsets_of(documents.lengths).tolist(), offsets_of(documents.span_counts).tolist()
    compared = [r for r in range(len(requests)) if r not in table.refused]
    spans = [documents.spans[span_starts[r] : span_starts[r + 1]].tolist() for r in compared]
    return Comparison(
        encoding=encoder.cache.encoding,
        ids=[documents.input_ids[starts[r] : starts[r + 1]].tolist() for r in compared],
        spans=[[(span[END] - span[START], span[KIND]) for span in each] for each in spans],
        cut=[bool(requests.cut[r]) for r in compared],
        rendered=[_render(encoder, requests, r) for r in compared],
    )


@dataclass(frozen=True, kw_only=True)
class _Rendering:
    """A document rendered individually. has_escapes: whether a text was escaped, because it holds control tokens."""

    place: str
    chunks: Sequence[Chunk]
    pieces: tuple[Piece, ...]
    has_escapes: bool

    def ids_of(self, chunk: int) -> list[int]:
        """The tokens of a chunk."""
        return _ids([piece for piece in self.pieces if piece.chunk == chunk])


def _render(encoder: BatchEncoder, requests: Requests, r: int) -> _Rendering:
    """Request r rendered individually, its texts not encoded."""
    encoding, batch, c = encoder.cache.encoding, encoder.batch, int(requests.conversation[r])
    tokenizer = encoding.tokenizer
    place = str(batch.rows.column("source")[c])
    try:
        messages, tools = as_template_messages(batch.conversation(c))
        chosen = messages[: int(requests.head[r])] + messages[int(requests.lo[r]) : int(requests.hi[r])]
        chunks, escapes = encoding.chunks(chosen, tools)
        pieces = compile_chunks(
            chunks,
            tokenizer,
            lambda text: (escapes.undo(text),),
            encode=False,
            without_reasoning=encoder.cache.without_reasoning,
        )
    except Refused as error:
        raise SkeletonMismatch(f"{place}: {error}") from error
    return _Rendering(place=place, chunks=chunks, pieces=pieces, has_escapes=bool(escapes.mapping))


def _encode(encoding: Encoding, documents: Sequence[_Rendering]) -> list[_Rendering]:
    """The documents with the ids of all pieces; the reference tokenizer encodes all texts at once, which is faster."""
    ids: dict[tuple[bool, str], tuple[int, ...]] = {}
    pieces = [piece for document in documents for piece in document.pieces if piece.ids is None]
    for opening in (False, True):
        texts = list(dict.fromkeys(_text(piece) for piece in pieces if piece.opening is opening))
        for text, found in zip(texts, encoding.tokenizer.encode(texts, opening=opening), strict=True):
            ids[opening, text] = tuple(found)

    def encoded(piece: Piece) -> Piece:
        return piece if piece.ids is not None else replace(piece, ids=ids[piece.opening, _text(piece)])

    return [replace(document, pieces=tuple(map(encoded, document.pieces))) for document in documents]


def _text(piece: Piece) -> str:
    """The text of a piece that is not encoded."""
    return "".join(map(str, piece.parts))


def _ids(pieces: Sequence[Piece]) -> list[int]:
    """The tokens of pieces, in order."""
    return [id for piece in pieces for id in piece.ids or ()]


def _spans(pieces: Sequence[Piece]) -> list[_Span]:
    """The spans of a document, except those without tokens."""
    lengths: dict[int, int] = {}
    for piece in pieces:
        lengths[piece.span] = lengths.get(piece.span, 0) + len(piece.ids or ())
    kinds = {piece.span: piece.kind for piece in pieces}
    return [(length, kinds[span]) for span, length in lengths.items() if length]


def _compare_with_tokenizer(encoding: Encoding, documents: Sequence[_Rendering]) -> None:
    """Compare our ids with the tokenizer's own for the same text: the whole text, or chunk by chunk if that differs.

    The whole text may differ because we always put a token border between a context and an answer. A chunk is encoded
    after a control token, as in the document. A chunk after plain text is not compared.
    """
    pretrained, controls = encoding.tokenizer.pretrained, encoding.tokenizer.controls
    anchor = next((token for token in controls.tokens.values() if not token.lstrip and not token.rstrip), None)
    wholes = _encode_natively(pretrained, ["".join(chunk.text for chunk in document.chunks) for document in documents])
    texts: list[str] = []
    compared: list[tuple[_Rendering, int, int]] = []  # a document, one of its chunks, number of tokens before that
    for document, ids in zip(documents, wholes, strict=True):
        if ids == _ids(document.pieces):
            continue
        before: AddedToken | str = ""
        for number, chunk in enumerate(document.chunks):
            if number == 0:
                texts.append(chunk.text)
                compared.append((document, number, 0))
            elif isinstance(before, AddedToken) and not before.rstrip and anchor is not None:
                texts.append(anchor.text + chunk.text)
                compared.append((document, number, 1))
            before = (controls.cut(chunk.text) or [""])[-1]
    for (document, number, preceding), ids in zip(compared, _encode_natively(pretrained, texts), strict=True):
        found, expected = document.ids_of(number), ids[preceding:]
        if found != expected:
            raise DataError(_difference(encoding, found, expected, document.place))


def _encode_natively(pretrained: PreTrainedTokenizerFast | SavedTokenizer, texts: list[str]) -> list[list[int]]:
    """What the tokenizer itself makes of texts, control tokens parsed."""
    if not texts:
        return []
    ids: list[list[int]] = pretrained(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return ids


def _difference(encoding: Encoding, found: list[int], expected: list[int], place: str) -> str:
    """The message about the first difference between two lists of tokens."""
    pairs = zip(found, expected, strict=False)
    at = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
    decode = encoding.tokenizer.decode
    return (
        f"{place}: token {at} of a span is {found[at : at + 4]} ({decode(found[at : at + 4])!r}); the tokenizer itself "
        f"gives {expected[at : at + 4]} ({decode(expected[at : at + 4])!r}). It does something that ismdata does not "
        "support. Nothing was written. Please report this with the tokenizer's name"
    )
