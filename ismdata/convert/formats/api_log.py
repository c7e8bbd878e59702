"""Logs of chat APIs: a request with its messages, and the response with the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, take_id
from ismdata.convert.formats.fields import missing_field
from ismdata.convert.formats.langchain import openai_message
from ismdata.convert.formats.messages import OPENAI
from ismdata.errors import Refused

#: The fields of the request and the response.
_SIDES = (("request", "response"), ("inputs", "outputs"), ("input", "output"), ("request_body", "response_body"))
#: Request fields that are read.
_READ = frozenset({"messages", "system", "tools", "functions"})


@dataclass(frozen=True, kw_only=True)
class ApiLog(CorpusFormat):
    """A record has the messages of a request and, beside them, the message of the response."""

    expects: str = "request.messages and response.choices[].message, or inputs and outputs"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        names = _sides_of(record)
        return names is not None and _request(record[names[0]]) is not None and _response(record[names[1]], []) != []

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        names = _sides_of(fields)
        request = _request(fields.pop(names[0])) if names else None
        if names is None or request is None:
            raise missing_field(fields, self.expects)
        ignored: list[str] = []
        answer = _response(fields.pop(names[1]), ignored)
        if not answer:
            raise Refused("missing_field", f"{names[1]} has no message; expected choices[].message or the like")
        asked = request["messages"]
        if answer[: len(asked)] == asked:  # a chain that returns all of its messages
            answer = answer[len(asked) :]
        messages = [openai_message(one, ignored) for one in (*asked, *answer)]
        read = {name: request[name] for name in _READ if name in request}
        (draft,) = OPENAI.parse_record({**read, "messages": messages})
        settings = {name: value for name, value in request.items() if name not in _READ}
        extra = {**fields, **({names[0]: settings} if settings else {})}
        return [replace(draft, id=take_id(extra), extra=extra, ignored=[*draft.ignored, *ignored])]


def _sides_of(record: Any) -> tuple[str, str] | None:
    """The fields of the request and of the response, None if a record has none."""
    if not isinstance(record, dict):
        return None
    return next(
        ((one, two) for one, two in _SIDES if isinstance(record.get(one), dict) and record.get(two) is not None), None
    )


def _request(value: Mapping[str, Any]) -> dict[str, Any] | None:
    """The body of a request with messages, None if it has none."""
    body = value["body"] if isinstance(value.get("body"), dict) else value
    listed = body.get("messages")
    if isinstance(listed, list) and len(listed) == 1 and isinstance(listed[0], list):
        listed = listed[0]  # LangChain's batches
    if not isinstance(listed, list) or not listed or not all(isinstance(one, dict) for one in listed):
        return None
    return {**body, "messages": listed}


def _response(value: Any, ignored: list[str]) -> list[Any]:
    """The messages of a response; none if it has none. Adds the names of other answers to `ignored`."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}] if value else []
    if isinstance(value, list):
        return value if value and all(isinstance(one, dict) and "role" in one for one in value) else []
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("body"), dict):
        value = value["body"]
    choices = value.get("choices")
    if isinstance(choices, list) and choices:
        ignored += ["choices after the first"] * (len(choices) - 1)
        message = choices[0].get("message") if isinstance(choices[0], dict) else None
        return [message] if isinstance(message, dict) else []
    generations = value.get("generations")
    while isinstance(generations, list) and generations:
        ignored += ["generations after the first"] * (len(generations) - 1)
        generations = generations[0]
    found = generations if isinstance(generations, dict) else value
    for name in ("message", "messages", "output"):
        inner = found.get(name)
        if isinstance(inner, dict):
            return [inner]
        if isinstance(inner, list | str) and inner:
            return _response(inner, ignored)
    if "content" in found and found.get("role", "assistant") == "assistant":
        return [{"role": "assistant", "content": found["content"]}]
    return []


API_LOG = ApiLog()
