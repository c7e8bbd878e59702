"""What a chat template writes around messages, found by rendering a few conversations made for it.

The rest of the pipeline needs the generation prompt, what ends an answer, what opens a user's turn, in which shape the
template reads tool calls, and whether it is prefix-stable (rendering messages[:k] with the generation
prompt is a prefix of rendering messages[:k + 1], which is a prefix of everything longer).

What ends an answer is read off two places: the end of a conversation, and history. They may differ:

| end of a conversation | history | example | the answer ends with |
|---|---|---|---|
| a token | the same | ChatML | that token |
| a token | another | GPT-OSS | the token of the end; history's own is passed over |
| a token | nothing | eos after the last turn only | that token at the end, its text in history |
| nothing | a token | vLLM's ChatML | history's token, where a message follows |
| nothing | the next turn's header | GLM-4.6 | the header's first token, where a message follows |

The last one is a choice: the model must write that token to stop, and nothing else in such a template teaches it to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ismdata.errors import DataError
from ismdata.rendering.chat_template import CallContent, ChatTemplate, Message
from ismdata.rendering.control_tokens import ControlTokens, common_prefix_length
from ismdata.rendering.refusals import TemplateRefused
from ismdata.rendering.tracing import Trace, Tracer

#: Contents while probing; the private-use characters around them keep them apart from the template's own text.
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


def calling(content: str | None) -> Message:
    """An answer that calls the probe's tool."""
    function = {"name": "tool", "arguments": {"key": _VALUE}}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }


@dataclass(frozen=True, kw_only=True)
class TemplateProfile:
    """What probing a template found.

    generation_prompt: the text that opens an answer. end_of_turn: what ends an answer at the end of a conversation, as
    far as the model writes it; history_end: the same in history. next_turn_ends: where nothing ends it at the end of a
    conversation, what may end it in history. user_header: what opens a later user turn. prefix_stable: see the module's
    text; `difference` shows one place where it is not, as (fed, rewritten).
    """

    generation_prompt: str
    end_of_turn: str
    history_end: str
    next_turn_ends: tuple[str, ...]
    user_header: str
    prefix_stable: bool
    difference: tuple[str, str] | None


def profile(template: ChatTemplate, markers: ControlTokens) -> tuple[ChatTemplate, TemplateProfile]:
    """Probe a template; returns it with the shape set in which it reads messages. Raises DataError.

    A template that does not even render one user's question and one answer cannot be used at all. `markers` are the
    tokenizer's control tokens and the template's own markers.
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
            f"chat template {template.name}: its rendering does not contain what user and assistant said; "
            f"rendered {answered[:200]!r}. Pass another with --chat-template FILE"
        )
    template = _shape_of_calls(template)
    prompt = opened[markers.common_prefix(alone, opened) :]
    difference = _first_difference(template, tools)
    return template, TemplateProfile(
        generation_prompt=prompt,
        **_endings(template, answered, prompt, markers, tools),
        prefix_stable=difference is None,
        difference=difference,
    )


def _refuse_powers(template: ChatTemplate) -> None:
    """Raise DataError where a template takes powers: `9**9**9` is one step for ever, which no time limit reaches.

    Only the template's words are looked at; it is neither compiled nor run.
    """
    before = ""
    try:
        for line, kind, word in ImmutableSandboxedEnvironment().lex(template.source):
            if kind == "whitespace":
                continue
            if kind == "operator" and word == "**" and before not in ("(", ","):  # behind those it is **kwargs
                raise DataError(
                    f"chat template {template.name}: line {line} takes a power (**); expected plain text layout. "
                    "Pass another with --chat-template FILE"
                )
            before = word
    except TemplateSyntaxError:
        return  # rendering says what is wrong, as transformers words it


# -- in which shape the template reads messages ------------------------------------------------------------------------


def _shape_of_calls(template: ChatTemplate) -> ChatTemplate:
    """The template, told whether it wants the arguments of calls as text, and what it takes for no content."""

    def takes(shaped: ChatTemplate, content: str | None, *later: Message) -> bool:
        messages = [_USER, calling(content), *later]
        text = _rendered(shaped, messages, [_TOOL])
        if text is None:
            text = _rendered(shaped, messages)
        said = [{**message, "content": message["content"] or "x"} for message in messages]
        other = _rendered(shaped, said, [_TOOL]) or _rendered(shaped, said) or ""
        return text is not None and text.count(_VALUE) == 1 and _nothings(text) <= _nothings(other)

    for text_arguments in (False, True):
        shaped = replace(template, text_arguments=text_arguments)
        null, empty = takes(shaped, None), takes(shaped, "")
        if null and empty:  # in history it may be another matter
            in_history = [takes(shaped, content, _RESULT, _REPLY) for content in (None, "")]
            null, empty = in_history if any(in_history) else (null, empty)
        if null or empty:
            content: CallContent = "as_is" if null and empty else "null" if null else "empty"
            return replace(shaped, call_content=content)
    for text_arguments in (False, True):  # the call is left out; at least the conversation is not refused
        shaped = replace(template, text_arguments=text_arguments)
        as_null, as_empty = (_rendered(shaped, [_USER, calling(content)]) for content in (None, ""))
        if as_null is not None and (as_empty is None or _nothings(as_null) <= _nothings(as_empty)):
            return shaped
        if as_empty is not None:
            return replace(shaped, call_content="empty")
    return template


def _nothings(text: str) -> int:
    """How often a text says None or null, as templates do that write a content without asking whether there is one."""
    return text.count("None") + text.count("null")


def _rendered(template: ChatTemplate, messages: list[Message], tools: list[Any] | None = None) -> str | None:
    try:
        return template.render(messages, tools=tools)
    except TemplateRefused:
        return None


# -- what ends an answer -----------------------------------------------------------------------------------------------


def _endings(
    template: ChatTemplate, answered: str, prompt: str, markers: ControlTokens, tools: list[Any] | None
) -> Mapping[str, Any]:
    """The entries of the profile that say what ends an answer and opens a user's turn."""
    close = answered[answered.index(_ANSWER) + len(_ANSWER) :]
    text = _rendered(template, [_USER, _REPLY, _USER_AGAIN], tools)
    if text is None or not all(said in text for said in (_QUESTION, _ANSWER, _SECOND_QUESTION)):
        # One exchange is all that this template takes.
        end = _through_controls(close, markers, openers=frozenset()) or close.rstrip()
        return {"end_of_turn": end, "history_end": end, "next_turn_ends": (), "user_header": ""}
    opening = text[: text.index(_QUESTION)]
    later = text[text.index(_ANSWER) + len(_ANSWER) : text.index(_SECOND_QUESTION)]
    openers = _openers(text, opening, markers)
    shared = close[: markers.common_prefix(close, later)]
    end = in_history = _through_controls(shared, markers, openers)
    if not end:
        end = _through_controls(close, markers, openers)
        in_history = _end_in_history(text, opening, later, prompt, markers)
        if not end and markers.pattern.search(later) is None:  # all is plain text
            end = in_history = shared.rstrip()
    ends: tuple[str, ...] = ()
    if not end:
        found = (in_history or _leading_control(later, markers), _control_before_result(template, markers))
        ends = tuple(dict.fromkeys(token for token in found if token))
    return {
        "end_of_turn": end,
        "history_end": in_history,
        "next_turn_ends": ends,
        "user_header": _user_header(opening, later[len(in_history) :], markers),
    }


