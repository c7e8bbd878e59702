"""Tool calls and tool descriptions of any usual shape, in OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ismdata.convert.json_values import parse_json
from ismdata.errors import Refused, shown


def calls_of_message(raw: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    """The calls in `tool_calls` and `function_call`."""
    given = (raw.get("tool_calls"), raw.get("function_call"))
    return [call for value in given if not _is_nothing(value) for call in calls_of_value(value, number)]


def calls_of_text(text: str | None, number: int) -> list[dict[str, Any]]:
    """The calls in the content of a message whose role says that it is one."""
    calls = calls_of_value(text, number)
    if not calls:
        raise Refused("invalid_tool_call", f"message {number} calls no tool; expected {_EXPECTED_CALL}")
    return calls


_EXPECTED_CALL = 'a JSON object such as {"name": …, "arguments": {…}}'


def calls_of_value(value: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls given as an object, a list of them, or the JSON text of either."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            found = f"message {number}'s tool call is {shown(value)} ({error})"
            raise Refused("invalid_tool_call", f"{found}; expected {_EXPECTED_CALL}") from error
    return [_call(call, number) for call in (value if isinstance(value, list) else [value])]


def _call(call: Any, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise Refused("invalid_tool_call", f"message {number}'s tool call is {shown(call)}; expected {_EXPECTED_CALL}")
    arguments = _decoded_once(function.get("arguments"))
    head = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    # Arguments stay as in the corpus, an object or its JSON text. Rendering parses the text.
    return {**head, "type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}}


def _decoded_once(arguments: Any) -> Any:
    """Arguments whose JSON text was encoded as JSON once more, as the text inside; others unchanged."""
    if isinstance(arguments, str) and arguments.lstrip().startswith('"'):
        try:
            inner = parse_json(arguments)
            return inner if isinstance(inner, str) and isinstance(parse_json(inner), dict) else arguments
        except ValueError:
            return arguments
    return arguments


#: Texts of fields without a value, as exports write them.
_NOTHING = frozenset({"", "none", "null", "nan", "{}", "[]"})


def _is_nothing(value: Any) -> bool:
    """Whether a value stands for nothing: also an object without a value, as tables fill in."""
    if isinstance(value, str):
        return len(value) < 80 and value.strip().lower() in _NOTHING
    if isinstance(value, dict):
        return all(inner is None for inner in value.values())
    return value is None or value == []


def described_tools(value: Any, ignored: list[str]) -> list[dict[str, Any]] | None:
    """Tool descriptions as an OpenAI-style list, None if there are none. Raises Refused.

    Args:
        value: A list, a single description, the JSON text of either, or a list of such texts.
        ignored: Receives an entry for each description whose schema has null entries, which are left out.
    """
    if _is_nothing(value):
        return None
    value = _parsed_tools(value)
    if _is_nothing(value):
        return None
    tools = [_parsed_tools(tool) for tool in (value if isinstance(value, list) else [value])]
    if not all(isinstance(tool, dict) for tool in tools):
        raise Refused("invalid_tools", f"tools is {shown(value)}; expected a list of objects")
    return [_described_tool(tool, number, ignored) for number, tool in enumerate(tools, 1)]


def _parsed_tools(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise Refused("invalid_tools", f"tools is not JSON text ({error}); expected a list") from error


def _described_tool(tool: dict[str, Any], number: int, ignored: list[str]) -> dict[str, Any]:
    """A tool description in OpenAI's shape. Raises Refused if it is a function without a name."""
    if "function" in tool:
        whole = tool
    elif tool.get("type") == "function":  # OpenAI's Responses API: the function is not nested
        whole = {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
    elif "type" in tool:  # a tool of the service, such as its web search
        return tool
    else:
        whole = {"type": "function", "function": tool}
    function = whole["function"]
    if not (isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]):
        raise Refused("invalid_tools", f"tool {number} is {shown(tool)}; expected a function with a name")
    schema = function.get("parameters")
    if not _has_null_schemas(schema):
        return whole
    ignored.append(NULL_SCHEMAS)
    return {**whole, "function": {**function, "parameters": _without_null_schemas(schema)}}


#: Keywords of a JSON schema whose value may be null.
_MAY_BE_NULL = frozenset({"default", "const", "example", "examples", "enum"})


def _has_null_schemas(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_null_schemas, value))
    return isinstance(value, dict) and any(
        name not in _MAY_BE_NULL and (one is None or _has_null_schemas(one)) for name, one in value.items()
    )


def _without_null_schemas(value: Any) -> Any:
    """A JSON schema without the null parameters and keywords that tables fill in."""
    if isinstance(value, list):
        return [_without_null_schemas(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        name: one if name in _MAY_BE_NULL else _without_null_schemas(one)
        for name, one in value.items()
        if one is not None or name in _MAY_BE_NULL
    }


#: The name under which arguments that are left out are counted among the fields that are.
NULL_ARGUMENTS = "null arguments of tool calls"
#: The same for tool descriptions with null entries in the schema of their parameters.
NULL_SCHEMAS = "tools with null entries in their parameters"


def argument_schemas(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """The JSON schema of the arguments of each described function."""
    functions = [tool.get("function") for tool in tools or ()]
    return {one["name"]: one.get("parameters") for one in functions if isinstance(one, dict)}


def without_null_arguments(call: dict[str, Any], schemas: Mapping[str, Any], ignored: list[str]) -> dict[str, Any]:
    """A tool call without arguments that are null, unless their schema requires or allows that.

    Tables give each call the arguments of all functions, null where a function has no such argument. Adds an entry to
    `ignored` for each argument that is left out.
    """
    function = call["function"]
    if not isinstance(function["arguments"], dict):
        return call
    arguments = _without_nulls(function["arguments"], schemas.get(function["name"]), ignored)
    return {**call, "function": {**function, "arguments": arguments}}


def _without_nulls(value: Any, schema: Any, ignored: list[str]) -> Any:
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, list):
        return [_without_nulls(one, schema.get("items"), ignored) for one in value]
    if not isinstance(value, dict):
        return value
    inner = schema.get("properties")
    inner = inner if isinstance(inner, dict) else schema
    required = schema.get("required")
    kept = {}
    for name, one in value.items():
        if one is not None or (isinstance(required, list) and name in required) or _allows_null(inner.get(name)):
            kept[name] = _without_nulls(one, inner.get(name), ignored)
        else:
            ignored.append(NULL_ARGUMENTS)
    return kept


def _allows_null(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return False
    kinds = schema.get("type")
    choices = [one for name in ("anyOf", "oneOf") if isinstance(schema.get(name), list) for one in schema[name]]
    return (
        kinds == "null"
        or (isinstance(kinds, list) and "null" in kinds)
        or schema.get("nullable") is True
        or any(map(_allows_null, choices))
    )
