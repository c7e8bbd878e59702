"""Conversations x template x tokenizer -> documents: token and span columns for a whole batch at once.

A document is asked for as a range of a conversation's messages. Its roles pick a skeleton, the skeleton says which
pieces it is made of, and a piece is a run of tokens: known ones, or the encoding of a text that stands around one or
more contents. Every text is encoded once a batch, however many documents hold it. What has no skeleton is rendered by
itself.

Nothing here loops over messages or tokens in Python, except for conversations that must be rendered by themselves.

Shape legend: C conversations, M messages, R requests (documents), P pieces, S spans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ismdata.arrays import ragged_arange
from ismdata.choices import History
from ismdata.conversation import ROLES, Refusal
from ismdata.errors import Refused
from ismdata.masks import ANSWER, END, KIND, START, TRAIN
from ismdata.pack.conversation_batch import ConversationBatch, IntArray
from ismdata.pack.pieces import (
    NO_PIECES,
    Ahead,
    PieceBlock,
    Rendered,
    RequestKey,
    Skeleton,
    Texts,
    distinct,
    joined,
    pad,
    request_keys,
    together,
)
from ismdata.pack.requests import PieceTable, Requests, TokenizedDocuments, without_tail
from ismdata.pack.token_runs import RunTable, as_runs, taken_runs
from ismdata.rendering import (
    GlmTokens,
    NotDecomposable,
    Piece,
    Renderer,
    SkeletonBuilder,
    Slot,
    Tokenizer,
    TokenizerEngine,
    as_template_messages,
    insert_markers,
    render_document,
)


class DocumentEncoder:
    """Makes documents of conversations. One encoder serves a whole corpus; `begin` starts a batch.

    use_skeletons: off where the columnar road turned out not to give what the template renders. backend: makes the ids
    of texts; by default the tokenizer itself. glm: what to put before answers in the GLM layout. without_reasoning:
    reasoning in answers is no target.
    """

    def __init__(
        self,
        renderer: Renderer,
        tokenizer: Tokenizer,
        history: History,
        *,
        use_skeletons: bool = True,
        backend: TokenizerEngine | None = None,
        glm: GlmTokens | None = None,
        without_reasoning: bool = False,
    ) -> None:
        self.without_reasoning = without_reasoning
        self.renderer = renderer
        self.tokenizer = tokenizer
        self.history = history
        self.use_skeletons = use_skeletons
        self.backend = backend
        self.glm = glm
        self._skeleton_builder = SkeletonBuilder(renderer, tokenizer, history)
        self._skeletons: dict[bytes, Skeleton | Refusal | None] = {}
        self._shapes: dict[tuple[Any, ...], int] = {}
        self._shape_list: list[tuple[Any, ...]] = []
        self._static = RunTable()

    def begin(self, batch: ConversationBatch | Ahead) -> None:
        """Start a batch: the texts of earlier ones are forgotten. What `ahead` gave goes on from there."""
        ahead = batch if isinstance(batch, Ahead) else None
        self.batch: ConversationBatch = ahead.batch if ahead else batch  # type: ignore[assignment]
        self._begun: Ahead | None = None  # what `ahead` gave, every text in it encoded
        self._latest: tuple[Requests, PieceTable] | None = None
        self._encoded = RunTable()
        self._joined: tuple[tuple[int, int], pa.LargeBinaryArray] | None = None
        self._rendered: dict[RequestKey, PieceBlock | Refusal] = {}
        self._keys = np.empty((0, 1), np.int64)
        self._key_runs = np.empty(0, np.int64)
        self._stripped: dict[tuple[str, str], pa.LargeStringArray] = {}
        #: Messages of the batch whose reasoning the template leaves out of their own answer.
        self.unwritten: set[int] = set()
        self._ahead = ahead

    def ahead(self, batch: ConversationBatch, requests: Requests, thread: Executor) -> Ahead:
        """Begin a batch, and have `thread` encode its texts while another batch is worked on."""
        self.begin(batch)
        skeleton_of, refused = self._match(requests)
        matched = np.flatnonzero(skeleton_of >= 0)
        block, texts, keys = self._pieces(matched, skeleton_of[matched], requests)
        key_of, firsts = distinct(keys)
        singles = [r for r in np.flatnonzero(skeleton_of < 0).tolist() if r not in refused]
        rendered = self._render(request_keys(requests, singles))
        groups = self._together([*self._grouped_texts(keys[firsts]), *rendered.texts(len(firsts))])
        return Ahead(
            batch=batch,
            requests=requests,
            skeleton_of=skeleton_of,
            refused=refused,
            block=block,
            texts=texts,
            key_of=key_of,
            keys=keys[firsts],
            rendered=rendered,
            groups=groups,
            encoded=[thread.submit(self._ids, group.texts, group.opening) for group in groups],
        )

    def lay_out(self, requests: Requests) -> PieceTable:
        """The pieces of the documents asked for, every text in them encoded."""
        if self._latest is None or not self._latest[0].equals(requests):
            self._latest = requests, self._lay_out(requests)
        return self._latest[1]

    def _lay_out(self, requests: Requests) -> PieceTable:
        batch = self.batch
        first = batch.first[requests.conversation]
        refused: dict[int, Refusal] = {}
        blocks: list[PieceBlock] = []
        skeleton_of = np.full(len(requests), -1)
        fresh = np.arange(len(requests))
        begun = self._taken()
        if begun is not None:
            places = begun.places(requests)
            known, fresh = np.flatnonzero(places >= 0), np.flatnonzero(places < 0)
            skeleton_of[known] = begun.skeleton_of[places[known]]
            if begun.refused:
                refused |= {r: begun.refused[p] for r, p in enumerate(places.tolist()) if p in begun.refused}
            blocks.append(begun.block.of(places[known], known, len(begun.requests)))
        if len(fresh):
            skeleton_of[fresh], found = self._match(requests.take(fresh))
            refused |= {int(fresh[r]): refusal for r, refusal in found.items()}
            matched = fresh[skeleton_of[fresh] >= 0]
            blocks.append(self._fill(matched, skeleton_of[matched], requests))
        singles = [r for r in np.flatnonzero(skeleton_of < 0).tolist() if r not in refused]
        blocks += self._by_themselves(singles, requests, refused)
        pieces = joined(blocks)
        request, message, run = pieces.request, pieces.message, pieces.run
        number = np.maximum(message, 0)
        in_head = number < requests.head[request]
        in_batch = first[request] + np.where(in_head, number, number - requests.head[request] + requests.lo[request])
        columns = {
            "request": request,
            "span": pieces.span,
            "kind": pieces.kind,
            "message": np.where(message < 0, -1, in_batch),
            "run": run,
            "length": self._run_column(run, RunTable.all_lengths),
            "controls": pieces.controls,
        }
        if self.glm is not None:
            runs = self._static.share((self.glm.mask_id,)), self._static.share((self.glm.start_id,))
            columns = insert_markers(columns, runs, every_answer=self.glm.every_answer)
        return without_tail(PieceTable(**columns, refused=refused), requests)

    def documents(self, layout: PieceTable, requests: Requests) -> TokenizedDocuments:
        """The tokens and spans of laid-out documents, in the order of the requests."""
        numbers = np.where(layout.run < 0, len(self._static) - 1 - layout.run, layout.run)
        input_ids = taken_runs(self._all_runs(), numbers)
        count = len(requests)
        lengths = layout.document_lengths(count)

        opens = np.ones(len(layout.request), bool)
        opens[1:] = (layout.request[1:] != layout.request[:-1]) | (layout.span[1:] != layout.span[:-1])
        group = np.flatnonzero(opens)
        span_lengths = np.add.reduceat(layout.length, group) if len(group) else np.empty(0, np.int64)
        group = group[span_lengths > 0]
        span_lengths = span_lengths[span_lengths > 0]
        owner = layout.request[group]
        ends = np.cumsum(span_lengths)
        base = np.concatenate([[0], np.cumsum(lengths)])[owner]
        message = layout.message[group]
        answers = (layout.kind[group] == ANSWER) & (message >= 0)
        target_from = self.batch.first[requests.conversation[owner]] + requests.target_from[owner]
        spans = np.empty((len(group), 4), np.int32)
        spans[:, START] = ends - span_lengths - base
        spans[:, END] = ends - base
        spans[:, KIND] = layout.kind[group]
        spans[:, TRAIN] = answers & self.batch.trained[np.maximum(message, 0)] & (message >= target_from)
        weights = np.ones(len(group), np.float32)
        if self.batch.weight is not None:
            weights[answers] = self.batch.weight[message[answers]]
        return TokenizedDocuments(
            input_ids=input_ids,
            lengths=lengths,
            span_counts=np.bincount(owner, minlength=count).astype(np.int64),
            spans=spans,
            span_weights=weights,
        )

    def stray_controls(self, layout: PieceTable, documents: TokenizedDocuments) -> IntArray:
        """Requests in which text became a control token: more of them than the template wrote."""
        found = self.tokenizer.find_controls(documents.input_ids)
        requests = len(documents.lengths)
        owner = np.searchsorted(np.cumsum(documents.lengths), found, side="right")
        count = np.bincount(owner, minlength=requests)
        written = np.bincount(layout.request, weights=layout.controls, minlength=requests)
        return np.flatnonzero(count != written)

    # -- which skeleton a request has ----------------------------------------------------------------------------------

    def _taken(self) -> Ahead | None:
        """What `ahead` began of this batch, every text in it encoded; None where nothing was begun."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            known, pieces = len(ahead.keys), len(ahead.rendered.pieces)
            runs = self._runs(ahead.groups, [future.result() for future in ahead.encoded], known + pieces)
            self._remember(ahead.keys, runs[:known])
            self._keep(ahead.rendered, runs[known:])
            self._begun = ahead.with_runs(runs[:known])
        return self._begun

    def _match(self, requests: Requests) -> tuple[IntArray, dict[int, Refusal]]:
        """For every request the number of its skeleton, -1 where it has none; and what no template takes."""
        batch = self.batch
        first = batch.first[requests.conversation]
        head, body = requests.head, requests.hi - requests.lo
        counts = np.stack([head, body], axis=1).reshape(-1)
        begins = np.stack([first, first + requests.lo], axis=1).reshape(-1)
        codes = batch.roles[ragged_arange(begins, counts)]
        offsets = np.concatenate([[0], np.cumsum(head + body)]).astype(np.int64)
        sequences = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(requests), [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(codes))]
        ).dictionary_encode()
        numbers: list[int] = []
        refusals: dict[int, Refusal] = {}
        for place, key in enumerate(sequences.dictionary.to_pylist()):
            found = self._skeleton(key)
            numbers.append(found.number if isinstance(found, Skeleton) else -1)
            if isinstance(found, Refusal):
                refusals[place] = found
        indices = sequences.indices.to_numpy()
        skeleton_of = np.array(numbers, np.int64)[indices] if len(requests) else np.empty(0, np.int64)
        by_itself = batch.by_itself[requests.conversation] | (not self.use_skeletons)
        skeleton_of[by_itself] = -1
        refused = {
            request: refusal
            for place, refusal in refusals.items()
            for request in np.flatnonzero((indices == place) & ~by_itself).tolist()
        }
        return skeleton_of, refused

    def _skeleton(self, key: bytes) -> Skeleton | Refusal | None:
        if key not in self._skeletons:
            roles = [ROLES[code] for code in key]
            found: Skeleton | Refusal | None
            try:
                pieces = self._skeleton_builder.build(roles)
            except NotDecomposable:
                found = None
            except Refused as error:
                found = Refusal(reason=error.reason, detail=error.detail)
            else:
                found = self._tabulate(pieces)
            self._skeletons[key] = found
        return self._skeletons[key]

    def _tabulate(self, pieces: Sequence[Piece]) -> Skeleton:
        """Pieces as columns. Known runs and shapes are shared by all skeletons."""
        width = max((sum(isinstance(part, Slot) for part in piece.parts) for piece in pieces), default=0)
        columns = np.full((len(pieces), 6 + width), -1, np.int64)
        for row, piece in zip(columns, pieces, strict=True):
            run = shape = -1
            if piece.ids is not None:
                run = self._static.share(piece.ids)
            else:
                slots = [part.message for part in piece.parts if isinstance(part, Slot)]
                shape = self._shape(piece)
                row[6 : 6 + len(slots)] = slots
            row[:6] = piece.span, piece.kind, piece.message, run, shape, piece.controls
        number = sum(isinstance(found, Skeleton) for found in self._skeletons.values())
        return Skeleton(number=number, columns=columns)

    def _shape(self, piece: Piece) -> int:
        """The number of a piece's text less its contents: what stands around the slots, and how they are stripped."""
        key = (
            piece.opening,
            *(part if isinstance(part, str) else (part.left, part.right) for part in piece.parts),
        )
        if key not in self._shapes:
            self._shapes[key] = len(self._shape_list)
            self._shape_list.append(key)
        return self._shapes[key]

    # -- filling skeletons ---------------------------------------------------------------------------------------------

    def _fill(self, matched: IntArray, numbers: IntArray, requests: Requests) -> PieceBlock:
        """The pieces of the requests that have a skeleton."""
        block, texts, keys = self._pieces(matched, numbers, requests)
        if len(texts):
            block.run[texts] = self._encode(keys)
        return block

    def _pieces(
        self, matched: IntArray, numbers: IntArray, requests: Requests
    ) -> tuple[PieceBlock, IntArray, IntArray]:
        """The same, the runs of texts left open: which pieces these are, and each one's key, its shape and the messages
        in its slots."""
        if not len(matched):
            return NO_PIECES, np.empty(0, np.int64), np.empty((0, 1), np.int64)
        tables = {found.number: found.columns for found in self._skeletons.values() if isinstance(found, Skeleton)}
        used, inverse = np.unique(numbers, return_inverse=True)
        width = max(tables[number].shape[1] for number in used.tolist())
        padded = [pad(tables[number], width) for number in used.tolist()]
        counts = np.array([len(table) for table in padded])
        begins = np.cumsum(counts) - counts
        pieces = np.concatenate(padded)[ragged_arange(begins[inverse], counts[inverse])]
        request = np.repeat(matched, counts[inverse])

        texts = np.flatnonzero(pieces[:, 4] >= 0)
        slots = pieces[texts, 6:]
        owner = request[texts, None]
        head = requests.head[owner]
        inside = np.where(slots < head, slots, slots - head + requests.lo[owner])
        in_batch = self.batch.first[requests.conversation[owner]] + inside
        keys = np.concatenate([pieces[texts, 4:5], np.where(slots < 0, -1, in_batch)], axis=1)
        block = PieceBlock(
            request=request,
            span=pieces[:, 0].copy(),
            kind=pieces[:, 1].copy(),
            message=pieces[:, 2].copy(),
            run=pieces[:, 3].copy(),
            controls=pieces[:, 5].copy(),
        )
        return block, texts, keys

    def _encode(self, keys: IntArray) -> IntArray:
        """Run numbers (negative: in the batch's table) of texts given by their keys."""
        width = max(keys.shape[1], self._keys.shape[1])
        known = len(self._keys)
        every = np.ascontiguousarray(np.concatenate([pad(self._keys, width), pad(keys, width)]))
        numbers, firsts = distinct(every)
        fresh = every[firsts[firsts >= known]]
        self._remember(fresh, self._encoded_runs(self._grouped_texts(fresh), len(fresh)))
        found: IntArray = self._key_runs[numbers][known:]
        return found

    def _remember(self, keys: IntArray, runs: IntArray) -> None:
        """Texts of which every one is new, and their runs."""
        width = max(keys.shape[1], self._keys.shape[1])
        self._keys = np.concatenate([pad(self._keys, width), pad(keys, width)])
        self._key_runs = np.concatenate([self._key_runs, runs])

    def _grouped_texts(self, keys: IntArray) -> list[Texts]:
        """The texts of keys, a group for each shape."""
        groups = []
        for shape in np.unique(keys[:, 0]).tolist():
            opening, *parts = self._shape_list[shape]
            places = np.flatnonzero(keys[:, 0] == shape)
            groups.append(Texts(texts=self._texts(parts, keys[places, 1:]), opening=opening, places=places))
        return groups

    def _together(self, groups: Iterable[Texts]) -> list[Texts]:
        """Groups to encode: as few as can be."""
        reference = self.tokenizer.reference
        return together(groups, apart=reference.opening is not reference.inside)

    def _encoded_runs(self, groups: Iterable[Texts], count: int) -> IntArray:
        """Encode grouped texts; run numbers as of `_runs`."""
        groups = self._together(groups)
        return self._runs(groups, [self._ids(group.texts, group.opening) for group in groups], count)

    def _runs(
        self, groups: Sequence[Texts], encoded: Sequence[tuple[NDArray[np.int32], IntArray]], count: int
    ) -> IntArray:
        """Run numbers of grouped texts, by the places of these, which are below `count`."""
        runs = np.zeros(count, np.int64)
        for group, ids in zip(groups, encoded, strict=True):
            runs[group.places] = -1 - self._encoded.add(*ids)
        return runs

    def _texts(self, parts: Sequence[Any], messages: IntArray) -> pa.LargeStringArray:
        """The texts of one shape, for each row of messages in its slots."""
        columns: list[Any] = []
        slot = 0
        for part in parts:
            if isinstance(part, str):
                columns.append(pa.scalar(part, pa.large_string()))
            else:
                columns.append(self._contents(*part).take(pa.array(messages[:, slot])))
                slot += 1
        if len(columns) == 1:
            return columns[0]
        return pc.binary_join_element_wise(*columns, pa.scalar("", pa.large_string()))

    def _contents(self, left: str, right: str) -> pa.LargeStringArray:
        """The batch's contents, stripped as a slot says."""
        if (left, right) not in self._stripped:
            column = self.batch.contents
            if left == right == "blanks":
                column = pc.utf8_trim_whitespace(column)
            else:
                if left:
                    column = pc.utf8_ltrim_whitespace(column) if left == "blanks" else pc.utf8_ltrim(column, "\n")
                if right:
                    column = pc.utf8_rtrim_whitespace(column) if right == "blanks" else pc.utf8_rtrim(column, "\n")
            self._stripped[left, right] = column
        return self._stripped[left, right]

    # -- rendering by itself -------------------------------------------------------------------------------------------

    def _by_themselves(
        self, singles: Sequence[int], requests: Requests, refused: dict[int, Refusal]
    ) -> list[PieceBlock]:
        """The pieces of requests without a skeleton; adds to `refused`. Each is rendered once a batch."""
        keys = request_keys(requests, singles)
        fresh = self._render([key for key in keys if key not in self._rendered])
        self._keep(fresh, self._encoded_runs(fresh.texts(0), len(fresh.pieces)))
        blocks: list[PieceBlock] = []
        for request, key in zip(singles, keys, strict=True):
            found = self._rendered[key]
            if isinstance(found, Refusal):
                refused[request] = found
            else:
                blocks.append(replace(found, request=np.full(len(found.span), request, np.int64)))
        return blocks

    def _render(self, keys: Iterable[RequestKey]) -> Rendered:
        """The documents of these keys, rendered by themselves, their texts not encoded."""
        documents: dict[RequestKey, tuple[Piece, ...] | Refusal] = {}
        for key in dict.fromkeys(keys):
            c, head, lo, hi = key
            try:
                messages, tools = as_template_messages(self.batch.conversation(c))
                asked = messages[:head] + messages[lo:hi]
                found = render_document(
                    self.renderer,
                    self.tokenizer,
                    asked,
                    tools,
                    self.history,
                    encode=False,
                    without_reasoning=self.without_reasoning,
                )
            except Refused as refusal:
                documents[key] = Refusal(reason=refusal.reason, detail=refusal.detail)
            else:
                documents[key] = found
        return Rendered(documents=documents)

    def _keep(self, rendered: Rendered, runs: IntArray) -> None:
        """Remember documents that were rendered by themselves. runs: of their pieces, where these are texts."""
        documents = [(key, found) for key, found in rendered.documents.items() if not isinstance(found, Refusal)]
        self._rendered |= {key: found for key, found in rendered.documents.items() if isinstance(found, Refusal)}
        pieces = rendered.pieces
        known = [k for k, piece in enumerate(pieces) if piece.ids is not None]
        ids = [np.array(pieces[k].ids, np.int32) for k in known]
        if ids:
            lengths = np.fromiter(map(len, ids), np.int64, len(ids))
            runs[known] = -1 - self._encoded.add(np.concatenate(ids), lengths)
        at = 0
        for key, own in documents:
            c, head, lo, _ = key
            for piece in own:
                if piece.unwritten:
                    number = piece.message if piece.message < head else piece.message - head + lo
                    self.unwritten.add(int(self.batch.first[c]) + number)
            self._rendered[key] = PieceBlock(
                request=np.zeros(len(own), np.int64),
                span=np.array([piece.span for piece in own], np.int64),
                kind=np.array([piece.kind for piece in own], np.int64),
                message=np.array([piece.message for piece in own], np.int64),
                run=runs[at : at + len(own)],
                controls=np.array([piece.controls for piece in own], np.int64),
            )
            at += len(own)

    def _ids(self, texts: pa.LargeStringArray, opening: bool) -> tuple[NDArray[np.int32], IntArray]:
        encode = self.backend.encode if self.backend else self.tokenizer.encode_flat
        return encode(texts, opening=opening)

    def _all_runs(self) -> pa.LargeBinaryArray:
        """The runs of the static table, and behind them the batch's; joined anew only where there are more by now."""
        counts = len(self._static), len(self._encoded)
        if self._joined is None or self._joined[0] != counts:
            pool = np.concatenate([self._static.pool(), self._encoded.pool()])
            self._joined = counts, as_runs(pool, np.concatenate([self._static.lengths(), self._encoded.lengths()]))
        return self._joined[1]

    def _run_column(self, run: IntArray, column: Callable[[RunTable], IntArray]) -> IntArray:
        """A property of runs, from the static table (numbers from 0 up) or the batch's (from -1 down)."""
        static, encoded = column(self._static), column(self._encoded)
        return np.where(run >= 0, static[np.maximum(run, -1)], encoded[np.maximum(-1 - run, -1)])
