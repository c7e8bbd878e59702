"""`convert --explain`: what a source is taken for, its first record as it is read, and a mapping to start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from ismdata.conversation import ROLE_NAMES
from ismdata.convert.canonical import Rules, canonicalize
from ismdata.convert.corpus_format import Choices, CorpusFormat, Draft, with_choices
from ismdata.convert.formats.mapped import Mapped
from ismdata.convert.guess_mapping import GuessedFormat, guess_mapping, regroup_records
from ismdata.convert.mapping_file import mapping_text
from ismdata.convert.parts import FormatChoice, SourcePart, open_parts
from ismdata.convert.sources.source_types import SavedDataset, Source
from ismdata.errors import DataError, Refused

#: Records that a mapping is guessed from.
_LOOKED_AT = 100
#: How much of a record the text shows.
_SHOWN_MESSAGES = 12
_SHOWN_CHARACTERS = 200

_BY_HAND = "docs/mapping.md says how to write a mapping by hand."


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What one part of a source is taken for.

    `looked_at` records were looked at. `format` is None where no format fits and the record is read as the mapping
    says. `conversations` are those of the first record, as `convert` would write them, without their sources; `refused`
    says why there are none. `mapping` is the text of a mapping file, None where none can be given; `equivalent` whether
    it reads the records that were looked at exactly as the format does.
    """

    source: str
    layout: str
    format: str | None
    looked_at: int
    place: str
    conversations: tuple[dict[str, Any], ...]
    refused: str | None
    mapping: str | None
    equivalent: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "layout": self.layout,
            "format": self.format,
            "looked_at": self.looked_at,
            "place": self.place,
            "conversations": list(self.conversations),
            "refused": self.refused,
            "mapping": self.mapping,
            "equivalent": self.equivalent,
        }

    def text(self) -> str:
        """The explanation as a person reads it."""
        known = "no known format" if self.format is None else f"format {self.format}"
        lines = [f"{self.source}: {self.layout}, {known}", ""]
        if self.refused is not None:
            lines.append(f"{self.place} is refused: {self.refused}")
        for number, one in enumerate(self.conversations, 1):
            which = f" (conversation {number} of {len(self.conversations)})" if len(self.conversations) > 1 else ""
            lines.append(f"{self.place} is read as{which}:")
            lines += [f"  {line}" for line in _drawn(one)]
        if self.refused is not None or self.conversations:
            lines.append("")
        if self.mapping is None:
            why = "No mapping can say all that this format does: leave --mapping out."
            lines.append(why if self.format else f"No messages can be made out. {_BY_HAND}")
        else:
            some = f"the first {self.looked_at} records" if self.looked_at > 1 else "the first record"
            same = f"A mapping that reads {some} alike, to start from:"
            guess = f"A mapping to start from, guessed from {some}. Check each line, then use --mapping FILE:"
            lines += [same if self.equivalent else guess, "", *self.mapping.splitlines()]
        return "\n".join(lines)


def _drawn(conversation: Mapping[str, Any]) -> Iterator[str]:
    messages = conversation["messages"]
    width = max(len(message["role"]) for message in messages)
    for message in messages[:_SHOWN_MESSAGES]:
        shown = message["content"] if message["content"] is not None else message["tool_calls"]
        text = " ".join(shown.split())
        cut = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
        untrained = " (not trained)" if message["train"] is False else ""
        yield f"{message['role']:<{width}}  {cut}{untrained}"
    if len(messages) > _SHOWN_MESSAGES:
        yield f"… and {len(messages) - _SHOWN_MESSAGES} messages more"


def explain(source: Source | SavedDataset, format: FormatChoice) -> Explanation:
    """The first part of a source that holds a record. Raises DataError when a part is broken, or none holds any."""
    try:
        return _explained(source, format)
    except DataError:
        if format.name != "auto":
            raise
        found = _first_records(source, replace(format, name="unknown", corpus_format=GuessedFormat()))
        if found is None:
            raise
        part, placed = found
    return explain_records(
        placed, name=part.name, layout=part.layout, format=None, corpus_format=None, choices=format.choices
    )


def _explained(source: Source | SavedDataset, format: FormatChoice) -> Explanation:
    found = _first_records(source, format)
    if found is None:
        raise DataError(f"{source.name}: empty, no record found; expected a corpus. See whether it is the right file")
    part, placed = found
    return explain_records(
        placed,
        name=part.name,
        layout=part.layout,
        format=part.format,
        corpus_format=part.corpus_format,
        choices=format.choices,
    )


def _first_records(
    source: Source | SavedDataset, format: FormatChoice
) -> tuple[SourcePart, list[tuple[str, Any]]] | None:
    """The first part with records that can be read, and the first of these with their places."""
    for part in open_parts(source, format):
        placed = list(islice(_records(part), _LOOKED_AT))
        if placed:
            return part, placed
    return None


