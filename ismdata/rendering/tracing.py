"""Where each text of a conversation stands in a rendering: found with marks, never by searching for the text.

A text may look like the template's own, or like another message's. So the conversation is rendered a second time with a
mark in place of each text. Where the marks, filled with their texts again, give the very rendering, they say where the
texts stand. Some templates act on what messages say: they cut reasoning off, strip or escape blanks. So there are three
ways, tried in this order:

1. `whole`: one mark per text; blanks around the text stay.
2. `words`: one mark per run of words; markup, punctuation, line breaks and the template's own constants stay, so that
   the template acts as it does on the text.
3. Templates that rewrite texts (upper case, say): the rendering is matched with what stands between the marks of
   `whole`, and counts as matched only where there is exactly one way to do it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

from ismdata.rendering.chat_template import ChatTemplate, Message
from ismdata.rendering.refusals import CannotRender, NotTraceable, TextLost

#: Noncharacters of Unicode around the number of a mark; `ControlTokens.escape` refuses text that holds them.
_OPEN, _CLOSE = "\U0010fffe", "\U0010ffff"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_WORDS = re.compile(r"\w+(?: \w+)*")

#: What opens reasoning (the model writes it, so no header reaches beyond it), and what ends it in an answer's content.
REASONING_START = re.compile(r"(?i)<(?:think|thinking|thought|reasoning|seed:think)>|\[THINK\]|<\|think\|>")
REASONING_END = r"(?i)</(?:think|thinking|thought|reasoning|seed:think)>|\[/THINK\]|<\|/think\|>"

#: Messages of a conversation whose marked rendering is remembered.
_REMEMBERED = 64

Part = Literal["content", "reasoning", "call", "name"]
Level = Literal["whole", "words"]
LEVELS: tuple[Level, ...] = ("whole", "words")


class Text(NamedTuple):
    """A text of a message, or a run of words in one, and the part of the message that it belongs to."""

    message: int
    part: Part
    text: str


class Place(NamedTuple):
    """Characters `start` to `end` of a rendering hold text number `text` of the conversation."""

    start: int
    end: int
    message: int
    part: Part
    text: int


@dataclass(frozen=True)
class Traced:
    """A rendering and the places of the texts in it, in the order of the rendering."""

    text: str
    places: tuple[Place, ...]
    texts: tuple[Text, ...]
    level: Level = "whole"

    def of(self, message: int) -> list[Place]:
        """The places of one message's texts; of a tool's name the first, results may name it again."""
        found = [place for place in self.places if place.message == message]
        names = [place for place in found if place.part == "name"]
        if not names:
            return found
        first = {place.text: place for place in reversed(names)}
        return [place for place in found if place.part != "name" or first[place.text] is place]

    def end_before(self, message: int) -> int:
        """Where the last text of the messages before this one ends; 0 where they have none."""
        return max((place.end for place in self.places if place.message < message and place.part != "name"), default=0)

    def behind(self, message: int, at: int) -> str:
        """What stands between `at`, where this message's text ends, and the next text."""
        own = self.of(message)
        last = self.places.index(own[-1]) if own else -1
        later = (place.start for place in self.places[last + 1 :] if place.start >= at and place.message != message)
        return self.text[at : next(later, len(self.text))]


@dataclass(frozen=True)
class Marked:
    """Messages with marks in place of their texts."""

    messages: list[Message]
    texts: tuple[Text, ...]
    level: Level

    def filled(self, rendered: str) -> Traced | None:
        """A rendering of the marked messages with the texts put back; None where the template took a mark apart."""
        pieces: list[str] = []
        places: list[Place] = []
        at = length = 0
        for match in _MARK.finditer(rendered):
            number = int(match[1])
            if number >= len(self.texts):
                return None
            own = self.texts[number]
            before = rendered[at : match.start()]
            start = length + len(before)
            length = start + len(own.text)
            pieces += before, own.text
            places.append(Place(start, length, own.message, own.part, number))
            at = match.end()
        pieces.append(rendered[at:])
        text = "".join(pieces)
        if _OPEN in text or _CLOSE in text:
            return None
        return Traced(text, tuple(places), self.texts, self.level)


