"""Law 7 on a rendering: every text of a context once, in its place, none of it in an answer, every answer whole.

Token ids may be right where spans are wrong, so no comparison of ids sees what this does. `tracing.py` says where the
texts stand; here is what must be so of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ismdata.rendering.chat_template import Message
from ismdata.rendering.refusals import CannotRender, HistoryRewritten, NotRendered, TextLost
from ismdata.rendering.tracing import Place, Traced


def check_context(messages: Sequence[Message], between: range, rendered: Traced, start: int, end: int) -> None:
    """Raise unless the texts of the messages `between` two answers stand in [start, end), each once, in order, and
    no other message's text does.
    """
    here = [place for place in rendered.places if start <= place.start < end and place.part != "name"]
    foreign = next((place for place in here if place.message not in between), None)
    if foreign is not None:
        raise HistoryRewritten(
            f"the template writes message {foreign.message + 1} ({messages[foreign.message]['role']}) anew when "
            f"message {between.stop + 1} is added; --history expand renders one document per answer instead"
        )
    _check_once(messages, rendered, here, between)
    numbers = [place.text for place in here]
    if numbers != sorted(numbers):
        raise HistoryRewritten("the template changes the order of messages before an answer")


def check_document(messages: Sequence[Message], rendered: Traced, context: Sequence[Place]) -> None:
    """Raise unless every text before the last answer, answers aside, stands in the context once; users' and tools'
    in order.
    """
    context = [place for place in context if place.part != "name"]
    said = {k for k, message in enumerate(messages) if message["role"] != "assistant"}
    answered = next((place for place in context if place.message not in said), None)
    if answered is not None:
        raise HistoryRewritten(
            f"message {answered.message + 1} (assistant) does not stand in a turn of its own. "
            "Pass another template with --chat-template FILE"
        )
    _check_once(messages, rendered, context, said)
    ordered = [place.text for place in context if messages[place.message]["role"] != "system"]
    if ordered != sorted(ordered):
        raise HistoryRewritten("the template changes the order of messages. Pass another with --chat-template FILE")


def _check_once(
    messages: Sequence[Message], rendered: Traced, places: Sequence[Place], wanted: Collection[int]
) -> None:
    """Raise unless every text of the `wanted` messages has one of these places, and no text has two."""
    absent = missing_texts(rendered, places, wanted)
    if absent:
        raise lost(messages, rendered, absent[0])
    numbers = [place.text for place in places]
    if len(set(numbers)) < len(numbers):
        raise _repeated(messages, rendered, numbers)


def check_calls(message: Message, k: int, rendered: Traced, border: int, end: int) -> None:
    """Raise NotRendered where an answer calls a tool and its text does not say so, once per call."""
    calls = [call.get("function", call).get("name", "") for call in message.get("tool_calls") or ()]
    if not calls:
        return
    at, around = border, []
    for place in rendered.of(k):
        around.append(rendered.text[at : place.start])
        at = place.end
    written = "\0".join([*around, rendered.text[at:end]])
    marked = [rendered.texts[place.text].text for place in rendered.of(k) if place.part == "name"]
    for name in dict.fromkeys(calls):
        if written.count(name) + marked.count(name) < calls.count(name):
            raise call_left_out(k, name)


def call_left_out(k: int, name: str) -> NotRendered:
    return NotRendered(
        f"message {k + 1} calls the tool {name!r}, and the template leaves this or another of its calls out. "
        "Pass a template that renders tool calls with --chat-template FILE"
    )


def missing_texts(rendered: Traced, places: Sequence[Place], messages: Collection[int]) -> list[int]:
    """The texts of these messages that have no place among `places`."""
    found = {place.text for place in places}
    return [number for number, text in enumerate(rendered.texts) if text.message in messages and number not in found]


def lost(messages: Sequence[Message], rendered: Traced, number: int) -> CannotRender:
    """Why a text is not where it should be."""
    text = rendered.texts[number]
    role = messages[text.message]["role"]
    if any(place.text == number for place in rendered.places):
        return HistoryRewritten(
            f"message {text.message + 1} ({role}) does not come directly before the answer that follows it: the "
            "template moves it, or draws it into another turn. --history expand renders one document per answer instead"
        )
    if text.part == "name":
        return call_left_out(text.message, text.text)
    if text.part == "call":
        return NotRendered(
            f"message {text.message + 1} calls a tool with {text.text!r}, which the template leaves out. "
            "Pass a template that renders tool calls with --chat-template FILE"
        )
    return TextLost(
        f"message {text.message + 1} ({role}) is not in the rendering, or not all of it: the template leaves it out. "
        "Pass another with --chat-template FILE"
    )


def _repeated(messages: Sequence[Message], rendered: Traced, numbers: Sequence[int]) -> CannotRender:
    twice = next(number for number in numbers if numbers.count(number) > 1)
    message = rendered.texts[twice].message
    return TextLost(f"the template writes message {message + 1} ({messages[message]['role']}) more than once")
