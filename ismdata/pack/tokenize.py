"""The first stage of `pack`: tokenize conversations in batches and spool the documents, recorded in the journal."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain, repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ismdata.concurrency import delay_by_one
from ismdata.conversation import Quarantined, Refusal
from ismdata.data import SCRATCH_NAME, ConvertedFolder, Quarantine
from ismdata.errors import DataError
from ismdata.memory import give_back
from ismdata.pack import template_check
from ismdata.pack.batch_encoder import BatchEncoder, PrefetchedBatch, prefetch, prepare
from ismdata.pack.conversation_batch import ConversationBatch
from ismdata.pack.documents import BatchResult, make_documents, requests_for
from ismdata.pack.job import PackJob
from ismdata.pack.options import PackOptions
from ismdata.pack.report import Tally
from ismdata.pack.requests import Requests
from ismdata.pack.skeleton_cache import SkeletonCache
from ismdata.pack.spool import Spool
from ismdata.pack.template_check import LATER_SAMPLE, SAMPLE, SkeletonMismatch
from ismdata.rendering import (
    BackendDiffers,
    BackendError,
    Encoding,
    TokenizerEngine,
    choose_backend,
    choose_sample,
    disagreement,
)


@dataclass(frozen=True, kw_only=True)
class TokenizedCorpus:
    """All documents of a corpus, on disk, and what became of its conversations.

    Attributes:
        spool: The documents.
        quarantine: The conversations that were refused.
        tally: Totals for the index.
        backend: Name of the tokenizer backend that encoded the last texts.
    """

    spool: Spool
    quarantine: Quarantine
    tally: Tally
    backend: str


def tokenize(
    job: PackJob, *, sample: Callable[[], pa.LargeStringArray], while_waiting: Callable[[], None]
) -> TokenizedCorpus:
    """Tokenize all conversations of a job and spool their documents, or those that its journal does not record yet.

    The backend is released at the end, because its cache is large.

    Args:
        job: The run.
        sample: Returns the texts on which backends are compared, from `sampled_texts`.
        while_waiting: Called once, in this thread, while the first texts are being encoded.

    Returns:
        The spooled documents and the quarantine.

    Raises:
        DataError: If a source cannot be read, or its conversations cannot be tokenized reliably.
        UsageError: If the requested backend cannot be used.
    """
    while_waiting = cache(while_waiting)
    journal, note = job.journal, job.reporter.note
    state = journal.state or {}
    recorded, skeletons = state.get("backend"), state.get("skeletons", True)
    reference = job.encoding.tokenizer.reference
    chosen = choose_backend(job.options.tokenizer_backend, reference, sample, recorded=recorded)
    for text in chosen.notes:
        note(text)
    backend = chosen.backend
    if recorded not in (None, backend.identity):
        note(f"The interrupted run tokenized with {recorded}; now {backend.identity} is used. Tokenizing starts again.")
        journal.record({"skeletons": skeletons, "backend": backend.identity}, [])
    while True:
        try:
            return _tokenize_rest(job, backend, while_waiting)
        except BackendError as error:
            if not chosen.may_fall_back:
                raise disagreement(error) from error
            note(f"gigatoken is not used ({error}). Tokenizing starts again with tokenizers, which is slower.")
            backend = reference
        except SkeletonMismatch as error:
            if not skeletons:
                raise DataError(
                    f"{error}: two renderings of the conversation differ; expected the same text each time. The "
                    "template uses random numbers or the time. Remove that in a copy and pass it: --chat-template FILE"
                ) from error
            note(
                f"{error}: the template does more than its probing showed. Each conversation is rendered "
                "individually, which is slower."
            )
            skeletons = False
        # Recorded before the files are truncated: from now on the spooled documents are invalid.
        journal.record({"skeletons": skeletons, "backend": backend.identity}, [])


#: Batches whose texts are sampled to compare tokenizer backends.
_SAMPLED_BATCHES = 4


def sampled_texts(sources: Sequence[ConvertedFolder]) -> pa.LargeStringArray:
    """Return a stratified sample of the texts of some batches, spread evenly over all rows. Raises DataError."""
    total = sum(source.rows for source in sources)
    places = np.unique(np.linspace(0, total, _SAMPLED_BATCHES, endpoint=False).astype(np.int64))
    taken = [pa.array([], pa.large_string())]
    done = 0
    for source in sources:
        for rows in source.batches_of(places[(places >= done) & (places < done + source.rows)] - done):
            texts = pc.fill_null(rows.column("messages").flatten().field("content"), "").cast(pa.large_string())
            taken.append(texts.take(pa.array(choose_sample(texts))))
        done += source.rows
    return pa.concat_arrays(taken)


def tokenizer_texts(
    sources: Sequence[ConvertedFolder], encoding: Encoding, options: PackOptions
) -> Iterator[pa.LargeStringArray]:
    """Yield the texts that `pack` passes to its tokenizer: contents, with what the template writes around them.

    Benchmarks measure the tokenizer alone on them.

    Args:
        sources: Converted folders.
        encoding: The tokenizer and its chat template.
        options: As for `pack`.

    Yields:
        Texts, batch by batch, each once per batch. Texts of documents that are split are not included.

    Raises:
        DataError: If a source cannot be read.
    """
    cache = SkeletonCache(encoding)
    for rows in _batches_from(sources, 0):
        batch = ConversationBatch.from_rows(rows, encoding.sensitivity, options.train_on)
        for group in prepare(cache, batch, requests_for(batch, options)).groups:
            yield group.texts


def _tokenize_rest(job: PackJob, backend: TokenizerEngine, while_waiting: Callable[[], None]) -> TokenizedCorpus:
    """Tokenize what the journal does not record yet.

    Raises SkeletonMismatch if skeletons do not fit the template, BackendError if the backend fails.
    """
    journal = job.journal
    state = journal.state or {}
    spool = Spool(job.folder / SCRATCH_NAME, keep=state.get("rows"))
    quarantine = Quarantine(job.folder, state.get("quarantine"))
    tally = Tally(**state.get("tally", {}))
    skeletons, done = state.get("skeletons", True), state.get("done", 0)

    def record() -> None:
        state = {"skeletons": skeletons, "backend": backend.identity, "done": done, "rows": spool.rows}
        state |= {"quarantine": quarantine.state(), "tally": asdict(tally)}
        journal.record(state, [*spool.columns, *quarantine.files()])
        give_back()  # otherwise fragmented free memory grows with the corpus

    cache = SkeletonCache(
        job.encoding, backend=backend, use_skeletons=skeletons, without_reasoning=job.options.train_on == "content"
    )
    with closing(spool), closing(quarantine), closing(_checked_batches(job, cache, done, while_waiting)) as batches:
        for batch, result in batches:
            tally.weighted |= batch.weight is not None
            spool.append(result.documents, result.names)
            quarantine.add(_quarantined(batch, result.refused))
            tally.add(result, conversations=len(batch) - len(result.refused))
            done += len(batch)
            if journal.due():
                record()
            job.reporter.progress("tokenize", done, job.conversations)
        if done > state.get("done", 0) and journal.due():
            record()
    return TokenizedCorpus(spool=spool, quarantine=quarantine, tally=tally, backend=backend.name)


def _checked_batches(
    job: PackJob, cache: SkeletonCache, first_row: int, while_waiting: Callable[[], None]
) -> Generator[tuple[ConversationBatch, BatchResult], None, None]:
    """Yield batches and their documents, each when its checks have passed.

    The texts of the next batch are encoded while this one is laid out. The checks of a batch run while the next one is
    laid out.
    """
    encoding, options = job.encoding, job.options
    samples = chain([LATER_SAMPLE if first_row else SAMPLE], repeat(LATER_SAMPLE))
    with ThreadPoolExecutor(2) as checking, ThreadPoolExecutor(1) as prefetching:

        def start(rows: pa.RecordBatch) -> PrefetchedBatch:
            batch = ConversationBatch.from_rows(rows, encoding.sensitivity, options.train_on)
            return prefetch(cache, batch, requests_for(batch, options), prefetching)

        def lay_out(prefetched: PrefetchedBatch) -> _UncheckedBatch:
            while_waiting()
            batch = prefetched.batch
            sample = _sample(prefetched, next(samples))
            encoder = BatchEncoder(cache, batch, prefetched)
            with _blame(cache, batch, sample):
                comparison = checking.submit(template_check.prepare_comparison(encoder, sample).check)
                result = make_documents(encoder, options)
            checks = comparison, checking.submit(cache.backend.compare)
            return _UncheckedBatch(batch=batch, sample=sample, result=result, checks=checks)

        rows = _batches_from(job.sources, first_row)
        for unchecked in delay_by_one(map(lay_out, delay_by_one(map(start, rows)))):
            with _blame(cache, unchecked.batch, unchecked.sample):
                for check in unchecked.checks:
                    check.result()
            yield unchecked.batch, unchecked.result
    while_waiting()  # for a corpus without conversations


@dataclass(frozen=True, kw_only=True)
class _UncheckedBatch:
    """The documents of a batch while other threads check them.

    Attributes:
        batch: The batch.
        sample: The documents that are compared with their individual renderings.
        result: All documents.
        checks: The comparison of the sample, and the backend's own with the reference.
    """

    batch: ConversationBatch
    sample: Requests
    result: BatchResult
    checks: Sequence[Future[Any]]


def _quarantined(batch: ConversationBatch, refused: Mapping[int, Refusal]) -> Iterator[Quarantined]:
    """The refused conversations of a batch, in order. refused: by number in the batch."""
    for number, refusal in sorted(refused.items()):
        record = batch.conversation(number)
        yield Quarantined(source=record["source"], reason=refusal.reason, detail=refusal.detail, record=record)


def _batches_from(sources: Sequence[ConvertedFolder], start: int) -> Iterator[pa.RecordBatch]:
    """The batches of all sources, from row `start` of their rows on."""
    for source in sources:
        yield from source.batches(start)
        start = max(0, start - source.rows)


def _sample(prefetched: PrefetchedBatch, conversations: int) -> Requests:
    """The documents of some conversations, at most two per conversation."""
    requests = prefetched.requests
    sample = template_check.sample_conversations(prefetched.batch, conversations)
    return requests.take(np.flatnonzero(np.isin(requests.conversation, sample))[: 2 * conversations])


@contextmanager
def _blame(cache: SkeletonCache, batch: ConversationBatch, sample: Requests) -> Iterator[None]:
    """Turn a SkeletonMismatch into BackendDiffers if the sample matches with the reference tokenizer."""
    try:
        yield
    except SkeletonMismatch as error:
        if cache.backend.name == "hf":
            raise
        by_reference = SkeletonCache(
            cache.encoding, use_skeletons=cache.use_skeletons, without_reasoning=cache.without_reasoning
        )
        template_check.prepare_comparison(BatchEncoder(by_reference, batch), sample).check()
        raise BackendDiffers(str(error)) from error
