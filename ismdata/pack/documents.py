"""Which documents a batch of conversations becomes, and which of its conversations are refused.

One document per conversation, or one per trained answer (`--mask prefix`, `--history expand`). Documents longer than a
sequence are split, dropped or truncated. Each conversation ends either as documents with at least one target or among
the refusals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from ismdata.arrays import IntArray, ragged_arange
from ismdata.conversation import Refusal
from ismdata.errors import DataError
from ismdata.masks import END, START, TRAIN
from ismdata.pack.batch_encoder import BatchEncoder
from ismdata.pack.conversation_batch import ConversationBatch
from ismdata.pack.options import PackOptions
from ismdata.pack.requests import PieceTable, Requests, TokenizedDocuments
from ismdata.pack.splitting import split
from ismdata.rendering import MOST_MESSAGES, TooManyMessages


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """What a batch of conversations became.

    Attributes:
        documents: Its documents.
        names: The conversation id of each document, with `#k` appended if its conversation has several.
        refused: The conversations that are not packed, by their number in the batch.
        target_tokens: Tokens with a loss.
        split: Conversations that were split.
        truncated: Conversations that were truncated.
        truncated_tokens: Tokens that these lost.
        dropped: Conversations refused because of their length.
        unwritten_reasoning: Trained answers whose reasoning the template omits.
    """

    documents: TokenizedDocuments
    names: list[str]
    refused: dict[int, Refusal]
    target_tokens: int
    split: int
    truncated: int
    truncated_tokens: int
    dropped: int
    unwritten_reasoning: int


def requests_for(batch: ConversationBatch, options: PackOptions) -> Requests:
    """Return the documents to make of a batch: one per conversation, or one per trained answer."""
    heads = batch.heads
    if not options.document_per_answer:
        return Requests(
            conversation=np.arange(len(batch)),
            head=heads,
            lo=heads,
            hi=np.diff(batch.first),
            target_from=np.zeros(len(batch), np.int64),
            cut=np.zeros(len(batch), bool),
        )
    answers = np.flatnonzero(batch.trained)
    owner = np.searchsorted(batch.first, answers, side="right") - 1
    if options.prefix_every > 1:
        rank = np.arange(len(answers)) - np.searchsorted(owner, owner)
        kept = rank % options.prefix_every == options.prefix_every - 1
        answers, owner = answers[kept], owner[kept]
    number = answers - batch.first[owner]
    return Requests(
        conversation=owner,
        head=heads[owner],
        lo=heads[owner],
        hi=number + 1,
        target_from=number,
        cut=np.full(len(answers), options.history == "append"),
    )


def make_documents(encoder: BatchEncoder, options: PackOptions) -> BatchResult:
    """Make the documents of the encoder's batch.

    Args:
        encoder: The encoder of the batch.
        options: The options of the call.

    Returns:
        The documents and the refused conversations.

    Raises:
        DataError: If a document is longer than a sequence, under `--over-long error`.
    """
    batch = encoder.batch
    requests = requests_for(batch, options)
    refused = _without_targets(batch, requests, options)
    if options.document_per_answer:
        sizes = np.diff(batch.first)
        for c in np.flatnonzero(sizes > MOST_MESSAGES).tolist():
            refused.setdefault(c, Refusal(reason=TooManyMessages.reason, detail=TooManyMessages(int(sizes[c])).detail))
        requests = _without_refused(requests, refused)
    table = encoder.lay_out(requests)
    _refuse(refused, requests, table.refused)
    fitting, was_split = _fit(encoder, requests, table, options, refused)
    remaining = _without_refused(fitting, refused)
    if remaining is not requests:
        table = encoder.lay_out(remaining)
    return _finish(encoder, remaining, table, options, refused, was_split)


def _fit(
    encoder: BatchEncoder, requests: Requests, table: PieceTable, options: PackOptions, refused: dict[int, Refusal]
) -> tuple[Requests, NDArray[np.bool_]]:
    """Split or refuse documents longer than a sequence; adds to `refused`.

    Returns the requests, the same object if none was split, and which conversations were split, bool[C].
    """
    batch = encoder.batch
    was_split = np.zeros(len(batch), bool)
    lengths = table.document_lengths(len(requests))
    over = np.flatnonzero((lengths > options.seq_len) & ~np.isin(requests.conversation, list(refused)))
    if not len(over) or options.over_long == "truncate":
        return requests, was_split
    if options.over_long == "split":
        parts = split(encoder, requests, table, over, options.seq_len)
        _refuse(refused, requests, parts.refused)
        was_split[requests.conversation[over]] = True
        kept = np.setdiff1d(np.arange(len(requests)), over)
        order = np.argsort(np.concatenate([kept, parts.parents]), kind="stable")
        return Requests.concatenate([requests.take(kept), parts.requests]).take(order), was_split
    for r in over.tolist():
        c = int(requests.conversation[r])
        detail = f"{int(lengths[r])} tokens; expected at most {options.seq_len}"
        if options.over_long == "error":
            place = batch.rows.column("source")[c]
            raise DataError(f"{place}: {detail}. Raise --seq-len, or choose --over-long split, drop or truncate")
        refused.setdefault(c, Refusal(reason="over_long", detail=detail))
    return requests, was_split


def _finish(
    encoder: BatchEncoder,
    requests: Requests,
    table: PieceTable,
    options: PackOptions,
    refused: dict[int, Refusal],
    was_split: NDArray[np.bool_],
) -> BatchResult:
    """Tokenize laid-out documents, truncate them if asked to, and keep those with targets; adds to `refused`."""
    batch = encoder.batch
    documents = encoder.documents(table, requests)
    for c in requests.conversation[encoder.stray_controls(table, documents)].tolist():
        detail = "text of a message became a control token of the tokenizer. Remove it from the text"
        refused.setdefault(c, Refusal(reason="control_token_in_text", detail=detail))
    lost = np.zeros(len(requests), np.int64)
    if options.over_long == "truncate":
        documents, lost = _truncate(documents, options.seq_len)
    targets = _target_counts(documents)
    for c in np.setdiff1d(requests.conversation[targets == 0], requests.conversation[targets > 0]).tolist():
        refusal = Refusal(reason="no_target", detail=_NO_TARGET)
        if lost[requests.conversation == c].any():
            detail = f"no target within the first {options.seq_len} tokens"
            refusal = Refusal(reason="no_target_left", detail=detail)
        refused.setdefault(c, refusal)
    packed = ~np.isin(requests.conversation, list(refused))
    keep = packed & (targets > 0)
    owner = requests.conversation[keep]
    # A document that lost all its targets is omitted as a whole, and all of it counts as truncated.
    lost = np.where(keep, lost, table.document_lengths(len(requests)))[packed]
    return BatchResult(
        documents=_select(documents, np.flatnonzero(keep)),
        names=_names(batch, owner, was_split | options.document_per_answer),
        refused=refused,
        target_tokens=int(targets[keep].sum()),
        split=int(was_split[np.unique(owner)].sum()),
        truncated=len(np.unique(requests.conversation[packed][lost > 0])),
        truncated_tokens=int(lost.sum()),
        dropped=sum(refusal.reason in ("over_long", "no_target_left") for refusal in refused.values()),
        unwritten_reasoning=_unwritten_reasoning(encoder, refused),
    )


def _refuse(refused: dict[int, Refusal], requests: Requests, by_request: Mapping[int, Refusal]) -> None:
    """Refuse the conversations of refused requests; a conversation keeps its first refusal."""
    for r, refusal in by_request.items():
        refused.setdefault(int(requests.conversation[r]), refusal)


def _without_refused(requests: Requests, refused: Mapping[int, Refusal]) -> Requests:
    """The requests of conversations that are not refused; the same object if none is."""
    kept = np.flatnonzero(~np.isin(requests.conversation, list(refused)))
    return requests if len(kept) == len(requests) else requests.take(kept)


def _unwritten_reasoning(encoder: BatchEncoder, refused: Mapping[int, Refusal]) -> int:
    """Number of trained answers in packed conversations whose reasoning the template omits."""
    batch = encoder.batch
    messages = np.array(sorted(encoder.unwritten), np.int64)
    owner = np.searchsorted(batch.first, messages, side="right") - 1
    return int((batch.trained[messages] & ~np.isin(owner, list(refused))).sum())


_NO_TARGET = "no answer to train: all are absent, empty, or marked train: false or weight: 0"


def _without_targets(batch: ConversationBatch, requests: Requests, options: PackOptions) -> dict[int, Refusal]:
    """Refuse conversations without an answer to train."""
    trainable = np.zeros(len(batch), bool)
    if options.document_per_answer:
        trainable[requests.conversation] = True
    else:
        owner = np.repeat(np.arange(len(batch)), np.diff(batch.first))
        trainable[owner[batch.trained]] = True
    detail = _NO_TARGET
    if options.prefix_every > 1:
        detail = f"fewer than {options.prefix_every} answers to train (--prefix-every)"
    return {c: Refusal(reason="no_target", detail=detail) for c in np.flatnonzero(~trainable).tolist()}


def _truncate(documents: TokenizedDocuments, seq_len: int) -> tuple[TokenizedDocuments, IntArray]:
    """Cut documents to `seq_len` tokens; also return how many tokens each lost, int64[R]."""
    lengths = np.minimum(documents.lengths, seq_len)
    starts = np.cumsum(documents.lengths) - documents.lengths
    kept = documents.spans[:, START] < seq_len
    spans = documents.spans[kept].copy()
    spans[:, END] = np.minimum(spans[:, END], seq_len)
    owner = np.repeat(np.arange(len(lengths)), documents.span_counts)[kept]
    truncated = TokenizedDocuments(
        input_ids=documents.input_ids[ragged_arange(starts, lengths)],
        lengths=lengths,
        span_counts=np.bincount(owner, minlength=len(lengths)).astype(np.int64),
        spans=spans,
        span_weights=documents.span_weights[kept],
    )
    return truncated, documents.lengths - lengths


def _target_counts(documents: TokenizedDocuments) -> IntArray:
    """Targets of each document, int64[R]: tokens of trained answers, except a document's first token."""
    owner = np.repeat(np.arange(len(documents.lengths)), documents.span_counts)
    spans = documents.spans
    tokens = np.where(spans[:, TRAIN] != 0, spans[:, END] - np.maximum(spans[:, START], 1), 0)
    return np.bincount(owner, weights=tokens, minlength=len(documents.lengths)).astype(np.int64)


