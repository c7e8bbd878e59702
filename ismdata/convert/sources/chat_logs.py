"""How the messages of a chat log begin: a text of which messages may have several lines."""

from __future__ import annotations

import re

#: The time before a message of WhatsApp. iOS puts it in brackets, Android a dash behind it. Date and clock follow the
#: phone's language, and so do the spaces, some of which do not break.
_DATE = r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}\.?,?[ \u00a0\u202f]\d{1,2}[:.]\d{2}(?:[:.]\d{2})?"
TIME = re.compile(
    rf"^[\u200e\u200f]?(?:\[{_DATE}[^\]\d\n]{{0,8}}\][ \u00a0]?|{_DATE}[^-\d\n]{{0,8}}? - )",
    re.MULTILINE,
)


def is_chat_log(head: bytes) -> bool:
    """Whether a text begins with the time of a message."""
    return TIME.match(head.decode("utf-8", errors="replace").lstrip("\ufeff \r\n")) is not None
