"""Verify a converted or packed folder: that it is what its index says, and that every row is valid.

The index is checked against its own SHA-256 and for its keys, files for their size and SHA-256, shards for their
columns and as Arrow validates them, then the rows (those of packed folders in `invariants.py`). A file of the wrong
size or hash is not read further, so that Arrow reads only bytes that ismdata wrote. Each problem is one sentence with
the file, the row, what was found and what was expected.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ismdata import conversation
from ismdata.choices import LAYOUTS, MASKS
from ismdata.data import shards
from ismdata.data.arrow_stream import read_batches
from ismdata.data.index import (
    INDEX_NAME,
    PACKED_SPLIT_FORMAT,
    SPLIT_FORMAT,
    ShardFile,
    layout_faults,
    leaves_folder,
    load_index,
)
from ismdata.data.invariants import ROW_TOTALS, RowFormat, Rows, check_rows
from ismdata.data.output_folder import QUARANTINE_NAME
from ismdata.data.problems import Problems
from ismdata.data.wrong_folder import next_step
from ismdata.errors import DataError, shown
from ismdata.masks import BLOCK_SIZE

#: About how many tokens are checked at a time: enough to vectorise over, few enough for the processor's cache.
_TOKENS_AT_ONCE = 1 << 19

#: The suffix of the conversation id in each piece of a split conversation but the first.
_LATER_PIECE = "#([1-9][0-9]*)$"


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        folder: The folder.
        format: The format of its index; empty if it is unknown.
        problems: One sentence per problem.
        counts: What the files hold as they were counted, not as the index says.
    """

    folder: Path
    format: str
    problems: list[str]
    counts: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def verify(folder: str | Path) -> VerifyReport:
    """Check a folder that `convert` or `pack` wrote.

    Args:
        folder: A converted folder, a folder with the parts of a split, or a packed folder, as its index says.

    Returns:
        All problems and counts. Broken content is a problem, never an exception: so are an unreadable index and a
        missing shard.

    Raises:
        DataError: If there is no such folder.

    Example:
        >>> verify("packed").ok  # doctest: +SKIP
        True
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(
            f"{folder}: found {found}; expected a folder that `ismdata convert` or `ismdata pack` wrote."
            f"{next_step(folder, packed=False)}"
        )
    problems = Problems()
    index = _load_index(folder, problems)
    format_ = index.get("format")
    counts: dict[str, int] = {}
    if format_ == conversation.FORMAT:
        counts = _verify_converted(folder, index, problems)
    elif format_ == shards.FORMAT:
        counts = _verify_packed(folder, index, problems)
    elif format_ in (SPLIT_FORMAT, PACKED_SPLIT_FORMAT):
        counts = _verify_parts(folder, index, problems)
    elif index:
        problems.add(
            f"{folder / INDEX_NAME}: format is {format_!r}; expected {conversation.FORMAT} or {shards.FORMAT}. "
            "If another version of ismdata wrote the folder, verify it with that version"
        )
        format_ = ""
    return VerifyReport(folder=folder, format=format_ or "", problems=problems.sentences(), counts=counts)


def _verify_parts(folder: Path, index: dict[str, Any], problems: Problems) -> dict[str, int]:
    """Check each part of a split, and that it has as many conversations as the index of the split says."""
    if not _has_layout(index, {"parts": {}}, folder / INDEX_NAME, problems):
        return {}
    totals: Counter[str] = Counter()
    for name, rows in index["parts"].items():
        if not (folder / name).is_dir():
            problems.add(f"{folder / name}: missing; {INDEX_NAME} lists it. Restore it or make the folder again")
            continue
        report = verify(folder / name)
        for sentence in report.problems:
            problems.add(sentence)
        totals.update(report.counts)
        what = "conversations" if index["format"] == SPLIT_FORMAT else "sequences"
        if report.ok and report.counts.get(what) != rows:
            found = report.counts.get(what)
            problems.add(f"{folder / INDEX_NAME}: parts.{name} is {rows}; expected {found}, its {what}")
    return dict(totals)


# ---- the index and the files it lists ----

_CONVERTED_LAYOUT = {
    "counts": {"read": int, "written": int, "quarantined": {}},
    "shards": [ShardFile],
    "quarantine": ShardFile,
}
_PACKED_LAYOUT = {
    "seq_len": int,
    "block_size": int,
    "mask": str,
    "weighted": bool,
    "counts": {"read": int, "packed": int, "quarantined": {}},
    "totals": dict.fromkeys(
        ("conversations", *ROW_TOTALS, "lower_bound_sequences", "dropped", "split", "truncated"), int
    ),
    "tokenizer": {"vocab_size": int},
    "shards": [ShardFile],
    "quarantine": ShardFile,
    "files": [ShardFile],
}


def _load_index(folder: Path, problems: Problems) -> dict[str, Any]:
    """The index; empty, and a problem, if it is unreadable or has changed."""
    try:
        return load_index(folder)
    except DataError as error:
        problems.add(str(error))
        return {}


def _has_layout(index: dict[str, Any], layout: dict[str, Any], path: Path, problems: Problems) -> bool:
    """Whether the index has all keys of the layout, with their types; what it lacks is a problem each."""
    faults = list(layout_faults(index, layout))
    for fault in faults:
        problems.add(f"{path}: {fault}")
    return not faults


def _check_files(folder: Path, entries: list[dict[str, Any]], problems: Problems) -> list[ShardFile]:
    """The listed files that have their size and content; all others are problems, and so are files not listed."""
    intact = []
    listed = {INDEX_NAME}
    for entry in entries:
        file = ShardFile(**entry)
        if file.name in listed or leaves_folder(file.name):
            problems.add(
                f"{folder / INDEX_NAME}: lists {file.name!r}; expected each file once, with a name inside the folder"
            )
            continue
        listed.add(file.name)
        try:
            file.check_size(folder)
            file.check_hash(folder)
        except DataError as error:
            problems.add(str(error))
        except OSError as error:
            problems.add(f"{folder / file.name}: cannot be read ({error.strerror})")
        else:
            intact.append(file)
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and path.is_dir():
            problems.add(f"{path}: is a link to a folder; expected a folder. Replace the link by the folder")
        elif not path.is_dir() and path.relative_to(folder).as_posix() not in listed:
            problems.add(
                f"{path}: {INDEX_NAME} does not list it; expected only listed files. Move it out of the folder"
            )
    return intact


def _check_quarantine(folder: Path, index: dict[str, Any], intact: list[ShardFile], problems: Problems) -> None:
    """Check the lines of the quarantine, and their number per reason against the index."""
    path = folder / QUARANTINE_NAME
    if index["quarantine"]["name"] != QUARANTINE_NAME:
        problems.add(
            f"{folder / INDEX_NAME}: quarantine is {index['quarantine']['name']!r}; expected {QUARANTINE_NAME}"
        )
        return
    if not any(file.name == QUARANTINE_NAME for file in intact):
        return
    reasons: Counter[str] = Counter()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            reason, fault = _quarantine_reason(line)
            if fault:
                problems.add_rows(path, "line", f"line {number} {fault}", 1)
            else:
                reasons[reason] += 1
    rows = index["quarantine"]["rows"]
    if sum(reasons.values()) != rows:
        problems.add(f"{path}: {sum(reasons.values())} valid lines; expected {rows} ({INDEX_NAME})")
    claimed = index["counts"]["quarantined"]
    for reason in sorted(reasons.keys() | claimed.keys()):
        found, expected = reasons[reason], claimed.get(reason, 0)
        if found != expected:
            problems.add(f"{path}: {found} lines with reason {reason}; expected {expected} ({INDEX_NAME})")


def _quarantine_reason(line: bytes) -> tuple[str, str]:
    """The reason of a quarantine line, and what is wrong with the line: empty if nothing is."""
    try:
        refused = json.loads(line, parse_int=str)  # a refused record may hold numbers that are too long for an int
    except (ValueError, RecursionError) as error:
        return "", f"is not valid JSON ({error}); expected an object"
    if not isinstance(refused, dict):
        return "", f"is {shown(refused)}; expected an object"
    missing = [key for key in ("source", "reason", "detail", "record") if key not in refused]
    if missing:
        return "", f"lacks {', '.join(missing)}; expected source, reason, detail and record"
    if not isinstance(refused["reason"], str) or refused["reason"] not in conversation.REASONS:
        return "", f"has the reason {shown(refused['reason'])}; expected one that ismdata knows"
    return str(refused["reason"]), ""


def _check_conservation(folder: Path, counts: dict[str, Any], kept: str, problems: Problems) -> None:
    """Check that every record that was read is kept or quarantined; `kept` is the key of those that are kept."""
    quarantined = sum(n for n in counts["quarantined"].values() if isinstance(n, int))
    if counts["read"] != counts[kept] + quarantined:
        problems.add(
            f"{folder / INDEX_NAME}: counts.read is {counts['read']}; "
            f"expected {counts[kept] + quarantined} = {counts[kept]} {kept} + {quarantined} quarantined"
        )


def _batches(
    folder: Path, file: ShardFile, schema: pa.Schema, problems: Problems
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of a shard that Arrow finds valid, each with the number of its first row; what is wrong is a problem."""
    try:
        yield from read_batches(folder, file, schema, validate=True)
    except DataError as error:
        problems.add(str(error))


