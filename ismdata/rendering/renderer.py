"""A conversation, rendered and cut into contexts and answers: the reference for everything faster.

Two ways with templates that rewrite history (they give the same for prefix-stable templates, one document or many):

- `append`: what was fed is never rewritten, exactly as a KV cache is fed. The context of an answer is what the
  rendering that has the answer holds between the end of the answer before it and its own beginning. What ends an answer
  is fed once, as it is written when the answer is the last message.
- `expand`: one document per answer, exactly what the template renders for the conversation that ends with it.

An answer begins behind all text of its context and behind the header that opens it, whatever is written for the answer
itself: where the rendering with the generation prompt and the rendering with an answer of plain text part, but not
inside the header. So `pack` and chat, which does not know the answer, cut at the same place. Where texts stand is
traced (`tracing.py`), and each conversation is held to law 7 (`conservation.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from ismdata.masks import ANSWER, PROMPT, QUERY
from ismdata.rendering.chat_template import ChatTemplate, Message
from ismdata.rendering.conservation import (
    call_left_out,
    check_calls,
    check_context,
    check_document,
    lost,
    missing_texts,
)
from ismdata.rendering.control_tokens import ControlTokens, common_prefix_length
from ismdata.rendering.refusals import HistoryRewritten, NotRendered
from ismdata.rendering.template_probe import TemplateProfile
from ismdata.rendering.tracing import REASONING_START, Level, Place, Traced, Tracer, reasoning_length

#: Stands for an answer that is not there yet.
ANY_ANSWER = "zyx"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A stretch of rendered text.

    `message` is the number of the assistant message it answers with, -1 for context. `reasoning`: how many characters
    of an answer are its reasoning, what closes it included. `unwritten`: the template leaves out reasoning of this
    answer.
    """

    text: str
    kind: int
    message: int = -1
    reasoning: int = 0
    unwritten: bool = False


class _Answer(NamedTuple):
    """Where the newest answer stands in a rendering: characters `start` to `end`, its own text between `said_from` and
    `said_until`. header: what stands between the last text before it and `start`, as an answer of plain text has it.
    """

    header: str
    start: int
    said_from: int
    said_until: int
    end: int


