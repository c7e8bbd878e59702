"""The masks token by token, as ism.md words them: slow, plain, and sharing no code with the package."""

from __future__ import annotations

from functools import cache

PROMPT, QUERY, ANSWER = 0, 1, 2


class Row:
    """One sequence: for each token its document and its span, None on padding.

    documents: for each, its spans as (length, kind, train), laid end to end.
    """

    def __init__(self, documents, seq_len):
        self.seq_len = seq_len
        self.documents = documents
        self.seq_lens = [sum(length for length, _, _ in spans) for spans in documents]
        self.spans = []
        self.document_of = [None] * seq_len
        self.span_of = [None] * seq_len
        at = 0
        for number, spans in enumerate(documents):
            for length, kind, train in spans:
                for token in range(at, at + length):
                    self.document_of[token] = number
                    self.span_of[token] = len(self.spans)
                self.spans.append((at, at + length, kind, train))
                at += length

    def is_answer(self, token):
        return self.spans[self.span_of[token]][2] == ANSWER

    @cache  # noqa: B019 - rows live as long as their test
    def document(self, token):
        """All tokens of this token's document."""
        return [u for u in range(self.seq_len) if self.document_of[u] == self.document_of[token]]

    @cache  # noqa: B019
    def last_answer(self, token):
        """The tokens of the last answer span of this token's document."""
        spans = [self.span_of[u] for u in self.document(token) if self.is_answer(u)]
        return [u for u in self.document(token) if spans and self.span_of[u] == max(spans)]

    def sees(self, t, u, mask):
        """May token t attend to token u?"""
        if self.document_of[t] is None or self.document_of[u] is None:
            return t == u
        if self.document_of[t] != self.document_of[u]:
            return False
        if u <= t:
            return True
        if mask == "ism":  # ahead only inside one run of context
            return not any(self.is_answer(between) for between in range(t, u + 1))
        if mask == "prefix":  # ahead only inside what stands before the last answer
            last = self.last_answer(t)
            return not last or u < last[0]
        return False

    def visible(self, mask):
        """For each token the list of tokens it sees."""
        return [[u for u in range(self.seq_len) if self.sees(t, u, mask)] for t in range(self.seq_len)]

    def loss_mask(self, mask):
        def is_target(token):
            if self.document_of[token] is None or token == self.document(token)[0]:
                return 0
            _, _, kind, train = self.spans[self.span_of[token]]
            wanted = kind == ANSWER and train
            return int(wanted and (mask != "prefix" or token in self.last_answer(token)))

        return [is_target(token) for token in range(self.seq_len)]

    def position_ids(self):
        return [0 if d is None else t - self.document(t)[0] for t, d in enumerate(self.document_of)]


def block_table(visible, block_size):
    """From lists of visible tokens: for each block row visible_lo, visible_hi, full_lo, full_hi, the last two from the
    interval that every row of the block sees."""
    table = []
    for start in range(0, len(visible), block_size):
        rows = visible[start : start + block_size]
        every = {u // block_size for row in rows for u in row}
        lo, hi = max(row[0] for row in rows), min(row[-1] + 1 for row in rows)
        table.append([min(every), max(every) + 1, -(-lo // block_size), hi // block_size])
    return table
