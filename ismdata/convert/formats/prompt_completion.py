"""One prompt and its completion, as texts or lists of chat messages, with earlier exchanges in `history`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.fields import is_texts, missing_field, only_answer, take_text, take_thoughts
from ismdata.convert.formats.messages import OPENAI, MessageLists
from ismdata.convert.formats.pairs import (
    exchange_message,
    find_exchange,
    find_numbered_exchange,
    later_exchanges,
    pair_messages,
    take_system,
)
from ismdata.errors import Refused

#: The subject of an instruction: it follows the instruction after a line break, as Alpaca's `input` does.
_CONTEXTS = ("input", "context")


#: The fields of a query whose answer is a list of tool calls: xLAM, APIGen.
_CALLING = frozenset({"query", "answers", "tools"})


@dataclass(frozen=True, kw_only=True)
class PromptCompletion(CorpusFormat):
    """A record is an object with a prompt and a completion, under one of the usual pairs of names."""

    expects: str = "prompt/completion, question/answer and the like"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        names = _exchange_names(record) if isinstance(record, dict) else None
        if names is None and isinstance(record, dict) and record.keys() >= _CALLING:
            return isinstance(record["query"], str) and isinstance(record["answers"], str | list)
        return (
            names is not None
            and _is_side(record[names[0]])
            and (_is_side(record[names[1]]) or is_texts(record[names[1]]))
        )

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        names = _exchange_names(fields)
        if names is None and fields.keys() >= _CALLING:
            names = ("query", "answers")
            fields["answers"] = {"role": "assistant", "tool_calls": fields["answers"]}
        if names is None:
            raise missing_field(fields, self.expects)
        ignored: list[str] = []
        later = later_exchanges(fields, names)
        prompt, completion = (fields.pop(name) for name in names)
        if names[0] == "instruction" and isinstance(prompt, str):
            contexts = [take_text(fields, name) for name in _CONTEXTS]
            prompt = "\n".join([prompt, *(text for text in contexts if text)])
        messages = pair_messages(fields.pop("history", None), "history", ignored, whole=False)
        for role, name, side in zip(
            ("user", "assistant"), names, (prompt, only_answer(completion, names[1])), strict=True
        ):
            if role == "user" and isinstance(side, str) and not side.strip():
                continue  # nothing was asked: the assistant begins
            messages += side_messages(side, role, name, ignored)
        thoughts = take_thoughts(fields) if messages[-1].get("role") == "assistant" else None
        if thoughts is not None and messages[-1].get("reasoning_content") is None:
            messages[-1]["reasoning_content"] = thoughts
        for pair in later:
            for role, name in zip(("user", "assistant"), pair, strict=True):
                messages += exchange_message(fields.pop(name, None), role)
        system = take_system(fields)
        tools = fields.pop("tools", None)
        return [Draft(messages=system + messages, id=take_id(fields), tools=tools, extra=fields, ignored=ignored)]


def _exchange_names(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    return find_exchange(fields) or find_numbered_exchange(fields)


def side_messages(
    value: Any, role: str, name: str, ignored: list[str], corpus_format: MessageLists = OPENAI
) -> list[dict[str, Any]]:
    """The messages of one side of an exchange. Raises Refused.

    Args:
        value: A text, which is one message of `role`; or a chat message or a list of them.
        role: The role of a text.
        name: The field that holds the value.
        ignored: Names of message fields that are left out are added to it.
        corpus_format: The format of chat messages.

    Returns:
        The messages under canonical field names.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list | dict):
        raise Refused("invalid_field", f"{name} is {kind_of(value)}; expected a string or a list of messages")
    listed = [value] if isinstance(value, dict) else value
    (draft,) = corpus_format.parse_record({corpus_format.messages: listed})
    ignored += [f"{name}[].{one.partition('.')[2]}" for one in draft.ignored]
    return list(draft.messages)


def _is_side(value: Any) -> bool:
    if isinstance(value, dict):  # one message
        value = [value] if "role" in value and "content" in value else None
    return isinstance(value, str) or (isinstance(value, list) and OPENAI.matches({"messages": value}))


PROMPT_COMPLETION = PromptCompletion()
