"""Where each text of a conversation occurs in its rendering.

Searching for a text in the rendering is not safe: it may look like the template's own text, or like another message's.
So the conversation is rendered a second time, with a numbered placeholder instead of each text. If filling the
placeholders gives exactly the first rendering, their positions are the positions of the texts.

Some templates act on what messages contain (they cut off reasoning, strip or escape blanks), and then the two
renderings differ. Three methods are tried in this order:

1. `whole`: one placeholder per text. Blanks around the text stay.
2. `words`: one placeholder per run of words. Markup, punctuation, line breaks and the template's own constants stay, so
   that the template treats the placeholders as it treats the text.
3. Alignment, for templates that rewrite texts (to upper case, for example): the rendering is matched against what lies
   between the placeholders of `whole`. The match counts only if it is the only one.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol

from ismdata.rendering.chat_template import ChatTemplate, Message
from ismdata.rendering.refusals import CannotRender, NotTraceable, TextLost

#: The content of an answer that is not known yet.
ANY_ANSWER = "zyx"

#: Unicode noncharacters around a placeholder's number. `ControlTokens.escape` refuses text that contains them.
_OPEN, _CLOSE = "\U0010fffe", "\U0010ffff"
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_WORDS = re.compile(r"\w+(?: \w+)*")

#: What opens reasoning. The model writes it, so an answer's header ends before it.
REASONING_START = re.compile(r"(?i)<(?:think|thinking|thought|reasoning|seed:think)>|\[THINK\]|<\|think\|>")

#: What ends reasoning in an answer's content: a pattern that Python's `re` and Arrow both read.
REASONING_END = r"(?i)</(?:think|thinking|thought|reasoning|seed:think)>|\[/THINK\]|<\|/think\|>"

#: Renderings with placeholders are cached for conversations of at most this many messages.
_CACHED_MESSAGES = 64

Part = Literal["content", "reasoning", "call", "name"]
Level = Literal["whole", "words"]
LEVELS: tuple[Level, ...] = ("whole", "words")


class Text(NamedTuple):
    """A text of a message, or a run of words in one, and the part of the message to which it belongs."""

    message: int
    part: Part
    text: str


class Occurrence(NamedTuple):
    """Characters `start` to `end` of a rendering are text number `text` of the conversation."""

    start: int
    end: int
    message: int
    part: Part
    text: int


@dataclass(frozen=True)
class Trace:
    """A rendering and the occurrences of the conversation's texts in it, in the order of the rendering."""

    text: str
    occurrences: tuple[Occurrence, ...]
    texts: tuple[Text, ...]
    level: Level = "whole"

    def of_message(self, message: int) -> list[Occurrence]:
        """The occurrences of one message's texts. Of a tool's name only the first: results may repeat it."""
        found = [one for one in self.occurrences if one.message == message]
        names = [one for one in found if one.part == "name"]
        if not names:
            return found
        first = {one.text: one for one in reversed(names)}
        return [one for one in found if one.part != "name" or first[one.text] is one]

    def end_before(self, message: int) -> int:
        """Where the last text of the messages before this one ends; 0 if they have none."""
        return max((one.end for one in self.occurrences if one.message < message and one.part != "name"), default=0)

    def text_after(self, message: int, at: int) -> str:
        """The rendering from `at`, where this message's text ends, to the next text."""
        own = self.of_message(message)
        last = self.occurrences.index(own[-1]) if own else -1
        later = (one.start for one in self.occurrences[last + 1 :] if one.start >= at and one.message != message)
        return self.text[at : next(later, len(self.text))]


class ConversationTracer(Protocol):
    """Renders conversations and locates their texts: `Tracer`, or `skeleton.SlotTracer`."""

    template: ChatTemplate

    def trace(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Trace:
        """Render messages and locate each text. Raises CannotRender."""

    def trace_template(
        self, messages: Sequence[Message], tools: list[Any] | None, level: Level, *, generation_prompt: bool = False
    ) -> Trace | None:
        """Render messages; only the text around the messages' own texts is sure to be right.

        Returns None if the template refuses the messages or breaks a placeholder.
        """

    def any_answer(self, number: int) -> str:
        """The content that stands for message `number`, an answer that is not known yet."""

    def header_key(self, messages: Sequence[Message], answer: int) -> Hashable | None:
        """What the header of message `answer` depends on, without tools at level `whole`; None if on the texts too."""


@dataclass(frozen=True)
class PlaceholderMessages:
    """Messages with placeholders instead of their texts."""

    messages: list[Message]
    texts: tuple[Text, ...]
    level: Level

    def fill(self, rendered: str) -> Trace | None:
        """Put the texts back into a rendering of the messages; None if the template broke a placeholder."""
        pieces: list[str] = []
        occurrences: list[Occurrence] = []
        at = length = 0
        for match in _PLACEHOLDER.finditer(rendered):
            number = int(match[1])
            if number >= len(self.texts):
                return None
            own = self.texts[number]
            before = rendered[at : match.start()]
            start = length + len(before)
            length = start + len(own.text)
            pieces += before, own.text
            occurrences.append(Occurrence(start, length, own.message, own.part, number))
            at = match.end()
        pieces.append(rendered[at:])
        text = "".join(pieces)
        if _OPEN in text or _CLOSE in text:
            return None
        return Trace(text, tuple(occurrences), self.texts, self.level)


def insert_placeholders(
    messages: Sequence[Message], level: Level, constants: Sequence[str] = (), *, in_silent: bool = False
) -> PlaceholderMessages:
    """Replace the texts of messages by placeholders: contents, reasoning, and strings among the arguments of calls.

    Args:
        messages: As templates take them.
        level: `whole` or `words`, see the module's docstring.
        constants: What `words` leaves as it is, since the template may look for it.
        in_silent: Put placeholders into messages without text too, so that their positions are known: an empty text
            before blank content, the tool's name in calls whose arguments have no text.

    Returns:
        The messages with placeholders, and the texts that they stand for.
    """
    inserter = _Inserter(messages, level, constants)
    return PlaceholderMessages(
        [inserter.message(number, in_silent) for number in range(len(messages))], tuple(inserter.texts), level
    )


class _Inserter:
    """Replaces texts by placeholders and collects them in `texts`."""

    def __init__(self, messages: Sequence[Message], level: Level, constants: Sequence[str]) -> None:
        self.messages = messages
        self.level = level
        self.constants = constants
        self.texts: list[Text] = []

    def message(self, number: int, in_silent: bool) -> Message:
        own = dict(self.messages[number])
        if isinstance(own.get("reasoning_content"), str):
            own["reasoning_content"] = self._replace(own["reasoning_content"], number, "reasoning")
        if isinstance(own.get("content"), str):
            own["content"] = self._replace(own["content"], number, "content")
        if own.get("tool_calls"):
            own["tool_calls"] = [self._call(call, number) for call in own["tool_calls"]]
        if in_silent and (not self.texts or self.texts[-1].message < number):
            if own.get("tool_calls"):
                own["tool_calls"] = [self._named(call, number) for call in own["tool_calls"]]
            elif not (own.get("content") or "").strip():
                own["content"] = self._placeholder("", number, "content") + (own.get("content") or "")
        return own

    def _placeholder(self, text: str, message: int, part: Part) -> str:
        self.texts.append(Text(message, part, text))
        return f"{_OPEN}{len(self.texts) - 1}{_CLOSE}"

    def _replace(self, text: str, message: int, part: Part) -> str:
        """The text with one placeholder, or with one per run of words."""
        stretches = list(_stretches(text, self.constants)) if self.level == "words" else []
        if not any(free and _WORDS.search(stretch) for free, stretch in stretches):
            if any(not free for free, _ in stretches):
                return text  # markup alone
            bare = text.strip()
            before, _, after = text.partition(bare) if bare else (text, "", "")
            return f"{before}{self._placeholder(bare, message, part)}{after}" if bare else text
        is_answer = part == "content" and self.messages[message]["role"] == "assistant"
        reasoning_end = reasoning_length(text) if is_answer else 0
        pieces: list[str] = []
        done = 0
        for free, stretch in stretches:
            at = 0
            for match in _WORDS.finditer(stretch) if free else ():
                own = "reasoning" if done + match.start() < reasoning_end else part
                pieces += stretch[at : match.start()], self._placeholder(match[0], message, own)
                at = match.end()
            pieces.append(stretch[at:])
            done += len(stretch)
        return "".join(pieces)

    def _leaves(self, value: Any, message: int) -> Any:
        """JSON with its strings replaced."""
        if isinstance(value, str):
            return self._replace(value, message, "call")
        if isinstance(value, Mapping):
            return {key: self._leaves(item, message) for key, item in value.items()}
        return [self._leaves(item, message) for item in value] if isinstance(value, list) else value

    def _call(self, call: Any, message: int) -> Any:
        function = call.get("function")
        if isinstance(function, Mapping) and "arguments" in function:
            return {**call, "function": {**function, "arguments": self._leaves(function["arguments"], message)}}
        return {**call, "arguments": self._leaves(call["arguments"], message)} if "arguments" in call else call

    def _named(self, call: Any, message: int) -> Any:
        """A call with a placeholder for the tool's name."""
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            return {**call, "function": {**function, "name": self._placeholder(function["name"], message, "name")}}
        return call


def _stretches(text: str, kept: Sequence[str]) -> Iterator[tuple[bool, str]]:
    """Cut a text at the strings to keep, which may overlap: (may be replaced, stretch) in order."""
    found = sorted((at, at + len(one)) for one in kept for at in _positions(one, text))
    done = 0
    for start, end in found:
        if start > done:
            yield True, text[done:start]
        if end > done:
            yield False, text[max(start, done) : end]
            done = end
    yield True, text[done:]


def _positions(part: str, text: str) -> Iterator[int]:
    """Where `part` begins in `text`, overlapping occurrences included."""
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def reasoning_length(content: str) -> int:
    """How much of an answer's content is reasoning.

    Args:
        content: The content of an assistant message.

    Returns:
        Characters up to the end of the last `</think>` or similar marker; 0 without one.

    >>> reasoning_length("<think>Hm.</think>Yes.")
    18
    """
    return max((match.end() for match in re.finditer(REASONING_END, content)), default=0)


class Tracer:
    """Renders conversations under one template and locates their texts."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        # A constant of letters alone (`user`) is a word like any other: templates look for markup, and compare roles.
        self._constants = sorted(text for text in template.constants if len(text) > 1 and not text.isalnum())
        # With placeholders, conversations with the same sequence of roles are the same.
        self._render_cached = lru_cache(maxsize=1024)(self._render)

    def trace(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Trace:
        """Render messages and locate each text. Raises TemplateRefused, NotTraceable, TextLost."""
        text = self.template.render(messages, tools=tools)
        for level in LEVELS:
            for in_silent in (True, False):
                replaced = insert_placeholders(messages, level, self._constants, in_silent=in_silent)
                found = self._trace_replaced(replaced, tools)
                if found is not None and found.text == text:
                    return found
                if in_silent and all(own.text and own.part != "name" for own in replaced.texts):
                    break  # every message has text: the placeholders would be the same again
        return self._align(text, messages, tools)

    def trace_template(
        self, messages: Sequence[Message], tools: list[Any] | None, level: Level, *, generation_prompt: bool = False
    ) -> Trace | None:
        """Render messages with placeholders and fill these; None if the template refuses or breaks them."""
        replaced = insert_placeholders(messages, level, self._constants)
        return self._trace_replaced(replaced, tools, generation_prompt=generation_prompt)

    def any_answer(self, number: int) -> str:
        """The content that stands for an answer that is not known yet."""
        return ANY_ANSWER

    def header_key(self, messages: Sequence[Message], answer: int) -> Hashable | None:
        """The roles, if all messages are plain text."""
        before = messages[:answer]
        return tuple(message["role"] for message in before) if all(map(_is_bare, before)) else None

    def _trace_replaced(
        self, replaced: PlaceholderMessages, tools: list[Any] | None, *, generation_prompt: bool = False
    ) -> Trace | None:
        messages = replaced.messages
        try:
            if tools is None and len(messages) <= _CACHED_MESSAGES and all(len(one) == 2 for one in messages):
                key = tuple((one["role"], one["content"]) for one in messages)
                rendered = self._render_cached(key, generation_prompt)
            else:
                rendered = self.template.render(messages, tools=tools, generation_prompt=generation_prompt)
        except CannotRender:
            return None
        return replaced.fill(rendered)

    def _render(self, messages: tuple[tuple[str, str], ...], generation_prompt: bool) -> str:
        """Render messages of a role and a content each."""
        shaped = [{"role": role, "content": content} for role, content in messages]
        return self.template.render(shaped, generation_prompt=generation_prompt)

    def _align(self, text: str, messages: Sequence[Message], tools: list[Any] | None) -> Trace:
        """Locate texts that the template rewrites, by what lies between them."""
        replaced = insert_placeholders(messages, "whole")
        try:
            around = _PLACEHOLDER.split(self.template.render(replaced.messages, tools=tools))
        except CannotRender:
            raise NotTraceable(_UNTRACEABLE) from None
        between, numbers = around[::2], [int(number) for number in around[1::2]]
        regions = _only_match(text, between)
        if regions is None or any(number >= len(replaced.texts) for number in numbers):
            raise NotTraceable(_UNTRACEABLE)
        occurrences = []
        for number, (start, end) in zip(numbers, regions, strict=True):
            own = replaced.texts[number]
            bare, region = own.text.strip(), text[start:end]
            if bare and region.count(bare) == 1:
                start += region.index(bare)
                end = start + len(bare)
            elif _words(region) != _words(bare):
                raise TextLost(
                    f"the template changes the text of message {own.message + 1}: it writes {shorten(region)} for "
                    f"{shorten(bare)}. Pass a template that writes texts unchanged with --chat-template FILE"
                )
            occurrences.append(Occurrence(start, end, own.message, own.part, number))
        return Trace(text, tuple(occurrences), replaced.texts)


_UNTRACEABLE = (
    "the template changes texts so much that their positions in the rendering cannot be determined. "
    "Pass a template that writes texts unchanged with --chat-template FILE"
)


def _is_bare(message: Message) -> bool:
    """Whether a message is a role and a text without blanks around it."""
    content = message.get("content") or ""
    return len(message) == 2 and bool(content) and content == content.strip()


def _only_match(text: str, between: Sequence[str]) -> list[tuple[int, int]] | None:
    """The gaps that the strings `between`, in order, leave in `text`; None if they do not match in exactly one way."""
    if not (text.startswith(between[0]) and text.endswith(between[-1])):
        return None
    first, at = [], len(between[0])
    for stretch in between[1:-1]:
        found = text.find(stretch, at)
        if found < 0:
            return None
        first.append((at, found))
        at = found + len(stretch)
    end = len(text) - len(between[-1])
    if len(between) > 1:
        if end < at:
            return None
        first.append((at, end))
    last, limit = [], end
    for stretch in reversed(between[1:-1]):
        found = text.rfind(stretch, len(between[0]), limit)
        if found < 0:
            return None
        last.append((found + len(stretch), limit))
        limit = found
    if len(between) > 1:
        last.append((len(between[0]), limit))
    return first if first == last[::-1] else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def shorten(text: str, length: int = 40) -> str:
    """The repr of a text, cut to about `length` characters for a message to the user."""
    return repr(text if len(text) <= length else text[: length - 1] + "…")
