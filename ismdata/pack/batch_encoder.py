"""Conversations to tokenized documents, for a whole batch at once.

A document is a range of a conversation's messages. Its roles select a skeleton, the skeleton lists the pieces that the
document consists of, and each piece is a run of tokens: a known one, or an encoded text. Each distinct text of a batch
is encoded once, however many documents contain it. Documents without a skeleton are rendered individually.

What a corpus shares is in `SkeletonCache`; a `BatchEncoder` serves one batch. While one batch is laid out, a thread
encodes the texts of the next (`prefetch`).

Shape legend: R requests (documents), P pieces, K distinct texts, S spans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ismdata.arrays import IntArray, offsets_of
from ismdata.conversation import Refusal
from ismdata.masks import ANSWER, END, KIND, START, TRAIN
from ismdata.pack.conversation_batch import ConversationBatch
from ismdata.pack.individual import RenderedDocuments, render_individually
from ismdata.pack.pieces import PieceBlock, number_rows
from ismdata.pack.requests import PieceTable, RequestKey, Requests, TokenizedDocuments
from ismdata.pack.skeleton_cache import SkeletonCache
from ismdata.pack.texts import BatchTexts, EncodedTexts, TextGroup, merge_groups
from ismdata.pack.token_runs import BatchRuns
from ismdata.rendering import insert_glm_tokens


@dataclass(frozen=True, kw_only=True)
class PrefetchedBatch:
    """A batch whose texts a background thread is encoding. Returned by `prefetch`, for a `BatchEncoder`.

    Attributes:
        batch: The batch.
        requests: One document per conversation or answer; splitting may ask for others later.
        skeleton: int64[R], the skeleton of each; -1 for none.
        refused: Documents whose roles the template refuses, by request.
        block: The pieces of documents with a skeleton; the run numbers of texts are -1 until they are encoded.
        texts: int64, the pieces that are texts.
        key_of_text: int64, for each of them its row in `keys`.
        keys: int64[K, 1 + slots], distinct keys.
        rendered: The documents without a skeleton.
        groups: The texts of `keys` (places 0 to K - 1) and of the pieces of `rendered` (places from K on).
        encoded: For each group the ids, stored end to end, and the number of ids of each text. Empty until `prefetch`
            has submitted the texts.
    """

    batch: ConversationBatch
    requests: Requests
    skeleton: IntArray
    refused: Mapping[int, Refusal]
    block: PieceBlock
    texts: IntArray
    key_of_text: IntArray
    keys: IntArray
    rendered: RenderedDocuments
    groups: Sequence[TextGroup]
    encoded: Sequence[Future[tuple[NDArray[np.int32], IntArray]]]


def prefetch(cache: SkeletonCache, batch: ConversationBatch, requests: Requests, thread: Executor) -> PrefetchedBatch:
    """Prepare a batch, and have `thread` encode its texts while another batch is laid out.

    Args:
        cache: What the corpus shares.
        batch: The batch.
        requests: One document per conversation or answer; splitting may ask for others later.
        thread: Runs the tokenizer.

    Returns:
        The prepared batch.
    """
    prepared = prepare(cache, batch, requests)
    encode = cache.backend.encode
    return replace(
        prepared, encoded=[thread.submit(encode, group.texts, opening=group.opening) for group in prepared.groups]
    )


def prepare(cache: SkeletonCache, batch: ConversationBatch, requests: Requests) -> PrefetchedBatch:
    """Do what `prefetch` does before it encodes: find the pieces of documents and their distinct texts."""
    match = cache.match(batch, requests)
    matched = np.flatnonzero(match.skeleton >= 0)
    filled = cache.fill(batch, requests, matched, match.skeleton[matched])
    key_of_text, firsts = number_rows(filled.keys)
    keys = filled.keys[firsts]
    rendered = render_individually(cache, batch, requests.keys(match.individual()))
    texts = [*BatchTexts(cache, batch.contents).of_keys(keys), *rendered.texts(len(keys))]
    groups = merge_groups(texts, openings_differ=cache.openings_differ)
    return PrefetchedBatch(
        batch=batch,
        requests=requests,
        skeleton=match.skeleton,
        refused=match.refused,
        block=filled.block,
        texts=filled.texts,
        key_of_text=key_of_text,
        keys=keys,
        rendered=rendered,
        groups=groups,
        encoded=(),
    )


@dataclass(frozen=True, kw_only=True)
class _KnownDocuments:
    """The pieces of prefetched documents, all texts encoded; the fields are those of `PrefetchedBatch`."""

    requests: Requests
    skeleton: IntArray
    refused: Mapping[int, Refusal]
    block: PieceBlock

    def places(self, requests: Requests) -> IntArray:
        """Return for each request the place of the known document with the same messages; -1 if there is none."""
        names = ("conversation", "head", "lo", "hi")
        known, wanted = (
            np.stack([getattr(each, name) for name in names], axis=1, dtype=np.int64)
            for each in (self.requests, requests)
        )
        if np.array_equal(known, wanted):
            return np.arange(len(wanted))
        numbers, firsts = number_rows(np.concatenate([known, wanted]))
        places = firsts[numbers[len(known) :]]
        return np.where(places < len(known), places, -1)


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """Documents while they are laid out: the skeleton of each (int64[R], -1 for none), refusals and pieces so far."""

    requests: Requests
    skeleton: IntArray
    refused: dict[int, Refusal] = field(default_factory=dict)
    blocks: list[PieceBlock] = field(default_factory=list)


class BatchEncoder:
    """Lays out and tokenizes the documents of one batch.

    Args:
        cache: What the corpus shares.
        batch: The batch.
        prefetched: What `prefetch` returned for this batch. The constructor waits for its texts.
    """

    def __init__(
        self, cache: SkeletonCache, batch: ConversationBatch, prefetched: PrefetchedBatch | None = None
    ) -> None:
        self.cache = cache
        self.batch = batch
        #: Messages of the batch whose reasoning the template omits from their own answer.
        self.unwritten: set[int] = set()
        self._runs = BatchRuns(cache.runs)
        self._texts = BatchTexts(cache, batch.contents)
        self._encoded = EncodedTexts()
        self._rendered: dict[RequestKey, PieceBlock | Refusal] = {}
        self._known = self._add_prefetched(prefetched) if prefetched is not None else None

    def lay_out(self, requests: Requests) -> PieceTable:
        """Return the pieces of documents, encoding the texts that are new to this batch."""
        draft = _Draft(requests=requests, skeleton=np.full(len(requests), -1))
        fresh = self._add_known(draft)
        if len(fresh):
            self._add_matched(draft, fresh)
        self._add_individual(draft)
        return self._tabulate(draft)

    def documents(self, table: PieceTable, requests: Requests) -> TokenizedDocuments:
        """Return the tokens and spans of documents that were laid out, in the order of the requests."""
        count = len(requests)
        lengths = table.document_lengths(count)
        opens = np.ones(len(table.request), bool)
        opens[1:] = (table.request[1:] != table.request[:-1]) | (table.span[1:] != table.span[:-1])
        first_piece = np.flatnonzero(opens)
        span_lengths = np.add.reduceat(table.length, first_piece) if len(first_piece) else np.empty(0, np.int64)
        first_piece, span_lengths = first_piece[span_lengths > 0], span_lengths[span_lengths > 0]
        owner = table.request[first_piece]
        ends = np.cumsum(span_lengths) - offsets_of(lengths)[owner]
        kind, message = table.kind[first_piece], table.message[first_piece]
        answers = (kind == ANSWER) & (message >= 0)
        target_from = self.batch.first[requests.conversation[owner]] + requests.target_from[owner]
        spans = np.empty((len(first_piece), 4), np.int32)
        spans[:, START] = ends - span_lengths
        spans[:, END] = ends
        spans[:, KIND] = kind
        spans[:, TRAIN] = answers & self.batch.trained[np.maximum(message, 0)] & (message >= target_from)
        weights = np.ones(len(first_piece), np.float32)
        if self.batch.weight is not None:
            weights[answers] = self.batch.weight[message[answers]]
        return TokenizedDocuments(
            input_ids=self._runs.tokens_of(table.run),
            lengths=lengths,
            span_counts=np.bincount(owner, minlength=count).astype(np.int64),
            spans=spans,
            span_weights=weights,
        )

    def stray_controls(self, table: PieceTable, documents: TokenizedDocuments) -> IntArray:
        """Return the documents with more control tokens than the template wrote: text became a control token."""
        found = self.cache.encoding.tokenizer.find_controls(documents.input_ids)
        count = len(documents.lengths)
        owner = np.searchsorted(np.cumsum(documents.lengths), found, side="right")
        written = np.bincount(table.request, weights=table.controls, minlength=count)
        return np.flatnonzero(np.bincount(owner, minlength=count) != written)

    def _add_prefetched(self, prefetched: PrefetchedBatch) -> _KnownDocuments:
        """Wait for the prefetched texts; store them and the documents that were rendered individually."""
        count = len(prefetched.keys)
        encoded = [future.result() for future in prefetched.encoded]
        runs = self._add_runs(prefetched.groups, encoded, count + len(prefetched.rendered.pieces))
        self._encoded.add(prefetched.keys, runs[:count])
        self._add_rendered(prefetched.rendered, runs[count:])
        run = prefetched.block.run.copy()
        run[prefetched.texts] = runs[prefetched.key_of_text]
        return _KnownDocuments(
            requests=prefetched.requests,
            skeleton=prefetched.skeleton,
            refused=prefetched.refused,
            block=replace(prefetched.block, run=run),
        )

    def _add_known(self, draft: _Draft) -> IntArray:
        """Add the documents that were prefetched with a skeleton or a refusal; return the requests that were not."""
        known = self._known
        if known is None:
            return np.arange(len(draft.requests))
        places = known.places(draft.requests)
        found = np.flatnonzero(places >= 0)
        draft.skeleton[found] = known.skeleton[places[found]]
        if known.refused:
            refused = {r: known.refused[place] for r, place in enumerate(places.tolist()) if place in known.refused}
            draft.refused.update(refused)
        draft.blocks.append(known.block.select(places[found], found, len(known.requests)))
        return np.flatnonzero(places < 0)

    def _add_matched(self, draft: _Draft, fresh: IntArray) -> None:
        """Add those of the requests `fresh` that have a skeleton or a refusal."""
        match = self.cache.match(self.batch, draft.requests.take(fresh))
        draft.skeleton[fresh] = match.skeleton
        draft.refused.update({int(fresh[r]): refusal for r, refusal in match.refused.items()})
        matched = fresh[match.skeleton >= 0]
        filled = self.cache.fill(self.batch, draft.requests, matched, draft.skeleton[matched])
        if len(filled.texts):
            filled.block.run[filled.texts] = self._encoded.runs_of(filled.keys, self._encode_keys)
        draft.blocks.append(filled.block)

    def _add_individual(self, draft: _Draft) -> None:
        """Add the remaining documents; each is rendered once per batch."""
        individual = [r for r in np.flatnonzero(draft.skeleton < 0).tolist() if r not in draft.refused]
        keys = draft.requests.keys(individual)
        fresh = render_individually(self.cache, self.batch, [key for key in keys if key not in self._rendered])
        self._add_rendered(fresh, self._encode(fresh.texts(0), len(fresh.pieces)))
        for request, key in zip(individual, keys, strict=True):
            found = self._rendered[key]
            if isinstance(found, Refusal):
                draft.refused[request] = found
            else:
                draft.blocks.append(replace(found, request=np.full(len(found.span), request, np.int64)))

    def _add_rendered(self, rendered: RenderedDocuments, runs: IntArray) -> None:
        """Store documents that were rendered individually. runs: int64, of those of their pieces that are texts."""
        pieces = rendered.pieces
        known = [k for k, piece in enumerate(pieces) if piece.ids is not None]
        ids = [np.array(pieces[k].ids, np.int32) for k in known]
        if ids:
            runs[known] = self._runs.add(np.concatenate(ids), np.fromiter(map(len, ids), np.int64, len(ids)))
        at = 0
        for key, found in rendered.documents.items():
            if isinstance(found, Refusal):
                self._rendered[key] = found
                continue
            c, head, lo, _ = key
            for piece in found:
                if piece.unwritten:
                    number = piece.message if piece.message < head else piece.message - head + lo
                    self.unwritten.add(int(self.batch.first[c]) + number)
            self._rendered[key] = PieceBlock(
                request=np.zeros(len(found), np.int64),
                span=np.array([piece.span for piece in found], np.int64),
                kind=np.array([piece.kind for piece in found], np.int64),
                message=np.array([piece.message for piece in found], np.int64),
                run=runs[at : at + len(found)],
                controls=np.array([piece.controls for piece in found], np.int64),
            )
            at += len(found)

    def _tabulate(self, draft: _Draft) -> PieceTable:
        """All pieces with their lengths, in the layout of the encoding."""
        pieces = PieceBlock.merge(draft.blocks)
        request, message = pieces.request, pieces.message
        in_batch = draft.requests.in_batch(self.batch, request, np.maximum(message, 0))
        columns = {
            "request": request,
            "span": pieces.span,
            "kind": pieces.kind,
            "message": np.where(message < 0, -1, in_batch),
            "run": pieces.run,
            "length": self._runs.lengths_of(pieces.run),
            "controls": pieces.controls,
        }
        glm = self.cache.encoding.glm
        if glm is not None:
            columns = insert_glm_tokens(columns, self.cache.glm_runs(), every_answer=glm.every_answer)
        return PieceTable(**columns, refused=draft.refused).without_tails(draft.requests)

    def _encode_keys(self, keys: IntArray) -> IntArray:
        """Encode the texts of keys; return their runs."""
        return self._encode(self._texts.of_keys(keys), len(keys))

    def _encode(self, groups: Sequence[TextGroup], count: int) -> IntArray:
        """Encode texts; return their runs, int64[count], at the places of the groups."""
        merged = merge_groups(groups, openings_differ=self.cache.openings_differ)
        encode = self.cache.backend.encode
        return self._add_runs(merged, [encode(group.texts, opening=group.opening) for group in merged], count)

    def _add_runs(
        self, groups: Sequence[TextGroup], encoded: Sequence[tuple[NDArray[np.int32], IntArray]], count: int
    ) -> IntArray:
        """Add the runs of encoded groups; return their numbers, int64[count], at the places of the groups."""
        runs = np.zeros(count, np.int64)
        for group, (ids, lengths) in zip(groups, encoded, strict=True):
            runs[group.places] = self._runs.add(ids, lengths)
        return runs
