"""A conversation, rendered and cut into contexts and answers: the reference for everything faster.

Two ways with templates that rewrite history (they give the same for prefix-stable templates, one document or many):

- `append`: what was fed is never rewritten, exactly as a KV cache is fed. The context of an answer ends at the common
  prefix of render(messages[:k], generation prompt) and render(messages[:k + 1]); the answer is what follows, through
  its end-of-turn token; what the template puts between that token and the next answer is the next context, read off the
  rendering that has the next message.
- `expand`: one document an answer, exactly what the template renders for the conversation that ends with it.

Where an answer's text could be taken for the template's own, its place is found by rendering the conversation once more
with that one message replaced by a sentinel, never by searching for the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.control_tokens import ControlTokens
from ismdata.masks import ANSWER, PROMPT, QUERY
from ismdata.template import ChatTemplate, Message, TemplateProfile, TemplateRefused

#: A noncharacter of Unicode; `ControlTokens.escape` refuses text that holds it.
SENTINEL = "\U0010fffe"


class HistoryRewritten(Exception):
    """The template changes an earlier turn in a way that `append` cannot follow."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A stretch of rendered text. `message` is the number of the assistant message it answers with, -1 for context."""

    text: str
    kind: int
    message: int = -1


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
        """The chunks of a conversation under `append`. Raises TemplateRefused, HistoryRewritten."""
        chunks: list[Chunk] = []
        fed = ""  # the newest rendering, of which `done` characters have been cut into chunks
        done = 0
        last: int | None = None
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            opened = self._opened(messages[:k], tools)
            answered = self.template.render(messages[: k + 1], tools=tools)
            if last is not None:
                done = self._resume(messages, last, k + 1, tools, fed, done, answered)
            border = self._border(messages, k, tools, opened, answered, done)
            chunks += self._context(messages[: k + 1], tools, answered[done:border], start=done)
            end = border + self._answer_length(messages[: k + 1], tools, answered[border:])
            chunks.append(Chunk(text=answered[border:end], kind=ANSWER, message=k))
            fed, done, last = answered, end, k
        if last is None or last < len(messages) - 1:
            whole = self.template.render(messages, tools=tools)
            if last is not None:
                done = self._resume(messages, last, len(messages), tools, fed, done, whole)
            fed = whole
        tail = fed[done:]
        if tail:
            chunks += self._context(messages, tools, tail, start=done) if last is None else [_query(tail)]
        return chunks

    def expand(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[Chunk]:
        """The chunks of one document that ends with an answer, exactly as the template renders it.

        Earlier answers are answer chunks too, wherever the rendering still has them. Raises TemplateRefused.
        """
        k = len(messages) - 1
        opened = self._opened(messages[:k], tools)
        text = self.template.render(messages, tools=tools)
        border = self._border(messages, k, tools, opened, text)
        chunks: list[Chunk] = []
        done = 0
        for j, message in enumerate(messages[:k]):
            if message["role"] != "assistant":
                continue
            place = self._place(messages, j, tools, text)
            if place is None or place[0] < done or place[1] > border:
                continue  # the template dropped this turn; what is left of it is context
            start, end = place
            chunks += self._context(messages, tools, text[done:start], start=done)
            chunks.append(Chunk(text=text[start:end], kind=ANSWER, message=j))
            done = end
        chunks += self._context(messages, tools, text[done:border], start=done)
        end = border + self._answer_length(messages, tools, text[border:])
        chunks.append(Chunk(text=text[border:end], kind=ANSWER, message=k))
        if text[end:]:
            chunks.append(_query(text[end:]))
        return chunks

    def next_context(self, messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        """What to feed before the model answers `messages`, all through the last answer's end of turn having been
        fed.
        """
        context = ""
        for chunk in self.append([*messages, {"role": "assistant", "content": SENTINEL}], tools):
            if chunk.kind != ANSWER:
                context += chunk.text
            elif chunk.message < len(messages):
                context = ""
            else:
                break
        return context

    def check_places(self, messages: Sequence[Message], tools: list[Any] | None, *, expand: bool) -> None:
        """Raise HistoryRewritten unless what users and tools say lands in contexts, all of it, and nowhere else.

        Some templates draw a tool's result into the turn of the model that called it.
        """
        marked = [
            {**message, "content": f"\ue000{k}\ue001"} if message["role"] in ("user", "tool") else message
            for k, message in enumerate(messages)
        ]
        chunks = self.expand(marked, tools) if expand else self.append(marked, tools)
        contexts = "".join(chunk.text for chunk in chunks if chunk.kind != ANSWER)
        for k, message in enumerate(messages):
            if message["role"] in ("user", "tool") and f"\ue000{k}\ue001" not in contexts:
                raise HistoryRewritten(
                    f"message {k + 1} ({message['role']}) does not come before the answer that follows it: the "
                    "template leaves it out, or draws it into a turn of the assistant. "
                    "Pass another with --chat-template FILE"
                )

    # -- where things are in a rendering ------------------------------------------------------------------------------

    def _opened(self, messages: Sequence[Message], tools: list[Any] | None) -> str | None:
        """The rendering with the generation prompt; None where a template cannot render what precedes an opening
        answer.
        """
        try:
            return self.template.render(messages, tools=tools, generation_prompt=True)
        except TemplateRefused:
            if messages:
                raise
            return None

    def _border(
        self,
        messages: Sequence[Message],
        k: int,
        tools: list[Any] | None,
        opened: str | None,
        answered: str,
        done: int = 0,
    ) -> int:
        """Where the context of answer k ends in `answered`, the rendering of messages[:k + 1], of which `done` is
        fed.
        """
        if opened and answered.startswith(opened):
            return len(opened)
        # The answer's own text may happen to begin like the generation prompt; a sentinel never does.
        sentinel = self.template.render([*messages[:k], {"role": "assistant", "content": SENTINEL}], tools=tools)
        if opened and k > 0:
            border = self.markers.common_prefix(opened, sentinel, answered)
            if border >= done:
                return border
        # The two part before this answer begins: it begins behind the last generation prompt before its text.
        before = sentinel[: sentinel.find(SENTINEL)]
        prompt = self.profile.generation_prompt
        at = before.rfind(prompt) if prompt else -1
        border = self.markers.common_prefix(before[: at + len(prompt)] if at >= 0 else before, answered)
        if border < done:
            raise HistoryRewritten(
                f"the template rewrites what precedes message {k + 1} when it is added; "
                "--history expand renders one document an answer instead"
            )
        return border

    def _answer_length(self, messages: Sequence[Message], tools: list[Any] | None, text: str) -> int:
        """How much of `text`, which begins with the newest answer and ends the rendering, is the answer's own."""
        close, end_of_turn = self.profile.close, self.profile.end_of_turn
        if text.endswith(close):
            return len(text) - len(close) + len(end_of_turn)
        at = text.rfind(end_of_turn) if end_of_turn else -1
        if at >= 0:
            return at + len(end_of_turn)
        end = self.markers.last_end(text)
        return end if end is not None else len(text.rstrip())

    def _resume(
        self,
        messages: Sequence[Message],
        last: int,
        count: int,
        tools: list[Any] | None,
        fed: str,
        done: int,
        text: str,
    ) -> int:
        """Where the answer `last`, fed as `fed[:done]`, ends in `text`, the rendering of messages[:count]."""
        if text.startswith(fed[:done]):
            return done
        place = self._place(messages[:count], last, tools, text)
        if place is None:
            raise HistoryRewritten(
                f"message {last + 1} cannot be found in the rendering that has message {count}; "
                "--history expand renders one document an answer instead"
            )
        return place[1]

    def _place(self, messages: Sequence[Message], j: int, tools: list[Any] | None, text: str) -> tuple[int, int] | None:
        """Start and end (through its end of turn) of answer j in `text`, the rendering of `messages`; None if
        dropped.
        """
        message = messages[j]
        calls = [call.get("function", call).get("name", "") for call in message.get("tool_calls", [])]
        found: tuple[int, int] | None = None
        bare, kept = {"role": "assistant", "content": SENTINEL}, {**message, "content": SENTINEL}
        for stripped in (kept, bare) if calls else (bare, kept):
            replaced = [*messages[:j], stripped, *messages[j + 1 :]]
            try:
                sentinel = self.template.render(replaced, tools=tools)
            except TemplateRefused:
                continue
            at = sentinel.find(SENTINEL)
            if at < 0:
                continue
            rest = sentinel[at + len(SENTINEL) :]
            start = at
            # Everything after the sentinel stands at the end of `text` too; everything before it at the beginning.
            after = _after_turn(rest, self, calls=bool(calls) and stripped is kept)
            if not (text.startswith(sentinel[:at]) and text.endswith(after)):
                continue
            place = start, len(text) - len(after)
            if all(name in text[place[0] : place[1]] for name in calls):
                return place
            found = found or place  # some templates write the calls before the content
        return found

    def _context(self, messages: Sequence[Message], tools: list[Any] | None, text: str, *, start: int) -> list[Chunk]:
        """A context as chunks: the document's first one is parted into prompt and query where a user's turn opens."""
        if not text:
            return []
        if start > 0:
            return [_query(text)]
        border = self._prompt_length(messages, tools, text)
        return [
            chunk
            for chunk in (Chunk(text=text[:border], kind=PROMPT), Chunk(text=text[border:], kind=QUERY))
            if chunk.text
        ]

    def _prompt_length(self, messages: Sequence[Message], tools: list[Any] | None, text: str) -> int:
        """How much of the first context is prompt: all before the first user's header, cut at a control token."""
        first = next((k for k, message in enumerate(messages) if message["role"] == "user"), None)
        if first is None or any(message["role"] == "assistant" for message in messages[:first]):
            header = text.rfind(self.profile.generation_prompt) if self.profile.generation_prompt else -1
            return self._snap(text, header) if header > 0 else 0
        replaced = [*messages[:first], {**messages[first], "content": SENTINEL}]
        try:
            at = self.template.render(replaced, tools=tools).find(SENTINEL)
        except TemplateRefused:
            return 0
        header = text[: max(at, 0)].rfind(self.profile.user_header) if self.profile.user_header else -1
        return self._snap(text, header) if header > 0 else 0

    def _snap(self, text: str, at: int) -> int:
        """The last place at or before `at` where a control token begins or ends, so that the cut is a token border."""
        borders = [0]
        for match in self.controls.pattern.finditer(text):
            borders += [match.start(), match.end()]
        return max(border for border in borders if border <= at)


def _query(text: str) -> Chunk:
    return Chunk(text=text, kind=QUERY)


def _after_turn(rest: str, renderer: Renderer, *, calls: bool) -> str:
    """What follows the end of a turn in `rest`, which begins right after an answer's text, before its `calls`."""
    end_of_turn = renderer.profile.end_of_turn
    if calls and end_of_turn and end_of_turn in rest:
        return rest[rest.index(end_of_turn) + len(end_of_turn) :]
    if rest.startswith(end_of_turn) and (end_of_turn or not renderer.profile.close):
        return rest[len(end_of_turn) :]
    end = renderer.markers.first_end(rest)
    return rest[end:] if end is not None else rest
