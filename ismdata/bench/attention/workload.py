"""Packed rows with the lengths of ShareGPT's conversations but no text, on which attention is measured.

A document is a conversation. Its number of answers and the tokens per question and per answer are log-normal, drawn
with a fixed seed. The parameters (mean and standard deviation of the logarithms, DeepSeek's tokenizer) were fitted to
the first 5,000 records of ShareGPT. A record there is a part of a conversation, at most about 2,000 tokens long; parts
with the same id were joined before answers were counted. Half of the documents have fewer than 1,400 tokens, one in
twenty more than 8,400, one in a hundred more than 16,000. Documents fill each row; the last one is cut at its end.

Shape legend: B rows, T = seq_len.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ismdata import masks
from ismdata.data import PackedSequence
from ismdata.masks import ANSWER, PROMPT, QUERY

#: Mean and standard deviation of the logarithm, and the maximum: answers per conversation, tokens per question and per
#: answer.
_ANSWERS = (1.21, 1.10, 354)
_QUESTION = (3.11, 1.42, 8690)
_ANSWER = (5.38, 1.04, 1371)
#: Tokens that a template puts before a conversation, and around each question.
_PROMPT_TOKENS, _HEADER_TOKENS = 3, 6


#: A document: spans of (kind, length).
Document = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """B rows of T tokens.

    Attributes:
        seq_len: T.
        seq_lens: The lengths of the documents of each row.
        spans: The spans of each row, int64[S, 4].
    """

    seq_len: int
    seq_lens: tuple[tuple[int, ...], ...]
    spans: tuple[NDArray[np.int64], ...]

    @property
    def rows(self) -> int:
        return len(self.seq_lens)

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    def pieces(self) -> list[int]:
        """The lengths of all documents, row after row. Each padding token, which sees only itself, is a piece."""
        return [length for seq_lens in self.seq_lens for length in (*seq_lens, *[1] * (self.seq_len - sum(seq_lens)))]

    def intervals(self, mask: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """`doc_start` and `kv_end`, int32[B, T] each."""
        rows = [
            masks.intervals(seq_lens, spans, seq_len=self.seq_len, mask=mask)
            for seq_lens, spans in zip(self.seq_lens, self.spans, strict=True)
        ]
        return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])

    def visible_pairs(self, mask: str) -> int:
        """The number of visible pairs of query and key in all B rows."""
        doc_start, kv_end = self.intervals(mask)
        return int((kv_end.astype(np.int64) - doc_start).sum())

    def sequences(self, mask: str, *, vocab_size: int, seed: int = 0) -> list[PackedSequence]:
        """The rows as in a folder packed for `mask`, with random tokens."""
        rng = np.random.Generator(np.random.PCG64(seed))
        rows = []
        for seq_lens, spans in zip(self.seq_lens, self.spans, strict=True):
            doc_start, kv_end = masks.intervals(seq_lens, spans, seq_len=self.seq_len, mask=mask)
            rows.append(
                PackedSequence(
                    input_ids=rng.integers(0, vocab_size, self.seq_len).astype(np.int32),
                    position_ids=masks.position_ids(seq_lens, seq_len=self.seq_len),
                    loss_mask=masks.targets(seq_lens, spans, seq_len=self.seq_len, mask=mask),
                    seq_lens=np.array(seq_lens, np.int32),
                    spans=spans.astype(np.int32),
                    block_table=masks.block_table(doc_start, kv_end),
                    conversation_ids=[str(number) for number in range(len(seq_lens))],
                    loss_weight=None,
                )
            )
        return rows


def lay_out(rows: Sequence[Sequence[Document]], seq_len: int) -> Workload:
    """Lay documents end to end in rows. A short row is padded; a document beyond the end is cut."""
    laid = [_row(documents, seq_len) for documents in rows]
    return Workload(seq_len=seq_len, seq_lens=tuple(lens for lens, _ in laid), spans=tuple(spans for _, spans in laid))


def sharegpt_like(seq_len: int, *, rows: int, seed: int = 0) -> Workload:
    """Full rows of documents with the lengths of ShareGPT. The same arguments give the same rows."""
    documents = _documents(np.random.Generator(np.random.PCG64(seed)))
    filled: list[list[Document]] = []
    for _ in range(rows):
        row: list[Document] = []
        while sum(length for document in row for _, length in document) < seq_len:
            row.append(next(documents))
        filled.append(row)
    return lay_out(filled, seq_len)


def random_documents(seq_len: int, *, rows: int, seed: int) -> Workload:
    """Rows of documents of any shape, for checks: short and long, one token or many, without answers, with padding."""
    rng = np.random.Generator(np.random.PCG64(seed))

    def document(length: int) -> Document:
        lengths = _parts(rng, length, most=10)
        return list(zip(rng.integers(PROMPT, ANSWER + 1, len(lengths)).tolist(), lengths, strict=True))

    def row() -> list[Document]:
        return [document(length) for length in _parts(rng, int(rng.integers(seq_len // 2, seq_len + 1)), most=8)]

    return lay_out([row() for _ in range(rows)], seq_len)


def _parts(rng: np.random.Generator, length: int, *, most: int) -> list[int]:
    """Up to `most` lengths, each at least 1, that add up to `length`."""
    inner: list[int] = rng.integers(1, length, rng.integers(0, most)).tolist() if length > 1 else []
    parts: list[int] = np.diff(np.unique([0, *inner, length])).tolist()
    return parts


def _documents(rng: np.random.Generator) -> Iterator[Document]:
    """Yield documents without end."""

    def draw(mean: float, deviation: float, most: int, size: int) -> list[int]:
        drawn: list[int] = np.clip(np.rint(rng.lognormal(mean, deviation, size)), 1, most).astype(int).tolist()
        return drawn

    while True:
        (answers,) = draw(*_ANSWERS, 1)
        spans = [(PROMPT, _PROMPT_TOKENS)]
        for question, answer in zip(draw(*_QUESTION, answers), draw(*_ANSWER, answers), strict=True):
            spans += [(QUERY, _HEADER_TOKENS + question), (ANSWER, answer)]
        yield spans


def _row(documents: Sequence[Document], seq_len: int) -> tuple[tuple[int, ...], NDArray[np.int64]]:
    """The lengths of the documents and the spans of one row."""
    seq_lens: list[int] = []
    spans: list[tuple[int, int, int, int]] = []
    at = 0
    for document in documents:
        start = at
        for kind, length in document:
            end = min(at + length, seq_len)
            if end > at:
                spans.append((at, end, kind, int(kind == ANSWER)))
            at = end
        seq_lens.append(at - start)
    return tuple(seq_lens), np.array(spans, np.int64).reshape(-1, 4)
