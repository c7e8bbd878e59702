"""The canonical conversation: one Arrow row, whatever corpus format it comes from.

`convert` writes this schema and everything after it reads it. A conversation is a row and its messages are a list
column, so that later steps can work on whole columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

#: Format identifier of a converted folder's `index.json`.
FORMAT = "ismdata.conversations/1"

#: The roles of canonical messages. Columns of roles hold their indices in this tuple.
ROLES = ("system", "user", "assistant", "tool")
SYSTEM, USER, ASSISTANT, TOOL = range(4)

#: Names that corpora use for the four roles, in lower case. `--role NAME=ROLE` adds to them or overrides them.
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

#: Role names of messages whose content is the JSON text of a tool call: they become assistant messages with
#: `tool_calls`.
TOOL_CALL_ROLE_NAMES = frozenset({"function_call", "tool_call"})

#: One message. `content` is null only if there are `tool_calls`. If `train` is null, assistant messages are trained.
#: `weight` scales the loss of an assistant message (0: not trained). `tool_calls` is the JSON text of a list in
#: OpenAI's format.
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

#: One conversation. `source` is `FILE:PLACE`, `tools` the JSON text of a list in OpenAI's format, `meta` a JSON object.
CONVERSATION_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("messages", pa.list_(pa.field("item", MESSAGE_TYPE, nullable=False)), nullable=False),
        pa.field("tools", pa.string()),
        pa.field("meta", pa.string()),
    ]
)

#: Why a record or conversation is refused: stable keys, the same in quarantine files, indexes and documentation.
REASONS: dict[str, str] = {
    # convert
    "invalid_json": "the line is not valid JSON",
    "not_utf8": "the text is not valid UTF-8",
    "not_an_object": "the record is not of the JSON type that its format requires",
    "no_messages": "the conversation has no messages",
    "unknown_role": "a message has a role that is not known and not mapped with --role",
    "missing_role": "a message has no role",
    "missing_content": "a message has neither content nor tool calls",
    "empty_answer": "an assistant message is empty and calls no tool",
    "invalid_content": "a message's content is neither text nor text parts",
    "unsupported_content": "a message contains or comes with images, files, audio or other parts that are not text",
    "lone_surrogate": "the text contains half of a surrogate pair, which UTF-8 cannot encode",
    "invalid_tool_call": "a tool call is not a JSON object with a name",
    "invalid_tools": "the tool descriptions are not a JSON list",
    "invalid_field": "a field has a value of the wrong type",
    "missing_field": "a field that the format requires is missing",
    "invalid_row": "a row of a table has more or fewer cells than its header",
    "many_speakers": "there are more than two speakers, and nothing says which one is the assistant",
    "broken_tree": "the messages form no tree: a parent is missing, or a message is its own ancestor",
    "too_many_paths": "the paths through a tree have more text than fits into memory",
    "no_preference": "the record has a better and a worse answer, and --preference does not say which one to read",
    "rejected": "the record is labelled as a bad answer",
    # convert, where cleaning is asked for
    "duplicate": "the conversation repeats an earlier one (--dedup)",
    "near_duplicate": "the conversation is nearly the same as an earlier one (--dedup near)",
    "too_few_turns": "the conversation has fewer turns than --min-turns",
    "excluded": "a message matches --exclude",
    "in_other": "the conversation is also in the corpus that --against names",
    "not_sampled": "the conversation was not drawn by --sample",
    # pack
    "template_refused": "the chat template refused the conversation",
    "not_rendered": "the chat template leaves out an answer or a tool call",
    "text_lost": "the chat template leaves out, repeats or changes a text of the conversation",
    "not_traceable": "the chat template changes texts so much that their positions cannot be determined",
    "invalid_arguments": "the arguments of a tool call are not JSON",
    "too_many_messages": "the conversation can only be rendered one answer at a time and has too many messages",
    "history_rewritten": "the chat template rewrites an earlier turn in a way that --history append cannot follow",
    "no_target": "no answer of the conversation is trained",
    "over_long": "the conversation does not fit the sequence length",
    "no_target_left": "truncation leaves no answer to train",
    "control_token_in_text": "the tokenizer turns the text of a message into a control token",
}


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why one record or conversation cannot be used.

    Attributes:
        reason: A key of REASONS.
        detail: One sentence for the user.
    """

    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """One line of `quarantine.jsonl`: a refused record.

    Attributes:
        source: `FILE:PLACE`.
        reason: A key of REASONS.
        detail: One sentence for the user.
        record: What was read, as JSON.
    """

    source: str
    reason: str
    detail: str
    record: Any

    def as_json(self) -> dict[str, Any]:
        """The line as a JSON object."""
        return {"source": self.source, "reason": self.reason, "detail": self.detail, "record": self.record}
