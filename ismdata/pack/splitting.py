"""Documents that are longer than a sequence: split at turn borders, dropped, truncated, or an error.

A turn here is an answer with the context before it. A piece of a split conversation repeats the system prompt, holds
consecutive turns, ends with an answer and keeps as much history as fits; each answer is a target in exactly one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ismdata.conversation import USER, Refusal
from ismdata.masks import PROMPT
from ismdata.pack.conversation_batch import ConversationBatch, IntArray
from ismdata.pack.document_encoder import DocumentEncoder
from ismdata.pack.requests import PieceTable, Requests

#: Laying a split out again settles after two or three rounds; this bounds a template that never settles.
_MOST_ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class Turns:
    """The turns of one document, by tokens; lists have length K. `prefix` is what every piece repeats.

    `opens`: the turn begins with a user's message, so that a piece may begin with it. A tool's result without the call
    that it answers, or an answer without its question, makes no document.
    """

    head: int
    prefix: int
    lengths: tuple[int, ...]
    answers: tuple[int, ...]  # message numbers within the conversation
    targets: tuple[bool, ...]
    opens: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class TurnRange:
    """Turns `first` to `last` (inclusive); those from `target` on are trained here, those before are history."""

    first: int
    last: int
    target: int


def split_turns(
    lengths: Sequence[int], targets: Sequence[bool], *, prefix: int, seq_len: int, extra: int = 0
) -> list[TurnRange] | int:
    """Pieces that cover each target turn once, or the number of a target turn that does not fit by itself.

    lengths: tokens of each turn. prefix: tokens repeated in each piece. extra: tokens that a piece needs on top when
    it does not begin with the first turn. Each piece takes as many new turns as fit, then as much history as fits.

    >>> split_turns([4, 4, 4, 4], [True] * 4, prefix=2, seq_len=10)
    [TurnRange(first=0, last=1, target=0), TurnRange(first=2, last=3, target=2)]
    >>> split_turns([4, 4, 4], [True] * 3, prefix=2, seq_len=10)[-1]
    TurnRange(first=1, last=2, target=2)
    """
    pieces: list[TurnRange] = []
    turn = next((k for k, target in enumerate(targets) if target), None)
    while turn is not None:
        room = seq_len - prefix - (extra if turn else 0) - lengths[turn]
        if room < 0:
            return turn
        last, ahead, left = turn, turn + 1, room
        while ahead < len(lengths) and lengths[ahead] <= left:
            left -= lengths[ahead]
            if targets[ahead]:
                last, room = ahead, left
            ahead += 1
        first = turn
        while first > 0 and lengths[first - 1] <= room + (extra if first == 1 else 0):
            first -= 1
            room -= lengths[first]
        pieces.append(TurnRange(first=first, last=last, target=turn))
        turn = next((k for k in range(last + 1, len(targets)) if targets[k]), None)
    return pieces


def split_at_questions(turns: Turns, *, seq_len: int, extra: int = 0) -> list[TurnRange] | int:
    """As `split_turns`, with pieces that begin with a user's message, where every such stretch fits; else at any
    turn.
    """
    starts = [k for k, opens in enumerate(turns.opens) if opens or k == 0]
    ends = [*starts[1:], len(turns.lengths)]
    groups = list(zip(starts, ends, strict=True))
    pieces = split_turns(
        [sum(turns.lengths[a:b]) for a, b in groups],
        [any(turns.targets[a:b]) for a, b in groups],
        prefix=turns.prefix,
        seq_len=seq_len,
        extra=extra,
    )
    if isinstance(pieces, int):
        return split_turns(turns.lengths, turns.targets, prefix=turns.prefix, seq_len=seq_len, extra=extra)
    whole = []
    for piece in pieces:
        first_target, last = groups[piece.target][0], groups[piece.last][1] - 1
        target = next(k for k in range(first_target, last + 1) if turns.targets[k])
        last = max(k for k in range(target, last + 1) if turns.targets[k])
        whole.append(TurnRange(first=groups[piece.first][0], last=last, target=target))
    return whole


@dataclass(frozen=True, kw_only=True)
class Split:
    """What came of splitting: documents that fit, which of the asked-for ones each came from, and what could not be."""

    requests: Requests
    parents: IntArray
    refused: dict[int, Refusal]


def split(
    encoder: DocumentEncoder,
    batch: ConversationBatch,
    requests: Requests,
    layout: PieceTable,
    over: IntArray,
    seq_len: int,
) -> Split:
    """Split the requests numbered in `over` so that every piece fits.

    How long a piece is, its own rendering says; turns only give a first guess, off by what the template writes
    otherwise at the beginning of a conversation. So pieces are laid out, and cut anew with the difference, until all
    fit.
    """
    turns = {r: _turns(batch, requests, layout, r) for r in over.tolist()}
    extra = dict.fromkeys(turns, 0)
    refused: dict[int, Refusal] = {}
    done: list[tuple[Requests, IntArray]] = []
    pending = list(turns)
    for round_ in range(_MOST_ROUNDS):
        pieces: dict[int, list[TurnRange]] = {}
        for r in pending:
            cut = split_at_questions(turns[r], seq_len=seq_len, extra=extra[r])
            if isinstance(cut, int):
                refused[r] = _too_long(turns[r], cut, seq_len)
            else:
                pieces[r] = cut
        if not pieces:
            break
        asked, parents = _as_requests(requests, turns, pieces, cut=encoder.history == "append")
        laid_out = encoder.lay_out(asked)
        refused |= {int(parents[k]): refusal for k, refusal in laid_out.refused.items()}
        lengths = laid_out.document_lengths(len(asked))
        settled = []
        at = 0
        for r, ranges in pieces.items():
            exact = lengths[at : at + len(ranges)]
            at += len(ranges)
            guess = [turns[r].prefix + sum(turns[r].lengths[p.first : p.last + 1]) for p in ranges]
            off = [int(e) - g for e, g, p in zip(exact, guess, ranges, strict=True) if p.first > 0]
            needed = max(off, default=0)
            fits = bool((exact <= seq_len).all())
            if r in refused:
                continue
            if fits and (needed == extra[r] or round_ >= 2 or not off):
                settled.append(r)
            else:
                extra[r] = max(needed, extra[r] + 1) if round_ >= 2 or not off else needed
        if settled:
            chosen = np.isin(parents, settled)
            done.append((asked.take(chosen), parents[chosen]))
        pending = [r for r in pieces if r not in refused and r not in set(settled)]
        if not pending:
            break
    for r in pending:
        if r not in refused:
            refused[r] = Refusal(reason="over_long", detail=f"no split into pieces of {seq_len} tokens settled")
    empty = requests.take(np.empty(0, np.int64))
    parts = [part for part, _ in done]
    return Split(
        requests=Requests(
            **{
                name: np.concatenate([getattr(part, name) for part in [empty, *parts]])
                for name in Requests.__dataclass_fields__
            }
        ),
        parents=np.concatenate([np.empty(0, np.int64), *(parents for _, parents in done)]),
        refused=refused,
    )


def _turns(batch: ConversationBatch, requests: Requests, layout: PieceTable, r: int) -> Turns:
    begin, end = np.searchsorted(layout.request, [r, r + 1])
    span, message = layout.span[begin:end], layout.message[begin:end]
    kind, length = layout.kind[begin:end], layout.length[begin:end]
    answers = message >= 0
    answer_spans, first = np.unique(span[answers], return_index=True)
    in_batch = message[answers][first]
    turn = np.searchsorted(answer_spans, span)
    counted = (kind != PROMPT) & (turn < len(answer_spans))
    lengths = np.bincount(turn[counted], weights=length[counted], minlength=len(answer_spans))
    numbers = in_batch - batch.first[requests.conversation[r]]
    in_batch_lo = np.concatenate([[batch.first[requests.conversation[r]] + requests.head[r]], in_batch[:-1] + 1])
    targets = batch.trained[in_batch] & (numbers >= requests.target_from[r])
    return Turns(
        head=int(requests.head[r]),
        prefix=int(length[kind == PROMPT].sum()),
        lengths=tuple(int(n) for n in lengths),
        answers=tuple(int(n) for n in numbers),
        targets=tuple(bool(t) for t in targets),
        opens=tuple(bool(o) for o in batch.roles[np.minimum(in_batch_lo, len(batch.roles) - 1)] == USER),
    )


def _too_long(turns: Turns, turn: int, seq_len: int) -> Refusal:
    needed = turns.prefix + turns.lengths[turn]
    return Refusal(
        reason="over_long",
        detail=f"message {turns.answers[turn] + 1} needs {needed} tokens with what precedes it and the system prompt; "
        f"expected at most {seq_len}. Raise --seq-len, or choose --over-long truncate",
    )


def _as_requests(
    requests: Requests, turns: dict[int, Turns], pieces: dict[int, list[TurnRange]], *, cut: bool
) -> tuple[Requests, IntArray]:
    rows: list[tuple[int, ...]] = []
    for r, ranges in pieces.items():
        answers, head = turns[r].answers, turns[r].head
        for piece in ranges:
            lo = answers[piece.first - 1] + 1 if piece.first else head
            rows.append((r, head, lo, answers[piece.last] + 1, answers[piece.target]))
    table = np.array(rows, np.int64).reshape(-1, 5)
    parents = table[:, 0]
    asked = Requests(
        conversation=requests.conversation[parents],
        head=table[:, 1],
        lo=table[:, 2],
        hi=table[:, 3],
        target_from=table[:, 4],
        cut=np.full(len(table), cut),
    )
    return asked, parents
