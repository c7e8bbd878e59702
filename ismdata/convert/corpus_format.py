"""What a corpus format is: one object that recognises a record and turns it into a draft, one at a time or by columns.

Raw records become canonical rows in two ways. `parse_record` is the general path: one record at a time, plain Python,
every special case. `parse_block` is the fast path: a whole block at once. It may decline the block or some of its rows,
which then take the general path. Both give the same rows; the tests compare them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.choices import Paths, Preference, Side
from ismdata.errors import Refused

#: Fields that can name a record, the first one present wins.
ID_FIELDS = ("id", "conversation_id", "dialogue_id", "dialog_id", "uuid")


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A record taken apart by its format, before the rules that all formats share.

    `messages` are dicts whose keys are those of `conversation.MESSAGE_TYPE` plus `function_call` and the names in
    `training_flags.TRAINING_FLAGS`; their values and role names are still the corpus's own. `extra` holds the record's
    fields that have no place of their own; they become `meta`. `ignored` names message fields that are left out.
    """

    messages: Sequence[dict[str, Any]]
    id: Any = None
    tools: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    part: str = ""
    kin: str | None = None


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the data leave open and the user decides. A format with a field of the same name follows it.

    `roles` maps role names in lower case to canonical roles.
    """

    roles: Mapping[str, str]
    assistant: Side = "second"
    tree: Paths = "all"
    preference: Preference | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """How the records of a source are called: `prefix` and number say where one stands, `stem` and number name it."""

    prefix: str
    stem: str


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A block of N records with M messages in all, as columns.

    Rows whose `care` is set are left to the general road; their messages here can be anything. `optional` holds columns
    of `conversation.MESSAGE_TYPE` beyond role and content. `ignored` counts for each record the message fields that
    are left out, by name.
    """

    ids: pa.Array | None  # string[N], null where a record has no id of its own
    offsets: NDArray[np.int64]  # [N + 1], the messages of record i are offsets[i]:offsets[i + 1]
    roles: pa.Array  # string[M] or a dictionary of strings, the corpus's own names
    contents: pa.Array  # string[M]
    optional: dict[str, pa.Array] = field(default_factory=dict)  # [M] each
    care: NDArray[np.bool_]  # [N]
    meta: pa.Array | None = None  # string[N]
    ignored: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)  # [N] each


class Block(Protocol):
    """Some complete records of one source, in order."""

    @property
    def numbers(self) -> NDArray[np.int64]:
        """[N], the line or record number of each, counted from 1."""
        ...

    def record(self, row: int) -> Any:
        """One record as Python values. Raises Refused where it cannot be read."""
        ...

    def raw(self, row: int) -> Any:
        """One record as it stands in the source, for the quarantine: nothing is raised."""
        ...

    def table(self, schema: pa.Schema, *, wrapped: bool = False) -> pa.Table | None:
        """All records as a table of exactly this schema, or None when some record does not fit it.

        `wrapped` says that a record is not an object but the value of the schema's only column.
        """
        ...

    def texts(self) -> pa.Array | None:
        """The records as string[N], or None when they are not plain lines of UTF-8."""
        ...


class CorpusFormat(ABC):
    """One corpus format; the subclasses are frozen dataclasses, whose fields are what a format can vary in."""

    @property
    @abstractmethod
    def expects(self) -> str:
        """The shape in a few words, for the list of formats in an error message."""

    @property
    def plain_text(self) -> bool:
        """Whether a record is a line of text rather than a JSON value."""
        return False

    def depends_on(self, choice: str) -> bool:
        """Whether a field of `Choices` makes a difference to this format."""
        return choice in {one.name for one in fields(self)}  # type: ignore[arg-type]

    @abstractmethod
    def matches(self, record: Any) -> bool:
        """Whether a record looks like one of this format; where records are regrouped, whether a row of one does."""

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        """Blocks of whole records, where a record of the source is only a row of a conversation."""
        yield from blocks

    @abstractmethod
    def parse_record(self, record: Any) -> Sequence[Draft]:
        """Take one record apart: most hold one conversation. Raises Refused."""

    def parse_block(self, block: Block) -> Columns | None:
        """Take a block apart at once, or None where that is not possible."""
        return None


AnyFormat = TypeVar("AnyFormat", bound=CorpusFormat)


def with_choices(corpus_format: AnyFormat, choices: Choices) -> AnyFormat:
    """The format with those choices that it has a field for."""
    wanted = {one.name for one in fields(choices)} & {one.name for one in fields(corpus_format)}  # type: ignore[arg-type]
    return replace(corpus_format, **{name: getattr(choices, name) for name in wanted})  # type: ignore[type-var]


def fields_of(record: Any) -> dict[str, Any]:
    """The record as a dict. Raises Refused when it is not one."""
    if not isinstance(record, dict):
        raise Refused("not_an_object", f"the record is {kind_of(record)}; expected an object")
    return record


def take_id(fields: dict[str, Any]) -> Any:
    """Remove the first identifier from `fields` and give it back, None when there is none. Empty ones go too."""
    for name in ID_FIELDS:
        value = fields.get(name)
        if value == "":
            del fields[name]
        elif isinstance(value, str | int) and not isinstance(value, bool):
            return fields.pop(name)
    return None


def kind_of(value: object) -> str:
    """The JSON kind of a value, for error messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
