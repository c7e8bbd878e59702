"""The measurements of `ismdata bench data`, one a function. Each runs in a process of its own:

    python -m ismdata.bench.data.stages NAME '{"argument": "value"}'

prints one JSON object, so that neither threads, caches nor peaks of memory of one reach another. Seconds are taken in
that process after the imports; what is compared is run in turn, ours and the yardstick, round after round.
"""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from ismdata.choices import TokenizerBackend
    from ismdata.pack import PackReport

#: Texts and bytes that yardsticks get at a time, about what `pack` gives a tokenizer.
_TEXTS_AT_ONCE = 32_768
_BYTES_AT_ONCE = 8 << 20
#: What planning is measured on: lengths of conversations, log-normal, mean about 800 tokens.
_LENGTHS_MEDIAN, _LENGTHS_SIGMA = 500.0, 1.0
_SAMPLED_EVERY = 0.02


def in_turn(rounds: int, **jobs: Callable[[], object]) -> dict[str, dict[str, list[float]]]:
    """Seconds of each job, round after round: `{"seconds": {name: […]}, "cpu": {name: […]}}`.

    `cpu` counts the threads of this process together; on a machine that others use too it moves less than the clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    cpu: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            gc.collect()
            started, busy = time.perf_counter(), time.process_time()
            job()
            seconds[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - busy)
    return {"seconds": seconds, "cpu": cpu}


def convert(corpus: str, scratch: str, rounds: int) -> dict[str, Any]:
    """`convert` against `pyarrow.json.read_json`, which only parses."""
    from pyarrow import json as pa_json

    from ismdata.convert import convert

    output = Path(scratch) / "converted"
    with open(corpus, "rb") as lines:  # noqa: PTH123
        longest = max(map(len, lines))
    # The default, a mebibyte, wherever a line fits into it: read_json refuses a line that is longer than its blocks.
    options = pa_json.ReadOptions(block_size=max(1 << 20, 1 << longest.bit_length()))
    return in_turn(
        rounds,
        ours=lambda: convert([corpus], output, overwrite=True),
        yardstick=lambda: pa_json.read_json(corpus, read_options=options),
    )


def pack(
    converted: str,
    scratch: str,
    rounds: int,
    tokenizer: str,
    chat_template: str | None,
    seq_len: int,
    backend: TokenizerBackend,
) -> dict[str, Any]:
    """`pack` against its tokenizer alone: on the texts of all messages (`yardstick`), and on those that `pack` gives
    it (`same`), with what the template writes around messages. `setup` is what `ours` does before it begins: loading
    the tokenizer and probing the template.
    """
    ours = _packing(Path(converted), scratch, tokenizer, chat_template, seq_len, backend)
    # A new one each time, as `pack` has it: tokenizers remember words, and the second time they would know them all.
    unused = [_encoder(tokenizer, backend) for _ in range(2 * rounds)]
    messages, same = (
        [_given(piece, backend) for piece in _pieces(texts)]
        for texts in (_texts(Path(converted)), _texts_encoded(ours, backend))
    )

    setup = _setup(tokenizer, chat_template, backend)

    def alone(pieces: list[Any]) -> None:
        encode = unused.pop()
        for piece in pieces:
            encode(piece)

    return in_turn(
        rounds,
        setup=setup,
        ours=ours,
        yardstick=lambda: alone(messages),
        same=lambda: alone(same),
    )


def road(
    corpus: str,
    scratch: str,
    rounds: int,
    tokenizer: str,
    chat_template: str | None,
    seq_len: int,
    backend: TokenizerBackend,
) -> dict[str, Any]:
    """`convert` and `pack` one after the other; `setup` as in `pack`."""
    from ismdata.convert import convert

    converted = Path(scratch) / "converted"
    pack = _packing(converted, scratch, tokenizer, chat_template, seq_len, backend)

    def ours() -> None:
        convert([corpus], converted, overwrite=True)
        pack()

    return in_turn(rounds, setup=_setup(tokenizer, chat_template, backend), ours=ours)


def plan(documents: int, seq_len: int, rounds: int) -> dict[str, Any]:
    """Planning so many log-normal lengths; the peak holds the lengths, the plan and what it takes on the way."""
    from ismdata.pack import lower_bound, plan

    rng = np.random.Generator(np.random.PCG64(0))
    lengths = np.empty(documents, np.int32)
    for start in range(0, documents, 1 << 20):
        drawn = rng.lognormal(np.log(_LENGTHS_MEDIAN), _LENGTHS_SIGMA, min(1 << 20, documents - start))
        lengths[start : start + len(drawn)] = np.clip(drawn, 1, seq_len)
    rows: list[int] = []
    timed = in_turn(rounds, ours=lambda: rows.append(len(plan(lengths, seq_len=seq_len, seed=0).row_documents)))
    return timed | {"sequences": rows[-1], "lower_bound": lower_bound(lengths, seq_len), "peak_bytes": _peak()}


def memory(converted: str, scratch: str, tokenizer: str, chat_template: str | None, seq_len: int) -> dict[str, Any]:
    """The peak of `pack`: resident in all, maps of files on disk included, and the part that is no file's."""
    pack = _packing(Path(converted), scratch, tokenizer, chat_template, seq_len, "auto")
    with _anonymous_peak() as anonymous:
        report = pack()
    shutil.rmtree(report.output)
    return {"peak_bytes": _peak(), "anonymous_bytes": max(anonymous), "tokens": report.totals["tokens"]}


