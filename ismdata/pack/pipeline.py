"""`ismdata pack`: converted conversations to packed shards.

Read conversations in batches, tokenize them, split what is too long and spool the documents to disk (tokenize.py); plan
which documents share a sequence (planning/); write the sequences as shards (shard_writer.py); write the index
(report.py). A journal records the spooled batches and the finished shards, so that an interrupted run can resume.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import ismdata
from ismdata.data import ConvertedFolder, Journal, JournaledLeftovers, Quarantine, open_output, write_index
from ismdata.display import LOGGED, Reporter
from ismdata.errors import DataError, UsageError
from ismdata.memory import give_back, kept_memory
from ismdata.pack.job import PackJob
from ismdata.pack.options import PackOptions
from ismdata.pack.parts import pack_parts, parts_of
from ismdata.pack.planning.plan import plan
from ismdata.pack.report import PackReport, conversation_counts, packed_index
from ismdata.pack.shard_writer import SHARD_TOKENS, write_shards
from ismdata.pack.tokenize import sampled_texts, tokenize
from ismdata.rendering import Encoding, cautions, load_pretrained, probe_encoding, shapes_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ismdata.rendering import SavedTokenizer


def pack(
    converted: Sequence[Path],
    output: Path,
    options: PackOptions | None = None,
    *,
    overwrite: bool = False,
    reporter: Reporter = LOGGED,
    **fields: Any,
) -> PackReport:
    """Pack converted folders into `output`, or resume an interrupted call with the same arguments.

    Args:
        converted: Folders that `convert` wrote. Of folders of splits, each split is packed to a folder of its own.
        output: The folder to write. It appears when it is complete.
        options: How to pack.
        overwrite: Replace an existing folder.
        reporter: Receives notes and progress.
        fields: Fields of `PackOptions`, in place of `options` or to change some of them.

    Returns:
        What was packed and what was quarantined.

    Raises:
        UsageError: If options exclude each other, or differ from those of the interrupted run in `output`.
        DataError: If the conversations, the tokenizer or its template cannot be used. No output folder is left.

    Example:
        >>> pack([Path("converted")], Path("packed"), tokenizer="gpt2", seq_len=4096)  # doctest: +SKIP
    """
    started = time.perf_counter()
    options = PackOptions(**fields) if options is None else replace(options, **fields)
    if options.workers:
        os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    parts = parts_of(converted)
    check_distinct([folder for folders in parts.values() for folder in folders])
    if "" not in parts:

        def pack_part(folders: Sequence[Path], part: Path) -> PackReport:
            return pack(folders, part, options, reporter=reporter)

        return pack_parts(parts, output, options, overwrite=overwrite, reporter=reporter, pack_part=pack_part)
    sources = [ConvertedFolder(folder) for folder in converted]
    with (
        open_output(
            output, overwrite=overwrite, inputs=converted, leftovers=JournaledLeftovers(), reporter=reporter
        ) as folder,
        ThreadPoolExecutor(1) as reading,
        kept_memory(),
    ):
        # Read while the tokenizer is loaded.
        sample = reading.submit(sampled_texts, sources if options.tokenizer_backend != "hf" else [])
        shapes = reading.submit(_first_shapes, sources)
        tokenizer = load_pretrained(options.tokenizer)
        wait((sample, shapes))  # a template runs under a limit of memory, which is the whole process's
        encoding = _probe_encoding(tokenizer, options)
        for note in (*encoding.notes, *cautions(encoding, shapes.result())):
            reporter.note(note)
        run = _run(sources, encoding, options)
        with closing(Journal.open(folder, run, restart=overwrite)) as journal:
            job = PackJob(
                sources=sources, encoding=encoding, options=options, folder=folder, journal=journal, reporter=reporter
            )
            _check_finished(folder, journal)
            note_resumed(job)
            tokenized = tokenize(job, sample=sample.result, while_waiting=lambda: _save(encoding, folder / "tokenizer"))
            spool, quarantine, tally = tokenized.spool, tokenized.quarantine, tokenized.tally
            lengths = spool.seal()
            if not len(lengths):
                raise DataError(_nothing_left(job, quarantine))
            if lengths.sum(dtype=np.int64) > SHARD_TOKENS:  # a smaller corpus uses the freed memory again at once
                give_back()
            planned = plan(lengths, seq_len=options.seq_len, seed=options.seed)
            shards = write_shards(job, spool, planned, weighted=tally.weighted)
        if tally.unwritten_reasoning:
            answers = "answer" if tally.unwritten_reasoning == 1 else "answers"
            reporter.note(
                f"The template omits the reasoning of {tally.unwritten_reasoning:,} {answers}: only the text after it "
                "is trained."
            )
        counts = conversation_counts(job.conversations, tally.conversations, quarantine.reasons)
        totals = tally.totals(lengths, options.seq_len, sequences=planned.rows)
        write_index(
            folder,
            packed_index(job, shards, counts=counts, totals=totals, weighted=tally.weighted, backend=tokenized.backend),
        )
    return PackReport(
        output=output,
        counts=counts,
        totals=totals,
        notes=encoding.notes,
        first_refusals=tuple(quarantine.first.values()),
        seconds=time.perf_counter() - started,
    )


def check_distinct(converted: Sequence[Path]) -> None:
    """Raise UsageError if a folder is named twice: its conversations would be packed, and trained, twice."""
    seen: set[Path] = set()
    for folder in converted:
        if Path(folder).resolve() in seen:
            raise UsageError(
                f"{folder}: named twice; expected each folder once, because no answer is packed twice. Name it once; "
                "`ismdata train --epochs N` repeats the whole"
            )
        seen.add(Path(folder).resolve())


def _probe_encoding(tokenizer: PreTrainedTokenizerFast | SavedTokenizer, options: PackOptions) -> Encoding:
    """The tokenizer with its template, in the layout of the options."""
    encoding = probe_encoding(
        tokenizer,
        name=options.tokenizer,
        chat_template=options.chat_template,
        history=options.history,
        arguments=options.template_arguments,
        date=options.template_date,
    )
    if options.layout == "plain":
        return encoding
    return encoding.with_glm(
        mask_token=options.glm_mask_token,
        start_token=options.glm_start_token,
        every_answer=options.mask != "prefix",
    )


#: How many sources, and how many conversations of each, `_first_shapes` reads.
_SHAPE_SOURCES, _SHAPE_CONVERSATIONS = 8, 64


def _first_shapes(sources: Sequence[ConvertedFolder]) -> list[str]:
    """The shapes of the sources' first conversations."""
    firsts = (source.first(_SHAPE_CONVERSATIONS) for source in sources[:_SHAPE_SOURCES])
    return list(dict.fromkeys(shape for rows in firsts if rows is not None for shape in shapes_in(rows)))


