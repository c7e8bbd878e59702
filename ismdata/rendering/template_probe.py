"""What a chat template writes around messages, found by rendering a few conversations.

Other modules need the generation prompt, what ends an answer, what opens a user's turn, in which form the template
reads tool calls, and whether it is prefix-stable: the rendering of messages[:k] with the generation prompt is a prefix
of the rendering of messages[:k + 1], and that is a prefix of all longer ones.

What ends an answer is read in two places: at the end of a conversation, and in history. They may differ:

| end of a conversation | history | example | the answer ends with |
|---|---|---|---|
| a token | the same | ChatML | that token |
| a token | another | GPT-OSS | the token of the end; the one of history is context |
| a token | nothing | eos after the last turn only | that token if the answer is last; in history its text ends it |
| nothing | a token | vLLM's ChatML | the token of history, if a message follows |
| nothing | the next turn's header | GLM-4.6 | the header's first token, if a message follows |

The last row is a decision: the model must write that token to stop, and nothing else in such a template trains it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ismdata.errors import DataError
from ismdata.rendering.chat_template import CallContent, ChatTemplate, Message
from ismdata.rendering.control_tokens import ControlTokens, common_prefix_length
from ismdata.rendering.refusals import TemplateRefused
from ismdata.rendering.tracing import Trace, Tracer

#: The contents of the probes. The private-use characters around them distinguish them from the template's own text.
_QUESTION, _ANSWER, _SECOND_QUESTION, _SECOND_ANSWER = (
    f"\ue000{name}\ue001" for name in ("QUESTION", "ANSWER", "SECOND QUESTION", "SECOND ANSWER")
)
_USER: Message = {"role": "user", "content": _QUESTION}
_REPLY: Message = {"role": "assistant", "content": _ANSWER}
_USER_AGAIN: Message = {"role": "user", "content": _SECOND_QUESTION}
_REPLY_AGAIN: Message = {"role": "assistant", "content": _SECOND_ANSWER}
_VALUE = "\ue000VALUE\ue001"
_RESULT: Message = {"role": "tool", "tool_call_id": "call00001", "name": "tool", "content": _SECOND_QUESTION}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "tool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
    },
}


def _calling(content: str | None) -> Message:
    """An answer that calls the tool of the probes."""
    function = {"name": "tool", "arguments": {"key": _VALUE}}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }


@dataclass(frozen=True, kw_only=True)
class TemplateProfile:
    """What probing found about a template.

    Attributes:
        generation_prompt: The text that opens an answer.
        end_of_turn: The text that ends an answer at the end of a conversation, as far as the model writes it.
        history_end: The text that ends an answer in history.
        next_turn_ends: If nothing ends an answer at the end of a conversation: what may end it in history.
        user_header: The text that opens a later user turn.
        prefix_stable: See the module's docstring.
        difference: An example of an unstable prefix, (fed, rewritten); None if the template is prefix-stable.
    """

    generation_prompt: str
    end_of_turn: str
    history_end: str
    next_turn_ends: tuple[str, ...]
    user_header: str
    prefix_stable: bool
    difference: tuple[str, str] | None


def probe_template(template: ChatTemplate, markers: ControlTokens) -> tuple[ChatTemplate, TemplateProfile]:
    """Probe a template.

    Args:
        template: The template.
        markers: The tokenizer's control tokens, and the template's markers that are no tokens.

    Returns:
        The template, with the form set in which it reads messages, and what was found.

    Raises:
        DataError: If the template does not render even one question and one answer, or takes powers.
    """
    _refuse_powers(template)
    # Some templates render nothing without tools.
    tools = [_TOOL] if _rendered(template, [_USER]) is None and _rendered(template, [_USER], [_TOOL]) else None
    try:
        alone = template.render([_USER], tools=tools)
        if _QUESTION not in alone:
            template = replace(template, typed_content=True)
            alone = template.render([_USER], tools=tools)
        opened = template.render([_USER], tools=tools, generation_prompt=True)
        answered = template.render([_USER, _REPLY], tools=tools)
    except TemplateRefused as refusal:
        raise DataError(
            f"chat template {template.name}: refuses one user message and one answer ({refusal}). "
            "Pass another with --chat-template FILE"
        ) from refusal
    if _QUESTION not in alone or _ANSWER not in answered:
        raise DataError(
            f"chat template {template.name}: its rendering does not contain the texts of user and assistant; "
            f"rendered {answered[:200]!r}. Pass another with --chat-template FILE"
        )
    template = _with_call_format(template)
    prompt = opened[markers.common_prefix(alone, opened) :]
    difference = _first_difference(template, tools)
    endings = _find_endings(template, answered, prompt, markers, tools)
    return template, TemplateProfile(
        generation_prompt=prompt,
        end_of_turn=endings.end_of_turn,
        history_end=endings.history_end,
        next_turn_ends=endings.next_turn_ends,
        user_header=endings.user_header,
        prefix_stable=difference is None,
        difference=difference,
    )


def _refuse_powers(template: ChatTemplate) -> None:
    """Raise DataError if a template uses `**`: evaluating `9**9**9` blocks in C, where no time limit can interrupt it.

    This only reads the template's tokens; it neither compiles nor runs it.
    """
    before = ""
    try:
        for line, kind, word in ImmutableSandboxedEnvironment().lex(template.source):
            if kind == "whitespace":
                continue
            if kind == "operator" and word == "**" and before not in ("(", ","):  # after those it is **kwargs
                raise DataError(
                    f"chat template {template.name}: line {line} takes a power (**); expected a template that only "
                    "formats messages. Pass another with --chat-template FILE"
                )
            before = word
    except TemplateSyntaxError:
        return  # rendering reports it, in transformers' words


# -- the form in which the template reads messages ---------------------------------------------------------------------


def _with_call_format(template: ChatTemplate) -> ChatTemplate:
    """The template, with the form of arguments and of empty contents that it needs in messages with tool calls."""

    def accepts(shaped: ChatTemplate, content: str | None, *later: Message) -> bool:
        messages = [_USER, _calling(content), *later]
        text = _rendered(shaped, messages, [_TOOL])
        if text is None:
            text = _rendered(shaped, messages)
        with_text = [{**message, "content": message["content"] or "x"} for message in messages]
        other = _rendered(shaped, with_text, [_TOOL]) or _rendered(shaped, with_text) or ""
        return text is not None and text.count(_VALUE) == 1 and _count_nulls(text) <= _count_nulls(other)

    for text_arguments in (False, True):
        shaped = replace(template, text_arguments=text_arguments)
        null, empty = accepts(shaped, None), accepts(shaped, "")
        if null and empty:  # history may differ
            in_history = [accepts(shaped, content, _RESULT, _REPLY) for content in (None, "")]
            null, empty = in_history if any(in_history) else (null, empty)
        if null or empty:
            content: CallContent = "as_is" if null and empty else "null" if null else "empty"
            return replace(shaped, call_content=content)
    for text_arguments in (False, True):  # the call is left out, but the conversation is accepted
        shaped = replace(template, text_arguments=text_arguments)
        as_null, as_empty = (_rendered(shaped, [_USER, _calling(content)]) for content in (None, ""))
        if as_null is not None and (as_empty is None or _count_nulls(as_null) <= _count_nulls(as_empty)):
            return shaped
        if as_empty is not None:
            return replace(shaped, call_content="empty")
    return template


def _count_nulls(text: str) -> int:
    """How often a text contains None or null, which templates write that do not check for a missing content."""
    return text.count("None") + text.count("null")


def _rendered(template: ChatTemplate, messages: list[Message], tools: list[Any] | None = None) -> str | None:
    try:
        return template.render(messages, tools=tools)
    except TemplateRefused:
        return None


# -- what ends an answer -----------------------------------------------------------------------------------------------


class _Endings(NamedTuple):
    """The fields of the profile of the same names."""

    end_of_turn: str
    history_end: str
    next_turn_ends: tuple[str, ...] = ()
    user_header: str = ""


def _find_endings(
    template: ChatTemplate, answered: str, prompt: str, markers: ControlTokens, tools: list[Any] | None
) -> _Endings:
    """Find what ends an answer and what opens a user's turn."""
    close = answered[answered.index(_ANSWER) + len(_ANSWER) :]
    text = _rendered(template, [_USER, _REPLY, _USER_AGAIN], tools)
    if text is None or not all(content in text for content in (_QUESTION, _ANSWER, _SECOND_QUESTION)):
        # This template accepts one exchange only.
        end = _through_controls(close, markers, openers=frozenset()) or close.rstrip()
        return _Endings(end, end)
    opening = text[: text.index(_QUESTION)]
    later = text[text.index(_ANSWER) + len(_ANSWER) : text.index(_SECOND_QUESTION)]
    openers = _openers(text, opening, markers)
    shared = close[: markers.common_prefix(close, later)]
    end = in_history = _through_controls(shared, markers, openers)
    if not end:
        end = _through_controls(close, markers, openers)
        in_history = _end_in_history(text, opening, later, prompt, markers)
        if not end and markers.pattern.search(later) is None:  # the template has no markers
            end = in_history = shared.rstrip()
    ends: tuple[str, ...] = ()
    if not end:
        found = (in_history or _leading_control(later, markers), _control_before_result(template, markers))
        ends = tuple(dict.fromkeys(token for token in found if token))
    return _Endings(end, in_history, ends, _user_header(opening, later[len(in_history) :], markers))


