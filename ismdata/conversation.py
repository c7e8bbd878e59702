"""The canonical conversation: one Arrow row, whatever format it came from.

Everything downstream of `convert` knows this schema and nothing about corpora. A conversation is a row, its messages a
flattened child, so that the road after this point can work on whole columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

#: Format identifier of a converted folder's `index.json`.
FORMAT = "ismdata.conversations/1"

#: The roles a canonical message can have. Their positions are the integer codes used on the columnar road.
ROLES = ("system", "user", "assistant", "tool")
SYSTEM, USER, ASSISTANT, TOOL = range(4)

#: What the world calls the four roles (compared in lower case). `--role NAME=ROLE` adds to it or overrides it.
ROLE_NAMES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "usr": "user",
    "prompter": "user",
    "customer": "user",
    "client": "user",
    "patient": "user",
    "seeker": "user",
    "student": "user",
    "apprentice": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "claude": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "agent": "assistant",
    "therapist": "assistant",
    "counselor": "assistant",
    "doctor": "assistant",
    "supporter": "assistant",
    "listener": "assistant",
    "recommender": "assistant",
    "teacher": "assistant",
    "tutor": "assistant",
    "wizard": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "environment": "tool",
}

#: Role names whose content is the JSON text of a call, which becomes an assistant message with `tool_calls`.
TOOL_CALL_ROLE_NAMES = frozenset({"function_call", "tool_call"})

#: One message. `content` is null only beside `tool_calls`. `train` null means: assistant messages are trained.
#: `weight` scales the loss of an assistant message (0 = not trained). `tool_calls` is the JSON text of an OpenAI-style
#: list.
MESSAGE_TYPE = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("content", pa.string()),
        pa.field("train", pa.bool_()),
        pa.field("weight", pa.float64()),
        pa.field("name", pa.string()),
        pa.field("tool_calls", pa.string()),
        pa.field("tool_call_id", pa.string()),
        pa.field("reasoning_content", pa.string()),
    ]
)

#: One conversation. `source` is `FILE:PLACE`; `tools` the JSON text of an OpenAI-style list; `meta` a JSON object.
CONVERSATION_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("messages", pa.list_(pa.field("item", MESSAGE_TYPE, nullable=False)), nullable=False),
        pa.field("tools", pa.string()),
        pa.field("meta", pa.string()),
    ]
)

#: Why a record can be refused: stable slugs, the same in quarantine lines, indexes and documentation.
REASONS: dict[str, str] = {
    # convert
    "invalid_json": "the line is not valid JSON",
    "not_utf8": "the text is not valid UTF-8",
    "not_an_object": "the record is not of the kind its format calls for",
    "no_messages": "the conversation has no messages",
    "unknown_role": "a message has a role that no table maps",
    "missing_role": "a message has no role",
    "missing_content": "a message has neither content nor tool calls",
    "empty_answer": "an assistant message is empty and calls no tool",
    "invalid_content": "a message's content is neither text nor text parts",
    "unsupported_content": "a message holds images, audio or other parts that are not text",
    "lone_surrogate": "the text holds half of a surrogate pair, which UTF-8 cannot hold",
    "invalid_tool_call": "a tool call is not a JSON object with a name",
    "invalid_tools": "the tool descriptions are not a JSON list",
    "invalid_field": "a field has a value of the wrong type",
    "missing_field": "a field that the format requires is absent",
    "invalid_row": "a row of a table has more or fewer cells than its header",
    "many_speakers": "more speakers than two, and none is said to be the assistant",
    "broken_tree": "messages of a tree do not hang together: a parent is missing, or a message is its own ancestor",
    "too_many_paths": "the paths of a tree come to more text than can be held",
    "no_preference": "the record holds a better and a worse answer, and --preference does not say which to read",
    "rejected": "the record is marked as a bad answer",
    # convert, where cleaning is asked for
    "duplicate": "the conversation repeats an earlier one (--dedup)",
    "near_duplicate": "the conversation is nearly the same as an earlier one (--dedup near)",
    "too_few_turns": "the conversation has fewer turns than --min-turns",
    "excluded": "a message matches --exclude",
    "in_other": "the conversation also stands in the corpus that --against names",
    "not_sampled": "the conversation was not drawn by --sample",
    # pack
    "template_refused": "the chat template refused the conversation",
    "not_rendered": "the chat template leaves an answer or a tool call out",
    "text_lost": "the chat template leaves out, repeats or changes a text of the conversation",
    "not_traceable": "the chat template rewrites texts so that nothing says where they went",
    "invalid_arguments": "the arguments of a tool call are not JSON",
    "too_many_messages": "the conversation can only be rendered one answer at a time and is too long for that",
    "history_rewritten": "the chat template rewrites an earlier turn beyond what append can follow",
    "no_target": "no answer of the conversation is to be trained",
    "over_long": "the conversation does not fit the sequence length",
    "no_target_left": "truncation left no answer to train",
    "control_token_in_text": "the tokenizer turned a message's text into a control token",
}


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why one record cannot be used. `reason` is a key of REASONS; `detail` is the sentence a person reads."""

    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """One refused record, as it goes to `quarantine.jsonl`: `source` is `FILE:PLACE`, `record` whatever was read."""

    source: str
    reason: str
    detail: str
    record: Any

    def as_json(self) -> dict[str, Any]:
        return {"source": self.source, "reason": self.reason, "detail": self.detail, "record": self.record}