def _records(part: SourcePart) -> Iterator[tuple[str, Any]]:
    for block, place, _ in part.blocks:
        for row in range(len(block.numbers)):
            try:
                record = block.record(row)
            except Refused:
                continue
            yield f"{place.prefix}{block.numbers[row]}", record


def explain_records(
    placed: Sequence[tuple[str, Any]],
    *,
    name: str,
    layout: str,
    format: str | None,
    corpus_format: CorpusFormat | None,
    choices: Choices,
) -> Explanation:
    """What records are taken for. `placed`: places and records, as `corpus_format` parses them; None where unknown."""
    records = [record for _, record in placed]
    shown = partial(
        _explanation,
        placed=placed,
        name=name,
        layout=layout,
        format=format,
        looked_at=len(placed),
        choices=choices,
    )
    if isinstance(corpus_format, Mapped):
        return shown(corpus_format=corpus_format, mapping=_text_of(corpus_format), equivalent=True)
    rows = [row for record in records for row in record] if _are_rows(corpus_format) else records
    guess = guess_mapping(rows)
    if guess is not None:
        guess = replace(guess, assistant=choices.assistant)
    if corpus_format is not None:
        equal = next((one for one in _variants(guess) if _alike(one, rows, corpus_format, records, choices)), None)
        return shown(
            corpus_format=corpus_format,
            mapping=None if equal is None else _text_of(equal),
            equivalent=equal is not None,
        )
    if guess is None:
        return shown(corpus_format=None, mapping=None, equivalent=False)
    whole = next(iter(regroup_records(guess, rows)), records[0])
    return shown(
        placed=[(placed[0][0], whole)],
        corpus_format=_following(guess, choices),
        mapping=_text_of(guess),
        equivalent=False,
    )


def _explanation(
    *,
    placed: Sequence[tuple[str, Any]],
    name: str,
    layout: str,
    format: str | None,
    looked_at: int,
    corpus_format: CorpusFormat | None,
    mapping: str | None,
    equivalent: bool,
    choices: Choices,
) -> Explanation:
    place, record = placed[0]
    conversations: list[dict[str, Any]] = []
    refused = None
    try:
        drafts = corpus_format.parse_record(record) if corpus_format is not None else ()
        conversations = [canonicalize(draft, _rules(corpus_format, choices)) for draft in drafts]
    except Refused as refusal:
        refused = refusal.detail
    return Explanation(
        source=name,
        layout=layout,
        format=format,
        looked_at=looked_at,
        place=place,
        conversations=tuple(conversations),
        refused=refused,
        mapping=mapping,
        equivalent=equivalent,
    )


def _rules(corpus_format: CorpusFormat | None, choices: Choices) -> Rules:
    return (
        Rules(roles=corpus_format.roles, join=corpus_format.join)
        if isinstance(corpus_format, Mapped)
        else Rules(roles=choices.roles)
    )


def _following(mapped: Mapped, choices: Choices) -> Mapped:
    """The mapping with the role names of the choices; its own take precedence: they are what the guess is about."""
    return replace(with_choices(mapped, choices), roles={**choices.roles, **mapped.roles})


def _are_rows(corpus_format: CorpusFormat | None) -> bool:
    """Whether records of the format are lists of what the source calls records."""
    return corpus_format is not None and type(corpus_format).regroup is not CorpusFormat.regroup


def _variants(guess: Mapped | None) -> Iterator[Mapped]:
    """The guess with less said first, since what is true by default need not be said."""
    if guess is not None:
        for roles in ({}, guess.roles):
            for strip in (False, True):
                yield replace(guess, roles=roles, strip=strip)


def _alike(
    one: Mapped, rows: Sequence[Any], corpus_format: CorpusFormat, records: Sequence[Any], choices: Choices
) -> bool:
    """Whether a mapping reads the same messages as a format does, record by record, and any at all."""
    mapped = _following(one, choices)
    read = [_messages(mapped, record, choices) for record in regroup_records(mapped, rows)]
    expected = [_messages(corpus_format, record, choices) for record in records]
    return read == expected and any(expected)


def _messages(corpus_format: CorpusFormat, record: Any, choices: Choices) -> list[Any]:
    """The messages of each conversation of a record; a reason where one is refused."""
    try:
        drafts: Sequence[Draft] = corpus_format.parse_record(record)
    except Refused as refusal:
        return [refusal.reason]
    rules = _rules(corpus_format, choices)
    return [_outcome(draft, rules) for draft in drafts]


def _outcome(draft: Draft, rules: Rules) -> Any:
    try:
        return canonicalize(draft, rules)["messages"]
    except Refused as refusal:
        return refusal.reason


def _text_of(mapped: Mapped) -> str | None:
    """The mapping file, or None where a name in it is no text that a file can hold."""
    own = {name: role for name, role in mapped.roles.items() if ROLE_NAMES.get(name) != role}
    text = mapping_text(replace(mapped, roles=own), {})
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return text
