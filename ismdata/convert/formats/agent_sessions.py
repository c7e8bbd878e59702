"""Sessions of coding agents: the lines of Claude Code and of Codex."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

from ismdata.convert.corpus_format import Block, CorpusFormat, Draft, Place, fields_of
from ismdata.convert.formats.messages import OPENAI
from ismdata.convert.sources.grouping import Group, GroupBlock, group_by_key, group_by_start
from ismdata.errors import Refused, shown

_OTHER_BRANCHES = "messages of other branches"
_NO_SESSION = ""


@dataclass(frozen=True, kw_only=True)
class ClaudeCode(CorpusFormat):
    """A record is the list of the lines of a session. Each beginning in it is a conversation."""

    expects: str = "lines of sessionId, uuid, parentUuid, message, as Claude Code writes sessions"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        return (
            isinstance(record, dict)
            and {"sessionId", "parentUuid", "uuid"} <= record.keys()
            and isinstance(record.get("message"), dict)
        )

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        for place, run in groupby(blocks, key=itemgetter(1)):
            groups = [group for block, _ in group_by_key(run, _session) for group in block.groups]
            sessions = [group for group in groups if group.refusal is not None or _session_of(group) != _NO_SESSION]
            # Lines about the file, such as summaries, are counted with its first session.
            if sessions and len(sessions) < len(groups):
                about = [row for group in groups if group not in sessions for row in group.rows]
                first = next((group for group in sessions if group.refusal is None), None)
                if first is not None:
                    first.rows += about
                    groups = sessions
            yield GroupBlock(groups=groups), place

    def parse_record(self, record: Any) -> Sequence[Draft]:
        rows = [fields_of(row) for row in (record if isinstance(record, list) else [record])]
        ignored = [f"lines of type {row.get('type')!r}" for row in rows if not _is_message(row)]
        ignored += ["messages of subagents" for row in rows if _is_message(row) and row.get("isSidechain") is True]
        said = [row for row in rows if _is_message(row) and row.get("isSidechain") is not True]
        if not said:
            raise Refused("no_messages", "the session has no message of a user or an assistant")
        unnamed = next((row for row in said if not isinstance(row.get("uuid"), str)), None)
        if unnamed is not None:
            raise Refused("missing_field", f"the uuid of a message is {shown(unnamed.get('uuid'))}; expected a string")
        above = {row["uuid"]: row for row in rows if isinstance(row.get("uuid"), str)}
        found = []
        beginnings = _beginnings(said, above)
        for number, own in enumerate(beginnings.values(), 1):
            kept = _kept(own, above)
            ignored += [_OTHER_BRANCHES] * (len(own) - len(kept))
            (draft,) = OPENAI.parse_record({"messages": _merged(kept, ignored)})
            session = own[0].get("sessionId")
            extra = {name: own[0].get(name) for name in ("cwd", "gitBranch", "version", "timestamp")}
            found.append(
                replace(
                    draft,
                    id=session if isinstance(session, str) else None,
                    extra=extra,
                    ignored=[*draft.ignored, *ignored],
                    id_suffix=str(number) if len(beginnings) > 1 else "",
                )
            )
            ignored = []
        return found


def _session(row: Any) -> str:
    session = fields_of(row).get("sessionId")
    return session if isinstance(session, str) else _NO_SESSION


def _session_of(group: Group) -> str:
    block, row = group.rows[0]
    return _session(block.record(row))


def _is_message(row: Mapping[str, Any]) -> bool:
    return row.get("type") in ("user", "assistant") and isinstance(row.get("message"), dict)


def _line_above(row: Mapping[str, Any], above: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row and all rows above it, the row first. Raises Refused if one is missing or its own ancestor."""
    path: list[dict[str, Any]] = [dict(row)]
    seen = {row.get("uuid")}
    while (parent := path[-1].get("parentUuid")) is not None:
        if not isinstance(parent, str) or parent not in above:
            raise Refused("broken_tree", f"the parent {shown(parent)} is missing; expected all lines of the session")
        if parent in seen:
            raise Refused("broken_tree", f"the message {shown(parent)} is its own ancestor; expected a tree")
        seen.add(parent)
        path.append(above[parent])
    return path


