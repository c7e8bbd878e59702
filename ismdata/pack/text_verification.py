"""Law 7 from outside: does a packed folder hold the texts of the conversations that it was made of, each in its place?

Shares no code with what makes spans: tokens are decoded, and the words of each message are looked for. So it also sees
what the checks at pack time could all be wrong about. What it does not see: punctuation and blanks, texts without
words, and which of two equal texts stands where.
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

from ismdata.data import QUARANTINE_NAME, ConvertedFolder, PackedShards, Problems, VerifyReport
from ismdata.data import shards as packed_shards
from ismdata.display import LOGGED, Reporter
from ismdata.errors import UsageError
from ismdata.masks import ANSWER
from ismdata.rendering import reasoning_length

_WORD = re.compile(r"\w+")
_PIECE = re.compile(r"(.*)#[0-9]+", re.DOTALL)

#: Words of a neighbour's text that must stand in an answer before that counts as a fault: fewer may be chance.
_TELLING = 2


def words_of(text: str) -> str:
    """The words of a text with a blank around each, so that a text's words are found with `in`.

    >>> words_of("Kiel, 15:07")
    ' Kiel 15 07 '
    """
    found = _WORD.findall(text)
    return f" {' '.join(found)} " if found else ""


@dataclass(frozen=True, kw_only=True)
class _Message:
    """One message: its words as a corpus has them and as JSON has them, since templates write results either way."""

    role: str
    texts: tuple[tuple[str, ...], ...]  # of each text the ways in which its words may be written
    trained: bool

    def stands_in(self, words: str, *, whole: bool = True) -> bool:
        """Whether the words of all texts are among `words`; not `whole`: of one at least, where there are some."""
        found = [any(way in words for way in ways) for ways in self.texts]
        return all(found) if whole else any(found) or not found


@dataclass(frozen=True, kw_only=True)
class _Stretch:
    """Spans of a document that go together: one answer, or a context. `target`: the words that are trained."""

    is_answer: bool
    words: str
    target: str


class Conversations:
    """Converted folders by conversation id. Raises DataError where one is not readable."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.table = pa.concat_tables([ConvertedFolder(folder).table() for folder in folders])
        self.rows: dict[str, list[int]] = {}
        for row, name in enumerate(self.table["id"].to_pylist()):
            self.rows.setdefault(name, []).append(row)
        lengths = self.table["messages"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        self.first = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def messages(self, row: int) -> list[_Message]:
        return [_message(message) for message in self.table["messages"][row].as_py()]


def _message(message: Mapping[str, Any]) -> _Message:
    content = message["content"] or ""
    texts = [content]
    if message["role"] == "assistant":
        texts = [content[reasoning_length(content) :]]
        for call in json.loads(message["tool_calls"] or "[]"):
            texts += _leaves(call.get("function", call).get("arguments"))
    ways = (tuple(dict.fromkeys(filter(None, map(words_of, _ways(text))))) for text in texts)
    weight = message["weight"]
    trained = message["role"] == "assistant" and message["train"] is not False and weight != 0
    return _Message(role=message["role"], texts=tuple(filter(None, ways)), trained=trained)


def _ways(text: str) -> tuple[str, ...]:
    if not words_of(text):
        return ()
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        yield from [value] if isinstance(parsed, str) else _leaves(parsed)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item) if not isinstance(item, str) else [item]
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item) if not isinstance(item, str) else [item]


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
    if report.format != packed_shards.FORMAT:
        raise UsageError(f"--conversations requires a packed folder; {report.folder} is not one")
    problems, counts = check_texts(report.folder, converted, reporter=reporter)
    found = {"answers found": counts["answers"]}
    return replace(report, problems=[*report.problems, *problems], counts={**report.counts, **found})


