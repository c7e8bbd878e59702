"""`ismdata pack`: converted conversations to packed shards, top to bottom.

Conversations are read in batches, made into documents, and spooled to disk; then the plan says which documents share a
sequence, and the shards are gathered from the spool in that order.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import ismdata
from ismdata import conversation, parity
from ismdata.batch import ConversationBatch, conversation_batch
from ismdata.conversation import Quarantined, Refusal
from ismdata.documents import Made, Options, make_documents, wanted
from ismdata.encoder import Encoding, set_up
from ismdata.errors import DataError, UsageError
from ismdata.folders import QUARANTINE_NAME, ShardFile, describe_file, entries, output_folder, read_index, write_index
from ismdata.masks import BLOCK_SIZE, MASKS
from ismdata.overlong import POLICIES, Policy
from ismdata.packing import lower_bound, plan
from ismdata.sequences import sequences
from ismdata.shards import FORMAT, packed_schema
from ismdata.skeleton import History
from ismdata.spool import Spool
from ismdata.template import DEFAULT_DATE
from ismdata.tokens import DocumentEncoder

#: Tokens of a shard, and of the record batches inside it: what is in memory at a time while writing.
_SHARD_TOKENS = 1 << 24
_BATCH_TOKENS = 1 << 20

#: Conversations and bytes of text that are tokenised at a time.
_BATCH_CONVERSATIONS = 4096
_BATCH_BYTES = 8 << 20

#: Tells how far a stage has come: its name, done, total (0 where it is not known).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What `pack` did; the same numbers stand in the index."""

    output: Path
    counts: dict[str, Any]
    totals: dict[str, int]
    notes: tuple[str, ...]
    first_refusals: tuple[Quarantined, ...]
    seconds: float


def pack(
    converted: Sequence[Path],
    output: Path,
    *,
    tokenizer: str,
    chat_template: str | None = None,
    seq_len: int = 8192,
    mask: str = "ism",
    over_long: Policy = "split",
    history: History = "append",
    template_arguments: Mapping[str, Any] | None = None,
    template_date: datetime.date = DEFAULT_DATE,
    prefix_every: int = 1,
    workers: int = 0,
    seed: int = 0,
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda note: None,
    progress: Progress = lambda stage, done, total: None,
) -> PackReport:
    """Pack converted folders into `output`.

    workers: threads of the tokenizer, 0 for all cores; the output does not depend on it. Raises UsageError for options
    that cannot be, DataError for what is wrong with the data; then no output folder is left.
    """
    started = time.perf_counter()
    options = Options(
        seq_len=seq_len, mask=mask, over_long=over_long, history=history, prefix_every=prefix_every, seed=seed
    )
    _check_options(options, workers)
    if workers:
        os.environ["RAYON_NUM_THREADS"] = str(workers)
    sources = [_Source(folder) for folder in converted]
    with output_folder(output, overwrite=overwrite, inputs=converted) as partial:
        encoding = set_up(
            tokenizer, chat_template=chat_template, history=history, arguments=template_arguments, date=template_date
        )
        for note in encoding.notes:
            notify(note)
        try:
            spool, quarantine, tally = _tokenize(sources, encoding, options, partial, progress)
        except parity.ColumnsDiffer as found:
            notify(f"{found}: the template does more than its probing showed; each conversation is rendered by itself.")
            shutil.rmtree(partial / "spool")
            spool, quarantine, tally = _tokenize(sources, encoding, options, partial, progress, use_skeletons=False)
        lengths = spool.seal()
        if not len(lengths):
            raise DataError(_nothing_left(sources, quarantine))
        shards = _write_shards(partial, spool, lengths, encoding, options, tally, progress)
        shutil.rmtree(partial / "spool")
        (partial / "tokenizer").mkdir()
        encoding.save(partial / "tokenizer")
        totals = tally.totals(lengths, options)
        read = sum(source.rows for source in sources)
        counts = {
            "read": read,
            "packed": totals["conversations"],
            "quarantined": dict(sorted(quarantine.reasons.items())),
        }
        lost = read - totals["conversations"] - sum(quarantine.reasons.values())
        if lost:
            raise AssertionError(f"{lost} of {read} conversations are neither packed nor quarantined")
        index = _index(partial, encoding, options, counts, totals, shards, tally.weighted, sources)
        index["quarantine"] = entries([describe_file(partial / QUARANTINE_NAME, sum(quarantine.reasons.values()))])[0]
        write_index(partial, index)
    return PackReport(
        output=output,
        counts=counts,
        totals=totals,
        notes=encoding.notes,
        first_refusals=tuple(quarantine.first.values()),
        seconds=time.perf_counter() - started,
    )