def _openers(text: str, opening: str, markers: ControlTokens) -> frozenset[str]:
    """What opens a turn: the first control token of a rendering that occurs more than once (unlike bos)."""
    found = (match[0] for match in markers.pattern.finditer(opening) if text.count(match[0]) > 1)
    first = next(found, None)
    return frozenset() if first is None else frozenset([first])


def _through_controls(text: str, markers: ControlTokens, openers: frozenset[str]) -> str:
    """`text` up to its first control token and those directly after it that open no turn, included; "" without any."""
    end = markers.first_end(text)
    if end is None:
        return ""
    while (match := markers.pattern.match(text, end)) is not None and match[0] not in openers:
        end = match.end()
    return text[:end]


def _end_in_history(text: str, opening: str, later: str, prompt: str, markers: ControlTokens) -> str:
    """What ends an answer in history, if that differs from the end of a conversation; "" if nothing does.

    It is what closes a user's turn, if that follows the answer too, or a token before the header of a user's turn.
    """
    question_end = text.index(_QUESTION) + len(_QUESTION)
    of_user = text[question_end : text.index(_ANSWER)].removesuffix(prompt)
    closing = of_user[: markers.first_end(of_user) or 0]
    if closing and later.startswith(closing):
        return closing
    before_header = later[: len(later) - _common_suffix_length(opening, later)]
    return before_header[: markers.first_end(before_header) or 0]


