"""The trained answers of packed shards, one entry each: whose they are, which turn of it, and where they lie.

An answer is known by what it says after what: the digest of its document's tokens up to its end. So the same answer in
another packing, or packed for another mask, is the same answer, as long as the same history stands before it.

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
from ismdata.masks import ANSWER

#: The id of a piece: `ID#k`. Ids that end so by themselves get a number of their own when they are packed.
_PIECE = re.compile(r"(.*)#([0-9]+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """All answers with targets, in the order of the shards. Each array has N entries.

    `conversation`: the id without a piece's number. `turn`: 1 is the conversation's first answer, trained or not.
    `digest`: of what it says after what. `row`: the sequence. `document`, `start`, `end`: offsets in the sequence,
    where its document and itself begin, and where it ends. `targets`: how many of its tokens are targets.
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
        """Tokens of the document before each answer."""
        return self.start - self.document

    @property
    def sha256(self) -> str:
        """Of the whole set, whatever the packing: equal where the same answers follow the same histories."""
        return digest_of(self.conversation, self.digest, self.targets.tolist())


def digest_of(conversation: list[str], digest: list[str], targets: list[int]) -> str:
    """`Answers.sha256` of these columns."""
    lines = sorted(f"{each} {count} {name}" for name, each, count in zip(conversation, digest, targets, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A document's answers with targets: (number among its answers, start, end, targets, digest), and its place."""

    name: str
    row: int
    begin: int
    answers: list[tuple[int, int, int, int, str]]


def find_answers(shards: PackedShards) -> Answers:
    """All answers with targets.

    Turns: a document holds its conversation from the start, so its answers are counted from 1, untrained ones too,
    unless it is a piece (`ID#k`). Pieces continue each other: the first trained answer of piece k is counted on from
    the last trained one of piece k - 1, where that is more than what the piece itself holds. This is exact but where
    an untrained answer fell into a gap in which no piece had room for it.
    """
    documents = [found for row in range(len(shards)) for found in _documents(shards[row], row)]
    step = int(shards.index.get("options", {}).get("prefix_every", 1)) if shards.mask == "prefix" else 1
    offsets = _piece_offsets(documents, step)
    flat = [
        (_conversation(found.name)[0], digest, number + offset, found.row, found.begin, start, end, targets)
        for found, offset in zip(documents, offsets, strict=True)
        for number, start, end, targets, digest in found.answers
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


def _documents(sequence: PackedSequence, row: int) -> Iterator[_Found]:
    ends = np.cumsum(sequence.seq_lens, dtype=np.int64)
    begins = ends - sequence.seq_lens
    spans = sequence.spans[sequence.spans[:, 2] == ANSWER].astype(np.int64)
    if sequence.position_ids_2 is not None:  # `[START]` is a span of its own, and no answer
        spans = spans[sequence.position_ids_2[spans[:, 0]] > 1]
    before = np.concatenate([[0], np.cumsum(sequence.loss_mask, dtype=np.int64)])
    targets = before[spans[:, 1]] - before[spans[:, 0]]
    # Reasoning that is not trained is a span of its own, directly before its answer's.
    thought = np.append((spans[:-1, 1] == spans[1:, 0]) & (targets[:-1] == 0) & (targets[1:] > 0), False)[: len(spans)]
    spans, targets = spans[~thought], targets[~thought]
    owner = np.searchsorted(ends, spans[:, 0], side="right")
    tokens = np.ascontiguousarray(sequence.input_ids, "<i4")
    for document, name in enumerate(sequence.conversation_ids):
        mine = owner == document
        digest = xxhash.xxh3_128()
        begin = done = int(begins[document])
        answers = []
        for number, (start, end, count) in enumerate(
            zip(spans[mine, 0].tolist(), spans[mine, 1].tolist(), targets[mine].tolist(), strict=True), start=1
        ):
            if count:
                digest.update(tokens[done:start].tobytes())
                context = digest.digest()
                digest.update(tokens[start:end].tobytes())
                answers.append((number, start, end, count, xxhash.xxh3_128_hexdigest(context + digest.digest())))
                done = end
        yield _Found(name=name, row=row, begin=begin, answers=answers)


def _conversation(name: str) -> tuple[str, int | None]:
    """A document's conversation, and its number where it is a piece of it.

    >>> _conversation("talk#2"), _conversation("talk")
    (('talk', 2), ('talk', None))
    """
    match = _PIECE.fullmatch(name)
    return (name, None) if match is None else (match[1], int(match[2]))


def _piece_offsets(documents: list[_Found], step: int) -> list[int]:
    """Turns before each document that it does not hold. step: trained answers from one piece's last to the next's."""
    pieces: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for at, found in enumerate(documents):
        name, number = _conversation(found.name)
        if number is not None and found.answers:
            pieces[name][number].append(at)
    offsets = [0] * len(documents)
    for by_number in pieces.values():
        last = 0
        for _, ats in sorted(by_number.items()):
            for at in ats:
                offsets[at] = max(0, last + step - documents[at].answers[0][0])
            # Two conversations of one name: what is certain of both.
            last = min(documents[at].answers[-1][0] + offsets[at] for at in ats)
    return offsets
