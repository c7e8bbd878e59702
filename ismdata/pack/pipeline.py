"""`ismdata pack`: converted conversations to packed shards, top to bottom.

Conversations are read in batches, made into documents, and spooled to disk; then the plan says which documents share a
sequence, and the shards are gathered from the spool in that order. A journal records what is done: the batches that are
spooled, the shards that are written. A run that was killed goes on from there.
"""

from __future__ import annotations

import datetime
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial as bound
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import ismdata
from ismdata.choices import History, Layout, OverLong, TokenizerBackend, TrainOn, check_choice, check_mask
from ismdata.concurrency import BackgroundThread, map_on_two_threads
from ismdata.conversation import Quarantined
from ismdata.data import (
    FORMAT,
    QUARANTINE_NAME,
    ConvertedFolder,
    GrowingFile,
    Journal,
    ShardFile,
    describe_file,
    entries,
    open_output,
    packed_schema,
    sync_path,
    write_index,
)
from ismdata.errors import DataError, UsageError
from ismdata.masks import BLOCK_SIZE
from ismdata.memory import give_back, kept_memory
from ismdata.pack.options import PackOptions
from ismdata.pack.planning.plan import Plan, plan
from ismdata.pack.report import Tally
from ismdata.pack.sequences import sequences
from ismdata.pack.spool import Spool
from ismdata.pack.tokenize import Progress, Quarantine, sampled_texts, tokenize
from ismdata.rendering import DEFAULT_DATE, Encoding, cautions, load_encoding, shapes_in

