"""Rows of messages that name their parents: every root is a thread, and every path to a leaf a conversation.

Rows with the id of a dialogue beside them are the format `dialogue_rows`, which reads its branches by `thread_drafts`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

from ismdata.choices import Paths
from ismdata.convert.corpus_format import Block, Draft, Place, fields_of
from ismdata.convert.formats.speakers import SpeakerFormat
from ismdata.convert.formats.trees import TreeRows, split_connected
from ismdata.convert.sources.grouping import group_by_key
from ismdata.errors import Refused, shown

#: Column names, in lower case and without anything but letters; the first one present is read.
_OWN = ("messageid", "msgid", "id", "uuid", "messageuuid", "postid", "commentid", "tweetid", "nodeid", "utteranceid")
_PARENTS = (
    "parentid", "parentmessageid", "parentuuid", "parentmessageuuid", "parent", "parentmessage", "replyto", "replytoid",
    "inreplyto", "inreplytoid", "replytomessageid", "inresponseto", "inresponsetotweetid", "parentmsgid",
)  # fmt: skip
_SPEAKERS = ("role", "speaker", "author", "from", "sender", "user", "speakerid", "speakername", "username", "authorid")
_TEXTS = ("text", "content", "message", "utterance", "value", "body")
#: Fields of messages in a list that say that it is not one conversation, if they have several values.
_THREADS = frozenset({"threadid", "thread", "conversationid", "dialogueid", "dialogid", "convid"})
_PLACES = _THREADS | set(_PARENTS)


@dataclass(frozen=True, kw_only=True)
class Links:
    """The names of the columns with a message's id and that of its parent, None for one that is missing."""

    own: str | None
    parent: str | None


@lru_cache(maxsize=256)
def _columns(names: tuple[str, ...]) -> tuple[Links, str | None, str | None]:
    plain: dict[str, str] = {}
    for name in names:
        plain.setdefault(plain_name(name), name)

    def first(known: Sequence[str]) -> str | None:
        return next((plain[name] for name in known if name in plain), None)

    return Links(own=first(_OWN), parent=first(_PARENTS)), first(_SPEAKERS), first(_TEXTS)


@lru_cache(maxsize=4096)
def plain_name(name: str) -> str:
    """The name of a column in lower case, without anything but letters and digits."""
    return re.sub(r"[\W_]+", "", name.lower())


@lru_cache(maxsize=4096)
def is_place(name: str) -> bool:
    """Whether a field of a message says to which message or thread it belongs.

    >>> is_place("parentUuid"), is_place("parents")
    (True, False)
    """
    return plain_name(name) in _PLACES


def check_one_path(messages: Sequence[Any]) -> None:
    """Refuse a list of messages that has branches or several threads: in order they are no conversation."""
    fields = [message for message in messages if isinstance(message, dict)]
    names = {name for message in fields for name in message if isinstance(name, str) and is_place(name)}
    for name in names:
        values = {str(message[name]) for message in fields if message.get(name) is not None}
        if plain_name(name) in _THREADS and len(values) > 1:
            found = f"the messages have {len(values)} different values of {name}"
            raise Refused(
                "broken_tree", f"{found}; expected one conversation. Write each as a record, or each message as one"
            )
    if names and not is_chain(fields):
        raise Refused(
            "broken_tree",
            f"the messages have branches: by {', '.join(sorted(names))}, one answers another than the one before it; "
            "expected one path. Write each path as a record, or each message as a record with its id and its parent's",
        )


def find_links(row: Mapping[str, Any]) -> Links:
    """The columns of a row that link it to its parent."""
    return _columns(tuple(row))[0] if all(isinstance(name, str) for name in row) else Links(own=None, parent=None)


def link_id(value: Any) -> str | None:
    """The id of a message as text, None if there is none. Tables give numbers in more than one type.

    >>> link_id(7), link_id("7.0"), link_id("")
    ('7', '7', None)
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    text = str(value).strip()
    return text.removesuffix(".0") if text.replace(".", "", 1).isdigit() else text or None


def row_links(row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The id of a row and that of its parent."""
    links = find_links(row)
    own, parent = (link_id(row.get(name)) if name else None for name in (links.own, links.parent))
    return own, parent


