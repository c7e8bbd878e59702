"""Which tokens steer a model, and how text in a message is kept from becoming one.

A control token is any token that only a template may write: those the tokenizer marks special, added tokens that the
chat template itself spells out, and added tokens of the shape `<|...|>`. Paired markup that the tokenizer does not
mark special (`<think>` and `</think>`, `<tool_call>` and `</tool_call>`) is no control token: answers rightly contain
it.

Rendering is the place where text could turn into a control token, so message text is escaped before it is rendered:
each control token in it becomes one private-use character, and so does the `<` of a text that ends in `<|im_`, which
the next text could complete. The rendering is cut at the control tokens that remain, which are the template's own, and
the pieces of plain text between them are unescaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ismdata.conversation import ROLES
from ismdata.rendering.refusals import CannotEscape

#: First characters of the ranges that escaping may use; the first range that a conversation does not use is taken.
_PRIVATE_RANGES = (0xF0000, 0xF4000, 0xF8000, 0xFC000, 0x100000, 0x104000, 0x108000)

#: What looks like a marker in a template's source: `<|end|>`, `<turn|>`, `</s>`, `<end_of_turn>`, `[/INST]`.
_MARKER = re.compile(r"<[|｜/]?\w[\w▁\-:]*[|｜]?>|\[/?[A-Z_]{2,}\]")

#: What a marker looks like at all: an added token that is a word or a blank is none, though templates contain it.
_SHAPED = re.compile(r"<\S+>|\[\S+\]")

_BRACKETED = re.compile(r"[<\[][|｜].*[|｜][>\]]", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """What we need to know of one added token of a tokenizer."""

    text: str
    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False


def control_tokens(added: Iterable[AddedToken], template: str) -> list[AddedToken]:
    """The added tokens that only the template may write (see the module's text)."""
    added = list(added)
    texts = {token.text for token in added}
    return [
        token
        for token in added
        if token.special
        or (
            not _is_paired(token.text, texts)
            and ((token.text in template and _SHAPED.fullmatch(token.text)) or _BRACKETED.fullmatch(token.text))
        )
    ]


def with_markers(controls: ControlTokens, template: str) -> ControlTokens:
    """The control tokens and, beside them, the markers that a template spells out without the tokenizer knowing them.

    For finding turns in rendered text only: such a marker is plain text to the tokenizer, its `id` is -1.
    """
    known = controls.tokens
    found = sorted(set(_MARKER.findall(template)) - set(known))
    return ControlTokens([*known.values(), *(AddedToken(text=text, id=-1, special=False) for text in found)])


def _is_paired(text: str, texts: set[str]) -> bool:
    """`<x>` beside `</x>`."""
    if not (text.startswith("<") and text.endswith(">")) or _BRACKETED.fullmatch(text):
        return False
    name = text[2:-1] if text.startswith("</") else text[1:-1]
    return f"<{name}>" in texts and f"</{name}>" in texts


def _longest_first(text: str) -> tuple[int, str]:
    return -len(text), text


#: Texts that begin alike are told apart so many times over; an expression may not be nested without end.
_LEVELS = 32


def _any_of(texts: Iterable[str], levels: int = _LEVELS) -> str:
    """An expression for the longest of these texts that stands at a place, for that is meant where one begins another,
    as in the tokenizer itself.

    It is a tree of what texts begin with: of a list of a thousand, as some tokenizers have, all would be tried in turn.

    >>> _any_of(["<end>", "<start>", "<stop>"])
    '<(?:st(?:art>|op>)|end>)'
    """
    texts = sorted(set(texts), key=_longest_first)
    if len(texts) == 1:
        return re.escape(texts[0])
    shared = texts[0][: common_prefix_length(*texts)]
    rests = [text[len(shared) :] for text in texts]
    if not levels:
        alternatives = [re.escape(rest) for rest in rests]
    else:
        by_first: dict[str, list[str]] = {}
        for rest in rests:  # an empty one is last
            by_first.setdefault(rest[:1], []).append(rest)
        alternatives = [_any_of(group, levels - 1) for group in by_first.values()]
    return f"{re.escape(shared)}(?:{'|'.join(alternatives)})"


class ControlTokens:
    """The control tokens of one tokenizer under one template, found, cut at and escaped in text."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self.tokens = {token.text: token for token in tokens if token.text}
        ordered = sorted(self.tokens, key=_longest_first)
        self.pattern = re.compile(_any_of(ordered) if ordered else r"(?!)")
        self._longest = max(map(len, ordered), default=0)
        self._ordered = ordered
        # What a text may end or begin with that its neighbour could make a control token of.
        self._heads = {text[:end] for text in ordered for end in range(1, len(text))}
        self._tails = {text[start:] for text in ordered for start in range(1, len(text))}
        self._edges = sorted({head[0] for head in self._heads} | {tail[-1] for tail in self._tails})

    def cut(self, text: str) -> list[str | AddedToken]:
        """Text as plain strings and control tokens, in order; empty strings are left out.

        >>> cut = ControlTokens([AddedToken(text="<e>", id=7, special=True)]).cut("ab<e>c")
        >>> [piece if isinstance(piece, str) else piece.id for piece in cut]
        ['ab', 7, 'c']
        """
        pieces: list[str | AddedToken] = []
        at = 0
        for match in self.pattern.finditer(text):
            if match.start() > at:
                pieces.append(text[at : match.start()])
            pieces.append(self.tokens[match.group()])
            at = match.end()
        if at < len(text):
            pieces.append(text[at:])
        return pieces

    def common_prefix(self, *texts: str) -> int:
        """The length of the texts' common prefix, moved back where it would end inside a control token of one of
        them.
        """
        shared = common_prefix_length(*texts)
        for text in texts:
            for match in self.pattern.finditer(text):
                if match.start() < shared < match.end():
                    shared = match.start()
                if match.end() >= shared:
                    break
        return shared

    def first_end(self, text: str) -> int | None:
        """Where the first control token in `text` ends; None where there is none."""
        match = self.pattern.search(text)
        return match.end() if match else None

    def last_end(self, text: str) -> int | None:
        """Where the last control token in `text` ends; None where there is none."""
        end = None
        for match in self.pattern.finditer(text):
            end = match.end()
        return end

    def escape(self, value: Any) -> tuple[Any, Escapes]:
        """`value` (strings, lists, dicts, as in messages) with control tokens in its strings escaped, and the way back.

        Raises CannotEscape where the text uses every private range, so that no character is left to escape with, or
        holds U+10FFFE or U+10FFFF, noncharacters with which this package marks places.
        """
        texts = list(_strings(value))
        used = "".join(texts)
        if "\U0010fffe" in used or "\U0010ffff" in used:
            raise CannotEscape("the text holds U+10FFFE or U+10FFFF, which are no characters; take them out")
        if self.pattern.search(used) is None and not any(map(self._open_ends, texts)):
            return value, Escapes(mapping={})
        size = len(self._ordered) + len(self._edges)
        for start in _PRIVATE_RANGES:
            taken = re.compile(f"[{chr(start)}-{chr(start + size)}]")
            if not taken.search(used):
                mapping = {chr(start + place): text for place, text in enumerate([*self._ordered, *self._edges])}
                inverse = {text: character for character, text in mapping.items()}
                return self._replace(value, inverse), Escapes(mapping=mapping)
        raise CannotEscape("the text uses every private-use range, so control tokens in it cannot be escaped")

    def _replace(self, value: Any, characters: Mapping[str, str]) -> Any:
        if isinstance(value, str):
            return self._replace_in(value, characters)
        if isinstance(value, list):
            return [self._replace(item, characters) for item in value]
        if isinstance(value, dict):
            return {
                key if key in _KEYS else self._replace_in(key, characters): item
                if key == "role" and item in ROLES
                else self._replace(item, characters)
                for key, item in value.items()
            }
        return value

    def _replace_in(self, text: str, characters: Mapping[str, str]) -> str:
        text = self.pattern.sub(lambda match: characters[match.group()], text)
        for place in self._open_ends(text):
            text = text[:place] + characters[text[place]] + text[place + 1 :]
        return text

    def _open_ends(self, text: str) -> list[int]:
        """The places of characters without which a text neither ends like the beginning of a control token nor begins
        like the end of one. Blanks around it count for nothing: templates strip them.
        """
        end = len(text.rstrip())
        first = len(text) - len(text.lstrip())
        reach = range(1, min(self._longest, end - first + 1))
        heads = (end - k for k in reach if text[end - k : end] in self._heads)
        return [*heads, *(first + k - 1 for k in reach if text[first : first + k] in self._tails)]


@dataclass(frozen=True, kw_only=True)
class Escapes:
    """The way back from private-use characters to the text they stand for."""

    mapping: Mapping[str, str]

    def undo(self, text: str) -> str:
        if not self.mapping:
            return text
        return "".join(self.mapping.get(character, character) for character in text)


def common_prefix_length(*texts: str) -> int:
    """How many characters all texts have in common at their beginning."""
    first = texts[0]
    low, high = 0, min(map(len, texts))
    while low < high:  # the first `low` characters agree, no more than `high` do
        middle = (low + high + 1) // 2
        if all(text.startswith(first[low:middle], low) for text in texts):
            low = middle
        else:
            high = middle - 1
    return low


#: Keys that templates look for.
_KEYS = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "id", "type", "function"}
    | {"arguments", "description", "parameters", "properties", "required", "items", "enum"}
)


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