def _nulls(array: pa.Array, field: pa.Field) -> Iterator[str]:
    """Yield the names of fields, nested ones too, that hold null although the schema forbids it."""
    if array.null_count and not field.nullable:
        yield field.name
    if pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type):
        for name in _nulls(array.flatten(), field.type.value_field):
            yield f"{field.name}.{name}"
    elif pa.types.is_struct(field.type):
        for number in range(field.type.num_fields):
            for name in _nulls(array.field(number), field.type.field(number)):
                yield f"{field.name}.{name}"


# ---- converted folders ----


def _verify_converted(folder: Path, index: dict[str, Any], problems: Problems) -> dict[str, int]:
    if not _has_layout(index, _CONVERTED_LAYOUT, folder / INDEX_NAME, problems):
        return {}
    intact = _check_files(folder, [*index["shards"], index["quarantine"], *_other_files(index)], problems)
    counts = {"conversations": 0, "messages": 0}
    for file in _shards(index, intact):
        path = folder / file.name
        for first_row, batch in _batches(folder, file, conversation.CONVERSATION_SCHEMA, problems):
            counts["conversations"] += batch.num_rows
            counts["messages"] += _check_conversations(path, first_row, batch, problems)
    _check_quarantine(folder, index, intact, problems)
    _check_conservation(folder, index["counts"], "written", problems)
    if _all_read(index, intact) and counts["conversations"] != index["counts"]["written"]:
        problems.add(
            f"{folder / INDEX_NAME}: counts.written is {index['counts']['written']}; "
            f"expected {counts['conversations']}, which the shards hold"
        )
    return counts