def mark(messages: Sequence[Message], level: Level, constants: Sequence[str] = (), *, silent: bool = False) -> Marked:
    """Put marks in place of the texts of messages: contents, reasoning, and strings among the arguments of calls.

    Args:
        messages: As templates take them.
        level: `whole` or `words`, see the module's text.
        constants: What `words` leaves as it is, since the template may look for it.
        silent: Mark messages without any text too, so that it is known where they stand: blank contents by an empty
            text, calls without texts by the tool's name.
    """
    texts: list[Text] = []

    def one(text: str, message: int, part: Part) -> str:
        texts.append(Text(message, part, text))
        return f"{_OPEN}{len(texts) - 1}{_CLOSE}"

    def put(text: str, message: int, part: Part) -> str:
        stretches = list(_stretches(text, constants)) if level == "words" else []
        if not any(free and _WORDS.search(stretch) for free, stretch in stretches):
            if any(not free for free, _ in stretches):
                return text  # markup alone
            bare = text.strip()
            before, _, after = text.partition(bare) if bare else (text, "", "")
            return f"{before}{one(bare, message, part)}{after}" if bare else text
        until = reasoning_length(text) if part == "content" and messages[message]["role"] == "assistant" else 0
        pieces: list[str] = []
        done = 0
        for free, stretch in stretches:
            at = 0
            for match in _WORDS.finditer(stretch) if free else ():
                own = "reasoning" if done + match.start() < until else part
                pieces += stretch[at : match.start()], one(match[0], message, own)
                at = match.end()
            pieces.append(stretch[at:])
            done += len(stretch)
        return "".join(pieces)

    def leaves(value: Any, message: int) -> Any:
        if isinstance(value, str):
            return put(value, message, "call")
        if isinstance(value, Mapping):
            return {key: leaves(item, message) for key, item in value.items()}
        return [leaves(item, message) for item in value] if isinstance(value, list) else value

    def call(value: Any, message: int) -> Any:
        function = value.get("function")
        if isinstance(function, Mapping) and "arguments" in function:
            return {**value, "function": {**function, "arguments": leaves(function["arguments"], message)}}
        return {**value, "arguments": leaves(value["arguments"], message)} if "arguments" in value else value

    def named(value: Any, message: int) -> Any:
        function = value.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            return {**value, "function": {**function, "name": one(function["name"], message, "name")}}
        return value

    marked: list[Message] = []
    for number, message in enumerate(messages):
        own = dict(message)
        if isinstance(own.get("reasoning_content"), str):
            own["reasoning_content"] = put(own["reasoning_content"], number, "reasoning")
        if isinstance(own.get("content"), str):
            own["content"] = put(own["content"], number, "content")
        if own.get("tool_calls"):
            own["tool_calls"] = [call(one_call, number) for one_call in own["tool_calls"]]
        if silent and (not texts or texts[-1].message < number):
            if own.get("tool_calls"):
                own["tool_calls"] = [named(one_call, number) for one_call in own["tool_calls"]]
            elif not (own.get("content") or "").strip():
                own["content"] = one("", number, "content") + (own.get("content") or "")
        marked.append(own)
    return Marked(marked, tuple(texts), level)


def _stretches(text: str, kept: Sequence[str]) -> Iterator[tuple[bool, str]]:
    """A text cut at what is to be kept: (may be marked, stretch) in order. Kept texts may overlap."""
    found = sorted((at, at + len(one)) for one in kept for at in _occurrences(one, text))
    done = 0
    for start, end in found:
        if start > done:
            yield True, text[done:start]
        if end > done:
            yield False, text[max(start, done) : end]
            done = end
    yield True, text[done:]


def _occurrences(part: str, text: str) -> Iterator[int]:
    """Where `part` begins in `text`, occurrences that overlap included."""
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def reasoning_length(content: str) -> int:
    """How much of an answer's content is reasoning: all through the last `</think>` or the like; 0 without any."""
    return max((match.end() for match in re.finditer(REASONING_END, content)), default=0)


