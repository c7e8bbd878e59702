"""A chat template: rendering it, fixing its date, and probing what it writes around each message.

Rendering is transformers' own, sandbox included, so a template means here what it means everywhere. A template is also
a program from somewhere: there are limits to the time and memory that it takes, and to the text that it writes.

Probing renders marked conversations once and reads off what the rest of the road needs: the generation prompt, what
closes an answer, what opens a user's turn, and whether the template is prefix-stable (rendering messages[:k] with the
generation prompt is a prefix of rendering messages[:k + 1], which is a prefix of everything longer).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ismdata.control_tokens import ControlTokens, common_prefix_length
from ismdata.errors import DataError, UsageError
from ismdata.limits import limited

#: What templates that print today's date are told, unless `--template-date` says otherwise. The date that Llama 3.1 and
#: 3.2 write when they are given none.
DEFAULT_DATE = datetime.date(2024, 7, 26)

#: Templates that ship with ismdata, for tokenizers that have none.
BUILT_IN = ("chatml",)

Message = dict[str, Any]

#: What one rendering may take: time, in all and more for each message; memory on top of what is in use; and text, in
#: all and more for each message and each character of one. Real templates stay far below.
_SECONDS, _SECONDS_A_MESSAGE = 10.0, 0.01
_MEMORY = 1 << 30
_CHARACTERS, _CHARACTERS_A_MESSAGE, _TIMES_LONGER = 1 << 20, 1000, 10

#: Characters of a template's own refusal that are passed on.
_MOST_SAID = 500

_STRFTIME = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")
#: Contents while probing; the private-use characters around them keep them apart from the template's own text.
_MARKERS = tuple(f"\ue000{name}\ue001" for name in ("QUESTION", "ANSWER", "SECOND QUESTION", "SECOND ANSWER"))


class TemplateRefused(Exception):
    """The template raised on a conversation; the message is the template's own."""