def check_texts(
    packed: Path, converted: Sequence[Path], *, reporter: Reporter = LOGGED
) -> tuple[list[str], dict[str, int]]:
    """Look for every text of the conversations in a packed folder: (problems with their places, counts).

    Raises DataError if a folder cannot be read.
    """
    shards = PackedShards(packed)
    conversations = Conversations(converted)
    decode = _decoder(packed / "tokenizer")
    times = np.zeros(int(conversations.first[-1]), np.uint8)  # how often each message is a target
    seen: set[str] = set()
    problems = Problems()
    strays = 0
    for row in range(len(shards)):
        for name, stretches in _documents(shards, row, decode):
            rows = conversations.rows.get(name)
            if rows is None and (piece := _PIECE.fullmatch(name)) is not None:
                name, rows = piece[1], conversations.rows.get(piece[1])
            if rows is None:
                strays += 1
                problems.add_rows(packed, "stray", f"row {row}: {name} is none of the conversations", 1)
                continue
            seen.add(name)
            found = [_check(conversations.messages(c), stretches, times[conversations.first[c] :]) for c in rows]
            faults, answered = min(found, key=lambda one: len(one[0]))
            c = rows[found.index((faults, answered))]
            np.add.at(times, conversations.first[c] + np.array(answered, np.int64), 1)
            for fault in faults:
                problems.add_rows(packed, fault.partition(":")[0], f"row {row}, {name}: {fault}", 1)
        reporter.progress("texts", row + 1, len(shards))
    _check_counts(packed, shards, conversations, times, seen, problems)
    counts = {"conversations": len(seen), "answers": int((times > 0).sum()), "documents of no conversation": strays}
    return problems.sentences(), counts


def _check_counts(
    packed: Path,
    shards: PackedShards,
    conversations: Conversations,
    times: NDArray[np.uint8],
    seen: set[str],
    problems: Problems,
) -> None:
    """Every conversation packed or quarantined, every answer that is to be trained a target once."""
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
            continue  # which of them is packed, its id does not say
        for c in rows:
            for k, message in enumerate(conversations.messages(c)):
                count = int(times[conversations.first[c] + k])
                if count > 1 or (count == 0 and message.trained and message.texts and not some_missing):
                    problems.add_rows(packed, "times", f"{name}: message {k + 1} is a target {count} times", 1)


def _decoder(folder: Path) -> Callable[[list[list[int]]], list[str]]:
    from ismdata.rendering import load_pretrained

    pretrained = load_pretrained(str(folder))

    def decode(ids: list[list[int]]) -> list[str]:
        texts: list[str] = pretrained.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return texts

    return decode


def _documents(
    shards: PackedShards, row: int, decode: Callable[[list[list[int]]], list[str]]
) -> list[tuple[str, list[_Stretch]]]:
    """The documents of a row: their names, and their contexts and answers in order."""
    sequence = shards[row]
    spans = sequence.spans.tolist()
    parts: list[list[int]] = []
    for start, end, _, _ in spans:
        ids, mask = sequence.input_ids[start:end], sequence.loss_mask[start:end] != 0
        parts += ids.tolist(), ids[mask].tolist()
    texts = decode(parts)
    ends = np.cumsum(sequence.seq_lens).tolist()
    documents: list[tuple[str, list[_Stretch]]] = []
    at = 0
    for name, end in zip(sequence.conversation_ids, ends, strict=True):
        stretches: list[tuple[bool, str, str, int]] = []
        while at < len(spans) and spans[at][0] < end:
            start, stop, kind, _ = spans[at]
            whole, target = texts[2 * at], texts[2 * at + 1]
            last = stretches[-1] if stretches else None
            thought = last is not None and last[0] and not last[2] and bool(target) and kind == ANSWER
            if last is not None and ((not last[0] and kind != ANSWER) or thought):
                stretches[-1] = (last[0], last[1] + whole, target, stop)
            else:
                stretches.append((kind == ANSWER, whole, target, stop))
            at += 1
        documents.append(
            (
                name,
                [
                    _Stretch(is_answer=answer, words=words_of(whole), target=words_of(target))
                    for answer, whole, target, _ in stretches
                ],
            )
        )
    return documents


