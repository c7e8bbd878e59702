"""A conversation, rendered and cut into contexts and answers: the reference for everything faster.

Some templates rewrite earlier turns when a message is added. `--history` says what to do then. For templates whose
renderings only grow both give the same text, in one document or in one per answer.

- `append`: the tokens that a KV cache holds, which are never rewritten. The context of an answer is taken from the
  rendering that ends with the answer: the text between the end of the answer before it and its own beginning. The end
  of an answer comes from the rendering in which that answer is the last message, and does not change later.
- `expand`: one document per answer, exactly what the template renders for the conversation that ends with it.

`tracing.py` locates the texts, `answer_boundaries.py` the answers; `conservation.py` checks each conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ismdata.choices import History
from ismdata.masks import ANSWER, PROMPT, QUERY
from ismdata.rendering.answer_boundaries import AnswerBoundaries, AnswerRange, FedAnswer
from ismdata.rendering.chat_template import ChatTemplate, Message
from ismdata.rendering.conservation import check_calls, check_context, check_document, missing_texts, text_missing
from ismdata.rendering.control_tokens import ControlTokens
from ismdata.rendering.refusals import MOST_MESSAGES, HistoryRewritten, TooManyMessages
from ismdata.rendering.template_probe import TemplateProfile
from ismdata.rendering.tracing import ConversationTracer, Occurrence, Trace, reasoning_length


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of rendered text that becomes one span.

    Attributes:
        text: The text, still escaped.
        kind: PROMPT, QUERY or ANSWER.
        message: For an answer, the number of its message; -1 for context.
        reasoning: How many characters at the beginning of an answer are reasoning, its closing marker included.
        unwritten: The template leaves out reasoning of this answer.
    """

    text: str
    kind: int
    message: int = -1
    reasoning: int = 0
    unwritten: bool = False


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Cuts conversations under a probed template.

    Attributes:
        tracer: Renders conversations under the template and locates their texts.
        profile: What probing found about the template.
        controls: The tokenizer's control tokens.
        markers: The same, and the template's markers that are no tokens.
    """

    tracer: ConversationTracer
    profile: TemplateProfile
    controls: ControlTokens
    markers: ControlTokens

    @property
    def template(self) -> ChatTemplate:
        """The template, with all that its rendering depends on."""
        return self.tracer.template

    def cut(self, messages: Sequence[Message], tools: list[Any] | None, history: History) -> list[Chunk]:
        """The chunks of one document, by `append` or `expand`. Raises CannotRender."""
        if len(messages) > MOST_MESSAGES:
            raise TooManyMessages(len(messages))
        return self.append(messages, tools) if history == "append" else self.expand(messages, tools)

    def append(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[Chunk]:
        """The chunks of a conversation whose fed text is never rewritten. Raises CannotRender."""
        chunks: list[Chunk] = []
        last: FedAnswer | None = None
        trace: Trace | None = None
        done = 0
        for k in _answers(messages):
            trace = self.tracer.trace(messages[: k + 1], tools)
            done = self._resume(messages, last, trace, chunks)
            answer = self._boundaries.newest(messages, k, tools, trace, done)
            check_context(messages, range(0 if last is None else last.message + 1, k), trace, done, answer.start)
            chunks += self._context(messages, trace, done, answer.start)
            chunks.append(self._answer(messages, k, trace, answer))
            done = answer.end
            last = FedAnswer(k, answer.header, trace.text[answer.text_end : done])
        if last is None or last.message < len(messages) - 1:
            trace = self.tracer.trace(messages, tools)
            done = self._resume(messages, last, trace, chunks)
        assert trace is not None
        return [*chunks, *self._context(messages, trace, done, len(trace.text))]

    def _resume(self, messages: Sequence[Message], last: FedAnswer | None, trace: Trace, chunks: list[Chunk]) -> int:
        """Where the last answer ends in a longer rendering; an end that only this rendering has is added to it."""
        if last is None:
            return 0
        done, end = self._boundaries.resume(messages, last, trace)
        if end:
            chunks[-1] = replace(chunks[-1], text=chunks[-1].text + end)
        return done

    def expand(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[Chunk]:
        """The chunks of one document that ends with an answer, exactly as the template renders it.

        Earlier answers are answer chunks too, wherever the rendering still has them. Raises CannotRender.
        """
        k = len(messages) - 1
        trace = self.tracer.trace(messages, tools)
        answer = self._boundaries.newest(messages, k, tools, trace, 0)
        border = answer.start
        earlier = [
            found
            for j in _answers(messages[:k])
            if (found := self._boundaries.in_history(trace, j, border, answer.header))
        ]
        context = [one for one in trace.occurrences if not any(a <= one.start < b for _, a, b in earlier)]
        check_document(messages, trace, [one for one in context if one.end <= border])
        chunks: list[Chunk] = []
        done = 0
        for j, start, end in sorted(earlier, key=lambda found: found[1]):
            start = max(start, done)  # without a header the answer begins where the one before it is closed
            chunks += self._context(messages, trace, done, start)
            chunks.append(Chunk(text=trace.text[start:end], kind=ANSWER, message=j))
            done = end
        chunks += self._context(messages, trace, done, border)
        chunks.append(self._answer(messages, k, trace, answer))
        return [*chunks, *self._context(messages, trace, answer.end, len(trace.text))]

    def next_context(self, messages: Sequence[Message], tools: list[Any] | None = None) -> tuple[str, str, str]:
        """The text to feed before the model answers `messages`, if all up to the last answer's text has been fed.

        Returns:
            The end of the last answer as `pack` has it ("" if there is none); the part of it that only the next message
            brings (`TemplateProfile.next_turn_ends`); the context.

        Raises:
            CannotRender: If the template refuses or rewrites the conversation.
        """
        k = len(messages)
        answered: list[Message] = [*messages, {"role": "assistant", "content": self.tracer.any_answer(k)}]
        last = max(_answers(messages), default=-1)
        tail = end = ""
        done = 0
        trace = self.tracer.trace(answered, tools)
        if last >= 0:
            alone = self.tracer.trace(messages[: last + 1], tools)
            newest = self._boundaries.newest(messages, last, tools, alone, 0)
            tail = alone.text[newest.text_end : newest.end]
            done, end = self._boundaries.resume(answered, FedAnswer(last, newest.header, tail), trace)
        border = self._boundaries.newest(answered, k, tools, trace, done).start
        check_context(answered, range(last + 1, k), trace, done, border)
        return tail + end, end, trace.text[done:border]

    @cached_property
    def _boundaries(self) -> AnswerBoundaries:
        return AnswerBoundaries(self.profile, self.markers, self.tracer)

    # -- chunks -------------------------------------------------------------------------------------------------------

    def _answer(self, messages: Sequence[Message], k: int, trace: Trace, answer: AnswerRange) -> Chunk:
        """Answer k as a chunk that has all its text. Raises TextLost, NotRendered, HistoryRewritten."""
        own, border, end = trace.of_message(k), answer.start, answer.end
        lead = trace.text[border : answer.text_start]
        prompt, user = self.profile.generation_prompt.strip(), self.profile.user_header.strip()
        for opener in {prompt, "" if user in prompt else user}:  # a marker that all headers have says nothing
            if self.markers.pattern.search(opener) is not None and opener in lead:
                raise HistoryRewritten(
                    f"message {k + 1} (assistant): the header of another turn, {opener!r}, comes before its text. "
                    "Pass another template with --chat-template FILE"
                )
        if answer.text_end > end or answer.text_start < border:
            raise HistoryRewritten(f"message {k + 1} (assistant): a part of it is outside its turn")
        missing = missing_texts(trace, own, {k})
        required = [number for number in missing if trace.texts[number].part != "reasoning"]
        if required:
            raise text_missing(messages, trace, required[0])
        check_calls(messages[k], k, trace, border, end)
        return Chunk(
            text=trace.text[border:end],
            kind=ANSWER,
            message=k,
            reasoning=_reasoning_in(trace, own, border),
            unwritten=bool(missing),
        )

    def _context(self, messages: Sequence[Message], trace: Trace, start: int, end: int) -> list[Chunk]:
        """A context as chunks: the document's first one is cut into prompt and query where a user's turn opens."""
        text = trace.text[start:end]
        border = self._prompt_length(messages, trace, text) if start == 0 else 0
        chunks = Chunk(text=text[:border], kind=PROMPT), Chunk(text=text[border:], kind=QUERY)
        return [chunk for chunk in chunks if chunk.text]

    def _prompt_length(self, messages: Sequence[Message], trace: Trace, text: str) -> int:
        """How much of the first context is prompt: all before the first user's header, cut at a control token."""
        first = next((k for k, message in enumerate(messages) if message["role"] in ("user", "assistant")), None)
        if first is None or messages[first]["role"] == "assistant":
            header = text.rfind(self.profile.generation_prompt) if self.profile.generation_prompt else -1
            return self._snap(text, header) if header > 0 else 0
        at = next((one.start for one in trace.occurrences if one.message == first), None)
        if at is None:  # the message has no text: find where it would be
            message = {**messages[first], "content": self.tracer.any_answer(first)}
            filled = self.tracer.trace_template([*messages[:first], message], None, "whole")
            own = filled.of_message(first) if filled is not None else []
            at = own[0].start if filled and own and text.startswith(filled.text[: own[0].start]) else 0
        header = text[:at].rfind(self.profile.user_header) if self.profile.user_header else -1
        return self._snap(text, header) if header > 0 else 0

    def _snap(self, text: str, at: int) -> int:
        """The last position up to `at` where a control token begins or ends, so that no token is cut."""
        borders = [0]
        for match in self.controls.pattern.finditer(text):
            borders += [match.start(), match.end()]
        return max(border for border in borders if border <= at)


def _answers(messages: Sequence[Message]) -> list[int]:
    return [k for k, message in enumerate(messages) if message["role"] == "assistant"]


def _reasoning_in(trace: Trace, own: Sequence[Occurrence], border: int) -> int:
    """How many characters from `border` are an answer's reasoning, with its closing marker and the blanks after it."""
    text_start = next((one.start for one in own if one.part != "reasoning"), None)
    if text_start is None:
        return 0
    first = own[0]
    if first.part == "reasoning":
        return text_start - border
    if first.part != "content":
        return 0
    text = trace.text[first.start : first.end]
    length = reasoning_length(text)
    rest = text[length:]
    return first.start - border + length + len(rest) - len(rest.lstrip()) if length else 0
