"""Who plays which role where a corpus does not say: speakers that only alternate, and names that are nobody's role."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.choices import Side
from ismdata.errors import Refused, shown

#: One way to see a talk: what it is called among the ways to see the same talk, and the role of each speaker.
Cast = tuple[str, dict[str, str]]

_NUMBERED = re.compile(r"^[0-9]+[_ -]+")
_OPENER = {"second": "user", "first": "assistant"}
_OTHER = {"user": "assistant", "assistant": "user"}


def alternating(count: int, assistant: Side) -> list[tuple[str, list[str]]]:
    """The roles of `count` utterances whose speakers take turns; two lists under "both", each with its name.

    >>> alternating(3, "second")
    [('', ['user', 'assistant', 'user'])]
    """
    sides: tuple[Side, ...] = ("second", "first") if assistant == "both" else (assistant,)
    found: list[tuple[str, list[str]]] = []
    for side in sides:
        opener = _OPENER[side]
        roles = [opener, _OTHER[opener]] * (count // 2) + [opener] * (count % 2)
        found.append((side if assistant == "both" else "", roles))
    return found


def spoken(roles: Sequence[str], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Messages of a draft: who says what."""
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


def turns(offsets: NDArray[np.int64], assistant: Side) -> pa.Array:
    """The roles of M messages whose speakers alternate within each record, as a dictionary array; not for "both"."""
    opener = _OPENER[assistant]
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
    return pa.DictionaryArray.from_arrays(pa.array(place & 1, pa.int8()), pa.array([opener, _OTHER[opener]]))


def casts(speakers: Sequence[str], roles: Mapping[str, str], assistant: Side) -> list[Cast]:
    """The role of each speaker of one talk; two casts under "both".

    `speakers` names who speaks, message by message. Names that `roles` (lower case to canonical role) knows keep their
    role; where there is no other assistant, one called the system is: so dialogue-state corpora call it. Beside a known
    assistant all unknown names are users; one unknown name beside a known user is the assistant. Of two unknown names
    one is the user and one the assistant, as `assistant` says. Raises Refused where the unknown names are more.

    >>> casts(["Ann", "Bo", "Ann"], {}, "second")
    [('', {'Ann': 'user', 'Bo': 'assistant'})]
    >>> casts(["Ann", "Cy", "Bo"], {"bo": "assistant"}, "second")
    [('', {'Bo': 'assistant', 'Ann': 'user', 'Cy': 'user'})]
    """
    names = list(dict.fromkeys(speakers))
    known = {name: roles[plain] for name, plain in _plain(names).items() if plain in roles}
    unknown = [name for name in names if name not in known]
    if not unknown and "assistant" not in known.values() and "user" in known.values():
        known = {name: "assistant" if role == "system" else role for name, role in known.items()}
    if "assistant" in known.values():
        return [("", {**known, **dict.fromkeys(unknown, "user")})]
    taken = "user" in known.values()
    if len(unknown) > 2 - taken:
        who = ", ".join(map(shown, names[:8]))
        raise Refused(
            "many_speakers",
            f"{len(names)} speakers: {who}; expected two, or names whose roles are known. "
            "Say who the assistant is with --role NAME=assistant, or in the [roles] of a mapping",
        )
    if not unknown:
        return [("", known)]
    if taken:
        return [("", {**known, unknown[0]: "assistant"})]
    found: list[Cast] = []
    for part, order in alternating(2, assistant):
        found.append((part, {**known, **dict(zip(unknown, order, strict=False))}))
    return found


def _plain(names: Sequence[str]) -> dict[str, str]:
    """Names in lower case; of such as "0_wizard" without the number, where that leaves different ones."""
    plain = {name: name.strip().lower() for name in names}
    bare = {name: _NUMBERED.sub("", low) for name, low in plain.items()}
    return bare if len(set(bare.values())) == len(names) else plain


def played(speakers: Sequence[str], roles: Mapping[str, str], assistant: Side) -> list[tuple[str, list[str]]]:
    """The role of each message of one talk, by `casts`: two lists under "both", each with its name. Raises Refused.

    A speaker whom `roles` knows keeps the own name: the rules that all formats share map role names, and twice would be
    wrong where a user swaps two.

    >>> played(["Ann", "bot", "Ann"], {"bot": "assistant"}, "second")
    [('', ['user', 'bot', 'user'])]
    """
    found = []
    for part, cast in casts(speakers, roles, assistant):
        bare = _plain(list(cast))
        own = {name: _own(name.strip(), bare[name], role, roles) for name, role in cast.items()}
        found.append((part, [own[name] for name in speakers]))
    return found


def _own(name: str, bare: str, role: str, roles: Mapping[str, str]) -> str:
    return next((one for one in (name, bare) if roles.get(one.lower()) == role), role)
