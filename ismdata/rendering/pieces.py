"""Rendered chunks to pieces: the tokens of one span, or text that is encoded later.

A chunk is cut at its control tokens. They become ids. The text between them is encoded at once, or kept as texts and
slots, so that `pack` can fill in and encode the texts of a whole batch together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from ismdata.rendering.control_tokens import AddedToken
from ismdata.rendering.renderer import Chunk
from ismdata.rendering.tokenizer import Tokenizer

#: What a template strips from one side of a content: nothing, all blanks, or line breaks.
Strip = Literal["", "blanks", "newlines"]


@dataclass(frozen=True)
class Slot:
    """The place of the content of message number `message`, with what the template strips from its two sides."""

    message: int
    left: Strip
    right: Strip

    def fill(self, content: str) -> str:
        """The content as the template writes it."""
        content = content.lstrip() if self.left == "blanks" else content.lstrip("\n") if self.left else content
        return content.rstrip() if self.right == "blanks" else content.rstrip("\n") if self.right else content


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive tokens of one span.

    Attributes:
        span: The number of the span in its document.
        kind: The kind of the span: PROMPT, QUERY or ANSWER.
        message: The number of its assistant message; -1 for context, and for reasoning that is not trained.
        ids: The tokens; None if `parts` is encoded later.
        parts: Texts and slots that are encoded as one text.
        opening: The tokenizer may put a blank before the text.
        controls: How many of `ids` are control tokens.
        chunk: The number of the chunk that it comes from.
        unwritten: The template leaves out reasoning of this answer.
    """

    span: int
    kind: int
    message: int
    ids: tuple[int, ...] | None
    parts: tuple[str | Slot, ...] = ()
    opening: bool = False
    controls: int = 0
    chunk: int = 0
    unwritten: bool = False


def compile_chunks(
    chunks: Sequence[Chunk],
    tokenizer: Tokenizer,
    parse: Callable[[str], tuple[str | Slot, ...]],
    *,
    preceding: AddedToken | None = None,
    opening: bool = True,
    encode: bool = True,
    without_reasoning: bool = False,
) -> tuple[Piece, ...]:
    """Compile rendered chunks to pieces.

    Args:
        chunks: The chunks of a document, or some that follow one another.
        tokenizer: Gives the control tokens, and encodes text.
        parse: Cuts the text between control tokens into texts and slots.
        preceding: The control token before the first chunk, if there is one.
        opening: The first chunk begins a document.
        encode: Encode texts without slots. Otherwise they stay in `parts`, one per piece.
        without_reasoning: Give the reasoning in an answer a span of its own, which answers no message.

    Returns:
        The pieces, in order.
    """
    builder = _PieceBuilder()
    previous: AddedToken | str | None = preceding if preceding or opening else ""
    for number, chunk in enumerate(chunks):
        left = chunk.reasoning if without_reasoning else 0  # characters of reasoning that are still to come
        in_reasoning = left > 0
        builder.open_span(chunk, number, -1 if in_reasoning else chunk.message)
        cuts = tokenizer.controls.cut(chunk.text)
        for place, cut in enumerate(cuts):
            before, previous = previous, cut
            if in_reasoning and left <= 0:
                builder.open_span(chunk, number, chunk.message)
                in_reasoning = False
            reasoning, left = left, left - len(cut.text if isinstance(cut, AddedToken) else cut)
            if isinstance(cut, AddedToken):
                builder.add_control(cut.id, counted=cut.id != tokenizer.unknown_id)
                continue
            parts = _strip_edges(parse(cut), before, cuts[place + 1] if place + 1 < len(cuts) else None)
            if not parts:
                continue
            fresh = before is None or (isinstance(before, AddedToken) and tokenizer.prepends_after_controls)
            if reasoning > 0 > left:  # the reasoning ends inside this text
                thought, rest = _split_ids("".join(map(str, parts)), parse(cut[:reasoning]), tokenizer, opening=fresh)
                builder.ids += thought
                builder.open_span(chunk, number, chunk.message)
                builder.ids += rest
                in_reasoning = False
            elif encode and all(isinstance(part, str) for part in parts):
                builder.ids += tokenizer.encode(["".join(map(str, parts))], opening=fresh)[0]
            else:
                builder.add_parts(parts, opening=fresh)
    return builder.finish()


class _PieceBuilder:
    """Collects pieces. `ids` are tokens of the open span that are not in a piece yet."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._controls = 0
        self._span = -1
        self._pieces: list[Piece] = []

    def open_span(self, chunk: Chunk, number: int, message: int) -> None:
        """Begin a span with chunk `number`, or inside it."""
        self._flush()
        self._span += 1
        self._piece = partial(
            Piece, span=self._span, kind=chunk.kind, message=message, chunk=number, unwritten=chunk.unwritten
        )

    def add_control(self, id: int, *, counted: bool) -> None:
        self.ids.append(id)
        self._controls += counted

    def add_parts(self, parts: tuple[str | Slot, ...], *, opening: bool) -> None:
        self._flush()
        self._pieces.append(self._piece(ids=None, parts=parts, opening=opening))

    def finish(self) -> tuple[Piece, ...]:
        self._flush()
        return tuple(self._pieces)

    def _flush(self) -> None:
        if self.ids:
            self._pieces.append(self._piece(ids=tuple(self.ids), controls=self._controls))
            self.ids, self._controls = [], 0


def _split_ids(
    text: str, beginning: Sequence[str | Slot], tokenizer: Tokenizer, *, opening: bool
) -> tuple[list[int], list[int]]:
    """The tokens of a text: those that overlap its `beginning`, and those after it.

    The text is encoded as a whole, as it is without the cut: the end of the reasoning is no border between tokens.
    """
    start = "".join(map(str, beginning))
    end = len(start) if text.startswith(start) else len(start.lstrip())
    backend = tokenizer.reference.opening if opening else tokenizer.reference.inside
    encoded = backend.encode(text, add_special_tokens=False)
    cut = next((at for at, (begin, _) in enumerate(encoded.offsets) if begin >= end), len(encoded.ids))
    return encoded.ids[:cut], encoded.ids[cut:]


def _strip_edges(
    parts: tuple[str | Slot, ...], before: AddedToken | str | None, after: AddedToken | str | None
) -> tuple[str | Slot, ...]:
    """Strip text as the control tokens around it do: with `rstrip` what follows, with `lstrip` what precedes."""
    if isinstance(before, AddedToken) and before.rstrip:
        parts = _strip_edge(parts, 0)
    if isinstance(after, AddedToken) and after.lstrip:
        parts = _strip_edge(parts, -1)
    return parts


def _strip_edge(parts: tuple[str | Slot, ...], edge: Literal[0, -1]) -> tuple[str | Slot, ...]:
    """Strip the blanks at the beginning (0) or the end (-1)."""
    if not parts:
        return parts
    part = parts[edge]
    if isinstance(part, str):
        rest = part.lstrip() if edge == 0 else part.rstrip()
        if not rest:
            return _strip_edge(parts[1:] if edge == 0 else parts[:-1], edge)
        stripped: str | Slot = rest
    else:
        stripped = replace(part, left="blanks") if edge == 0 else replace(part, right="blanks")
    return (stripped, *parts[1:]) if edge == 0 else (*parts[:-1], stripped)
