"""Verify that a packed folder holds the texts of its conversations, each in its place.

This shares no code with what makes spans: it decodes tokens and looks for the words of each message. So it also finds
errors that the checks of `pack` have in common. It cannot see punctuation, white space, texts without words, and which
of two equal texts is where.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.arrays import offsets_of
from ismdata.data import (
    PACKED_SPLIT_FORMAT,
    QUARANTINE_NAME,
    ConvertedFolder,
    PackedShards,
    Problems,
    VerifyReport,
    part_names,
)
from ismdata.data import shards as packed_shards
from ismdata.display import LOGGED, Reporter
from ismdata.errors import UsageError
from ismdata.masks import ANSWER
from ismdata.pack.parts import parts_of
from ismdata.rendering import reasoning_length

_WORD = re.compile(r"\w+")
_NUMBERED_NAME = re.compile(r"(.*)#[0-9]+", re.DOTALL)

#: A text with at most this many words may be part of another one by chance, so that finding it proves nothing.
_CHANCE_WORDS = 1


def verify_conversations(
    report: VerifyReport, converted: Sequence[Path], *, reporter: Reporter = LOGGED
) -> VerifyReport:
    """Check whether a packed folder holds the texts of the conversations it was made of.

    Args:
        report: The report of `verify` on the packed folder.
        converted: The converted folders it was made of.
        reporter: Receives progress.

    Returns:
        The report with the problems found, and the count `answers found`.

    Raises:
        UsageError: If the report is not on a packed folder.
        DataError: If the conversations cannot be read.
    """
    if report.format == PACKED_SPLIT_FORMAT:
        return _verify_parts(report, converted, reporter)
    if report.format != packed_shards.FORMAT:
        raise UsageError(f"--conversations requires a packed folder; {report.folder} is not one")
    problems, counts = check_texts(report.folder, converted, reporter=reporter)
    found = {"answers found": counts["answers"]}
    return replace(report, problems=[*report.problems, *problems], counts={**report.counts, **found})


def _verify_parts(report: VerifyReport, converted: Sequence[Path], reporter: Reporter) -> VerifyReport:
    """`verify_conversations` for a folder of splits, made of folders of splits."""
    parts = parts_of(converted)
    missing = [name for name in part_names(report.folder) if name not in parts]
    if missing:
        raise UsageError(
            f"--conversations: {report.folder} holds splits, and {', '.join(map(str, converted))} no {missing[0]}; "
            "expected the folders of splits that it was packed from"
        )
    problems, found = [], 0
    for name in part_names(report.folder):
        faults, counts = check_texts(report.folder / name, parts[name], reporter=reporter)
        problems += faults
        found += counts["answers"]
    return replace(report, problems=[*report.problems, *problems], counts={**report.counts, "answers found": found})


def check_texts(
    packed: Path, converted: Sequence[Path], *, reporter: Reporter = LOGGED
) -> tuple[list[str], dict[str, int]]:
    """Look for every text of the conversations in a packed folder: (problems with their places, counts).

    Raises DataError if a folder cannot be read.
    """
    shards = PackedShards(packed)
    conversations = _Conversations(converted)
    decode = _decoder(packed / "tokenizer")
    times = np.zeros(int(conversations.first[-1]), np.uint8)  # how often each message is a target
    seen: set[str] = set()
    problems = Problems()
    strays = 0
    for row in range(len(shards)):
        for name, blocks in _documents(shards, row, decode):
            rows = conversations.rows.get(name)
            if rows is None and (match := _NUMBERED_NAME.fullmatch(name)) is not None:
                name, rows = match[1], conversations.rows.get(match[1])
            if rows is None:
                strays += 1
                problems.add_rows(packed, "stray", f"row {row}: {name} is not in the converted folders", 1)
                continue
            seen.add(name)
            # Of several conversations with the same id, the one that fits best.
            found = [_check(conversations.messages(c), blocks, times[conversations.first[c] :]) for c in rows]
            faults, answered = min(found, key=lambda result: len(result[0]))
            c = rows[found.index((faults, answered))]
            np.add.at(times, conversations.first[c] + np.array(answered, np.int64), 1)
            for fault in faults:
                problems.add_rows(packed, fault.partition(":")[0], f"row {row}, {name}: {fault}", 1)
        reporter.progress("texts", row + 1, len(shards))
    _check_counts(packed, shards, conversations, times, seen, problems)
    counts = {"conversations": len(seen), "answers": int((times > 0).sum()), "documents of no conversation": strays}
    return problems.sentences(), counts


def words_of(text: str) -> str:
    """Return the words of a text with a space around each, so that `in` finds the words of one text in another.

    Example:
        >>> words_of("Kiel, 15:07")
        ' Kiel 15 07 '
    """
    found = _WORD.findall(text)
    return f" {' '.join(found)} " if found else ""


@dataclass(frozen=True, kw_only=True)
class _Message:
    """The words of a message.

    Attributes:
        role: Its role.
        texts: For each text its words as they are and as JSON escapes them; a template may write either.
        trained: Whether it is an answer to train.
    """

    role: str
    texts: tuple[tuple[str, ...], ...]
    trained: bool

    def is_in(self, words: str, *, whole: bool = True) -> bool:
        """Whether `words` contain all texts; if not `whole`, whether they contain one, or there are none."""
        found = [any(variant in words for variant in variants) for variants in self.texts]
        return all(found) if whole else any(found) or not found


@dataclass(frozen=True, kw_only=True)
class _Block:
    """An answer or a context of a document. `target`: the words that are trained."""

    is_answer: bool
    words: str
    target: str


class _Conversations:
    """Converted conversations by id. Raises DataError if a folder cannot be read."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.table = pa.concat_tables([ConvertedFolder(folder).table() for folder in folders])
        self.rows: dict[str, list[int]] = {}
        for row, name in enumerate(self.table["id"].to_pylist()):
            self.rows.setdefault(name, []).append(row)
        lengths = self.table["messages"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        self.first = offsets_of(lengths)

    def messages(self, row: int) -> list[_Message]:
        """The messages of the conversation in this row."""
        return [_message(message) for message in self.table["messages"][row].as_py()]


def _message(message: Mapping[str, Any]) -> _Message:
    """The words of a message, without reasoning, which a template may omit."""
    content = message["content"] or ""
    texts = [content]
    if message["role"] == "assistant":
        texts = [content[reasoning_length(content) :]]
        for call in json.loads(message["tool_calls"] or "[]"):
            texts += _strings(call.get("function", call).get("arguments"))
    variants = (tuple(dict.fromkeys(filter(None, map(words_of, _spellings(text))))) for text in texts)
    trained = message["role"] == "assistant" and message["train"] is not False and message["weight"] != 0
    return _Message(role=message["role"], texts=tuple(filter(None, variants)), trained=trained)


def _spellings(text: str) -> tuple[str, ...]:
    """A text as it is and as JSON escapes it; nothing for a text without words."""
    if not words_of(text):
        return ()
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def _strings(value: Any) -> Iterator[str]:
    """All strings in the arguments of a tool call, which may be JSON in a string."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        yield from [value] if isinstance(parsed, str) else _strings(parsed)
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from [item] if isinstance(item, str) else _strings(item)


def _check_counts(
    packed: Path,
    shards: PackedShards,
    conversations: _Conversations,
    times: NDArray[np.uint8],
    seen: set[str],
    problems: Problems,
) -> None:
    """Check that each conversation is packed or quarantined, and each answer to train is a target exactly once."""
    with (packed / QUARANTINE_NAME).open(encoding="utf-8", newline="\n") as lines:
        quarantined = {json.loads(line)["record"]["id"] for line in lines}
    options, totals = shards.index["options"], shards.index["totals"]
    some_missing = options.get("train_on") == "last" or options.get("prefix_every", 1) > 1 or totals["truncated"]
    for name, rows in conversations.rows.items():
        if name not in seen:
            if name not in quarantined:
                problems.add_rows(packed, "gone", f"{name}: neither packed nor quarantined", 1)
            continue
        if len(rows) > 1 and name in quarantined:
            continue  # the id does not tell which of them is packed
        for c in rows:
            for k, message in enumerate(conversations.messages(c)):
                count = int(times[conversations.first[c] + k])
                if count > 1 or (count == 0 and message.trained and message.texts and not some_missing):
                    problems.add_rows(packed, "times", f"{name}: message {k + 1} is a target {count} times", 1)


def _decoder(folder: Path) -> Callable[[list[list[int]]], list[str]]:
    """The function that decodes tokens with a saved tokenizer."""
    from ismdata.rendering import load_pretrained

    pretrained = load_pretrained(str(folder))

    def decode(ids: list[list[int]]) -> list[str]:
        texts: list[str] = pretrained.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return texts

    return decode


def _documents(
    shards: PackedShards, row: int, decode: Callable[[list[list[int]]], list[str]]
) -> list[tuple[str, list[_Block]]]:
    """The documents of a row: their names, and their contexts and answers in order."""
    sequence = shards[row]
    spans = sequence.spans.tolist()
    parts: list[list[int]] = []
    for start, end, _, _ in spans:
        ids, mask = sequence.input_ids[start:end], sequence.loss_mask[start:end] != 0
        parts += ids.tolist(), ids[mask].tolist()
    texts = decode(parts)
    documents: list[tuple[str, list[_Block]]] = []
    at = 0
    for name, document_end in zip(sequence.conversation_ids, np.cumsum(sequence.seq_lens).tolist(), strict=True):
        blocks: list[tuple[bool, str, str]] = []
        while at < len(spans) and spans[at][0] < document_end:
            is_answer = spans[at][2] == ANSWER
            whole, target = texts[2 * at], texts[2 * at + 1]
            if blocks:
                last_is_answer, last_whole, last_target = blocks[-1]
                both_context = not last_is_answer and not is_answer
                after_reasoning = last_is_answer and not last_target and is_answer and bool(target)
            if blocks and (both_context or after_reasoning):
                blocks[-1] = (last_is_answer, last_whole + whole, target)
            else:
                blocks.append((is_answer, whole, target))
            at += 1
        described = [
            _Block(is_answer=is_answer, words=words_of(whole), target=words_of(target))
            for is_answer, whole, target in blocks
        ]
        documents.append((name, described))
    return documents


def _check(
    messages: Sequence[_Message], blocks: Sequence[_Block], times: NDArray[np.uint8]
) -> tuple[list[str], list[int]]:
    """Check a document of a conversation: what is wrong, and which messages are targets in it."""
    answers = [k for k, message in enumerate(messages) if message.role == "assistant"]
    answer_blocks = [n for n, block in enumerate(blocks) if block.is_answer]
    matched = _match(messages, answers, [blocks[n] for n in answer_blocks], times)
    if matched is None:
        return ["answers: not the conversation's, or not in its order"], []
    block_of = dict(zip(matched, answer_blocks, strict=True))
    targets = [k for k in matched if blocks[block_of[k]].target]
    faults = []
    if targets:
        before = [k for k in answers if k < matched[0]]
        faults += _context_faults(messages, blocks, block_of, before[-1] + 1 if before else 0, targets[-1])
    for k in targets:
        rest = blocks[block_of[k]].target
        for variants in messages[k].texts:
            rest = next((rest.replace(words, " ", 1) for words in variants if words in rest), rest)
        for j in (k - 1, k + 1):
            if 0 <= j < len(messages) and messages[j].role != "assistant" and _contains_text(rest, messages[j]):
                faults.append(f"trained context: message {j + 1} ({messages[j].role}) is in the answer {k + 1}")
    return faults, targets


def _contains_text(words: str, message: _Message) -> bool:
    """Whether `words` contain a text of the message, and not by chance."""
    return any(len(text.split()) > _CHANCE_WORDS and text in words for variants in message.texts for text in variants)


def _context_faults(
    messages: Sequence[_Message], blocks: Sequence[_Block], block_of: Mapping[int, int], begin: int, last: int
) -> list[str]:
    """Texts that are missing in the contexts before the last trained answer, or before their own answer.

    block_of: the block of each answer. begin: the document's first message after the system prompt; last: the last
    trained answer.
    """
    faults = []
    at = offset = 0  # the block, and the place in its words, up to which texts of users and tools have been found
    contexts = [n for n, block in enumerate(blocks) if not block.is_answer and n < block_of[last]]
    head = next((k for k, message in enumerate(messages) if message.role != "system"), 0)
    for j, message in enumerate(messages[:last]):
        if message.role == "assistant" or not message.texts or (head <= j < begin):
            continue
        if message.role == "system":
            if not any(message.is_in(blocks[n].words) for n in contexts):
                faults.append(f"lost: message {j + 1} (system) is not in the context")
            continue
        limit = min((block_of[k] for k in block_of if k > j), default=block_of[last])
        for n in contexts:
            if n < at or n > limit:
                continue
            words = blocks[n].words[offset if n == at else 0 :]
            found = [words.find(text) for text in message.texts[0] if text in words]
            if found:
                # The space after a text is the one before the next text.
                at, offset = n, (offset if n == at else 0) + min(found) + 1
                break
        else:
            faults.append(f"lost: message {j + 1} ({message.role}) is not in the context of the answer that follows it")
    return faults


def _match(
    messages: Sequence[_Message], answers: Sequence[int], blocks: Sequence[_Block], times: NDArray[np.uint8]
) -> list[int] | None:
    """The messages that the answers of a document are; None if they are not answers of the conversation.

    They are consecutive answers of the conversation if possible, otherwise some of its answers in order. Of several
    possibilities, one whose targets have not been found in other documents is preferred.
    """

    def fits(k: int, block: _Block) -> bool:
        return messages[k].is_in(block.words, whole=bool(block.target))  # history may be cut

    runs = [
        run
        for start in range(len(answers) - len(blocks) + 1)
        if all(map(fits, run := list(answers[start : start + len(blocks)]), blocks))
    ]
    if runs:
        new = (run for run in runs if not any(times[k] for k, block in zip(run, blocks, strict=True) if block.target))
        return next(new, runs[0])
    found: list[int] = []
    for block in blocks:
        k = next((k for k in answers if (not found or k > found[-1]) and fits(k, block)), None)
        if k is None:
            return None
        found.append(k)
    return found