def _check_conversations(path: Path, first_row: int, batch: pa.RecordBatch, problems: Problems) -> int:
    """Check the conversations of a batch; the number of their messages."""
    if _has_nulls(path, first_row, batch, problems):
        return 0
    messages = batch.column("messages").flatten()
    lengths = pc.list_value_length(batch.column("messages")).to_numpy()
    row = np.repeat(np.arange(batch.num_rows), lengths)
    place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    role, content = messages.field("role"), messages.field("content")

    def report(kind: str, bad: pa.Array, found: Callable[[int], str], expected: str) -> None:
        at = np.flatnonzero(bad.to_numpy(zero_copy_only=False))
        if len(at):
            first = int(at[0])
            sentence = f"row {first_row + row[first]}: message {place[first]} {found(first)}; expected {expected}"
            problems.add_rows(path, kind, sentence, len(np.unique(row[at])))

    known = pc.is_in(role, value_set=pa.array(conversation.ROLES))
    roles = ", ".join(conversation.ROLES)
    report("role", pc.invert(known), lambda at: f"has role {role[at].as_py()!r}", roles)
    calls = messages.field("tool_calls")
    report("content", pc.and_(content.is_null(), calls.is_null()), lambda _: "has no content", "content or tool calls")
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        problems.add_rows(path, "empty", f"row {first_row + empty[0]}: no messages; expected at least one", len(empty))
    return len(messages)


def _has_nulls(path: Path, first_row: int, batch: pa.RecordBatch, problems: Problems) -> bool:
    """Whether any field holds null although the schema forbids it; each is a problem."""
    names = [name for column, field in zip(batch.columns, batch.schema, strict=True) for name in _nulls(column, field)]
    for name in names:
        rows = f"rows {first_row} to {first_row + batch.num_rows - 1}"
        problems.add(f"{path}: {rows}: {name} holds null; expected a value everywhere")
    return bool(names)


