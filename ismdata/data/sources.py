"""Which corpus a conversation comes from, as far as packed shards tell: `convert` makes ids from the file's name."""

from __future__ import annotations

import re

#: STEM-NUMBER, with what several conversations of one record append; `#k` marks a piece of a split conversation.
_MADE_ID = re.compile(r"(.+)-([1-9][0-9]*)(/.*)?(#[0-9]+)?", re.DOTALL)


def source_of(conversation_id: str) -> str | None:
    """Read the name of the corpus from an id that `convert` made.

    Args:
        conversation_id: The id of a conversation or of a piece of one.

    Returns:
        The name of the file, without its ending; None for an id that the corpus brought along in another form. An own
        id of the same form, as `a-7`, is read too, so take a name seriously only if several conversations have it.

    Example:
        >>> source_of("daily-train-12#0"), source_of("talks-3/b"), source_of("c0ffee")
        ('daily-train', 'talks', None)
    """
    found = _MADE_ID.fullmatch(conversation_id)
    return found[1] if found else None
