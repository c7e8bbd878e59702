"""The file of `--mapping`: a short TOML file that says how to read a corpus of any shape. See docs/mapping.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ismdata.choices import Side
from ismdata.conversation import ROLES
from ismdata.convert.corpus_format import kind_of
from ismdata.convert.formats.mapped import Mapped
from ismdata.errors import UsageError, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class _Key:
    """What a key of the file can hold: `expected` in words, `accepts` as a check, `about` for who reads the file."""

    expected: str
    accepts: Callable[[Any], bool]
    about: str


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _path(about: str) -> _Key:
    return _Key(expected='a path such as "data.turns"', accepts=_is_text, about=about)


def _flag(about: str) -> _Key:
    return _Key(expected="true or false", accepts=lambda value: isinstance(value, bool), about=about)


def _text(about: str) -> _Key:
    return _Key(expected="a text", accepts=_is_text, about=about)


def _are_fields(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(map(_is_text, value)) and len(set(value)) == len(value)


#: The keys of the file, in the order in which they are written and explained.
KEYS: dict[str, _Key] = {
    "messages": _path("where the list of messages is; . is the record itself"),
    "role": _path("who speaks, in each message; without it speakers take turns"),
    "content": _path("the text of each message; without it messages are texts"),
    "exchange": _Key(
        expected='the fields of an exchange in order, such as ["question", "answer"]',
        accepts=_are_fields,
        about="instead of role and content: each element of the list holds these messages",
    ),
    "text": _path("where the string is that holds the whole talk; . is the record or line itself"),
    "separator": _text("what stands between two turns"),
    "speaker_separator": _text("what stands between the speaker's name and the text of a turn"),
    "group": _path("the column that names the dialogue: each record is one message of it"),
    "order": _path("the column with the number of the message in its dialogue"),
    "system": _path("the record's system prompt"),
    "tools": _path("the record's tool descriptions"),
    "id": _path("the record's id"),
    "strip": _flag("whether blanks at the ends of texts go"),
    "join": _flag("whether several messages of one side in a row become one"),
    "assistant": _Key(
        expected=", ".join(map(repr, get_args(Side))),
        accepts=lambda value: value in get_args(Side),
        about="who is trained where nobody is known to be the assistant",
    ),
    "roles": _Key(
        expected=f"a table of names and their roles ({', '.join(ROLES)})",
        accepts=lambda value: isinstance(value, dict),
        about='who plays which role; "*" is anyone else',
    ),
}

#: Keys that say where the messages are, and the keys that go with each.
_WAYS = {
    "messages": ("role", "content", "exchange"),
    "text": ("separator", "speaker_separator"),
    "group": ("role", "content", "order"),
}


def load_mapping(path: str | Path) -> Mapped:
    """The format that a mapping file describes. Raises UsageError when the file says what cannot be."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(f"{path}: cannot be read ({reason}); expected a mapping file, see docs/mapping.md") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: found bytes that are not UTF-8; expected a mapping file in TOML") from error
    return parse_mapping(text, str(path))


def parse_mapping(text: str, name: str) -> Mapped:
    """The format that the text of a mapping file describes; `name` is what errors call it. Raises UsageError."""
    try:
        given = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(
            f"{name}: {error or 'nested too deeply'}; expected TOML, as docs/mapping.md shows it"
        ) from error
    for key, value in given.items():
        if key not in KEYS:
            raise UsageError(f"{name}: {key} is no key of a mapping; expected one of {', '.join(KEYS)}")
        if not KEYS[key].accepts(value):
            raise UsageError(f"{name}: {key} is {_seen(value)}; expected {KEYS[key].expected}")
    _check_together(given, name)
    roles = _roles(given.pop("roles", {}), name)
    if "exchange" in given:
        given["exchange"] = tuple(given["exchange"])
    return Mapped(**given, roles=roles)


def _seen(value: Any) -> str:
    return shown(value) if isinstance(value, str | bool | int | float | list) else kind_of(value)


def _check_together(given: Mapping[str, Any], name: str) -> None:
    """Raise UsageError when keys are missing beside others, or exclude each other."""
    ways = [way for way in _WAYS if way in given]
    if len(ways) != 1:
        found = " and ".join(ways) or "none of them"
        raise UsageError(f"{name}: found {found}; expected exactly one of {', '.join(_WAYS)}")
    way = ways[0]
    for key in {key for keys in _WAYS.values() for key in keys} - set(_WAYS[way]):
        if key in given:
            others = [other for other, keys in _WAYS.items() if key in keys]
            raise UsageError(f"{name}: {key} stands beside {way}; expected it beside {' or '.join(others)} only")
    if "exchange" in given and ("role" in given or "content" in given):
        raise UsageError(f"{name}: exchange stands beside role or content; expected one or the other")
    needed = {"messages": ["content"] if "role" in given else [], "text": ["separator"], "group": ["content"]}[way]
    for key in needed:
        if key not in given:
            raise UsageError(f"{name}: {key} is missing; expected {KEYS[key].expected} ({KEYS[key].about})")


def _roles(table: Mapping[str, Any], name: str) -> dict[str, str]:
    roles: dict[str, str] = {}
    for speaker, role in table.items():
        if role not in ROLES:
            expected = f"expected one of {', '.join(ROLES)}"
            raise UsageError(f"{name}: roles.{speaker} is {_seen(role)}; {expected}")
        plain = speaker.strip().lower()
        if roles.get(plain, role) != role:
            raise UsageError(f"{name}: roles has {plain!r} twice, as {roles[plain]} and as {role}; expected one role")
        roles[plain] = role
    return roles


def mapping_text(mapped: Mapped, notes: Mapping[str, str]) -> str:
    """The file that describes a format, each line with a comment: that of `notes`, else what the key is about."""
    plain = Mapped()
    lines = []
    for key in KEYS:
        value = getattr(mapped, key)
        if key == "roles" or value == getattr(plain, key):
            continue
        lines.append((f"{key} = {_toml(value)}", notes.get(key, KEYS[key].about)))
    roles = [(f"{_toml(speaker)} = {_toml(role)}", "") for speaker, role in mapped.roles.items()]
    width = max(len(line) for line, _ in lines + roles) if lines else 0
    text = "".join(f"{line:<{width}}  # {_comment(note)}\n" for line, note in lines)
    if roles:
        text += f"\n[roles]  # {_comment(notes.get('roles', KEYS['roles'].about))}\n"
        text += "".join(f"{line}\n" for line, _ in roles)
    return text


def _toml(value: Any) -> str:
    """A text, truth value or list of texts in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(map(_toml, value))}]"


def _comment(note: str) -> str:
    return "".join(character if character.isprintable() else "�" for character in note)
