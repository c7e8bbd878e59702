"""Checks that a rendering conserves the conversation: each text of a context occurs once and in order, no text of a
context is inside an answer, and every answer is complete.

Token ids can be right where spans are wrong, so comparing ids does not find what these checks find. `tracing.py`
locates the texts; the functions here raise if one is not where it must be.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ismdata.rendering.chat_template import Message
from ismdata.rendering.refusals import CannotRender, HistoryRewritten, NotRendered, TextLost
from ismdata.rendering.tracing import Occurrence, Trace


def check_context(messages: Sequence[Message], between: range, trace: Trace, start: int, end: int) -> None:
    """Raise unless characters [start, end) contain each text of the messages `between` two answers once, in order, and
    no text of another message.
    """
    here = [one for one in trace.occurrences if start <= one.start < end and one.part != "name"]
    foreign = next((one for one in here if one.message not in between), None)
    if foreign is not None:
        raise HistoryRewritten(
            f"the template writes message {foreign.message + 1} ({messages[foreign.message]['role']}) again when "
            f"message {between.stop + 1} is added; --history expand renders one document per answer instead"
        )
    _check_once(messages, trace, here, between)
    numbers = [one.text for one in here]
    if numbers != sorted(numbers):
        raise HistoryRewritten("the template changes the order of messages before an answer")


def check_document(messages: Sequence[Message], trace: Trace, context: Sequence[Occurrence]) -> None:
    """Raise unless `context`, the occurrences outside answers, has every text before the last answer that is not an
    answer's once, and the users' and tools' texts in order.
    """
    context = [one for one in context if one.part != "name"]
    others = {k for k, message in enumerate(messages) if message["role"] != "assistant"}
    answer = next((one for one in context if one.message not in others), None)
    if answer is not None:
        raise HistoryRewritten(
            f"message {answer.message + 1} (assistant) is not in a turn of its own. "
            "Pass another template with --chat-template FILE"
        )
    _check_once(messages, trace, context, others)
    ordered = [one.text for one in context if messages[one.message]["role"] != "system"]
    if ordered != sorted(ordered):
        raise HistoryRewritten("the template changes the order of messages. Pass another with --chat-template FILE")


def _check_once(
    messages: Sequence[Message], trace: Trace, occurrences: Sequence[Occurrence], wanted: Collection[int]
) -> None:
    """Raise unless every text of the `wanted` messages has one of these occurrences, and no text has two."""
    absent = missing_texts(trace, occurrences, wanted)
    if absent:
        raise text_missing(messages, trace, absent[0])
    numbers = [one.text for one in occurrences]
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        message = trace.texts[twice].message
        raise TextLost(f"the template writes message {message + 1} ({messages[message]['role']}) more than once")


def check_calls(message: Message, k: int, trace: Trace, start: int, end: int) -> None:
    """Raise NotRendered if answer k, characters [start, end), does not name each of its tools once per call."""
    calls = [call.get("function", call).get("name", "") for call in message.get("tool_calls") or ()]
    if not calls:
        return
    at, around = start, []
    for one in trace.of_message(k):
        around.append(trace.text[at : one.start])
        at = one.end
    written = "\0".join([*around, trace.text[at:end]])
    located = [trace.texts[one.text].text for one in trace.of_message(k) if one.part == "name"]
    for name in dict.fromkeys(calls):
        if written.count(name) + located.count(name) < calls.count(name):
            raise call_missing(k, name)


def call_missing(k: int, name: str) -> NotRendered:
    """The refusal of answer k, whose call of this tool is not rendered."""
    return NotRendered(
        f"message {k + 1} calls the tool {name!r}, and the template leaves out this call or another of the message. "
        "Pass a template that renders tool calls with --chat-template FILE"
    )


def missing_texts(trace: Trace, occurrences: Sequence[Occurrence], messages: Collection[int]) -> list[int]:
    """The numbers of these messages' texts that have none of these occurrences."""
    found = {one.text for one in occurrences}
    return [number for number, text in enumerate(trace.texts) if text.message in messages and number not in found]


def text_missing(messages: Sequence[Message], trace: Trace, number: int) -> CannotRender:
    """The refusal of a conversation whose text `number` is not where it must be."""
    text = trace.texts[number]
    role = messages[text.message]["role"]
    if any(one.text == number for one in trace.occurrences):
        return HistoryRewritten(
            f"message {text.message + 1} ({role}) does not come directly before the answer that follows it: the "
            "template moves it or merges it into another turn. --history expand renders one document per answer instead"
        )
    if text.part == "name":
        return call_missing(text.message, text.text)
    if text.part == "call":
        return NotRendered(
            f"message {text.message + 1} calls a tool with {text.text!r}, which the template leaves out. "
            "Pass a template that renders tool calls with --chat-template FILE"
        )
    return TextLost(
        f"message {text.message + 1} ({role}) is missing from the rendering, in whole or in part: the template leaves "
        "it out. Pass another with --chat-template FILE"
    )
