"""Find the trained answers of packed shards: the conversation, turn number and position of each.

An answer is identified by a hash of its document's tokens up to its end, so the hash covers the history too. The same
answer after the same history has the same hash in another packing and in shards packed for another mask.

Shape legend: N answers, T = seq_len.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from ismdata.data import PackedSequence, PackedShards
from ismdata.masks import ANSWER, END, KIND, START

#: The id of a piece of a split conversation: `ID#k`. `pack` appends `#0` to an id that already has this form.
_PIECE = re.compile(r"(.*)#([0-9]+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """All answers that have targets, in the order of the shards. Each column has N entries.

    Attributes:
        conversation: Conversation ids, without the piece number.
        digest: Hashes of each answer and its history, as hex digits.
        turn: Turn numbers. Turn 1 is the conversation's first answer, trained or not.
        row: Sequences that hold the answers.
        document: Offsets in the sequence where the answer's document starts.
        start: Offsets in the sequence where the answer starts.
        end: Offsets in the sequence where the answer ends, exclusive.
        targets: Numbers of targets in the answers.
    """

    conversation: list[str]
    digest: list[str]
    turn: NDArray[np.int64]
    row: NDArray[np.int64]
    document: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.conversation)

    @property
    def context_tokens(self) -> NDArray[np.int64]:
        """Tokens of the document before each answer, int64[N]."""
        return self.start - self.document

    @property
    def sha256(self) -> str:
        """A hash of the whole set that does not depend on the packing: equal for the same answers and histories."""
        return digest_of(self.conversation, self.digest, self.targets.tolist())


def digest_of(conversation: list[str], digest: list[str], targets: list[int]) -> str:
    """Hash a set of answers, given as columns of `Answers`, independently of their order."""
    lines = sorted(f"{each} {count} {name}" for name, each, count in zip(conversation, digest, targets, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Document:
    """A document, its place, and its answers with targets: (number in the document, start, end, targets, digest)."""

    name: str
    row: int
    begin: int
    answers: list[tuple[int, int, int, int, str]]


def find_answers(shards: PackedShards) -> Answers:
    """Find all answers that have targets.

    Turn numbers: a document that is not a piece starts with its conversation, so its answers, untrained ones included,
    are numbered from 1. The pieces of a split conversation (`ID#k`) follow each other: the first trained answer of
    piece k gets the number after the last trained one of piece k - 1, or its number within the piece if that is
    higher. Numbers are too low only where an untrained answer lies between two pieces and neither contains it.

    Args:
        shards: The packed shards.

    Returns:
        The answers, in the order of the shards.
    """
    documents = [document for row in range(len(shards)) for document in _documents(shards[row], row)]
    step = int(shards.index.get("options", {}).get("prefix_every", 1)) if shards.mask == "prefix" else 1
    offsets = _turns_before(documents, step)
    flat = [
        (_conversation(each.name)[0], digest, number + offset, each.row, each.begin, start, end, targets)
        for each, offset in zip(documents, offsets, strict=True)
        for number, start, end, targets, digest in each.answers
    ]
    conversation, digest, *numbers = zip(*flat, strict=True) if flat else ((), (), *[()] * 6)
    turn, row, begin, start, end, targets = (np.array(column, np.int64) for column in numbers)
    return Answers(
        conversation=list(conversation),
        digest=list(digest),
        turn=turn,
        row=row,
        document=begin,
        start=start,
        end=end,
        targets=targets,
    )


def _documents(sequence: PackedSequence, row: int) -> Iterator[_Document]:
    """The documents of a sequence, with their answers."""
    ends = np.cumsum(sequence.seq_lens, dtype=np.int64)
    begins = ends - sequence.seq_lens
    spans = sequence.spans[sequence.spans[:, KIND] == ANSWER].astype(np.int64)
    if sequence.position_ids_2 is not None:  # `[START]` has a span of kind answer, but is not an answer
        spans = spans[sequence.position_ids_2[spans[:, START]] > 1]
    before = np.concatenate([[0], np.cumsum(sequence.loss_mask, dtype=np.int64)])
    targets = before[spans[:, END]] - before[spans[:, START]]
    # Untrained reasoning has a span of its own, directly before the span of its answer.
    reasoning = np.append((spans[:-1, END] == spans[1:, START]) & (targets[:-1] == 0) & (targets[1:] > 0), False)
    reasoning = reasoning[: len(spans)]
    spans, targets = spans[~reasoning], targets[~reasoning]
    owner = np.searchsorted(ends, spans[:, START], side="right")
    tokens = np.ascontiguousarray(sequence.input_ids, "<i4")
    for document, name in enumerate(sequence.conversation_ids):
        mine = owner == document
        history = xxhash.xxh3_128()
        begin = hashed = int(begins[document])
        answers = []
        for number, (start, end, count) in enumerate(
            zip(spans[mine, START].tolist(), spans[mine, END].tolist(), targets[mine].tolist(), strict=True), start=1
        ):
            if count:
                history.update(tokens[hashed:start].tobytes())
                context = history.digest()
                history.update(tokens[start:end].tobytes())
                answers.append((number, start, end, count, xxhash.xxh3_128_hexdigest(context + history.digest())))
                hashed = end
        yield _Document(name=name, row=row, begin=begin, answers=answers)


def _conversation(name: str) -> tuple[str, int | None]:
    """The conversation's id and the piece number of a document id; None if the document is not a piece.

    >>> _conversation("talk#2"), _conversation("talk")
    (('talk', 2), ('talk', None))
    """
    match = _PIECE.fullmatch(name)
    return (name, None) if match is None else (match[1], int(match[2]))


def _turns_before(documents: list[_Document], step: int) -> list[int]:
    """The number of turns before each document. step: distance between consecutive trained answers, in turns."""
    pieces: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, document in enumerate(documents):
        name, number = _conversation(document.name)
        if number is not None and document.answers:
            pieces[name][number].append(index)
    offsets = [0] * len(documents)
    for by_number in pieces.values():
        last = 0
        for _, indices in sorted(by_number.items()):
            for index in indices:
                offsets[index] = max(0, last + step - documents[index].answers[0][0])
            # Several documents have this id if two folders packed together share it: take what holds for all of them.
            last = min(documents[index].answers[-1][0] + offsets[index] for index in indices)
    return offsets