#: Tokens of a shard, and of the record batches inside it: what is in memory at a time while writing.
_SHARD_TOKENS = 1 << 24
_BATCH_TOKENS = 1 << 19


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
    over_long: OverLong = "split",
    history: History = "append",
    template_arguments: Mapping[str, Any] | None = None,
    template_date: datetime.date = DEFAULT_DATE,
    prefix_every: int = 1,
    train_on: TrainOn = "all",
    layout: Layout = "plain",
    glm_mask_token: str | None = None,
    glm_start_token: str | None = None,
    tokenizer_backend: TokenizerBackend = "auto",
    workers: int = 0,
    seed: int = 0,
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda note: None,
    progress: Progress = lambda stage, done, total: None,
) -> PackReport:
    """Pack converted folders into `output`, or go on with it where the same call was killed.

    train_on: which of the answers that messages' own flags leave are trained: `all`, the `last` one of a
    conversation, or all without their reasoning (`content`). layout: `glm` puts two tokens before answers and
    writes two positions (`rendering/glm_tokens.py`); which control tokens, the two options say, or the
    tokenizer by itself.
    workers: threads of the tokenizer, 0 for all cores; the output does not depend on it. tokenizer_backend: `auto`
    is gigatoken where it is installed and gives the ids of tokenizers (`hf`), the reference; the output does not
    depend on it either, but for the entries in the index that name it. Raises UsageError for options that cannot be
    and for a call that differs from the one to go on with, DataError for what is wrong with the data; then no
    output folder is left.
    """
    started = time.perf_counter()
    options = PackOptions(
        seq_len=seq_len,
        mask=mask,
        over_long=over_long,
        history=history,
        prefix_every=prefix_every,
        seed=seed,
        train_on=train_on,
    )
    _check_options(options, tokenizer_backend, workers)
    _check_layout(layout, glm_mask_token, glm_start_token)
    if train_on == "content" and layout == "glm":
        raise UsageError("--train-on content goes with --layout plain: with glm an answer has one [START], not two")
    if workers:
        os.environ["RAYON_NUM_THREADS"] = str(workers)
    sources = [ConvertedFolder(folder) for folder in converted]
    with (
        open_output(output, overwrite=overwrite, inputs=converted, resumable=True) as partial,
        ThreadPoolExecutor(1) as beside,
        kept_memory(),
    ):
        # Read while the tokenizer is loaded.
        sample = beside.submit(sampled_texts, sources if tokenizer_backend != "hf" else [])
        shapes = beside.submit(_first_shapes, sources)
        encoding = load_encoding(
            tokenizer, chat_template=chat_template, history=history, arguments=template_arguments, date=template_date
        )
        if layout == "glm":
            encoding = encoding.with_glm(
                mask_token=glm_mask_token, start_token=glm_start_token, every_answer=mask != "prefix"
            )
        for note in (*encoding.notes, *cautions(encoding, shapes.result())):
            notify(note)
        with closing(
            Journal.open(partial, _run(sources, encoding, options, tokenizer_backend), restart=overwrite)
        ) as journal:
            _check_finished(partial, journal)
            _say_resumed(journal, sources, notify)
            spool, quarantine, tally, backend = tokenize(
                sources,
                encoding,
                options,
                tokenizer_backend,
                partial,
                journal,
                sample=sample.result,
                meanwhile=lambda: _save(encoding, partial / "tokenizer"),
                notify=notify,
                progress=progress,
            )
            lengths = spool.seal()
            if not len(lengths):
                raise DataError(_nothing_left(sources, quarantine))
            if lengths.sum(dtype=np.int64) > _SHARD_TOKENS:  # what a smaller corpus took is used again at once
                give_back()
            planned = plan(lengths, seq_len=options.seq_len, seed=options.seed)
            _write_shards(partial, spool, planned, encoding, options, tally.weighted, journal, progress)
            shards = [ShardFile(**entry) for entry in journal.finished]
        if tally.unwritten_reasoning:
            answers = "answer" if tally.unwritten_reasoning == 1 else "answers"
            notify(
                f"The template does not write the reasoning of {tally.unwritten_reasoning:,} {answers}: it is left "
                "out, and the text behind it is trained."
            )
        counts = _counts(sources, quarantine, tally)
        totals = tally.totals(lengths, options.seq_len, sequences=planned.rows)
        refusals = quarantine.first()
        index = _index(partial, encoding, options, counts, totals, shards, tally.weighted, sources)
        index["tokenizer"]["backend"] = backend
        index["options"]["tokenizer_backend"] = tokenizer_backend
        quarantined = describe_file(partial / QUARANTINE_NAME, sum(quarantine.reasons.values()))
        index["quarantine"] = asdict(quarantined)
        write_index(partial, index)
    return PackReport(
        output=output,
        counts=counts,
        totals=totals,
        notes=encoding.notes,
        first_refusals=refusals,
        seconds=time.perf_counter() - started,
    )


def _check_options(options: PackOptions, backend: TokenizerBackend, workers: int) -> None:
    if options.seq_len < BLOCK_SIZE or options.seq_len % BLOCK_SIZE:
        near = max(1, round(options.seq_len / BLOCK_SIZE)) * BLOCK_SIZE
        raise UsageError(
            f"--seq-len {options.seq_len}: expected a positive multiple of {BLOCK_SIZE}, for instance {near}"
        )
    if options.seq_len // BLOCK_SIZE > np.iinfo(np.int16).max:
        most = np.iinfo(np.int16).max * BLOCK_SIZE
        raise UsageError(f"--seq-len {options.seq_len}: expected at most {most}, which block tables can number")
    check_mask(options.mask, "--mask")
    check_choice("--over-long", options.over_long, OverLong)
    check_choice("--history", options.history, History)
    check_choice("--train-on", options.train_on, TrainOn)
    check_choice("--tokenizer-backend", backend, TokenizerBackend)
    if options.train_on == "content" and options.mask == "prefix":
        raise UsageError(
            "--train-on content goes with --mask ism or causal: under prefix all before the trained part of an answer "
            "is read in both directions, and so its reasoning would be"
        )
    if options.prefix_every < 1:
        raise UsageError(f"--prefix-every {options.prefix_every}: expected 1 or more")
    if options.prefix_every > 1 and options.mask != "prefix":
        raise UsageError(f"--prefix-every goes with --mask prefix, not with --mask {options.mask}")
    if workers < 0:
        raise UsageError(f"--workers {workers}: expected 0 (all cores) or more")


