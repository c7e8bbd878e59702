"""Why a conversation cannot be rendered: one exception per reason.

Each class has the key of `conversation.REASONS` under which `pack` writes the conversation to quarantine.
"""

from __future__ import annotations

from ismdata.errors import Refused

#: The longest conversation, in messages, that is rendered once or more per answer: the time grows with their square.
MOST_MESSAGES = 2000


class CannotRender(Refused):
    """Base of all that makes one conversation unusable under a chat template. `reason` is fixed per class."""

    def __init__(self, detail: str) -> None:
        super().__init__(self.reason, detail)


class TemplateRefused(CannotRender):
    """The template raised an exception for this conversation; `detail` has the template's own message."""

    reason = "template_refused"


class CannotEscape(CannotRender):
    """The conversation's text leaves no characters with which control tokens in it could be escaped."""

    reason = "template_refused"


class NotRendered(CannotRender):
    """The template leaves out an answer or one of its tool calls."""

    reason = "not_rendered"


class TextLost(CannotRender):
    """The template leaves out, repeats or changes a text of the conversation."""

    reason = "text_lost"


class NotTraceable(CannotRender):
    """The template changes texts so much that their positions in the rendering cannot be determined."""

    reason = "not_traceable"


class HistoryRewritten(CannotRender):
    """The template moves or changes earlier turns in a way that `--history append` cannot follow."""

    reason = "history_rewritten"


class InvalidArguments(CannotRender):
    """The arguments of a tool call are not JSON."""

    reason = "invalid_arguments"


class TooManyMessages(CannotRender):
    """The conversation needs at least one rendering per answer and is too long for that."""

    reason = "too_many_messages"

    def __init__(self, found: int) -> None:
        super().__init__(
            f"{found} messages, which the template can only render one answer at a time (tools, names, blank messages, "
            f"or history that it rewrites); expected at most {MOST_MESSAGES}. Cut the conversation into several"
        )
