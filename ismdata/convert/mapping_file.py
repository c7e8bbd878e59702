"""The file of `--mapping`: a short TOML file that describes a corpus of any other shape. See docs/mapping.md."""

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
    """A key of the file.

    Attributes:
        expected: Its values in words, for error messages.
        accepts: Whether a value is valid.
        about: What it means, for the comments of files that we write.
    """

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
    return _Key(expected="a string that is not empty", accepts=_is_text, about=about)


def _are_fields(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(map(_is_text, value)) and len(set(value)) == len(value)


#: The keys of the file, in the order in which they are written.
KEYS: dict[str, _Key] = {
    "messages": _path("path of the list of messages; . is the record itself"),
    "role": _path("who speaks, in each message; without this key, the speakers alternate"),
    "content": _path("the text of each message; without this key, messages are strings"),
    "exchange": _Key(
        expected='the fields of an exchange in order, such as ["question", "answer"]',
        accepts=_are_fields,
        about="instead of role and content: the fields of each list element that are messages, in order",
    ),
    "answer": _path("path of the answer after the messages: a string, a message or a list of messages"),
    "text": _path("path of the string that holds the whole conversation; . is the record or line itself"),
    "separator": _text("what separates two turns"),
    "speaker_separator": _text("what separates the speaker's name from the text of a turn"),
    "group": _path("the column that identifies the conversation; each record is one of its messages"),
    "order": _path("the column with the number of the message in its conversation"),
    "records": _path("path of the conversations inside a record; each becomes a record of its own"),
    "system": _path("path of the system prompt"),
    "tools": _path("path of the tool descriptions"),
    "id": _path("path of the record's id"),
    "strip": _flag("whether to strip whitespace from the texts"),
    "join": _flag("whether to merge consecutive messages of the same role"),
    "assistant": _Key(
        expected=", ".join(map(repr, get_args(Side))),
        accepts=lambda value: value in get_args(Side),
        about="which speaker is trained if nobody is known to be the assistant",
    ),
    "roles": _Key(
        expected=f"a table of names and their roles ({', '.join(ROLES)})",
        accepts=lambda value: isinstance(value, dict),
        about='the role of each name; "*" is every other name',
    ),
}

#: The keys that locate the messages, each with the keys that can be combined with it alone.
_LOCATIONS = {
    "messages": ("records", "role", "content", "exchange", "answer"),
    "text": ("records", "separator", "speaker_separator"),
    "group": ("role", "content", "order"),
}


def load_mapping(path: str | Path) -> Mapped:
    """Read a mapping file. Raises UsageError if it cannot be read or is not valid."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(f"{path}: cannot be read ({reason}); expected a mapping file, see docs/mapping.md") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: found bytes that are not UTF-8; expected a mapping file in TOML") from error
    return parse_mapping(text, str(path))


def parse_mapping(text: str, name: str) -> Mapped:
    """Parse the text of a mapping file; `name` is its name in error messages. Raises UsageError if it is not valid."""
    try:
        given = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(
            f"{name}: {error or 'nested too deeply'}; expected TOML as described in docs/mapping.md"
        ) from error
    for key, value in given.items():
        if key not in KEYS:
            raise UsageError(f"{name}: found the key {key}; expected one of {', '.join(KEYS)}")
        if not KEYS[key].accepts(value):
            raise UsageError(f"{name}: {key} is {_shown(value)}; expected {KEYS[key].expected}")
    _check_combination(given, name)
    roles = _parse_roles(given.pop("roles", {}), name)
    if "exchange" in given:
        given["exchange"] = tuple(given["exchange"])
    return Mapped(**given, roles=roles)


def _shown(value: Any) -> str:
    return shown(value) if isinstance(value, str | bool | int | float | list) else kind_of(value)


def _check_combination(given: Mapping[str, Any], name: str) -> None:
    """Raise UsageError if keys exclude each other or one requires another."""
    locations = [key for key in _LOCATIONS if key in given]
    if len(locations) != 1:
        found = " and ".join(locations) or "none of them"
        raise UsageError(f"{name}: found {found}; expected exactly one of {', '.join(_LOCATIONS)}")
    location = locations[0]
    for key in {key for keys in _LOCATIONS.values() for key in keys} - set(_LOCATIONS[location]):
        if key in given:
            others = [other for other, keys in _LOCATIONS.items() if key in keys]
            raise UsageError(f"{name}: found {key} with {location}; expected it only with {' or '.join(others)}")
    if "exchange" in given and ("role" in given or "content" in given):
        raise UsageError(f"{name}: found exchange with role or content; expected one or the other")
    required = {"messages": ["content"] if "role" in given else [], "text": ["separator"], "group": ["content"]}
    for key in required[location]:
        if key not in given:
            raise UsageError(f"{name}: {key} is missing; expected {KEYS[key].expected} ({KEYS[key].about})")


def _parse_roles(table: Mapping[str, Any], name: str) -> dict[str, str]:
    roles: dict[str, str] = {}
    for speaker, role in table.items():
        if role not in ROLES:
            expected = f"expected one of {', '.join(ROLES)}"
            raise UsageError(f"{name}: roles.{speaker} is {_shown(role)}; {expected}")
        key = speaker.strip().lower()
        if roles.get(key, role) != role:
            raise UsageError(f"{name}: roles has {key!r} twice, as {roles[key]} and as {role}; expected one role")
        roles[key] = role
    return roles


def mapping_text(mapping: Mapped) -> str:
    """The text of the file that describes a mapping, with a comment that explains each key."""
    defaults = Mapped()
    lines = []
    for key in KEYS:
        value = getattr(mapping, key)
        if key == "roles" or value == getattr(defaults, key):
            continue
        lines.append((f"{key} = {_toml(value)}", KEYS[key].about))
    roles = [(f"{_toml(speaker)} = {_toml(role)}", "") for speaker, role in mapping.roles.items()]
    width = max(len(line) for line, _ in lines + roles) if lines else 0
    text = "".join(f"{line:<{width}}  # {about}\n" for line, about in lines)
    if roles:
        text += f"\n[roles]  # {KEYS['roles'].about}\n"
        text += "".join(f"{line}\n" for line, _ in roles)
    return text


def _toml(value: Any) -> str:
    """A string, boolean or list of strings in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(map(_toml, value))}]"
