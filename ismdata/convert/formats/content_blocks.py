"""Messages made of blocks (the APIs of Anthropic, Amazon Bedrock and Google), converted to OpenAI's messages.

In those APIs a tool's result is a block of a user's message; with OpenAI it is a message of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ismdata.convert.json_values import json_text

#: Keys of blocks without a `type`: Bedrock's, then Gemini's in both spellings.
_KEYS = (
    "toolUse",
    "toolResult",
    "reasoningContent",
    "functionCall",
    "functionResponse",
    "function_call",
    "function_response",
    "text",
)
_TOOL_TYPES = frozenset({"tool_use", "tool_result"})


def has_blocks(content: Any) -> bool:
    """Whether a message's content has blocks that OpenAI's messages do not have."""
    return isinstance(content, list) and any(
        isinstance(block, dict) and (block.get("type") in _TOOL_TYPES if _has_type(block) else True)
        for block in content
    )


def split_blocks(message: Mapping[str, Any], blocks: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages with `content`, `tool_calls` and `tool_call_id`, in order, from a message with such blocks.

    Blocks that are neither text nor about a tool remain as parts with a type, which are refused later.
    """
    found: list[dict[str, Any]] = []
    parts: list[Any] = []
    calls: list[Any] = []

    def close() -> None:
        if parts or calls:
            found.append({**message, "content": [*parts] or None, **({"tool_calls": [*calls]} if calls else {})})
        parts.clear()
        calls.clear()

    for block in blocks:
        kind, body = _converted(block)
        if kind == "call":
            calls.append(body)
        elif kind == "result":
            close()
            found.append({"role": "tool", **body})
        else:
            parts.append(body)
    close()
    return found or [{**message, "content": ""}]


def openai_tools(tools: Any) -> Any:
    """Tool descriptions of these APIs in OpenAI's shape; anything else is returned unchanged."""
    if isinstance(tools, dict) and isinstance(tools.get("tools"), list):
        tools = tools["tools"]  # Bedrock's toolConfig
    if not isinstance(tools, list):
        return tools
    found: list[Any] = []
    for tool in tools:
        declared = next((_get(tool, name) for name in ("functionDeclarations", "function_declarations")), None)
        spec = _get(tool, "toolSpec")
        if isinstance(declared, list):
            found += declared
        elif isinstance(spec, dict):
            schema = spec.get("inputSchema")
            found.append(_function(spec, "inputSchema", schema.get("json") if isinstance(schema, dict) else schema))
        elif isinstance(_get(tool, "input_schema"), dict):
            found.append(_function(tool, "input_schema", tool["input_schema"]))
        else:
            found.append(tool)
    return found


def system_blocks(value: Any) -> Any:
    """The text or the list of blocks of a system prompt; Gemini's is `{"parts": […]}`."""
    parts = value.get("parts", value) if isinstance(value, dict) else value
    return [parts] if isinstance(parts, dict) else parts


def _function(tool: Mapping[str, Any], schema_name: str, schema: Any) -> dict[str, Any]:
    rest = {name: value for name, value in tool.items() if name not in (schema_name, "type")}
    return {"type": "function", "function": {**rest, "parameters": schema}}


def _has_type(block: Mapping[str, Any]) -> bool:
    return isinstance(block.get("type"), str)


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _converted(block: Any) -> tuple[str, Any]:
    """The kind of a block ("call", "result" or "part") and its body in OpenAI's shape."""
    if not isinstance(block, dict):
        return "part", block
    if _has_type(block):
        if block["type"] == "tool_use":
            return "call", _call(block, "id", "input")
        if block["type"] == "tool_result":
            return "result", _result(block, "tool_use_id", block.get("content"))
        return "part", block
    name = next((name for name in _KEYS if block.get(name) is not None), None)
    if name is None:
        return "part", {"type": next(iter(block), "empty"), **block}
    body = block[name]
    if name == "text":
        return "part", {"type": "thinking" if block.get("thought") is True else "text", "text": body}
    if name == "toolUse":
        return "call", _call(body, "toolUseId", "input")
    if name in ("functionCall", "function_call"):
        return "call", _call(body, "id", "args")
    if name == "toolResult":
        return "result", _result(body, "toolUseId", _get(body, "content"))
    if name in ("functionResponse", "function_response"):
        return "result", {**_result(body, "id", [{"json": _get(body, "response")}]), "name": _get(body, "name")}
    return "part", {"type": "thinking", "text": _get(_get(body, "reasoningText"), "text")}


def _call(body: Any, id_name: str, arguments: str) -> Any:
    """A tool call in OpenAI's shape. A value that is no object is returned as is; it is refused later."""
    if not isinstance(body, dict):
        return body
    call = {"type": "function", "function": {"name": body.get("name"), "arguments": body.get(arguments)}}
    return {"id": body[id_name], **call} if isinstance(body.get(id_name), str) else call


def _result(body: Any, id_name: str, content: Any) -> dict[str, Any]:
    blocks = content if isinstance(content, list) else ["" if content is None else content]
    return {"tool_call_id": _get(body, id_name), "content": [_result_part(block) for block in blocks]}


def _result_part(block: Any) -> Any:
    if isinstance(block, dict) and not _has_type(block):
        if "json" in block:
            return {"type": "text", "text": json_text(block["json"], "a tool's result")}
        if "text" in block:
            return {"type": "text", "text": block["text"]}
        return {"type": next(iter(block), "empty"), **block}
    return block
