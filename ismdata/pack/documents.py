"""Which documents a batch of conversations becomes, and which conversations are refused on the way.

One document a conversation, or one a trained answer (`prefix`, `--history expand`); those that are too long are split,
dropped or truncated. Every conversation ends as documents with at least one target, or in the refusals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from ismdata.arrays import ragged_arange
from ismdata.conversation import Refusal
from ismdata.errors import DataError
from ismdata.masks import END, START, TRAIN
from ismdata.pack.conversation_batch import ConversationBatch, IntArray
from ismdata.pack.document_encoder import DocumentEncoder
from ismdata.pack.options import PackOptions
from ismdata.pack.requests import Requests, TokenizedDocuments
from ismdata.pack.splitting import split
from ismdata.rendering import MOST_MESSAGES, TooManyMessages


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """The documents of a batch, their conversation ids, the conversations refused by number, and counts."""

    documents: TokenizedDocuments
    names: list[str]
    refused: dict[int, Refusal]
    target_tokens: int
    split: int
    truncated: int
    truncated_tokens: int
    dropped: int
    unwritten_reasoning: int


def wanted(batch: ConversationBatch, options: PackOptions) -> Requests:
    """The documents to make of a batch: one a conversation, or one a trained answer (`prefix`, `--history expand`)."""
    heads = batch.heads
    sizes = np.diff(batch.first)
    if not options.document_per_answer:
        return Requests(
            conversation=np.arange(len(batch)),
            head=heads,
            lo=heads,
            hi=sizes,
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


def make_documents(encoder: DocumentEncoder, batch: ConversationBatch, options: PackOptions) -> BatchResult:
    """The documents of a batch. `encoder` must have begun it. Raises DataError under `--over-long error`."""
    requests = wanted(batch, options)
    refused = _without_targets(batch, requests, options)
    if options.document_per_answer:
        sizes = np.diff(batch.first)
        for c in np.flatnonzero(sizes > MOST_MESSAGES).tolist():
            refused.setdefault(c, Refusal(reason=TooManyMessages.reason, detail=TooManyMessages(int(sizes[c])).detail))
        requests = requests.take(np.flatnonzero(~np.isin(requests.conversation, list(refused))))
    layout = encoder.lay_out(requests)
    for r, refusal in layout.refused.items():
        refused.setdefault(int(requests.conversation[r]), refusal)
    lengths = layout.document_lengths(len(requests))
    alive = ~np.isin(requests.conversation, list(refused))
    over = np.flatnonzero((lengths > options.seq_len) & alive)
    pieced = np.zeros(len(batch), bool)
    if len(over) and options.over_long == "split":
        parts = split(encoder, batch, requests, layout, over, options.seq_len)
        for r, refusal in parts.refused.items():
            refused.setdefault(int(requests.conversation[r]), refusal)
        pieced[requests.conversation[over]] = True
        kept = np.setdiff1d(np.arange(len(requests)), over)
        order = np.argsort(np.concatenate([kept, parts.parents]), kind="stable")
        everything = [requests.take(kept), parts.requests]
        requests = Requests(
            **{
                name: np.concatenate([getattr(part, name) for part in everything])[order]
                for name in Requests.__dataclass_fields__
            }
        )
    elif len(over) and options.over_long != "truncate":
        for r in over.tolist():
            detail = f"{int(lengths[r])} tokens; expected at most {options.seq_len}"
            if options.over_long == "error":
                place = batch.rows.column("source")[int(requests.conversation[r])]
                raise DataError(f"{place}: {detail}. Raise --seq-len, or choose --over-long split, drop or truncate")
            refused.setdefault(int(requests.conversation[r]), Refusal(reason="over_long", detail=detail))

    requests = requests.take(np.flatnonzero(~np.isin(requests.conversation, list(refused))))
    layout = encoder.lay_out(requests)
    documents = encoder.documents(layout, requests)
    stray = encoder.stray_controls(layout, documents)
    if options.over_long == "truncate":
        documents, cut_tokens = _truncate(documents, options.seq_len)
    else:
        cut_tokens = np.zeros(len(requests), np.int64)
    targets = _target_counts(documents)
    untrained = np.setdiff1d(requests.conversation[targets == 0], requests.conversation[targets > 0])
    for c in requests.conversation[stray].tolist():
        detail = "text in a message became a control token of the tokenizer; take it out of the text"
        refused.setdefault(c, Refusal(reason="control_token_in_text", detail=detail))
    for c in untrained.tolist():
        reason = "no_target_left" if cut_tokens[requests.conversation == c].any() else "no_target"
        detail = f"no target within the first {options.seq_len} tokens" if reason == "no_target_left" else _NO_TARGET
        refused.setdefault(c, Refusal(reason=reason, detail=detail))
    packed = ~np.isin(requests.conversation, list(refused))
    keep = packed & (targets > 0)
    documents = _select(documents, np.flatnonzero(keep))
    owner = requests.conversation[keep]
    # A document that lost all its targets is left out whole: it counts as truncated too.
    lost = np.where(keep, cut_tokens, layout.document_lengths(len(requests)))[packed]
    return BatchResult(
        documents=documents,
        names=_names(batch, owner, pieced | options.document_per_answer),
        refused=refused,
        target_tokens=int(targets[keep].sum()),
        split=int(pieced[np.unique(owner)].sum()),
        truncated=len(np.unique(requests.conversation[packed][lost > 0])),
        truncated_tokens=int(lost.sum()),
        dropped=sum(refusal.reason in ("over_long", "no_target_left") for refusal in refused.values()),
        unwritten_reasoning=_unwritten_reasoning(encoder, batch, refused),
    )


def _unwritten_reasoning(encoder: DocumentEncoder, batch: ConversationBatch, refused: dict[int, Refusal]) -> int:
    """How many trained answers of packed conversations have reasoning that the template leaves out."""
    messages = np.array(sorted(encoder.unwritten), np.int64)
    owner = np.searchsorted(batch.first, messages, side="right") - 1
    return int((batch.trained[messages] & ~np.isin(owner, list(refused))).sum())


_NO_TARGET = "no answer is to be trained: all are absent, empty, or marked train: false or weight: 0"


def _without_targets(batch: ConversationBatch, requests: Requests, options: PackOptions) -> dict[int, Refusal]:
    """Conversations with nothing to train."""
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
    """TokenizedDocuments cut to seq_len tokens, and how many tokens each lost."""
    lengths = np.minimum(documents.lengths, seq_len)
    lost = documents.lengths - lengths
    starts = np.cumsum(documents.lengths) - documents.lengths
    kept = documents.spans[:, START] < seq_len
    spans = documents.spans[kept].copy()
    spans[:, END] = np.minimum(spans[:, END], seq_len)
    owner = np.repeat(np.arange(len(lengths)), documents.span_counts)[kept]
    return (
        TokenizedDocuments(
            input_ids=documents.input_ids[ragged_arange(starts, lengths)],
            lengths=lengths,
            span_counts=np.bincount(owner, minlength=len(lengths)).astype(np.int64),
            spans=spans,
            span_weights=documents.span_weights[kept],
        ),
        lost,
    )


def _target_counts(documents: TokenizedDocuments) -> IntArray:
    """Targets of each document: tokens of trained answers, less one that begins the document."""
    owner = np.repeat(np.arange(len(documents.lengths)), documents.span_counts)
    spans = documents.spans
    tokens = np.where(spans[:, TRAIN] != 0, spans[:, END] - np.maximum(spans[:, START], 1), 0)
    return np.bincount(owner, weights=tokens, minlength=len(documents.lengths)).astype(np.int64)


def _select(documents: TokenizedDocuments, chosen: IntArray) -> TokenizedDocuments:
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
    """The conversation id beside each document: `ID`, or `ID#k` for document k of a conversation made into several."""
    ids = batch.rows.column("id").to_pylist()
    rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
    # An id that itself ends like a piece's gets #0, so that every other piece of it is known as one.
    several = several | pc.match_substring_regex(batch.rows.column("id"), "#[0-9]+$").to_numpy(zero_copy_only=False)
    return [
        f"{ids[c]}#{k}" if numbered else ids[c]
        for c, k, numbered in zip(owner.tolist(), rank.tolist(), several[owner].tolist(), strict=True)
    ]
