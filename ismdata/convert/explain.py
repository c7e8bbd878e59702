"""`convert --explain`: the format of a source, its first record as it would be read, and a draft of a mapping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ismdata.conversation import ROLE_NAMES
from ismdata.convert.canonical import Rules, canonicalize
from ismdata.convert.corpus_format import Choices, CorpusFormat, Draft, with_choices
from ismdata.convert.formats.mapped import Mapped
from ismdata.convert.guess_mapping import GuessedFormat, guess_mapping, regroup_records
from ismdata.convert.mapping_file import mapping_text
from ismdata.convert.parts import FormatChoice, SourcePart, UnknownFormat, open_parts
from ismdata.convert.sources.source_types import AnySource, ConvertedSource
from ismdata.errors import DataError, Refused

#: Records that a mapping is guessed from.
_SAMPLE_RECORDS = 100
#: What the text shows of a conversation.
_SHOWN_MESSAGES = 12
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """How one part of a source would be read.

    Attributes:
        source: The part.
        layout: How its records are framed, such as "JSON Lines".
        format: The name of its format; None if no format matches and the record is read by a guessed mapping.
        looked_at: How many records were read.
        place: Where the first record is.
        conversations: The conversations of the first record as `convert` would write them, without `source`.
        refused: Why the first record has no conversations, None if it has.
        mapping: The text of a mapping file, None if no mapping can express the format.
        equivalent: Whether the mapping reads all records that were looked at exactly as the format does.
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
        """The explanation as JSON values."""
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
        """The explanation as text for a person."""
        known = "no known format" if self.format is None else f"format {self.format}"
        lines = [f"{self.source}: {self.layout}, {known}", ""]
        if self.refused is not None:
            lines.append(f"{self.place} is refused: {self.refused}")
        for number, conversation in enumerate(self.conversations, 1):
            which = f" (conversation {number} of {len(self.conversations)})" if len(self.conversations) > 1 else ""
            lines.append(f"{self.place} is read as{which}:")
            lines += [f"  {line}" for line in _message_lines(conversation)]
        if self.refused is not None or self.conversations:
            lines.append("")
        some = f"the first {self.looked_at} records" if self.looked_at > 1 else "the first record"
        if self.mapping is not None and self.equivalent:
            lines += [f"A mapping that reads {some} in the same way:", "", *self.mapping.splitlines()]
        elif self.mapping is not None:
            guess = f"A draft of a mapping, guessed from {some}. Check each line, then pass the file with --mapping:"
            lines += [guess, "", *self.mapping.splitlines()]
        elif self.format is not None:
            lines.append(f"No mapping was found that reads {some} in the same way: leave out --mapping.")
        else:
            lines.append("No messages were found in the records. docs/mapping.md describes how to write a mapping.")
        return "\n".join(lines)


def _message_lines(conversation: Mapping[str, Any]) -> Iterator[str]:
    """A line per message: role and the beginning of the text."""
    messages = conversation["messages"]
    width = max(len(message["role"]) for message in messages)
    for message in messages[:_SHOWN_MESSAGES]:
        whole = message["content"] if message["content"] is not None else message["tool_calls"]
        text = " ".join(whole.split())
        cut = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
        untrained = " (not trained)" if message["train"] is False else ""
        yield f"{message['role']:<{width}}  {cut}{untrained}"
    if len(messages) > _SHOWN_MESSAGES:
        yield f"… and {len(messages) - _SHOWN_MESSAGES} more messages"


@dataclass(frozen=True, kw_only=True)
class PartSample:
    """The first records of one part of a source.

    Attributes:
        source: The part.
        layout: How its records are framed.
        records: At least one record, each with its place.
        format: The name of the format, None if no format matches.
        corpus_format: The format, None if no format matches.
        choices: What the user decides where the data leave it open.
    """

    source: str
    layout: str
    records: Sequence[tuple[str, Any]]
    format: str | None
    corpus_format: CorpusFormat | None
    choices: Choices


def explain(source: AnySource, format: FormatChoice) -> Explanation:
    """Explain the first part of a source that has a record. Raises DataError if none has, or if a part is broken."""
    if isinstance(source, ConvertedSource):
        raise DataError(
            f"{source.name}: found a converted folder; expected a corpus to explain. `ismdata inspect {source.name}` "
            "shows its conversations"
        )
    try:
        sample = _sample(source, format)
    except DataError:
        if format.name != "auto":
            raise
        sample = _sample(source, replace(format, name="unknown", corpus_format=GuessedFormat()))
        if sample is None:
            raise
        sample = replace(sample, format=None, corpus_format=None)
    if sample is None:
        raise DataError(f"{source.name}: found no record; expected a corpus. Check that it is the right file")
    return explain_records(sample)