def thread_drafts(
    rows: Sequence[dict[str, Any]], fields: tuple[str, str], of_format: SpeakerFormat, tree: Paths, meta: dict[str, Any]
) -> list[Draft]:
    """One draft per path of the threads that rows form.

    Args:
        rows: The rows, each with an id, in order.
        fields: The columns of the speaker and of the text.
        of_format: The format that says which speaker is the assistant.
        tree: Which paths are read.
        meta: What becomes the metadata of each conversation.

    Returns:
        The drafts, depth-first. Their ids are those of their last messages.

    Raises:
        Refused: If a parent is missing, or if there are more than two speakers.
    """
    found: list[Draft] = []
    used = {*fields, *(name for row in rows for name in (find_links(row).own, find_links(row).parent))}
    speakers = [_speaker(row.get(fields[0])) for row in rows]
    root = row_links(rows[0])[0]
    _check_tree([row_links(row) for row in rows])
    for part, roles in of_format.roles_of(speakers):
        named = []
        for row, role in zip(rows, roles, strict=True):
            own, parent = row_links(row)
            rest = {name: value for name, value in row.items() if name not in used and name not in meta}
            named.append({**rest, "message_id": own, "parent_id": parent, "role": role, "text": row.get(fields[1])})
        drafts = TreeRows(roles=of_format.roles, tree=tree).row_drafts(named, {"message_tree_id": None, **meta})
        found += [
            replace(one, split_group=root, id_suffix="/".join(filter(None, (one.id_suffix, part)))) for one in drafts
        ]
    return found


def _check_tree(links: Sequence[tuple[str | None, str | None]]) -> None:
    """Raise Refused for ids that are missing or not unique, and for messages that are their own ancestors."""
    owns = [own for own, _ in links]
    if None in owns or len(set(owns)) < len(owns):
        raise Refused("broken_tree", "messages have no id of their own, or the same; expected each id once")
    known = set(owns)
    replies: dict[str | None, list[str | None]] = {}
    for own, parent in links:
        replies.setdefault(parent, []).append(own)
    reached, waiting = 0, [own for own, parent in links if parent not in known]
    while waiting:
        reached += 1
        waiting += replies.get(waiting.pop(), ())
    if reached < len(links):
        raise Refused("broken_tree", "a message is its own ancestor; expected parents that lead to a first message")


def _speaker(value: Any) -> str:
    name = link_id(value)
    if name is None:
        raise Refused("missing_role", f"a message of the thread has the speaker {shown(value)}; expected a name")
    return name


def is_chain(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each row but the first answers the one before it, or no row answers another one of them at all."""
    links = [row_links(row) for row in rows]
    owns = {own for own, _ in links} - {None}
    if not any(parent in owns for _, parent in links):
        return True
    return links[0][1] not in owns and all(
        parent is not None and parent == before for (before, _), (_, parent) in pairwise(links)
    )


@dataclass(frozen=True, kw_only=True)
class Threads(SpeakerFormat):
    """A record is the list of the rows below one root."""

    tree: Paths = "all"

    @property
    def expects(self) -> str:
        return "rows of id, parent_id, role, text"

    def matches(self, record: Any) -> bool:
        if not isinstance(record, dict) or not all(isinstance(name, str) for name in record):
            return False
        links, speaker, text = _columns(tuple(record))
        if links.own is None or links.parent is None or speaker is None or text is None:
            return False
        own, parent = row_links(record)
        linked = parent is not None or record[links.parent] in (None, "")
        return own is not None and linked and isinstance(record[speaker], str) and isinstance(record[text], str)

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        split = partial(split_connected, links=row_links, columns=None, by_root=True)
        for block, place in group_by_key(blocks, _has_id):
            groups = sorted((part for group in block.groups for part in split(group)), key=lambda part: part.number)
            yield replace(block, groups=groups), place

    def parse_record(self, record: Any) -> Sequence[Draft]:
        rows = [fields_of(row) for row in (record if isinstance(record, list) else [record])]
        if not rows:
            raise Refused("no_messages", "the thread has no rows")
        _, speaker, text = _columns(tuple(rows[0]))
        if speaker is None or text is None:
            raise Refused("missing_field", f"the row is {shown(rows[0])}; expected {self.expects}")
        return thread_drafts(rows, (speaker, text), self, self.tree, {})


def _has_id(row: Any) -> Hashable:
    """The same for all rows, so that threads are found in the whole file. Raises Refused for a row without an id."""
    fields = fields_of(row)
    if row_links(fields)[0] is None:
        name = find_links(fields).own or "id"
        raise Refused("missing_field", f"{name} is {shown(fields.get(name))}; expected the message's id")
    return None


THREADS = Threads()
