"""The interface of a corpus format: it recognizes records and parses them, one at a time or a block at a time.

Raw records become canonical rows in two ways. On the general path, `parse_record` parses one record at a time in plain
Python and handles every special case (`canonical.py` finishes the row). On the fast path, `parse_block` parses a whole
block into columns (`columnar.py` finishes the rows). It may decline the block or some of its rows, which then take the
general path. Both paths give the same rows; tests compare them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.choices import Paths, Preference, Side
from ismdata.errors import Refused

#: Record fields that can hold an id; the first one present is used.
ID_FIELDS = ("id", "conversation_id", "dialogue_id", "dialog_id", "uuid")

#: Less usual names of record fields with the system prompt, if their values are text.
MORE_SYSTEMS = (
    "system prompt", "system_message", "system message", "systemPrompt", "systemMessage", "system_msg", "sys_prompt",
    "sys", "System", "System Prompt", "System_Prompt",
)  # fmt: skip
#: Record fields that can be a system prompt: the fast path leaves records with them to the general one.
SYSTEM_LIKE = frozenset({*MORE_SYSTEMS, "persona", "instruction"})


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One conversation as its format parsed it, before `canonicalize` applies the rules that all formats share.

    Attributes:
        messages: One dict per message. Its keys are those of `conversation.MESSAGE_TYPE`, `function_call` and
            `training_flags.TRAINING_FLAGS`; its values, role names included, are as in the corpus.
        id: The record's id as in the corpus, or None.
        tools: The record's tool descriptions as in the corpus, or None.
        extra: The record's other fields, which become `meta`.
        ignored: Names of message fields that are dropped, such as `messages[].mood`.
        id_suffix: Tells apart several conversations of one record: the id becomes `id/id_suffix`.
        split_group: `--split` keeps conversations with the same group in the same part. None: decided by the content.
    """

    messages: Sequence[dict[str, Any]]
    id: Any = None
    tools: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    id_suffix: str = ""
    split_group: str | None = None


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the user decides where the data leave it open. A format uses those for which it has a field.

    Attributes:
        roles: Role names in lower case to canonical roles.
        assistant: Which of two speakers is trained.
        tree: Which paths of a tree of messages are read.
        preference: Which answers of preference data are read; None refuses such records.
    """

    roles: Mapping[str, str]
    assistant: Side = "second"
    tree: Paths = "all"
    preference: Preference | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """How records are named: `prefix` + number is a record's `source`, `stem` + "-" + number the id if it has none.

    `split` is the split that they belong to, None if nothing names one.
    """

    prefix: str
    stem: str
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A block of N records with M messages in total, as columns.

    Attributes:
        ids: string[N], null where a record has no id; None where no record has one.
        offsets: int64[N + 1]. The messages of record i are offsets[i]:offsets[i + 1].
        roles: string[M] or a dictionary array of strings, the names as in the corpus.
        contents: string[M].
        optional: Further columns of `conversation.MESSAGE_TYPE` by name, [M] each.
        fallback: bool[N], the rows that the general path must parse. Their messages here can be anything.
        meta: string[N], or None where no record has any.
        ignored: By name, how many message fields of each record are dropped, int64[N] each.
    """

    ids: pa.Array | None
    offsets: NDArray[np.int64]
    roles: pa.Array
    contents: pa.Array
    optional: dict[str, pa.Array] = field(default_factory=dict)
    fallback: NDArray[np.bool_]
    meta: pa.Array | None = None
    ignored: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)


class Block(Protocol):
    """Some complete records of one source, in order."""

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The line or record number of each record, counted from 1: int64[N]."""
        ...

    def record(self, row: int) -> Any:
        """One record as Python values. Raises Refused if it cannot be read."""
        ...

    def raw(self, row: int) -> Any:
        """One record as it is in the source, for the quarantine. Never raises."""
        ...

    def table(self, schema: pa.Schema, *, wrapped: bool = False) -> pa.Table | None:
        """All records as a table of exactly this schema, or None if some record does not fit it.

        `wrapped`: a record is not an object but the value of the schema's only column.
        """
        ...

    def texts(self) -> pa.Array | None:
        """The records as string[N], or None if they are not plain lines of UTF-8."""
        ...


class CorpusFormat(ABC):
    """A corpus format. Subclasses are frozen dataclasses; their fields are the variants of the format."""

    @property
    @abstractmethod
    def expects(self) -> str:
        """The shape of a record in a few words, for error messages that list the formats."""

    @property
    def plain_text(self) -> bool:
        """Whether a record is a line of text rather than a JSON value."""
        return False

    def depends_on(self, choice: str) -> bool:
        """Whether a field of `Choices` makes a difference to this format."""
        return choice in {one.name for one in fields(self)}  # type: ignore[arg-type]

    @abstractmethod
    def matches(self, record: Any) -> bool:
        """Whether a record looks like this format; for a format that regroups, whether a row does."""

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        """Group rows into records, for formats in which a row of the source is only part of a conversation."""
        yield from blocks

    @abstractmethod
    def parse_record(self, record: Any) -> Sequence[Draft]:
        """Parse one record into its conversations, usually one. Raises Refused."""

    def parse_block(self, block: Block) -> Columns | None:
        """Parse a whole block, or return None if this format or block has no fast path."""
        return None


class SourceBlock(NamedTuple):
    """A block with all that is needed to read it. Worker processes receive it pickled."""

    records: Block
    place: Place
    corpus_format: CorpusFormat


AnyFormat = TypeVar("AnyFormat", bound=CorpusFormat)


def with_choices(corpus_format: AnyFormat, choices: Choices) -> AnyFormat:
    """The format with those choices that it has a field for."""
    wanted = {one.name for one in fields(choices)} & {one.name for one in fields(corpus_format)}  # type: ignore[arg-type]
    return replace(corpus_format, **{name: getattr(choices, name) for name in wanted})  # type: ignore[type-var]


def fields_of(record: Any) -> dict[str, Any]:
    """The record as a dict. Raises Refused if it is not one."""
    if not isinstance(record, dict):
        raise Refused("not_an_object", f"the record is {kind_of(record)}; expected an object")
    return record


def take_id(fields: dict[str, Any]) -> Any:
    """Remove the first id from `fields` and return it, or None if there is none. Removes empty ids before it too."""
    for name in ID_FIELDS:
        value = fields.get(name)
        if value == "":
            del fields[name]
        elif isinstance(value, str | int) and not isinstance(value, bool):
            return fields.pop(name)
    return None


def kind_of(value: object) -> str:
    """The JSON type of a value with its article, for error messages.

    >>> kind_of([]), kind_of(None)
    ('a list', 'null')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    names |= {bytes: "bytes that are not UTF-8 text"}
    return names.get(type(value), type(value).__name__)