def _sample(source: AnySource, format: FormatChoice) -> PartSample | None:
    """The first records of the first part of a known format that has any. Raises UnknownFormat, or DataError."""
    unknown: list[UnknownFormat] = []
    for part in open_parts(source, format, unknown):
        records = list(islice(_records(part), _SAMPLE_RECORDS))
        if records:
            return PartSample(
                source=part.name,
                layout=part.layout,
                records=records,
                format=part.format,
                corpus_format=part.corpus_format,
                choices=format.choices,
            )
    if unknown:
        raise unknown[0]
    return None


def _records(part: SourcePart) -> Iterator[tuple[str, Any]]:
    """The records of a part that can be read, each with its place."""
    for block, place, _ in part.blocks:
        for row in range(len(block.numbers)):
            try:
                record = block.record(row)
            except Refused:
                continue
            yield f"{place.prefix}{block.numbers[row]}", record


def explain_records(sample: PartSample) -> Explanation:
    """Explain how the first records of a part are read.

    With a format, the mapping is one that reads the records in the same way, if one is found. Without, it is guessed.
    """
    corpus_format, choices = sample.corpus_format, sample.choices
    if isinstance(corpus_format, Mapped):
        return _explanation(sample, _file_text(corpus_format), equivalent=True)
    records = [record for _, record in sample.records]
    rows = records
    if _regroups(corpus_format):
        rows = [row for record in records for row in (record if isinstance(record, list) else [record])]
    guess = guess_mapping(rows)
    if guess is not None:
        guess = replace(guess, assistant=choices.assistant)
    if corpus_format is not None:
        same = next((one for one in _variants(guess) if _reads_same(one, rows, corpus_format, records, choices)), None)
        return _explanation(sample, None if same is None else _file_text(same), equivalent=same is not None)
    if guess is None:
        return _explanation(sample, None, equivalent=False)
    first = next(iter(regroup_records(guess, rows)), records[0])
    by_guess = replace(sample, records=[(sample.records[0][0], first)], corpus_format=_with_roles(guess, choices))
    return replace(_explanation(by_guess, _file_text(guess), equivalent=False), looked_at=len(records))


def _explanation(sample: PartSample, mapping: str | None, *, equivalent: bool) -> Explanation:
    """Read the first record and put the explanation together."""
    place, record = sample.records[0]
    conversations: list[dict[str, Any]] = []
    refused = None
    try:
        drafts = sample.corpus_format.parse_record(record) if sample.corpus_format is not None else ()
        rules = _rules(sample.corpus_format, sample.choices)
        conversations = [canonicalize(draft, rules) for draft in drafts]
    except Refused as refusal:
        refused = refusal.detail
    return Explanation(
        source=sample.source,
        layout=sample.layout,
        format=sample.format,
        looked_at=len(sample.records),
        place=place,
        conversations=tuple(conversations),
        refused=refused,
        mapping=mapping,
        equivalent=equivalent,
    )


def _rules(corpus_format: CorpusFormat | None, choices: Choices) -> Rules:
    if isinstance(corpus_format, Mapped):
        return Rules(roles=corpus_format.roles, join=corpus_format.join, preference=choices.preference)
    return Rules(roles=choices.roles, preference=choices.preference)


def _with_roles(mapping: Mapped, choices: Choices) -> Mapped:
    """The mapping with the choices. Its own role names override theirs, since they were guessed for these records."""
    return replace(with_choices(mapping, choices), roles={**choices.roles, **mapping.roles})


def _regroups(corpus_format: CorpusFormat | None) -> bool:
    """Whether a record of the format is a list of rows of the source."""
    return corpus_format is not None and type(corpus_format).regroup is not CorpusFormat.regroup


def _variants(guess: Mapped | None) -> Iterator[Mapped]:
    """Variants of a guess, those with fewer keys first: a key that changes nothing should not be in the file."""
    if guess is not None:
        for roles in ({}, guess.roles):
            for strip in (False, True):
                yield replace(guess, roles=roles, strip=strip)


def _reads_same(
    mapping: Mapped, rows: Sequence[Any], corpus_format: CorpusFormat, records: Sequence[Any], choices: Choices
) -> bool:
    """Whether a mapping reads the same messages from the rows as the format from the records, and reads any."""
    mapped = _with_roles(mapping, choices)
    found = [_outcomes(mapped, record, choices) for record in regroup_records(mapped, rows)]
    expected = [_outcomes(corpus_format, record, choices) for record in records]
    return found == expected and any(expected)


def _outcomes(corpus_format: CorpusFormat, record: Any, choices: Choices) -> list[Any]:
    """For each conversation of a record its messages, or the reason why it is refused."""
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


def _file_text(mapping: Mapped) -> str | None:
    """The mapping file, or None if one of its names is not valid Unicode."""
    own = {name: role for name, role in mapping.roles.items() if ROLE_NAMES.get(name) != role}
    text = mapping_text(replace(mapping, roles=own))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return text
