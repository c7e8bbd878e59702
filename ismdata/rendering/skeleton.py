"""What a template makes of a sequence of roles, with slots for the contents.

Conversations with the same roles get the same text around their messages. So a template is rendered once per sequence
of roles, with a placeholder per content, and the rendering is compiled to pieces with slots (`pieces.py`).

The placeholders stand between em spaces, which no template contains: these show whether blanks are stripped. A second
rendering has line breaks outside the em spaces, one before and two after, which show whether line breaks are stripped.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ismdata.choices import History
from ismdata.masks import ANSWER, PROMPT, QUERY
from ismdata.rendering.chat_template import ChatTemplate, Message
from ismdata.rendering.pieces import Piece, Slot, Strip, compile_chunks
from ismdata.rendering.refusals import TemplateRefused
from ismdata.rendering.renderer import Chunk, Renderer
from ismdata.rendering.tokenizer import Tokenizer
from ismdata.rendering.tracing import Level, Occurrence, Text, Trace

EM_SPACE = "\u2003"
_PLACEHOLDER = re.compile("(\u2003?)\ue000(\\d+)\ue001(\u2003?)")

#: Conversations of more messages are cut in one rendering, not in two per answer.
_LONG = 24

#: Renderings that are cached: sequences of roles begin alike.
_CACHED = 4096

_RoleContents = tuple[tuple[str, str], ...]


class NotDecomposable(Exception):
    """Slots cannot express what the template does to contents; such conversations are rendered individually."""


class SkeletonBuilder:
    """Builds the skeletons of one template: the pieces of conversations by their roles.

    Args:
        renderer: The probed template.
        tokenizer: Its tokenizer.
        history: What is done about earlier turns.
    """

    def __init__(self, renderer: Renderer, tokenizer: Tokenizer, history: History) -> None:
        self._renderer = replace(renderer, tracer=SlotTracer(renderer.template))
        self._tokenizer = tokenizer
        self._history = history
        self._cut_beginning = lru_cache(maxsize=_CACHED)(self._cut_roles)

    def build(self, roles: Sequence[str]) -> tuple[Piece, ...]:
        """The pieces of a document with messages of these roles. Raises CannotRender, NotDecomposable."""
        plain = self._chunks(_slot_messages(roles, EM_SPACE, EM_SPACE))
        broken = self._chunks(_slot_messages(roles, "\n" + EM_SPACE, EM_SPACE + "\n\n"))
        if [(chunk.kind, chunk.message) for chunk in plain] != [(chunk.kind, chunk.message) for chunk in broken]:
            raise NotDecomposable("line breaks around contents change the order of what the template writes")
        newlines = frozenset(
            side for chunk, other in zip(plain, broken, strict=True) for side in _stripped(chunk.text, other.text)
        )
        return compile_chunks(plain, self._tokenizer, lambda text: _parts(text, newlines))

    def _chunks(self, messages: list[Message]) -> list[Chunk]:
        if self._history == "append" and len(messages) > _LONG and self._renderer.profile.prefix_stable:
            chunks = self._cut_long(messages)
            if chunks is not None:
                return chunks
        return self._renderer.cut(messages, None, self._history)

    def _cut_roles(self, messages: _RoleContents) -> tuple[Chunk, ...]:
        return tuple(self._renderer.append(_as_messages(messages)))

    def _cut_long(self, messages: list[Message]) -> list[Chunk] | None:
        """The chunks of `Renderer.append` under a prefix-stable template, from one rendering.

        Answers are found by their placeholders. Every answer must follow the generation prompt and have the same text
        around its content as the first one, and the beginning must come out as the reference cuts it. Otherwise the
        result is None.
        """
        beginning = self._cut_beginning(_as_key(messages[:_LONG]))
        answers = [chunk for chunk in beginning if chunk.kind == ANSWER]
        text = self._renderer.template.render(messages)
        slots = {int(match[2]): match for match in _PLACEHOLDER.finditer(text)}
        prompt = self._renderer.profile.generation_prompt
        if not answers or list(slots) != list(range(len(messages))):  # one is missing, or they are out of order
            return None
        around = _PLACEHOLDER.split(answers[0].text)[:: _PLACEHOLDER.groups + 1]
        if len(around) != 2:  # the template writes a content twice, or not at all
            return None
        lead, closing = around
        next_turn_end = next((end for end in self._renderer.profile.next_turn_ends if closing.endswith(end)), "")
        chunks: list[Chunk] = []
        done = 0
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            trail = closing if k < len(messages) - 1 else closing.removesuffix(next_turn_end)
            start, end = slots[k].start() - len(lead), slots[k].end() + len(trail)
            after_prompt = start > done and text.endswith(prompt, 0, start)
            if not (after_prompt and text.startswith(lead, start) and text.startswith(trail, slots[k].end())):
                return None
            chunks += [Chunk(text=text[done:start], kind=QUERY), Chunk(text=text[start:end], kind=ANSWER, message=k)]
            done = end
        if text[done:]:
            chunks.append(Chunk(text=text[done:], kind=QUERY))
        if beginning[0].kind == PROMPT:
            cut = len(beginning[0].text)
            chunks[:1] = [Chunk(text=chunks[0].text[:cut], kind=PROMPT), Chunk(text=chunks[0].text[cut:], kind=QUERY)]
        return chunks if _begin_alike(chunks, beginning) else None


def _begin_alike(chunks: Sequence[Chunk], beginning: Sequence[Chunk]) -> bool:
    """Whether chunks begin as the reference's do, up to its last answer but one.

    The last one may have another end: some ends only come with the next message.
    """
    places = [place for place, chunk in enumerate(beginning) if chunk.kind == ANSWER]
    return len(places) > 1 and list(chunks[: places[-2] + 1]) == list(beginning[: places[-2] + 1])


class SlotTracer:
    """A `ConversationTracer` for messages whose contents are placeholders already: one rendering locates them all."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._trace_cached = lru_cache(maxsize=_CACHED)(self._trace)

    def trace(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Trace:
        """Render messages and locate each content. Raises TemplateRefused."""
        return self._trace_messages(messages, generation_prompt=False)

    def trace_template(
        self, messages: Sequence[Message], tools: list[Any] | None, level: Level, *, generation_prompt: bool = False
    ) -> Trace | None:
        """Render messages and locate each content; None if the template refuses them."""
        try:
            return self._trace_messages(messages, generation_prompt=generation_prompt)
        except TemplateRefused:
            return None

    def any_answer(self, number: int) -> str:
        """The placeholder of the message."""
        return _slot(number, EM_SPACE, EM_SPACE)

    def header_key(self, messages: Sequence[Message], answer: int) -> Hashable | None:
        """The roles, and whether contents begin with a line break: all do or none."""
        return (*(message["role"] for message in messages[:answer]), messages[answer]["content"][:1])

    def _trace_messages(self, messages: Sequence[Message], *, generation_prompt: bool) -> Trace:
        return (self._trace_cached if len(messages) <= 2 * _LONG else self._trace)(_as_key(messages), generation_prompt)

    def _trace(self, messages: _RoleContents, generation_prompt: bool) -> Trace:
        text = self.template.render(_as_messages(messages), generation_prompt=generation_prompt)
        found = ((int(match[2]), match) for match in _PLACEHOLDER.finditer(text))
        occurrences = tuple(Occurrence(match.start(2) - 1, match.end(2) + 1, k, "content", k) for k, match in found)
        return Trace(text, occurrences, tuple(Text(k, "content", "") for k in range(len(messages))))


def _as_key(messages: Sequence[Message]) -> _RoleContents:
    return tuple((message["role"], message["content"]) for message in messages)


def _as_messages(key: _RoleContents) -> list[Message]:
    return [{"role": role, "content": content} for role, content in key]


def _slot(message: int, before: str, after: str) -> str:
    return f"{before}\ue000{message}\ue001{after}"


def _slot_messages(roles: Sequence[str], before: str, after: str) -> list[Message]:
    return [{"role": role, "content": _slot(k, before, after)} for k, role in enumerate(roles)]


def template_parts(template: ChatTemplate, roles: Sequence[str]) -> tuple[str | Slot, ...]:
    """One rendering of messages of these roles as texts and slots. Raises TemplateRefused, NotDecomposable."""
    plain = template.render(_slot_messages(roles, EM_SPACE, EM_SPACE))
    broken = template.render(_slot_messages(roles, "\n" + EM_SPACE, EM_SPACE + "\n\n"))
    return _parts(plain, frozenset(_stripped(plain, broken)))


def fill_parts(parts: Sequence[str | Slot], contents: Sequence[str]) -> str:
    """Texts and slots with the contents filled in."""
    return "".join(part if isinstance(part, str) else part.fill(contents[part.message]) for part in parts)


def _stripped(plain: str, broken: str) -> set[tuple[int, str]]:
    """The (message, side) where a template that keeps blanks strips line breaks. Raises NotDecomposable."""
    here, there = list(_PLACEHOLDER.finditer(plain)), list(_PLACEHOLDER.finditer(broken))
    if len(here) != len(there):
        raise NotDecomposable("line breaks around contents change how often the template writes them")
    found: set[tuple[int, str]] = set()
    for k in range(len(here) + 1):
        before, broken_before = (here[k - 1], there[k - 1]) if k else (None, None)
        after, broken_after = (here[k], there[k]) if k < len(here) else (None, None)
        gap = plain[before.end() if before else 0 : after.start() if after else None]
        other = broken[broken_before.end() if broken_before else 0 : broken_after.start() if broken_after else None]
        extra = len(other) - len(gap)
        if not 0 <= extra <= 3 or other != "\n\n" * (extra // 2) + gap + "\n" * (extra % 2):
            raise NotDecomposable(f"line breaks around contents change the text between them: {gap!r}, {other!r}")
        if before and before[3] and extra < 2:
            found.add((int(before[2]), "right"))
        if after and after[1] and extra % 2 == 0:
            found.add((int(after[2]), "left"))
    return found


def _parts(text: str, newlines: frozenset[tuple[int, str]]) -> tuple[str | Slot, ...]:
    """Text with placeholders as texts and slots. Raises NotDecomposable."""
    parts: list[str | Slot] = []
    at = 0

    def strip(kept: str, message: int, side: str) -> Strip:
        return "blanks" if not kept else "newlines" if (message, side) in newlines else ""

    for match in _PLACEHOLDER.finditer(text):
        parts.append(text[at : match.start()])
        message = int(match[2])
        parts.append(Slot(message, strip(match[1], message, "left"), strip(match[3], message, "right")))
        at = match.end()
    parts.append(text[at:])
    if any(isinstance(part, str) and re.search("[\ue000\ue001\u2003]", part) for part in parts):
        raise NotDecomposable(f"the template changes a content: {text!r}")
    return tuple(part for part in parts if part != "")