def _check_layout(layout: str, mask_token: str | None, start_token: str | None) -> None:
    check_choice("--layout", layout, Layout)
    for option, given in (("--glm-mask-token", mask_token), ("--glm-start-token", start_token)):
        if given is not None and layout != "glm":
            raise UsageError(f"{option} goes with --layout glm, not with --layout {layout}")


#: Sources whose first conversations are looked at for their shapes, and how many of each.
_LOOKED_AT, _CONVERSATIONS_EACH = 8, 64


def _first_shapes(sources: Sequence[ConvertedFolder]) -> list[str]:
    """The shapes that the first conversations of the sources have."""
    firsts = (source.first(_CONVERSATIONS_EACH) for source in sources[:_LOOKED_AT])
    return list(dict.fromkeys(shape for rows in firsts if rows is not None for shape in shapes_in(rows)))


def _run(
    sources: Sequence[ConvertedFolder], encoding: Encoding, options: PackOptions, backend: TokenizerBackend
) -> dict[str, Any]:
    """What two runs must have in common for one to go on with the other: all that the output depends on."""
    template = encoding.renderer.template
    return {
        "command": "pack",
        "version": ismdata.__version__,
        "sources": [{"name": str(source.folder), "rows": source.rows, "sha256": source.sha256} for source in sources],
        "tokenizer": [Path(encoding.tokenizer.name).name, encoding.tokenizer.sha256],
        "chat_template": [template.name, template.sha256],
        "options": {
            **asdict(options),
            "tokenizer_backend": backend,
            "template_arg": dict(template.arguments),
            "template_date": template.date.isoformat(),
            "glm": None if encoding.glm is None else asdict(encoding.glm),
        },
    }


def _check_finished(folder: Path, journal: Journal) -> None:
    """Raise DataError unless the finished shards are there. By their sizes: they were on the disk before the journal
    said so, and to read them all would cost a good part of what it spares.
    """
    for entry in journal.finished:
        path = folder / entry["name"]
        found = path.stat().st_size if path.is_file() else None
        if found != entry["bytes"]:
            raise DataError(
                f"{path}: {'missing' if found is None else f'{found} bytes'}; expected {entry['bytes']} bytes, which "
                "the interrupted run had written. It was changed since; what is left is removed: run the same command "
                "again"
            )


def _say_resumed(journal: Journal, sources: Sequence[ConvertedFolder], notify: Callable[[str], None]) -> None:
    if journal.state is not None or journal.finished:
        done, total = (journal.state or {}).get("done", 0), sum(source.rows for source in sources)
        notify(
            f"Going on with the run that was interrupted: {done:,} of {total:,} conversations tokenized, "
            f"shards written: {len(journal.finished):,}."
        )


def _counts(sources: Sequence[ConvertedFolder], quarantine: Quarantine, tally: Tally) -> dict[str, Any]:
    """Conversations in = packed + quarantined."""
    read = sum(source.rows for source in sources)
    lost = read - tally.conversations - sum(quarantine.reasons.values())
    if lost:
        raise AssertionError(f"{lost} of {read} conversations are neither packed nor quarantined")
    return {"read": read, "packed": tally.conversations, "quarantined": dict(sorted(quarantine.reasons.items()))}


