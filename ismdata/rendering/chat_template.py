"""A chat template: it is rendered with a fixed date, and gets messages in the form that it reads.

It runs in the environment that transformers gives templates, so it means here what it means everywhere. A template is
also a program that someone else wrote: its time, its memory and the text that it writes are limited.
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

from ismdata.errors import DataError, UsageError
from ismdata.rendering import template_environment
from ismdata.rendering.refusals import TemplateRefused
from ismdata.rendering.sandbox import limited

#: The date for templates that print today's date; `--template-date` changes it. Llama 3.1 and 3.2 write it if they get
#: none.
DEFAULT_DATE = datetime.date(2024, 7, 26)

#: Templates that ship with ismdata, for tokenizers without one.
BUILT_IN = ("chatml",)

Message = dict[str, Any]

#: Limits of one rendering; real templates stay far below them. Seconds: a constant, and more per message. Bytes: on top
#: of what the process uses. Characters written: a constant, more per message, and more per character of the messages.
_SECONDS, _SECONDS_PER_MESSAGE = 10.0, 0.01
_MEMORY = 1 << 30
_CHARACTERS, _CHARACTERS_PER_MESSAGE, _CHARACTERS_PER_CHARACTER = 1 << 20, 1000, 10

#: The longest part of a template's own error that is quoted, in characters.
_QUOTED = 500

_STRFTIME = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")


#: How the template gets the content of a message that only calls tools: as the conversation has it, always null, or
#: always empty.
CallContent = Literal["as_is", "null", "empty"]


def built_in(name: str) -> str:
    """The Jinja source of a template that ships with ismdata."""
    return (resources.files("ismdata") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template with everything that its rendering depends on. Probing finds the last three (`template_probe.py`).

    Attributes:
        name: What errors call the template.
        source: The Jinja source.
        special_tokens: The tokenizer's named tokens (`bos_token` and so on).
        arguments: What `--template-arg` passes.
        date: The date that the template prints.
        typed_content: Pass contents as lists of typed parts.
        text_arguments: Pass the arguments of tool calls as JSON text.
        call_content: What to pass as the content of a message that only calls tools.
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
        """The hash of all that decides what is rendered; of the date only if the template prints it."""
        parts = [
            self.dated_source,
            dict(self.special_tokens),
            dict(self.arguments),
            self.typed_content,
            self.text_arguments,
        ]
        # A format that is no constant is not replaced in the source.
        dated = "date_string" in self.source or "strftime_now(" in self.dated_source.replace("strftime_now is", "")
        parts.append(self.date.isoformat() if dated else None)
        if self.call_content != "as_is":
            parts.append(self.call_content)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def dated_source(self) -> str:
        """The source, with every constant `strftime_now("...")` replaced by the fixed date in that format."""

        def fixed(match: re.Match[str]) -> str:
            return json.dumps(self.date.strftime(match["format"]))

        return _STRFTIME.sub(fixed, self.source)

    @cached_property
    def constants(self) -> frozenset[str]:
        """The string constants of the source that are not blank; none if it cannot be parsed here."""
        tree = parsed(self.source)
        found = tree.find_all(nodes.Const) if tree is not None else ()
        return frozenset(node.value for node in found if isinstance(node.value, str) and node.value.strip())

    @property
    def prints_date(self) -> bool:
        """Whether the rendering can depend on the date."""
        return "strftime_now" in self.source or "date_string" in self.source

    def render(
        self, messages: Sequence[Message], *, tools: list[Any] | None = None, generation_prompt: bool = False
    ) -> str:
        """Render messages: the text of transformers' `apply_chat_template(tokenize=False)`.

        Args:
            messages: The messages.
            tools: The tools described to the template.
            generation_prompt: End with what opens an answer.

        Returns:
            The text.

        Raises:
            TemplateRefused: If the template raises an exception.
            DataError: If the rendering exceeds the limits of time, memory or text.
        """
        context: dict[str, Any] = dict(self.special_tokens) | dict(self.arguments)
        if "date_string" in self.source:
            context.setdefault("date_string", self.date.strftime("%d %b %Y"))
        shaped = [self._shaped(message) for message in messages]
        try:
            text = limited(
                lambda: template_environment.render(
                    self.dated_source,
                    shaped,
                    tools=tools,
                    add_generation_prompt=generation_prompt,
                    context=context,
                    today=self.date,
                ),
                seconds=_SECONDS + _SECONDS_PER_MESSAGE * len(shaped),
                memory=_MEMORY,
            )
        except TimeoutError as error:
            raise self._too_much(messages, str(error)) from error
        except MemoryError as error:
            raise self._too_much(messages, f"took more than {_MEMORY >> 30} GiB of memory") from error
        except Exception as error:
            # Someone else wrote the template: whatever it raises is its way of refusing.
            line = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
            quoted = str(error)[:_QUOTED]
            raise TemplateRefused(f"{type(error).__name__}{line}: {quoted}".removesuffix(": ")) from error
        if len(text) > _CHARACTERS and len(text) > _most_characters(messages, tools):
            raise self._too_much(messages, f"wrote {len(text):,} characters")
        return text

    def _shaped(self, message: Message) -> Message:
        """A message in the form that the template reads."""
        if message.get("tool_calls") and not (message.get("content") or "").strip() and self.call_content != "as_is":
            message = {**message, "content": None if self.call_content == "null" else ""}
        if self.text_arguments:
            message = _with_text_arguments(message)
        return _typed(message) if self.typed_content else message

    def _too_much(self, messages: Sequence[Message], what: str) -> DataError:
        return DataError(
            f"chat template {self.name}: rendering {len(messages):,} messages {what}; expected a template that only "
            "formats messages. Pass another with --chat-template FILE"
        )


def parsed(source: str) -> nodes.Template | None:
    """The syntax tree of a template; None if it is not Jinja."""
    try:
        return template_environment.template_environment().parse(source)
    except TemplateError:
        return None


def _most_characters(messages: Sequence[Message], tools: list[Any] | None) -> int:
    """How long a rendering may be."""
    given = len(json.dumps([messages, tools], ensure_ascii=False, default=str))
    return _CHARACTERS + _CHARACTERS_PER_MESSAGE * len(messages) + _CHARACTERS_PER_CHARACTER * given


def _typed(message: Message) -> Message:
    """The message with its content as a list of one text part."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _with_text_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as JSON text."""
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


#: Names that `apply_chat_template` of transformers passes to a template itself.
_RESERVED = frozenset(
    {"messages", "tools", "documents", "conversations", "chat_template", "add_generation_prompt"}
    | {"continue_final_message", "return_assistant_tokens_mask"}
)


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse the pairs of `--template-arg NAME=VALUE`.

    Args:
        pairs: NAME=VALUE. A VALUE that is JSON is read as JSON; any other is text.

    Returns:
        The arguments by name.

    Raises:
        UsageError: If a pair has no name, or a name that is reserved.

    >>> parse_arguments(["enable_thinking=false", "persona=pirate"])
    {'enable_thinking': False, 'persona': 'pirate'}
    """
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name.isidentifier():
            raise UsageError(f"--template-arg {pair!r}: expected NAME=VALUE, as in enable_thinking=false")
        if name in _RESERVED:
            raise UsageError(f"--template-arg {pair!r}: {name} is passed by ismdata itself; expected another name")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments
