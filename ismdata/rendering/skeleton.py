"""What a template makes of a sequence of roles, with slots where the texts go.

Conversations of the same roles get the same text around their messages, so a template is rendered once for each
sequence of roles, with markers for contents. The rendering is cut into pieces at control tokens and at the borders of
spans: a piece is either known tokens, or text with slots that is encoded when the contents are known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

from ismdata.choices import History
from ismdata.masks import ANSWER, PROMPT, QUERY
from ismdata.rendering.chat_template import ChatTemplate, Message
from ismdata.rendering.control_tokens import AddedToken, Escapes
from ismdata.rendering.refusals import MOST_MESSAGES, TemplateRefused, TooManyMessages
from ismdata.rendering.renderer import Chunk, Renderer
from ismdata.rendering.tokenizer import Tokenizer
from ismdata.rendering.tracing import Level, Place, Text, Traced

#: What a template may do to one side of a content: nothing, strip all blanks, or strip line breaks.
Strip = Literal["", "blanks", "newlines"]


@dataclass(frozen=True)
class Slot:
    """The content of message number `message`, less what the template strips on its left and right side."""

    message: int
    left: Strip
    right: Strip

    def fill(self, content: str) -> str:
        """The content as the template writes it."""
        content = content.lstrip() if self.left == "blanks" else content.lstrip("\n") if self.left else content
        return content.rstrip() if self.right == "blanks" else content.rstrip("\n") if self.right else content


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens of one span: either `ids`, or `parts`, texts and slots that are encoded as one text.

    `span` numbers the spans of the document, `kind` is the span's, `message` the assistant message that it answers with
    (-1 for context, and for reasoning that is not trained). `opening`: the tokenizer may put a blank before the text.
    `controls` counts the control tokens among `ids`. `chunk` numbers the chunk that it comes of. `unwritten`: the
    template leaves out reasoning of this answer.
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


class NotDecomposable(Exception):
    """The template does something to contents that slots cannot express; such conversations are rendered one by one."""


# Contents while probing: a marker between em spaces, which show whether blanks are stripped and are in no template. A
# second rendering has line breaks outside the em spaces, one before and two behind, which shows whether line breaks
# are stripped.
EM_SPACE = "\u2003"
_MARKED = re.compile("(\u2003?)\ue000(\\d+)\ue001(\u2003?)")


def build_skeleton(
    renderer: Renderer, tokenizer: Tokenizer, roles: Sequence[str], history: History
) -> tuple[Piece, ...]:
    """The pieces of a document with messages of these roles; `renderer` is one of `for_marked`.

    Raises CannotRender, NotDecomposable.
    """

    def chunks(before: str, after: str) -> list[Chunk]:
        messages = [{"role": role, "content": f"{before}\ue000{k}\ue001{after}"} for k, role in enumerate(roles)]
        if history == "append" and len(messages) > _LONG and renderer.profile.prefix_stable:
            return _long_chunks(renderer, messages)
        return _chunks(renderer, messages, None, history)

    plain = chunks(EM_SPACE, EM_SPACE)
    broken = chunks("\n" + EM_SPACE, EM_SPACE + "\n\n")
    if [(chunk.kind, chunk.message) for chunk in plain] != [(chunk.kind, chunk.message) for chunk in broken]:
        raise NotDecomposable("line breaks around contents change the order of what the template writes")
    newlines = frozenset(
        side for chunk, other in zip(plain, broken, strict=True) for side in _stripped(chunk.text, other.text)
    )
    return compile_chunks(plain, tokenizer, lambda text: _parts(text, newlines))


def _chunks(renderer: Renderer, messages: Sequence[Message], tools: list[Any] | None, history: History) -> list[Chunk]:
    """The reference's chunks. Raises as it does, and TooManyMessages."""
    if len(messages) > MOST_MESSAGES:
        raise TooManyMessages(len(messages))
    return renderer.append(messages, tools) if history == "append" else renderer.expand(messages, tools)


