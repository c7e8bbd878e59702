"""Where an answer begins and ends in a rendering.

An answer begins after all text of its context and after the header that opens it, whatever is written for the answer
itself: where the rendering with the generation prompt and the rendering with an answer of plain text diverge, but not
inside the header. So `pack`, which knows the answer, and chat, which does not, cut at the same position.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from ismdata.rendering.chat_template import Message
from ismdata.rendering.conservation import call_missing
from ismdata.rendering.control_tokens import ControlTokens, common_prefix_length
from ismdata.rendering.refusals import HistoryRewritten, NotRendered
from ismdata.rendering.template_probe import TemplateProfile
from ismdata.rendering.tracing import REASONING_START, ConversationTracer, Level, Trace, reasoning_length


class AnswerRange(NamedTuple):
    """The newest answer in a rendering: characters `start` to `end`, its own text `text_start` to `text_end`.

    header: what opens the answer, between the last text before it and `start`, as it is for an answer of plain text.
    """

    header: str
    start: int
    text_start: int
    text_end: int
    end: int


class FedAnswer(NamedTuple):
    """An answer that was fed to the model: its message, its header, and what was fed after its text."""

    message: int
    header: str
    tail: str


class AnswerBoundaries:
    """Finds answers in the renderings of one template.

    Args:
        profile: What probing found about the template.
        markers: The control tokens, and the template's markers that are no tokens.
        tracer: Renders the conversations of which headers are read.
    """

    def __init__(self, profile: TemplateProfile, markers: ControlTokens, tracer: ConversationTracer) -> None:
        self._profile = profile
        self._markers = markers
        self._tracer = tracer
        self._headers: dict[Hashable, str] = {}

    def newest(
        self, messages: Sequence[Message], k: int, tools: list[Any] | None, trace: Trace, done: int
    ) -> AnswerRange:
        """Find answer k in `trace`, which ends with it and whose first `done` characters are cut already.

        Raises NotRendered, HistoryRewritten.
        """
        own = trace.of_message(k)
        if not own and any(text.message == k for text in trace.texts):
            for call in messages[k].get("tool_calls") or ():
                raise call_missing(k, call.get("function", call).get("name", ""))
            raise NotRendered(
                f"message {k + 1} (assistant) is not in the rendering: the template leaves it out. "
                "Pass another with --chat-template FILE"
            )
        at = trace.end_before(k)
        header = self._header(messages, k, tools, trace)
        lead_in = trace.text[at : own[0].start if own else len(trace.text)]
        length = len(header)
        if not lead_in.startswith(header):  # this answer has another header, or none
            prompt = self._profile.generation_prompt
            length = self._markers.common_prefix(lead_in, header)
            length = max(length, self._prompt_end(lead_in, prompt) if prompt else 0)
        start = max(at + length, done)
        text_start, text_end = (own[0].start, own[-1].end) if own else (start, start)
        if own and at > text_start:
            last = next(one for one in trace.occurrences if one.message < k and one.end == at)
            raise HistoryRewritten(
                f"message {last.message + 1} ({messages[last.message]['role']}) is written after the answer that "
                f"follows it, message {k + 1}. Pass another template with --chat-template FILE"
            )
        end = self._end(trace, text_end)
        return AnswerRange(header=header, start=start, text_start=text_start, text_end=text_end, end=end)

    def in_history(self, trace: Trace, j: int, border: int, header: str) -> tuple[int, int, int] | None:
        """(j, start, end) of answer j before `border` in a document of `expand`; None if the template dropped it."""
        own = trace.of_message(j)
        if not own or own[-1].end > border:
            return None
        first, at = own[0].start, own[-1].end
        before = max((one.end for one in trace.occurrences if one.start < first), default=0)
        lead_in = trace.text[before:first]
        length = len(header) if lead_in.startswith(header) else self._header_length(lead_in, "")
        closing = self._closing_length(trace.text_after(j, at), self._profile.history_end)
        return j, before + length, min(at + (closing or 0), border)

    def resume(self, messages: Sequence[Message], last: FedAnswer, trace: Trace) -> tuple[int, str]:
        """Where an answer that was fed ends in a longer rendering, and the end of the answer that was not fed yet.

        Raises HistoryRewritten.
        """
        own = trace.of_message(last.message)
        silent_at = trace.end_before(last.message)
        if own:
            at = own[-1].end
        elif trace.text.startswith(last.header, silent_at) and all(
            text.message != last.message or text.part == "reasoning" for text in trace.texts
        ):
            at = silent_at + len(last.header)
        else:
            raise HistoryRewritten(
                f"message {last.message + 1} (assistant) is no longer in the rendering once message "
                f"{last.message + 2} is added; --history expand renders one document per answer instead"
            )
        between = trace.text_after(last.message, at)
        length = self._closing_length(between, last.tail)
        if length is None:
            raise HistoryRewritten(
                f"message {last.message + 1} (assistant) was fed with its end, and the template writes message "
                f"{last.message + 2} before that end; --history expand renders one document per answer instead"
            )
        end = ""
        if not self._profile.end_of_turn:
            match = self._markers.pattern.search(between, length)
            if match is not None and between[length : match.end()] in self._profile.next_turn_ends:
                end = between[length : match.end()]
        return at + length + len(end), end

    # -- the header, which opens an answer ---------------------------------------------------------------------------

    def _header(self, messages: Sequence[Message], k: int, tools: list[Any] | None, trace: Trace) -> str:
        """The header of answer k, cached where it does not depend on what the messages say."""
        plain = trace if trace.of_message(k) and _is_plain(messages[k]) else None
        key = self._tracer.header_key(messages, k) if tools is None and trace.level == "whole" else None
        if key is None:
            return self._find_header(messages[:k], tools, trace.level, plain)
        if key not in self._headers:
            self._headers[key] = self._find_header(messages[:k], None, "whole", plain)
        return self._headers[key]

    def _find_header(
        self, context: Sequence[Message], tools: list[Any] | None, level: Level, plain: Trace | None
    ) -> str:
        """What the template writes between the last text of the context and the text that the model writes.

        plain: the rendering with an answer of plain text, if there is one already.
        """
        k = len(context)
        opened = self._tracer.trace_template(context, tools, level, generation_prompt=True) if context else None
        if plain is None or not plain.level == level == "whole":  # in `words` an answer's own markup is not replaced
            any_answer = {"role": "assistant", "content": self._tracer.any_answer(k)}
            plain = self._tracer.trace_template([*context, any_answer], tools, level)
        prompt = "" if opened is None else opened.text[opened.end_before(k) :]
        if plain is None or not plain.of_message(k):
            return prompt
        lead_in = plain.text[plain.end_before(k) : plain.of_message(k)[0].start]
        return lead_in[: self._header_length(lead_in, prompt)]

    def _header_length(self, lead_in: str, opened: str) -> int:
        """How much of `lead_in`, the text before an answer's own text, is header or precedes it.

        opened: the same part of the rendering with the generation prompt. The two may diverge inside the header.
        """
        prompt = self._profile.generation_prompt
        length = common_prefix_length(lead_in, opened)
        if length < len(opened):
            length = self._markers.common_prefix(lead_in, opened)
        if prompt:
            length = max(length, self._prompt_end(lead_in, prompt))
            if length:
                return length
        # Without a generation prompt, everything before the answer's own text opens it, except reasoning.
        opens = REASONING_START.search(lead_in, length)
        rest = lead_in[: opens.start() if opens else len(lead_in)]
        # A blank before a document's first answer is context: a document's first token is never a target.
        return max(length, len(rest.rstrip(" ") if opened or rest.strip() else rest))

    def _prompt_end(self, lead_in: str, prompt: str) -> int:
        """Where the last generation prompt in `lead_in` ends, or the part of one that has its last control token."""
        at = lead_in.rfind(prompt)
        if at >= 0:
            return at + len(prompt)
        own = {match[0] for match in self._markers.pattern.finditer(prompt) if not self._is_markup(match[0])}
        found = [match for match in self._markers.pattern.finditer(lead_in) if match[0] in own]
        if not found:
            return 0
        rest = prompt[prompt.rindex(found[-1][0]) + len(found[-1][0]) :]
        return found[-1].end() + self._markers.common_prefix(lead_in[found[-1].end() :], rest)

    def _is_markup(self, marker: str) -> bool:
        """Whether a marker is one of a pair such as `<think>` and `</think>`, which the model writes."""
        name = marker.strip("<>/")
        return marker == f"<{name}>" and f"</{name}>" in self._markers.tokens

    # -- the end of an answer -----------------------------------------------------------------------------------------

    def _end(self, trace: Trace, at: int) -> int:
        """Where the last answer of a rendering ends, whose text ends `at`."""
        tail, end = trace.text[at:], self._profile.end_of_turn
        found = tail.find(end) if end else -1
        if found >= 0:
            return at + found + len(end)
        last = self._markers.last_end(tail) if end else None
        return at + (last if last is not None else len(tail.rstrip()))

    def _closing_length(self, between: str, tail: str) -> int | None:
        """How much of `between`, which follows an answer's text in history, closes the answer.

        Returns None if nothing does, although the template closes answers.
        """
        if between.startswith(tail):
            return len(tail)
        # If one rendering was traced by `words` and one `whole`, the text's last punctuation is in one of the tails.
        for skipped in range(self._loose(tail) + 1):
            found = between.find(tail[skipped:]) if tail[skipped:] else -1
            if 0 <= found <= self._loose(between):
                return found + len(tail) - skipped
        for end in (self._profile.end_of_turn, self._profile.history_end):
            found = between.find(end) if end else -1
            if found >= 0:
                return found + len(end)
        return None if self._profile.history_end else self._markers.common_prefix(between, tail)

    def _loose(self, text: str) -> int:
        """How many characters of `text` come before its first word or marker."""
        word, marker = re.search(r"\w", text), self._markers.pattern.search(text)
        return min(found.start() for found in (word, marker) if found) if word or marker else len(text)


def _is_plain(message: Message) -> bool:
    """Whether an answer is text alone and begins with it."""
    content = message.get("content") or ""
    extra = message.get("tool_calls") or message.get("reasoning_content") or message.get("name")
    return bool(content.strip()) and not extra and content == content.lstrip() and not reasoning_length(content)