def loader(packed: str, rounds: int, batch_size: int) -> dict[str, Any]:
    """A pass of a DataLoader over PackedDataset and Collator; the first, which opens the maps, is not counted."""
    import torch
    from torch.utils.data import DataLoader

    from ismdata.data import Collator, PackedDataset

    torch.set_num_threads(1)
    dataset = PackedDataset(packed)
    batches = DataLoader(dataset, batch_size=batch_size, collate_fn=Collator())

    def one_pass() -> int:
        return sum(batch["input_ids"].numel() for batch in batches)

    tokens = one_pass()
    passes = max(1, 20_000_000 // tokens)  # long enough for the clock
    timed = in_turn(rounds, ours=lambda: [one_pass() for _ in range(passes)])
    return timed | {"tokens": tokens * passes}


def verify(packed: str, rounds: int) -> dict[str, Any]:
    """`verify` of a packed folder: files, hashes and every invariant of every row."""
    from ismdata.data import verify

    counts = verify(Path(packed)).counts
    return in_turn(rounds, ours=lambda: verify(Path(packed))) | {"tokens": counts["tokens"]}


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    job.__name__: job for job in (convert, pack, road, plan, memory, loader, verify)
}


def _packing(
    converted: Path, scratch: str, tokenizer: str, chat_template: str | None, seq_len: int, backend: TokenizerBackend
) -> Callable[[], PackReport]:
    """The call of `pack` that is measured, imported already."""
    from ismdata.pack import pack

    return lambda: pack(
        [converted],
        Path(scratch) / "packed",
        tokenizer=tokenizer,
        chat_template=chat_template,
        seq_len=seq_len,
        tokenizer_backend=backend,
        overwrite=True,
    )


def _texts(converted: Path) -> Iterator[pa.LargeStringArray]:
    """The texts of all messages of a converted folder."""
    from ismdata.data import ConvertedFolder

    for batch in ConvertedFolder(converted).batches():
        yield batch.column("messages").flatten().field("content").drop_null().cast(pa.large_string())


def _texts_encoded(run: Callable[[], object], backend: TokenizerBackend) -> list[pa.LargeStringArray]:
    """The texts that a run gives to its tokenizer, in no certain order."""
    from ismdata.rendering import Gigatoken, Reference

    kind: type[Gigatoken | Reference] = Gigatoken if backend == "gigatoken" else Reference
    encode = kind.encode
    found = []

    def recording(self: Any, texts: pa.LargeStringArray, *, opening: bool) -> Any:
        found.append(texts)
        return encode(self, texts, opening=opening)

    with mock.patch.object(kind, "encode", recording):
        run()
    return found


def _pieces(texts: Iterable[pa.LargeStringArray]) -> Iterator[pa.LargeStringArray]:
    """Texts in pieces of bounded size."""
    for contents in texts:
        while len(contents):
            sizes = np.cumsum(pa.compute.binary_length(contents[:_TEXTS_AT_ONCE]).to_numpy())
            taken = max(1, int(np.searchsorted(sizes, _BYTES_AT_ONCE, side="right")))
            yield contents[:taken]
            contents = contents[taken:]


def _setup(tokenizer: str, chat_template: str | None, backend: TokenizerBackend) -> Callable[[], object]:
    """What `pack` does before it reads: done once already, so that nothing is imported or cached in one job only."""
    from ismdata.rendering import Gigatoken, load_encoding

    def setup() -> None:
        reference = load_encoding(tokenizer, chat_template=chat_template).tokenizer.reference
        if backend == "gigatoken":
            Gigatoken(reference)

    setup()
    if backend == "gigatoken":
        import awkward  # type: ignore[import-untyped, unused-ignore]  # noqa: F401  gigatoken does at its first text
    return setup


def _encoder(tokenizer: str, backend: TokenizerBackend) -> Callable[[Any], object]:
    """A tokenizer alone, texts to ids: `encode_batch_fast` of tokenizers, or `encode_batch` of gigatoken."""
    from ismdata.rendering import load_pretrained

    reference = load_pretrained(tokenizer).backend_tokenizer
    if backend == "hf":
        # With the ids, which lie in objects of tokenizers until they are asked for.
        return lambda texts: [encoding.ids for encoding in reference.encode_batch_fast(texts, add_special_tokens=False)]
    from gigatoken import Tokenizer

    encode: Callable[[Any], object] = Tokenizer.from_json(reference.to_str()).encode_batch
    return encode


def _given(texts: pa.LargeStringArray, backend: TokenizerBackend) -> Any:
    """Texts in the form that the tokenizer takes fastest, made before the clock runs."""
    if backend == "hf":
        return texts.to_pylist()
    import awkward  # type: ignore[import-untyped, unused-ignore]

    return awkward.from_arrow(texts, highlevel=True)


def _peak() -> int:
    """The most memory this process held, bytes. Itself alone: ru_maxrss may count what its parent held at the fork."""
    status = Path("/proc/self/status")
    if status.is_file():
        return _status("VmHWM")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextlib.contextmanager
def _anonymous_peak() -> Iterator[list[int]]:
    """A list whose maximum is the most memory that belongs to no file, sampled while the body runs. Bytes."""
    seen = [0]
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLED_EVERY):
            seen.append(_status("RssAnon"))

    sampler = threading.Thread(target=sample, daemon=True)
    if Path("/proc/self/status").is_file():
        sampler.start()
    try:
        yield seen
    finally:
        over.set()
        if sampler.is_alive():
            sampler.join()


def main() -> None:
    name, arguments = sys.argv[1:]
    print(json.dumps(MEASUREMENTS[name](**json.loads(arguments))))


if __name__ == "__main__":
    main()
