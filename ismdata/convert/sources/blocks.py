"""Blocks of complete records, as bytes, Arrow tables or Python values, with the interface `corpus_format.Block`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
from numpy.typing import NDArray

from ismdata.convert.corpus_format import ID_FIELDS
from ismdata.convert.json_values import json_text, parse_json, parse_record_json, without_nan
from ismdata.errors import DataError, Refused, shown


@dataclass(frozen=True, kw_only=True)
class LineBlock:
    """N records, each on a line of its own: record i is `data[starts[i]:ends[i]]`, without surrounding whitespace.

    Attributes:
        data: The bytes of all lines.
        starts: int64[N], the first byte of each record.
        ends: int64[N], the byte after each record.
        numbers: int64[N], the line or record number of each, counted from 1.
        plain_text: A record is the line itself, not a JSON value.
        document: The JSON document that the lines were cut from. A syntax error in a record then raises DataError,
            because the borders between records are no longer certain.
        keyed: A line is an entry of an object, `"key": record`.
    """

    data: bytes
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    numbers: NDArray[np.int64]
    plain_text: bool = False
    document: str | None = None
    keyed: bool = False

    def record(self, row: int) -> Any:
        try:
            text = self._bytes(row).decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"byte {error.start + 1} of the record is 0x{error.object[error.start]:02x}"
            raise Refused("not_utf8", f"{found}; expected UTF-8. Convert the file to UTF-8") from error
        if self.plain_text:
            return text
        try:
            return self._value(text, parse_record_json)
        except json.JSONDecodeError as error:
            found = (
                f"{error.msg} at character {error.pos + 1}, near {shown(text[max(0, error.pos - 20) : error.pos + 20])}"
            )
            if self.document is not None:
                found = f"{self.document}:record {self.numbers[row]}: {found}"
                expected = "an entry, a key and its value" if self.keyed else "a JSON array"
                raise DataError(f"{found}; expected {expected}. Repair the file or get it again") from error
            raise Refused("invalid_json", f"{found}; expected one JSON value on the line") from error
        except ValueError as error:
            raise Refused("invalid_json", f"{error}; expected JSON with less nesting and shorter numbers") from error

    def raw(self, row: int) -> Any:
        text = self._bytes(row).decode("utf-8", errors="backslashreplace")
        if self.plain_text:
            return text
        try:
            return self._value(text, parse_json)
        except ValueError:
            return text

    def _value(self, text: str, parse: Callable[[str], Any]) -> Any:
        if not self.keyed:
            return parse(text)
        ((key, value),) = parse(f"{{{text}}}").items()
        return with_key(key, value)

    def table(self, schema: pa.Schema, *, wrapped: bool = False) -> pa.Table | None:
        # Rows and lines correspond only if each line is one value. Checking the first and last byte of each line is
        # enough: no JSON value has a line break between a closing and an opening bracket of this kind.
        opening, closing = b"[]" if wrapped else b"{}"
        if self.plain_text or self.keyed or not len(self.starts) or not self._is_utf8:
            return None
        if (self._array[self.starts] != opening).any() or (self._array[self.ends - 1] != closing).any():
            return None
        data = self.data
        if wrapped:
            key = b'{"%s":' % schema.names[0].encode()
            data = key + (b"}\n" + key).join(self._bytes(row) for row in range(len(self.starts))) + b"}"
        try:
            table = pa.json.read_json(
                pa.BufferReader(data),
                pa.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
                # With an explicit schema, text that looks like a date stays text, and deep nesting is rejected.
                pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error"),
            )
        except pa.ArrowInvalid:
            return None
        return table if table.num_rows == len(self.starts) else None

    def texts(self) -> pa.Array | None:
        if not self.plain_text or not self._is_utf8:
            return None
        whole = pa.array([self.data[start:end] for start, end in zip(self.starts, self.ends, strict=True)], pa.binary())
        return whole.cast(pa.string())

    def _bytes(self, row: int) -> bytes:
        return self.data[self.starts[row] : self.ends[row]]

    @cached_property
    def _array(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.data, np.uint8)

    @cached_property
    def _is_utf8(self) -> bool:
        try:
            pa.array([self.data], pa.binary()).cast(pa.string())
        except pa.ArrowInvalid:
            return False
        return True


@dataclass(frozen=True, kw_only=True)
class TableBlock:
    """N rows of an Arrow table, from a Parquet file or a saved dataset."""

    rows: pa.Table
    numbers: NDArray[np.int64]

    def record(self, row: int) -> Any:
        return plain_value(self._values(row))

    def raw(self, row: int) -> Any:
        return json_value(self._values(row))

    def _values(self, row: int) -> Any:
        return self.rows.slice(row, 1).to_pylist()[0]

    def table(self, schema: pa.Schema, *, wrapped: bool = False) -> pa.Table | None:
        if wrapped or not set(self.rows.column_names) <= set(schema.names):
            return None
        columns = []
        for field in schema:
            if field.name not in self.rows.column_names:
                columns.append(pa.chunked_array([pa.nulls(len(self.rows), field.type)]))
                continue
            fitted = _fit(pa.concat_arrays(self.rows[field.name].chunks or [pa.nulls(0, field.type)]), field.type)
            if fitted is None:
                return None
            columns.append(pa.chunked_array([fitted]))
        return pa.Table.from_arrays(columns, schema=schema)

    def texts(self) -> pa.Array | None:
        return None


@dataclass(frozen=True, kw_only=True)
class ConversationBlock(TableBlock):
    """N conversations of a converted folder, which stay as they are."""


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A record that could not be read: the reason, and its content for the quarantine."""

    refusal: Refused
    raw: Any