def _check_options(options: Options, workers: int) -> None:
    if options.seq_len < BLOCK_SIZE or options.seq_len % BLOCK_SIZE:
        near = max(1, round(options.seq_len / BLOCK_SIZE)) * BLOCK_SIZE
        raise UsageError(
            f"--seq-len {options.seq_len}: expected a positive multiple of {BLOCK_SIZE}, for instance {near}"
        )
    if options.seq_len // BLOCK_SIZE > np.iinfo(np.int16).max:
        most = np.iinfo(np.int16).max * BLOCK_SIZE
        raise UsageError(f"--seq-len {options.seq_len}: expected at most {most}, which block tables can number")
    if options.mask not in MASKS:
        raise UsageError(f"--mask {options.mask}: expected one of {', '.join(MASKS)}")
    if options.over_long not in POLICIES:
        raise UsageError(f"--over-long {options.over_long}: expected one of {', '.join(POLICIES)}")
    if options.history not in ("append", "expand"):
        raise UsageError(f"--history {options.history}: expected append or expand")
    if options.prefix_every < 1:
        raise UsageError(f"--prefix-every {options.prefix_every}: expected 1 or more")
    if options.prefix_every > 1 and options.mask != "prefix":
        raise UsageError(f"--prefix-every goes with --mask prefix, not with --mask {options.mask}")
    if workers < 0:
        raise UsageError(f"--workers {workers}: expected 0 (all cores) or more")


class _Source:
    """A converted folder, opened and checked by size."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder, conversation.FORMAT)
        self.files = [ShardFile(**entry) for entry in self.index["shards"]]
        for file in self.files:
            file.check_size(self.folder)
        self.rows = sum(file.rows for file in self.files)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The conversations in batches that are small enough to work on."""
        for file in self.files:
            path = self.folder / file.name
            try:
                with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
                    if not stream.schema.equals(conversation.CONVERSATION_SCHEMA):
                        raise DataError(f"{path}: not the columns of converted conversations. Convert the corpus again")
                    for batch in stream:
                        yield from _small(batch)
            except pa.ArrowInvalid as error:
                raise DataError(f"{path}: not a readable Arrow stream ({error}). Convert the corpus again") from error