class Tracer:
    """Renders conversations and says where their texts went."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        # A constant of letters alone (`user`) is a word like any other: templates compare with it, and look for markup.
        self._constants = sorted(text for text in template.constants if len(text) > 1 and not text.isalnum())

    def trace(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Traced:
        """The rendering of messages and the place of each text. Raises TemplateRefused, NotTraceable, TextLost."""
        text = self.template.render(messages, tools=tools)
        for level in LEVELS:
            all_heard = False
            for silent in (True, False):
                if all_heard:
                    break  # every message has a text: nothing else would be marked
                marked = mark(messages, level, self._constants, silent=silent)
                all_heard = silent and all(own.text and own.part != "name" for own in marked.texts)
                found = self._filled(marked, tools)
                if found is not None and found.text == text:
                    return found
        return self._aligned(text, messages, tools)

    def around(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        level: Level,
        *,
        generation_prompt: bool = False,
    ) -> Traced | None:
        """The rendering of the marked messages, filled: right in all that stands around the texts.

        None where the template refuses the messages or takes a mark apart.
        """
        marked = mark(messages, level, self._constants)
        return self._filled(marked, tools, generation_prompt=generation_prompt)

    def _filled(self, marked: Marked, tools: list[Any] | None, *, generation_prompt: bool = False) -> Traced | None:
        try:
            if tools is None and len(marked.messages) <= _REMEMBERED and all(len(one) == 2 for one in marked.messages):
                key = tuple((one["role"], one["content"]) for one in marked.messages)
                rendered = self._remembered(key, generation_prompt)
            else:
                rendered = self.template.render(marked.messages, tools=tools, generation_prompt=generation_prompt)
        except CannotRender:
            return None
        return marked.filled(rendered)

    @cached_property
    def _remembered(self) -> Callable[[tuple[tuple[str, str], ...], bool], str]:
        """Renders messages of a role and a content each. Conversations of like roles are the same once marked."""

        @lru_cache(maxsize=1024)
        def rendered(messages: tuple[tuple[str, str], ...], generation_prompt: bool) -> str:
            shaped = [{"role": role, "content": content} for role, content in messages]
            return self.template.render(shaped, generation_prompt=generation_prompt)

        return rendered

    def _aligned(self, text: str, messages: Sequence[Message], tools: list[Any] | None) -> Traced:
        """The places of texts that the template rewrites, from what stands between them."""
        marked = mark(messages, "whole")
        try:
            around = _MARK.split(self.template.render(marked.messages, tools=tools))
        except CannotRender:
            raise NotTraceable(_UNTRACEABLE) from None
        between, numbers = around[::2], [int(number) for number in around[1::2]]
        regions = _only_match(text, between)
        if regions is None or any(number >= len(marked.texts) for number in numbers):
            raise NotTraceable(_UNTRACEABLE)
        places = []
        for number, (start, end) in zip(numbers, regions, strict=True):
            own = marked.texts[number]
            found, region = own.text.strip(), text[start:end]
            if found and region.count(found) == 1:
                start += region.index(found)
                end = start + len(found)
            elif _words(region) != _words(found):
                raise TextLost(
                    f"the template changes what message {own.message + 1} says: {shortened(region)} for "
                    f"{shortened(found)}. Pass a template that writes texts as they are with --chat-template FILE"
                )
            places.append(Place(start, end, own.message, own.part, number))
        return Traced(text, tuple(places), marked.texts)


_UNTRACEABLE = (
    "the template changes texts so that their places cannot be told. "
    "Pass a template that writes texts as they are with --chat-template FILE"
)


def _only_match(text: str, between: Sequence[str]) -> list[tuple[int, int]] | None:
    """The gaps in `text` that the strings `between` leave, in order; None where there are none, or several ways."""
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


def shortened(text: str, length: int = 40) -> str:
    """A text as a message to the user quotes it."""
    return repr(text if len(text) <= length else text[: length - 1] + "…")