def _check(
    messages: Sequence[_Message], stretches: Sequence[_Stretch], times: NDArray[np.uint8]
) -> tuple[list[str], list[int]]:
    """What is wrong with one document of a conversation, and which of its messages are targets in it."""
    answers = [k for k, message in enumerate(messages) if message.role == "assistant"]
    spans = [at for at, stretch in enumerate(stretches) if stretch.is_answer]
    matched = _matched(messages, answers, [stretches[at] for at in spans], times)
    if matched is None:
        return ["answers: they are not the conversation's, or not in its order"], []
    place = dict(zip(matched, spans, strict=True))  # of each answer's message, the stretch that it is
    targets = [k for k in matched if stretches[place[k]].target]
    faults = []
    if targets:
        first = matched[0]
        before = [k for k in answers if k < first]
        begins = before[-1] + 1 if before else 0
        faults += _context_faults(messages, stretches, place, begins, targets[-1])
    for k in targets:
        rest = stretches[place[k]].target
        for ways in messages[k].texts:
            rest = next((rest.replace(way, " ", 1) for way in ways if way in rest), rest)
        for j in (k - 1, k + 1):
            if 0 <= j < len(messages) and messages[j].role != "assistant" and _tells(messages[j], rest):
                faults.append(f"trained context: message {j + 1} ({messages[j].role}) is in the answer {k + 1}")
    return faults, targets


def _tells(message: _Message, words: str) -> bool:
    return any(way.count(" ") > _TELLING and way in words for ways in message.texts for way in ways)


def _context_faults(
    messages: Sequence[_Message], stretches: Sequence[_Stretch], place: Mapping[int, int], begins: int, last: int
) -> list[str]:
    """Texts before the last trained answer that are not in the contexts before it, or not before their own answer."""
    faults = []
    at = offset = 0  # how far users' and tools' texts are found: a stretch, and a place in its words
    contexts = [n for n, stretch in enumerate(stretches) if not stretch.is_answer and n < place[last]]
    head = next((k for k, message in enumerate(messages) if message.role != "system"), 0)
    for j, message in enumerate(messages[:last]):
        if message.role == "assistant" or not message.texts or (head <= j < begins):
            continue
        if message.role == "system":
            if not any(message.stands_in(stretches[n].words) for n in contexts):
                faults.append(f"lost: message {j + 1} (system) is not in the context")
            continue
        limit = min((place[k] for k in place if k > j), default=place[last])
        for n in contexts:
            if n < at or n > limit:
                continue
            words = stretches[n].words[offset if n == at else 0 :]
            found = [words.find(way) for way in message.texts[0] if way in words]
            if found:
                # The blank behind a text is the one before the next.
                at, offset = n, (offset if n == at else 0) + min(found) + 1
                break
        else:
            faults.append(f"lost: message {j + 1} ({message.role}) is not in the context of the answer that follows it")
    return faults


def _matched(
    messages: Sequence[_Message], answers: Sequence[int], spans: Sequence[_Stretch], times: NDArray[np.uint8]
) -> list[int] | None:
    """The messages that the answers of a document are: a run of the conversation's answers, or some of them in order.

    Of several runs the first one whose targets have not been found in other documents.
    """

    def fits(k: int, stretch: _Stretch) -> bool:
        return messages[k].stands_in(stretch.words, whole=bool(stretch.target))  # history may be cut

    runs = [
        run
        for start in range(len(answers) - len(spans) + 1)
        if all(map(fits, run := list(answers[start : start + len(spans)]), spans))
    ]
    if runs:
        new = (run for run in runs if not any(times[k] for k, span in zip(run, spans, strict=True) if span.target))
        return next(new, runs[0])
    found: list[int] = []
    for stretch in spans:
        k = next((k for k in answers if (not found or k > found[-1]) and fits(k, stretch)), None)
        if k is None:
            return None
        found.append(k)
    return found