def _small(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A record batch in slices of bounded text. Where they are cut depends on the data alone."""
    messages = batch.column("messages")
    first = messages.offsets.to_numpy()
    contents = messages.values.field("content").cast(pa.large_string())
    ends = contents.offsets.to_numpy() if hasattr(contents, "offsets") else _string_offsets(contents)
    text_before = ends[first] - ends[first[0]]
    at = 0
    while at < len(batch):
        limit = int(np.searchsorted(text_before, text_before[at] + _BATCH_BYTES, side="right")) - 1
        end = min(max(limit, at + 1), at + _BATCH_CONVERSATIONS, len(batch))
        yield batch.slice(at, end - at)
        at = end


def _string_offsets(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    buffer = texts.buffers()[1]
    return np.frombuffer(buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]


class _Quarantine:
    """Refused conversations, written as they come and counted by reason."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, Quarantined] = {}

    def __enter__(self) -> _Quarantine:
        self._file = self.path.open("w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, batch: ConversationBatch, refused: Mapping[int, Refusal]) -> None:
        for c, refusal in sorted(refused.items()):
            record = batch.conversation(c)
            line = Quarantined(source=record["source"], reason=refusal.reason, detail=refusal.detail, record=record)
            self._file.write(json.dumps(line.as_json(), ensure_ascii=False) + "\n")
            self.reasons[refusal.reason] += 1
            self.first.setdefault(refusal.reason, line)


class _Tally:
    """Totals gathered on the way."""

    def __init__(self) -> None:
        self.conversations = self.split = self.truncated = self.truncated_tokens = self.dropped = 0
        self.target_tokens = 0
        self.sequences = 0
        self.weighted = False

    def add(self, made: Made, *, conversations: int) -> None:
        self.conversations += conversations
        for name in ("target_tokens", "split", "truncated", "truncated_tokens", "dropped"):
            setattr(self, name, getattr(self, name) + getattr(made, name))

    def totals(self, lengths: NDArray[np.int32], options: Options) -> dict[str, int]:
        tokens = int(lengths.sum(dtype=np.int64))
        return {
            "conversations": self.conversations,
            "documents": len(lengths),
            "sequences": self.sequences,
            "tokens": tokens,
            "target_tokens": self.target_tokens,
            "padding_tokens": self.sequences * options.seq_len - tokens,
            "lower_bound_sequences": lower_bound(lengths, options.seq_len),
            "dropped": self.dropped,
            "split": self.split,
            "truncated": self.truncated,
            "truncated_tokens": self.truncated_tokens,
        }


def _tokenize(
    sources: Sequence[_Source],
    encoding: Encoding,
    options: Options,
    folder: Path,
    progress: Progress,
    *,
    use_skeletons: bool = True,
) -> tuple[Spool, _Quarantine, _Tally]:
    """Read, render, tokenise and spool everything. Raises parity.ColumnsDiffer where skeletons are of no use."""
    spool, tally = Spool(folder / "spool"), _Tally()
    encoder = DocumentEncoder(encoding.renderer, encoding.tokenizer, options.history, use_skeletons=use_skeletons)
    with _Quarantine(folder / QUARANTINE_NAME) as quarantine:
        _tokenize_all(sources, encoding, encoder, options, spool, quarantine, tally, progress)
    return spool, quarantine, tally


def _tokenize_all(
    sources: Sequence[_Source],
    encoding: Encoding,
    encoder: DocumentEncoder,
    options: Options,
    spool: Spool,
    quarantine: _Quarantine,
    tally: _Tally,
    progress: Progress,
) -> None:
    total = sum(source.rows for source in sources)
    done = 0
    for rows in (rows for source in sources for rows in source.batches()):
        batch = conversation_batch(rows, encoding.sensitivity)
        tally.weighted |= batch.weight is not None
        encoder.begin(batch)
        _check_parity(encoding, encoder, batch, options, parity.LATER_SAMPLE if done else parity.SAMPLE)
        made = make_documents(encoder, batch, options)
        spool.append(made.documents, made.names)
        quarantine.add(batch, made.refused)
        tally.add(made, conversations=len(batch) - len(made.refused))
        done += len(batch)
        progress("tokenize", done, total)


def _check_parity(
    encoding: Encoding, encoder: DocumentEncoder, batch: ConversationBatch, options: Options, count: int
) -> None:
    """Law 5 on a sample of the batch. Raises DataError, parity.ColumnsDiffer."""
    requests = wanted(batch, options)
    chosen = np.flatnonzero(np.isin(requests.conversation, parity.sample(batch, count)))[: 2 * count]
    parity.check(encoding, encoder, batch, requests.take(chosen))


def _write_shards(
    folder: Path,
    spool: Spool,
    lengths: NDArray[np.int32],
    encoding: Encoding,
    options: Options,
    tally: _Tally,
    progress: Progress,
) -> list[ShardFile]:
    """Plan the sequences and gather them into shards."""
    planned = plan(lengths, seq_len=options.seq_len, seed=options.seed)
    row_documents = planned.row_documents.astype(np.int64)
    tally.sequences = rows = len(row_documents)
    begins = np.concatenate([[0], np.cumsum(row_documents)])
    schema = packed_schema(options.seq_len, weighted=tally.weighted)
    shard_rows = max(1, _SHARD_TOKENS // options.seq_len)
    batch_rows = max(1, _BATCH_TOKENS // options.seq_len)
    shards = []
    for number, shard in enumerate(range(0, rows, shard_rows)):
        path = folder / f"shard-{number:05d}.arrow"
        last = min(shard + shard_rows, rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for row in range(shard, last, batch_rows):
                end = min(row + batch_rows, last)
                gathered = spool.gather(planned.order[begins[row] : begins[end]].astype(np.int64))
                writer.write_batch(
                    sequences(
                        gathered,
                        row_documents[row:end],
                        schema,
                        seq_len=options.seq_len,
                        mask=options.mask,
                        pad_id=encoding.tokenizer.pad_id,
                    )
                )
                progress("write", end, rows)
        shards.append(describe_file(path, last - shard))
    return shards


def _index(
    folder: Path,
    encoding: Encoding,
    options: Options,
    counts: dict[str, Any],
    totals: dict[str, int],
    shards: list[ShardFile],
    weighted: bool,
    sources: Sequence[_Source],
) -> dict[str, Any]:
    tokenizer, template = encoding.tokenizer, encoding.renderer.template
    files = sorted(path for path in (folder / "tokenizer").rglob("*") if path.is_file())
    described = [describe_file(path, 0) for path in files]
    return {
        "format": FORMAT,
        "version": ismdata.__version__,
        "seq_len": options.seq_len,
        "block_size": BLOCK_SIZE,
        "mask": options.mask,
        "weighted": weighted,
        "counts": counts,
        "totals": totals,
        "tokenizer": {
            "name": Path(tokenizer.name).name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "pad_id": tokenizer.pad_id,
            "eos_id": tokenizer.eos_id,
        },
        "chat_template": {
            "name": template.name,
            "sha256": template.sha256,
            "history": options.history,
            "prefix_stable": encoding.renderer.profile.prefix_stable,
            "end_of_turn": encoding.renderer.profile.end_of_turn,
            "date": template.date.isoformat() if template.prints_date else None,
            "arguments": dict(template.arguments),
        },
        "shards": entries(shards),
        "files": [
            {**entry, "name": str(path.relative_to(folder))}
            for entry, path in zip(entries(described), files, strict=True)
        ],
        "inputs": [{"rows": source.rows, "shards": [file.sha256 for file in source.files]} for source in sources],
        "options": {
            "over_long": options.over_long,
            "prefix_every": options.prefix_every,
            "seed": options.seed,
        },
    }


def _nothing_left(sources: Sequence[_Source], quarantine: _Quarantine) -> str:
    if not sum(source.rows for source in sources):
        return f"{', '.join(str(source.folder) for source in sources)}: no conversations; expected at least one"
    first = next(iter(quarantine.first.values()))
    reasons = ", ".join(f"{count} x {reason}" for reason, count in quarantine.reasons.most_common())
    return f"no conversation can be packed ({reasons}). The first: {first.source}: {first.detail}. Nothing was written"
