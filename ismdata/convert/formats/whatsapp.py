"""A chat as WhatsApp exports it: a text in which each message begins with its time and its sender."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.convert.corpus_format import Draft, kind_of
from ismdata.convert.formats.people_chats import NOTICES, PeopleChat, Said
from ismdata.convert.sources.chat_logs import TIME
from ismdata.errors import Refused

_SENDER = re.compile(r"[\u200e\u200f\u202a~ \u00a0]*([^:\n]{1,80}?)\u202c?: ?", re.DOTALL)
#: Texts in the place of a file: marked by iOS; in angle brackets or behind a file's name on Android.
_OMITTED = re.compile(r"\u200e.*|<[^<>\n]{3,60}>|\u200e?\S+\.\w{2,5} \([^()\n]{3,40}\)|null", re.DOTALL)
_DELETED = frozenset({"this message was deleted", "you deleted this message", "diese nachricht wurde gelöscht."})


@dataclass(frozen=True, kw_only=True)
class WhatsApp(PeopleChat):
    """A record is the text of a file."""

    expects: str = "a text with the time and the sender before each message, as WhatsApp exports chats"
    plain_text: bool = True

    def matches(self, record: Any) -> bool:
        return isinstance(record, str) and TIME.match(record.lstrip("\ufeff")) is not None

    def parse_record(self, record: Any) -> Sequence[Draft]:
        if not isinstance(record, str):
            raise Refused("not_an_object", f"the record is {kind_of(record)}; expected the text of a chat")
        if (byte := next((ord(char) for char in record if "\udc80" <= char <= "\udcff"), None)) is not None:
            raise Refused(
                "not_utf8", f"the text holds the byte 0x{byte - 0xDC00:02x}; expected UTF-8. Convert the file"
            )
        starts = list(TIME.finditer(record))
        if not starts or record[: starts[0].start()].strip("\ufeff \r\n"):
            raise Refused(
                "invalid_row", "the text does not begin with the time of a message; expected a chat of WhatsApp"
            )
        said: list[Said] = []
        ignored: list[str] = []
        ends = [*(match.start() for match in starts[1:]), len(record)]
        for match, end in zip(starts, ends, strict=True):
            piece = record[match.end() : end].rstrip("\r\n")
            sender = _SENDER.match(piece)
            if sender is None:
                ignored.append(NOTICES)
                continue
            text = piece[sender.end() :].replace("\r\n", "\n")
            omitted = _OMITTED.fullmatch(text) is not None or text.strip().lower() in _DELETED
            name = sender.group(1).strip()
            said.append(Said(by=name, name=name, text="" if omitted else text))
        return self.drafts(said, extra={}, ignored=ignored)


WHATSAPP = WhatsApp()
