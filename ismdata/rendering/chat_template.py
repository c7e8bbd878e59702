"""A chat template: rendering it with a fixed date, and giving it messages in the shape that it reads.

Rendering is transformers' own, sandbox included, so a template means here what it means everywhere. A template is also
a program from somewhere: there are limits to the time and memory that it takes, and to the text that it writes.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any, Literal

from jinja2 import TemplateSyntaxError, nodes
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ismdata.errors import DataError, UsageError
from ismdata.rendering.refusals import TemplateRefused
from ismdata.rendering.sandbox import limited

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


#: How a template is given the content of a message that only calls tools: as the conversation has it, always null, or
#: always empty.
CallContent = Literal["as_is", "null", "empty"]


def built_in(name: str) -> str:
    """The source of a template that ships with ismdata."""
    return (resources.files("ismdata") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template with everything that its rendering depends on.

    `special_tokens` are the tokenizer's (`bos_token` and so on), `arguments` come from `--template-arg`. The other
    fields say in which shape the template reads messages, which probing finds out: `typed_content`, contents as typed
    parts; `text_arguments`, the arguments of tool calls as JSON text; `call_content`, what it takes for no content
    beside tool calls.
    """

    name: str
    source: str
    special_tokens: Mapping[str, Any]
    arguments: Mapping[str, Any]
    date: datetime.date = DEFAULT_DATE
    typed_content: bool = False
    text_arguments: bool = False
    call_content: CallContent = "as_is"

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
        if self.call_content != "as_is":
            parts.append(self.call_content)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def dated_source(self) -> str:
        """The source with every `strftime_now("...")` replaced by the fixed date in that format."""

        def fixed(match: re.Match[str]) -> str:
            return json.dumps(self.date.strftime(match["format"]))

        return _STRFTIME.sub(fixed, self.source)

    @cached_property
    def constants(self) -> frozenset[str]:
        """The string constants of the source that are not blank; empty where it cannot be parsed here."""
        tree = parsed(self.source)
        found = tree.find_all(nodes.Const) if tree is not None else ()
        return frozenset(node.value for node in found if isinstance(node.value, str) and node.value.strip())

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
        shaped = [self._shaped(message) for message in messages]
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

    def _shaped(self, message: Message) -> Message:
        """A message in the shape that the template reads."""
        if message.get("tool_calls") and not (message.get("content") or "").strip() and self.call_content != "as_is":
            message = {**message, "content": None if self.call_content == "null" else ""}
        if self.text_arguments:
            message = _with_text_arguments(message)
        return _typed(message) if self.typed_content else message

    def _too_much(self, messages: Sequence[Message], what: str) -> DataError:
        return DataError(
            f"chat template {self.name}: rendering {len(messages):,} messages {what}; expected one that lays messages "
            "out and does little else. Pass another with --chat-template FILE"
        )


def parsed(source: str) -> nodes.Template | None:
    """The syntax tree of a template; None where it cannot be parsed without transformers' own extensions."""
    without_generation = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
    try:
        return ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(without_generation)
    except TemplateError:
        return None


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
