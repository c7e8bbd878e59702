"""Splitting documents that are longer than a sequence.

A turn here is an answer with the context before it. Each part of a split document repeats the system prompt, consists
of consecutive turns, ends with an answer and keeps as much history as fits. Each answer is a target in one part only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ismdata.arrays import IntArray
from ismdata.conversation import USER, Refusal
from ismdata.masks import PROMPT
from ismdata.pack.batch_encoder import BatchEncoder
from ismdata.pack.conversation_batch import ConversationBatch
from ismdata.pack.requests import PieceTable, Requests

#: Rounds of laying parts out and splitting again. Two or three suffice; the bound stops a template that never settles.
_MAX_ROUNDS = 8

#: From this round on, a split that fits is accepted even if its parts could be a little longer.
_LAST_EXACT_ROUND = 2


@dataclass(frozen=True, kw_only=True)
class Turns:
    """The turns of one document; all tuples have length K.

    Attributes:
        head: Number of system messages at the beginning.
        prefix: Tokens that each part repeats.
        lengths: Tokens of each turn.
        answers: Message number of each answer, within the conversation.
        targets: Whether each answer is trained.
        opens: Whether each turn begins with a user's message, so that a part may begin with it. A tool result without
            the call it answers, or an answer without its question, does not make a document.
    """

    head: int
    prefix: int
    lengths: tuple[int, ...]
    answers: tuple[int, ...]
    targets: tuple[bool, ...]
    opens: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class TurnRange:
    """Turns `first` to `last` (inclusive); those from `target` on are trained, earlier ones are history."""

    first: int
    last: int
    target: int


def split_turns(
    lengths: Sequence[int], targets: Sequence[bool], *, prefix: int, seq_len: int, extra: int = 0
) -> list[TurnRange] | int:
    """Split turns so that each target turn is trained in exactly one part.

    Each part takes as many new turns as fit, then as much history as fits.

    Args:
        lengths: Tokens of each turn.
        targets: Whether each turn is trained.
        prefix: Tokens that each part repeats.
        seq_len: The most tokens of a part.
        extra: Further tokens of a part that does not begin with the first turn.

    Returns:
        The parts, or the number of a target turn that does not fit into a part of its own.

    Example:
        >>> split_turns([4, 4, 4, 4], [True] * 4, prefix=2, seq_len=10)
        [TurnRange(first=0, last=1, target=0), TurnRange(first=2, last=3, target=2)]
        >>> split_turns([4, 4, 4], [True] * 3, prefix=2, seq_len=10)[-1]
        TurnRange(first=1, last=2, target=2)
    """
    parts: list[TurnRange] = []
    turn = next((k for k, target in enumerate(targets) if target), None)
    while turn is not None:
        room = seq_len - prefix - (extra if turn else 0) - lengths[turn]
        if room < 0:
            return turn
        last, following, left = turn, turn + 1, room
        while following < len(lengths) and lengths[following] <= left:
            left -= lengths[following]
            if targets[following]:
                last, room = following, left
            following += 1
        first = turn
        while first > 0 and lengths[first - 1] <= room + (extra if first == 1 else 0):
            first -= 1
            room -= lengths[first]
        parts.append(TurnRange(first=first, last=last, target=turn))
        turn = next((k for k in range(last + 1, len(targets)) if targets[k]), None)
    return parts


def split_at_questions(turns: Turns, *, seq_len: int, extra: int = 0) -> list[TurnRange] | int:
    """Split like `split_turns`, but only before users' messages; at any turn if what is between two is too long."""
    starts = [k for k, opens in enumerate(turns.opens) if opens or k == 0]
    ends = [*starts[1:], len(turns.lengths)]
    groups = list(zip(starts, ends, strict=True))
    parts = split_turns(
        [sum(turns.lengths[a:b]) for a, b in groups],
        [any(turns.targets[a:b]) for a, b in groups],
        prefix=turns.prefix,
        seq_len=seq_len,
        extra=extra,
    )
    if isinstance(parts, int):
        return split_turns(turns.lengths, turns.targets, prefix=turns.prefix, seq_len=seq_len, extra=extra)
    ranges = []
    for part in parts:
        first_target, last = groups[part.target][0], groups[part.last][1] - 1
        target = next(k for k in range(first_target, last + 1) if turns.targets[k])
        last = max(k for k in range(target, last + 1) if turns.targets[k])
        ranges.append(TurnRange(first=groups[part.first][0], last=last, target=target))
    return ranges


@dataclass(frozen=True, kw_only=True)
class Split:
    """Documents that were split.

    Attributes:
        requests: The parts.
        parents: int64, for each part the request it comes from.
        refused: Documents that cannot be split, by request.
    """

    requests: Requests
    parents: IntArray
    refused: dict[int, Refusal]


