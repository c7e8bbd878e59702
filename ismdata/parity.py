"""Law 5 on real data: the tokens of a document are the model's own.

Checked on a sample at the start of every `pack`, where a wrong template would otherwise show only in a model that
learns the wrong thing. Two comparisons: the columnar road against the conversation rendered by itself, and that
rendering against the tokenizer's own encoding of the rendered text, special tokens parsed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ismdata.batch import ConversationBatch, IntArray, as_template_messages
from ismdata.control_tokens import AddedToken
from ismdata.encoder import Encoding, marked_pieces
from ismdata.errors import DataError
from ismdata.skeleton import NotRendered, Piece, compile_chunks, rendered_chunks
from ismdata.template import TemplateRefused
from ismdata.tokens import DocumentEncoder, Requests
from ismdata.turns import Chunk, HistoryRewritten

#: Conversations compared in the first batch, and in each later one.
SAMPLE = 32
LATER_SAMPLE = 1

#: Conversations of more messages are left out: rendering one by itself takes time that grows with their square.
_MOST_MESSAGES = 100


class ColumnsDiffer(Exception):
    """The columnar road and a conversation rendered by itself disagree: the template needs all rendered by
    themselves.
    """


def sample(batch: ConversationBatch, count: int) -> IntArray:
    """Conversations to compare: spread over the batch, the longer ones among them."""
    turns = np.diff(batch.first)
    short = np.flatnonzero(turns <= _MOST_MESSAGES)
    spread = short[np.linspace(0, len(short) - 1, min(len(short), count)).astype(np.int64)] if len(short) else short
    longest = short[np.argsort(turns[short], kind="stable")[len(short) - count // 8 :]]
    return np.union1d(spread, longest)


def check(encoding: Encoding, encoder: DocumentEncoder, batch: ConversationBatch, requests: Requests) -> int:
    """Compare documents with their references; how many were compared. `encoder` must have begun `batch`.

    Raises ColumnsDiffer where the columnar road does not give what the template renders, DataError where that is not
    what the tokenizer makes of it. Documents that the template refuses are passed over: packing quarantines them.
    """
    layout = encoder.lay_out(requests)
    documents = encoder.documents(layout, requests)
    ends = np.cumsum(documents.lengths)
    compared = 0
    for r in range(len(requests)):
        if r in layout.refused:
            continue
        c = int(requests.conversation[r])
        messages, tools = as_template_messages(batch.conversation(c))
        asked = messages[: int(requests.head[r])] + messages[int(requests.lo[r]) : int(requests.hi[r])]
        place = str(batch.rows.column("source")[c])
        try:
            chunks, escapes = rendered_chunks(encoding.renderer, encoding.tokenizer, asked, tools, encoding.history)
            pieces = compile_chunks(chunks, encoding.tokenizer, lambda text: (escapes.undo(text),))  # noqa: B023
        except (TemplateRefused, HistoryRewritten, NotRendered, ValueError) as error:
            raise ColumnsDiffer(f"{place}: {error}") from error
        whole = pieces if encoding.glm is None else marked_pieces(pieces, encoding.glm)
        reference = [id for piece in whole for id in piece.ids or ()]
        found = documents.input_ids[ends[r] - documents.lengths[r] : ends[r]].tolist()
        if found != (reference[: len(found)] if requests.cut[r] else reference):
            raise ColumnsDiffer(place)
        if not escapes.mapping:
            _compare_with_tokenizer(encoding, chunks, pieces, place)
        compared += 1
    return compared


def _compare_with_tokenizer(encoding: Encoding, chunks: Sequence[Chunk], pieces: Sequence[Piece], place: str) -> None:
    """Our ids against the tokenizer's own for the same text: of the whole if that agrees, else chunk by chunk.

    Chunk by chunk, because the border between a context and an answer is always a token border here. A chunk is encoded
    behind a control token, as it stands in a document; one behind plain text has no reference of the tokenizer's own.
    """
    pretrained, controls = encoding.tokenizer.pretrained, encoding.tokenizer.controls
    ours = [id for piece in pieces for id in piece.ids or ()]
    if pretrained.encode("".join(chunk.text for chunk in chunks), add_special_tokens=False) == ours:
        return
    anchor = next((token for token in controls.tokens.values() if not token.lstrip and not token.rstrip), None)
    before: AddedToken | str = ""
    for span, chunk in enumerate(chunks):
        found = [id for piece in pieces if piece.span == span for id in piece.ids or ()]
        if span == 0:
            expected = pretrained.encode(chunk.text, add_special_tokens=False)
        elif isinstance(before, AddedToken) and not before.rstrip and anchor is not None:
            expected = pretrained.encode(anchor.text + chunk.text, add_special_tokens=False)[1:]
        else:
            expected = found
        if found != expected:
            raise DataError(_difference(encoding, found, expected, place))
        before = (controls.cut(chunk.text) or [""])[-1]


def _difference(encoding: Encoding, found: list[int], expected: list[int], place: str) -> str:
    pairs = zip(found, expected, strict=False)
    at = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
    decode = encoding.tokenizer.decode
    return (
        f"{place}: token {at} of a span is {found[at : at + 4]} ({decode(found[at : at + 4])!r}); the tokenizer itself "
        f"gives {expected[at : at + 4]} ({decode(expected[at : at + 4])!r}). It does something that ismdata does not "
        "follow; nothing was written. Please report it with the tokenizer's name"
    )
