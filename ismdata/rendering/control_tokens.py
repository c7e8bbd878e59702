"""Which tokens are control tokens, and how message text is kept from becoming one.

Only the template may write control tokens. They are the tokens that the tokenizer marks special, the added tokens that
the chat template itself contains, and added tokens of the form `<|...|>`. Paired markup that the tokenizer does not
mark special (`<think>` and `</think>`, `<tool_call>` and `</tool_call>`) is not: answers may contain it.

Message text is escaped before it is rendered. Each control token in it becomes one private-use character, and so does
the `<` of a text that ends in `<|im_`, since the next text could complete it. All control tokens in the rendering are
then the template's own: the rendering is cut at them, and the text between them is unescaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ismdata.conversation import ROLES
from ismdata.rendering.refusals import CannotEscape

#: First characters of the ranges that escaping can use. It takes the first range that the conversation does not use.
_PRIVATE_RANGES = (0xF0000, 0xF4000, 0xF8000, 0xFC000, 0x100000, 0x104000, 0x108000)

#: A marker in a template's source: `<|end|>`, `<turn|>`, `</s>`, `<end_of_turn>`, `[/INST]`.
_MARKER = re.compile(r"<[|｜/]?\w[\w▁\-:]*[|｜]?>|\[/?[A-Z_]{2,}\]")

#: The form of a marker. An added token that is a word or a blank is none, even if the template contains it.
_SHAPED = re.compile(r"<\S+>|\[\S+\]")

_BRACKETED = re.compile(r"[<\[][|｜].*[|｜][>\]]", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """An added token of a tokenizer, with its flags: `lstrip` and `rstrip` strip the blanks around it."""

    text: str
    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False


def control_tokens(added: Iterable[AddedToken], template: str) -> list[AddedToken]:
    """The added tokens that only the template may write (see the module's docstring)."""
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
    """The control tokens, and the template's markers that are no tokens of the tokenizer (their `id` is -1).

    They are only used to find turns in rendered text: to the tokenizer such a marker is plain text.
    """
    known = controls.tokens
    found = sorted(set(_MARKER.findall(template)) - set(known))
    return ControlTokens([*known.values(), *(AddedToken(text=text, id=-1, special=False) for text in found)])


def _is_paired(text: str, texts: set[str]) -> bool:
    """Whether the text is one of `<x>` and `</x>`, and both are among the texts."""
    if not (text.startswith("<") and text.endswith(">")) or _BRACKETED.fullmatch(text):
        return False
    name = text[2:-1] if text.startswith("</") else text[1:-1]
    return f"<{name}>" in texts and f"</{name}>" in texts


def _longest_first(text: str) -> tuple[int, str]:
    return -len(text), text


#: The deepest nesting of the expression for control tokens.
_LEVELS = 32


def _any_of(texts: Iterable[str], levels: int = _LEVELS) -> str:
    """A regular expression that matches the longest of these texts at each position, as the tokenizer does.

    It is a prefix tree: with a plain list of alternatives every position would try all of them, and some tokenizers
    have a thousand.

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
        for rest in rests:  # the empty one is last
            by_first.setdefault(rest[:1], []).append(rest)
        alternatives = [_any_of(group, levels - 1) for group in by_first.values()]
    return f"{re.escape(shared)}(?:{'|'.join(alternatives)})"


class ControlTokens:
    """The control tokens of one tokenizer under one template: finds, cuts at and escapes them in text."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self.tokens = {token.text: token for token in tokens if token.text}
        ordered = sorted(self.tokens, key=_longest_first)
        self.pattern = re.compile(_any_of(ordered) if ordered else r"(?!)")
        self._longest = max(map(len, ordered), default=0)
        self._ordered = ordered
        # What a text may end or begin with so that the neighbouring text could complete a control token.
        self._heads = {text[:end] for text in ordered for end in range(1, len(text))}
        self._tails = {text[start:] for text in ordered for start in range(1, len(text))}
        self._edges = sorted({head[0] for head in self._heads} | {tail[-1] for tail in self._tails})

    def cut(self, text: str) -> list[str | AddedToken]:
        """Cut text into plain strings and control tokens, in order, without empty strings.

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
        """The length of the texts' common prefix, shortened if it ends inside a control token of one of them."""
        shared = common_prefix_length(*texts)
        for text in texts:
            for match in self.pattern.finditer(text):
                if match.start() < shared < match.end():
                    shared = match.start()
                if match.end() >= shared:
                    break
        return shared

    def first_end(self, text: str) -> int | None:
        """Where the first control token in `text` ends; None if there is none."""
        match = self.pattern.search(text)
        return match.end() if match else None

    def last_end(self, text: str) -> int | None:
        """Where the last control token in `text` ends; None if there is none."""
        end = None
        for match in self.pattern.finditer(text):
            end = match.end()
        return end

    def escape(self, value: Any) -> tuple[Any, Escapes]:
        """Escape the control tokens in the strings of messages.

        Args:
            value: Strings, lists and dicts.

        Returns:
            The same with escaped strings, and what undoes the escaping.

        Raises:
            CannotEscape: If the text uses every private range, or contains U+10FFFE or U+10FFFF, which `tracing.py`
                uses for placeholders.
        """
        texts = list(_strings(value))
        used = "".join(texts)
        if "\U0010fffe" in used or "\U0010ffff" in used:
            raise CannotEscape("the text contains U+10FFFE or U+10FFFF, which are not characters; remove them")
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
        """The characters to escape so that the text neither ends like the beginning of a control token nor begins like
        the end of one. Blanks around it are ignored: templates strip them.
        """
        end = len(text.rstrip())
        first = len(text) - len(text.lstrip())
        reach = range(1, min(self._longest, end - first + 1))
        heads = (end - k for k in reach if text[end - k : end] in self._heads)
        return [*heads, *(first + k - 1 for k in reach if text[first : first + k] in self._tails)]


@dataclass(frozen=True, kw_only=True)
class Escapes:
    """What undoes the escaping: private-use characters to the text that they stand for."""

    mapping: Mapping[str, str]

    def undo(self, text: str) -> str:
        """The text as it was before it was escaped."""
        if not self.mapping:
            return text
        return "".join(self.mapping.get(character, character) for character in text)


def common_prefix_length(*texts: str) -> int:
    """The length of the texts' common prefix."""
    first = texts[0]
    low, high = 0, min(map(len, texts))
    while low < high:  # the first `low` characters agree, at most `high` do
        middle = (low + high + 1) // 2
        if all(text.startswith(first[low:middle], low) for text in texts):
            low = middle
        else:
            high = middle - 1
    return low


#: Keys that templates read: they are not escaped.
_KEYS = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "id", "type", "function"}
    | {"arguments", "description", "parameters", "properties", "required", "items", "enum"}
)


def _strings(value: Any) -> Iterable[str]:
    """All strings in a value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