def _run(sources: Sequence[ConvertedFolder], encoding: Encoding, options: PackOptions) -> dict[str, Any]:
    """All that the output depends on. A run resumes another only if both agree in this."""
    template = encoding.renderer.template
    names = ("seq_len", "mask", "over_long", "history", "prefix_every", "seed", "train_on", "tokenizer_backend")
    return {
        "command": "pack",
        "version": ismdata.__version__,
        "sources": [{"name": str(source.folder), "rows": source.rows, "sha256": source.sha256} for source in sources],
        "tokenizer": [Path(encoding.tokenizer.name).name, encoding.tokenizer.sha256],
        "chat_template": [template.name, template.sha256],
        "options": {
            **{name: getattr(options, name) for name in names},
            "template_arg": dict(template.arguments),
            "template_date": template.date.isoformat(),
            "glm": None if encoding.glm is None else asdict(encoding.glm),
        },
    }


def _check_finished(folder: Path, journal: Journal) -> None:
    """Raise DataError unless the shards of the interrupted run still have their sizes.

    The journal lists a shard after it has reached the disk. Hashing the shards again would take about as long as
    writing them.
    """
    for entry in journal.finished:
        path = folder / entry["name"]
        found = path.stat().st_size if path.is_file() else None
        if found != entry["bytes"]:
            raise DataError(
                f"{path}: {'missing' if found is None else f'{found} bytes'}; expected {entry['bytes']} bytes, as the "
                "interrupted run wrote them. The file has changed since. The unfinished folder is removed: run the "
                "same command again"
            )


def note_resumed(job: PackJob) -> None:
    """Report what an interrupted run has done already."""
    state, finished = job.journal.state, job.journal.finished
    if state is not None or finished:
        done = (state or {}).get("done", 0)
        job.reporter.note(
            f"Resuming the interrupted run: {done:,} of {job.conversations:,} conversations tokenized, "
            f"shards written: {len(finished):,}."
        )


def _save(encoding: Encoding, folder: Path) -> None:
    """Write the tokenizer into `folder`; what an interrupted run left there is removed. Raises OSError."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        encoding.save(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error  # tokenizers reports a full disk as a plain Exception


def _nothing_left(job: PackJob, quarantine: Quarantine) -> str:
    """Why there is no document to pack."""
    if not job.conversations:
        return f"{', '.join(str(source.folder) for source in job.sources)}: no conversations; expected at least one"
    first = next(iter(quarantine.first.values()))
    reasons = ", ".join(f"{count} x {reason}" for reason, count in quarantine.reasons.most_common())
    return f"no conversation can be packed ({reasons}). The first: {first.source}: {first.detail}. Nothing was written"