class _Fed(NamedTuple):
    """An answer that was fed: its message, its header, and what was fed behind its text."""

    message: int
    header: str
    tail: str


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """A probed template: everything needed to cut conversations. `markers` include those that are no tokens of their
    own.
    """

    template: ChatTemplate
    profile: TemplateProfile
    controls: ControlTokens
    markers: ControlTokens

    def append(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[Chunk]:
        """The chunks of a conversation under `append`. Raises CannotRender."""
        chunks: list[Chunk] = []
        last: _Fed | None = None
        rendered: Traced | None = None
        done = 0
        for k in _answers(messages):
            rendered = self.trace(messages[: k + 1], tools)
            done, ended = self._resume(messages, last, rendered) if last is not None else (0, "")
            if ended:
                chunks[-1] = replace(chunks[-1], text=chunks[-1].text + ended)
            answer = self._newest(messages, k, tools, rendered, done)
            check_context(messages, range(0 if last is None else last.message + 1, k), rendered, done, answer.start)
            chunks += self._context(messages, rendered, done, answer.start)
            chunks.append(self._answer(messages, k, rendered, answer))
            done = answer.end
            last = _Fed(k, answer.header, rendered.text[answer.said_until : done])
        if last is None or last.message < len(messages) - 1:
            rendered = self.trace(messages, tools)
            done, ended = self._resume(messages, last, rendered) if last is not None else (0, "")
            if ended:
                chunks[-1] = replace(chunks[-1], text=chunks[-1].text + ended)
        assert rendered is not None
        return [*chunks, *self._context(messages, rendered, done, len(rendered.text))]

    def expand(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[Chunk]:
        """The chunks of one document that ends with an answer, exactly as the template renders it.

        Earlier answers are answer chunks too, wherever the rendering still has them. Raises CannotRender.
        """
        k = len(messages) - 1
        rendered = self.trace(messages, tools)
        answer = self._newest(messages, k, tools, rendered, 0)
        border = answer.start
        history = [
            cut for j in _answers(messages[:k]) if (cut := self._history_answer(rendered, j, border, answer.header))
        ]
        contexts = [place for place in rendered.places if not any(a <= place.start < b for _, a, b in history)]
        check_document(messages, rendered, [place for place in contexts if place.end <= border])
        chunks: list[Chunk] = []
        done = 0
        for j, start, end in sorted(history, key=lambda cut: cut[1]):
            start = max(start, done)  # without a header the answer begins where the one before it is closed
            chunks += self._context(messages, rendered, done, start)
            chunks.append(Chunk(text=rendered.text[start:end], kind=ANSWER, message=j))
            done = end
        chunks += self._context(messages, rendered, done, border)
        chunks.append(self._answer(messages, k, rendered, answer))
        return [*chunks, *self._context(messages, rendered, answer.end, len(rendered.text))]

    def next_context(self, messages: Sequence[Message], tools: list[Any] | None = None) -> tuple[str, str, str]:
        """What to feed before the model answers `messages`, when all through the text of the last answer has been fed.

        Returns what ends that answer as `pack` has it ("" where there is none), the part of this that only the next
        message brought (`TemplateProfile.next_turn_ends`), and the context. Raises CannotRender.
        """
        answered: list[Message] = [*messages, {"role": "assistant", "content": ANY_ANSWER}]
        k = len(messages)
        last = max(_answers(messages), default=-1)
        tail = ended = ""
        done = 0
        rendered = self.trace(answered, tools)
        if last >= 0:
            alone = self.trace(messages[: last + 1], tools)
            newest = self._newest(messages, last, tools, alone, 0)
            tail = alone.text[newest.said_until : newest.end]
            done, ended = self._resume(answered, _Fed(last, newest.header, tail), rendered)
        border = self._newest(answered, k, tools, rendered, done).start
        check_context(answered, range(last + 1, k), rendered, done, border)
        return tail + ended, ended, rendered.text[done:border]

    def trace(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Traced:
        """The rendering of messages and where their texts stand. Raises CannotRender."""
        return self._tracer.trace(messages, tools)

    def around(
        self, messages: Sequence[Message], tools: list[Any] | None, level: Level, *, generation_prompt: bool = False
    ) -> Traced | None:
        """What the template writes around the texts of messages; None where it refuses them."""
        return self._tracer.around(messages, tools, level, generation_prompt=generation_prompt)

    @cached_property
    def _tracer(self) -> Tracer:
        return Tracer(self.template)

    # -- where an answer begins and ends ------------------------------------------------------------------------------

    def _newest(
        self, messages: Sequence[Message], k: int, tools: list[Any] | None, rendered: Traced, done: int
    ) -> _Answer:
        """Answer k in `rendered`, which ends with it and of which `done` is cut.

        Raises NotRendered, HistoryRewritten.
        """
        own = rendered.of(k)
        if not own and any(text.message == k for text in rendered.texts):
            for call in messages[k].get("tool_calls") or ():
                raise call_left_out(k, call.get("function", call).get("name", ""))
            raise NotRendered(
                f"message {k + 1} (assistant) is not in the rendering: the template leaves it out. "
                "Pass another with --chat-template FILE"
            )
        at = rendered.end_before(k)
        header = self._remembered_header(messages, k, tools, rendered)
        lead_in = rendered.text[at : own[0].start if own else len(rendered.text)]
        length = len(header)
        if not lead_in.startswith(header):  # this answer's own header is another, or none
            prompt = self.profile.generation_prompt
            length = self.markers.common_prefix(lead_in, header)
            length = max(length, self._prompt_end(lead_in, prompt) if prompt else 0)
        start = max(at + length, done)
        said_from, said_until = (own[0].start, own[-1].end) if own else (start, start)
        if own and at > said_from:
            behind = next(place for place in rendered.places if place.message < k and place.end == at)
            raise HistoryRewritten(
                f"message {behind.message + 1} ({messages[behind.message]['role']}) stands behind the answer that "
                f"follows it, message {k + 1}. Pass another template with --chat-template FILE"
            )
        end = self._end(rendered, said_until)
        return _Answer(header=header, start=start, said_from=said_from, said_until=said_until, end=end)

    def _remembered_header(self, messages: Sequence[Message], k: int, tools: list[Any] | None, rendered: Traced) -> str:
        """`_header` for answer k; where messages are plain text it depends on their roles alone."""
        plain = rendered if rendered.of(k) and _is_plain(messages[k]) else None
        if tools is not None or rendered.level != "whole" or not all(map(_is_bare, messages[:k])):
            return self._header(messages[:k], tools, rendered.level, plain)
        roles = tuple(message["role"] for message in messages[:k])
        if roles not in self._headers:
            self._headers[roles] = self._header(messages[:k], None, "whole", plain)
        return self._headers[roles]

    @cached_property
    def _headers(self) -> dict[tuple[str, ...], str]:
        return {}

    def _header(
        self, messages: Sequence[Message], tools: list[Any] | None, level: Level, plain: Traced | None = None
    ) -> str:
        """What stands between the last text of `messages` and what the model writes: all that opens its answer.

        It depends on the context alone. plain: the rendering with an answer of plain text, where there is one already.
        """
        k = len(messages)
        opened = self.around(messages, tools, level, generation_prompt=True) if messages else None
        if plain is None or not plain.level == level == "whole":  # in `words` an answer's own markup is not marked
            plain = self.around([*messages, {"role": "assistant", "content": ANY_ANSWER}], tools, level)
        shown = "" if opened is None else opened.text[opened.end_before(k) :]
        if plain is None or not plain.of(k):
            return shown
        lead_in = plain.text[plain.end_before(k) : plain.of(k)[0].start]
        return lead_in[: self._header_length(lead_in, shown)]

    def _header_length(self, lead_in: str, opened: str) -> int:
        """How much of `lead_in`, which stands before an answer's text, is its header and what comes before that.

        opened: the same place of the rendering with the generation prompt. The two may part before the header is over.
        """
        prompt = self.profile.generation_prompt
        length = common_prefix_length(lead_in, opened)
        if length < len(opened):
            length = self.markers.common_prefix(lead_in, opened)
        if prompt:
            length = max(length, self._prompt_end(lead_in, prompt))
            if length:
                return length
        # Where no generation prompt is to be found all text before the answer's own opens it, but for reasoning.
        opens = REASONING_START.search(lead_in, length)
        rest = lead_in[: opens.start() if opens else len(lead_in)]
        # A blank before a document's first answer is context: else the answer's first token would be the document's.
        return max(length, len(rest.rstrip(" ") if opened or rest.strip() else rest))

    def _prompt_end(self, lead_in: str, prompt: str) -> int:
        """Where the last generation prompt in `lead_in` ends, or as much of one as has its last control token."""
        at = lead_in.rfind(prompt)
        if at >= 0:
            return at + len(prompt)
        own = {match[0] for match in self.markers.pattern.finditer(prompt) if not self._is_markup(match[0])}
        found = [match for match in self.markers.pattern.finditer(lead_in) if match[0] in own]
        if not found:
            return 0
        rest = prompt[prompt.rindex(found[-1][0]) + len(found[-1][0]) :]
        return found[-1].end() + self.markers.common_prefix(lead_in[found[-1].end() :], rest)

    def _is_markup(self, marker: str) -> bool:
        """Whether a marker is one of a pair like `<think>` and `</think>`, which the model writes."""
        name = marker.strip("<>/")
        return marker == f"<{name}>" and f"</{name}>" in self.markers.tokens

    def _end(self, rendered: Traced, at: int) -> int:
        """Where the answer ends whose text ends `at`, in the rendering that ends with it."""
        tail, end = rendered.text[at:], self.profile.end_of_turn
        found = tail.find(end) if end else -1
        if found >= 0:
            return at + found + len(end)
        last = self.markers.last_end(tail) if end else None
        return at + (last if last is not None else len(tail.rstrip()))

    def _resume(self, messages: Sequence[Message], last: _Fed, rendered: Traced) -> tuple[int, str]:
        """Where an answer that was fed is over in a longer rendering, and what ends it there that was not fed."""
        places = rendered.of(last.message)
        silent_at = rendered.end_before(last.message)
        if places:
            at = places[-1].end
        elif rendered.text.startswith(last.header, silent_at) and all(
            text.message != last.message or text.part == "reasoning" for text in rendered.texts
        ):
            at = silent_at + len(last.header)
        else:
            raise HistoryRewritten(
                f"message {last.message + 1} (assistant) is no longer in the rendering that has message "
                f"{last.message + 2}; --history expand renders one document per answer instead"
            )
        between = rendered.behind(last.message, at)
        length = self._closed(between, last.tail)
        if length is None:
            raise HistoryRewritten(
                f"message {last.message + 1} (assistant) was fed with its end, and message {last.message + 2} is put "
                "before that; --history expand renders one document per answer instead"
            )
        ended = ""
        if not self.profile.end_of_turn:
            match = self.markers.pattern.search(between, length)
            if match is not None and between[length : match.end()] in self.profile.next_turn_ends:
                ended = between[length : match.end()]
        return at + length + len(ended), ended

    def _closed(self, between: str, tail: str) -> int | None:
        """How much of `between`, which follows an answer's text in history, closes the answer; None where nothing does,
        though the template closes answers.
        """
        if between.startswith(tail):
            return len(tail)
        # Traced by words in one rendering and whole in another: punctuation that ends the text is outside it or not.
        for skipped in range(self._loose(tail) + 1):
            found = between.find(tail[skipped:]) if tail[skipped:] else -1
            if 0 <= found <= self._loose(between):
                return found + len(tail) - skipped
        for end in (self.profile.end_of_turn, self.profile.history_end):
            found = between.find(end) if end else -1
            if found >= 0:
                return found + len(end)
        return None if self.profile.history_end else self.markers.common_prefix(between, tail)

    def _loose(self, text: str) -> int:
        """How many characters of `text` come before its first word or marker."""
        word, marker = re.search(r"\w", text), self.markers.pattern.search(text)
        return min(found.start() for found in (word, marker) if found) if word or marker else len(text)

    def _history_answer(self, rendered: Traced, j: int, border: int, header: str) -> tuple[int, int, int] | None:
        """(j, start, end) of an earlier answer in a document of `expand`; None where the template dropped it."""
        places = rendered.of(j)
        if not places or places[-1].end > border:
            return None
        first, at = places[0].start, places[-1].end
        before = max((place.end for place in rendered.places if place.start < first), default=0)
        lead_in = rendered.text[before:first]
        length = len(header) if lead_in.startswith(header) else self._header_length(lead_in, "")
        closed = self._closed(rendered.behind(j, at), self.profile.history_end)
        return j, before + length, min(at + (closed or 0), border)

    # -- chunks -------------------------------------------------------------------------------------------------------

    def _answer(self, messages: Sequence[Message], k: int, rendered: Traced, answer: _Answer) -> Chunk:
        """Answer k as a chunk, all its text in it. Raises TextLost, NotRendered, HistoryRewritten."""
        places, border, end = rendered.of(k), answer.start, answer.end
        lead = rendered.text[border : answer.said_from]
        prompt, user = self.profile.generation_prompt.strip(), self.profile.user_header.strip()
        for opener in {prompt, "" if user in prompt else user}:  # a marker that all headers have says nothing
            if self.markers.pattern.search(opener) is not None and opener in lead:
                raise HistoryRewritten(
                    f"message {k + 1} (assistant): another turn's header, {opener!r}, stands before its text. "
                    "Pass another template with --chat-template FILE"
                )
        if answer.said_until > end or answer.said_from < border:
            raise HistoryRewritten(f"message {k + 1} (assistant): a part of it stands outside its turn")
        missing = missing_texts(rendered, places, {k})
        said = [number for number in missing if rendered.texts[number].part != "reasoning"]
        if said:
            raise lost(messages, rendered, said[0])
        check_calls(messages[k], k, rendered, border, end)
        text = rendered.text[border:end]
        return Chunk(
            text=text,
            kind=ANSWER,
            message=k,
            reasoning=_reasoning_in(rendered, places, border),
            unwritten=bool(missing),
        )

    def _context(self, messages: Sequence[Message], rendered: Traced, start: int, end: int) -> list[Chunk]:
        """A context as chunks: the document's first one is parted into prompt and query where a user's turn opens."""
        text = rendered.text[start:end]
        border = self._prompt_length(messages, rendered, text) if start == 0 else 0
        chunks = Chunk(text=text[:border], kind=PROMPT), Chunk(text=text[border:], kind=QUERY)
        return [chunk for chunk in chunks if chunk.text]

    def _prompt_length(self, messages: Sequence[Message], rendered: Traced, text: str) -> int:
        """How much of the first context is prompt: all before the first user's header, cut at a control token."""
        first = next((k for k, message in enumerate(messages) if message["role"] in ("user", "assistant")), None)
        if first is None or messages[first]["role"] == "assistant":
            header = text.rfind(self.profile.generation_prompt) if self.profile.generation_prompt else -1
            return self._snap(text, header) if header > 0 else 0
        at = next((place.start for place in rendered.places if place.message == first), None)
        if at is None:  # it says nothing: where it would
            said = self.around([*messages[:first], {**messages[first], "content": ANY_ANSWER}], None, "whole")
            places = said.of(first) if said is not None else []
            at = places[0].start if said and places and text.startswith(said.text[: places[0].start]) else 0
        header = text[:at].rfind(self.profile.user_header) if self.profile.user_header else -1
        return self._snap(text, header) if header > 0 else 0

    def _snap(self, text: str, at: int) -> int:
        """The last place at or before `at` where a control token begins or ends, so that the cut is a token border."""
        borders = [0]
        for match in self.controls.pattern.finditer(text):
            borders += [match.start(), match.end()]
        return max(border for border in borders if border <= at)


def _answers(messages: Sequence[Message]) -> list[int]:
    return [k for k, message in enumerate(messages) if message["role"] == "assistant"]


def _is_plain(message: Message) -> bool:
    """Whether an answer is text alone and begins with it."""
    content = message.get("content") or ""
    extra = message.get("tool_calls") or message.get("reasoning_content") or message.get("name")
    return bool(content.strip()) and not extra and content == content.lstrip() and not reasoning_length(content)


def _is_bare(message: Message) -> bool:
    """Whether a message is a role and a text, without blanks around it."""
    content = message.get("content") or ""
    return len(message) == 2 and bool(content) and content == content.strip()


def _reasoning_in(rendered: Traced, places: Sequence[Place], border: int) -> int:
    """How many characters behind `border` are an answer's reasoning, with what closes it and blanks behind."""
    said = next((place.start for place in places if place.part != "reasoning"), None)
    if said is None:
        return 0
    if places[0].part == "reasoning":
        return said - border
    first = places[0]
    if first.part != "content":
        return 0
    text = rendered.text[first.start : first.end]
    length = reasoning_length(text)
    rest = text[length:]
    return first.start - border + length + len(rest) - len(rest.lstrip()) if length else 0
