"""Chats of people, one talk per file, as their programs export them: Telegram, Slack, Discord, Messenger, Google Chat.

Who is the assistant is decided as in all dialogues of two people. What has no text (pictures, stickers, calls, notices)
is left out and counted.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.convert.corpus_format import Block, Draft, Place, fields_of, kind_of
from ismdata.convert.formats.fields import missing_field
from ismdata.convert.formats.speakers import SpeakerFormat, assign_roles, to_messages
from ismdata.convert.sources.grouping import expand_records, parse_number
from ismdata.errors import Refused

_MEDIA = "messages without text: pictures, stickers, files, calls"
_FILES = "pictures and files beside a text"
NOTICES = "notices, such as that somebody joined"


@dataclass(frozen=True, kw_only=True)
class Said:
    """A message: who wrote it (an id and a name), its text, and whether there is more than the text."""

    by: str
    name: str
    text: str
    files: bool = False


@dataclass(frozen=True, kw_only=True)
class PeopleChat(SpeakerFormat):
    """The base of these formats."""

    plain_text: bool = False

    def drafts(
        self,
        said: Iterable[Said],
        *,
        id: Any = None,
        extra: Mapping[str, Any],
        ignored: list[str],
        others: Sequence[str] = (),
        suffix: str = "",
    ) -> list[Draft]:
        """The conversations of a chat, two under `--assistant both`. Raises Refused.

        Args:
            said: Its messages, in order.
            id: The id of the chat.
            extra: What else is known of the chat.
            ignored: Receives names of what is left out.
            others: Names of people who are in the chat and say nothing.
            suffix: Tells several conversations of a chat apart.
        """
        kept: list[Said] = []
        for one in said:
            if one.text.strip():
                kept.append(one)
                ignored += [_FILES] * one.files
            else:
                ignored.append(_MEDIA)
        if not kept:
            raise Refused("no_messages", "the chat has no message with a text")
        names = _distinct_names(kept)
        speakers = [names[one.by] for one in kept]
        assign_roles([*speakers, *others], self.roles, self.assistant)  # refuses more than two people
        return [
            Draft(
                messages=to_messages(roles, [one.text for one in kept]),
                id=id,
                extra=dict(extra),
                ignored=ignored,
                id_suffix="/".join(filter(None, (suffix, part))),
            )
            for part, roles in self.roles_of(speakers)
        ]


def _distinct_names(said: Sequence[Said]) -> dict[str, str]:
    """The name of each person by id, with the id behind a name that two people have."""
    names: dict[str, str] = {}
    for one in said:
        if one.by not in names:
            names[one.by] = f"{one.name} ({one.by})" if one.name in names.values() else one.name
    return names


def _first(value: Any) -> dict[str, Any]:
    """The first object in a list, an empty one if there is none."""
    return next((one for one in value if isinstance(one, dict)), {}) if isinstance(value, list) else {}


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise Refused("invalid_field", f"{name} is {kind_of(value)}; expected a list of messages, each an object")
    return value


def _text(value: Any, number: int) -> str:
    """A text, "" for null. Raises Refused for anything else."""
    if value is None or isinstance(value, str):
        return value or ""
    raise Refused("invalid_content", f"message {number} has a text that is {kind_of(value)}; expected a string")


def _name(*values: Any) -> str:
    """The first value that is a name or an id, as text. Raises Refused if there is none."""
    for value in values:
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
    raise Refused("missing_role", "a message does not say who wrote it; expected a name or an id")


@dataclass(frozen=True, kw_only=True)
class Telegram(PeopleChat):
    """A record is a chat, or a whole export, whose chats become records."""

    expects: str = "messages[].from/text with type and from_id, as Telegram exports chats"

    def matches(self, record: Any) -> bool:
        return any(map(_is_telegram, _telegram_chats(record) or [record]))

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        return expand_records(blocks, _telegram_chats)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        if "messages" not in fields:
            raise missing_field(fields, "'messages'")
        said, ignored = [], []
        for number, one in enumerate(_objects(fields.pop("messages"), "messages"), 1):
            if one.get("type") != "message":
                ignored.append(NOTICES)
                continue
            parts = one.get("text")
            pieces = [
                part.get("text") if isinstance(part, dict) else part
                for part in (parts if isinstance(parts, list) else [parts])
            ]
            said.append(
                Said(
                    by=_name(one.get("from_id"), one.get("from")),
                    name=_name(one.get("from"), one.get("from_id")),
                    text="".join(_text(piece, number) for piece in pieces),
                    files=any(name in one for name in ("photo", "file", "media_type", "poll", "location_information")),
                )
            )
        chat = fields.get("name")
        if fields.get("type") == "bot_chat" and isinstance(chat, str) and chat.lower() not in self.roles:
            # The chat has the name of the bot.
            bot = Telegram(roles={**self.roles, chat.lower(): "assistant"}, assistant=self.assistant)
            drafts = bot.drafts(said, id=fields.pop("id", None), extra=fields, ignored=ignored)
            for draft in drafts:
                for message in draft.messages:
                    message["role"] = "assistant" if message["role"] == chat else message["role"]
            return drafts
        return self.drafts(said, id=fields.pop("id", None), extra=fields, ignored=ignored)


def _is_telegram(record: Any) -> bool:
    first = _first(record.get("messages")) if isinstance(record, dict) else {}
    return first.get("type") in ("message", "service") and ("from_id" in first or "actor" in first)


def _telegram_chats(record: Any) -> list[Any]:
    """The chats of a whole export, those that were left among them; none for a record that is a chat."""
    found = []
    for name in ("chats", "left_chats"):
        chats = record.get(name) if isinstance(record, dict) else None
        listed = chats.get("list") if isinstance(chats, dict) else None
        found += listed if isinstance(listed, list) else []
    return found if any(map(_is_telegram, found)) else []


#: Kinds of Slack's messages that people or bots write.
_SLACK_WRITTEN = (None, "bot_message", "file_share", "thread_broadcast", "me_message")
_SLACK_LINK = re.compile(r"<((?:https?|mailto)[^|>\s]*)(?:\|([^>]*))?>")


@dataclass(frozen=True, kw_only=True)
class Slack(PeopleChat):
    """A record is the list of the messages of one day. Each thread is a conversation, and so is the rest."""

    expects: str = "[{type: message, user, text, ts}, …], as Slack exports channels"

    def matches(self, record: Any) -> bool:
        first = _first(record)
        return first.get("type") == "message" and "ts" in first and ("text" in first or "subtype" in first)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        ignored: list[str] = []
        threads: dict[str, list[Said]] = {}
        others: list[str] = []
        rows = _objects(record, "the record")
        replied = {row["thread_ts"] for row in rows if isinstance(row.get("thread_ts"), str)}
        for number, row in enumerate(rows, 1):
            if row.get("type") != "message" or row.get("subtype") not in _SLACK_WRITTEN:
                ignored.append(NOTICES)
                if isinstance(row.get("user"), str):
                    others.append(row["user"])
                continue
            own = row.get("thread_ts", row.get("ts"))
            thread = own if isinstance(own, str) and own in replied else ""
            by = _name(row.get("user"), row.get("username"), row.get("bot_id"))
            text = _slack_text(_text(row.get("text"), number))
            threads.setdefault(thread, []).append(Said(by=by, name=by, text=text, files=bool(row.get("files"))))
        if not threads:
            raise Refused("no_messages", "the day has no message that somebody wrote")
        found = []
        for thread, said in threads.items():
            suffix = f"thread-{thread}" if thread else "channel" if len(threads) > 1 else ""
            found += self.drafts(said, extra={}, ignored=ignored, others=() if thread else others, suffix=suffix)
            ignored = []
        return found


def _slack_text(text: str) -> str:
    """A text without Slack's marks of links and its three entities.

    >>> _slack_text("see <http://a.b|here> &amp; <http://c.d>")
    'see here & http://c.d'
    """
    return html.unescape(_SLACK_LINK.sub(lambda link: link.group(2) or link.group(1), text))


@dataclass(frozen=True, kw_only=True)
class Discord(PeopleChat):
    """A record is a channel."""

    expects: str = "messages[].author.name/content, as DiscordChatExporter writes channels"

    def matches(self, record: Any) -> bool:
        first = _first(record.get("messages")) if isinstance(record, dict) else {}
        author = first.get("author")
        return isinstance(author, dict) and "name" in author and isinstance(first.get("content"), str)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        said, ignored = [], []
        for number, one in enumerate(_objects(fields.pop("messages", None), "messages"), 1):
            author = one.get("author")
            if one.get("type", "Default") not in ("Default", "Reply", 0, 19) or not isinstance(author, dict):
                ignored.append(NOTICES)
                continue
            by = _name(author.get("id"), author.get("name"))
            files = bool(one.get("attachments") or one.get("stickers") or one.get("embeds"))
            text = _text(one.get("content"), number)
            said.append(Said(by=by, name=_name(author.get("name"), by), text=text, files=files))
        channel = fields.get("channel")
        own_id = channel.get("id") if isinstance(channel, dict) else None
        return self.drafts(said, id=own_id, extra=fields, ignored=ignored)


#: The names of the sender, the text and the time in the exports of Messenger and Instagram, older and newer.
_META = (("sender_name", "content", "timestamp_ms"), ("senderName", "text", "timestamp"))


@dataclass(frozen=True, kw_only=True)
class Messenger(PeopleChat):
    """A record is a chat, its newest message first."""

    expects: str = "participants, messages[].sender_name/content, as Messenger and Instagram export chats"

    def matches(self, record: Any) -> bool:
        return (
            isinstance(record, dict)
            and isinstance(record.get("participants"), list)
            and _meta_names(record) is not None
        )

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        names = _meta_names(fields)
        if names is None:
            raise missing_field(fields, self.expects)
        sender, content, time = names
        rows = _objects(fields.pop("messages"), "messages")
        times = [parse_number(row.get(time)) for row in rows]
        if any(one is None for one in times):
            raise Refused("missing_field", f"a message has no {time}; expected one, since the order depends on it")
        # Equal times: the later message stands first in the file.
        order = sorted(range(len(rows)), key=lambda at: (times[at] or 0, -at))
        if times and (times[0] or 0) < (times[-1] or 0):
            order = sorted(range(len(rows)), key=lambda at: times[at] or 0)
        said = []
        for at in order:
            name = _utf8(_name(rows[at].get(sender)))
            files = any(
                rows[at].get(one) for one in ("photos", "videos", "audio_files", "files", "gifs", "share", "media")
            )
            said.append(Said(by=name, name=name, text=_utf8(_text(rows[at].get(content), at + 1)), files=files))
        fields = {name: value for name, value in fields.items() if name not in ("participants", "magic_words")}
        return self.drafts(said, extra=fields, ignored=[])


def _meta_names(record: Mapping[str, Any]) -> tuple[str, str, str] | None:
    first = _first(record.get("messages"))
    return next((names for names in _META if names[0] in first and names[2] in first), None)


def _utf8(text: str) -> str:
    """A text of Meta's exports, which write each byte of UTF-8 as a character.

    >>> _utf8("Ã¼ber"), _utf8("über"), _utf8("你")
    ('über', 'über', '你')
    """
    try:
        return text if text.isascii() else text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


@dataclass(frozen=True, kw_only=True)
class GoogleChat(PeopleChat):
    """A record is a chat. Each topic with several messages is a conversation, and so is the rest."""

    expects: str = "messages[].creator.name/text, as Google Takeout exports chats"

    def matches(self, record: Any) -> bool:
        first = _first(record.get("messages")) if isinstance(record, dict) else {}
        return isinstance(first.get("creator"), dict) and "created_date" in first

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        said = []
        for number, one in enumerate(_objects(fields.pop("messages", None), "messages"), 1):
            creator = one.get("creator")
            who = creator if isinstance(creator, dict) else {}
            by = _name(who.get("email"), who.get("name"))
            files = bool(one.get("attached_files"))
            said.append(Said(by=by, name=_name(who.get("name"), by), text=_text(one.get("text"), number), files=files))
        return self.drafts(said, extra=fields, ignored=[])


TELEGRAM = Telegram()
SLACK = Slack()
DISCORD = Discord()
MESSENGER = Messenger()
GOOGLE_CHAT = GoogleChat()