def _save(encoding: Encoding, folder: Path) -> None:
    """Write the tokenizer into `folder`; what a crash left there is removed. Raises OSError."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        encoding.save(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error  # what tokenizers says of a full disk is nothing more specific


def _write_shards(
    folder: Path,
    spool: Spool,
    planned: Plan,
    encoding: Encoding,
    options: PackOptions,
    weighted: bool,
    journal: Journal,
    progress: Progress,
) -> None:
    """Gather the planned sequences into shards, those that the journal does not have."""
    row_documents = planned.row_documents.astype(np.int64)
    rows, begins = planned.rows, planned.offsets
    layout = "plain" if encoding.glm is None else "glm"
    schema = packed_schema(options.seq_len, weighted=weighted, layout=layout)
    shard_rows = max(1, _SHARD_TOKENS // options.seq_len)
    batch_rows = max(1, _BATCH_TOKENS // options.seq_len)

    def made(part: tuple[int, int]) -> pa.RecordBatch:
        row, end = part
        return sequences(
            spool.gather(planned.order[begins[row] : begins[end]].astype(np.int64)),
            row_documents[row:end],
            schema,
            seq_len=options.seq_len,
            mask=options.mask,
            pad_id=encoding.tokenizer.pad_id,
        )

    with BackgroundThread() as finish:
        for number, shard in enumerate(range(0, rows, shard_rows)):
            if number < len(journal.finished):
                continue
            shard_file = GrowingFile(folder / f"shard-{number:05d}.arrow")
            last = min(shard + shard_rows, rows)
            with (
                pa.OSFile(str(shard_file.path), "wb") as sink,
                pa.ipc.new_stream(sink, schema) as writer,
                BackgroundThread() as hashed,
                BackgroundThread() as write,
            ):
                parts = [(row, min(row + batch_rows, last)) for row in range(shard, last, batch_rows)]
                with closing(map_on_two_threads(made, parts)) as batches:
                    for (_, end), batch in zip(parts, batches, strict=True):
                        write.submit(_write, writer, batch, bound(hashed.submit, _follow, shard_file))
                        progress("write", end, rows)
            finish.submit(_finish, journal, shard_file, last - shard)


def _write(writer: pa.ipc.RecordBatchStreamWriter, batch: pa.RecordBatch, then: Callable[[], None]) -> None:
    writer.write_batch(batch)
    then()


def _follow(file: GrowingFile) -> None:
    file.follow()
    sync_path(file.path)  # on its way to the disk while the next batches are made, not all of it at the end


def _finish(journal: Journal, file: GrowingFile, rows: int) -> None:
    journal.finish(asdict(file.describe(rows)), [file.path])


def _index(
    folder: Path,
    encoding: Encoding,
    options: PackOptions,
    counts: dict[str, Any],
    totals: dict[str, int],
    shards: list[ShardFile],
    weighted: bool,
    sources: Sequence[ConvertedFolder],
) -> dict[str, Any]:
    tokenizer, template = encoding.tokenizer, encoding.renderer.template
    files = sorted(path for path in (folder / "tokenizer").rglob("*") if path.is_file())
    described = [describe_file(path, 0) for path in files]
    glm: dict[str, Any] = {}  # the plain layout is not named
    if encoding.glm is not None:
        glm = {"layout": "glm", "glm_tokens": {"mask": encoding.glm.mask_id, "start": encoding.glm.start_id}}
    return {
        "format": FORMAT,
        "version": ismdata.__version__,
        "seq_len": options.seq_len,
        "block_size": BLOCK_SIZE,
        "mask": options.mask,
        **glm,
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
            "next_turn_ends": list(encoding.renderer.profile.next_turn_ends),
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
            "train_on": options.train_on,
            "seed": options.seed,
        },
    }


def _nothing_left(sources: Sequence[ConvertedFolder], quarantine: Quarantine) -> str:
    if not sum(source.rows for source in sources):
        return f"{', '.join(str(source.folder) for source in sources)}: no conversations; expected at least one"
    first = quarantine.first()[0]
    reasons = ", ".join(f"{count} x {reason}" for reason, count in quarantine.reasons.most_common())
    return f"no conversation can be packed ({reasons}). The first: {first.source}: {first.detail}. Nothing was written"