def _beginnings(said: Sequence[dict[str, Any]], above: Mapping[str, dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    """The messages by the row at which their line begins."""
    roots: dict[Any, Any] = {}
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in said:
        parent = row.get("parentUuid")
        root = roots.get(parent) if isinstance(parent, str) else None
        if root is None:
            root = _line_above(row, above)[-1].get("uuid")
        roots[row.get("uuid")] = root
        found.setdefault(root, []).append(row)
    return found


def _kept(rows: Sequence[dict[str, Any]], above: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages above the last one, with the results of all their calls and all parts of their answers."""
    on_path = {row.get("uuid") for row in _line_above(rows[-1], above)}
    answers = {_answer_id(row) for row in rows if row.get("uuid") in on_path} - {None}
    kept = [row for row in rows if row.get("uuid") in on_path or _answer_id(row) in answers]
    calls = {str(block.get("id")) for row in kept for block in _blocks(row) if block.get("type") == "tool_use"}
    ids = {id(row) for row in kept}
    return [row for row in rows if id(row) in ids or _results(row) & calls]


def _answer_id(row: Mapping[str, Any]) -> str | None:
    own = row["message"].get("id")
    return own if row.get("type") == "assistant" and isinstance(own, str) else None


def _blocks(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = row["message"].get("content")
    return [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []


def _results(row: Mapping[str, Any]) -> set[str]:
    return {
        block["tool_use_id"]
        for block in _blocks(row)
        if block.get("type") == "tool_result" and isinstance(block.get("tool_use_id"), str)
    }


def _merged(rows: Sequence[dict[str, Any]], ignored: list[str]) -> list[dict[str, Any]]:
    """The messages; the lines of one answer, each a block of it, become one message."""
    messages: list[dict[str, Any]] = []
    answers: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("isMeta") is True or row.get("isApiErrorMessage") is True:
            ignored.append("notes of the program")
            continue
        content, own = row["message"].get("content"), _answer_id(row)
        last = messages[-1] if messages and own is None and row.get("type") == "assistant" else {}
        before = answers.get(own or "") or (last if last.get("role") == "assistant" else {})
        if isinstance(content, list) and isinstance(before.get("content"), list):
            before["content"] += content
            continue
        message = {
            "role": row["message"].get("role"),
            "content": list(content) if isinstance(content, list) else content,
        }
        messages.append(message)
        if own is not None and isinstance(content, list):
            answers[own] = message
    return messages


@dataclass(frozen=True, kw_only=True)
class Codex(CorpusFormat):
    """A record is the list of the lines of a session, which begins with `session_meta`."""

    expects: str = "lines of timestamp, type, payload, as Codex writes sessions"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        return (
            isinstance(record, dict)
            and isinstance(record.get("payload"), dict)
            and record.get("type") in ("session_meta", "response_item")
        )

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        return group_by_start(blocks, lambda row: isinstance(row, dict) and row.get("type") == "session_meta")

    def parse_record(self, record: Any) -> Sequence[Draft]:
        rows = [fields_of(row) for row in (record if isinstance(record, list) else [record])]
        ignored: list[str] = []
        messages: list[dict[str, Any]] = []
        meta: dict[str, Any] = {}
        for row in rows:
            payload = row.get("payload")
            if row.get("type") == "session_meta" and isinstance(payload, dict):
                meta = dict(payload)
            elif row.get("type") == "response_item" and isinstance(payload, dict):
                _add_item(payload, messages, ignored)
            else:
                ignored.append(f"lines of type {row.get('type')!r}")
        own_id = meta.pop("id", None)
        (draft,) = OPENAI.parse_record({"messages": messages})
        own_id = own_id if isinstance(own_id, str) else None
        return [replace(draft, id=own_id, extra=meta, ignored=[*draft.ignored, *ignored])]


def _add_item(item: Mapping[str, Any], messages: list[dict[str, Any]], ignored: list[str]) -> None:
    """Add an item of OpenAI's Responses API to messages. Raises Refused."""
    kind = item.get("type")
    if kind == "message":
        messages.append({"role": item.get("role"), "content": item.get("content")})
    elif kind in ("function_call", "custom_tool_call"):
        arguments = item.get("arguments") if kind == "function_call" else {"input": item.get("input")}
        call = {
            "id": item.get("call_id"),
            "type": "function",
            "function": {"name": item.get("name"), "arguments": arguments},
        }
        last = messages[-1] if messages else {}
        if last.get("role") == "assistant":
            last.setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind in ("function_call_output", "custom_tool_call_output"):
        output = item.get("output")
        content = output.get("content") if isinstance(output, dict) else output
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    elif kind in ("reasoning", "ghost_snapshot"):
        ignored.append(f"items of type {kind!r}")
    else:
        raise Refused("unsupported_content", f"the session has an item of type {shown(kind)}; expected text and calls")


CLAUDE_CODE = ClaudeCode()
CODEX = Codex()