def _other_files(index: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of further files that an index may list."""
    files = index.get("files", [])
    return [entry for entry in files if not [*layout_faults(entry, ShardFile)]] if isinstance(files, list) else []


def _shards(index: dict[str, Any], intact: list[ShardFile]) -> list[ShardFile]:
    """The shards among intact files."""
    names = {entry["name"] for entry in index["shards"]}
    return [file for file in intact if file.name in names]


def _all_read(index: dict[str, Any], intact: list[ShardFile]) -> bool:
    """Whether all shards are intact, so that the totals of the index can be compared with theirs."""
    return len(_shards(index, intact)) == len(index["shards"])


# ---- packed folders ----


def _verify_packed(folder: Path, index: dict[str, Any], problems: Problems) -> dict[str, int]:
    if not _has_layout(index, _PACKED_LAYOUT, folder / INDEX_NAME, problems):
        return {}
    row_format = _row_format(folder, index, problems)
    intact = _check_files(folder, [*index["shards"], index["quarantine"], *index["files"]], problems)
    _check_quarantine(folder, index, intact, problems)
    _check_conservation(folder, index["counts"], "packed", problems)
    if row_format is None:
        return {}
    totals: Counter[str] = Counter()
    conversations = 0
    sound = _all_read(index, intact)
    for file in _shards(index, intact):
        path = folder / file.name
        for first_row, batch in _batches(folder, file, row_format.schema, problems):
            if _has_nulls(path, first_row, batch, problems):
                sound = False
                continue
            conversations += _conversations(batch.column("conversation_ids"))
            at_once = max(1, _TOKENS_AT_ONCE // row_format.seq_len)
            for start in range(0, batch.num_rows, at_once):
                rows = Rows.of(batch.slice(start, at_once), first_row + start, row_format)
                totals.update(rows.totals(row_format))
                check_rows(path, rows, row_format, problems)
    counts = {"conversations": conversations} | {name: totals[name] for name in ROW_TOTALS}
    counts["lower_bound_sequences"] = -(-counts["tokens"] // row_format.seq_len)
    if sound:
        for name, found in counts.items():
            _expect_total(folder, f"totals.{name}", index["totals"][name], found, problems)
        _expect_total(folder, "counts.packed", index["counts"]["packed"], counts["conversations"], problems)
    return counts


def _expect_total(folder: Path, name: str, claimed: int, counted: int, problems: Problems) -> None:
    if claimed != counted:
        problems.add(f"{folder / INDEX_NAME}: {name} is {claimed}; expected {counted}, which the shards hold")


def _row_format(folder: Path, index: dict[str, Any], problems: Problems) -> RowFormat | None:
    """What the index says about each row; None, and problems, if a value is impossible."""
    path, before = folder / INDEX_NAME, len(problems)
    if index["seq_len"] % BLOCK_SIZE or not index["seq_len"]:
        problems.add(f"{path}: seq_len is {index['seq_len']}; expected a multiple of {BLOCK_SIZE}")
    if index["block_size"] != BLOCK_SIZE:
        problems.add(f"{path}: block_size is {index['block_size']}; expected {BLOCK_SIZE}")
    if index["mask"] not in MASKS:
        problems.add(f"{path}: mask is {index['mask']!r}; expected one of {', '.join(MASKS)}")
    tokenizer = index["tokenizer"]
    pad_id = tokenizer.get("pad_id") if tokenizer.get("pad_id") is not None else tokenizer.get("eos_id")
    if not isinstance(pad_id, int) or not 0 <= pad_id < tokenizer["vocab_size"]:
        problems.add(f"{path}: the tokenizer pads with {pad_id}; expected a pad_id or eos_id in its vocabulary")
    layout, glm = index.get("layout", "plain"), index.get("glm_tokens")
    if layout not in LAYOUTS:
        problems.add(f"{path}: layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    elif layout == "glm" and not _are_tokens(glm, tokenizer["vocab_size"]):
        problems.add(f"{path}: glm_tokens is {json.dumps(glm)[:80]}; expected mask and start, ids in the vocabulary")
    if len(problems) > before:
        return None
    return RowFormat(
        seq_len=index["seq_len"],
        mask=index["mask"],
        weighted=index["weighted"],
        vocab_size=tokenizer["vocab_size"],
        pad_id=int(pad_id),
        schema=shards.packed_schema(index["seq_len"], weighted=index["weighted"], layout=layout),
        glm=(glm["mask"], glm["start"]) if glm and layout == "glm" else None,
    )


def _are_tokens(glm: Any, vocab_size: int) -> bool:
    """Whether these are the ids of [MASK] and [START]."""
    return isinstance(glm, dict) and all(
        type(glm.get(name)) is int and 0 <= glm[name] < vocab_size for name in ("mask", "start")
    )


def _conversations(ids: pa.ListArray) -> int:
    """The number of conversations: documents that are not a later piece of one. Ids need not be distinct."""
    later_piece = pc.match_substring_regex(ids.flatten(), _LATER_PIECE)
    return len(later_piece) - int(pc.sum(later_piece).as_py() or 0)
