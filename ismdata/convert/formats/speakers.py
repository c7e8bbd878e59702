"""Roles where the corpus gives none: speakers who only alternate, and names that are no role."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.choices import Side
from ismdata.conversation import ROLE_NAMES
from ismdata.convert.corpus_format import CorpusFormat
from ismdata.errors import Refused, shown

#: The name of a conversation among those made of one record ("" if it is the only one), and the role of each speaker.
Assignment = tuple[str, dict[str, str]]

_NUMBERED = re.compile(r"^[0-9]+[_ -]+")
_OPENER = {"second": "user", "first": "assistant"}
_OTHER = {"user": "assistant", "assistant": "user"}


@dataclass(frozen=True, kw_only=True)
class SpeakerFormat(CorpusFormat):
    """A format whose records name their speakers, or leave open who they are.

    `roles` maps names in lower case to roles; `assistant` says which of two unknown speakers is the assistant.
    """

    roles: Mapping[str, str] = field(default_factory=lambda: ROLE_NAMES)
    assistant: Side = "second"

    def roles_of(self, speakers: Sequence[str]) -> list[tuple[str, list[str]]]:
        """`message_roles` under the choices of this format. Raises Refused."""
        return message_roles(speakers, self.roles, self.assistant)


def to_messages(roles: Sequence[str], texts: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages of a draft, from the role and the content of each."""
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


def with_roles(messages: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> list[dict[str, Any]]:
    """Copies of messages with these roles."""
    return [{**message, "role": role} for message, role in zip(messages, roles, strict=True)]


def alternating_roles(count: int, assistant: Side) -> list[tuple[str, list[str]]]:
    """The roles of `count` utterances whose speakers alternate; under "both" two lists, each with its name.

    >>> alternating_roles(3, "second")
    [('', ['user', 'assistant', 'user'])]
    """
    sides: tuple[Side, ...] = ("second", "first") if assistant == "both" else (assistant,)
    found: list[tuple[str, list[str]]] = []
    for side in sides:
        opener = _OPENER[side]
        roles = [opener, _OTHER[opener]] * (count // 2) + [opener] * (count % 2)
        found.append((side if assistant == "both" else "", roles))
    return found


def alternating_role_column(offsets: NDArray[np.int64], assistant: Side) -> pa.Array:
    """`alternating_roles` for all records of a block: a dictionary array of M roles. Not for "both".

    `offsets` is int64[N + 1]: the messages of record i are offsets[i]:offsets[i + 1].
    """
    opener = _OPENER[assistant]
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
    return pa.DictionaryArray.from_arrays(pa.array(place & 1, pa.int8()), pa.array([opener, _OTHER[opener]]))


def assign_roles(speakers: Sequence[str], roles: Mapping[str, str], assistant: Side) -> list[Assignment]:
    """The role of each speaker of one conversation; two assignments under "both".

    - Names in `roles` (lower case to canonical role) keep their role.
    - If no name is an assistant, one called the system is: dialogue-state corpora name it so.
    - Beside a known assistant, all unknown names are users.
    - Beside a known user, one unknown name is the assistant.
    - Of two unknown names, `assistant` decides which is the assistant.

    `speakers` names the speaker of each message. Raises Refused if there are more unknown names.

    >>> assign_roles(["Ann", "Bo", "Ann"], {}, "second")
    [('', {'Ann': 'user', 'Bo': 'assistant'})]
    >>> assign_roles(["Ann", "Cy", "Bo"], {"bo": "assistant"}, "second")
    [('', {'Bo': 'assistant', 'Ann': 'user', 'Cy': 'user'})]
    """
    names = list(dict.fromkeys(speakers))
    known = {name: roles[plain] for name, plain in _plain_names(names).items() if plain in roles}
    unknown = [name for name in names if name not in known]
    if not unknown and "assistant" not in known.values() and "user" in known.values():
        known = {name: "assistant" if role == "system" else role for name, role in known.items()}
    if "assistant" in known.values():
        return [("", {**known, **dict.fromkeys(unknown, "user")})]
    has_user = "user" in known.values()
    if len(unknown) > 2 - has_user:
        who = ", ".join(map(shown, names[:8]))
        raise Refused(
            "many_speakers",
            f"{len(names)} speakers: {who}; expected two, or names with known roles. "
            "Name the assistant with --role NAME=assistant, or in the [roles] of a mapping file",
        )
    if not unknown:
        return [("", known)]
    if has_user:
        return [("", {**known, unknown[0]: "assistant"})]
    found: list[Assignment] = []
    for part, order in alternating_roles(2, assistant):
        found.append((part, {**known, **dict(zip(unknown, order, strict=False))}))
    return found


def _plain_names(names: Sequence[str]) -> dict[str, str]:
    """Names in lower case; without a leading number, as in "0_wizard", if they then still differ."""
    plain = {name: name.strip().lower() for name in names}
    bare = {name: _NUMBERED.sub("", low) for name, low in plain.items()}
    return bare if len(set(bare.values())) == len(names) else plain


def message_roles(speakers: Sequence[str], roles: Mapping[str, str], assistant: Side) -> list[tuple[str, list[str]]]:
    """The role name of each message, by `assign_roles`; under "both" two lists, each with its name. Raises Refused.

    A speaker in `roles` keeps its own name. The rules shared by all formats map it later; mapping it here too would
    undo a swap such as `--role user=assistant --role assistant=user`.

    >>> message_roles(["Ann", "bot", "Ann"], {"bot": "assistant"}, "second")
    [('', ['user', 'bot', 'user'])]
    """
    found = []
    for part, assigned in assign_roles(speakers, roles, assistant):
        bare = _plain_names(list(assigned))
        own = {name: _role_name(name.strip(), bare[name], role, roles) for name, role in assigned.items()}
        found.append((part, [own[name] for name in speakers]))
    return found


def _role_name(name: str, bare: str, role: str, roles: Mapping[str, str]) -> str:
    return next((one for one in (name, bare) if roles.get(one.lower()) == role), role)