def split(encoder: BatchEncoder, requests: Requests, table: PieceTable, over: IntArray, seq_len: int) -> Split:
    """Split documents so that every part fits.

    The lengths of turns only estimate the length of a part, because a template may write something else at the
    beginning of a conversation. So parts are laid out to learn their exact lengths, and split again with the difference
    until all fit.

    Args:
        encoder: The encoder of the batch.
        requests: The documents of the batch.
        table: Their pieces.
        over: The requests to split.
        seq_len: The most tokens of a part.

    Returns:
        The parts, and the documents that cannot be split.
    """
    turns = {r: _turns(encoder.batch, requests, table, r) for r in over.tolist()}
    extra = dict.fromkeys(turns, 0)
    refused: dict[int, Refusal] = {}
    done: list[tuple[Requests, IntArray]] = [(requests.take(over[:0]), over[:0])]
    pending = list(turns)
    for round_ in range(_MAX_ROUNDS):
        ranges: dict[int, list[TurnRange]] = {}
        for r in pending:
            found = split_at_questions(turns[r], seq_len=seq_len, extra=extra[r])
            if isinstance(found, int):
                refused[r] = _too_long(turns[r], found, seq_len)
            else:
                ranges[r] = found
        if not ranges:
            pending = []
            break
        parts, parents = _part_requests(requests, turns, ranges, cut=encoder.cache.encoding.history == "append")
        laid_out = encoder.lay_out(parts)
        refused |= {int(parents[k]): refusal for k, refusal in laid_out.refused.items()}
        lengths = laid_out.document_lengths(len(parts))
        settled = []
        at = 0
        for r, parts_of_r in ranges.items():
            exact = lengths[at : at + len(parts_of_r)]
            at += len(parts_of_r)
            if r in refused:
                continue
            needed = _needed_extra(turns[r], parts_of_r, exact)
            fits = bool((exact <= seq_len).all())
            is_exact = round_ < _LAST_EXACT_ROUND and needed is not None
            if fits and (needed == extra[r] or not is_exact):
                settled.append(r)
            else:
                extra[r] = (needed or 0) if is_exact else max(needed or 0, extra[r] + 1)
        chosen = np.isin(parents, settled)
        done.append((parts.take(chosen), parents[chosen]))
        pending = [r for r in ranges if r not in refused and r not in settled]
        if not pending:
            break
    for r in pending:
        refused[r] = Refusal(reason="over_long", detail=f"found no split into parts of at most {seq_len} tokens")
    return Split(
        requests=Requests.concatenate([part for part, _ in done]),
        parents=np.concatenate([parents for _, parents in done]),
        refused=refused,
    )


def _needed_extra(turns: Turns, ranges: Sequence[TurnRange], exact: IntArray) -> int | None:
    """The most tokens by which parts are longer than their turns; None if all parts begin with the first turn."""
    estimate = [turns.prefix + sum(turns.lengths[part.first : part.last + 1]) for part in ranges]
    more = [int(e) - g for e, g, part in zip(exact, estimate, ranges, strict=True) if part.first > 0]
    return max(more, default=None)


def _turns(batch: ConversationBatch, requests: Requests, table: PieceTable, r: int) -> Turns:
    """The turns of request r."""
    begin, end = np.searchsorted(table.request, [r, r + 1])
    span, message = table.span[begin:end], table.message[begin:end]
    kind, length = table.kind[begin:end], table.length[begin:end]
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
    """The refusal of a document with a turn that does not fit into a part of its own."""
    needed = turns.prefix + turns.lengths[turn]
    return Refusal(
        reason="over_long",
        detail=f"message {turns.answers[turn] + 1} needs {needed} tokens with its context and the system prompt; "
        f"expected at most {seq_len}. Raise --seq-len, or choose --over-long truncate",
    )


def _part_requests(
    requests: Requests, turns: Mapping[int, Turns], ranges: Mapping[int, Sequence[TurnRange]], *, cut: bool
) -> tuple[Requests, IntArray]:
    """Parts as requests, and the request that each comes from."""
    rows: list[tuple[int, ...]] = []
    for r, parts in ranges.items():
        answers, head = turns[r].answers, turns[r].head
        for part in parts:
            lo = answers[part.first - 1] + 1 if part.first else head
            rows.append((r, head, lo, answers[part.last] + 1, answers[part.target]))
    table = np.array(rows, np.int64).reshape(-1, 5)
    parents = table[:, 0]
    split_requests = Requests(
        conversation=requests.conversation[parents],
        head=table[:, 1],
        lo=table[:, 2],
        hi=table[:, 3],
        target_from=table[:, 4],
        cut=np.full(len(table), cut),
    )
    return split_requests, parents