def _openers(text: str, opening: str, markers: ControlTokens) -> frozenset[str]:
    """What opens a turn: the first control token of a rendering, but for those that stand there once, as bos does."""
    found = (match[0] for match in markers.pattern.finditer(opening) if text.count(match[0]) > 1)
    first = next(found, None)
    return frozenset() if first is None else frozenset([first])


def _through_controls(text: str, markers: ControlTokens, openers: frozenset[str]) -> str:
    """All of `text` through its first control token and those directly behind it that open no turn; "" without any."""
    end = markers.first_end(text)
    if end is None:
        return ""
    while (match := markers.pattern.match(text, end)) is not None and match[0] not in openers:
        end = match.end()
    return text[:end]


def _end_in_history(text: str, opening: str, later: str, prompt: str, markers: ControlTokens) -> str:
    """What ends an answer in history, where the end of a conversation has another end; "" where nothing does.

    It is what closes a user's turn, if that stands behind the answer too, or a token before what opens a user's turn.
    """
    question_end = text.index(_QUESTION) + len(_QUESTION)
    of_user = text[question_end : text.index(_ANSWER)].removesuffix(prompt)
    closing = of_user[: markers.first_end(of_user) or 0]
    if closing and later.startswith(closing):
        return closing
    before_header = later[: len(later) - _common_suffix_length(opening, later)]
    return before_header[: markers.first_end(before_header) or 0]


def _leading_control(text: str, markers: ControlTokens) -> str:
    """The control token that `text` begins with, blanks before it included; "" where it begins otherwise."""
    match = markers.pattern.search(text)
    return text[: match.end()] if match is not None and not text[: match.start()].strip() else ""


def _control_before_result(template: ChatTemplate, markers: ControlTokens) -> str:
    """The control token that ends an answer which calls a tool, when the tool's result follows."""
    tracer = Tracer(template)
    renderings: list[Trace] = []
    for messages in ([_USER, calling("")], [_USER, calling(""), _RESULT]):
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
    """What a template writes before a user's text in a later turn as in the first one, from its first control token
    on.
    """
    header = opening[len(opening) - _common_suffix_length(opening, later) :]
    match = markers.pattern.search(header)
    return header[match.start() :] if match else header


def _first_difference(template: ChatTemplate, tools: list[Any] | None) -> tuple[str, str] | None:
    """The first place where a longer rendering does not begin with a shorter one, each from there on; None if
    stable.
    """
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
                return _without_marks(previous[at:]), _without_marks(text[at:])
            previous = text
    return None


def _without_marks(text: str) -> str:
    return text.replace("\ue000", "").replace("\ue001", "")