def _select(documents: TokenizedDocuments, chosen: IntArray) -> TokenizedDocuments:
    """The documents of these numbers."""
    if len(chosen) == len(documents.lengths):
        return documents
    starts = np.cumsum(documents.lengths) - documents.lengths
    span_starts = np.cumsum(documents.span_counts) - documents.span_counts
    rows = ragged_arange(span_starts[chosen], documents.span_counts[chosen])
    return TokenizedDocuments(
        input_ids=documents.input_ids[ragged_arange(starts[chosen], documents.lengths[chosen])],
        lengths=documents.lengths[chosen],
        span_counts=documents.span_counts[chosen],
        spans=documents.spans[rows],
        span_weights=documents.span_weights[rows],
    )


def _names(batch: ConversationBatch, owner: IntArray, several: NDArray[np.bool_]) -> list[str]:
    """The conversation id of each document: `ID`, or `ID#k` for document k of a conversation with several."""
    ids = batch.rows.column("id").to_pylist()
    rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
    # An id that itself ends in `#k` gets `#0` appended, so that the last `#k` of a name is never part of an id.
    several = several | pc.match_substring_regex(batch.rows.column("id"), "#[0-9]+$").to_numpy(zero_copy_only=False)
    return [
        f"{ids[c]}#{k}" if numbered else ids[c]
        for c, k, numbered in zip(owner.tolist(), rank.tolist(), several[owner].tolist(), strict=True)
    ]