def built_in(name: str) -> str:
    """The source of a template that ships with ismdata."""
    return (resources.files("ismdata") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template with everything that its rendering depends on.

    `special_tokens` are the tokenizer's (`bos_token` and so on), `arguments` come from `--template-arg`.
    `typed_content` and `text_arguments`: the template takes contents as typed parts, the arguments of tool calls as
    JSON text.
    """

    name: str
    source: str
    special_tokens: Mapping[str, Any]
    arguments: Mapping[str, Any]
    date: datetime.date = DEFAULT_DATE
    typed_content: bool = False
    text_arguments: bool = False

    @cached_property
    def sha256(self) -> str:
        """Of everything that decides what is rendered: source, special tokens, arguments and, if it is used, the
        date.
        """
        parts = [
            self.dated_source,
            dict(self.special_tokens),
            dict(self.arguments),
            self.typed_content,
            self.text_arguments,
        ]
        parts.append(self.date.isoformat() if "date_string" in self.source else None)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def dated_source(self) -> str:
        """The source with every `strftime_now("...")` replaced by the fixed date in that format."""

        def fixed(match: re.Match[str]) -> str:
            return json.dumps(self.date.strftime(match["format"]))

        return _STRFTIME.sub(fixed, self.source)

    @property
    def prints_date(self) -> bool:
        return "strftime_now" in self.source or "date_string" in self.source

    def render(
        self, messages: Sequence[Message], *, tools: list[Any] | None = None, generation_prompt: bool = False
    ) -> str:
        """The text that transformers' `apply_chat_template(tokenize=False)` gives.

        Raises TemplateRefused where the template does, and DataError where it goes beyond what a rendering may take.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        context: dict[str, Any] = dict(self.special_tokens) | dict(self.arguments)
        if "date_string" in self.source:
            context.setdefault("date_string", self.date.strftime("%d %b %Y"))
        shaped = [_typed(message) for message in messages] if self.typed_content else list(messages)
        if self.text_arguments:
            shaped = [_with_text_arguments(message) for message in shaped]
        try:
            rendered: Any = limited(
                lambda: render_jinja_template(
                    [shaped],
                    tools=tools,
                    chat_template=self.dated_source,
                    add_generation_prompt=generation_prompt,
                    **context,
                ),
                seconds=_SECONDS + _SECONDS_A_MESSAGE * len(shaped),
                memory=_MEMORY,
            )
        except TimeoutError as error:
            raise self._too_much(messages, str(error)) from error
        except MemoryError as error:
            raise self._too_much(messages, f"took more than {_MEMORY >> 30} GiB of memory") from error
        except Exception as error:
            # A template is a program that someone else wrote: whatever it raises is its way of refusing.
            line = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
            said = str(error)[:_MOST_SAID]
            raise TemplateRefused(f"{type(error).__name__}{line}: {said}".removesuffix(": ")) from error
        texts, _ = rendered
        text = str(texts[0])
        if len(text) > _CHARACTERS and len(text) > _most_characters(messages, tools):
            raise self._too_much(messages, f"wrote {len(text):,} characters")
        return text

    def _too_much(self, messages: Sequence[Message], what: str) -> DataError:
        return DataError(
            f"chat template {self.name}: rendering {len(messages):,} messages {what}; expected one that lays messages "
            "out and does little else. Pass another with --chat-template FILE"
        )


def _most_characters(messages: Sequence[Message], tools: list[Any] | None) -> int:
    said = len(json.dumps([messages, tools], ensure_ascii=False, default=str))
    return _CHARACTERS + _CHARACTERS_A_MESSAGE * len(messages) + _TIMES_LONGER * said


def _typed(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _with_text_arguments(message: Message) -> Message:
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", {})
        if isinstance(function.get("arguments"), dict):
            call = {
                **call,
                "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)},
            }
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else message


def _wants_text_arguments(template: ChatTemplate) -> bool:
    """Whether a template refuses a tool call with its arguments as an object, but takes them as text."""
    call = {"id": "call00001", "type": "function", "function": {"name": "tool", "arguments": {"key": "value"}}}
    messages: list[Message] = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    for text_arguments in (False, True):
        try:
            replace(template, text_arguments=text_arguments).render(messages)
        except TemplateRefused:
            continue
        return text_arguments
    return False


@dataclass(frozen=True, kw_only=True)
class TemplateProfile:
    """What probing a template found.

    generation_prompt: the text that opens an answer. close: what follows an answer that ends the conversation.
    end_of_turn: the part of `close` that belongs to the answer, through its first control token. user_header: what
    opens a later user turn. prefix_stable: see the module's text; `difference` shows one place where it is not, as
    (fed, rewritten).
    """

    generation_prompt: str
    close: str
    end_of_turn: str
    user_header: str
    prefix_stable: bool
    difference: tuple[str, str] | None


def profile(template: ChatTemplate, markers: ControlTokens) -> tuple[ChatTemplate, TemplateProfile]:
    """Probe a template; returns it with `typed_content` set where it only takes typed parts. Raises DataError.

    A template that does not even render one user's question and one answer cannot be used at all. `markers` are the
    tokenizer's control tokens and the template's own markers.
    """
    _refuse_powers(template)
    question, answer, second, last = _MARKERS
    user, reply = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    try:
        alone = template.render([user])
        if question not in alone:
            template = replace(template, typed_content=True)
            alone = template.render([user])
        opened = template.render([user], generation_prompt=True)
        answered = template.render([user, reply])
    except TemplateRefused as refusal:
        raise DataError(
            f"chat template {template.name}: refuses one user message and one answer ({refusal}). "
            "Pass another with --chat-template FILE"
        ) from refusal
    template = replace(template, text_arguments=_wants_text_arguments(template))
    if question not in alone or answer not in answered:
        raise DataError(
            f"chat template {template.name}: its rendering does not contain what user and assistant said; "
            f"rendered {answered[:200]!r}. Pass another with --chat-template FILE"
        )
    close = answered[answered.index(answer) + len(answer) :]
    longer = [user, reply, {"role": "user", "content": second}, {"role": "assistant", "content": last}]
    end_of_turn, header = _end_of_turn(close, close, markers), ""
    try:
        text = template.render(longer[:3])
    except TemplateRefused:
        text = ""  # one exchange is all that this template takes
    if question in text and answer in text:
        later = text[text.index(answer) + len(answer) : text.index(second)]
        end_of_turn = _end_of_turn(close, later, markers)
        turn_end = len(end_of_turn) if later.startswith(end_of_turn) else markers.first_end(later) or 0
        header = _user_header(text[: text.index(question)], later[turn_end:], markers)
    difference = _first_difference(template, longer)
    return template, TemplateProfile(
        generation_prompt=opened[markers.common_prefix(alone, opened) :],
        close=close,
        end_of_turn=end_of_turn,
        user_header=header,
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


def _end_of_turn(close: str, later: str, controls: ControlTokens) -> str:
    """The part of `close`, which follows an answer at the end, that the model itself writes.

    That is all through the first control token and those directly behind it, as far as an answer in history (`later`)
    has them too: a tail that only the end of a conversation gets is not the answer's. Without any it is all but
    trailing blanks.
    """
    shared = close[: controls.common_prefix(close, later)]
    first = controls.first_end(shared)
    if first is None:
        return close[: controls.first_end(close) or len(close.rstrip())]
    while (match := controls.pattern.match(shared, first)) is not None:
        first = match.end()
    return shared[:first]


def _user_header(first: str, later: str, controls: ControlTokens) -> str:
    """What a template writes before a user's text in a later turn as in the first one, from its first control token
    on.
    """
    shared = common_prefix_length(first[::-1], later[::-1])
    header = first[len(first) - shared :]
    match = controls.pattern.search(header)
    return header[match.start() :] if match else header


def _first_difference(template: ChatTemplate, messages: list[Message]) -> tuple[str, str] | None:
    """The first place where a longer rendering does not begin with a shorter one, each from there on; None if
    stable.
    """
    previous = ""
    for k in range(1, len(messages) + 1):
        renders = []
        try:
            if messages[k - 1]["role"] == "assistant":
                renders.append(template.render(messages[: k - 1], generation_prompt=True))
            renders.append(template.render(messages[:k]))
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


#: Names that rendering itself passes to a template.
_OURS = frozenset(
    {"messages", "tools", "documents", "conversations", "chat_template", "add_generation_prompt"}
    | {"continue_final_message", "return_assistant_tokens_mask"}
)


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """`--template-arg NAME=VALUE` pairs; VALUE is read as JSON where it is JSON, else as text. Raises UsageError."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name.isidentifier():
            raise UsageError(f"--template-arg {pair!r}: expected NAME=VALUE, as in enable_thinking=false")
        if name in _OURS:
            raise UsageError(f"--template-arg {pair!r}: {name} is what ismdata itself passes; expected another name")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments
