"""Records read by a corpus format: their conversations, and their refusals."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st

from ismdata.conversation import ROLE_NAMES
from ismdata.convert.canonical import Rules, canonicalize
from ismdata.convert.corpus_format import Choices, Place, with_choices
from ismdata.convert.formats.registry import FORMATS
from ismdata.errors import Refused

PLACE = Place(prefix="corpus:", stem="corpus")
RULES = Rules(roles=ROLE_NAMES)

_WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n\0"), max_size=6).map(lambda text: f"w{text}w")
#: Texts that every format can hold.
PLAIN_TEXTS = st.one_of(_WORDS, st.sampled_from(["a: b", "x #1 y", "你好", "None", "e|EO M|f"]))


def conversations(name: str, record: Any, **choices: Any) -> list[dict[str, Any]]:
    """The canonical conversations of a record in the format `name`. Raises Refused."""
    corpus_format = with_choices(FORMATS[name], Choices(roles=ROLE_NAMES, **choices))
    return [canonicalize(draft, RULES) for draft in corpus_format.parse_record(record)]


def turns_of(conversation: dict[str, Any]) -> list[tuple[str, str | None]]:
    """The role and the content of each message."""
    return [(message["role"], message["content"]) for message in conversation["messages"]]


def read(name: str, record: Any, **choices: Any) -> list[list[tuple[str, str | None]]]:
    """The role and the content of each message of each conversation of a record. Raises Refused."""
    return [turns_of(conversation) for conversation in conversations(name, record, **choices)]


def refusal(name: str, record: Any, **choices: Any) -> tuple[str, str]:
    """The reason and the detail with which a record is refused."""
    with pytest.raises(Refused) as caught:
        conversations(name, record, **choices)
    return caught.value.reason, caught.value.detail
