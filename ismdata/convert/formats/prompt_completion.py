"""One prompt and its completion, as texts or as lists of chat messages, with the exchanges before it in `history`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.messages import OPENAI
from ismdata.convert.formats.pairs import exchange_of, messages_of, system_of
from ismdata.errors import Refused

#: Beside an instruction, what it is about: it follows after a line break, as Alpaca's `input` does.
_CONTEXTS = ("input", "context")


#: The fields of a query that is answered by calls of tools: xLAM, APIGen.
_CALLING = frozenset({"query", "answers", "tools"})


@dataclass(frozen=True, kw_only=True)
class PromptCompletion(CorpusFormat):
    """A record is an object with a prompt and a completion under one of the usual pairs of names."""

    expects: str = "prompt/completion, question/answer and the like"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        names = exchange_of(record) if isinstance(record, dict) else None
        if names is None and isinstance(record, dict) and record.keys() >= _CALLING:
            return isinstance(record["query"], str) and isinstance(record["answers"], str | list)
        return names is not None and all(_is_side(record[name]) for name in names)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        names = exchange_of(fields)
        if names is None and fields.keys() >= _CALLING:
            names = ("query", "answers")
            fields["answers"] = {"role": "assistant", "tool_calls": fields["answers"]}
        if names is None:
            found = f"the record has {', '.join(map(str, fields)) or 'no field'}"
            raise Refused("missing_field", f"{found}; expected {self.expects}")
        ignored: list[str] = []
        prompt, completion = (fields.pop(name) for name in names)
        if names[0] == "instruction" and isinstance(prompt, str):
            prompt = "\n".join([prompt, *_contexts(fields)])
        messages = messages_of(fields.pop("history", None), "history", ignored)
        for role, name, side in zip(("user", "assistant"), names, (prompt, completion), strict=True):
            messages += side_of(side, role, name, ignored)
        first = system_of(fields)
        tools = fields.pop("tools", None)
        return [Draft(messages=first + messages, id=take_id(fields), tools=tools, extra=fields, ignored=ignored)]


def side_of(value: Any, role: str, name: str, ignored: list[str]) -> list[dict[str, Any]]:
    """One side of an exchange as messages: a text is one of `role`, a list or an object holds chat messages.

    Raises Refused for anything else.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list | dict):
        raise Refused("invalid_field", f"{name} is {kind_of(value)}; expected a string or a list of messages")
    (draft,) = OPENAI.parse_record({"messages": [value] if isinstance(value, dict) else value})
    ignored += [f"{name}[].{one.partition('.')[2]}" for one in draft.ignored]
    return list(draft.messages)


def _is_side(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and OPENAI.matches({"messages": value}))


def _contexts(fields: dict[str, Any]) -> list[str]:
    texts = {name: fields.pop(name, None) for name in _CONTEXTS}
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise Refused("invalid_field", f"{name} is {kind_of(text)}; expected a string")
    return [text for text in texts.values() if text]


PROMPT_COMPLETION = PromptCompletion()