@dataclass(frozen=True, kw_only=True)
class _MarkedRenderer(Renderer):
    """A renderer of messages whose contents are marks, so that one rendering says where they stand.

    What it renders it remembers: sequences of roles begin alike.
    """

    @cached_property
    def _remembered(self) -> Callable[..., Traced]:
        return lru_cache(maxsize=4096)(self._traced)

    def _traced(self, messages: tuple[tuple[str, str], ...], generation_prompt: bool) -> Traced:
        shaped = [{"role": role, "content": content} for role, content in messages]
        text = self.template.render(shaped, generation_prompt=generation_prompt)
        found = ((int(match[2]), match) for match in _MARKED.finditer(text))
        places = tuple(Place(match.start(2) - 1, match.end(2) + 1, k, "content", k) for k, match in found)
        return Traced(text, places, tuple(Text(k, "content", "") for k in range(len(messages))))

    def trace(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Traced:
        return self._of(messages, generation_prompt=False)

    def around(
        self, messages: Sequence[Message], tools: list[Any] | None, level: Level, *, generation_prompt: bool = False
    ) -> Traced | None:
        try:
            return self._of(messages, generation_prompt=generation_prompt)
        except TemplateRefused:
            return None

    def _of(self, messages: Sequence[Message], *, generation_prompt: bool) -> Traced:
        key = tuple((message["role"], message["content"]) for message in messages)
        return (self._remembered if len(messages) <= 2 * _LONG else self._traced)(key, generation_prompt)

    def _remembered_header(self, messages: Sequence[Message], k: int, tools: list[Any] | None, rendered: Traced) -> str:
        # Blanks around the marks, the same in all messages, belong to it.
        key = (*(message["role"] for message in messages[:k]), messages[k]["content"][:1])
        if key not in self._headers:
            self._headers[key] = self._header(messages[:k], None, "whole")
        return self._headers[key]

    def _header(
        self, messages: Sequence[Message], tools: list[Any] | None, level: Level, plain: Traced | None = None
    ) -> str:
        mark = f"{EM_SPACE}\ue000{len(messages)}\ue001{EM_SPACE}"
        plain = plain or self.around([*messages, {"role": "assistant", "content": mark}], tools, level)
        return super()._header(messages, tools, level, plain)

    @cached_property
    def _appended(self) -> Callable[..., tuple[Chunk, ...]]:
        @lru_cache(maxsize=4096)
        def appended(messages: tuple[tuple[str, str], ...]) -> tuple[Chunk, ...]:
            shaped = [{"role": role, "content": content} for role, content in messages]
            return tuple(super(_MarkedRenderer, self).append(shaped))

        return appended

    def append(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[Chunk]:
        if len(messages) > _LONG:
            return super().append(messages, tools)
        return list(self._appended(tuple((message["role"], message["content"]) for message in messages)))


def for_marked(renderer: Renderer) -> Renderer:
    """A renderer for making many skeletons."""
    return _MarkedRenderer(**{field.name: getattr(renderer, field.name) for field in fields(renderer)})


#: Conversations of more messages are cut in one rendering, not in two for each answer.
_LONG = 24


def _long_chunks(renderer: Renderer, messages: list[Message]) -> list[Chunk]:
    """As `renderer.append`, for marked messages under a prefix-stable template: answers found by their markers.

    The beginning is cut both ways and must agree, and every answer must stand behind the generation prompt and look
    like the first one around its content; else all of it is cut the long way.
    """
    beginning = renderer.append(messages[:_LONG])
    answers = [chunk for chunk in beginning if chunk.kind == ANSWER]
    text = renderer.template.render(messages)
    markers = {int(match[2]): match for match in _MARKED.finditer(text)}
    prompt = renderer.profile.generation_prompt
    if not answers or list(markers) != list(range(len(messages))):  # one is missing, or they are out of order
        return _chunks(renderer, messages, None, "append")
    around = _MARKED.split(answers[0].text)[:: _MARKED.groups + 1]
    if len(around) != 2:  # the template writes a content twice, or not at all
        return _chunks(renderer, messages, None, "append")
    lead, closed = around
    brought = next((end for end in renderer.profile.next_turn_ends if closed.endswith(end)), "")
    chunks: list[Chunk] = []
    done = 0
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        trail = closed if k < len(messages) - 1 else closed.removesuffix(brought)
        start, end = markers[k].start() - len(lead), markers[k].end() + len(trail)
        behind_prompt = start > done and text.endswith(prompt, 0, start)
        if not (behind_prompt and text.startswith(lead, start) and text.startswith(trail, markers[k].end())):
            return _chunks(renderer, messages, None, "append")
        chunks += [Chunk(text=text[done:start], kind=QUERY), Chunk(text=text[start:end], kind=ANSWER, message=k)]
        done = end
    if text[done:]:
        chunks.append(Chunk(text=text[done:], kind=QUERY))
    if beginning[0].kind == PROMPT:
        cut = len(beginning[0].text)
        chunks[:1] = [Chunk(text=chunks[0].text[:cut], kind=PROMPT), Chunk(text=chunks[0].text[cut:], kind=QUERY)]
    return chunks if _begins_alike(chunks, beginning) else _chunks(renderer, messages, None, "append")


def _begins_alike(chunks: Sequence[Chunk], beginning: Sequence[Chunk]) -> bool:
    """Whether chunks begin with those of the conversation's beginning, through its last answer but one: what ends the
    last one may come with the next message.
    """
    places = [place for place, chunk in enumerate(beginning) if chunk.kind == ANSWER]
    return len(places) > 1 and list(chunks[: places[-2] + 1]) == list(beginning[: places[-2] + 1])


def marked_parts(template: ChatTemplate, roles: Sequence[str]) -> tuple[str | Slot, ...]:
    """One whole rendering of messages of these roles as texts and slots. Raises TemplateRefused, NotDecomposable."""

    def render(before: str, after: str) -> str:
        return template.render(
            [{"role": role, "content": f"{before}\ue000{k}\ue001{after}"} for k, role in enumerate(roles)]
        )

    plain = render(EM_SPACE, EM_SPACE)
    broken = render("\n" + EM_SPACE, EM_SPACE + "\n\n")
    return _parts(plain, frozenset(_stripped(plain, broken)))


def fill_text(parts: Sequence[str | Slot], contents: Sequence[str]) -> str:
    """Texts and slots with contents filled in."""
    return "".join(part if isinstance(part, str) else part.fill(contents[part.message]) for part in parts)


def render_document(
    renderer: Renderer,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: list[Any] | None,
    history: History,
    *,
    encode: bool = True,
    without_reasoning: bool = False,
) -> tuple[Piece, ...]:
    """One conversation rendered by itself, all pieces known tokens: the reference, and the way for all that has no
    skeleton. `encode` and `without_reasoning` as for `compile_chunks`.

    Raises CannotRender.
    """
    chunks, escapes = rendered_chunks(renderer, tokenizer, messages, tools, history)
    return compile_chunks(
        chunks, tokenizer, lambda text: (escapes.undo(text),), encode=encode, without_reasoning=without_reasoning
    )


def rendered_chunks(
    renderer: Renderer,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: list[Any] | None,
    history: History,
) -> tuple[list[Chunk], Escapes]:
    """One conversation rendered by itself, still escaped, and the way back. Raises as `render_document`."""
    (messages, tools), escapes = tokenizer.controls.escape([list(messages), tools])
    return _chunks(renderer, messages, tools, history), escapes


def _stripped(plain: str, broken: str) -> set[tuple[int, str]]:
    """The (message, side) at which a template that keeps blanks strips line breaks. Raises NotDecomposable."""
    here, there = list(_MARKED.finditer(plain)), list(_MARKED.finditer(broken))
    if len(here) != len(there):
        raise NotDecomposable("line breaks around contents change how often the template writes them")
    found: set[tuple[int, str]] = set()
    for k in range(len(here) + 1):
        before, behind = (here[k - 1], there[k - 1]) if k else (None, None)
        after, ahead = (here[k], there[k]) if k < len(here) else (None, None)
        gap = plain[before.end() if before else 0 : after.start() if after else None]
        other = broken[behind.end() if behind else 0 : ahead.start() if ahead else None]
        extra = len(other) - len(gap)
        if not 0 <= extra <= 3 or other != "\n\n" * (extra // 2) + gap + "\n" * (extra % 2):
            raise NotDecomposable(f"line breaks around contents change the text between them: {gap!r}, {other!r}")
        if before and before[3] and extra < 2:
            found.add((int(before[2]), "right"))
        if after and after[1] and extra % 2 == 0:
            found.add((int(after[2]), "left"))
    return found


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
    """Rendered chunks as pieces; `parse` parts what stands between control tokens into texts and slots.

    encode: texts without slots become known tokens; else they stay text, one part per piece. without_reasoning: what an
    answer holds of reasoning becomes a span of its own, an answer to no message. preceding: the control token before
    the first chunk, if there is one. opening: the first chunk begins a document.
    """
    pieces: list[Piece] = []
    previous: AddedToken | str | None = preceding if preceding or opening else ""
    span = -1
    for number, chunk in enumerate(chunks):
        ids: list[int] = []
        controls = 0
        span += 1
        left = chunk.reasoning if without_reasoning else 0  # characters of reasoning that are still to come
        message = -1 if left else chunk.message
        piece = partial(Piece, span=span, kind=chunk.kind, message=message, chunk=number, unwritten=chunk.unwritten)
        cuts = tokenizer.controls.cut(chunk.text)
        for place, cut in enumerate(cuts):
            before, previous = previous, cut
            if piece.keywords["message"] < 0 <= chunk.message and left <= 0:
                if ids:
                    pieces.append(piece(ids=tuple(ids), controls=controls))
                    ids, controls = [], 0
                span += 1
                piece = partial(piece, span=span, message=chunk.message)
            reasoning, left = left, left - len(cut.text if isinstance(cut, AddedToken) else cut)
            if isinstance(cut, AddedToken):
                ids.append(cut.id)
                controls += cut.id != tokenizer.unknown_id
                continue
            follower = cuts[place + 1] if place + 1 < len(cuts) else None
            parts = parse(cut)
            if isinstance(before, AddedToken) and before.rstrip:
                parts = _strip_edge(parts, 0)
            if isinstance(follower, AddedToken) and follower.lstrip:
                parts = _strip_edge(parts, -1)
            fresh = before is None or (isinstance(before, AddedToken) and tokenizer.prepends_after_controls)
            if not parts:
                continue
            if reasoning > 0 > left:
                thought, said = _cut_behind("".join(map(str, parts)), parse(cut[:reasoning]), tokenizer, opening=fresh)
                if ids or thought:
                    pieces.append(piece(ids=(*ids, *thought), controls=controls))
                span += 1
                piece = partial(piece, span=span, message=chunk.message)
                ids, controls = list(said), 0
                continue
            if encode and all(isinstance(part, str) for part in parts):
                ids += tokenizer.encode(["".join(map(str, parts))], opening=fresh)[0]
                continue
            if ids:
                pieces.append(piece(ids=tuple(ids), controls=controls))
                ids, controls = [], 0
            pieces.append(piece(ids=None, parts=parts, opening=fresh))
        if ids:
            pieces.append(piece(ids=tuple(ids), controls=controls))
    return tuple(pieces)


def _cut_behind(
    text: str, beginning: Sequence[str | Slot], tokenizer: Tokenizer, *, opening: bool
) -> tuple[list[int], list[int]]:
    """The tokens of a text, those that hold some of its `beginning` and those behind it.

    The text is encoded whole, as the template's reader would: a border within an answer is no border between tokens.
    """
    start = "".join(map(str, beginning))
    end = len(start) if text.startswith(start) else len(start.lstrip())
    backend = tokenizer.reference.opening if opening else tokenizer.reference.inside
    encoded = backend.encode(text, add_special_tokens=False)
    cut = next((at for at, (begin, _) in enumerate(encoded.offsets) if begin >= end), len(encoded.ids))
    return encoded.ids[:cut], encoded.ids[cut:]


def _parts(text: str, newlines: frozenset[tuple[int, str]]) -> tuple[str | Slot, ...]:
    """Marked text as texts and slots. Raises NotDecomposable."""
    parts: list[str | Slot] = []
    at = 0

    def strip(kept: str, message: int, side: str) -> Strip:
        return "blanks" if not kept else "newlines" if (message, side) in newlines else ""

    for match in _MARKED.finditer(text):
        parts.append(text[at : match.start()])
        message = int(match[2])
        parts.append(Slot(message, strip(match[1], message, "left"), strip(match[3], message, "right")))
        at = match.end()
    parts.append(text[at:])
    if any(isinstance(part, str) and re.search("[\ue000\ue001\u2003]", part) for part in parts):
        raise NotDecomposable(f"the template takes a content apart: {text!r}")
    return tuple(part for part in parts if part != "")


def _strip_edge(parts: tuple[str | Slot, ...], edge: Literal[0, -1]) -> tuple[str | Slot, ...]:
    """As a control token with `rstrip` does to what follows it (edge 0), or one with `lstrip` to what precedes it
    (-1).
    """
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
