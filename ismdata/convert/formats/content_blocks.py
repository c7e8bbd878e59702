"""Messages made of blocks, as the APIs of Anthropic, Amazon Bedrock and Google have them, in the shape of OpenAI's.

There a tool's result is a block of a user's message; here it is a message of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ismdata.convert.canonical import json_text

#: Keys of blocks that bear no `type`: Bedrock's, then Gemini's, in both of its spellings.
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
_SPREAD = frozenset({"tool_use", "tool_result"})


def has_blocks(content: Any) -> bool:
    """Whether a message's content holds blocks that OpenAI's messages do not have."""
    return isinstance(content, list) and any(
        isinstance(block, dict) and (block.get("type") in _SPREAD if _typed(block) else True) for block in content
    )


def spread(message: Mapping[str, Any], blocks: Sequence[Any]) -> list[dict[str, Any]]:
    """A message with such blocks as messages with `content`, `tool_calls` and `tool_call_id`, in order.

    What is neither text nor of a tool stays as a typed part, which is refused as such later on.
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
        kind, body = _kind_of(block)
        if kind == "call":
            calls.append(body)
        elif kind == "result":
            close()
            found.append({"role": "tool", **body})
        else:
            parts.append(body)
    close()
    return found or [{**message, "content": ""}]


def tools_of(tools: Any) -> Any:
    """Tool descriptions in OpenAI's shape where they are in one of the others; all else as it stands."""
    if isinstance(tools, dict) and isinstance(tools.get("tools"), list):
        tools = tools["tools"]  # Bedrock's toolConfig
    if not isinstance(tools, list):
        return tools
    found: list[Any] = []
    for tool in tools:
        declared = next((_held(tool, name) for name in ("functionDeclarations", "function_declarations")), None)
        spec = _held(tool, "toolSpec")
        if isinstance(declared, list):
            found += declared
        elif isinstance(spec, dict):
            schema = spec.get("inputSchema")
            found.append(_function(spec, "inputSchema", schema.get("json") if isinstance(schema, dict) else schema))
        elif isinstance(_held(tool, "input_schema"), dict):
            found.append(_function(tool, "input_schema", tool["input_schema"]))
        else:
            found.append(tool)
    return found


def system_blocks(value: Any) -> Any:
    """The text or the blocks of a system prompt, of Gemini's too: `{"parts": […]}`."""
    parts = value.get("parts", value) if isinstance(value, dict) else value
    return [parts] if isinstance(parts, dict) else parts


def _function(tool: Mapping[str, Any], schema_name: str, schema: Any) -> dict[str, Any]:
    rest = {name: value for name, value in tool.items() if name not in (schema_name, "type")}
    return {"type": "function", "function": {**rest, "parameters": schema}}


def _typed(block: Mapping[str, Any]) -> bool:
    return isinstance(block.get("type"), str)


def _held(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _kind_of(block: Any) -> tuple[str, Any]:
    """What a block is ("call", "result" or "part") and what becomes of it."""
    if not isinstance(block, dict):
        return "part", block
    if _typed(block):
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
        return "result", _result(body, "toolUseId", _held(body, "content"))
    if name in ("functionResponse", "function_response"):
        return "result", {**_result(body, "id", [{"json": _held(body, "response")}]), "name": _held(body, "name")}
    return "part", {"type": "thinking", "text": _held(_held(body, "reasoningText"), "text")}


def _call(body: Any, id_name: str, arguments: str) -> Any:
    """A tool call in OpenAI's shape; what is no object is left for the check of tool calls to refuse."""
    if not isinstance(body, dict):
        return body
    call = {"type": "function", "function": {"name": body.get("name"), "arguments": body.get(arguments)}}
    return {"id": body[id_name], **call} if isinstance(body.get(id_name), str) else call


def _result(body: Any, id_name: str, content: Any) -> dict[str, Any]:
    blocks = content if isinstance(content, list) else ["" if content is None else content]
    return {"tool_call_id": _held(body, id_name), "content": [_result_part(block) for block in blocks]}


def _result_part(block: Any) -> Any:
    if isinstance(block, dict) and not _typed(block):
        if "json" in block:
            return {"type": "text", "text": json_text(block["json"], "a tool's result")}
        if "text" in block:
            return {"type": "text", "text": block["text"]}
        return {"type": next(iter(block), "empty"), **block}
    return block
