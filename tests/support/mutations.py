"""Damage done to raw corpora: to the tree of a JSON value, and to bytes. Chance comes from a `random.Random`."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

#: Values that are seldom where they are expected.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 1e300, 10**30, 1 << 64, "", " ", "\n", "\t", "\x00", "\ud800", "0", "null",
    [], {}, [[]],
    [None], {"": None}, [{}], "system", "tool", "assistant", "narrator", "__eou__", "|EOM|", "<|im_end|>",
    "<eoh>", "a\tb",
    "Human: a\n\nAssistant: b", "### Human: a### Assistant: b", {"role": "user"}, {"type": "text",
    "text": "x"}, ["a", "b"],
)  # fmt: skip
#: Names of fields that some format reads, and some that none does.
NAMES = (
    "messages", "conversations", "conversation", "utterances", "dialog", "dialogue", "turns", "log", "content",
    "history",
    "role", "from", "value", "speaker", "text", "message", "user", "human", "assistant", "prompt", "completion",
    "question", "answer", "response", "instruction", "input", "output", "system", "tools", "tool_calls",
    "function_call",
    "chosen", "rejected", "label", "kto_tag", "chat", "turn_1", "turn_x", "Human", "MOSS", "Commands",
    "meta_instruction",
    "replies", "message_tree_id", "message_id", "parent_id", "rank", "deleted", "dialogue_id", "turn", "id", "key",
    "train", "weight", "name", "choices", "images", "", "x", "é",
)  # fmt: skip
#: Bytes that mean something to some layout.
TOKENS = (
    b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"\n", b"\r\n", b"\t", b"\x00", b"\xff", b"\xef\xbb\xbf", b"- ",
    b"---\n", b"#", b"&a", b"*a", b"|", b";", b"'", b'""', b"null", b"NaN", b"1e999", b"\\ud800", b"\\u0000",
    b"__eou__",
    b"1 ", b"1 your persona: ", b"\x1f\x8b\x08", b"PK\x03\x04", b"BZh9", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PAR1",
)  # fmt: skip

_Path = tuple[Any, ...]


def mutated_value(value: Any, rng: Random) -> Any:
    """A copy of a JSON value that differs in one place: by structure, by type or by content."""
    whole = [copy.deepcopy(value)]
    path = rng.choice(_paths(whole, ()))
    parent: Any = whole
    for step in path[:-1]:
        parent = parent[step]
    at = path[-1]
    found = parent[at]
    change = rng.randrange(10)
    if change == 0:
        parent[at] = copy.deepcopy(rng.choice(ODD))
    elif change == 1:
        if parent is not whole:
            del parent[at]
    elif change == 2 and isinstance(parent, dict):
        parent[rng.choice(NAMES)] = parent.pop(at)
    elif change == 3:
        parent[at] = rng.choice([[found], {rng.choice(NAMES): found}, [found, copy.deepcopy(found)]])
    elif change == 4 and isinstance(found, list | dict) and found:
        parent[at] = next(iter(found.values() if isinstance(found, dict) else found))
    elif change == 5:
        other: Any = whole
        for step in rng.choice(_paths(whole, ())):
            other = other[step]
        parent[at] = copy.deepcopy(other)
    elif change == 6 and isinstance(found, list) and found:
        cut = rng.randrange(len(found))
        parent[at] = rng.choice([found[:cut], found[cut:], found[cut:] + found[:cut], found * rng.choice([2, 40])])
    elif change == 7 and isinstance(found, str):
        cut = rng.randint(0, len(found))
        odd = rng.choice([one for one in ODD if isinstance(one, str)])
        parent[at] = rng.choice([found[:cut], found[:cut] + odd + found[cut:], found * 3, odd])
    elif change == 8 and isinstance(found, dict):
        found[rng.choice(NAMES)] = copy.deepcopy(rng.choice(ODD))
    elif isinstance(found, int | float) and not isinstance(found, bool):
        parent[at] = rng.choice([-found, found + 1, str(found), 10**25, 0.5])
    else:
        parent[at] = copy.deepcopy(rng.choice(ODD))
    return whole[0] if whole else None


def _paths(value: Any, path: _Path) -> list[_Path]:
    """The paths of all values in a list or dict."""
    found: list[_Path] = []
    waiting: list[tuple[_Path, Any]] = [(path, value)]
    while waiting:
        path, value = waiting.pop()
        steps = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
        for step in steps:
            found.append((*path, step))
            waiting.append(((*path, step), value[step]))
    return found


def mutated_bytes(data: bytes, rng: Random, other: bytes = b"") -> bytes:
    """A copy of some bytes with one damage: flipped, deleted, inserted, cut off, repeated, or spliced with `other`."""
    at = rng.randint(0, len(data))
    end = min(len(data), at + rng.choice([1, 1, 2, 8, 64]))
    change = rng.randrange(7)
    if change == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if change == 1:
        return data[:at] + data[end:]
    if change == 2:
        return data[:at]
    if change == 3:
        return data[:end] + data[at:]
    if change == 4:
        start = rng.randint(0, len(other))
        return data[:at] + other[start:]
    if change == 5:
        return data[:at] + bytes([rng.randrange(256)]) + data[end:]
    return data[:at] + rng.choice(TOKENS) + data[at:]