@dataclass(frozen=True, kw_only=True)
class ValueBlock:
    """N records as Python values, from a CSV or YAML file. An `Unreadable` replaces a record that cannot be read."""

    values: Sequence[Any]
    numbers: NDArray[np.int64]

    def record(self, row: int) -> Any:
        value = self.values[row]
        if isinstance(value, Unreadable):
            raise value.refusal
        return value

    def raw(self, row: int) -> Any:
        value = self.values[row]
        return value.raw if isinstance(value, Unreadable) else value

    def table(self, schema: pa.Schema, *, wrapped: bool = False) -> pa.Table | None:
        return None

    def texts(self) -> pa.Array | None:
        return None


def with_key(key: str, value: Any) -> Any:
    """A record from an object of records, with its key: as `id` if it has no id, as `key` if it has another.

    A list of messages becomes an object with the list.

    >>> with_key("d1", {"log": []})
    {'id': 'd1', 'log': []}
    """
    if isinstance(value, list):
        return {"id": key, "messages": value}
    if not isinstance(value, dict):
        return value
    own = [value[name] for name in ID_FIELDS if value.get(name) not in (None, "")]
    if not own:
        return {"id": key, **{name: inner for name, inner in value.items() if name != "id"}}
    return value if key in map(str, own) or "key" in value else {**value, "key": key}


def _fit(values: pa.Array, wanted: pa.DataType) -> pa.Array | None:
    """`values` as the type `wanted`, with null for missing fields; None if anything, such as a field, would be lost."""
    found = values.type
    if found == wanted:
        return values
    if pa.types.is_null(found):
        return pa.nulls(len(values), wanted)
    if pa.types.is_null(wanted):
        return pa.nulls(len(values), wanted) if values.null_count == len(values) else None
    if pa.types.is_string(wanted):
        return values.cast(wanted) if pa.types.is_large_string(found) or pa.types.is_string_view(found) else None
    if pa.types.is_list(wanted) and (pa.types.is_list(found) or pa.types.is_large_list(found)):
        inner = _fit(values.flatten(), wanted.value_type)
        if inner is None:
            return None
        lengths = np.asarray(pa.compute.fill_null(pa.compute.list_value_length(values), 0))
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), inner, type=wanted, mask=values.is_null())
    if pa.types.is_struct(wanted) and pa.types.is_struct(found):
        names = {field.name for field in found}
        if len(names) != found.num_fields or not names <= {field.name for field in wanted}:
            return None
        children = [
            _fit(values.field(field.name), field.type) if field.name in names else pa.nulls(len(values), field.type)
            for field in wanted
        ]
        if any(child is None for child in children):
            return None
        return pa.StructArray.from_arrays(children, fields=list(wanted), mask=values.is_null())
    return None


_SCALARS = frozenset({str, int, bool, float})


def plain_value(value: Any) -> Any:
    """An Arrow value as records have it: maps as objects, dates as ISO text, NaN as `without_nan` does.

    Bytes become text if they are UTF-8, and else stay bytes: where a text is expected they are refused.
    """
    return without_nan(_converted(value))


def json_value(value: Any) -> Any:
    """An Arrow value as JSON can represent it: as `plain_value`, with other bytes as base64 and every NaN as null."""
    return json.loads(json_text(without_nan(_converted(value), used=frozenset()), "the record"))


def _converted(value: Any) -> Any:
    if value is None or type(value) in _SCALARS:  # most values
        return value
    if isinstance(value, dict):
        return {str(key): _converted(item) for key, item in value.items()}
    if isinstance(value, list):
        # Arrow gives a map as a list of tuples, and nothing else as tuples.
        if value and all(isinstance(item, tuple) for item in value) and len({key for key, _ in value}) == len(value):
            return {str(key): _converted(item) for key, item in value}
        return [_converted(item) for item in value]
    if isinstance(value, tuple):
        return [_converted(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta | Decimal):
        return str(value)
    return value
