"""The last stage of `pack`: gather spooled documents into sequences and write these as shards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial

import numpy as np
import pyarrow as pa

from ismdata.concurrency import BackgroundThread, map_on_two_threads
from ismdata.data import GrowingFile, Journal, ShardFile, packed_schema, sync_path
from ismdata.pack.job import PackJob
from ismdata.pack.planning.plan import Plan
from ismdata.pack.sequences import build_sequences
from ismdata.pack.spool import Spool

#: Tokens per shard, and per record batch inside it. One record batch is built, written and hashed at a time.
SHARD_TOKENS = 1 << 24
BATCH_TOKENS = 1 << 19


def write_shards(job: PackJob, spool: Spool, plan: Plan, *, weighted: bool) -> list[ShardFile]:
    """Write the planned sequences as shards; skip those that the journal records as finished.

    While two threads gather the next record batches, another writes the current one and a fourth hashes what is
    written.

    Args:
        job: The run.
        spool: The sealed documents.
        plan: Which documents share a sequence, and the order of the sequences.
        weighted: Whether the shards have a column of loss weights.

    Returns:
        All shards, in order.
    """
    options, encoding, journal = job.options, job.encoding, job.journal
    row_documents, offsets = plan.row_documents.astype(np.int64), plan.offsets
    layout = "plain" if encoding.glm is None else "glm"
    schema = packed_schema(options.seq_len, weighted=weighted, layout=layout)
    shard_rows = max(1, SHARD_TOKENS // options.seq_len)
    batch_rows = max(1, BATCH_TOKENS // options.seq_len)

    def gather(rows: tuple[int, int]) -> pa.RecordBatch:
        start, end = rows
        return build_sequences(
            spool.gather(plan.order[offsets[start] : offsets[end]].astype(np.int64)),
            row_documents[start:end],
            schema,
            seq_len=options.seq_len,
            mask=options.mask,
            pad_id=encoding.tokenizer.pad_id,
        )

    with BackgroundThread() as finish:
        for number, first in enumerate(range(0, plan.rows, shard_rows)):
            if number < len(journal.finished):
                continue
            file = GrowingFile(job.folder / f"shard-{number:05d}.arrow")
            end = min(first + shard_rows, plan.rows)
            with (
                pa.OSFile(str(file.path), "wb") as sink,
                pa.ipc.new_stream(sink, schema) as writer,
                BackgroundThread() as hashing,
                BackgroundThread() as writing,
            ):
                ranges = [(row, min(row + batch_rows, end)) for row in range(first, end, batch_rows)]
                with closing(map_on_two_threads(gather, ranges)) as batches:
                    for (_, done), batch in zip(ranges, batches, strict=True):
                        writing.submit(_write, writer, batch, partial(hashing.submit, _hash, file))
                        job.reporter.progress("write", done, plan.rows)
            finish.submit(_finish, journal, file, end - first)
    return [ShardFile(**entry) for entry in journal.finished]


def _write(writer: pa.ipc.RecordBatchStreamWriter, batch: pa.RecordBatch, then: Callable[[], None]) -> None:
    writer.write_batch(batch)
    then()


def _hash(file: GrowingFile) -> None:
    file.follow()
    sync_path(file.path)  # per batch, so that the shard's end need not wait for all of it


def _finish(journal: Journal, file: GrowingFile, rows: int) -> None:
    journal.finish(asdict(file.describe(rows)), [file.path])
