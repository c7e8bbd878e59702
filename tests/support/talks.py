"""Small conversations for the tests of digests, cleaning and splits."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from hypothesis import settings
from hypothesis import strategies as st

from ismdata.conversation import CONVERSATION_SCHEMA

#: Few and awkward texts, so that conversations collide in all but their structure.
TEXTS = st.sampled_from(["", "a", "b", "ab", "ba", "a\x00", "你", "💡", "\n"])
MAYBE = st.none() | TEXTS
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": MAYBE},
    optional={
        "train": st.booleans(),
        "weight": st.sampled_from([0.0, 1.0]),
        "name": MAYBE,
        "tool_calls": MAYBE,
        "tool_call_id": MAYBE,
        "reasoning_content": MAYBE,
    },
)
CONVERSATIONS = st.fixed_dictionaries(
    {"id": TEXTS, "source": TEXTS, "messages": st.lists(MESSAGES, max_size=3)},
    optional={"tools": MAYBE, "meta": MAYBE},
)
MANY = st.lists(CONVERSATIONS, max_size=12)


#: Two cores and slow oracles.
FEW = settings(deadline=None, max_examples=50)


def table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), CONVERSATION_SCHEMA)


def talk(*contents: str | None, number: int = 0, **fields: Any) -> dict[str, Any]:
    """A conversation of user and assistant in turn."""
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"id": f"t{number}", "source": f"talks:{number}", "messages": messages, **fields}


def said(row: dict[str, Any], *, roles: bool = True) -> str:
    """What a conversation says, as JSON: the oracle of its digest."""
    kept = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")[0 if roles else 1 :]
    return json.dumps([[[message.get(key) for key in kept] for message in row["messages"]], row.get("tools")])


def pieces(rows: pa.Table, borders: Sequence[int]) -> Iterator[pa.Table]:
    edges = [0, *sorted(border % (len(rows) + 1) for border in borders), len(rows)]
    return (rows.slice(low, high - low) for low, high in itertools.pairwise(edges))