def _leading_control(text: str, markers: ControlTokens) -> str:
    """The control token that `text` begins with, blanks before it included; "" if it begins with something else."""
    match = markers.pattern.search(text)
    return text[: match.end()] if match is not None and not text[: match.start()].strip() else ""


def _control_before_result(template: ChatTemplate, markers: ControlTokens) -> str:
    """The control token that ends an answer with a tool call, if the tool's result follows."""
    tracer = Tracer(template)
    renderings: list[Trace] = []
    for messages in ([_USER, _calling("")], [_USER, _calling(""), _RESULT]):
        found = tracer.trace_template(messages, [_TOOL], "whole") or tracer.trace_template(messages, None, "whole")
        if found is None or not found.of_message(1):
            return ""
        renderings.append(found)
    at_end, in_history = (found.text_after(1, found.of_message(1)[-1].end) for found in renderings)
    shared = markers.common_prefix(at_end, in_history)
    return _leading_control(in_history[shared:], markers)


def _common_suffix_length(first: str, second: str) -> int:
    return common_prefix_length(first[::-1], second[::-1])


def _user_header(opening: str, later: str, markers: ControlTokens) -> str:
    """What a template writes before a user's text in every turn, from its first control token on."""
    header = opening[len(opening) - _common_suffix_length(opening, later) :]
    match = markers.pattern.search(header)
    return header[match.start() :] if match else header


def _first_difference(template: ChatTemplate, tools: list[Any] | None) -> tuple[str, str] | None:
    """Where a longer rendering does not begin with a shorter one: the rest of each from there; None if stable."""
    messages = [_USER, _REPLY, _USER_AGAIN, _REPLY_AGAIN]
    previous = ""
    for k in range(1, len(messages) + 1):
        renders = []
        try:
            if messages[k - 1]["role"] == "assistant":
                renders.append(template.render(messages[: k - 1], tools=tools, generation_prompt=True))
            renders.append(template.render(messages[:k], tools=tools))
        except TemplateRefused:
            return None
        for text in renders:
            if not text.startswith(previous):
                at = common_prefix_length(previous, text)
                return _without_delimiters(previous[at:]), _without_delimiters(text[at:])
            previous = text
    return None


def _without_delimiters(text: str) -> str:
    return text.replace("\ue000", "").replace("\ue001", "")
